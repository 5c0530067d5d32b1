"""What lies in an exported folder beside its model, written from a run or from a checkpoint of one."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.callbacks.model_card import CARD, Told, card_text
from rlhf_lightning.models.portable import save_tokenizer
from rlhf_lightning.runs.lineage import TRAINED_ON, write_record
from rlhf_lightning.runs.secrets import without_secrets
from rlhf_lightning.runs.whole_files import write_whole


def write_around(
    folder: Path, tokenizer: PreTrainedTokenizerBase, told: Told, record: Mapping[str, Any], prompts: np.ndarray
) -> None:
    """Write what stands beside a model: its tokenizer, its card, and where it comes from.

    Args:
        folder: of the model.
        tokenizer: with the chat template of the data.
        told: what the card says.
        record: of its lineage.
        prompts: hashes of those that it and the stages before it were trained on; empty where they are not known.
    """
    save_tokenizer(tokenizer, folder)
    (folder / CARD).write_text(without_secrets(card_text(told)), encoding="utf-8")
    write_record(folder, record)
    write_trained_on(folder, prompts)


def write_trained_on(folder: Path, prompts: np.ndarray) -> None:
    """Write which prompts a model was trained on; no file where none are known.

    Args:
        folder: of an export or a run.
        prompts: their hashes, sorted, uint64.
    """
    (folder / TRAINED_ON).unlink(missing_ok=True)
    if len(prompts):
        content = io.BytesIO()
        np.save(content, prompts)
        write_whole(folder / TRAINED_ON, content.getvalue())
