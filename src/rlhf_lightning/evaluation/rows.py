"""Rows as texts, for any model: the same rows that training holds out, before a tokenizer has seen them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np
from pytorch_lightning.utilities.rank_zero import rank_zero_info

from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.chat.messages import Response, exact_text
from rlhf_lightning.chat.written import WrittenPrompt
from rlhf_lightning.data.encode import written_prompt
from rlhf_lightning.data.preparing.counts import say_counts
from rlhf_lightning.data.preparing.examples import DUPLICATE
from rlhf_lightning.data.preparing.filters import Splits, key_of, served
from rlhf_lightning.data.preparing.given import holds_tokens
from rlhf_lightning.data.preparing.preparation import name_of_rows
from rlhf_lightning.data.preparing.reading import Choose, Item, TextReader
from rlhf_lightning.data.rows import Need, OnBadRow, Row
from rlhf_lightning.data.sources import DataSource, Rows, as_source
from rlhf_lightning.errors import UserError

Part = Literal["all", "train", "validation", "test"]
MORE_THAN_TEXT = "response is more than text"


class TextRow(NamedTuple):
    """One row as text.

    Attributes:
        row: its number in the data, from 0.
        source: name of the source it comes from.
        written: the prompt as the row wrote it.
        responses: as the row wrote them, the best first; none for a prompt alone.
        ranks: of each response, smaller is better and equal is a tie; empty means strictly in order.
        margin: by how much the best response was preferred, in the units of its source; 0 where that is not said.
        weight: how much the row counts.
        suffix: the end of the prompt that the responses are set apart from by a space of their own; "" for none.
    """

    row: int
    source: str
    written: WrittenPrompt
    responses: tuple[str, ...] = ()
    ranks: tuple[float, ...] = ()
    margin: float = 0.0
    weight: float = 1.0
    suffix: str = ""

    def as_row(self, responses: int | None = None) -> Row:
        """The row as the data modules encode it.

        Args:
            responses: how many of the responses, from the best on; None for all.
        """
        prompt = self.written.prompt
        if isinstance(prompt, str):
            prompt = prompt.removesuffix(self.suffix)
        return Row(prompt, self.responses[:responses], suffix=self.suffix, tools=self.written.tools)

    def said(self, chat: ChatEncoder | None) -> list[str]:
        """The responses as a format is to write them: in a turn of its own none begins with the space of a suffix.

        Args:
            chat: writes dialogues as the model reads them; None where a function reads texts.
        """
        if not self.suffix or chat is None or chat.kind(self.written.prompt) != "template":
            return list(self.responses)
        return [response.removeprefix(" ") for response in self.responses]


def read_rows(
    data: DataSource,
    need: Need,
    *,
    part: Part = "all",
    columns: Mapping[str, str] | None = None,
    num_samples: int | None = None,
    splits: Splits = Splits(),  # noqa: B008, frozen
    on_bad_row: OnBadRow = "auto",
) -> list[TextRow]:
    """Rows of data as texts; how many were read and left out, and why, is said in one line.

    Args:
        data: whatever the stages read, save a folder of token ids.
        need: what the rows must hold.
        part: `validation` and `test` are those splits of the data, or where they bring none what `splits` holds out of
            them; `train` is the rest; `all` is every row of the one split that the data have, or of `train`.
        columns: our column names to those of the data.
        num_samples: at most this many rows, drawn at random, the same each time; None for all.
        splits: as the training had them, so that a row falls on the side that it fell on there.
        on_bad_row: what to do at a row that cannot be used, as in training.

    Returns:
        The rows, in the order of the data.

    Raises:
        UserError: data that cannot be used, or that leave no row.
    """
    if holds_tokens(data):
        raise UserError(
            f"{data} holds the token ids of one tokenizer, and an evaluation reads texts for every model; name the "
            "data it was made from"
        )
    rows, within = _open(data, part, columns, splits, need)
    rows.check(need)
    reader, before = TextReader(rows, (need,), on_bad_row), set[tuple[str, str]]()

    def choose(item: Item) -> None:
        side = splits.key(item.row, key_of(item.row))
        if not splits.kinds(side, (need,)):
            item.other_stage = True
        elif not served(item.row, (need,)):
            item.dropped = item.lacking
        elif any(_text(response) is None for response in item.row.responses):
            item.dropped = MORE_THAN_TEXT
        elif within is not None and within.part(side) != part:
            item.dropped = "in another part"
        elif need == "prompts":
            same = exact_text(written_prompt(item.row).prompt), repr(item.row.tools)
            item.dropped = DUPLICATE if same in before else ""
            before.add(same)

    found = _sampled(reader, choose, num_samples)
    name, counts = name_of_rows(rows), say_counts(reader.counts.said())
    if not found:
        raise UserError(f"{name} leaves no row of part '{part}' to evaluate on ({counts})")
    reader.check_enough()
    rank_zero_info(f"{name}, part {part}, for {need}: {counts}")
    return found


def _open(
    data: DataSource, part: Part, columns: Mapping[str, str] | None, splits: Splits, need: Need
) -> tuple[Rows, Splits | None]:
    """The rows that a part stands in, and what tells it from the other rows there, if there are others."""
    source = as_source(data, columns)
    opened = source.open_parts()
    brought = [name for name in ("validation", "test") if name in opened and opened[name].has(need)]
    if part in brought:
        return opened[part], None
    if part == "all":
        if others := [name for name in opened if name != "train"]:
            rank_zero_info(f"{source.name}: only its train split is read, not {' and '.join(others)}; name one as part")
        return opened["train"], None
    shares = {name: 0.0 if name in brought else getattr(splits, name) for name in ("validation", "test")}
    if part != "train" and not shares[part]:
        raise UserError(
            f"{source.name} has no {part} split, and {part}_split is 0; hold a share out as the training did, or pass "
            "part: all to evaluate on every row"
        )
    return opened["train"], Splits(shares["validation"], shares["test"], splits.stages, splits.by)


def _sampled(reader: TextReader, choose: Choose, num_samples: int | None) -> list[TextRow]:
    """The rows that are kept, in order; of a sample only as many are read as it takes."""
    order: Sequence[int] = range(len(reader.rows))
    if num_samples is not None:
        order = np.random.default_rng(0).permutation(len(order)).tolist()
    texts: Iterator[Item] = islice(reader.texts(order, choose), num_samples)
    found = [_text_row(item, reader.rows.source_names) for item in texts]
    return sorted(found, key=lambda row: row.row)


def _text_row(item: Item, sources: Sequence[str]) -> TextRow:
    row = item.row
    texts = [_text(response) for response in row.responses]
    return TextRow(
        row=row.row_id,
        source=sources[row.source],
        written=written_prompt(row),
        responses=tuple(text for text in texts if text is not None),
        ranks=row.ranks,
        margin=row.margin,
        weight=row.weight,
        suffix=row.suffix,
    )


def _text(response: Response) -> str | None:
    """What a response says; None where it is more than text, such as calls of tools."""
    if isinstance(response, str):
        return response
    return None if response.keys() - {"role", "content"} else str(response["content"])
