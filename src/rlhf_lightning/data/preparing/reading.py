"""Rows of a source to ids: read in order, tokenised in chunks by one or more processes, every row counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import NamedTuple

from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.chat.messages import RefusedTurnsError
from rlhf_lightning.data.encode import REFUSED, EncodedRow, encode_rows
from rlhf_lightning.data.limits import TokenLimits
from rlhf_lightning.data.preparing.lengths import WholeLengths
from rlhf_lightning.data.preparing.workers import encode_chunks
from rlhf_lightning.data.rows import BadRowError, DroppedRow, LabelledRow, Need, OnBadRow, Row
from rlhf_lightning.data.sources import Rows
from rlhf_lightning.errors import UserError

BAD_SHARE = 0.01
"""Bad rows that `on_bad_row: auto` lets pass, as a share of the rows read."""
FEW_SHARE = 0.1
"""Rows that must serve what they are read for, as a share of those meant for it."""
_CHUNK = 1000  # rows tokenised in one call
_LISTED = 1000  # bad rows whose places are kept
_STREAMED = 1000  # rows of a stream, whose end is not known, that the share is taken of at the least


class Encoder(NamedTuple):
    """What turns rows into ids; every process has its own copy.

    Attributes:
        chat: the tokenizer and the form of dialogues.
        limits: what to cut to.
        find_turns: look for earlier turns of the assistant in the prompt.
    """

    chat: ChatEncoder
    limits: TokenLimits
    find_turns: bool = False

    def encode(self, rows: list[Row]) -> list[EncodedRow | str]:
        """Ids of each row, or the reason it is dropped for."""
        return encode_rows(rows, self.chat, self.limits, self.find_turns) if rows else []


class Choice(NamedTuple):
    """A row that goes on to be tokenised.

    Attributes:
        row: with the responses that are wanted.
        kinds: what it is for.
        part: where it goes.
        lacking: why the row serves less than was asked for, if it does.
    """

    row: Row
    kinds: tuple[Need, ...] = ()
    part: str = ""
    lacking: str = ""


class _Left(NamedTuple):
    """A row that is left out before it is tokenised."""

    counted_as: str
    bad: str = ""


class _Item(NamedTuple):
    """A row's number, or its place where it has none, and what becomes of it."""

    where: int | str
    outcome: Choice | _Left


class _Lesser(NamedTuple):
    """A row that serves less than was asked for, and why."""

    row: Row
    reason: str


Choose = Callable[[Row], "Choice | str | None"]
Parsed = tuple[int | str, Row | _Lesser | BadRowError | DroppedRow]
Chunk = list[_Item]


class RowReader:
    """Reads rows of one source into ids, and counts.

    Args:
        rows: the opened source.
        needs: what the rows are read for, the most demanding first; a row of no use for one is read for the next.
        encoder: turns them into ids.
        on_bad_row: what to do at a row that cannot be used.
        num_proc: processes that tokenise; what comes out does not depend on it.

    Attributes:
        counts: `rows`, `kept`, `other stages`, `dropped: reason`, `cut: prompt` and the like; of rows that are
            kept, `lacking: reason` where they serve less than was asked for, and `unused: column 'x'` and the like.
        bad_rows: place and reason of the first bad rows.
        num_bad: all of them.
        unfit: for each need the rows that do not serve it, by reason; not those that their own label keeps from it.
        whole_lengths: of the rows that are tokenised, before they are cut.
    """

    def __init__(
        self, rows: Rows, needs: tuple[Need, ...], encoder: Encoder, on_bad_row: OnBadRow, num_proc: int = 1
    ) -> None:
        self.rows, self.needs, self.encoder = rows, needs, encoder
        # A worker does not know what the script that runs here defines.
        self.num_proc = 1 if type(encoder.chat.tokenizer).__module__ == "__main__" else num_proc
        self.on_bad_row = on_bad_row
        self.counts: Counter[str] = Counter()
        self.bad_rows: list[tuple[str, str]] = []
        self.num_bad = 0
        self.unfit: dict[Need, Counter[str]] = {need: Counter() for need in needs}
        self.whole_lengths = WholeLengths(encoder.limits.max_prompt_length)
        self._parsed = 0
        self._not_meant: Counter[Need] = Counter()
        self._total: int | None = None

    def read(self, order: Sequence[int], choose: Choose) -> Iterator[tuple[Choice, EncodedRow]]:
        """Rows in the given order, tokenised.

        Args:
            order: numbers of the rows.
            choose: says of a sound row where it goes, or what it is counted as if it is left out; None if it has not
                enough responses for what it is wanted for.

        Raises:
            UserError: too many bad rows, or something that is wrong with all rows, such as a missing template.
        """
        self._total = len(order)
        return self._encoded(((number, self._parse(number)) for number in order), choose)

    def stream(self, epoch: int, limit: int | None, choose: Choose) -> Iterator[tuple[Choice, EncodedRow]]:
        """Rows as they arrive, tokenised.

        Args:
            epoch: of a blend, whose weights pick other rows in each.
            limit: most rows to read.
            choose: as in `read`.

        Raises:
            UserError: as in `read`.
        """
        return self._encoded(self._noted(islice(self.rows.stream(self.needs[0], epoch), limit)), choose)

    def _noted(self, parsed: Iterable[Parsed]) -> Iterator[Parsed]:
        """Rows of a stream, those that do not serve noted; it stops where hardly any of the first rows do."""
        for where, row in parsed:
            self._parsed += 1
            if isinstance(row, BadRowError | DroppedRow):
                self._note(self.needs[0], row)
            if self._parsed == _STREAMED:
                self.check_enough()
            yield where, row

    def _encoded(self, parsed: Iterable[Parsed], choose: Choose) -> Iterator[tuple[Choice, EncodedRow]]:
        items = (_Item(where, _outcome(row, choose)) for where, row in parsed)
        for chunk, results in self._encoded_chunks(_chunks(items)):
            for where, outcome in chunk:
                self.counts["rows"] += 1
                if isinstance(outcome, _Left):
                    self._leave(where, outcome)
                    continue
                result = next(results)
                if isinstance(result, str):
                    self._leave(where, self._dropped(result, outcome.row))
                    continue
                self.counts["kept"] += 1
                self.counts.update(_notes(outcome, result))
                self.whole_lengths.add(result.whole_lengths[0], result.whole_lengths[1:])
                if outcome.lacking:
                    self.counts[f"lacking: {outcome.lacking}"] += 1
                yield outcome, result

    def _encoded_chunks(self, chunks: Iterator[Chunk]) -> Iterator[tuple[Chunk, Iterator[EncodedRow | str]]]:
        try:
            for chunk, encoded in encode_chunks(chunks, _rows, self.encoder, self.num_proc, self._total):
                try:
                    results = encoded()
                except UserError as error:
                    raise self._named(error, chunk) from error
                yield chunk, iter(results)
        except BrokenProcessPool as error:
            raise UserError("a process that tokenises died, perhaps as memory ran out; lower `num_proc`") from error

    def drop_kept(self, reason: str, choice: Choice, encoded: EncodedRow) -> None:
        """Count the row given last as dropped after all.

        Args:
            reason: why.
            choice: what was given.
            encoded: its ids.
        """
        self.counts["kept"] -= 1
        self.counts.subtract(_notes(choice, encoded))
        if choice.lacking:
            self.counts[f"lacking: {choice.lacking}"] -= 1
        self.counts[f"dropped: {reason}"] += 1

    def ordered_counts(self) -> dict[str, int]:
        """The counts that are not 0, rows read and rows kept first."""
        names = ["rows", "kept", *sorted(self.counts.keys() - {"rows", "kept"})]
        return {name: self.counts[name] for name in names if self.counts[name]}

    def check(self) -> None:
        """Assert that every row is accounted for."""
        dropped = sum(count for name, count in self.counts.items() if name.startswith("dropped: "))
        counts = self.counts
        assert counts["rows"] == counts["kept"] + dropped + counts["other stages"], counts
        assert self._total in (None, counts["rows"]), counts

    def check_enough(self) -> None:
        """Refuse to go on where hardly any row serves what it is read for, as where data are not what they seem.

        Rows that the user left out, by filters, limits or labels, do not count.

        Raises:
            UserError: fewer than 10% do, and bad rows are not to be skipped.
        """
        for need, unfit in self.unfit.items():
            meant = self._parsed - self._not_meant[need]
            serve = meant - unfit.total()
            if serve < FEW_SHARE * meant and self.on_bad_row != "skip":
                reasons = ", ".join(f"{reason} {count}" for reason, count in unfit.most_common())
                kinds = ", or leave it out of `kinds`" if len(self.needs) > 1 else ""
                raise UserError(
                    f"only {serve} of {meant} rows of {' + '.join(self.rows.source_names)} serve {need} ({reasons}); "
                    f"mend the data or `columns`{kinds}, or pass `on_bad_row: skip` to go on with what there is"
                )

    def _note(self, need: Need, reason: BadRowError | DroppedRow) -> None:
        if isinstance(reason, LabelledRow):
            self._not_meant[need] += 1
        else:
            self.unfit[need][str(reason)] += 1

    def _parse(self, number: int) -> Row | _Lesser | BadRowError | DroppedRow:
        first: DroppedRow | None = None
        self._parsed += 1
        for i, need in enumerate(self.needs):
            try:
                row = self.rows.parse(number, need)
            except BadRowError as reason:
                for lost in self.needs[i:]:
                    self._note(lost, reason)
                return first or reason
            except DroppedRow as reason:
                self._note(need, reason)
                first = first or reason
            else:
                return row if first is None else _Lesser(row, str(first))
        assert first is not None
        return first

    def _place(self, where: int | str) -> str:
        return where if isinstance(where, str) else self.rows.place(where)

    def _dropped(self, reason: str, row: Row) -> _Left:
        """What a row is counted as that could not be tokenised; turns that a template refuses make it a bad row."""
        if not reason.startswith(REFUSED):
            return _Left(f"dropped: {reason}")
        try:
            self.encoder.chat.render(row.prompt, row.tools)
        except RefusedTurnsError as error:
            return _Left(f"dropped: {reason}", str(error))
        return _Left(f"dropped: {reason}", reason)

    def _leave(self, where: int | str, left: _Left) -> None:
        self.counts[left.counted_as] += 1
        if not left.bad:
            return
        self.num_bad += 1
        if len(self.bad_rows) < _LISTED:
            self.bad_rows.append((self._place(where), left.bad))
        place, reason = self.bad_rows[0]
        if self.on_bad_row == "error":
            raise UserError(f"{place}: {reason}; mend the row or pass `on_bad_row: skip`")
        rows = self._total or max(self.counts["rows"], _STREAMED)
        if self.on_bad_row == "auto" and self.num_bad > BAD_SHARE * rows:
            raise UserError(
                f"{place}: {reason}; {self.num_bad} of the {self.counts['rows']} rows read so far are bad, more than "
                f"{BAD_SHARE:.0%} of {rows}; mend them or pass `on_bad_row: skip`"
            )

    def _named(self, error: UserError, chunk: Chunk) -> UserError:
        """An error that concerns all rows, with the place of the first row that shows it."""
        for where, outcome in chunk:
            if isinstance(outcome, Choice):
                try:
                    self.encoder.chat.render(outcome.row.prompt)
                except RefusedTurnsError:
                    continue
                except UserError as first:
                    return UserError(f"{self._place(where)}: {first}")
        return error


def _outcome(row: Row | _Lesser | BadRowError | DroppedRow, choose: Choose) -> Choice | _Left:
    if isinstance(row, Row):
        chosen = choose(row)
        assert chosen is not None, "a row read for all that it may serve has what that takes"
        return _Left(chosen) if isinstance(chosen, str) else chosen
    if isinstance(row, _Lesser):
        chosen = choose(row.row)
        if chosen is None:
            return _Left(f"dropped: {row.reason}")
        return _Left(chosen) if isinstance(chosen, str) else chosen._replace(lacking=row.reason)
    return _Left(f"dropped: {row}", str(row) if isinstance(row, BadRowError) else "")


def _notes(choice: Choice, encoded: EncodedRow) -> tuple[str, ...]:
    """What is counted of a row that is kept."""
    return (*encoded.notes, *(f"unused: {what}" for what in choice.row.unused))


def _chunks(items: Iterator[_Item]) -> Iterator[Chunk]:
    while chunk := list(islice(items, _CHUNK)):
        yield chunk


def _rows(chunk: Chunk) -> list[Row]:
    return [item.outcome.row for item in chunk if isinstance(item.outcome, Choice)]
