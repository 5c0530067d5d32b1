"""What stages log of a step: rates, speed, padding and memory."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.algorithms.checkpoints import CheckpointedModule
from rlhf_lightning.lightning_compat import forget_metrics
from rlhf_lightning.training import sum_over_ranks
from rlhf_lightning.training.optim import learning_rates
from rlhf_lightning.training.reporting import peak_memory


class LoggedModule(CheckpointedModule):
    """A module that logs numbers of its steps, the same on every rank."""

    _logged_before: frozenset[str] | set[str] = frozenset()

    def learning_rates(self) -> list[float]:
        """Of each group of the optimizer, as they are now."""
        return learning_rates(self.optimizers())

    def throughput(self, masks: list[Tensor], started: float, shown: list[Tensor] | None = None) -> dict[str, Tensor]:
        """`tokens_per_second` of a step on all processes, and `padding_share` of what the model was shown.

        Args:
            masks: of the step's data on this process; True for real tokens, any shapes, bool.
            started: `time.perf_counter()` as the step began.
            shown: masks of what went through the model, where it is not the data as it is.
        """
        shown = masks if shown is None else shown
        counts = [torch.stack([mask.sum() for mask in some]).sum() for some in (masks, shown)]
        counts.append(torch.full_like(counts[0], sum(mask.numel() for mask in shown)))
        # As floats: the quotient of integers has torch's default dtype, which bf16-true sets to bfloat16.
        tokens, shown_tokens, shown_places = sum_over_ranks(self, torch.stack(counts)).float()
        return {
            "tokens_per_second": tokens / (time.perf_counter() - started),
            "padding_share": 1 - shown_tokens / shown_places,
        }

    def log_metrics(self, metrics: dict[str, Any], on_bar: str | tuple[str, ...], batch_size: int) -> None:
        """Log numbers of a training step that are the same on every rank already, under `train/`, and the memory.

        Args:
            metrics: name to number or scalar tensor.
            on_bar: those that the progress bar shows, too.
            batch_size: examples the numbers speak of.
        """
        shown = (on_bar,) if isinstance(on_bar, str) else on_bar
        forget_metrics(self.trainer, self._logged_before - {*metrics})
        self._logged_before = {*metrics}
        for name, value in {**metrics, **peak_memory(self.device)}.items():
            if isinstance(value, int | float):  # Lightning would send it to the device, and wait until it is there
                value = torch.tensor(value, dtype=torch.promote_types(torch.get_default_dtype(), torch.float32))
            self.log(f"train/{name}", value, prog_bar=name in shown, batch_size=batch_size)
