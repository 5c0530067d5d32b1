"""What the data modules share: the prepared tokens, loaders, and the place in the data a checkpoint remembers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.arguments import check_arguments
from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.chat.plain import HUMAN_ASSISTANT, PlainFormat
from rlhf_lightning.data.encode import EncodedRow, Encoder
from rlhf_lightning.data.fitting import check_context, check_ids
from rlhf_lightning.data.limits import RANGES, TokenLimits
from rlhf_lightning.data.packing import PackedTable
from rlhf_lightning.data.preparing.cache import find_or_build
from rlhf_lightning.data.preparing.filters import NO_FILTERS, Filters, Splits
from rlhf_lightning.data.preparing.given import holds_tokens, open_tokens, say_unheeded
from rlhf_lightning.data.preparing.manifest import PARTS, Part
from rlhf_lightning.data.preparing.preparation import Preparation, read_all
from rlhf_lightning.data.preparing.prepared import PreparedFolder, TokenTable
from rlhf_lightning.data.preparing.summary import said_of_rows, say_prepared
from rlhf_lightning.data.rankings import RankingTable
from rlhf_lightning.data.resuming import ResumableDataModule
from rlhf_lightning.data.rows import Need, Row
from rlhf_lightning.data.sampler import LateLoader, ResumableSampler
from rlhf_lightning.data.shares import WithBlanks, evaluation_loader, pins_memory
from rlhf_lightning.data.sources import DataSource, Source, as_source
from rlhf_lightning.data.sources.ratings import RatingMargins
from rlhf_lightning.data.streaming import StreamedExamples, check_streaming, evaluation_tables
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.tokenizer import filler_id, load_tokenizer
from rlhf_lightning.warning_filters import filter_warnings


class TextDataModule(ResumableDataModule, ABC):
    """Tokens prepared once, mapped into memory by every process, and batched.

    A subclass says which kind of example it needs (`need`) and how examples become batches (`_collate`); and the same
    for prediction. What it takes beside the arguments below, or with another default, it names itself.

    Args:
        tokenizer: folder or hub id of the tokenizer, or a loaded one.
        data: a file (.json, .jsonl, .csv, .tsv, .parquet, each plain or .gz), a list, folder or glob of such files, a
            folder written by `save_to_disk`, a hub id `owner/name` or `owner/name:split`, or a source: a class such as
            `rlhf_lightning.HelpfulHarmless`, `TLDR`, `Table` or `Blend`; from Python also a list of dicts, a dict of
            columns, a `datasets.Dataset` or `DatasetDict`, or a pandas DataFrame. Or a folder made by `rlhf prepare`,
            or one of the original system's layout: its own limits, filters and splits then hold.
        validation_data: the same for validation; without it the `validation` split of `data`, or where it has none a
            part of `data`.
        predict_data: the same for prediction; without it what is held out for validation.
        test_data: the same for testing; without it the `test` split of `data`, or a part of it if `test_split` says so.
        columns: our column names (prompt, response, chosen, rejected, messages and so on) to those of the data.
        validation_split: share of the prompts held out for validation. A prompt falls on one side by its own text, so
            it never stands on both, whatever the order and size of the data; see `split_by`.
        test_split: the same for testing.
        stage_split: share of the prompts for each stage, such as `{sft: 0.2, reward: 0.4, ppo: 0.4}`: demonstrations
            take the `sft` prompts, pairs the `reward` prompts or, where that is named instead, the `dpo` prompts, and
            prompts alone the `ppo` prompts. Given alike in all stages, no prompt of `data` serves two of them.
        split_by: what stays on one side of all splits: a `dialogue` at all its depths, by its system turns and its
            first turn of the user, or only one `prompt`, to its end. Prompts that are not dialogues fall alike.
        num_samples: use only the first this many rows of `data`.
        filters: which rows are left out, see `Filters`.
        max_length: most tokens of prompt and response together, special tokens included.
        max_prompt_length: most tokens of the prompt; by default what the response, the longer one of a pair, leaves.
        response_room: room kept for the response whatever the prompt, in tokens; by default a quarter of `max_length`.
        minimum_response_length: rows with a response of fewer tokens, the EOS not counted, are left out.
        long_prompts: cut a prompt that is too long, or drop its row. It is cut from the left, one of a summary at the
            end of a paragraph.
        dialogue_format: `auto` writes dialogues by the tokenizer's chat template if it has one, else as Human and
            Assistant turns, and leaves other text as it is; `plain` never uses the template; `chat_template` always.
        plain_format: how dialogues are written that go through no template, see `PlainFormat`.
        chat_template: file or text of a Jinja chat template for the tokenizer.
        on_bad_row: at a row that cannot be used (broken, or a field null, empty or no text): `skip` and count it, stop
            with an `error`, or `auto`, which skips up to 1% of the rows and stops at more. Only with `skip` a run goes
            on of whose rows fewer than 10% serve what they are for.
        batch_size: examples, or packed rows, in a training batch, on all processes together.
        eval_batch_size: examples in a batch of validation, testing or prediction, on each process; by default its share
            of a training batch.
        num_workers: processes that prepare batches.
        num_proc: processes that may tokenise the data, once, where there is text enough for them to pay; the tokens do
            not depend on it.
        cache_dir: where prepared tokens are kept; by default `$RLHF_LIGHTNING_CACHE` or `~/.cache/rlhf_lightning`.
        seed: of the order of the training examples.
        trust_remote_code: run tokenizer code that comes with the folder or hub model.

    Attributes:
        counts: rows read, kept, dropped and cut by reason, after `setup`; rows = kept + all that is dropped + those of
            other stages. Counts of `validation_data`, `test_data` and `predict_data` carry that word in front.

    Raises:
        UserError: limits or sizes that do not go together.
    """

    need: Need
    row_limit: Literal["max_length", "max_prompt_length"] = "max_length"
    drop_last = False
    find_turns = False
    packing = False
    length_grouped = False
    attributes: tuple[str, ...] = ()
    rating_margins: RatingMargins | None = None

    def __init__(
        self,
        tokenizer: str | PreTrainedTokenizerBase,
        data: DataSource | None = None,
        validation_data: DataSource | None = None,
        predict_data: DataSource | None = None,
        test_data: DataSource | None = None,
        columns: dict[str, str] | None = None,
        validation_split: float = 0.1,
        test_split: float = 0.0,
        stage_split: dict[str, float] | None = None,
        split_by: Literal["dialogue", "prompt"] = "dialogue",
        num_samples: int | None = None,
        filters: Filters = NO_FILTERS,
        *,
        max_length: int = 512,
        max_prompt_length: int | None = None,
        response_room: int | None = None,
        minimum_response_length: int = 0,
        long_prompts: Literal["cut", "drop"] = "cut",
        dialogue_format: Literal["auto", "chat_template", "plain"] = "auto",
        plain_format: PlainFormat = HUMAN_ASSISTANT,
        chat_template: str | None = None,
        on_bad_row: Literal["auto", "skip", "error"] = "auto",
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        num_proc: int = 1,
        cache_dir: str | Path | None = None,
        seed: int = 42,
        trust_remote_code: bool = False,
    ) -> None:
        check_arguments(TextDataModule, locals(), RANGES)
        super().__init__()
        filter_warnings()
        self.data, self.validation_data = data, validation_data
        self.test_data, self.predict_data = test_data, predict_data
        self.columns, self.on_bad_row, self.num_samples = columns, on_bad_row, num_samples
        self.splits = Splits(validation=validation_split, test=test_split, stages=stage_split, by=split_by)
        self.filters = filters
        self.limits = TokenLimits(
            max_length=max_length,
            max_prompt_length=max_prompt_length,
            response_room=response_room,
            long_prompts=long_prompts,
            minimum_response_length=minimum_response_length,
        )
        self.dialogue_format, self.plain_format, self.chat_template = dialogue_format, plain_format, chat_template
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.num_workers, self.num_proc, self.cache_dir, self.seed = num_workers, num_proc, cache_dir, seed
        self.trust_remote_code = trust_remote_code
        self.counts: Counter[str] = Counter()
        self._tokenizer_source = tokenizer
        self._chat: ChatEncoder | None = None
        self._prepared: PreparedFolder | None = None
        self._parts: dict[str, TokenTable | RankingTable] | None = None
        self._weights: list[float] = []
        self.source_names: list[str] = []  # of a blend; there after `setup`, but not of streams
        self._names_by_role: dict[str, list[str]] = {}  # likewise
        self._train: Sequence[Any] = ()
        self._predict: Sequence[Any] | None = None

    # What a subclass says

    @abstractmethod
    def _collate(self) -> Callable[[list[Any]], Any]:
        """From encoded examples to a batch."""

    def _collate_train(self) -> Callable[[list[Any]], Any]:
        """The same for training."""
        return self._collate()

    def _collate_part(self, part: Part) -> Callable[[list[Any]], Any]:
        """The same for what is evaluated on."""
        return self._collate()

    @abstractmethod
    def _collate_predict(self) -> Callable[[list[Any]], Any]:
        """From what prediction runs on to a batch."""

    @abstractmethod
    def _predict_validation(self) -> Sequence[Any]:
        """What prediction runs on where there is no `predict_data`: the validation part."""

    @abstractmethod
    def _predict_need(self) -> Need:
        """What the rows of `predict_data` are read for."""

    @abstractmethod
    def _predict_examples(self, row: Row, encoded: EncodedRow) -> list[Any]:
        """What prediction runs on of one row of `predict_data`."""

    # Lightning's hooks

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The loaded tokenizer."""
        return self.chat.tokenizer

    @property
    def chat(self) -> ChatEncoder:
        """What turns text into ids, after `setup`."""
        assert self._chat is not None, "call setup() first"
        return self._chat

    def prepare_data(self) -> None:
        """Prepare the tokens, or find them in the cache, in one process; the others then find them there too."""
        self._load_chat()
        only_predict = self.trainer is not None and self.trainer.predicting and self.predict_data is not None
        if self.data is not None and not only_predict:
            if self._streamed:
                self._evaluation_tables()
            else:
                self._folder()
        if self.predict_data is not None:
            len(self._source_of(self.predict_data).open())  # fetches what comes from the hub

    def setup(self, stage: str | None = None) -> None:
        """Open the prepared tokens that the stage needs, once; they are prepared first if `prepare_data` has not been.

        Args:
            stage: `fit`, `validate`, `test` or `predict`; None for all but `predict`.

        Raises:
            UserError: data that cannot be used, or limits that do not go together.
        """
        self._load_chat()
        if stage != "predict" or self.predict_data is None:
            self._load_parts()
        if stage == "predict" and self._predict is None:
            self._load_predict()
        if stage == "test":
            self._check_test()  # before a model is loaded for nothing
        if stage in ("fit", None):
            self._load_train()

    def train_dataloader(self) -> DataLoader[Any]:
        """Training batches in a new order each epoch."""
        options: dict[str, Any] = {
            "batch_size": self.share,
            "num_workers": self.num_workers,
            "drop_last": self.drop_last,
            "pin_memory": pins_memory(self.trainer),
        }
        if isinstance(self._sampler, StreamedExamples):
            return LateLoader(self._sampler, self._begin_epoch, collate_fn=self._collate(), **options)
        return LateLoader(WithBlanks(self._train), sampler=self._sampler, collate_fn=self._collate_train(), **options)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Validation batches; an empty list, which Lightning skips, where nothing is held out."""
        validation = self._part("validation")
        return self._eval_loader(validation, self._collate_part("validation")) if validation else []

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the test part.

        Raises:
            UserError: there is none.
        """
        self._check_test()
        return self._eval_loader(self._part("test"), self._collate_part("test"))

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of `predict_data`, or of what is held out for validation."""
        assert self._predict is not None, "call setup('predict') first"
        return self._eval_loader(self._predict, self._collate_predict())

    # Where the data come from

    def lineage(self) -> dict[str, Any]:
        """What the training data are, after `setup`: their key and sources with their hashes, and how they are split.

        Returns:
            Plain values; of streamed data without their hashes, as nobody has seen them whole.
        """
        if self._prepared is None:
            key = self._preparation().key() if self._streamed else None  # without training data there is none
            return {"key": key, "sources": {}, "splits": asdict(self.splits)}
        manifest = self._prepared.manifest
        sources = manifest["sources"].items()
        return {
            "key": manifest["key"],
            "sources": {role: {"name": said["name"], "hash": said.get("fingerprint")} for role, said in sources},
            "splits": manifest["arguments"].get("splits"),
        }

    def prompt_hashes(self, part: Part) -> np.ndarray:
        """Hashes of the prompts of one part, after `setup`, whatever the tokenizer; sorted, each once, uint64.

        Args:
            part: `train`, `validation` or `test`.

        Returns:
            None are known of streamed data and of folders that were made without them.
        """
        return np.zeros(0, np.uint64) if self._prepared is None else self._prepared.prompt_hashes(self.need, part)

    # Finding the tokens

    def _load_chat(self) -> None:
        if self._chat is None:
            tokenizer = load_tokenizer(self._tokenizer_source, self.trust_remote_code)
            self._chat = ChatEncoder(tokenizer, self.dialogue_format, self.chat_template, self.plain_format)
            cure = f"pass --data.{self.row_limit}{'' if self.row_limit == 'max_length' else ' below'}"  # room to answer
            check_context(tokenizer, self.row_limit, getattr(self.limits, self.row_limit), cure)

    def _load_parts(self) -> None:
        """Open the prepared parts, unless that is done."""
        if self._parts is not None:
            return
        if self._streamed:
            self._parts = {part: self._examples(table) for part, table in self._evaluation_tables().items()}
            return
        folder = self._prepared = self._folder()
        self._parts = {part: self._examples(folder.part(self.need, part)) for part in PARTS}
        sources = folder.manifest["sources"]
        self.counts.update(said_of_rows(sources))
        self.counts.update({part: len(table) for part, table in self._parts.items() if part != "test" or len(table)})
        self._weights = sources["data"]["source_weights"]
        self._names_by_role = self._names_by_role or {role: said["source_names"] for role, said in sources.items()}
        self.source_names = self._names_by_role["data"]
        say_prepared(type(self).__name__, folder.manifest, self.counts)

    def _folder(self) -> PreparedFolder:
        """The prepared folder: the user's, or the cache's, where it is made if it is not there."""
        if self.data is None:
            raise UserError("there is no data to train on; pass `data`, a file, a folder or a hub id")
        if not holds_tokens(self.data):
            preparation = self._preparation()
            folder = find_or_build(preparation, self.cache_dir)
            self._names_by_role = preparation.source_names  # tokens in the cache may be those of a source renamed since
            check_ids(self.tokenizer, lambda: folder.largest_id(self.need))
            return folder
        for name in ("validation_data", "test_data"):
            if getattr(self, name) is not None:
                raise UserError(f"{self.data} is a prepared folder with parts of its own; leave out {name}")
        limit = getattr(self.limits, self.row_limit)
        folder = open_tokens(Path(str(self.data)), self.need, self.chat, limit, self.find_turns, self.cache_dir)
        filters = None if self.filters == NO_FILTERS else asdict(self.filters)
        say_unheeded(folder, filters=filters, num_samples=self.num_samples)
        return folder

    def _preparation(self) -> Preparation:
        given = {"data": self.data, "validation_data": self.validation_data, "test_data": self.test_data}
        sources = {role: self._source_of(data) for role, data in given.items() if data is not None}
        return Preparation(
            **sources,
            chat=self.chat,
            limits=self.limits,
            kinds=(self.need,),
            filters=self.filters,
            splits=self.splits,
            num_samples=self.num_samples,
            on_bad_row=self.on_bad_row,
            find_turns=self.find_turns,
            num_proc=self.num_proc,
        )

    def _load_train(self) -> None:
        """The training part, packed if that is asked for, and its sampler."""
        self._keep_place()
        rank, world = self.rank_and_world
        share = self.share
        if world > 1:
            size = f"{self.batch_size_name} {self.batch_size}"
            rank_zero_info(f"{size}: {share} on each of {world} processes (up to version 0.1 it counted per process)")
        shares: dict[str, Any] = {"num_replicas": world, "rank": rank, "seed": self.seed, "drop_last": self.drop_last}
        if self._streamed:
            shares |= {"batch_size": self.batch_size, "whole_rankings": self.whole_rankings}
            self._sampler = StreamedExamples(self._preparation(), self.need, **shares)
            return
        assert self._parts is not None
        table = self._parts["train"]
        if not len(table):
            raise UserError(f"{self.data} holds nothing to train on; see the counts above for where its rows went")
        weights = self._weights if any(weight != 1 for weight in self._weights) else None
        groups: np.ndarray | None = table.sources if weights else None
        self._train = table
        if self.packing:
            assert isinstance(table, TokenTable)
            packed = PackedTable(table, table.total_lengths, self.limits.max_length, groups)
            self._train, groups = packed, packed.groups
            rank_zero_info(f"{type(self).__name__}: {len(packed)} packed rows, {packed.filled:.1%} filled")
        self._sampler = ResumableSampler(
            self._train,
            **shares,
            lengths=table.total_lengths if self.length_grouped else None,
            length_grouped=self.length_grouped,
            batch_size=self.batch_size,
            groups=groups,
            weights=weights,
        )

    def _load_predict(self) -> None:
        if self.predict_data is None:
            examples = self._predict_validation()
        else:
            source = self._source_of(self.predict_data)
            rows, counts = read_all(source, self._predict_need(), Encoder(self.chat, self.limits), self.on_bad_row)
            self.counts.update({f"predict {name}": count for name, count in counts.items()})
            examples = [example for row, encoded in rows for example in self._predict_examples(row, encoded)]
        if not examples:
            raise UserError("there is nothing to predict on; pass `predict_data` or hold some prompts out")
        self._predict = examples

    # Small things

    def _source_of(self, data: DataSource) -> Source:
        return as_source(data, self.columns, self.attributes, self.rating_margins)

    def _examples(self, table: TokenTable) -> TokenTable | RankingTable:
        """What batches are made of, of one part."""
        return RankingTable(table) if self.whole_rankings else table

    def _check_test(self) -> None:
        if not self._part("test"):
            raise UserError(
                "there is nothing to test on; pass `test_data`, or hold a share of `data` out with `test_split` as the "
                "training did; `rlhf validate` measures the validation part"
            )

    def _order(self) -> dict[str, Any]:
        if self._streamed:
            return super()._order()
        assert self._parts is not None
        return {**super()._order(), "rows of hash": self._parts["train"].identity}

    def _part(self, name: str) -> Sequence[Any]:
        assert self._parts is not None, "call setup() first"
        return self._parts.get(name, ())

    @property
    def _streamed(self) -> bool:
        return isinstance(self.data, Source) and self.data.streaming

    def _evaluation_tables(self) -> dict[str, TokenTable]:
        """What is evaluated on beside data that are streamed."""
        others = {"packing": self.packing, "length_grouped": self.length_grouped}
        check_streaming(self._preparation(), others | {"num_workers above 1": self.num_workers > 1})
        return evaluation_tables(self._preparation(), self.need, self.cache_dir)

    def _begin_epoch(self) -> None:
        assert isinstance(self._sampler, StreamedExamples)
        self._sampler.begin(0 if self.trainer is None else self.trainer.current_epoch)

    @property
    def _filler(self) -> int:
        return filler_id(self.tokenizer)

    def _eval_loader(self, examples: Sequence[Any], collate: Callable[[list[Any]], Any]) -> DataLoader[Any]:
        rank, world = self.rank_and_world
        size = self.eval_batch_size or max(1, self.batch_size // world)
        return evaluation_loader(
            examples,
            world,
            rank,
            batch_size=size,
            collate_fn=collate,
            num_workers=self.num_workers,
            pin_memory=pins_memory(self.trainer),
        )
