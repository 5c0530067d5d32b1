"""Prompts with the responses to learn, for supervised fine-tuning."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from rlhf_lightning.arguments import check_arguments
from rlhf_lightning.batches import InstructionBatch, PromptBatch
from rlhf_lightning.data.base import TextDataModule
from rlhf_lightning.data.collate import EncodedExample, EncodedPrompt, collate_instructions, collate_packed
from rlhf_lightning.data.encode import EncodedRow
from rlhf_lightning.data.limits import RANGES
from rlhf_lightning.data.preparing.prepared import Derived
from rlhf_lightning.data.prompt import collate_decoded
from rlhf_lightning.data.rows import Need, Row
from rlhf_lightning.errors import UserError


class InstructionDataModule(TextDataModule):
    """Examples of good responses: `InstructionBatch` for training, `PromptBatch` for prediction.

    Rows may be `prompt` and `response`, `messages` (the last assistant turn is the response), or preference pairs (the
    chosen response), in any of the forms that `docs/data.md` shows. Prompt and response are tokenised apart and joined,
    and the EOS is taught. For prediction only the prompts count.

    Args:
        args: those of `TextDataModule`, in its order.
        loss_on: teach the response only, every turn of the assistant (`turns`), or all tokens but the first.
        packing: put several examples into each training row of `max_length` tokens; they do not see each other.
        length_grouped: make training batches of examples of similar length.
        kwargs: the other arguments of `TextDataModule`.

    Raises:
        UserError: limits or sizes that do not go together.
    """

    need: Need = "finetune"

    def __init__(
        self,
        *args: Any,
        loss_on: Literal["response", "turns", "all"] = "response",
        packing: bool = False,
        length_grouped: bool = False,
        **kwargs: Any,
    ) -> None:
        check_arguments(InstructionDataModule, locals(), RANGES)
        if packing and length_grouped:
            raise UserError("packing fills every row, so there is nothing for length_grouped to do; choose one")
        super().__init__(*args, **kwargs)
        self.loss_on: Literal["response", "turns", "all"] = loss_on
        self.find_turns = loss_on == "turns"
        self.packing, self.length_grouped = packing, length_grouped

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
