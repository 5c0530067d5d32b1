"""Prompts for a policy to answer, for PPO and evaluation."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from rlhf_lightning.arguments import check_arguments
from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.chat.plain import HUMAN_ASSISTANT, PlainFormat
from rlhf_lightning.data.base import TextDataModule
from rlhf_lightning.data.collate import EncodedPrompt, collate_prompts
from rlhf_lightning.data.encode import EncodedRow, written_prompt
from rlhf_lightning.data.limits import RANGES, TokenLimits, check_context
from rlhf_lightning.data.preparing.filters import NO_FILTERS, Filters, Splits
from rlhf_lightning.data.rows import Need, Row
from rlhf_lightning.data.sources import DataSource
from rlhf_lightning.errors import UserError


class PromptDataModule(TextDataModule):
    """Prompts without responses: `PromptBatch`, padded on the left, for training, validation and prediction.

    Any form of row will do; only its prompt is read. A prompt that comes twice is kept once, except for prediction,
    where every row is answered. Training batches are always full: what is left over at the end of an epoch waits for
    the next, which has another order.

    Args:
        tokenizer: folder or hub id of the tokenizer, or a loaded one.
        data: a file (.json, .jsonl, .csv, .tsv, .parquet, each plain or .gz), a list, folder or glob of such files, a
            folder written by `save_to_disk`, a hub id `owner/name` or `owner/name:split`, or a source: a class such as
            `rlhf_lightning.HelpfulHarmless`, `TLDR`, `Table` or `Blend`; from Python also a list of dicts, a dict of
            columns, a `datasets.Dataset` or `DatasetDict`, or a pandas DataFrame. Or a folder made by `rlhf prepare`,
            or one of the original system's layout: its own limits, filters and splits then hold.
        validation_data: the same for validation; without it the `validation` split of `data`, or where it has none a
            part of `data`.
        predict_data: the same for prediction; without it the validation prompts.
        test_data: the same for testing; without it the `test` split of `data`, or a part of it if `test_split` says so.
        columns: our column names (prompt, response, chosen, rejected, messages and so on) to those of the data.
        validation_split: share of the prompts held out for validation. A prompt falls on one side by its own text, so
            it never stands on both, whatever the order and size of the data; see `split_by`.
        test_split: the same for testing.
        stage_split: share of the prompts for each stage, such as `{sft: 0.2, reward: 0.4, ppo: 0.4}`; this data module
            takes the `ppo` prompts. Given alike in all stages, no prompt of `data` serves two of them.
        split_by: what stays on one side of all splits: a `dialogue` at all its depths, by its system turns and its
            first turn of the user, or only one `prompt`, to its end. Prompts that are no dialogues fall alike.
        num_samples: use only the first this many rows of `data`.
        filters: which rows are left out, see `Filters`.
        max_prompt_length: most tokens of a prompt, special tokens included.
        long_prompts: cut a prompt that is too long, or drop it. It is cut from the left, one of a summary at the end of
            a paragraph.
        dialogue_format: `auto` writes dialogues by the tokenizer's chat template if it has one, else as Human and
            Assistant turns, and leaves other text as it is; `plain` never uses the template; `chat_template` always.
        plain_format: how dialogues are written that go through no template, see `PlainFormat`.
        chat_template: file or text of a Jinja chat template for the tokenizer.
        on_bad_row: at a row that cannot be used (broken, or a field null, empty or no text): `skip` and count it, stop
            with an `error`, or `auto`, which skips up to 1% of the rows and stops at more. Only with `skip` a run goes
            on of whose rows fewer than 10% serve what they are for.
        rollout_batch_size: prompts in a training batch of one process: those answered in one iteration of PPO.
        eval_batch_size: prompts in a batch of validation or prediction; by default `rollout_batch_size`.
        num_workers: processes that prepare batches.
        num_proc: processes that may tokenise the data, once, where there is text enough for them to pay; the tokens do
            not depend on it.
        cache_dir: where prepared tokens are kept; by default `$RLHF_LIGHTNING_CACHE` or `~/.cache/rlhf_lightning`.
        seed: of the order of the training prompts.
        trust_remote_code: run tokenizer code that comes with the folder or hub model.

    Raises:
        UserError: sizes that do not go together, at once or, against the number of prompts, in `setup`.
    """

    need: Need = "prompts"
    drop_last = True

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
        max_prompt_length: int = 256,
        long_prompts: Literal["cut", "drop"] = "cut",
        dialogue_format: Literal["auto", "chat_template", "plain"] = "auto",
        plain_format: PlainFormat = HUMAN_ASSISTANT,
        chat_template: str | None = None,
        on_bad_row: Literal["auto", "skip", "error"] = "auto",
        rollout_batch_size: int = 16,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        num_proc: int = 1,
        cache_dir: str | Path | None = None,
        seed: int = 42,
        trust_remote_code: bool = False,
    ) -> None:
        check_arguments(PromptDataModule, locals(), RANGES)
        super().__init__(
            tokenizer=tokenizer,
            data=data,
            validation_data=validation_data,
            test_data=test_data,
            predict_data=predict_data,
            columns=columns,
            splits=Splits(validation_split, test_split, stage_split, split_by),
            filters=filters,
            limits=TokenLimits.checked(max_prompt_length + 1, max_prompt_length, 1, long_prompts),
            num_samples=num_samples,
            dialogue_format=dialogue_format,
            plain_format=plain_format,
            chat_template=chat_template,
            on_bad_row=on_bad_row,
            batch_size=rollout_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            num_proc=num_proc,
            cache_dir=cache_dir,
            seed=seed,
            trust_remote_code=trust_remote_code,
        )
        self.max_prompt_length = max_prompt_length

    def setup(self, stage: str | None = None) -> None:
        """Open the prepared prompts that the stage needs, once; see `TextDataModule.setup`.

        Args:
            stage: `fit`, `validate`, `test` or `predict`; None for all but `predict`.

        Raises:
            UserError: data that cannot be used, or too few prompts for one training batch.
        """
        super().setup(stage)
        if self._sampler is None or self._streamed:
            return
        prompts, processes = len(self._part("train")), self._sampler.num_replicas
        if prompts < self.batch_size * processes:
            each = f" on each of {processes} processes" if processes > 1 else ""
            raise UserError(
                f"there are {prompts} training prompts, fewer than rollout_batch_size ({self.batch_size}){each}; "
                "lower it or give more prompts"
            )

    @property
    def _row_limit(self) -> int:
        return self.max_prompt_length

    def _check_limits(self) -> None:
        check_context(self.tokenizer, "max_prompt_length", self.max_prompt_length)

    def _collate(self) -> Callable[[list[EncodedPrompt]], PromptBatch]:
        return partial(collate_decoded, chat=self.chat, filler=self._filler)

    def _predict_need(self) -> Need:
        return "prompts"

    def _predict_examples(self, row: Row, encoded: EncodedRow) -> list[EncodedPrompt]:
        return [EncodedPrompt(encoded.prompt, "", row.row_id, written_prompt(row))]

    def _predict_validation(self) -> Sequence[EncodedPrompt]:
        return self._part("validation")

    def _collate_predict(self) -> Callable[[list[EncodedPrompt]], PromptBatch]:
        return self._collate()


def collate_decoded(prompts: list[EncodedPrompt], chat: ChatEncoder, filler: int) -> PromptBatch:
    """Prompts as they come from a prepared folder, without their text, which is made of their ids.

    Args:
        prompts: B of them.
        chat: turns ids back into text.
        filler: id for the padding.
    """
    texts = chat.decode([prompt.ids for prompt in prompts])
    return collate_prompts([prompt._replace(text=text) for prompt, text in zip(prompts, texts, strict=True)], filler)
