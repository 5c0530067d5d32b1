"""What one of several processes sends; for `helpers.distributed`."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from helpers.strategy_runs import TinyModule, loader, trainer
from rlhf_lightning.training.traffic import Traffic


class Listen(pl.Callback):
    """Counts what the second step sends."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.traffic = Traffic()
        self.traffic.__enter__()

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.traffic.__exit__(None, None, None)


def sent(name: str, folder: str) -> dict[str, Any]:
    """What a step of one micro-batch of each process sends: `calls`, `bytes` by kind, `volume`, trained `weights`."""
    listen = Listen()
    module = TinyModule(folder, micro_sizes=[4, 4, 4])
    trainer(name, callbacks=[listen], max_steps=2).fit(module, loader())
    weights = sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters() if p.requires_grad)
    traffic = listen.traffic
    return {"calls": traffic.calls, "bytes": traffic.bytes, "volume": traffic.volume, "weights": weights}


def run_all(runs: list[dict[str, Any]]) -> list[Any]:
    """One run after the other in the same process."""
    return [sent(**run) for run in runs]
