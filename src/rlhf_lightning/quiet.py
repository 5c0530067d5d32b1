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
    "\nDetected KeyboardInterrupt",  # the run folder says more
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


def hush() -> None:
    """Silence chatter, for the whole process."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else tokenizers warn in every data worker
    disable_progress_bar()
    logging.getLogger("transformers.modeling_utils").addFilter(_NoReportOfNewHead())
    for name in (
        "pytorch_lightning.utilities.rank_zero",
        "lightning_fabric.utilities.rank_zero",
        "DeepSpeed",
    ):
        logging.getLogger(name).addFilter(_NoChatter())
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).* is deprecated")
    warnings.filterwarnings("ignore", message=r".*does not have many workers which may be a bottleneck")
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")  # those that are frozen
    warnings.filterwarnings("ignore", message=r"Checkpoint directory .* exists and is not empty")
