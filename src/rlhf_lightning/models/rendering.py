"""How a model's dialogues were written in its training: recorded in its `config.json`, and read again."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.chat.plain import PlainFormat
from rlhf_lightning.chat.writer import DialogueFormat
from rlhf_lightning.errors import UserError

RENDERING = "dialogue_rendering"
"""Key of `config.json` under which it says how the dialogues of training were written."""


def rendering_of(chat: ChatEncoder) -> dict[str, Any]:
    """How dialogues are written, as a model's config records it; the template is the tokenizer's.

    Args:
        chat: of the data that the model is trained on.
    """
    return {"dialogue_format": chat.dialogue_format, "plain_format": asdict(chat.plain_format)}


def recorded_chat(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> ChatEncoder | None:
    """What writes dialogues as in a model's training; None where its config does not record how.

    Args:
        config: of the model.
        tokenizer: its own.

    Raises:
        UserError: a record that says nothing sound.
    """
    record = getattr(config, RENDERING, None)
    if not record:
        return None
    try:
        recorded: DialogueFormat = record["dialogue_format"] if tokenizer.chat_template else "plain"
        return ChatEncoder(tokenizer, recorded, plain_format=PlainFormat(**record["plain_format"]))
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{RENDERING} in the config of '{config.name_or_path}' is not as it should be: {error!r}"
        ) from error


def policy_chat(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ChatEncoder:
    """What writes dialogues as a language model reads them.

    Args:
        model: its config may record how; one without a record reads them as the data modules write by default: through
            its tokenizer's chat template, or as plain Human and Assistant turns if there is none.
        tokenizer: its own.

    Raises:
        UserError: a record that says nothing sound.
    """
    recorded = recorded_chat(model.config, tokenizer)
    return recorded or ChatEncoder(tokenizer, "auto" if tokenizer.chat_template else "plain")
