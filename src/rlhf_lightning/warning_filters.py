"""Silences what libraries say that is not the user's business; warnings about the run itself stay."""

from __future__ import annotations

import logging
import os
import warnings

from transformers.utils.logging import disable_progress_bar

_CHATTER = (
    "💡 Tip:",
    "TPU available:",
    "HPU available:",
    "Loading `train_dataloader` to estimate",
    "\nDetected KeyboardInterrupt",  # the callback Stopping says more
    "Setting accelerator to CPU",
    "Trainer already configured with model summary",
    "`Trainer(val_check_interval=1",
)


class _NoChatter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_CHATTER)


class _NoReportOfNewHead(logging.Filter):
    """Drops transformers' report of missing weights where the only one is the head that a reward model starts with."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if "LOAD REPORT" not in message:
            return True
        rows = [line.split("|")[0].strip() for line in message.splitlines() if line.count("|") >= 2]
        return rows != ["Key", "score.weight"]


_FILTERS: dict[str, logging.Filter] = {
    "transformers.modeling_utils": _NoReportOfNewHead(),
    "pytorch_lightning.utilities.rank_zero": _NoChatter(),
    "lightning_fabric.utilities.rank_zero": _NoChatter(),
    "DeepSpeed": _NoChatter(),
}
"""By logger, made once: a logger takes the same filter once only."""

_WARNINGS = (
    r".*isinstance\(treespec, LeafSpec\).* is deprecated",
    r".*does not have many workers which may be a bottleneck",
    r"Found \d+ module\(s\) in eval mode",  # those that are frozen
    r"Checkpoint directory .* exists and is not empty",
)


def filter_warnings() -> None:
    """Silence chatter, for the whole process; once more changes nothing.

    The command line calls it, and every module and data module as it is made: importing the package changes nothing.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else tokenizers warn in every data worker
    disable_progress_bar()
    for name, chatter in _FILTERS.items():
        logging.getLogger(name).addFilter(chatter)
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
