"""The forms rows are written in, told apart by their columns.

What is answered stands in one of these:

* `prompt`, text or a list of messages;
* `instruction` with an optional `input`, as in Alpaca, which make one turn of the user;
* `conversations` (ShareGPT) or `messages`, lists of turns, whose last assistant turn is the response where no other
  column holds one.

`system` (or `system_prompt`), `history` and `tools` (or `functions`) stand beside any of them. With these columns, and
where an answer is a turn, a prompt that is text is one turn of the user.

The answer, or the answers, in one of these:

* `response`, `output` or `completion`, or the last turn; with a `label` (KTO) only where that is true;
* `chosen` and `rejected`: text, a turn, or a list of turns. Where nothing says what is answered they are whole
  dialogues, as text or as turns, and everything before the last turn is the prompt;
* `responses`, a list, with `ranks` (smaller is better) or `scores` (larger is better);
* `output_1` and `output_2` with `preference`, 1 or 2 for the better one, or between them (AlpacaFarm).

Or `text` alone, a whole text that is taught from its first token to its last.

`margin`, `weight` and, of rankings, `tie_margin` are optional numbers. What else a row holds is in its `unused`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_lightning.chat.messages import Response, exact_text
from rlhf_lightning.data.rows import BadRowError, DroppedRow, LabelledRow, Need, Row, check_text
from rlhf_lightning.data.sources.columns import BESIDE, CHOICE, NUMBERS, RATING, TIE_MARGIN, Columns
from rlhf_lightning.data.sources.fields import (
    is_nothing,
    read_flag,
    read_list,
    read_number,
    read_tools,
    split_dialogue,
)
from rlhf_lightning.data.sources.ratings import read_rating
from rlhf_lightning.data.sources.raw_rows import RawRow
from rlhf_lightning.data.sources.turns import (
    Turn,
    join_turns,
    put_first,
    read_history,
    read_response,
    read_turns,
    spoken,
    turns_of_text,
    unused_keys,
    without_answer,
)
from rlhf_lightning.errors import UserError

_NEEDED: dict[Need, str] = {
    "finetune": "prompt and response, or messages, or chosen, or text",
    "preference": "prompt, chosen and rejected, or whole dialogues in chosen and rejected",
    "prompts": "prompt, or messages, or chosen",
    "rated": "prompt and response, or messages, and a column for each of `attributes`",
}
SAME = "chosen and rejected are the same"
UNRATED = "no score is given"
UNTAUGHT = "no turn of the assistant is to be taught"
_UNSEEN = frozenset(("image", "images", "video", "videos", "audio", "audios"))
"""Columns of what the text is about and no language model sees."""

Asked = str | list[Turn]
Reader = Callable[[RawRow], Row]


class _Answer(NamedTuple):
    """A response, and what else its column says.

    Attributes:
        response: text or message.
        before: the prompt that it brings along, if any.
        taught: whether it is to be.
    """

    response: Response
    before: Asked | None = None
    taught: bool = True


class RowForm:
    """Reads the rows of one source, whose columns fix how.

    Args:
        columns: those of the source.
        names: our column name to the source's, for those that differ.
        source: its name, for error messages.
        ratings: the margin of each rating, from `margins_of`; none where ratings are not read.
        attributes: names of the scores that responses are given, each a column.

    Attributes:
        labelled: whether the rows hold one response each, with a label, so that pairs must be made of two rows.

    Raises:
        UserError: `names` says a name of ours or a column that does not exist.
    """

    def __init__(
        self,
        columns: Sequence[str],
        names: Mapping[str, str] | None = None,
        source: str = "the data",
        attributes: Sequence[str] = (),
        ratings: Mapping[str, float] | None = None,
    ) -> None:
        self._source, self._ratings = source, ratings or {}
        self._columns = Columns(columns, names or {}, source, attributes, rated=bool(ratings))
        self.labelled = self._columns.labelled
        # Asked of every row, so looked up once.
        self._stands_beside = any(self._columns.has(name) for name in BESIDE)
        answers = (self._columns.answer, "chosen", "rejected", *self._columns.ranking_names)
        self._answers = [self._columns.name(name) for name in answers if name and self._columns.has(name)]
        readers = {"finetune": self._finetune_reader(), "preference": self._preference_reader()}
        readers["prompts"] = self._prompts_reader()
        readers["rated"] = self._rated_reader()
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
            found = ", ".join(self._columns.found)
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
        row = self._finished(self._readers[need](raw), raw, need)
        if need == "rated" and all(map(math.isnan, row.scores)):
            raise DroppedRow(UNRATED)
        return row

    def label(self, raw: RawRow) -> tuple[Row, bool]:
        """Prompt and response of a labelled row, and whether the response is a good one.

        Raises:
            BadRowError: a field that cannot be used.
        """
        value, column = self._columns.get(raw, "label"), self._columns.name("label")
        good = read_flag(value)
        if good is None:
            raise BadRowError(f"{column} is null" if value is None else f"{column} is neither true nor false")
        row = self._demonstration(raw) if self._columns.answer else self._last_turn(raw)
        return self._finished(row, raw, "preference"), good

    # Which reader

    def _finetune_reader(self) -> Reader | None:
        if self._columns.answer:
            return self._liked if self._columns.has("label") else self._demonstration
        if self._columns.has("chosen"):
            return self._chosen
        if self._columns.ranked:
            return self._best
        if self._columns.only_turns:
            return self._liked if self.labelled else self._last_turn
        return self._whole_text if self._columns.only_text else None

    def _preference_reader(self) -> Reader | None:
        if self._columns.has("chosen", "rejected"):
            return self._pair
        return self._ranking if self._columns.ranked else None

    def _prompts_reader(self) -> Reader | None:
        if self._columns.only_turns:
            return self._turns_prompt
        return self._any_prompt if self._columns.asks or self._columns.has("chosen") else None

    def _rated_reader(self) -> Reader | None:
        there = bool(self._columns.attributes) and self._columns.has(*self._columns.attributes)
        return self._finetune_reader() if there and (self._columns.answer or self._columns.only_turns) else None

    # Readers of whole rows

    def _demonstration(self, raw: RawRow) -> Row:
        assert self._columns.answer is not None
        return self._taught(raw, self._columns.answer)

    def _liked(self, raw: RawRow) -> Row:
        row, good = self.label(raw)
        if not good:
            raise LabelledRow("response is labelled as bad")
        return row

    def _chosen(self, raw: RawRow) -> Row:
        return self._taught(raw, "chosen")

    def _taught(self, raw: RawRow, name: str) -> Row:
        answer = self._read_answer(raw, name)
        if not answer.taught:
            raise LabelledRow(UNTAUGHT)
        return self._row(raw, self._asked(raw, name, answer.before), answer.response)

    def _pair(self, raw: RawRow) -> Row:
        chosen, rejected = self._read_answer(raw, "chosen"), self._read_answer(raw, "rejected")
        if _messages(chosen.before) != _messages(rejected.before):
            raise DroppedRow("prompts of chosen and rejected differ")
        if exact_text(chosen.response).strip() == exact_text(rejected.response).strip():
            raise DroppedRow(SAME)
        return self._row(raw, self._asked(raw, "chosen", chosen.before), chosen.response, rejected.response)

    def _best(self, raw: RawRow) -> Row:
        return self._row(raw, self._asked(raw), *self._order(raw)[0][:1])

    def _ranking(self, raw: RawRow) -> Row:
        responses, ranks = self._order(raw)
        if len(responses) < 2:
            raise DroppedRow("there is only one response")
        first = {exact_text(said).strip(): i for i, said in reversed(list(enumerate(responses)))}
        if len(first) < 2:
            raise DroppedRow(SAME)
        kept = sorted(first.values())  # of responses that say the same the best ranked stays
        row = self._row(raw, self._asked(raw), *(responses[i] for i in kept))
        of_ties = self._columns.beside(raw, TIE_MARGIN)
        if of_ties is not None:
            row = row._replace(tie_margin=read_number(of_ties, self._columns.name(TIE_MARGIN)))
        return row._replace(ranks=tuple(ranks[i] for i in kept))

    def _last_turn(self, raw: RawRow) -> Row:
        """The turns up to the last one that is taught."""
        turns, column = self._read_turns(raw)
        if turns[-1].role != "assistant":
            raise BadRowError(f"{column} does not end with the assistant")
        while turns and not (turns[-1].role == "assistant" and turns[-1].taught):
            turns = turns[:-1]
        if not turns:
            raise LabelledRow(UNTAUGHT)
        *before, last = turns
        if not before:
            raise BadRowError(f"{column} has no message before the assistant's")
        return self._row(raw, before, spoken(last, column))

    def _turns_prompt(self, raw: RawRow) -> Row:
        """The turns up to the last one that is not the assistant's."""
        turns, column = self._read_turns(raw)
        asked = without_answer(turns)
        if not asked:
            raise BadRowError(f"{column} has no message before the assistant's")
        return self._row(raw, asked)

    def _any_prompt(self, raw: RawRow) -> Row:
        """The prompt that the answers of the row are taught to."""
        name, before = "chosen" if self._columns.has("chosen") else self._columns.answer, None
        value = raw.get(self._columns.name(name)) if name else None
        if name and (self._columns.asks is None or (value and isinstance(value, list))):
            before = self._read_answer(raw, name, prompt_only=True).before
        return self._row(raw, self._asked(raw, name, before))

    def _whole_text(self, raw: RawRow) -> Row:
        return Row("", (check_text(self._columns.get(raw, "text"), self._columns.name("text")),))

    def _row(self, raw: RawRow, asked: Asked, *responses: Response) -> Row:
        """A row whose prompt has the turns of the columns beside it too."""
        system = self._columns.beside(raw, "system")
        history = read_history(self._columns.beside(raw, "history"), self._columns.name("history"))
        tools = read_tools(self._columns.beside(raw, "tools"), self._columns.name("tools"))
        if isinstance(asked, str):
            if not self._speaks(raw):
                return Row(asked, responses)
            turns = turns_of_text(asked)
            if turns[0].message["content"] != asked:  # a dialogue, after whose last header a space stands
                responses = tuple(said.removeprefix(" ") if isinstance(said, str) else said for said in responses)
        else:
            turns = asked
        system = "" if is_nothing(system) else check_text(system, self._columns.name("system"), empty=True)
        first = [Turn({"role": "system", "content": system})] if system.strip() else []
        turns = put_first(first, turns, history)
        if all(turn.is_empty for turn in turns):
            raise BadRowError("the turns before the answer are empty")
        silent = (turn.role == "assistant" and (turn.is_empty or not turn.taught) for turn in turns)
        untaught = (i for i, is_silent in enumerate(silent) if is_silent)
        return Row([turn.message for turn in turns], responses, tools=tools, untaught=tuple(untaught))

    def _finished(self, row: Row, raw: RawRow, need: Need) -> Row:
        """A row with its numbers, and what else is written there."""
        margin, weight = (self._columns.beside(raw, name) for name in NUMBERS)
        if margin is not None:
            row = row._replace(margin=read_number(margin, self._columns.name("margin")))
        if self._ratings and not is_nothing(rating := self._columns.beside(raw, RATING)):
            row = row._replace(margin=read_rating(rating, self._columns.name(RATING), self._ratings, margin))
        if weight is not None:
            row = row._replace(weight=read_number(weight, self._columns.name("weight")))
        if row.weight <= 0:
            raise BadRowError(f"{self._columns.name('weight')} is not above 0")
        if self._columns.attributes:
            row = row._replace(scores=tuple(self._score(raw, name) for name in self._columns.attributes))
        unused = self._unused(raw, self._columns.used if need == "preference" else self._columns.used_alone)
        return row._replace(unused=unused) if unused else row

    def _score(self, raw: RawRow, attribute: str) -> float:
        """What a response was rated; NaN where nothing is said."""
        value = self._columns.beside(raw, attribute)
        if is_nothing(value) or (isinstance(value, float) and math.isnan(value)):
            return math.nan
        return read_number(value, self._columns.name(attribute))

    def _unused(self, raw: RawRow, used: frozenset[str]) -> tuple[str, ...]:
        """What of a row is not read for anything: columns, and keys of turns."""
        columns, keys = [], set()
        for column, value in raw.items():
            if column in used:
                if isinstance(value, list | dict) and column != self._columns.name("tools"):
                    keys |= unused_keys(value)
            elif not is_nothing(value):
                if column in _UNSEEN:
                    raise BadRowError(f"{column} holds something; only text can be read")
                columns.append(f"column {column!r}")
        return (*columns, *(f"key {key!r} of a turn" for key in sorted(keys)))

    # Readers of fields

    def _speaks(self, raw: RawRow) -> bool:
        """Whether a prompt that is text is a turn of the user, whatever the row is read for."""
        if self._stands_beside or any(not is_nothing(self._columns.beside(raw, name)) for name in BESIDE):
            return True
        values = [value for value in map(raw.get, self._answers) if not isinstance(value, str)]
        lists = [value for value in values if isinstance(value, list)]
        return any(isinstance(value, dict) for value in (*values, *(item for items in lists for item in items)))

    def _asked(self, raw: RawRow, name: str | None = None, before: Asked | None = None) -> Asked:
        """What is answered.

        Args:
            raw: the row.
            name: the column of the answer.
            before: the prompt that the answer brings along.
        """
        asked, column = self._read_asked(raw), self._columns.name(self._columns.asks or "")
        in_dialogue = self._columns.asks == self._columns.turns
        if before is None:
            if asked is None:
                raise BadRowError("nothing says what is answered: there is no message before the assistant's")
            if in_dialogue and isinstance(asked, list) and asked[-1].role == "assistant":
                raise BadRowError(f"{column} ends with the assistant, and so does the answer to it")
            return asked
        if isinstance(before, str) or asked is None:
            return before
        turns = turns_of_text(asked) if isinstance(asked, str) else asked
        turns = without_answer(turns) if in_dialogue else turns
        return join_turns(turns, before, f"{column} and {self._columns.name(name or '')}")

    def _read_asked(self, raw: RawRow) -> Asked | None:
        """What the columns of the prompt say."""
        if self._columns.asks == "instruction":
            return self._read_instruction(raw)
        if self._columns.asks != "prompt":
            return self._read_turns(raw)[0] if self._columns.asks else None
        value, column = self._columns.get(raw, "prompt"), self._columns.name("prompt")
        return read_turns(value, column) if isinstance(value, list) else check_text(value, column)

    def _read_instruction(self, raw: RawRow) -> list[Turn]:
        more = self._columns.beside(raw, "input")
        more = "" if more is None or not str(more).strip() else check_text(more, self._columns.name("input"))
        text = check_text(self._columns.get(raw, "instruction"), self._columns.name("instruction"), empty=bool(more))
        texts = [part for part in (text, more) if part.strip()]
        return [Turn({"role": "user", "content": "\n\n".join(texts)})]

    def _read_turns(self, raw: RawRow) -> tuple[list[Turn], str]:
        """The turns of their column, and its name."""
        assert self._columns.turns is not None
        column = self._columns.name(self._columns.turns)
        return read_turns(self._columns.get(raw, self._columns.turns), column), column

    def _read_answer(self, raw: RawRow, name: str, prompt_only: bool = False) -> _Answer:
        """A response, and the prompt that it brings along."""
        value, column = self._columns.get(raw, name), self._columns.name(name)
        if isinstance(value, list | dict):
            *before, last = read_turns([value] if isinstance(value, dict) else value, column)
            if last.role != "assistant":
                raise BadRowError(f"{column} does not end with the assistant")
            return _Answer("" if prompt_only else spoken(last, column), before or None, last.taught)
        text = check_text(value, column)
        if self._columns.asks is not None:
            return _Answer(text)
        prompt, response = split_dialogue(text, column, prompt_only)
        return _Answer(response, prompt)

    def _order(self, raw: RawRow) -> tuple[tuple[Response, ...], tuple[float, ...]]:
        """Responses and their ranks, the best first."""
        names = self._columns.ranking_names
        columns = [self._columns.name(name) for name in names]
        if names == CHOICE:
            responses = [read_response(self._columns.get(raw, name), self._columns.name(name)) for name in names[:2]]
            better = read_number(self._columns.get(raw, names[2]), columns[2])
            if not 1 <= better <= 2:
                raise BadRowError(f"{columns[2]} is {better:g}, which is neither 1 nor 2")
            ranks = [better, 3 - better]
        else:
            values = read_list(self._columns.get(raw, names[0]), columns[0])
            responses = [read_response(value, f"an item of {columns[0]}") for value in values]
            numbers = [read_number(n, columns[1]) for n in read_list(self._columns.get(raw, names[1]), columns[1])]
            if len(numbers) != len(responses):
                raise BadRowError(f"{columns[0]} and {columns[1]} differ in length")
            ranks = numbers if names[1] == "ranks" else [-number for number in numbers]
        order = sorted(range(len(ranks)), key=ranks.__getitem__)
        return tuple(responses[i] for i in order), tuple(ranks[i] for i in order)


def _messages(before: Asked | None) -> Any:
    return [turn.message for turn in before] if isinstance(before, list) else before
