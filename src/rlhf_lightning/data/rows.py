"""What one row says, whatever it was written as, and which part of a split its prompt falls on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from rlhf_lightning.chat.messages import Prompt, Response
from rlhf_lightning.chat.plain import parse_dialogue

Need = Literal["finetune", "preference", "prompts", "rated"]
OnBadRow = Literal["auto", "skip", "error"]

KINDS: tuple[Need, ...] = ("finetune", "preference", "prompts", "rated")
MAX_CHARACTERS = 1_000_000
_FOLD = bytes(ord(" ") if chr(byte).isspace() else ord(chr(byte).lower()) for byte in range(128)) + bytes(
    range(128, 256)
)


class Row(NamedTuple):
    """One row of any source, as the stages need it.

    Attributes:
        prompt: text, or a list of messages; "" where the response is a whole text that nothing asks for.
        responses: none for a prompt alone, one for a demonstration, two or more for a ranking, the best first.
        ranks: the rank of each response, smaller is better and equal is a tie; empty means strictly in order.
        suffix: what follows `prompt` in the text the model sees (`prompt + suffix`). It is never cut, and the prompt
            before it is cut at the end of a paragraph instead of from the left.
        margin: by how much the best response was preferred, in the units of its source; 0 where that is not said.
        tie_margin: the margin of responses that rank equal, of which then neither is to lead by more; None where such
            make no pair.
        weight: how much the row counts, > 0.
        source: number of the source in its blend.
        row_id: number of the row in the whole source, from 0.
        tools: that the assistant may call, as chat templates read them (JSON schemas).
        untaught: which messages of `prompt` are the assistant's but not to be taught.
        scores: what the response was rated, a number for each attribute that is asked for, NaN where that is not said.
        unused: what else the row holds, as counts are to name it: columns, and keys of turns.
    """

    prompt: Prompt
    responses: tuple[Response, ...] = ()
    ranks: tuple[float, ...] = ()
    suffix: str = ""
    margin: float = 0.0
    tie_margin: float | None = None
    weight: float = 1.0
    source: int = 0
    row_id: int = 0
    tools: tuple[dict[str, Any], ...] = ()
    untaught: tuple[int, ...] = ()
    unused: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()


class BadRowError(Exception):
    """A row that cannot be used; `str()` is the reason, without the place."""


class DroppedRow(Exception):
    """A sound row that is of no use; `str()` is the reason it is counted under."""


class LabelledRow(DroppedRow):
    """A row that its own label keeps from one use, so that nothing is amiss."""


def check_text(value: Any, name: str, empty: bool = False) -> str:
    r"""A field's text, if it is one that can be tokenised.

    Args:
        value: what stands in the row.
        name: the field, as the reason is to say it.
        empty: it may be empty or blank.

    Raises:
        BadRowError: null, no text, empty or blank unless it may be, longer than 1,000,000 characters, or with a NUL
            byte or a lone surrogate in it.

    Example:
        >>> check_text("\ud800", "prompt")
        Traceback (most recent call last):
        rlhf_lightning.data.rows.BadRowError: prompt holds a lone surrogate
    """
    if not isinstance(value, str):
        raise BadRowError(f"{name} is null" if value is None else f"{name} is not text but {type(value).__name__}")
    if not empty and (not value or value.isspace()):
        raise BadRowError(f"{name} is empty")
    if len(value) > MAX_CHARACTERS:
        raise BadRowError(f"{name} is longer than {MAX_CHARACTERS:,} characters")
    if "\0" in value:
        raise BadRowError(f"{name} holds a NUL byte")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadRowError(f"{name} holds a lone surrogate") from None
    return value


def prompt_key(prompt: Prompt) -> str:
    """The text by which prompts count as the same: turns in order, without regard to case and white space."""
    messages = parse_dialogue(prompt) if isinstance(prompt, str) else prompt
    if messages is not None and len(messages) == 1 and messages[0]["role"] == "user":
        text = messages[0]["content"]  # a template writes a bare text as one turn of the user, too
    else:
        text = str(prompt) if messages is None else "\n".join(f"{m['role']}: {m['content']}" for m in messages)
    if not text.isascii():
        return " ".join(text.split()).casefold()
    folded = text.encode().translate(_FOLD)  # the same for ASCII, and four times as fast
    while b"  " in folded:
        folded = folded.replace(b"  ", b" ")
    return folded.strip(b" ").decode()


def opening_of(prompt: Prompt) -> Prompt:
    r"""What a dialogue opens with: its first system turns and its first turn of the user; other prompts as they are.

    One conversation at several depths opens the same way at each.

    Example:
        >>> opening_of("\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant:")
        [{'role': 'user', 'content': 'hi'}]
        >>> opening_of("Once upon a time")
        'Once upon a time'
    """
    messages = parse_dialogue(prompt) if isinstance(prompt, str) else prompt
    if messages is None:
        return prompt
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        return messages
    return [*(message for message in messages[:first] if message["role"] == "system"), messages[first]]


def split_of(key: str, fractions: Mapping[str, float], salt: str = "") -> str:
    """Which part of a split a prompt belongs to, by a stable hash of its key.

    The same prompt falls on the same side whatever the order, size or company of the data it stands in.

    Args:
        key: the prompt's `prompt_key`.
        fractions: share of each part, summing to 1.
        salt: splits with different salts are independent of each other.

    Example:
        >>> split_of("how do i bake bread?", {"train": 0.9, "validation": 0.1})
        'train'
    """
    digest = hashlib.sha256((salt + key).encode()).digest()
    point = int.from_bytes(digest[:8], "big") / 2**64
    names = list(fractions)
    for name in names[:-1]:
        if point < fractions[name]:
            return name
        point -= fractions[name]
    return names[-1]
