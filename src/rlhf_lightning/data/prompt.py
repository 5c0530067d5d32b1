"""Prompts for a policy to answer, for PPO and evaluation."""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.data.base import TextDataModule
from rlhf_lightning.data.chat import Rendered
from rlhf_lightning.data.collate import EncodedPrompt, collate_prompts
from rlhf_lightning.data.encode import drop_duplicates, encode_prompts
from rlhf_lightning.data.limits import check_context, check_positive
from rlhf_lightning.data.rows import PromptRow, RowReader
from rlhf_lightning.errors import UserError


class PromptDataModule(TextDataModule[PromptRow, EncodedPrompt]):
    """Prompts without responses: `PromptBatch`, padded on the left, for training, validation and prediction.

    Any form of row will do; only its prompt is read. A prompt that comes twice is kept once, except for prediction,
    where every row is answered. Training batches are always full: what is left over at the end of an epoch waits for
    the next, which has another order.

    Args:
        tokenizer: folder or hub id of the tokenizer, or a loaded one.
        data: a file (.json, .jsonl, .csv, .parquet; JSON may be gzipped), a folder or glob of such files, a folder
            written by `save_to_disk`, a hub id `owner/name` or `owner/name:split`, or a list of dicts.
        validation_data: the same for validation; without it a part of `data` is held out.
        predict_data: the same for prediction; without it the validation prompts.
        columns: our column names (prompt, response, chosen, rejected, messages) to those of the data.
        validation_split: share of the prompts held out for validation. A prompt falls on one side by its own text, so
            it never stands on both, whatever the order and size of the data.
        num_samples: use only the first this many rows of `data`.
        max_prompt_length: most tokens of a prompt, special tokens included.
        long_prompts: cut a prompt that is too long from the left, or drop it.
        dialogue_format: `auto` writes dialogues by the tokenizer's chat template if it has one, else as Human and
            Assistant turns, and leaves other text as it is; `plain` never uses the template; `chat_template` always.
        chat_template: file or text of a Jinja chat template for the tokenizer.
        on_bad_row: stop at a field that is null, empty or no text, or skip and count the row.
        rollout_batch_size: prompts in a training batch of one process: those answered in one iteration of PPO.
        eval_batch_size: prompts in a batch of validation or prediction; by default `rollout_batch_size`.
        num_workers: processes that prepare batches.
        seed: of the order of the training prompts.
        trust_remote_code: run tokenizer code that comes with the folder or hub model.

    Raises:
        UserError: sizes that do not go together, at once or, against the number of prompts, in `setup`.
    """

    drop_last = True

    def __init__(
        self,
        tokenizer: str | PreTrainedTokenizerBase,
        data: str | Path | list[dict[str, Any]] | None = None,
        validation_data: str | Path | list[dict[str, Any]] | None = None,
        predict_data: str | Path | list[dict[str, Any]] | None = None,
        columns: dict[str, str] | None = None,
        validation_split: float = 0.1,
        num_samples: int | None = None,
        max_prompt_length: int = 256,
        long_prompts: Literal["cut", "drop"] = "cut",
        dialogue_format: Literal["auto", "chat_template", "plain"] = "auto",
        chat_template: str | None = None,
        on_bad_row: Literal["error", "skip"] = "error",
        rollout_batch_size: int = 16,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 42,
        trust_remote_code: bool = False,
    ) -> None:
        check_positive(max_prompt_length=max_prompt_length, rollout_batch_size=rollout_batch_size)
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
            batch_size=rollout_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            trust_remote_code=trust_remote_code,
        )
        self.max_prompt_length = max_prompt_length
        self.long_prompts: Literal["cut", "drop"] = long_prompts

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise what the stage needs, once.

        Args:
            stage: `fit`, `validate`, `test` or `predict`; None for all but `predict`.

        Raises:
            UserError: data that cannot be used, or too few prompts for one training batch.
        """
        super().setup(stage)
        if self._sampler is None:
            return
        prompts, processes = len(self._part("train")), self._sampler.num_replicas
        if prompts < self.batch_size * processes:
            each = f" on each of {processes} processes" if processes > 1 else ""
            raise UserError(
                f"there are {prompts} training prompts, fewer than rollout_batch_size ({self.batch_size}){each}; "
                "lower it or give more prompts"
            )

    def _check(self) -> None:
        check_context(self.tokenizer, "max_prompt_length", self.max_prompt_length)

    def _read(self, reader: RowReader) -> list[PromptRow]:
        return reader.prompts()

    def _encode(self, rows: Iterator[tuple[PromptRow, Rendered]], counts: Counter[str]) -> Iterator[EncodedPrompt]:
        return drop_duplicates(self._encode_each(rows, counts), counts)

    def _encode_each(self, rows: Iterator[tuple[PromptRow, Rendered]], counts: Counter[str]) -> Iterator[EncodedPrompt]:
        return encode_prompts(rows, self.chat, self.max_prompt_length, self.long_prompts, counts)

    def _collate(self) -> Callable[[list[EncodedPrompt]], PromptBatch]:
        return partial(collate_prompts, filler=self._filler)

    def _encode_predict(self, counts: Counter[str]) -> list[EncodedPrompt]:
        if self.predict_data is None:
            return list(self._part("validation"))
        loaded = self._load(self.predict_data, counts, RowReader.prompts, self._encode_each)
        return [prompt for _, prompt in loaded]

    def _collate_predict(self) -> Callable[[list[EncodedPrompt]], PromptBatch]:
        return self._collate()
