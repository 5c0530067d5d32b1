"""Pairs of responses of which people preferred one, for reward modelling."""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from rlhf_lightning.batches import PreferenceBatch, ScoringBatch
from rlhf_lightning.data.base import TextDataModule
from rlhf_lightning.data.chat import Rendered
from rlhf_lightning.data.collate import EncodedPair, EncodedSequence, collate_pairs, collate_sequences
from rlhf_lightning.data.encode import encode_pairs, encode_scored, scored_sequence
from rlhf_lightning.data.limits import TokenLimits, check_context
from rlhf_lightning.data.rows import Example, Pair, RowReader


class PreferenceDataModule(TextDataModule[Pair, EncodedPair]):
    """Preference pairs: `PreferenceBatch` for training, `ScoringBatch` for prediction.

    Rows may be `prompt`, `chosen` and `rejected`, or `chosen` and `rejected` as whole dialogues. For prediction rows of
    `prompt` and `response` do too. Pairs that say the same twice, or answer different prompts, are left out
    and counted.

    Args:
        tokenizer: folder or hub id of the tokenizer, or a loaded one.
        data: a file (.json, .jsonl, .csv, .parquet; JSON may be gzipped), a folder or glob of such files, a folder
            written by `save_to_disk`, a hub id `owner/name` or `owner/name:split`, or a list of dicts.
        validation_data: the same for validation; without it a part of `data` is held out.
        predict_data: responses to score; without it both sides of the validation pairs.
        columns: our column names (prompt, response, chosen, rejected, messages) to those of the data.
        validation_split: share of the prompts held out for validation. A prompt falls on one side by its own text, so
            it never stands on both, whatever the order and size of the data.
        num_samples: use only the first this many rows of `data`.
        max_length: most tokens of prompt and response together, special tokens included.
        max_prompt_length: most tokens of the prompt; by default what the longer response leaves.
        min_response_length: room kept for the responses whatever the prompt, in tokens; by default a quarter of
            `max_length`.
        long_prompts: cut a prompt that is too long from the left, or drop the pair.
        dialogue_format: `auto` writes dialogues by the tokenizer's chat template if it has one, else as Human and
            Assistant turns, and leaves other text as it is; `plain` never uses the template; `chat_template` always.
        chat_template: file or text of a Jinja chat template for the tokenizer.
        on_bad_row: stop at a field that is null, empty or no text, or skip and count the row.
        batch_size: pairs in a training batch of one process.
        eval_batch_size: pairs, or sequences to score, in a batch of validation or prediction; by default `batch_size`.
        num_workers: processes that prepare batches.
        seed: of the order of the training pairs.
        trust_remote_code: run tokenizer code that comes with the folder or hub model.

    Raises:
        UserError: limits or sizes that do not go together.
    """

    def __init__(
        self,
        tokenizer: str | PreTrainedTokenizerBase,
        data: str | Path | list[dict[str, Any]] | None = None,
        validation_data: str | Path | list[dict[str, Any]] | None = None,
        predict_data: str | Path | list[dict[str, Any]] | None = None,
        columns: dict[str, str] | None = None,
        validation_split: float = 0.1,
        num_samples: int | None = None,
        max_length: int = 512,
        max_prompt_length: int | None = None,
        min_response_length: int | None = None,
        long_prompts: Literal["cut", "drop"] = "cut",
        dialogue_format: Literal["auto", "chat_template", "plain"] = "auto",
        chat_template: str | None = None,
        on_bad_row: Literal["error", "skip"] = "error",
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 42,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__(
            tokenizer=tokenizer,
            data=data,
            validation_data=validation_data,
            predict_data=predict_data,
            columns=columns,
            validation_split=validation_split,
            num_samples=num_samples,
            dialogue_format=dialogue_format,
            chat_template=chat_template,
            on_bad_row=on_bad_row,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            trust_remote_code=trust_remote_code,
        )
        self.limits = TokenLimits.checked(max_length, max_prompt_length, min_response_length, long_prompts)

    def _check(self) -> None:
        check_context(self.tokenizer, "max_length", self.limits.max_length)

    def _read(self, reader: RowReader) -> list[Pair]:
        return reader.pairs()

    def _encode(self, rows: Iterator[tuple[Pair, Rendered]], counts: Counter[str]) -> Iterator[EncodedPair]:
        return encode_pairs(rows, self.chat, self.limits, counts)

    def _collate(self) -> Callable[[list[EncodedPair]], PreferenceBatch]:
        return partial(collate_pairs, filler=self._filler)

    def _encode_predict(self, counts: Counter[str]) -> list[EncodedSequence]:
        if self.predict_data is None:
            return [sequence for pair in self._part("validation") for sequence in self._sides(pair)]
        loaded = self._load(self.predict_data, counts, _read_scored, self._encode_scored)
        return [sequence for _, sequence in loaded]

    def _encode_scored(
        self, rows: Iterator[tuple[Pair | Example, Rendered]], counts: Counter[str]
    ) -> Iterator[EncodedSequence]:
        first = next(rows, None)
        if first is None:
            return iter(())
        columns = ("chosen", "rejected") if isinstance(first[0], Pair) else ("response",)
        return encode_scored(chain([first], rows), columns, self.chat, self.limits, counts)

    def _sides(self, pair: EncodedPair) -> Iterator[EncodedSequence]:
        for role, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
            prompt, response = list(ids[: pair.prompt_length]), list(ids[pair.prompt_length :])
            yield scored_sequence(prompt, response, role, pair.row_id, self.chat)

    def _collate_predict(self) -> Callable[[list[EncodedSequence]], ScoringBatch]:
        return partial(collate_sequences, filler=self._filler)


def _read_scored(reader: RowReader) -> list[Pair] | list[Example]:
    return reader.pairs() if reader.has_pairs else reader.examples()
