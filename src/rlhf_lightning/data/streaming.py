"""Training on rows as they arrive, for data that do not fit the disk: tokenised on the way, nothing is kept.

Every process reads the whole stream and takes its share of each batch, so all of them see as many, whatever is left out
on the way. The order is that of the stream, shuffled within a window.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset

from rlhf_lightning.data.preparing.cache import find_or_build
from rlhf_lightning.data.preparing.counts import say_counts
from rlhf_lightning.data.preparing.examples import ExampleMaker
from rlhf_lightning.data.preparing.filters import Splits
from rlhf_lightning.data.preparing.preparation import Preparation
from rlhf_lightning.data.preparing.prepared import TokenTable
from rlhf_lightning.data.rankings import ranking_of
from rlhf_lightning.data.rows import Need
from rlhf_lightning.data.shares import blank
from rlhf_lightning.errors import UserError

logger = logging.getLogger(__name__)
WINDOW = 1000
"""Examples that wait to be drawn at random."""


class StreamedExamples(IterableDataset[Any]):
    """Examples of one kind in an order that is fixed by seed and epoch, this process's share of them.

    Args:
        preparation: what to read, and how.
        need: the kind of example.
        batch_size: examples in a batch of all processes together.
        num_replicas: number of processes.
        rank: this process.
        seed: of the shuffle.
        drop_last: leave out what does not fill a batch. Otherwise blanks make up for it where it does not divide.
        whole_rankings: make one example of all pairs of a row.

    Attributes:
        epoch: the one being read.
    """

    def __init__(
        self,
        preparation: Preparation,
        need: Need,
        batch_size: int,
        num_replicas: int,
        rank: int,
        seed: int,
        drop_last: bool,
        whole_rankings: bool = False,
    ) -> None:
        self._whole_rankings = whole_rankings
        self._preparation, self._need, self._batch_size = preparation, need, batch_size
        self.num_replicas, self._rank, self._seed, self._drop_last = num_replicas, rank, seed, drop_last
        self.epoch = 0
        self._resumed_epoch, self._consumed = 0, 0
        self._begun = False

    def resume(self, epoch: int, consumed: int) -> None:
        """Take up an epoch where it was left.

        Args:
            epoch: number of the epoch, from 0.
            consumed: examples of it that this process has seen.

        Raises:
            UserError: the first batch is read already, which some strategies do before they read the checkpoint.
        """
        if self._begun and (epoch, consumed) != (0, 0):
            raise UserError(
                "streamed data cannot be resumed under a strategy that reads its checkpoint late, as DeepSpeed"
            )
        self._resumed_epoch, self._consumed = epoch, consumed

    def begin(self, epoch: int) -> None:
        """Read this epoch from now on, or the one that was resumed if that is later.

        Args:
            epoch: as the trainer says, which does not know of the checkpoint yet when it asks for the first batch.
        """
        self.epoch = max(epoch, self._resumed_epoch)
        self._begun = True

    def order(self) -> dict[str, Any]:
        """Settings that, with the epoch, fix the order; plain values, for a checkpoint."""
        whole = {"whole rankings": True} if self._whole_rankings else {}
        return {"seed": self._seed, "streamed data": self._preparation.key()} | whole

    def __iter__(self) -> Iterator[Any]:
        """The examples left in this epoch, for this process."""
        skip = self._consumed * self.num_replicas if self.epoch == self._resumed_epoch else 0
        drawn = _shuffled(self._examples(), random.Random(f"{self._seed} {self.epoch}"))
        examples = islice(drawn, skip, None)
        while batch := list(islice(examples, self._batch_size)):
            if len(batch) < self._batch_size:
                # All processes must make as many steps, with as many examples.
                missing = -len(batch) % self.num_replicas
                batch = [] if self._drop_last else [*batch, *[blank(batch[0])] * missing]
            yield from batch[self._rank :: self.num_replicas]

    def _examples(self) -> Iterator[Any]:
        self._check_unchanged()
        reader, rows = self._preparation.stream(self.epoch)
        maker = ExampleMaker(reader, self._preparation.filters.remove_same_responses)
        for item, ids in rows:
            made = maker.examples(item, ids).get(self._need, [])
            yield from [ranking_of(made)] if self._whole_rankings and made else made
        reader.check()
        reader.check_enough()
        self._check_unchanged()
        if self._rank == 0:
            logger.info("epoch %d of the stream: %s", self.epoch, say_counts(reader.counts.said()))

    def _check_unchanged(self) -> None:
        """Refuse files that are not what they were when the run began: its epochs would be over other rows."""
        if replace(self._preparation).key() != self._preparation.key():
            raise UserError(
                f"{self._preparation.data.name} has changed since the run began to stream it; put it back and resume, "
                "or resume from a checkpoint of an epoch's end"
            )


def check_streaming(preparation: Preparation, others: Mapping[str, bool]) -> None:
    """Refuse what needs the whole data at hand.

    Args:
        preparation: what to read, and how.
        others: further settings by name; all must be off.

    Raises:
        UserError: the first such setting.
    """
    evaluated = preparation.validation_data is not None
    filters, weights = preparation.filters, preparation.source_weights
    once = filters.duplicates != "keep" or filters.remove_same_inputs or preparation.kinds == ("prompts",)
    asked = {
        "validation_split (give validation_data, or set it to 0)": not evaluated and preparation.splits.validation,
        "test_split (give test_data)": preparation.test_data is None and preparation.splits.test,
        "filters.shuffle": preparation.filters.shuffle,
        "filters.remove_evaluation_prompts": preparation.filters.remove_evaluation_prompts,
        "weights above 1, as what comes again is left out": once and max(weights) > 1,
        **others,
    }
    for name, value in asked.items():
        if value:
            raise UserError(f"{preparation.data.name} is streamed, which does not go with {name}")


def evaluation_tables(preparation: Preparation, need: Need, cache_dir: str | Path | None) -> dict[str, TokenTable]:
    """Tables of `validation_data` and `test_data`, prepared by themselves."""
    tables = {}
    for part, source in (("validation", preparation.validation_data), ("test", preparation.test_data)):
        if source is not None:
            alone = replace(preparation, data=source, validation_data=None, test_data=None, num_samples=None)
            alone.splits = Splits()
            tables[part] = find_or_build(alone, cache_dir).part(need, "train")
    return tables


def _shuffled(examples: Iterable[Any], rng: random.Random) -> Iterator[Any]:
    """Examples in random order, as far as a window allows."""
    window: list[Any] = []
    for example in examples:
        if len(window) < WINDOW:
            window.append(example)
            continue
        place = rng.randrange(WINDOW)
        yield window[place]
        window[place] = example
    rng.shuffle(window)
    yield from window
