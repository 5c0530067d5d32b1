"""Pairs of responses of which people preferred one, for reward modelling."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from rlhf_lightning.arguments import check_arguments
from rlhf_lightning.batches import PreferenceBatch, ScoringBatch
from rlhf_lightning.chat.plain import HUMAN_ASSISTANT, PlainFormat
from rlhf_lightning.data.base import TextDataModule
from rlhf_lightning.data.collate import EncodedPair, EncodedSequence, collate_pairs, collate_sequences
from rlhf_lightning.data.encode import EncodedRow, scored_sequence
from rlhf_lightning.data.limits import RANGES, TokenLimits
from rlhf_lightning.data.preparing.filters import NO_FILTERS, Filters, Splits
from rlhf_lightning.data.preparing.prepared import Derived
from rlhf_lightning.data.rows import Need, Row
from rlhf_lightning.data.sources import DataSource, as_source

_SIDES = ("chosen", "rejected")


class PreferenceDataModule(TextDataModule):
    """Preference pairs: `PreferenceBatch` for training, `ScoringBatch` for prediction.

    Rows may be `prompt`, `chosen` and `rejected`, `chosen` and `rejected` as whole dialogues, rankings of several
    responses, or any other form that `docs/data.md` shows. A ranking becomes all its pairs, which together weigh as
    much as one row. For prediction rows of `prompt` and `response` do too. Pairs that say the same twice, or answer
    different prompts, are left out and counted.

    Args:
        tokenizer: folder or hub id of the tokenizer, or a loaded one.
        data: a file (.json, .jsonl, .csv, .tsv, .parquet, each plain or .gz), a list, folder or glob of such files, a
            folder written by `save_to_disk`, a hub id `owner/name` or `owner/name:split`, or a source: a class such as
            `rlhf_lightning.HelpfulHarmless`, `TLDR`, `Table` or `Blend`; from Python also a list of dicts, a dict of
            columns, a `datasets.Dataset` or `DatasetDict`, or a pandas DataFrame. Or a folder made by `rlhf prepare`,
            or one of the original system's layout: its own limits, filters and splits then hold.
        validation_data: the same for validation; without it the `validation` split of `data`, or where it has none a
            part of `data`.
        predict_data: responses to score; without it both sides of the validation pairs.
        test_data: the same for testing; without it the `test` split of `data`, or a part of it if `test_split` says so.
        columns: our column names (prompt, response, chosen, rejected, messages and so on) to those of the data.
        validation_split: share of the prompts held out for validation. A prompt falls on one side by its own text, so
            it never stands on both, whatever the order and size of the data; see `split_by`.
        test_split: the same for testing.
        stage_split: share of the prompts for each stage, such as `{sft: 0.2, reward: 0.4, ppo: 0.4}`; this data module
            takes the `reward` prompts, or `dpo` where that is named instead. Given alike in all stages, no prompt of
            `data` serves two of them.
        split_by: what stays on one side of all splits: a `dialogue` at all its depths, by its system turns and its
            first turn of the user, or only one `prompt`, to its end. Prompts that are no dialogues fall alike.
        num_samples: use only the first this many rows of `data`.
        filters: which rows are left out, see `Filters`.
        length_grouped: make training batches of pairs of similar length.
        max_length: most tokens of prompt and response together, special tokens included.
        max_prompt_length: most tokens of the prompt; by default what the longer response leaves.
        response_room: room kept for the response whatever the prompt, in tokens; by default a quarter of `max_length`.
        minimum_response_length: pairs with a response of fewer tokens, the EOS not counted, are left out.
        long_prompts: cut a prompt that is too long, or drop the pair. It is cut from the left, one of a
            summary at the end of a paragraph.
        dialogue_format: `auto` writes dialogues by the tokenizer's chat template if it has one, else as Human and
            Assistant turns, and leaves other text as it is; `plain` never uses the template; `chat_template` always.
        plain_format: how dialogues are written that go through no template, see `PlainFormat`.
        chat_template: file or text of a Jinja chat template for the tokenizer.
        on_bad_row: at a row that cannot be used (broken, or a field null, empty or no text): `skip` and count it, stop
            with an `error`, or `auto`, which skips up to 1% of the rows and stops at more. Only with `skip` a run goes
            on of whose rows fewer than 10% serve what they are for.
        batch_size: pairs in a training batch of one process.
        eval_batch_size: pairs, or sequences to score, in a batch of validation or prediction; by default `batch_size`.
        num_workers: processes that prepare batches.
        num_proc: processes that may tokenise the data, once, where there is text enough for them to pay; the tokens do
            not depend on it.
        cache_dir: where prepared tokens are kept; by default `$RLHF_LIGHTNING_CACHE` or `~/.cache/rlhf_lightning`.
        seed: of the order of the training pairs.
        trust_remote_code: run tokenizer code that comes with the folder or hub model.

    Raises:
        UserError: limits or sizes that do not go together.
    """

    need: Need = "preference"

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
        check_arguments(PreferenceDataModule, locals(), RANGES)
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
        self.length_grouped = length_grouped

    def _collate(self) -> Callable[[list[EncodedPair]], PreferenceBatch]:
        return partial(collate_pairs, filler=self._filler)

    def _predict_need(self) -> Need:
        assert self.predict_data is not None
        rows = as_source(self.predict_data, self.columns).open()
        return "preference" if rows.has("preference") else "finetune"

    def _predict_examples(self, row: Row, encoded: EncodedRow) -> list[EncodedSequence]:
        roles = _SIDES if len(encoded.responses) == len(_SIDES) else ("response",) * len(encoded.responses)
        return [
            scored_sequence(encoded.prompt, response, role, row.row_id, self.chat)
            for role, response in zip(roles, encoded.responses, strict=True)
        ]

    def _predict_validation(self) -> Sequence[EncodedSequence]:
        return Derived(self._part("validation"), self._sides, each=len(_SIDES))

    def _sides(self, pair: EncodedPair) -> list[EncodedSequence]:
        return [
            scored_sequence(ids[: pair.prompt_length], ids[pair.prompt_length :], role, pair.row_id, self.chat)
            for role, ids in zip(_SIDES, (pair.chosen_ids, pair.rejected_ids), strict=True)
        ]

    def _collate_predict(self) -> Callable[[list[EncodedSequence]], ScoringBatch]:
        return partial(collate_sequences, filler=self._filler)
