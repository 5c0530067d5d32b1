"""Prepared folders of a few rows, made with the tiny tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.chat.encoder import ChatEncoder, DialogueFormat
from rlhf_lightning.data.limits import TokenLimits
from rlhf_lightning.data.preparing.manifest import PARTS
from rlhf_lightning.data.preparing.preparation import Preparation
from rlhf_lightning.data.preparing.prepared import PreparedFolder
from rlhf_lightning.data.sources import as_source
from rlhf_lightning.data.sources.files import open_parts
from rlhf_lightning.data.sources.raw_rows import RawRows


def preparation(
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dialogue_format: DialogueFormat = "auto",
    **settings: Any,
) -> Preparation:
    """A preparation of any data, in at most 64 tokens unless `max_length` and its like say otherwise."""
    names = ("max_length", "max_prompt_length", "response_room", "long_prompts", "minimum_response_length")
    given = {name: settings.pop(name) for name in names if name in settings}
    defaults = {"max_length": 64, "max_prompt_length": None, "response_room": None, "long_prompts": "cut"}
    for role in ("validation_data", "test_data"):
        if role in settings:
            settings[role] = as_source(settings[role])
    return Preparation(
        data=as_source(data),
        chat=ChatEncoder(tokenizer or tiny_tokenizer(), dialogue_format),
        limits=TokenLimits(**defaults | given),
        **settings,
    )


def build(folder: Path, data: Any, **settings: Any) -> PreparedFolder:
    """A folder with such data, prepared."""
    folder.mkdir(parents=True, exist_ok=True)
    preparation(data, **settings).build(folder)
    return PreparedFolder.open(folder)


def row_ids(folder: PreparedFolder, need: Any) -> dict[str, list[int]]:
    """Numbers of the rows in each part of one kind of example."""
    return {part: folder.part(need, part).row_ids.tolist() for part in PARTS}


def open_rows(data: Any, split: str | None = None, streaming: bool = False) -> RawRows:
    """The raw rows that training reads."""
    return open_parts(data, split, streaming)["train"]
