"""What stands in one field of a row: text, a number, a flag, a list, tools and calls of them, or a bad row.

`value` is what stands in the row, `name` the field as reasons are to say it.
"""

from __future__ import annotations

import json
import math
from typing import Any

from rlhf_lightning.data.rows import BadRowError, DroppedRow, check_text

_LAST_TURN = "\n\nAssistant:"
_OTHER_TURN = "\n\nHuman:"
_FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def split_dialogue(text: str, column: str, prompt_only: bool = False) -> tuple[str, str]:
    r"""A whole dialogue in Human and Assistant turns as prompt and last response.

    Args:
        text: the dialogue.
        column: where it stands.
        prompt_only: the response does not matter.

    Raises:
        BadRowError: it is not a dialogue, or does not end with the assistant.
        DroppedRow: nothing stands before or after the last turn's header.

    Example:
        >>> split_dialogue("Human: hi\n\nAssistant: hello", "chosen")
        ('Human: hi\n\nAssistant:', ' hello')
    """
    before, mark, response = text.rpartition(_LAST_TURN)
    if not mark:
        raise BadRowError(
            f"{column} is not a dialogue: it has no {_LAST_TURN.strip()!r} turn and no column says its prompt"
        )
    if _OTHER_TURN in response:
        raise BadRowError(f"{column} does not end with the assistant")
    # The field itself is sound text, and the public dialogue data holds such rows, so these never stop a run.
    if not before.strip():
        raise DroppedRow(f"prompt in {column} is empty")
    if not prompt_only and not response.strip():
        raise DroppedRow(f"response in {column} is empty")
    return before + mark, response


def read_number(value: Any, name: str) -> float:
    """A finite number, or text that is one, as CSV holds it; BadRowError for anything else."""
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRowError(f"{name} is not a number")
    return number


def read_list(value: Any, name: str, what: str = "values") -> list[Any]:
    """A list with something in it; BadRowError if it is not one."""
    if value is None:
        raise BadRowError(f"{name} is null")
    if not isinstance(value, list):
        raise BadRowError(f"{name} is not a list of {what} but {type(value).__name__}")
    if not value:
        raise BadRowError(f"{name} is empty")
    return value


def is_nothing(value: Any) -> bool:
    """Whether a field holds nothing that could be lost: null, or an empty text, list or object."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def read_flag(value: Any) -> bool | None:
    """True or false, 1 or 0, or text that says so, as CSV holds it; None for anything else."""
    return value if isinstance(value, bool) else _FLAGS.get(str(value).strip().lower())


def read_objects(value: Any, name: str) -> list[dict[str, Any]]:
    """Objects: one or a list of them, as they are or as JSON text.

    Raises:
        BadRowError: anything else.
    """
    whole = _parsed(value, name)
    items = [_parsed(item, name) for item in (whole if isinstance(whole, list) else [whole])]
    if not all(isinstance(item, dict) for item in items):
        raise BadRowError(f"{name} is not a list of objects, nor JSON of one")
    try:
        check_text(json.dumps(items, ensure_ascii=False), name)
    except (TypeError, ValueError):
        raise BadRowError(f"{name} holds something that JSON cannot") from None
    return items


def read_tools(value: Any, name: str) -> tuple[dict[str, Any], ...]:
    """Tools as chat templates read them, `{"type": "function", "function": {"name": ..., "parameters": ...}}`.

    They may also stand as the functions alone, or as JSON text; nothing there means no tools.

    Raises:
        BadRowError: anything else.
    """
    if is_nothing(value):
        return ()
    tools = read_objects(value, name)
    return tuple(
        {"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool for tool in tools
    )


def read_call(value: dict[str, Any], name: str) -> dict[str, Any]:
    """A call of a tool, `{"function": {"name": ..., "arguments": ...}}` or the function alone, as templates read it.

    Its arguments become an object where they are JSON text.

    Raises:
        BadRowError: no function, or one without a name.
    """
    function = value.get("function", value)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRowError(f"{name} holds a call without the name of its function")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and isinstance(parsed := _json(arguments), dict):
        arguments = parsed
    function = {**function, "arguments": {} if is_nothing(arguments) else arguments}
    return {"type": "function", **(value if "function" in value else {}), "function": function}


def _parsed(value: Any, name: str) -> Any:
    """A value, or what its JSON text says."""
    if not isinstance(value, str):
        return value
    parsed = _json(value)
    if parsed is None:
        raise BadRowError(f"{name} is not a list of objects, nor JSON of one")
    return parsed


def _json(text: str) -> Any:
    """What JSON text says; None if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
