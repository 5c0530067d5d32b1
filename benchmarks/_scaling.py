"""One process of the part of scaling.py on several: iterations of PPO, or what a step of SFT sends."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from _ranks import strategy_of

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def trainer(strategy: Any, steps: int, callback: Any) -> Any:
    """A silent one."""
    import pytorch_lightning as pl

    return pl.Trainer(
        max_epochs=1,
        limit_train_batches=steps,
        accelerator="cpu",
        devices=WORLD,
        strategy=strategy,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[callback],
    )


def ppo(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each iteration, and the real tokens of it on all processes; every row is as long as it may be."""
    import pytorch_lightning as pl
    import torch
    from torch.utils.data import DataLoader

    from rlhf_lightning import PPOModule, Sampling
    from rlhf_lightning.batches import PromptBatch

    mine, length, new = options.prompts // WORLD, options.prompt_length, options.new_tokens
    seconds: list[float] = []

    class Clock(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *arguments: Any) -> None:
            trainer.strategy.barrier()
            self.began = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            trainer.strategy.barrier()
            seconds.append(time.perf_counter() - self.began)

    sizes = {"rollout_batch_size": options.prompts, "minibatch_size": options.prompts, "ppo_epochs": 1}
    sampling = Sampling(max_new_tokens=new, min_new_tokens=new)
    schedule = {"lr_schedule": "constant", "warmup_steps": 0}
    module = PPOModule(
        str(options.folder / "policy"),
        str(options.folder / "reward"),
        sampling=sampling,
        micro_batch_size=options.micro_batch,
        **sizes,
        **schedule,  # type: ignore[arg-type]
    )
    torch.manual_seed(RANK)
    rows = torch.arange(mine) + RANK * mine
    batches = [
        PromptBatch(torch.randint(2, 4000, (mine, length)), torch.ones(mine, length).bool(), [""] * mine, rows)
        for _ in range(options.steps)
    ]
    loader: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    trainer("auto" if WORLD == 1 else "ddp", options.steps, Clock()).fit(module, loader)
    return {"seconds": seconds, "tokens": options.prompts * (length + new)}


def sent(options: argparse.Namespace) -> dict[str, Any]:
    """By strategy, what the second step of SFT sends in one micro-batch of each process, and the trained weights."""
    import pytorch_lightning as pl
    from _synthetic import TINY, instruction_batches
    from torch.utils.data import DataLoader

    from rlhf_lightning import SFTModule
    from rlhf_lightning.training.traffic import Traffic

    class Listen(pl.Callback):
        def on_train_batch_start(self, *arguments: Any) -> None:
            self.traffic = Traffic()
            self.traffic.__enter__()

        def on_train_batch_end(self, *arguments: Any) -> None:
            self.traffic.__exit__(None, None, None)

    batches = instruction_batches(TINY._replace(rows=2, max_length=16), 2)[0]
    found = {}
    for name in options.strategies:
        listen = Listen()
        module = SFTModule(str(options.folder / "policy"), lr_schedule="constant", warmup_steps=0)
        loader: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        trainer(strategy_of(name), 2, listen).fit(module, loader)
        weights = sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters() if p.requires_grad)
        traffic = listen.traffic
        found[name] = {"volume": traffic.volume, "bytes": dict(traffic.bytes), "weights": weights}
    return found


def main() -> None:
    """Do it and write what came out."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("ppo", "sent"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cores", type=int, nargs="+", default=[])
    parser.add_argument("--strategies", nargs="+", default=[])
    for name, value in (("prompts", 8), ("prompt-length", 64), ("new-tokens", 32), ("micro-batch", 4), ("steps", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    if options.cores:
        os.sched_setaffinity(0, {options.cores[RANK % len(options.cores)]})  # before torch makes threads
    import torch

    torch.set_num_threads(1)
    result = ppo(options) if options.what == "ppo" else sent(options)
    options.out.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
