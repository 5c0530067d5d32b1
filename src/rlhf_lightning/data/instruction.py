"""Prompts with the responses to learn, for supervised fine-tuning."""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from rlhf_lightning.batches import InstructionBatch, PromptBatch
from rlhf_lightning.data.base import TextDataModule
from rlhf_lightning.data.chat import Rendered
from rlhf_lightning.data.collate import EncodedExample, EncodedPrompt, collate_instructions, collate_prompts
from rlhf_lightning.data.encode import encode_instructions, encode_prompts
from rlhf_lightning.data.limits import TokenLimits, check_context
from rlhf_lightning.data.rows import Example, PromptRow, RowReader


class InstructionDataModule(TextDataModule[Example, EncodedExample]):
    """Examples of good responses: `InstructionBatch` for training, `PromptBatch` for prediction.

    Rows may be `prompt` and `response`, `messages` (the last assistant turn is the response), or preference pairs (the
    chosen response). Prompt and response are tokenised apart and joined, and the EOS is taught.

    Args:
        tokenizer: folder or hub id of the tokenizer, or a loaded one.
        data: a file (.json, .jsonl, .csv, .parquet; JSON may be gzipped), a folder or glob of such files, a folder
            written by `save_to_disk`, a hub id `owner/name` or `owner/name:split`, or a list of dicts.
        validation_data: the same for validation; without it a part of `data` is held out.
        predict_data: the same for prediction, where only the prompts count; without it the validation prompts.
        columns: our column names (prompt, response, chosen, rejected, messages) to those of the data.
        validation_split: share of the prompts held out for validation. A prompt falls on one side by its own text, so
            it never stands on both, whatever the order and size of the data.
        num_samples: use only the first this many rows of `data`.
        loss_on: teach the response only, or all tokens but the first.
        max_length: most tokens of prompt and response together, special tokens included.
        max_prompt_length: most tokens of the prompt; by default what the response leaves.
        min_response_length: room kept for the response whatever the prompt, in tokens; by default a quarter of
            `max_length`.
        long_prompts: cut a prompt that is too long from the left, or drop the example.
        dialogue_format: `auto` writes dialogues by the tokenizer's chat template if it has one, else as Human and
            Assistant turns, and leaves other text as it is; `plain` never uses the template; `chat_template` always.
        chat_template: file or text of a Jinja chat template for the tokenizer.
        on_bad_row: stop at a field that is null, empty or no text, or skip and count the row.
        batch_size: examples in a training batch of one process.
        eval_batch_size: examples in a batch of validation or prediction; by default `batch_size`.
        num_workers: processes that prepare batches.
        seed: of the order of the training examples.
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
        loss_on: Literal["response", "all"] = "response",
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
        self.loss_on: Literal["response", "all"] = loss_on
        self.limits = TokenLimits.checked(max_length, max_prompt_length, min_response_length, long_prompts)

    def _check(self) -> None:
        check_context(self.tokenizer, "max_length", self.limits.max_length)

    def _read(self, reader: RowReader) -> list[Example]:
        return reader.examples()

    def _encode(self, rows: Iterator[tuple[Example, Rendered]], counts: Counter[str]) -> Iterator[EncodedExample]:
        return encode_instructions(rows, self.chat, self.limits, counts)

    def _collate(self) -> Callable[[list[EncodedExample]], InstructionBatch]:
        return partial(collate_instructions, filler=self._filler, loss_on=self.loss_on)

    def _encode_predict(self, counts: Counter[str]) -> list[EncodedPrompt]:
        if self.predict_data is None:
            return [self._prompt_of(example) for example in self._part("validation")]
        loaded = self._load(self.predict_data, counts, RowReader.prompts, self._encode_prompts)
        return [prompt for _, prompt in loaded]

    def _encode_prompts(
        self, rows: Iterator[tuple[PromptRow, Rendered]], counts: Counter[str]
    ) -> Iterator[EncodedPrompt]:
        room = self.limits.prompt_room(self.limits.min_response_length)
        return encode_prompts(rows, self.chat, room, self.limits.long_prompts, counts)

    def _prompt_of(self, example: EncodedExample) -> EncodedPrompt:
        ids = example.ids[: example.prompt_length]
        return EncodedPrompt(ids, self.chat.decode([list(ids)])[0], example.row_id)

    def _collate_predict(self) -> Callable[[list[EncodedPrompt]], PromptBatch]:
        return partial(collate_prompts, filler=self._filler)
