"""What a rollout leaves behind, and how it is cut into minibatches.

Notation: B batch, P padded prompt length, R padded response length. Prompts are padded on the left, responses on the
right; response token r sits at position P + r of the joined sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_lightning.algorithms.online.sharing import cut_responses
from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.forward.shared_prompts import SharedPrompts
from rlhf_lightning.functional import kl_estimate
from rlhf_lightning.generation.engine import Generation
from rlhf_lightning.host import alike, on_host, to_device
from rlhf_lightning.training import rows_of_all_ranks


class Measurements(NamedTuple):
    """What the models say of responses.

    Attributes:
        logprobs: under the policy, `[B, R]`, nats.
        ref_logprobs: under the reference, `[B, R]`, nats.
        entropy: of the policy before each token, `[B, R]`, nats.
        values: before each token, `[B, R]`.
        scores: as the reward gives them, a reward model's calibrated, `[B]`; summed where it scores tokens.
        importance: weight of each token in the policy loss, `[B, R]`; 1 where the policy itself has drawn it.
        others: scores by other rewards, by name, each `[B]`.
        dense: the part of the scores that is given along the responses, `[B, R]`, 0 after the last token; None where
            all of it is given at the end.
        dense_others: the same of other rewards, by name, of those that have one.
    """

    logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    values: Tensor
    scores: Tensor
    importance: Tensor
    others: Mapping[str, Tensor] = MappingProxyType({})
    dense: Tensor | None = None
    dense_others: Mapping[str, Tensor] = MappingProxyType({})

    @property
    def kl(self) -> Tensor:
        """KL of each response to the reference, its k1 estimate, `[B]`, nats."""
        return kl_estimate(self.logprobs, self.ref_logprobs).sum(dim=1)


class Experience(NamedTuple):
    """Responses of the old policy and all that the update needs to know of them.

    Attributes:
        prompt_ids: `[B, P]`, int64.
        prompt_mask: True for real tokens, `[B, P]`, bool.
        response_ids: `[B, R]`, int64.
        response_mask: True for the tokens the policy produced, the EOS included, `[B, R]`, bool.
        ended: True where the response ended by itself, `[B]`, bool.
        logprobs: `logprobs[b, r] = log pi_old(x[P+r] | x[<P+r])`, `[B, R]`, nats.
        ref_logprobs: the same under the reference, `[B, R]`, nats.
        entropy: entropy of the old policy before each token, `[B, R]`, nats.
        values: `values[b, r] = V_old(x[<P+r])`, `[B, R]`; 0 without a value model.
        scores: as the reward gives them, a reward model's calibrated, `[B]`.
        importance: weight of each token in the policy loss, `[B, R]`; 1 where the policy itself has drawn it.
        rewards: per token after scaling, clipping and the KL penalty, `[B, R]`.
        advantages: whitened if asked for, `[B, R]`.
        returns: what values are trained on, `[B, R]`: advantages before whitening plus values.
        row_ids: number of each prompt's row in its source, `[B]`, int64.
        shared: how responses that share prompts go through a model; None for each by itself, and before the cutting.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    ended: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    values: Tensor
    scores: Tensor
    importance: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor
    row_ids: Tensor
    shared: SharedPrompts | None = None

    @classmethod
    def of(
        cls,
        prompts: PromptBatch,
        generation: Generation,
        measured: Measurements,
        rewards: Tensor,
        advantages: Tensor,
        returns: Tensor,
    ) -> Experience:
        """Put together what a rollout gave.

        Args:
            prompts: the prompts, B of them.
            generation: their responses.
            measured: what the models say of them.
            rewards: `[B, R]`.
            advantages: `[B, R]`.
            returns: `[B, R]`.
        """
        said = {name: field for name, field in measured._asdict().items() if name in cls._fields}
        return cls(
            prompt_ids=prompts.prompt_ids,
            prompt_mask=prompts.prompt_mask,
            response_ids=generation.response_ids,
            response_mask=generation.response_mask,
            ended=generation.ended,
            rewards=rewards,
            advantages=advantages,
            returns=returns,
            row_ids=prompts.row_ids,
            **said,
        )

    @property
    def sequences(self) -> Tensor:
        """Prompts and responses joined, `[B, P + R]`."""
        return torch.cat([self.prompt_ids, self.response_ids], dim=1)

    @property
    def sequence_mask(self) -> Tensor:
        """True for real tokens of the joined sequences, `[B, P + R]`, bool."""
        return alike(lambda *masks: torch.cat(masks, dim=1), self.prompt_mask, self.response_mask)

    def of_all_ranks(self, module: pl.LightningModule, samples: int = 1) -> Experience:
        """The experience of all processes, in the order that one process would have it; every process must call it.

        So minibatches are the same whatever the number of processes, and each has as many rows of them.

        Args:
            module: attached to a running trainer.
            samples: responses to each prompt, next to one another.
        """
        if module.trainer.world_size == 1:
            return self
        own = torch.tensor([self.prompt_ids.shape[1], self.response_ids.shape[1]], device=self.prompt_ids.device)
        prompt, response = module.all_gather(own).amax(dim=0).tolist()  # type: ignore[union-attr]
        fields = []
        for name, field in self.tensors.items():
            if field.dim() == 2:
                left = name.startswith("prompt_")
                missing = (prompt if left else response) - field.shape[1]
                field = nn.functional.pad(field, (missing, 0) if left else (0, missing))
            fields.append(field.reshape(len(field), -1))
        widths = [field.shape[1] for field in fields]
        # float64 holds ids and float32 numbers as they are, so that all of them travel at once.
        rows = torch.cat([field.double() for field in fields], dim=1)  # [B, F]
        rows = rows_of_all_ranks(module, rows.unflatten(0, (-1, samples))).flatten(0, 1)
        parts = zip(self.tensors.values(), rows.split(widths, dim=1), strict=True)
        whole = (part.view(-1, *part.shape[1 : mine.dim()]).to(mine.dtype) for mine, part in parts)
        return self._replace(**dict(zip(self.tensors, whole, strict=True)))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is known of each example, by name."""
        return {name: field for name, field in self._asdict().items() if name != "shared"}

    def select(self, index: Tensor | slice) -> Experience:
        """The examples at `index`, in that order."""
        if isinstance(index, slice):
            found = {name: alike(lambda field: field[index], field) for name, field in self.tensors.items()}
        else:
            fields = self.tensors.items()
            found = {name: alike(lambda field, index: field[index], field, index) for name, field in fields}
        return self._replace(**found, shared=None)

    def micro_batches(
        self,
        size: int | None = None,
        max_tokens: int | None = None,
        min_pieces: int = 1,
        sharing: Sequence[PreTrainedModel] = (),
    ) -> list[Experience]:
        """Pieces of examples of similar length, longest first, each as narrow as its rows allow.

        Args:
            size: examples per forward and backward pass at most; None for no such limit.
            max_tokens: tokens per forward and backward pass at most, padding included, save that a longer example goes
                alone; None for no such limit.
            min_pieces: pieces at least, at most one for each example.
            sharing: models that run a prompt once for all responses to it in a piece, as in `cut_responses`.
        """
        masks = self.prompt_mask, self.response_mask
        found = cut_responses(self.prompt_ids, *masks, size, max_tokens, min_pieces, sharing)
        pieces = [(piece, self.select(piece.rows)._trimmed()) for piece in found]
        return [
            some._replace(shared=piece.laid_out(some.sequences, some.sequence_mask, some.response_mask))
            for piece, some in pieces
        ]

    def _trimmed(self) -> Experience:
        """Without the columns that are padding in every row: prompts lose them on the left, responses on the right."""
        prompt, response = (int(mask.sum(dim=1).max()) for mask in on_host(self.prompt_mask, self.response_mask))
        fields: dict[str, Any] = {}
        for name, field in self.tensors.items():
            if name.startswith("prompt_"):
                fields[name] = alike(lambda field: field[:, -prompt:], field)
            else:
                fields[name] = alike(lambda field: field[:, :response], field) if field.dim() == 2 else field
        return self._replace(**fields)

    def minibatches(self, epochs: int, size: int, generator: torch.Generator) -> Iterator[Experience]:
        """Every example once per epoch, in a new order each time, `size` examples at once.

        Args:
            epochs: passes over the experience.
            size: examples per minibatch; divides the number of examples.
            generator: a CPU generator that orders them.
        """
        for _ in range(epochs):
            order = torch.randperm(len(self.scores), generator=generator)
            for index in order.split(size):
                yield self.select(to_device(index, self.scores.device))
