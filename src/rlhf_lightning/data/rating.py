"""Responses that somebody has rated by one attribute or several, for regression on the scores."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rlhf_lightning.arguments import check_arguments
from rlhf_lightning.batches import RatedBatch, ScoringBatch
from rlhf_lightning.data.base import TextDataModule
from rlhf_lightning.data.collate import EncodedRating, EncodedSequence, collate_ratings, collate_sequences
from rlhf_lightning.data.encode import EncodedRow, scored_sequence
from rlhf_lightning.data.limits import RANGES
from rlhf_lightning.data.preparing.prepared import Derived
from rlhf_lightning.data.rows import Need, Row
from rlhf_lightning.errors import UserError


class RatingDataModule(TextDataModule):
    """Rated responses: `RatedBatch` for training, `ScoringBatch` for prediction.

    Rows are `prompt` and `response`, or `messages`, in any form that `docs/data.md` shows, with a column of numbers for
    each attribute, as in HelpSteer2. A score that is null or empty counts for nothing; a row without any is left out.
    For prediction rows of `prompt` and `response` do; without `predict_data` the validation part is scored.

    Args:
        args: those of `TextDataModule`, in its order.
        attributes: names of the scores, each a column; they are the labels of the model, in this order.
        length_grouped: make training batches of responses of similar length.
        kwargs: the other arguments of `TextDataModule`.

    Raises:
        UserError: no attributes, or one twice; limits or sizes that do not go together.
    """

    need: Need = "rated"

    def __init__(
        self, *args: Any, attributes: list[str] | None = None, length_grouped: bool = False, **kwargs: Any
    ) -> None:
        check_arguments(RatingDataModule, locals(), RANGES)
        super().__init__(*args, **kwargs)
        self.attributes = ("score",) if attributes is None else tuple(attributes)
        self.length_grouped = length_grouped
        if not self.attributes or len({*self.attributes}) < len(self.attributes):
            raise UserError(f"attributes {list(self.attributes)} must name one column at least, and each once")

    def _load_parts(self) -> None:
        super()._load_parts()
        if self._prepared is None:
            return
        prepared = tuple(self._prepared.manifest["arguments"].get("attributes") or ())
        if prepared != self.attributes:
            raise UserError(
                f"{self.data} was prepared with the attributes {', '.join(prepared)}, not "
                f"{', '.join(self.attributes)}: set `attributes` to those, or prepare it again"
            )

    def _collate(self) -> Callable[[list[EncodedRating]], RatedBatch]:
        return partial(collate_ratings, filler=self._filler)

    def _predict_need(self) -> Need:
        return "finetune"

    def _predict_examples(self, row: Row, encoded: EncodedRow) -> list[EncodedSequence]:
        return [scored_sequence(encoded.prompt, encoded.responses[0], "response", row.row_id, self.chat)]

    def _predict_validation(self) -> Sequence[EncodedSequence]:
        return Derived(self._part("validation"), self._sequence)

    def _sequence(self, example: EncodedRating) -> list[EncodedSequence]:
        prompt, response = example.ids[: example.prompt_length], example.ids[example.prompt_length :]
        return [scored_sequence(prompt, response, "response", example.row_id, self.chat)]

    def _collate_predict(self) -> Callable[[list[EncodedSequence]], ScoringBatch]:
        return partial(collate_sequences, filler=self._filler)
