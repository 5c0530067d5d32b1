"""Pairs of responses of which people preferred one, for reward modelling."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rlhf_lightning.arguments import check_arguments
from rlhf_lightning.batches import PreferenceBatch, RankingBatch, ScoringBatch
from rlhf_lightning.data.base import TextDataModule
from rlhf_lightning.data.collate import (
    EncodedPair,
    EncodedRanking,
    EncodedSequence,
    Ids,
    collate_pairs,
    collate_rankings,
    collate_sequences,
)
from rlhf_lightning.data.encode import EncodedRow, scored_sequence
from rlhf_lightning.data.limits import RANGES
from rlhf_lightning.data.preparing.given import holds_tokens
from rlhf_lightning.data.preparing.prepared import Derived
from rlhf_lightning.data.rows import Need, Row
from rlhf_lightning.data.sources.ratings import RatingMargins, margins_of
from rlhf_lightning.errors import UserError

_SIDES = ("chosen", "rejected")


class PreferenceDataModule(TextDataModule):
    """Preference pairs: `PreferenceBatch` or `RankingBatch` for training, `ScoringBatch` for prediction.

    Rows may be `prompt`, `chosen` and `rejected`, `chosen` and `rejected` as whole dialogues, rankings of several
    responses, or any other form that `docs/data.md` shows. A ranking becomes all its pairs, which together weigh as
    much as one row. For prediction rows of `prompt` and `response` do too; without `predict_data` both sides of the
    validation pairs are scored. Pairs that say the same twice, or answer different prompts, are left out and counted.

    Args:
        args: those of `TextDataModule`, in its order.
        length_grouped: make training batches of pairs, or of rankings, whose longest sides are of similar length.
        whole_rankings: all pairs of a row are one example, which `batch_size` counts, and each of its responses goes
            through the model once (Ouyang et al. 2022, section 3.5); otherwise its pairs are shuffled apart.
        rating_margins: margin of each rating that stands in a column `rating`, `{much_better: 1, better: 0.5}`; `small`
            or `large` for those of Llama 2 (Touvron et al. 2023, table 27). By default ratings are not read.
        kwargs: the other arguments of `TextDataModule`.

    Raises:
        UserError: limits or sizes that do not go together.
    """

    need: Need = "preference"

    def __init__(
        self,
        *args: Any,
        length_grouped: bool = False,
        whole_rankings: bool = False,
        rating_margins: RatingMargins | None = None,
        **kwargs: Any,
    ) -> None:
        check_arguments(PreferenceDataModule, locals(), RANGES)
        super().__init__(*args, **kwargs)
        self.length_grouped = length_grouped
        self.whole_rankings = whole_rankings
        if rating_margins is not None:
            margins_of(rating_margins)
        self.rating_margins = rating_margins

    def _load_parts(self) -> None:
        super()._load_parts()
        if self._prepared is None or self.rating_margins is None or not holds_tokens(self.data):
            return
        prepared = self._prepared.manifest["arguments"].get("rating_margins")
        if prepared != margins_of(self.rating_margins):
            how = "without" if prepared is None else "with other"
            raise UserError(
                f"{self.data} was prepared {how} rating_margins: leave them out here, or prepare it again with these"
            )

    def _collate(self) -> Callable[[list[Any]], PreferenceBatch | RankingBatch]:
        return partial(collate_rankings if self.whole_rankings else collate_pairs, filler=self._filler)

    def _predict_need(self) -> Need:
        assert self.predict_data is not None
        rows = self._source_of(self.predict_data).open()
        return "preference" if rows.has("preference") else "finetune"

    def _predict_examples(self, row: Row, encoded: EncodedRow) -> list[EncodedSequence]:
        return self._scored(encoded.prompt, encoded.responses, row.row_id)

    def _scored(self, prompt: Ids, responses: Sequence[Ids], row_id: int) -> list[EncodedSequence]:
        roles = _SIDES if len(responses) == len(_SIDES) else ("response",) * len(responses)
        return [
            scored_sequence(prompt, response, role, row_id, self.chat)
            for role, response in zip(roles, responses, strict=True)
        ]

    def _predict_validation(self) -> Sequence[EncodedSequence]:
        if self.whole_rankings:
            return [sequence for ranking in self._part("validation") for sequence in self._ranked(ranking)]
        return Derived(self._part("validation"), self._sides, each=len(_SIDES))

    def _ranked(self, ranking: EncodedRanking) -> list[EncodedSequence]:
        sequences, length = ranking.sequences, ranking.prompt_length
        return self._scored(sequences[0][:length], [ids[length:] for ids in sequences], ranking.row_id)

    def _sides(self, pair: EncodedPair) -> list[EncodedSequence]:
        return [
            scored_sequence(ids[: pair.prompt_length], ids[pair.prompt_length :], role, pair.row_id, self.chat)
            for role, ids in zip(_SIDES, (pair.chosen_ids, pair.rejected_ids), strict=True)
        ]

    def _collate_predict(self) -> Callable[[list[EncodedSequence]], ScoringBatch]:
        return partial(collate_sequences, filler=self._filler)
