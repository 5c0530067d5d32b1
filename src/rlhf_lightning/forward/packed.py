"""Whether a model keeps the examples of a packed row apart, tested rather than looked up by name.

transformers takes places that start again as the border between two examples, builds the attention mask from them, and
counts positions by them; but some families ignore them, wholly (Bloom, Mamba) or in part (OPT, Falcon), and so do some
attention kernels.

Notation: N tokens of a packed row, D hidden size.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lightning.compat import attention_kernel
from rlhf_lightning.errors import UserError
from rlhf_lightning.forward.hidden import padded_hidden_states
from rlhf_lightning.forward.numerics import relative_distance, self_test, tolerance


@torch.no_grad()
def packing_error(model: PreTrainedModel, tokens: Tensor) -> float:
    """How far hidden states of two packed examples are from those of each example alone.

    Args:
        model: any Hugging Face model with a backbone; one that takes no positions is infinitely far.
        tokens: ids to try it with, `[N]`, int64, at least 2; both halves serve as examples, in both orders.

    Returns:
        The largest distance of any token, relative to the norm of its hidden state.
    """
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        return float("inf")
    halves = tokens.tensor_split(2)
    alone = [
        padded_hidden_states(model, half[None], torch.ones_like(half[None]).bool())[0] for half in halves
    ]  # [N/2, D]
    places = [torch.arange(len(half), device=tokens.device) for half in halves]
    ids, positions, expected = (
        torch.stack([torch.cat(parts), torch.cat(parts[::-1])]) for parts in (halves, tuple(places), tuple(alone))
    )
    # Both orders are rows of a batch: ids and positions [2, N], expected [2, N, D].
    packed = padded_hidden_states(model, ids, torch.ones_like(ids).bool(), positions)
    return relative_distance(packed, expected)


def check_packing(model: PreTrainedModel, tokens: Tensor) -> None:
    """Refuse to train on packed rows a model that would let their examples see each other.

    Args:
        model: put in evaluation mode for a moment.
        tokens: as for `packing_error`; the same number of forward passes is run on every process.

    Raises:
        UserError: names the model.
    """
    apart = self_test(model, lambda: packing_error(model, tokens) <= tolerance(model))
    if apart is not True:  # an error neither
        name, kernel = type(model).__name__, attention_kernel(model)
        raise UserError(
            f"{name} (attention '{kernel}') does not keep examples in a packed row apart; set packing: false"
        )
