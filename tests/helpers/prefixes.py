"""Sequences that begin alike, run as a stage runs them."""

from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lightning.forward.hidden import hidden_states
from rlhf_lightning.forward.prefix import share_rows, sharing_pays


def shared_hidden_states(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Last hidden states of sequences in groups that begin alike, each token of the beginning computed once.

    Where sharing is impossible or does not pay, the sequences are computed one by one; always in one forward pass.

    Args:
        model: a language model or a scalar model.
        ids: `[B, K, T]`, int64.
        mask: True for real tokens, `[B, K, T]`, bool, padded on the right.

    Returns:
        `[B, K, T, D]`; arbitrary, but finite, on padding.
    """
    if not sharing_pays(model, ids, mask):
        return hidden_states(model, ids.flatten(0, 1), mask.flatten(0, 1)).unflatten(0, ids.shape[:2])
    rows = share_rows(ids, mask)
    return rows.spread(rows.hidden_states(model))
