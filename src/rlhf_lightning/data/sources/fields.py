"""What stands in one field of a row: text, turns, a number, a list, or a bad row."""

from __future__ import annotations

import math
from typing import Any

from rlhf_lightning.chat.messages import Message
from rlhf_lightning.data.rows import MAX_CHARACTERS, BadRowError, DroppedRow, check_text

_LAST_TURN = "\n\nAssistant:"
_OTHER_TURN = "\n\nHuman:"
_ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
    "system": "system",
}


def split_dialogue(text: str, column: str, prompt_only: bool = False) -> tuple[str, str]:
    r"""A whole dialogue in Human and Assistant turns as prompt and last response.

    Args:
        text: the dialogue.
        column: where it stands.
        prompt_only: the response does not matter.

    Raises:
        BadRowError: it is no dialogue, or does not end with the assistant.
        DroppedRow: nothing stands before or after the last turn's header.

    Example:
        >>> split_dialogue("Human: hi\n\nAssistant: hello", "chosen")
        ('Human: hi\n\nAssistant:', ' hello')
    """
    before, mark, response = text.rpartition(_LAST_TURN)
    if not mark:
        raise BadRowError(
            f"{column} is no dialogue: it has no {_LAST_TURN.strip()!r} turn and no column says its prompt"
        )
    if _OTHER_TURN in response:
        raise BadRowError(f"{column} does not end with the assistant")
    # The field itself is sound text, and the public dialogue data holds such rows, so these never stop a run.
    if not before.strip():
        raise DroppedRow(f"prompt in {column} is empty")
    if not prompt_only and not response.strip():
        raise DroppedRow(f"response in {column} is empty")
    return before + mark, response


def read_turns(value: Any, name: str) -> list[Message]:
    """Turns written as `{"role", "content"}` or `{"from", "value"}`, as messages.

    Args:
        value: what stands in the row.
        name: the field, as reasons are to say it.

    Raises:
        BadRowError: no list of such turns, or text that cannot be used.
    """
    turns = read_list(value, name, "messages")
    messages = [_read_turn(turn, name) for turn in turns]
    if sum(len(message["content"]) for message in messages) > MAX_CHARACTERS:
        raise BadRowError(f"{name} is longer than {MAX_CHARACTERS:,} characters")
    return messages


def _read_turn(turn: Any, name: str) -> Message:
    if not isinstance(turn, dict):
        raise BadRowError(f'{name} holds something else than {{"role": ..., "content": ...}}')
    role_key, content_key = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
    role = check_text(turn.get(role_key), f"{role_key} in {name}")
    return {
        "role": _ROLES.get(role.lower(), role),
        "content": check_text(turn.get(content_key), f"{content_key} in {name}"),
    }


def read_response(value: Any, name: str) -> str:
    """One of several responses, text or a turn of the assistant; BadRowError if it is neither."""
    if not isinstance(value, dict):
        return check_text(value, name)
    turn = _read_turn(value, name)
    if turn["role"] != "assistant":
        raise BadRowError(f"{name} is not the assistant's")
    return turn["content"]


def read_number(value: Any, name: str) -> float:
    """A finite number, or text that is one, as CSV holds it; BadRowError for anything else."""
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRowError(f"{name} is no number")
    return number


def read_list(value: Any, name: str, what: str = "values") -> list[Any]:
    """A list with something in it; BadRowError if it is none."""
    if value is None:
        raise BadRowError(f"{name} is null")
    if not isinstance(value, list):
        raise BadRowError(f"{name} is not a list of {what} but {type(value).__name__}")
    if not value:
        raise BadRowError(f"{name} is empty")
    return value
