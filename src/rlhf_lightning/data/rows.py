"""What a row says: the forms in which prompts, responses and preferences are written, and the split by prompt.

Row forms, told apart by their columns:

* whole dialogues (`chosen`, `rejected`), each the text of a conversation whose last turn is the response;
* `prompt` with `chosen` and `rejected`, or with `response`, or alone;
* `messages`, a list of `{"role": ..., "content": ...}`, whose last assistant turn is the response.

A prompt may be text or a list of messages; `chosen`, `rejected` and `response` may be lists of messages too, in which
case their last message is the response and those before it, if any, are the prompt.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

from rlhf_lightning.data.chat import Message, Prompt, parse_dialogue
from rlhf_lightning.data.sources import DataSource, Rows, column_names, read_rows, source_name
from rlhf_lightning.errors import UserError

OnBadRow = Literal["error", "skip"]
NAMES = ("prompt", "response", "chosen", "rejected", "messages")
_LAST_TURN = "\n\nAssistant:"


class Example(NamedTuple):
    """A prompt and the response to learn, or to score."""

    prompt: Prompt
    response: str
    row_id: int


class Pair(NamedTuple):
    """A prompt and two responses to it, the first preferred."""

    prompt: Prompt
    chosen: str
    rejected: str
    row_id: int


class PromptRow(NamedTuple):
    """A prompt to answer."""

    prompt: Prompt
    row_id: int


RowT = TypeVar("RowT", Example, Pair, PromptRow)


class _BadRow(Exception):
    """A field that cannot be used; `str()` says which and why."""


class _Dropped(Exception):
    """A sound row of no use; `str()` is the reason it is counted under."""


def count_drop(counts: Counter[str], reason: str) -> None:
    """Count one row that is left out, under `dropped: reason`."""
    counts[f"dropped: {reason}"] += 1


class RowReader:
    """Reads the rows of one source into examples, pairs or prompts, counting what it leaves out.

    Args:
        data: the source, see `read_rows`.
        columns: our column name to the source's, for those that differ.
        on_bad_row: stop at a field that is null, empty or no text, or leave the row out and count it.
        limit: read only this many rows, from the first.
        counts: where rows read (`rows`) and rows left out (`dropped: reason`) are counted.
    """

    def __init__(
        self,
        data: DataSource,
        columns: Mapping[str, str] | None,
        on_bad_row: OnBadRow,
        counts: Counter[str],
        limit: int | None = None,
    ) -> None:
        self.name = source_name(data)
        self.rows: Rows = read_rows(data)
        self.on_bad_row = on_bad_row
        self.counts = counts
        self.limit = len(self.rows) if limit is None else min(limit, len(self.rows))
        self.found = column_names(self.rows)
        self.columns = {name: (columns or {}).get(name, name) for name in NAMES}
        self._check_columns(columns or {})

    def examples(self) -> list[Example]:
        """Prompts with responses; of a pair the chosen one."""
        if self._has("prompt", "response"):
            return self._read(lambda row, i: Example(*self._split_field(row, "response"), i))
        if self._has("messages"):
            return self._read(lambda row, i: Example(*self._split_messages(row), i))
        if self._has("chosen"):
            return self._read(lambda row, i: Example(*self._split_field(row, "chosen"), i))
        raise self._missing("prompt and response, or messages, or chosen")

    def pairs(self) -> list[Pair]:
        """Prompts with two responses; pairs that say the same twice or answer different prompts are left out."""
        if not self.has_pairs:
            raise self._missing("prompt, chosen and rejected, or whole dialogues in chosen and rejected")
        return self._read(self._pair)

    def prompts(self) -> list[PromptRow]:
        """Prompts alone, from any form of row."""
        if self._has("prompt"):
            return self._read(lambda row, i: PromptRow(self._prompt(row), i))
        if self._has("messages"):
            return self._read(lambda row, i: PromptRow(self._messages_prompt(row), i))
        if self._has("chosen"):
            return self._read(lambda row, i: PromptRow(self._split_field(row, "chosen", prompt_only=True)[0], i))
        raise self._missing("prompt, or messages, or chosen")

    @property
    def has_pairs(self) -> bool:
        """Whether the rows are preference pairs."""
        return self._has("chosen", "rejected")

    def _check_columns(self, columns: Mapping[str, str]) -> None:
        for ours, theirs in columns.items():
            if ours not in NAMES:
                raise UserError(f"columns: {ours!r} is not one of {', '.join(NAMES)}; write our name first, then yours")
            if theirs not in self.found:
                raise UserError(f"{self.name} has no column {theirs!r}; it has {', '.join(self.found)}; mend `columns`")

    def _has(self, *names: str) -> bool:
        return all(self.columns[name] in self.found for name in names)

    def _missing(self, needed: str) -> UserError:
        return UserError(
            f"{self.name} has columns {', '.join(self.found)}; needed: {needed}; name yours with `columns`"
        )

    def _read(self, parse: Callable[[Mapping[str, Any], int], RowT]) -> list[RowT]:
        kept = []
        self.counts["rows"] += self.limit
        for row_id, row in enumerate(self.rows):
            if row_id == self.limit:
                break
            try:
                kept.append(parse(row, row_id))
            except _Dropped as reason:
                count_drop(self.counts, str(reason))
            except _BadRow as reason:
                if self.on_bad_row == "error":
                    raise UserError(
                        f"{self.name} row {row_id}: {reason}; mend the row or pass `on_bad_row: skip`"
                    ) from None
                count_drop(self.counts, str(reason))
        return kept

    def _text(self, row: Mapping[str, Any], name: str) -> str:
        return _text(row.get(self.columns[name]), self.columns[name])

    def _prompt(self, row: Mapping[str, Any]) -> Prompt:
        value = row.get(self.columns["prompt"])
        if isinstance(value, list):
            return _messages(value, self.columns["prompt"])
        return self._text(row, "prompt")

    def _split_field(self, row: Mapping[str, Any], name: str, prompt_only: bool = False) -> tuple[Prompt, str]:
        """Prompt and response of a row whose response stands in the column `name`."""
        value, column = row.get(self.columns[name]), self.columns[name]
        if isinstance(value, list):
            messages = _messages(value, column)
            if messages[-1]["role"] != "assistant":
                raise _BadRow(f"{column} does not end with an assistant message")
            prompt = messages[:-1] or (self._prompt(row) if self._has("prompt") else None)
            if not prompt:
                raise _BadRow(f"{column} has no message before the assistant's")
            return prompt, messages[-1]["content"]
        text = self._text(row, name)
        if self._has("prompt"):
            return self._prompt(row), text
        before, mark, response = text.rpartition(_LAST_TURN)
        if not mark:
            raise _BadRow(
                f"{column} is no dialogue: it has no {_LAST_TURN.strip()!r} turn and there is no prompt column"
            )
        # The field itself is sound text, and the public dialogue data holds such rows, so these never stop a run.
        for part, name in ((before, "prompt"), (response, "response")):
            if not part.strip() and not (prompt_only and name == "response"):
                raise _Dropped(f"{name} in {column} is empty")
        return before + mark, response

    def _split_messages(self, row: Mapping[str, Any]) -> tuple[Prompt, str]:
        """The last assistant turn, and everything before it."""
        column = self.columns["messages"]
        messages = _messages(row.get(column), column)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise _BadRow(f"{column} has no assistant message")
        if turns[-1] == 0:
            raise _BadRow(f"{column} has no message before the assistant's")
        return messages[: turns[-1]], messages[turns[-1]]["content"]

    def _messages_prompt(self, row: Mapping[str, Any]) -> Prompt:
        """The messages up to the last one that is not the assistant's."""
        column = self.columns["messages"]
        messages = _messages(row.get(column), column)
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise _BadRow(f"{column} has no message before the assistant's")
        return messages

    def _pair(self, row: Mapping[str, Any], row_id: int) -> Pair:
        prompt, chosen = self._split_field(row, "chosen")
        other, rejected = self._split_field(row, "rejected")
        if prompt != other:
            raise _Dropped("prompts of chosen and rejected differ")
        if chosen.strip() == rejected.strip():
            raise _Dropped("chosen and rejected are the same")
        return Pair(prompt, chosen, rejected, row_id)


def _text(value: Any, name: str) -> str:
    if value is None:
        raise _BadRow(f"{name} is null")
    if not isinstance(value, str):
        raise _BadRow(f"{name} is not text but {type(value).__name__}")
    if not value.strip():
        raise _BadRow(f"{name} is empty")
    return value


def _messages(value: Any, name: str) -> list[Message]:
    if value is None:
        raise _BadRow(f"{name} is null")
    if not isinstance(value, list):
        raise _BadRow(f"{name} is not a list of messages but {type(value).__name__}")
    if not value:
        raise _BadRow(f"{name} is empty")
    if not all(isinstance(message, Mapping) for message in value):
        raise _BadRow(f'{name} holds something else than {{"role": ..., "content": ...}}')
    return [{key: _text(message.get(key), f"{key} in {name}") for key in ("role", "content")} for message in value]


def prompt_key(prompt: Prompt) -> str:
    """The text by which prompts count as the same: turns in order, without regard to case and white space."""
    messages = parse_dialogue(prompt) if isinstance(prompt, str) else prompt
    text = prompt if messages is None else "\n".join(f"{m['role']}: {m['content']}" for m in messages)
    return " ".join(str(text).split()).casefold()


def split_of(key: str, fractions: Mapping[str, float]) -> str:
    """Which part of a split a prompt belongs to, by a stable hash of its key.

    The same prompt falls on the same side whatever the order, size or company of the data it stands in.

    Args:
        key: the prompt's `prompt_key`.
        fractions: share of each part, summing to 1.

    Example:
        >>> split_of("how do i bake bread?", {"train": 0.9, "validation": 0.1})
        'train'
    """
    point = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    names = list(fractions)
    for name in names[:-1]:
        if point < fractions[name]:
            return name
        point -= fractions[name]
    return names[-1]
