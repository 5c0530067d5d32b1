"""Turns of dialogues as public data write them, and how those of two columns are put together.

`value` is what stands in the row, `name` the field as reasons are to say it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from rlhf_lightning.chat.messages import Message, Response
from rlhf_lightning.chat.plain import parse_dialogue
from rlhf_lightning.data.rows import MAX_CHARACTERS, BadRowError, check_text
from rlhf_lightning.data.sources.fields import is_nothing, read_call, read_flag, read_list, read_objects

_ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "ipython"), "tool"),
    "system": "system",
}
_REASONING = ("reasoning_content", "reasoning", "thinking")
_TAUGHT = ("weight", "train", "loss")
_KEPT = ("tool_call_id", "name")
_KEYS = frozenset((*_REASONING, *_TAUGHT, *_KEPT, "tool_calls", "function_call"))
_FIRST_ROLES = ("system", "developer")


class Turn(NamedTuple):
    """One message of a dialogue.

    Attributes:
        message: as chat templates read it.
        taught: False where the data say that it is not to be.
    """

    message: Message
    taught: bool = True

    @property
    def role(self) -> str:
        """Who speaks."""
        return str(self.message["role"])

    @property
    def is_empty(self) -> bool:
        """Whether nothing is said, and no tool called."""
        return not self.message["content"].strip() and "tool_calls" not in self.message


def read_turns(value: Any, name: str) -> list[Turn]:
    """Turns written as `{"role", "content"}` or `{"from", "value"}`, empty ones included.

    Raises:
        BadRowError: no list of such turns, or something in one that cannot be used.
    """
    turns = [read_turn(turn, name) for turn in read_list(value, name, "messages")]
    if sum(len(turn.message["content"]) for turn in turns) > MAX_CHARACTERS:
        raise BadRowError(f"{name} is longer than {MAX_CHARACTERS:,} characters")
    return turns


def read_turn(turn: Any, name: str) -> Turn:
    """One turn, see `read_turns`."""
    if not isinstance(turn, dict):
        raise BadRowError(f'{name} holds something else than {{"role": ..., "content": ...}}')
    role_key, content_key = _speaker_keys(turn)
    said = check_text(turn.get(role_key), f"{role_key} in {name}")
    role = _ROLES.get(said.lower(), said)
    is_plain = turn.keys() <= {role_key, content_key}  # nearly all are, and this saves half of the time
    more = {} if is_plain else _more_than_text(turn, name)
    content = turn.get(content_key)
    if said.lower() == "function_call":
        more["tool_calls"], content = _calls(content, f"{content_key} in {name}"), ""
    elif content is None and "tool_calls" in more:
        content = ""
    text = _read_content(content, f"{content_key} in {name}")
    return Turn({"role": role, "content": text, **more}, is_plain or _is_taught(turn, name))


def spoken(turn: Turn, column: str) -> Response:
    """A turn as a response: text, where it holds no more; BadRowError if it says nothing."""
    if turn.is_empty:
        raise BadRowError(f"content in {column} is empty")
    return turn.message if len(turn.message) > 2 else str(turn.message["content"])


def read_response(value: Any, name: str) -> Response:
    """One of several responses, text or a turn of the assistant; BadRowError if it is neither."""
    if not isinstance(value, dict):
        return check_text(value, name)
    turn = read_turn(value, name)
    if turn.role != "assistant":
        raise BadRowError(f"{name} is not the assistant's")
    return spoken(turn, name)


def without_answer(turns: list[Turn]) -> list[Turn]:
    """Turns up to the last one that is not the assistant's."""
    while turns and turns[-1].role == "assistant":
        turns = turns[:-1]
    return turns


def unused_keys(value: Any) -> set[str]:
    """Keys of turns that hold something and are not read."""
    found: set[str] = set()
    for turn in value if isinstance(value, list) else [value]:
        if isinstance(turn, dict):
            role_key, content_key = _speaker_keys(turn)
            if turn.keys() <= {role_key, content_key}:
                continue
            unread = turn.keys() - _KEYS - {role_key, content_key}
            found.update(str(key) for key in unread if not is_nothing(turn[key]))
            if _ROLES.get(str(turn.get(role_key)).lower()) != "assistant":
                found.update(key for key in _TAUGHT if turn.get(key))  # only turns of the assistant can be taught
    return found


def turns_of_text(prompt: str) -> list[Turn]:
    """A prompt that is text as turns: those of a dialogue written in it, else one of the user."""
    messages = parse_dialogue(prompt)
    return [Turn({"role": "user", "content": prompt})] if messages is None else [Turn(message) for message in messages]


def read_history(value: Any, name: str) -> list[Turn]:
    """What was said before: `[[user, assistant], ...]`, or turns; none where nothing stands there.

    Raises:
        BadRowError: anything else.
    """
    if is_nothing(value):
        return []
    rounds = read_list(value, name, "[user, assistant] pairs")
    if isinstance(rounds[0], dict):
        return read_turns(rounds, name)
    turns = []
    for said in rounds:
        if not isinstance(said, list) or len(said) != 2:
            raise BadRowError(f"{name} is not a list of [user, assistant] pairs")
        for role, text in zip(("user", "assistant"), said, strict=True):
            turns.append(Turn({"role": role, "content": check_text(text, f"an item of {name}", empty=True)}))
    return turns


def join_turns(asked: list[Turn], own: list[Turn], place: str) -> list[Turn]:
    """The turns of the prompt's column and those that an answer brings along, each once.

    The answer may repeat the prompt, or its end, or say more of the dialogue that the prompt is the beginning or the
    end of, or go on where the prompt ends.

    Args:
        asked: of the prompt's column.
        own: those before the answer in its column.
        place: the two columns, as the reason is to say them.

    Raises:
        BadRowError: they contradict each other.
    """
    first, asked = _split_first(asked)
    own_first, own = _split_first(own)
    if first and own_first and _said(first) != _said(own_first):
        raise BadRowError(f"{place} have different system turns")
    first = first or own_first
    a, b = _said(asked), _said(own)
    if not own or (len(b) < len(a) and a[-len(b) :] == b):
        return first + asked
    if b[: len(a)] == a or b[-len(a) :] == a:
        return first + own
    if own[0].role != "user" and asked[-1].role != "assistant":
        return first + asked + own
    raise BadRowError(f"{place} contradict each other: their turns before the answer differ")


def put_first(first: Sequence[Turn], turns: list[Turn], history: Sequence[Turn] = ()) -> list[Turn]:
    """Turns with a system turn before them, unless they begin with it, and earlier ones after that.

    Args:
        first: the system turn, or nothing.
        turns: of the dialogue.
        history: turns before those, the system's aside.

    Raises:
        BadRowError: they begin with another system turn.
    """
    begun, rest = _split_first(turns)
    if first and any(turn.message["content"].strip() for turn in begun) and _said(begun) != _said(first):
        raise BadRowError("the system column and the system turn differ")
    return [*(first or begun), *history, *rest]


def _speaker_keys(turn: dict[str, Any]) -> tuple[str, str]:
    """The keys of role and content."""
    theirs = turn.get("role") is None and turn.get("from") is not None
    return ("from", "value") if theirs else ("role", "content")


def _more_than_text(turn: dict[str, Any], name: str) -> Message:
    """What a turn holds beside role and content, by the names that templates know."""
    more: Message = {}
    for key in _REASONING:
        if not is_nothing(turn.get(key)):
            reasoning = check_text(turn[key], f"{key} in {name}", empty=True)
            if more.setdefault("reasoning_content", reasoning) != reasoning:
                raise BadRowError(f"{key} in {name} differs from the turn's other reasoning")
    for key in ("tool_calls", "function_call"):
        if not is_nothing(turn.get(key)):
            more["tool_calls"] = _calls(turn[key], f"{key} in {name}")
    for key in _KEPT:
        if not is_nothing(turn.get(key)):
            more[key] = check_text(turn[key], f"{key} in {name}")
    return more


def _is_taught(turn: dict[str, Any], name: str) -> bool:
    taught = True
    for key in _TAUGHT:
        if turn.get(key) is not None:
            flag = read_flag(turn[key])
            if flag is None:
                raise BadRowError(f"{key} in {name} is neither 1 nor 0: a turn is taught, or it is not")
            taught = taught and flag
    return taught


def _calls(value: Any, name: str) -> list[dict[str, Any]]:
    return [read_call(call, name) for call in read_objects(value, name)]


def _read_content(value: Any, name: str) -> str:
    """Text, or the texts of a list of parts."""
    if not isinstance(value, list):
        return check_text(value, name, empty=True)
    texts = []
    for part in value:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type", "something") if isinstance(part, dict) else type(part).__name__
            raise BadRowError(f"{name} holds {str(kind)[:40]}; only text can be read")
        texts.append(text)
    return check_text("".join(texts), name, empty=True)


def _split_first(turns: Sequence[Turn]) -> tuple[list[Turn], list[Turn]]:
    """The system turns a dialogue begins with, and the rest."""
    first = list(takewhile(lambda turn: turn.role in _FIRST_ROLES, turns))
    return first, list(turns[len(first) :])


def _said(turns: Sequence[Turn]) -> list[tuple[str, str]]:
    """Who says what, without regard to white space."""
    return [(turn.role, " ".join(turn.message["content"].split())) for turn in turns]
