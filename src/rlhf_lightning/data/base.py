"""What the three data modules share: reading, splitting, loaders, and the place in the data a checkpoint remembers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import pytorch_lightning as pl
import torch.distributed
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.data.chat import ChatEncoder, DialogueFormat, RefusedTurnsError, Rendered
from rlhf_lightning.data.limits import check_positive
from rlhf_lightning.data.rows import OnBadRow, RowReader, count_drop, prompt_key, split_of
from rlhf_lightning.data.sampler import LateLoader, ResumableSampler
from rlhf_lightning.data.sources import DataSource, is_local, read_rows, source_name
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.tokenizer import filler_id, load_tokenizer

RowT = TypeVar("RowT")
EncodedT = TypeVar("EncodedT")
Read = Callable[[RowReader], list[Any]]
Encode = Callable[[Iterator[tuple[Any, Rendered]], Counter[str]], Iterator[Any]]


class TextDataModule(pl.LightningDataModule, ABC, Generic[RowT, EncodedT]):
    """Rows of text, read, split by prompt, tokenised and batched.

    A subclass says what it reads from a row (`_read`), how that becomes ids (`_encode`), and how ids become batches
    (`_collate`); and the same for prediction. The arguments are those of the subclasses, which document them.

    Attributes:
        tokenizer: the loaded tokenizer, after `setup`.
        counts: rows read, kept, dropped and cut by reason, after `setup`; rows = kept + all that is dropped. Counts of
            `validation_data` and `predict_data` carry that word in front.
    """

    drop_last = False

    def __init__(
        self,
        tokenizer: str | PreTrainedTokenizerBase,
        data: DataSource | None,
        validation_data: DataSource | None,
        predict_data: DataSource | None,
        columns: Mapping[str, str] | None,
        validation_split: float,
        num_samples: int | None,
        dialogue_format: DialogueFormat,
        chat_template: str | None,
        on_bad_row: OnBadRow,
        batch_size: int,
        eval_batch_size: int | None,
        num_workers: int,
        seed: int,
        trust_remote_code: bool,
    ) -> None:
        super().__init__()
        check_positive(batch_size=batch_size, eval_batch_size=eval_batch_size, num_samples=num_samples)
        if not 0 <= validation_split < 1:
            raise UserError(f"validation_split ({validation_split}) must be at least 0 and below 1")
        self.data, self.validation_data, self.predict_data = data, validation_data, predict_data
        self.columns, self.on_bad_row, self.num_samples = columns, on_bad_row, num_samples
        self.validation_split = validation_split
        self.dialogue_format, self.chat_template = dialogue_format, chat_template
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.num_workers, self.seed = num_workers, seed
        self.trust_remote_code = trust_remote_code
        self.counts: Counter[str] = Counter()
        self._tokenizer_source = tokenizer
        self._chat: ChatEncoder | None = None
        self._parts: dict[str, list[EncodedT]] | None = None
        self._predict: list[Any] | None = None
        self._sampler: ResumableSampler | None = None

    # What a subclass says

    @abstractmethod
    def _read(self, reader: RowReader) -> list[RowT]:
        """The rows of a source, parsed."""

    @abstractmethod
    def _encode(self, rows: Iterator[tuple[RowT, Rendered]], counts: Counter[str]) -> Iterator[EncodedT]:
        """Ids of parsed rows, at most one example a row; those left out are counted."""

    @abstractmethod
    def _collate(self) -> Callable[[list[EncodedT]], Any]:
        """From encoded examples to a batch."""

    @abstractmethod
    def _encode_predict(self, counts: Counter[str]) -> list[Any]:
        """What prediction runs on: `predict_data`, or the validation part where there is none."""

    @abstractmethod
    def _collate_predict(self) -> Callable[[list[Any]], Any]:
        """From what `_encode_predict` gives to a batch."""

    def _check(self) -> None:
        """Checks that need the tokenizer, or none."""

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
        """Fetch what comes from the hub once, before every process reads it from its cache."""
        load_tokenizer(self._tokenizer_source, self.trust_remote_code)
        only_predict = self.trainer is not None and self.trainer.predicting and self.predict_data is not None
        for data in (self.predict_data,) if only_predict else (self.data, self.validation_data, self.predict_data):
            if data is not None and not isinstance(data, list) and not is_local(data):
                read_rows(data)

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise what the stage needs, once.

        Args:
            stage: `fit`, `validate`, `test` or `predict`; None for all but `predict`.

        Raises:
            UserError: data that cannot be used, or limits that do not go together.
        """
        if self._chat is None:
            tokenizer = load_tokenizer(self._tokenizer_source, self.trust_remote_code)
            self._chat = ChatEncoder(tokenizer, self.dialogue_format, self.chat_template)
            self._check()
        if stage != "predict" or self.predict_data is None:
            self._load_parts()
        if stage == "predict" and self._predict is None:
            self._load_predict()
        if stage in ("fit", None):
            rank, world = self._rank_and_world()
            self._sampler = ResumableSampler(self._part("train"), world, rank, self.seed, self.drop_last)

    def train_dataloader(self) -> DataLoader[Any]:
        """Training batches in a new order each epoch."""
        return LateLoader(
            self._part("train"),
            batch_size=self.batch_size,
            sampler=self._sampler,
            collate_fn=self._collate(),
            num_workers=self.num_workers,
            drop_last=self.drop_last,
        )

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Validation batches; an empty list, which Lightning skips, where nothing is held out."""
        return self._eval_loader(self._part("validation"), self._collate()) if self._part("validation") else []

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The validation batches."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of `predict_data`, or of what is held out for validation."""
        assert self._predict is not None, "call setup('predict') first"
        return self._eval_loader(self._predict, self._collate_predict())

    def state_dict(self) -> dict[str, Any]:
        """The place in the training data: the epoch, and how many batches of it are used up."""
        if self._sampler is None or self.trainer is None:
            return {}
        # Lightning's own count, so that a resumed run can never disagree with it about the batch to go on with. A batch
        # in whose middle an exception strikes is not processed, and is run again.
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        batches = progress.processed
        epoch = self._sampler.epoch
        if batches >= self.trainer.num_training_batches:
            epoch, batches = epoch + 1, 0
        return {"epoch": epoch, "batches": batches, "order": self._order()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a place that `state_dict` gave.

        Args:
            state_dict: from a checkpoint.

        Raises:
            UserError: the checkpoint stands in the middle of an epoch over other data, or in other batches.
        """
        if self._sampler is None:
            return
        if state_dict["batches"] > 0:
            self._check_order(state_dict["order"])
        self._sampler.resume(state_dict["epoch"], state_dict["batches"] * self.batch_size)

    def _order(self) -> dict[str, int]:
        """Everything that, with the epoch, fixes which example is in which batch."""
        assert self._sampler is not None
        processes = self._sampler.num_replicas
        examples = len(self._part("train"))
        return {"seed": self.seed, "batch_size": self.batch_size, "processes": processes, "training examples": examples}

    def _check_order(self, saved: dict[str, int]) -> None:
        for name, now in self._order().items():
            if saved[name] != now:
                raise UserError(
                    f"the checkpoint was saved in the middle of an epoch with {name} {saved[name]}, now it is {now}; "
                    "resume with the same, or from a checkpoint of an epoch's end"
                )

    # Reading

    def _load_parts(self) -> None:
        """Read, tokenise and split the data, unless that is done."""
        if self._parts is not None:
            return
        if self.data is None:
            raise UserError("there is no data to train on; pass `data`, a file, a folder or a hub id")
        held_out = self.validation_split if self.validation_data is None else 0.0
        counts: Counter[str] = Counter()
        parts: dict[str, list[EncodedT]] = {"train": [], "validation": []}
        for key, example in self._load(self.data, counts, self._read, self._encode, self.num_samples):
            parts[split_of(key, {"train": 1 - held_out, "validation": held_out})].append(example)
        if not parts["train"]:
            raise UserError(f"{source_name(self.data)} leaves nothing to train on ({_report(counts)})")
        if self.validation_data is not None:
            own: Counter[str] = Counter()
            loaded = self._load(self.validation_data, own, self._read, self._encode)
            parts["validation"] = [example for _, example in loaded]
            counts.update({f"validation {name}": count for name, count in own.items()})
        counts.update({name: len(part) for name, part in parts.items()})
        self._parts = parts
        self.counts.update(counts)
        rank_zero_info(f"{type(self).__name__}: {_report(counts)}")

    def _load_predict(self) -> None:
        counts: Counter[str] = Counter()
        examples = self._encode_predict(counts)
        if not examples:
            raise UserError("there is nothing to predict on; pass `predict_data` or hold some prompts out")
        self._predict = examples
        self.counts.update({f"predict {name}": count for name, count in counts.items()})

    def _load(
        self, data: DataSource, counts: Counter[str], read: Read, encode: Encode, limit: int | None = None
    ) -> list[tuple[str, Any]]:
        """Prompt key and encoded example, for all rows of a source that are kept."""
        reader = RowReader(data, self.columns, self.on_bad_row, counts, limit)
        rows = read(reader)
        keys = {row.row_id: prompt_key(row.prompt) for row in rows}
        loaded = [(keys[example.row_id], example) for example in encode(self._render(reader, rows, counts), counts)]
        counts["kept"] += len({example.row_id for _, example in loaded})
        return loaded

    def _render(self, reader: RowReader, rows: Sequence[Any], counts: Counter[str]) -> Iterator[tuple[Any, Rendered]]:
        """Rows with their prompts as text; an error names the row."""
        for row in rows:
            try:
                rendered = self.chat.render(row.prompt)
            except RefusedTurnsError as error:
                if self.on_bad_row == "error":
                    raise UserError(f"{reader.name} row {row.row_id}: {error}; or pass `on_bad_row: skip`") from error
                count_drop(counts, "the dialogue format refuses the turns")
            except UserError as error:
                raise UserError(f"{reader.name} row {row.row_id}: {error}") from error
            else:
                yield row, rendered

    # Small things

    def _part(self, name: str) -> Any:
        assert self._parts is not None, "call setup() first"
        return self._parts[name]

    @property
    def _filler(self) -> int:
        return filler_id(self.tokenizer)

    def _eval_loader(self, examples: Any, collate: Callable[[list[Any]], Any]) -> DataLoader[Any]:
        return DataLoader(
            examples,
            batch_size=self.eval_batch_size,
            collate_fn=collate,
            num_workers=self.num_workers,
        )

    def _rank_and_world(self) -> tuple[int, int]:
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1


def _report(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count)
