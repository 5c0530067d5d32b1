"""Rows of a source, every one counted: read in order as texts, or as ids, in chunks by one or more processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice

from rlhf_lightning.chat.messages import RefusedTurnsError
from rlhf_lightning.data.encode import REFUSED, EncodedRow, Encoder
from rlhf_lightning.data.preparing.counts import Counts
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
_NOTHING = Row("")


@dataclass(slots=True)
class Item:
    """A row on its way from its source to the examples that are made of it; what becomes of it is noted on the way.

    Attributes:
        where: its number, or its place where it has none, as in a stream.
        row: as it was read, in the end with only the responses that are wanted; empty where it cannot be read.
        dropped: why it is left out, if it is.
        bad: what is wrong with it, if that makes it a bad row.
        lacking: why it serves less than was asked for, if it does.
        other_stage: whether it belongs to another stage.
        kinds: what it is for.
        part: where it goes.
        prompt_hash: of its prompt as text, 8 bytes.
    """

    where: int | str
    row: Row = _NOTHING
    dropped: str = ""
    bad: str = ""
    lacking: str = ""
    other_stage: bool = False
    kinds: tuple[Need, ...] = ()
    part: str = ""
    prompt_hash: int = 0

    @property
    def goes_on(self) -> bool:
        """Whether it is to be tokenised."""
        return not self.dropped and not self.other_stage

    def drop(self, reason: BadRowError | DroppedRow) -> None:
        """Leave it out.

        Args:
            reason: why; it is a bad row only where nothing else is known of it.
        """
        self.dropped = self.lacking or str(reason)
        self.bad = str(reason) if isinstance(reason, BadRowError) and not self.lacking else ""


Choose = Callable[[Item], None]


class TextReader:
    """Reads rows of one source as they are written, and counts.

    Args:
        rows: the opened source.
        needs: what the rows are read for, the most demanding first; a row of no use for one is read for the next.
        on_bad_row: what to do at a row that cannot be used.

    Attributes:
        counts: where the rows went.
        bad_rows: place and reason of the first bad rows.
        num_bad: all of them.
        unfit: for each need the rows that do not serve it, by reason; not those that their own label keeps from it.
    """

    def __init__(self, rows: Rows, needs: tuple[Need, ...], on_bad_row: OnBadRow) -> None:
        self.rows, self.needs, self.on_bad_row = rows, needs, on_bad_row
        self.counts = Counts()
        self.bad_rows: list[tuple[str, str]] = []
        self.num_bad = 0
        self.unfit: dict[Need, Counter[str]] = {need: Counter() for need in needs}
        self._parsed = 0
        self._not_meant: Counter[Need] = Counter()
        self._total: int | None = None

    def texts(self, order: Sequence[int], choose: Choose) -> Iterator[Item]:
        """Rows in the given order, those that are kept.

        Args:
            order: numbers of the rows.
            choose: says of a sound row where it goes, or why it is left out.

        Raises:
            UserError: too many bad rows.
        """
        self._total = len(order)
        for item in _chosen(map(self._parse, order), choose):
            self.counts.rows += 1
            if item.goes_on:
                self.counts.kept += 1
                self._count(item, 1)
                yield item
            else:
                self._leave(item)

    def check(self) -> None:
        """Assert that every row is accounted for."""
        self.counts.check(self._total)

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
                    f"fix the data or `columns`{kinds}, or pass `on_bad_row: skip` to go on with what there is"
                )

    def _count(self, item: Item, by: int) -> None:
        """Count what is said of a row that is kept."""
        for word in item.row.unused:
            self.counts.unused[word] += by
        if item.lacking:
            self.counts.lacking[item.lacking] += by

    def _note(self, need: Need, reason: BadRowError | DroppedRow) -> None:
        if isinstance(reason, LabelledRow):
            self._not_meant[need] += 1
        else:
            self.unfit[need][str(reason)] += 1

    def _parse(self, number: int) -> Item:
        """A row read for the first of the needs that it serves."""
        item = Item(number)
        self._parsed += 1
        for i, need in enumerate(self.needs):
            try:
                item.row = self.rows.parse(number, need)
                return item
            except BadRowError as reason:
                for lost in self.needs[i:]:
                    self._note(lost, reason)
                item.drop(reason)
                return item
            except DroppedRow as reason:
                self._note(need, reason)
                item.lacking = item.lacking or str(reason)
        item.dropped = item.lacking
        return item

    def _place(self, where: int | str) -> str:
        return where if isinstance(where, str) else self.rows.place(where)

    def _leave(self, item: Item) -> None:
        if item.other_stage:
            self.counts.other_stages += 1
        else:
            self.counts.dropped[item.dropped] += 1
        if not item.bad:
            return
        self.num_bad += 1
        if len(self.bad_rows) < _LISTED:
            self.bad_rows.append((self._place(item.where), item.bad))
        place, reason = self.bad_rows[0]
        if self.on_bad_row == "error":
            raise UserError(f"{place}: {reason}; fix the row or pass `on_bad_row: skip`")
        rows = self._total or max(self.counts.rows, _STREAMED)
        if self.on_bad_row == "auto" and self.num_bad > BAD_SHARE * rows:
            raise UserError(
                f"{place}: {reason}; {self.num_bad} of the {self.counts.rows} rows read so far are bad, more than "
                f"{BAD_SHARE:.0%} of {rows}; fix them or pass `on_bad_row: skip`"
            )


class RowReader(TextReader):
    """Reads rows of one source into ids, and counts.

    Args:
        rows: the opened source.
        needs: what the rows are read for, the most demanding first; a row of no use for one is read for the next.
        encoder: turns them into ids.
        on_bad_row: what to do at a row that cannot be used.
        num_proc: processes that tokenise; what comes out does not depend on it.

    Attributes:
        whole_lengths: of the rows that are tokenised, before they are cut.
    """

    def __init__(
        self, rows: Rows, needs: tuple[Need, ...], encoder: Encoder, on_bad_row: OnBadRow, num_proc: int = 1
    ) -> None:
        super().__init__(rows, needs, on_bad_row)
        self.encoder = encoder
        # A worker does not know what the script that runs here defines.
        self.num_proc = 1 if type(encoder.chat.tokenizer).__module__ == "__main__" else num_proc
        self.whole_lengths = WholeLengths(encoder.limits.max_prompt_length)

    def read(self, order: Sequence[int], choose: Choose) -> Iterator[tuple[Item, EncodedRow]]:
        """Rows in the given order, tokenised.

        Args:
            order: numbers of the rows.
            choose: says of a sound row where it goes, or why it is left out.

        Raises:
            UserError: too many bad rows, or something that is wrong with all rows, such as a missing template.
        """
        self._total = len(order)
        return self._encoded(map(self._parse, order), choose)

    def stream(self, epoch: int, limit: int | None, choose: Choose) -> Iterator[tuple[Item, EncodedRow]]:
        """Rows as they arrive, tokenised.

        Args:
            epoch: of a blend, whose weights pick other rows in each.
            limit: most rows to read.
            choose: as in `read`.

        Raises:
            UserError: as in `read`.
        """
        return self._encoded(self._noted(islice(self.rows.stream(self.needs[0], epoch), limit)), choose)

    def _noted(self, parsed: Iterable[tuple[str, Row | BadRowError | DroppedRow]]) -> Iterator[Item]:
        """Rows of a stream, those that do not serve noted; it stops where hardly any of the first rows do."""
        for where, row in parsed:
            self._parsed += 1
            item = Item(where)
            if isinstance(row, BadRowError | DroppedRow):
                self._note(self.needs[0], row)
                item.drop(row)
            else:
                item.row = row
            if self._parsed == _STREAMED:
                self.check_enough()
            yield item

    def _encoded(self, items: Iterable[Item], choose: Choose) -> Iterator[tuple[Item, EncodedRow]]:
        for chunk, results in self._encoded_chunks(_chunks(_chosen(items, choose))):
            for item in chunk:
                self.counts.rows += 1
                result = next(results) if item.goes_on else item.dropped
                if isinstance(result, EncodedRow):
                    self.counts.kept += 1
                    self._count_encoded(item, result, 1)
                    self.whole_lengths.add(result.whole_lengths[0], result.whole_lengths[1:])
                    yield item, result
                    continue
                if item.goes_on:
                    item.dropped, item.bad = result, self._refusal(result, item.row)
                self._leave(item)

    def _encoded_chunks(self, chunks: Iterator[list[Item]]) -> Iterator[tuple[list[Item], Iterator[EncodedRow | str]]]:
        try:
            for chunk, encoded in encode_chunks(chunks, _rows, self.encoder, self.num_proc, self._total):
                try:
                    results = encoded()
                except UserError as error:
                    raise self._named(error, chunk) from error
                yield chunk, iter(results)
        except BrokenProcessPool as error:
            raise UserError("a process that tokenises died, perhaps as memory ran out; lower `num_proc`") from error

    def drop_kept(self, reason: str, item: Item, encoded: EncodedRow) -> None:
        """Count the row given last as dropped after all."""
        self.counts.kept -= 1
        self._count_encoded(item, encoded, -1)
        self.counts.dropped[reason] += 1

    def _count_encoded(self, item: Item, encoded: EncodedRow, by: int) -> None:
        """Count what is said of a row that is kept, and of its ids."""
        self._count(item, by)
        for word in encoded.cut:
            self.counts.cut[word] += by
        for word in encoded.notes:
            self.counts.others[word] += by

    def _refusal(self, reason: str, row: Row) -> str:
        """What makes a row a bad one that could not be tokenised: turns that a template refuses, and nothing else."""
        if not reason.startswith(REFUSED):
            return ""
        try:
            self.encoder.chat.render(row.prompt, row.tools)
        except RefusedTurnsError as error:
            return str(error)
        return reason

    def _named(self, error: UserError, chunk: list[Item]) -> UserError:
        """An error that concerns all rows, with the place of the first row that shows it."""
        for item in chunk:
            if item.goes_on:
                try:
                    self.encoder.chat.render(item.row.prompt)
                except RefusedTurnsError:
                    continue
                except UserError as first:
                    return UserError(f"{self._place(item.where)}: {first}")
        return error


def _chosen(items: Iterable[Item], choose: Choose) -> Iterator[Item]:
    for item in items:
        if item.goes_on:
            choose(item)
        yield item


def _chunks(items: Iterator[Item]) -> Iterator[list[Item]]:
    while chunk := list(islice(items, _CHUNK)):
        yield chunk


def _rows(chunk: list[Item]) -> list[Row]:
    return [item.row for item in chunk if item.goes_on]
