"""One line about the models instead of a table."""

from __future__ import annotations

from typing import Any

from pytorch_lightning.callbacks import ModelSummary
from pytorch_lightning.utilities.model_summary import get_human_readable_count
from pytorch_lightning.utilities.rank_zero import rank_zero_info


class ShortSummary(ModelSummary):
    """Says in one line which models a stage holds and how many of their weights are trained."""

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]], total_parameters: int, trainable_parameters: int, *_: Any, **__: Any
    ) -> None:
        """Log the line.

        Args:
            summary_data: columns of Lightning's table.
            total_parameters: weights of all models.
            trainable_parameters: those that are trained.
        """
        columns = dict(summary_data)
        rows = zip(columns["Name"], columns["Type"], columns["Params"], strict=True)
        models = [f"{name} {kind} {count.strip()}" for name, kind, count in rows if count.strip() != "0"]
        total, trained = (get_human_readable_count(n).strip() for n in (total_parameters, trainable_parameters))
        rank_zero_info(f"models: {', '.join(models)}; {trained} of {total} weights are trained")
