"""Prompts for a policy to answer, for PPO and evaluation."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rlhf_lightning.arguments import check_arguments
from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.data.base import TextDataModule
from rlhf_lightning.data.collate import EncodedPrompt, collate_prompts
from rlhf_lightning.data.encode import EncodedRow, written_prompt
from rlhf_lightning.data.limits import RANGES
from rlhf_lightning.data.preparing.manifest import Part
from rlhf_lightning.data.rows import Need, Row
from rlhf_lightning.errors import UserError


class PromptDataModule(TextDataModule):
    """Prompts without responses: `PromptBatch`, padded on the left, for training, validation and prediction.

    Any form of row will do; only its prompt is read. A prompt that comes twice is kept once, except for prediction,
    where every row is answered. Training batches are always full: what is left over at the end of an epoch waits for
    the next, which has another order.

    Args:
        args: those of `TextDataModule`, in its order.
        max_prompt_length: most tokens of a prompt, special tokens included.
        rollout_batch_size: prompts in a training batch, on all processes together: those answered in one iteration.
        kwargs: the other arguments of `TextDataModule`.

    Raises:
        UserError: sizes that do not go together, at once or, against the number of prompts, in `setup`.
    """

    need: Need = "prompts"
    row_limit = "max_prompt_length"
    batch_size_name = "rollout_batch_size"
    drop_last = True

    def __init__(
        self,
        *args: Any,
        max_prompt_length: int = 256,
        rollout_batch_size: int = 16,
        **kwargs: Any,
    ) -> None:
        check_arguments(PromptDataModule, locals(), RANGES)
        super().__init__(
            *args,
            max_length=max_prompt_length + 1,
            max_prompt_length=max_prompt_length,
            response_room=1,
            minimum_response_length=0,
            batch_size=rollout_batch_size,
            **kwargs,
        )
        self.max_prompt_length = max_prompt_length

    def setup(self, stage: str | None = None) -> None:
        """Open the prepared prompts that the stage needs, once; see `TextDataModule.setup`.

        Raises:
            UserError: data that cannot be used, or too few prompts for one training batch.
        """
        super().setup(stage)
        if self._sampler is None or self._streamed:
            return
        prompts = len(self._part("train"))
        if prompts < self.batch_size:
            raise UserError(
                f"there are {prompts} training prompts, fewer than rollout_batch_size ({self.batch_size}); lower it or "
                "give more prompts"
            )

    def _collate(self) -> Callable[[list[EncodedPrompt]], PromptBatch]:
        return partial(collate_decoded, **self._decoding)

    def _collate_part(self, part: Part) -> Callable[[list[EncodedPrompt]], PromptBatch]:
        """Of what is evaluated on beside a blend, which is of the blend or has sources of its own."""
        names = self.source_names
        if len(names) < 2:
            return self._collate()
        others = self._names_by_role.get(f"{part}_data", names)
        is_own_split = others == [f"{name} {part}" for name in names]
        return partial(collate_decoded, **self._decoding, source_names=names if is_own_split else others)

    @property
    def _decoding(self) -> dict[str, Any]:
        return {"chat": self.chat, "filler": self._filler}

    def _collate_train(self) -> Callable[[list[EncodedPrompt]], PromptBatch]:
        several = len(self.source_names) > 1
        return partial(collate_decoded, **self._decoding, source_names=self.source_names if several else None)

    def _predict_need(self) -> Need:
        return "prompts"

    def _predict_examples(self, row: Row, encoded: EncodedRow) -> list[EncodedPrompt]:
        return [EncodedPrompt(encoded.prompt, "", row.row_id, written_prompt(row))]

    def _predict_validation(self) -> Sequence[EncodedPrompt]:
        return self._part("validation")

    def _collate_predict(self) -> Callable[[list[EncodedPrompt]], PromptBatch]:
        return self._collate_part("validation") if self.predict_data is None else self._collate()


def collate_decoded(
    prompts: list[EncodedPrompt], chat: ChatEncoder, filler: int, source_names: Sequence[str] | None = None
) -> PromptBatch:
    """Prompts as they come from a prepared folder, without their text, which is made of their ids."""
    texts = chat.decode([prompt.ids for prompt in prompts])
    named = [prompt._replace(text=text) for prompt, text in zip(prompts, texts, strict=True)]
    return collate_prompts(named, filler, source_names)
