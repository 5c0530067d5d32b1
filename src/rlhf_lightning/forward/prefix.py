"""Sequences that begin alike run as one row: what they share once, then the rest of each.

A causal model computes the same for the same beginning, so nothing is lost: every rest sees the beginning and itself,
never another rest, and its positions go on from the beginning. What is read off the row afterwards adds up the
gradients of the beginning by itself. Chosen and rejected responses share their prompt and often more; so do several
samples of one prompt.

Not every model can: some take no positions, read the distance of two tokens off their places in the row (ALiBi), or
carry a state from token to token; some attention kernels take no mask. Whether a model can is looked up where it is
known, then tested, once.

Notation: B groups, K sequences in each, T padded length of a sequence, L padded length of a shared row, D hidden size.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lightning.compat import attention_kernel
from rlhf_lightning.forward.backbone import exceeds_sliding_window, takes_positions, unusual_layers
from rlhf_lightning.forward.capacity import LOOKUP_ERRORS, explain_lookup
from rlhf_lightning.forward.hidden import (
    can_unpad,
    padded_hidden_states,
    takes_left_padding,
    unpadded_hidden_states,
)
from rlhf_lightning.forward.numerics import dummy_tokens, relative_distance, say_once, self_test, tolerance
from rlhf_lightning.host import alike, on_host

_KERNELS = {"sdpa", "eager"}
_can_share: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


class SharedRows(NamedTuple):
    """B groups of sequences as B rows.

    Attributes:
        ids: the beginning, then each rest, padded on the right, `[B, L]`, int64.
        positions: place of each token in its own sequence, `[B, L]`, int64, 0 on padding.
        owner: number of the sequence a token belongs to, -1 for the beginning, K for padding, `[B, L]`, int64.
        places: where in its row each token of each sequence stands, `[B, K, T]`, int64, 0 on padding.
    """

    ids: Tensor
    positions: Tensor
    owner: Tensor
    places: Tensor

    @property
    def mask(self) -> Tensor:
        """True for real tokens, `[B, L]`, bool: what the model is really shown."""
        return alike(lambda owner: owner < self.places.shape[1], self.owner)

    def sees(self) -> Tensor:
        """Which tokens each token attends to, `[B, 1, L, L]`, bool; every token, padding too, attends to itself."""
        length = self.owner.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.owner.device).tril()
        related = (self.owner[:, None, :] == -1) | (self.owner[:, None, :] == self.owner[:, :, None])  # [B, L, L]
        return (related & causal).unsqueeze(1)  # [B, 1, L, L]

    def parts(self) -> list[list[int]]:
        """Tokens of each row's beginning, then of each rest, B lists of 1 + K; waits if the host does not know them."""
        (owner,) = on_host(self.owner)
        owners = torch.arange(-1, self.places.shape[1])  # [1 + K]
        counts: list[list[int]] = (owner.unsqueeze(2) == owners).sum(dim=1).tolist()
        return counts

    def hidden_states(self, model: PreTrainedModel) -> Tensor:
        """Last hidden states of the rows, `[B, L, D]`.

        Args:
            model: one that passes `sharing_obstacle`.
        """
        try:
            return self._hidden_states(model)
        except LOOKUP_ERRORS as error:
            explain_lookup(error, model, self.ids, self.mask)
            raise

    def _hidden_states(self, model: PreTrainedModel) -> Tensor:
        hidden = None
        if can_unpad(model, self.ids.device):
            hidden = unpadded_hidden_states(model, self.ids, self.mask, self.positions, self.parts())
        return self.padded_hidden_states(model) if hidden is None else hidden

    def padded_hidden_states(self, model: PreTrainedModel) -> Tensor:
        """As `hidden_states`, the padding computed too."""
        mask = self.sees()
        if attention_kernel(model) == "eager":  # adds the mask to the attention weights
            mask = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(
                ~mask, torch.finfo(model.dtype).min
            )
        backbone = model.base_model
        output = backbone(input_ids=self.ids, attention_mask=mask, position_ids=self.positions, use_cache=False)
        return output.last_hidden_state

    def spread(self, values: Tensor) -> Tensor:
        """Give every sequence its own copy of what was computed for the rows.

        Args:
            values: one for each token of the rows, `[B, L]` or `[B, L, D]`.

        Returns:
            `[B, K, T]` or `[B, K, T, D]`; padding holds the value of some real token.
        """
        rows, length = values.shape[:2]
        first = torch.arange(rows, device=values.device).view(-1, 1, 1) * length  # [B, 1, 1]
        index = first + self.places  # [B, K, T], into the rows one after the other
        return values.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)


def shared_prefix_length(ids: Tensor, mask: Tensor) -> Tensor:
    """How many tokens all sequences of each group begin with, `[B]`, int64.

    Args:
        ids: `[B, K, T]`, int64.
        mask: True for real tokens, `[B, K, T]`, bool, padded on the right. A sequence without any is not one of them:
            so groups of fewer than K stand beside others.

    Example:
        >>> ids = torch.tensor([[[5, 6, 7], [5, 6, 8]]])
        >>> shared_prefix_length(ids, torch.ones_like(ids).bool())
        tensor([2])
    """
    missing = ~mask.any(dim=2, keepdim=True)  # [B, K, 1]
    alike = (missing | mask & (ids == ids[:, :1])).all(dim=1) & mask.any(dim=1)  # [B, T]
    return alike.long().cumprod(dim=1).sum(dim=1)


def shared_lengths(ids: Tensor, mask: Tensor) -> Tensor:
    """Tokens of each group as a shared row, `[B]`, int64; arguments as for `shared_prefix_length`."""
    again = (mask.any(dim=2).sum(dim=1) - 1).clamp(min=0)  # [B], how often the beginning need not be run
    return mask.sum(dim=(1, 2)) - again * shared_prefix_length(ids, mask)


def share_rows(ids: Tensor, mask: Tensor) -> SharedRows:
    """Lay the sequences of each group out as one row.

    Args:
        ids: `[B, K, T]`, int64.
        mask: True for real tokens, `[B, K, T]`, bool, padded on the right; of groups of fewer than K, False for what
            they lack.

    Example:
        >>> ids = torch.tensor([[[5, 6, 7], [5, 8, 0]]])
        >>> rows = share_rows(ids, torch.tensor([[[True, True, True], [True, True, False]]]))
        >>> rows.ids, rows.positions, rows.owner
        (tensor([[5, 6, 7, 8]]), tensor([[0, 1, 2, 1]]), tensor([[-1,  0,  0,  1]]))
    """
    groups, count, width = ids.shape
    prefix = shared_prefix_length(ids, mask).view(-1, 1, 1)  # [B, 1, 1]
    rests = (mask.sum(dim=2) - prefix.squeeze(2)).clamp(min=0)  # [B, K]
    shifts = (rests.cumsum(dim=1) - rests).unsqueeze(2)  # [B, K, 1], tokens of earlier rests
    length = int(shared_lengths(ids, mask).max())

    token = torch.arange(width, device=ids.device).expand_as(ids)  # [B, K, T]
    in_prefix = token < prefix  # [B, K, T]
    places = token + torch.where(in_prefix, 0, shifts)  # [B, K, T]
    owner = torch.where(in_prefix, -1, torch.arange(count, device=ids.device).view(1, -1, 1))  # [B, K, T]
    # Padding goes to a column of its own, which is thrown away.
    targets = torch.where(mask, places, length).flatten(1)  # [B, K * T]

    def laid_out(values: Tensor, padding: int) -> Tensor:
        row = torch.full((groups, length + 1), padding, dtype=torch.int64, device=ids.device)  # [B, L + 1]
        return row.scatter_(1, targets, values.flatten(1))[:, :length]  # [B, L]

    return SharedRows(laid_out(ids, 0), laid_out(token, 0), laid_out(owner, count), torch.where(mask, places, 0))


def sharing_pays(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> bool:
    """Whether the model can run these sequences as shared rows, and does so with less work than apart.

    The first call for a model tests it on dummy tokens, on every process alike; if the model cannot share, it
    says so.

    Args:
        model: a language model or a scalar model.
        ids: `[B, K, T]`, int64.
        mask: True for real tokens, `[B, K, T]`, bool, padded on the right.
    """
    if not can_share(model):
        return False
    shared, longest = shared_lengths(ids, mask), mask.sum(dim=2).amax(dim=1)  # [B], [B]
    if exceeds_sliding_window(model, ids.shape[2], shared.max()):
        return False
    apart = mask.any(dim=2).sum(dim=1) * cost(model, longest, longest**2)  # [B]
    return bool(cost(model, shared, shared**2).sum() < apart.sum())


def cost(model: PreTrainedModel, tokens: Tensor, seen: Tensor) -> Tensor:
    """What rows cost a model, in units of its own, of the shape of `tokens`.

    Args:
        model: a language model or a scalar model.
        tokens: of each row, any shape.
        seen: pairs of tokens that attention compares in it, those among them that a mask then leaves out.
    """
    # Per token and layer, the matrices cost about 24 D^2 operations, and attention 4 D for each token that it sees.
    return tokens * 6 * model.config.get_text_config().hidden_size + seen


def can_share(model: PreTrainedModel) -> bool:
    """Whether a model can run shared rows; it is tested when first asked, and says so once if it cannot.

    Args:
        model: a language model or a scalar model; every process must ask equally often.
    """
    if model not in _can_share:
        takes_left_padding(model)  # refuses what no layout makes right
        obstacle = sharing_obstacle(model)
        if obstacle is not None:
            say_once(f"{type(model).__name__} runs sequences that begin alike one by one: {obstacle}")
        _can_share[model] = obstacle is None
    return _can_share[model]


def sharing_obstacle(model: PreTrainedModel) -> str | None:
    """Why a model cannot run shared rows; None if it can.

    Args:
        model: put in evaluation mode for a moment. Two forward passes are run unless the answer is known without.
    """
    config, kernel = model.config.get_text_config(), attention_kernel(model)
    if not takes_positions(model):
        return "it takes no position_ids"
    if kernel not in _KERNELS:
        return f"attention '{kernel}' takes no mask of one's own"
    if getattr(config, "alibi", False):
        return "it uses ALiBi"
    if other := unusual_layers(model):
        return f"it has layers of type '{other[0]}'"
    same = self_test(model, partial(_shares_rightly, model))
    if isinstance(same, Exception):
        return "it takes no 4-D attention mask"
    return None if same else "its hidden states would not be the same"


def _shares_rightly(model: PreTrainedModel) -> bool:
    """Whether shared and separate hidden states of a few dummy tokens are the same."""
    tokens = dummy_tokens(model, 9)
    ids = torch.stack([tokens[:6], torch.cat([tokens[:3], tokens[6:]])]).unsqueeze(0)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 1, -1] = False
    rows = share_rows(ids, mask)
    shared = rows.spread(rows.padded_hidden_states(model))[mask]
    apart = padded_hidden_states(model, ids[0], mask[0])[mask[0]]
    return relative_distance(shared, apart) <= tolerance(model)
