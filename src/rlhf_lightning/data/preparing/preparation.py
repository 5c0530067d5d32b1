"""From sources to a prepared folder: read, filter, split, tokenise, write, and account for every row."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities.rank_zero import rank_zero_info

from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.data.encode import EncodedRow, Encoder
from rlhf_lightning.data.limits import TokenLimits
from rlhf_lightning.data.preparing.counts import say_counts
from rlhf_lightning.data.preparing.examples import ExampleMaker
from rlhf_lightning.data.preparing.filters import (
    Filters,
    RowFilter,
    Splits,
    hash_of,
    in_order,
    key_of,
    most_demanding_first,
    narrowed,
    served,
)
from rlhf_lightning.data.preparing.manifest import FORMAT, PROMPT_HASHES, Part
from rlhf_lightning.data.preparing.prepared import FolderWriter
from rlhf_lightning.data.preparing.reading import Choose, Item, RowReader
from rlhf_lightning.data.rows import KINDS, Need, OnBadRow, Row
from rlhf_lightning.data.sources import Rows, Source
from rlhf_lightning.errors import UserError
from rlhf_lightning.training.reporting import Patience

_EVALUATED: dict[str, tuple[Part, str]] = {
    "validation_data": ("validation", "validate on"),
    "test_data": ("test", "test on"),
}


@dataclass
class Preparation:
    """What is to be prepared, and how.

    Args:
        data: rows to train on, of which parts may be held out.
        chat: turns text into ids.
        limits: in tokens.
        kinds: kinds of example to make; None for all that the data has the columns for.
        validation_data: rows of the validation part; with it nothing of `data` goes there. Without it that part is the
            `validation` split of `data`, if it has one, else what `splits` holds out.
        test_data: the same for the test part.
        filters: which rows are left out.
        splits: shares held out, and shares of the stages, of `data`.
        num_samples: read only this many rows of `data`.
        on_bad_row: what to do at a row that cannot be used.
        find_turns: look for earlier turns of the assistant in the prompts of demonstrations.
        num_proc: processes that may tokenise, where there is text enough for them to pay; the result does not depend on
            it.
    """

    data: Source
    chat: ChatEncoder
    limits: TokenLimits
    kinds: tuple[Need, ...] | None = None
    validation_data: Source | None = None
    test_data: Source | None = None
    filters: Filters = field(default_factory=Filters)
    splits: Splits = field(default_factory=Splits)
    num_samples: int | None = None
    on_bad_row: OnBadRow = "auto"
    find_turns: bool = False
    num_proc: int = 1

    def key(self) -> str:
        """A hash of everything that decides what `build` writes."""
        return self._key

    @cached_property
    def _key(self) -> str:
        said = {
            "format": FORMAT,
            "holds": PROMPT_HASHES,  # entries of a cache that were made without it are made anew
            "chat": self.chat.fingerprint(),
            "sources": {role: rows.fingerprint() for role, rows in self._rows.items()},
            **self.arguments(),
        }
        return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=16).hexdigest()

    def arguments(self) -> dict[str, Any]:
        """The settings, as `args.json` says them."""
        return {
            "kinds": list(self._kinds),
            "limits": asdict(self.limits),
            "filters": asdict(self.filters),
            "splits": asdict(self.splits),
            "num_samples": self.num_samples,
            "on_bad_row": self.on_bad_row,
            "find_turns": self.find_turns,
            **({"attributes": list(self.data.attributes)} if self.data.attributes else {}),
            **({} if self.data.ratings is None else {"rating_margins": self.data.ratings}),
        }

    def build(self, folder: Path) -> None:
        """Write everything into an empty folder, its manifest last.

        Raises:
            UserError: data that cannot be used, or that leaves nothing to train on.
        """
        for rows in self._rows.values():
            for need in self._kinds:
                rows.check(need)
        writer = FolderWriter(folder, self._kinds)
        readers: dict[str, RowReader] = {}
        evaluation_prompts: set[int] = set()
        # What `data` may have to keep clear of comes first.
        for role in reversed(self._rows):
            readers[role] = self._read(role, evaluation_prompts, writer)
        writer.close()
        uses: dict[str, tuple[Part, str]] = {"data": ("train", "train on"), **_EVALUATED}
        for role, reader in readers.items():
            part, use = uses[role]
            if any(writer[need, part].rows == 0 for need in self._kinds):
                name, counts = name_of_rows(self._rows[role]), say_counts(reader.counts.said())
                own = "" if role in self._given else f"; give `{role}`, or name the one split of `data` to read"
                raise UserError(f"{name} leaves nothing to {use} ({counts}){own}")
            reader.check_enough()
        if replace(self).key() != self.key():
            raise UserError("the data changed while they were read; run again")
        writer.finish(self._manifest(readers), self.arguments(), self.chat)

    @property
    def source_weights(self) -> list[float]:
        """How often an epoch sees the rows of each source of `data`."""
        return self._rows["data"].source_weights

    @property
    def source_names(self) -> dict[str, list[str]]:
        """Names of the sources of what is read, by its role; the tokens do not depend on them."""
        return {role: list(rows.source_names) for role, rows in self._rows.items()}

    @cached_property
    def _opened(self) -> dict[str, Rows]:
        """`data` by its parts."""
        return self.data.open_parts()

    @cached_property
    def _given(self) -> dict[str, Rows]:
        """The sources that were given, opened, by their role, `data` first."""
        given = {"data": self._opened["train"]}
        for role, (part, _) in _EVALUATED.items():
            source: Source | None = getattr(self, role)
            if source is not None:
                parts = source.open_parts()
                given[role] = parts.get(part, parts["train"])
        return given

    @cached_property
    def _rows(self) -> dict[str, Rows]:
        """What is read, by its role, `data` first: what was given, and the splits that `data` brings for evaluation."""
        rows = dict(self._given)
        for role, (part, _) in _EVALUATED.items():
            if part not in self._opened:
                continue
            own = self._opened[part]
            if role in rows:
                reason = f"`{role}` is given"
            elif self.data.streaming:
                reason = f"`data` is streamed; give `{role}`"
            elif not all(own.has(need) for need in self._kinds):
                reason = f"its columns do not hold what {' and '.join(self._kinds)} need"
            else:
                rows[role] = own
                continue
            rank_zero_info(f"{name_of_rows(own)} is not read: {reason}")
        return {role: rows[role] for role in ("data", *_EVALUATED) if role in rows}

    @cached_property
    def _kinds(self) -> tuple[Need, ...]:
        if self.kinds is not None:
            return in_order(self.kinds)
        kinds = tuple(need for need in KINDS if all(rows.has(need) for rows in self._given.values()))
        if not kinds:
            self._given["data"].check("prompts")
            raise UserError(f"{self.data.name} and the data for evaluation have no kind of example in common")
        return kinds

    @cached_property
    def _splits(self) -> Splits:
        """The splits of `data`, which holds nothing out for a part that has data of its own."""
        validation = 0.0 if "validation_data" in self._rows else self.splits.validation
        test = 0.0 if "test_data" in self._rows else self.splits.test
        return replace(self.splits, validation=validation, test=test)

    def stream(self, epoch: int) -> tuple[RowReader, Iterator[tuple[Item, EncodedRow]]]:
        """The rows of `data` as they arrive, for training; tokenised in this process, whatever `num_proc` says.

        Args:
            epoch: of a blend, whose weights pick other rows in each.

        Returns:
            What counts them, and the rows that are kept.
        """
        reader = replace(self, num_proc=1)._reader("data")
        return reader, reader.stream(epoch, self.num_samples, self._chooser("data", set()))

    def _reader(self, role: str) -> RowReader:
        encoder = Encoder(self.chat, self.limits, self.find_turns)
        return RowReader(self._rows[role], most_demanding_first(self._kinds), encoder, self.on_bad_row, self.num_proc)

    def _read(self, role: str, evaluation_prompts: set[int], writer: FolderWriter) -> RowReader:
        """Write the examples of one source, and say where its rows went."""
        reader = self._reader(role)
        maker = ExampleMaker(reader, self.filters.remove_same_responses)
        order = self.filters.order(len(self._rows[role]), self.num_samples if role == "data" else None)
        patience = Patience()
        for item, ids in reader.read(order, self._chooser(role, evaluation_prompts)):
            if patience.is_over():
                name, total = name_of_rows(self._rows[role]), len(self._rows[role])
                rank_zero_info(f"{name}: {reader.counts.rows:,} of {total:,} rows read")
            for need, examples in maker.examples(item, ids).items():
                reader.counts.others[f"{need} {item.part}"] += len(examples)
                for example in examples:
                    writer[need, item.part].add(example, item.row.source, item.prompt_hash)
        reader.check()
        return reader

    def _chooser(self, role: str, evaluation_prompts: set[int]) -> Choose:
        unwanted = RowFilter(self.filters, evaluation_prompts if role == "data" else set())

        def choose(item: Item) -> None:
            key = key_of(item.row)
            side = self._splits.key(item.row, key) if role == "data" else ""
            kinds = self._splits.kinds(side, self._kinds) if role == "data" else self._kinds
            item.other_stage = not kinds
            if not kinds:
                return
            if not (kinds := served(item.row, kinds)):
                assert item.lacking, "a row read for all that it may serve has what that takes"
                item.dropped = item.lacking
            elif reason := unwanted.reason(item.row, key):
                item.dropped = reason
            else:
                item.prompt_hash = hash_of(key)
                if role != "data":
                    evaluation_prompts.add(item.prompt_hash)
                item.part = self._splits.part(side) if role == "data" else role.removesuffix("_data")
                item.row, item.kinds = narrowed(item.row, kinds), kinds

        return choose

    def _manifest(self, readers: dict[str, RowReader]) -> dict[str, Any]:
        roles = {}
        for role, rows in self._rows.items():
            reader = readers[role]
            roles[role] = {
                "name": name_of_rows(rows),
                "fingerprint": rows.fingerprint(),
                "source_names": list(rows.source_names),
                "source_weights": list(rows.source_weights),
                "counts": reader.counts.said(),
                "whole_lengths": reader.whole_lengths.describe(),
                "bad_rows": {"count": reader.num_bad, "first": reader.bad_rows},
            }
        return {"key": self.key(), "arguments": self.arguments(), "sources": roles}


def read_all(
    source: Source, need: Need, encoder: Encoder, on_bad_row: OnBadRow
) -> tuple[list[tuple[Row, EncodedRow]], Counter[str]]:
    """All rows of a source in memory, neither filtered nor split.

    Returns:
        The rows that are kept, and the counts.

    Raises:
        UserError: data that cannot be used.
    """
    rows = source.open()
    rows.check(need)
    reader = RowReader(rows, (need,), encoder, on_bad_row)
    kept = [(item.row, ids) for item, ids in reader.read(range(len(rows)), lambda item: None)]
    reader.check()
    reader.check_enough()
    return kept, Counter(reader.counts.said())


def name_of_rows(rows: Rows) -> str:
    """The name of opened rows, those of a blend by all its sources."""
    return " + ".join(rows.source_names)
