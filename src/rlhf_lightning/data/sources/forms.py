"""The forms rows are written in, told apart by their columns.

What is answered stands in one of these:

* `prompt`, text or a list of messages;
* `instruction` with an optional `input`, as in Alpaca, which make one turn of the user;
* `conversations` (ShareGPT) or `messages`, lists of turns, whose last assistant turn is the response where no other
  column holds one.

The answer, or the answers, in one of these:

* `response`, `output` or `completion`, or the last turn; with a `label` (KTO) only where that is true;
* `chosen` and `rejected`: text, a turn, or a list of turns. Where nothing says what is answered they are whole
  dialogues, as text or as turns, and everything before the last turn is the prompt;
* `responses`, a list, with `ranks` (smaller is better) or `scores` (larger is better).

`margin` and `weight` are optional numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf_lightning.chat.messages import Prompt
from rlhf_lightning.data.rows import BadRowError, DroppedRow, Need, Row, check_text
from rlhf_lightning.data.sources.fields import read_list, read_number, read_response, read_turns, split_dialogue
from rlhf_lightning.data.sources.raw_rows import RawRow
from rlhf_lightning.errors import UserError

NAMES = (
    *("prompt", "response", "chosen", "rejected", "messages"),
    *("conversations", "instruction", "input", "output", "completion"),
    *("label", "responses", "ranks", "scores", "margin", "weight"),
)
_NEEDED: dict[Need, str] = {
    "finetune": "prompt and response, or messages, or chosen",
    "preference": "prompt, chosen and rejected, or whole dialogues in chosen and rejected",
    "prompts": "prompt, or messages, or chosen",
}
SAME = "chosen and rejected are the same"
_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}

Reader = Callable[[RawRow], Row]


class RowForm:
    """Reads the rows of one source, whose columns fix how.

    Args:
        columns: those of the source.
        names: our column name to the source's, for those that differ.
        source: its name, for error messages.

    Attributes:
        labelled: whether the rows hold one response each, with a label, so that pairs must be made of two rows.

    Raises:
        UserError: `names` says a name of ours or a column that does not exist.
    """

    def __init__(
        self, columns: Sequence[str], names: Mapping[str, str] | None = None, source: str = "the data"
    ) -> None:
        self._found, self._source = list(columns), source
        self._check_names(names or {})
        taken = set((names or {}).values())
        self._theirs = {ours: ours for ours in NAMES if ours in self._found and ours not in taken} | dict(names or {})
        self._margin, self._weight = (self._theirs.get(name, name) for name in ("margin", "weight"))
        self._prompt = self._prompt_reader()
        one_response = self._answer is not None or (self._turns is not None and not self._has("chosen"))
        self.labelled = one_response and self._has("label") and not self._has("chosen", "rejected")
        readers = {"finetune": self._finetune_reader(), "preference": self._preference_reader()}
        readers["prompts"] = self._prompts_reader()
        self._readers = {need: reader for need, reader in readers.items() if reader is not None}

    def has(self, need: Need) -> bool:
        """Whether the columns hold what the need asks."""
        return need in self._readers or (need == "preference" and self.labelled)

    def check(self, need: Need) -> None:
        """Check that the columns hold what the need asks.

        Raises:
            UserError: they do not.
        """
        if not self.has(need):
            found = ", ".join(self._found)
            raise UserError(f"{self._source} has columns {found}; needed: {_NEEDED[need]}; name yours with `columns`")

    def read(self, raw: RawRow, need: Need) -> Row:
        """One row; not for pairs of labelled rows, see `label`.

        Args:
            raw: as written.
            need: what for; `has` it.

        Raises:
            BadRowError: a field that cannot be used.
            DroppedRow: a sound row of no use.
        """
        return self._weighed(self._readers[need](raw), raw)

    def label(self, raw: RawRow) -> tuple[Row, bool]:
        """Prompt and response of a labelled row, and whether the response is a good one.

        Raises:
            BadRowError: a field that cannot be used.
        """
        value, column = self._get(raw, "label"), self._theirs["label"]
        good = value if isinstance(value, bool) else _LABELS.get(str(value).strip().lower())
        if good is None:
            raise BadRowError(f"{column} is null" if value is None else f"{column} is neither true nor false")
        return self._weighed(self._demonstration(raw) if self._answer else self._last_turn(raw), raw), good

    # What the columns say

    def _check_names(self, names: Mapping[str, str]) -> None:
        for ours, theirs in names.items():
            if ours not in NAMES:
                raise UserError(f"columns: {ours!r} is not one of {', '.join(NAMES)}; write our name first, then yours")
            if theirs not in self._found:
                raise UserError(
                    f"{self._source} has no column {theirs!r}; it has {', '.join(self._found)}; mend `columns`"
                )

    def _has(self, *names: str) -> bool:
        return all(name in self._theirs for name in names)

    @property
    def _answer(self) -> str | None:
        """The column of a single response, where another says what it answers."""
        if not self._has("prompt") and not self._has("instruction"):
            return None
        return next((name for name in ("response", "output", "completion") if self._has(name)), None)

    @property
    def _turns(self) -> str | None:
        return next((name for name in ("messages", "conversations") if self._has(name)), None)

    def _prompt_reader(self) -> Callable[[RawRow], Prompt] | None:
        if self._has("prompt"):
            return self._read_prompt
        if self._has("instruction"):
            return self._read_instruction
        return self._read_history if self._turns else None

    def _finetune_reader(self) -> Reader | None:
        if self._answer:
            return self._liked if self._has("label") else self._demonstration
        if self._has("chosen"):
            return self._chosen
        if self._turns:
            return self._liked if self.labelled else self._last_turn
        return self._best if self._ranked else None

    def _preference_reader(self) -> Reader | None:
        if self._has("chosen", "rejected"):
            return self._pair
        return self._ranking if self._ranked else None

    def _prompts_reader(self) -> Reader | None:
        if self._has("prompt") or self._has("instruction"):
            return lambda raw: Row(self._any_prompt(raw))
        if self._turns and not self._has("chosen"):
            return self._turns_prompt
        return self._chosen_prompt if self._has("chosen") else None

    @property
    def _ranked(self) -> bool:
        return self._prompt is not None and self._has("responses") and (self._has("ranks") or self._has("scores"))

    # Readers of whole rows

    def _demonstration(self, raw: RawRow) -> Row:
        assert self._answer is not None
        own, response = self._side(raw, self._answer)
        return Row(self._any_prompt(raw) if own is None else own, (response,))

    def _liked(self, raw: RawRow) -> Row:
        row, good = self.label(raw)
        if not good:
            raise DroppedRow("response is labelled as bad")
        return row

    def _chosen(self, raw: RawRow) -> Row:
        own, response = self._side(raw, "chosen")
        return Row(self._any_prompt(raw) if own is None else own, (response,))

    def _pair(self, raw: RawRow) -> Row:
        own, chosen = self._side(raw, "chosen")
        other, rejected = self._side(raw, "rejected")
        if own != other:
            raise DroppedRow("prompts of chosen and rejected differ")
        if chosen.strip() == rejected.strip():
            raise DroppedRow(SAME)
        return Row(self._any_prompt(raw) if own is None else own, (chosen, rejected))

    def _best(self, raw: RawRow) -> Row:
        return Row(self._any_prompt(raw), self._order(raw)[0][:1])

    def _ranking(self, raw: RawRow) -> Row:
        responses, ranks = self._order(raw)
        if len(responses) < 2:
            raise DroppedRow("there is only one response")
        first = {text.strip(): i for i, text in reversed(list(enumerate(responses)))}
        if len(first) < 2:
            raise DroppedRow(SAME)
        kept = sorted(first.values())  # of responses that say the same the best ranked stays
        return Row(self._any_prompt(raw), tuple(responses[i] for i in kept), tuple(ranks[i] for i in kept))

    def _last_turn(self, raw: RawRow) -> Row:
        assert self._turns is not None
        column = self._theirs[self._turns]
        *before, last = read_turns(self._get(raw, self._turns), column)
        if last["role"] != "assistant":
            raise BadRowError(f"{column} does not end with the assistant")
        if not before:
            raise BadRowError(f"{column} has no message before the assistant's")
        return Row(before, (last["content"],))

    def _turns_prompt(self, raw: RawRow) -> Row:
        """The turns up to the last one that is not the assistant's."""
        assert self._turns is not None
        column = self._theirs[self._turns]
        messages = read_turns(self._get(raw, self._turns), column)
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise BadRowError(f"{column} has no message before the assistant's")
        return Row(messages)

    def _chosen_prompt(self, raw: RawRow) -> Row:
        own, _ = self._side(raw, "chosen", prompt_only=True)
        return Row(self._any_prompt(raw) if own is None else own)

    # Readers of fields

    def _weighed(self, row: Row, raw: RawRow) -> Row:
        margin, weight = raw.get(self._margin), raw.get(self._weight)
        if margin is not None:
            row = row._replace(margin=read_number(margin, self._margin))
        if weight is not None:
            row = row._replace(weight=read_number(weight, self._weight))
            if row.weight <= 0:
                raise BadRowError(f"{self._weight} is not above 0")
        return row

    def _get(self, raw: RawRow, name: str) -> Any:
        """A field; BadRowError if there is none of this name."""
        column = self._theirs[name]
        try:
            return raw[column]
        except KeyError:
            known = set(self._theirs.values())
            others = [repr(other)[:40] for other in raw if other not in known][:3]
            raise BadRowError(
                f"{column} is missing" + (f"; unknown column {', '.join(others)}" if others else "")
            ) from None

    def _any_prompt(self, raw: RawRow) -> Prompt:
        if self._prompt is None:
            raise BadRowError("nothing says what is answered: there is no message before the assistant's")
        return self._prompt(raw)

    def _read_prompt(self, raw: RawRow) -> Prompt:
        value, column = self._get(raw, "prompt"), self._theirs["prompt"]
        return read_turns(value, column) if isinstance(value, list) else check_text(value, column)

    def _read_instruction(self, raw: RawRow) -> Prompt:
        text = check_text(self._get(raw, "instruction"), self._theirs["instruction"])
        column = self._theirs.get("input", "input")
        more = raw.get(column)
        if more is not None and str(more).strip():
            text = f"{text}\n\n{check_text(more, column)}"
        return [{"role": "user", "content": text}]

    def _read_history(self, raw: RawRow) -> Prompt:
        """Turns that another column answers."""
        assert self._turns is not None
        column = self._theirs[self._turns]
        messages = read_turns(self._get(raw, self._turns), column)
        if messages[-1]["role"] == "assistant":
            raise BadRowError(f"{column} ends with the assistant, and so does the answer to it")
        return messages

    def _side(self, raw: RawRow, name: str, prompt_only: bool = False) -> tuple[Prompt | None, str]:
        """The prompt that a response brings along, if any, and the response."""
        value, column = self._get(raw, name), self._theirs[name]
        if not isinstance(value, str) and isinstance(value, list | dict):
            *before, last = read_turns([value] if isinstance(value, dict) else value, column)
            if last["role"] != "assistant":
                raise BadRowError(f"{column} does not end with the assistant")
            return before or None, last["content"]
        text = check_text(value, column)
        return (None, text) if self._prompt is not None else split_dialogue(text, column, prompt_only)

    def _order(self, raw: RawRow) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """Responses and their ranks, the best first."""
        column = self._theirs["responses"]
        values = read_list(self._get(raw, "responses"), column)
        responses = [read_response(value, f"an item of {column}") for value in values]
        by = "ranks" if self._has("ranks") else "scores"
        numbers = [read_number(number, self._theirs[by]) for number in read_list(self._get(raw, by), self._theirs[by])]
        if len(numbers) != len(responses):
            raise BadRowError(f"{column} and {self._theirs[by]} differ in length")
        ranks = numbers if by == "ranks" else [-number for number in numbers]
        order = sorted(range(len(ranks)), key=ranks.__getitem__)
        return tuple(responses[i] for i in order), tuple(ranks[i] for i in order)
