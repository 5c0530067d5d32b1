"""Prompts with the responses to learn, for supervised fine-tuning."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from rlhf_lightning.arguments import check_arguments
from rlhf_lightning.batches import InstructionBatch, PromptBatch
from rlhf_lightning.chat.plain import HUMAN_ASSISTANT, PlainFormat
from rlhf_lightning.data.base import TextDataModule
from rlhf_lightning.data.collate import EncodedExample, EncodedPrompt, collate_instructions, collate_packed
from rlhf_lightning.data.encode import EncodedRow
from rlhf_lightning.data.limits import RANGES, TokenLimits
from rlhf_lightning.data.preparing.filters import NO_FILTERS, Filters, Splits
from rlhf_lightning.data.preparing.prepared import Derived, PreparedFolder
from rlhf_lightning.data.prompt import collate_decoded
from rlhf_lightning.data.rows import Need, Row
from rlhf_lightning.data.sources import DataSource
from rlhf_lightning.errors import UserError


class InstructionDataModule(TextDataModule):
    """Examples of good responses: `InstructionBatch` for training, `PromptBatch` for prediction.

    Rows may be `prompt` and `response`, `messages` (the last assistant turn is the response), or preference pairs (the
    chosen response), in any of the forms that `docs/data.md` shows. Prompt and response are tokenised apart and joined,
    and the EOS is taught.

    Args:
        tokenizer: folder or hub id of the tokenizer, or a loaded one.
        data: a file (.json, .jsonl, .csv, .tsv, .parquet, each plain or .gz), a list, folder or glob of such files, a
            folder written by `save_to_disk`, a hub id `owner/name` or `owner/name:split`, or a source: a class such as
            `rlhf_lightning.HelpfulHarmless`, `TLDR`, `Table` or `Blend`; from Python also a list of dicts, a dict of
            columns, a `datasets.Dataset` or `DatasetDict`, or a pandas DataFrame. Or a folder made by `rlhf prepare`,
            or one of the original system's layout: its own limits, filters and splits then hold.
        validation_data: the same for validation; without it the `validation` split of `data`, or where it has none a
            part of `data`.
        predict_data: the same for prediction, where only the prompts count; without it the validation prompts.
        test_data: the same for testing; without it the `test` split of `data`, or a part of it if `test_split` says so.
        columns: our column names (prompt, response, chosen, rejected, messages and so on) to those of the data.
        validation_split: share of the prompts held out for validation. A prompt falls on one side by its own text, so
            it never stands on both, whatever the order and size of the data; see `split_by`.
        test_split: the same for testing.
        stage_split: share of the prompts for each stage, such as `{sft: 0.2, reward: 0.4, ppo: 0.4}`; this data module
            takes the `sft` prompts. Given alike in all stages, no prompt of `data` serves two of them.
        split_by: what stays on one side of all splits: a `dialogue` at all its depths, by its system turns and its
            first turn of the user, or only one `prompt`, to its end. Prompts that are no dialogues fall alike.
        num_samples: use only the first this many rows of `data`.
        filters: which rows are left out, see `Filters`.
        loss_on: teach the response only, every turn of the assistant (`turns`), or all tokens but the first.
        packing: put several examples into each training row of `max_length` tokens; they do not see each other.
        length_grouped: make training batches of examples of similar length.
        max_length: most tokens of prompt and response together, special tokens included.
        max_prompt_length: most tokens of the prompt; by default what the response leaves.
        response_room: room kept for the response whatever the prompt, in tokens; by default a quarter of `max_length`.
        minimum_response_length: examples with a response of fewer tokens, the EOS not counted, are left out.
        long_prompts: cut a prompt that is too long, or drop the example. It is cut from the left, one of a
            summary at the end of a paragraph.
        dialogue_format: `auto` writes dialogues by the tokenizer's chat template if it has one, else as Human and
            Assistant turns, and leaves other text as it is; `plain` never uses the template; `chat_template` always.
        plain_format: how dialogues are written that go through no template, see `PlainFormat`.
        chat_template: file or text of a Jinja chat template for the tokenizer.
        on_bad_row: at a row that cannot be used (broken, or a field null, empty or no text): `skip` and count it, stop
            with an `error`, or `auto`, which skips up to 1% of the rows and stops at more. Only with `skip` a run goes
            on of whose rows fewer than 10% serve what they are for.
        batch_size: examples, or packed rows, in a training batch of one process.
        eval_batch_size: examples in a batch of validation or prediction; by default `batch_size`.
        num_workers: processes that prepare batches.
        num_proc: processes that may tokenise the data, once, where there is text enough for them to pay; the tokens do
            not depend on it.
        cache_dir: where prepared tokens are kept; by default `$RLHF_LIGHTNING_CACHE` or `~/.cache/rlhf_lightning`.
        seed: of the order of the training examples.
        trust_remote_code: run tokenizer code that comes with the folder or hub model.

    Raises:
        UserError: limits or sizes that do not go together.
    """

    need: Need = "finetune"

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
        loss_on: Literal["response", "turns", "all"] = "response",
        packing: bool = False,
        length_grouped: bool = False,
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
        check_arguments(InstructionDataModule, locals(), RANGES)
        if packing and length_grouped:
            raise UserError("packing fills every row, so there is nothing for length_grouped to do; choose one")
        super().__init__(
            tokenizer=tokenizer,
            data=data,
            validation_data=validation_data,
            test_data=test_data,
            predict_data=predict_data,
            columns=columns,
            splits=Splits(validation_split, test_split, stage_split, split_by),
            filters=filters,
            limits=TokenLimits.checked(
                max_length, max_prompt_length, response_room, long_prompts, minimum_response_length
            ),
            num_samples=num_samples,
            dialogue_format=dialogue_format,
            plain_format=plain_format,
            chat_template=chat_template,
            on_bad_row=on_bad_row,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            num_proc=num_proc,
            cache_dir=cache_dir,
            seed=seed,
            trust_remote_code=trust_remote_code,
        )
        self.loss_on: Literal["response", "turns", "all"] = loss_on
        self.find_turns = loss_on == "turns"
        self.packing, self.length_grouped = packing, length_grouped

    def _check_folder(self, folder: PreparedFolder) -> None:
        if self.find_turns and not folder.manifest["arguments"]["find_turns"]:
            raise UserError(f"{folder.path} was prepared without the turns that `loss_on: turns` needs")

    def _collate(self) -> Callable[[list[EncodedExample]], InstructionBatch]:
        return partial(collate_instructions, filler=self._filler, loss_on=self.loss_on)

    def _collate_train(self) -> Callable[[list[Any]], InstructionBatch]:
        if self.packing:
            return partial(collate_packed, filler=self._filler, loss_on=self.loss_on)
        return self._collate()

    def _predict_need(self) -> Need:
        return "prompts"

    def _predict_examples(self, row: Row, encoded: EncodedRow) -> list[EncodedPrompt]:
        return [EncodedPrompt(encoded.prompt, "", row.row_id)]

    def _predict_validation(self) -> Sequence[EncodedPrompt]:
        return Derived(self._part("validation"), _prompt_of)

    def _collate_predict(self) -> Callable[[list[EncodedPrompt]], PromptBatch]:
        return partial(collate_decoded, chat=self.chat, filler=self._filler)


def _prompt_of(example: EncodedExample) -> list[EncodedPrompt]:
    return [EncodedPrompt(example.ids[: example.prompt_length], "", example.row_id)]
