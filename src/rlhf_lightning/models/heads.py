"""Heads that give scalars: one in float32, and several around one, which is their mean.

Heads that start apart and learn the same agree where the data have told them what to say; where they differ, none of
them knows. All stand on one backbone, so they cost next to nothing. The classifier's own head stays the mean of them
whatever is trained, so that its folder is what it would be without.

Notation: D hidden size, K heads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.folders import reason_of
from rlhf_lightning.rng import generator
from rlhf_lightning.training.sharded import dtype_ahead, full_shape, gathered

HEADS_FILE = "reward_heads.safetensors"
"""File beside a reward model that holds by how much each of its heads differs from their mean."""
_APART = "apart"


def linear_in_float32(layer: Any, inputs: Tensor) -> Tensor:
    """Call a small linear layer in float32, for outputs that are differences of large numbers.

    A score of 5 in bfloat16 is one of 4.97, 5 and 5.03, so that a pair's two scores often tie.

    Args:
        layer: an `nn.Linear` of any precision.
        inputs: `[..., D]`, of any precision; under autocast too.

    Returns:
        `[..., N]`, float32.
    """

    def forward(rows: Tensor) -> Tensor:
        bias = None if layer.bias is None else layer.bias.float()
        return nn.functional.linear(rows.float(), layer.weight.float(), bias)

    # As the layer's own forward: under ZeRO-3 its weight is there only while it is called.
    layer.forward = forward
    try:
        with torch.autocast(inputs.device.type, enabled=False):
            outputs: Tensor = layer(inputs)
            return outputs
    finally:
        del layer.forward


class HeadEnsemble(nn.Module):
    """K heads around a classifier's own, which is their mean.

    Head k is that one plus row k of this one's weight less the mean of all its rows.

    Args:
        score: the classifier's own head.
        num_heads: K.
    """

    def __init__(self, score: nn.Linear, num_heads: int) -> None:
        super().__init__()
        weight, size = score.weight, full_shape(score.weight)[1]
        self.layer = nn.Linear(size, num_heads, bias=False, device=weight.device, dtype=dtype_ahead(weight))

    @property
    def num_heads(self) -> int:
        """K."""
        return self.layer.out_features

    def forward(self, hidden: Tensor) -> Tensor:
        """How far the score of each head is from their mean, `[..., K]`, float32.

        Args:
            hidden: `[..., D]`.
        """
        apart = linear_in_float32(self.layer, hidden)
        return apart - apart.mean(dim=-1, keepdim=True)

    def set_weight(self, apart: Tensor) -> None:
        """Take other heads; every process must call it.

        Args:
            apart: their weights, or by how much they differ, `[K, D]`.
        """
        with torch.no_grad(), gathered(self.layer.weight) as (weight,):
            weight.copy_(apart)


def new_ensemble(score: nn.Linear, num_heads: int) -> HeadEnsemble:
    """Heads that lie around a classifier's own as fresh ones lie around 0, with standard deviation 1/sqrt(D + 1).

    Args:
        score: the classifier's own head, fresh or trained.
        num_heads: K.
    """
    ensemble = HeadEnsemble(score, num_heads)
    random, size = generator("cpu", torch.initial_seed(), "heads"), (num_heads, score.in_features)
    drawn = torch.randn(size, generator=random, dtype=torch.float32, device="cpu")  # the same in every precision
    ensemble.set_weight(drawn * (score.in_features + 1) ** -0.5)
    return ensemble


def has_heads(name: str) -> bool:
    """Whether several heads lie beside a reward model.

    Args:
        name: its folder; of the hub the file is not fetched.
    """
    return (Path(name).expanduser() / HEADS_FILE).is_file()


def load_ensemble(name: str, score: nn.Linear) -> HeadEnsemble | None:
    """The heads that lie beside a reward model, frozen; None where there are none.

    Args:
        name: as for `has_heads`.
        score: its own head.

    Raises:
        UserError: the file is damaged, or of another model.
    """
    if not has_heads(name):
        return None
    path = Path(name).expanduser() / HEADS_FILE
    try:
        apart = load_file(path)[_APART]
    except Exception as e:  # whatever safetensors raises
        raise UserError(
            f"'{path}' does not hold the heads of a reward model ({reason_of(e)}): export it again, or remove it"
        ) from e
    if apart.dim() != 2 or apart.shape[1] != score.in_features:
        raise UserError(
            f"'{path}' holds heads of the shape {list(apart.shape)} for hidden states of {score.in_features}: it is of "
            "another model; remove it"
        )
    ensemble = HeadEnsemble(score, len(apart))
    ensemble.set_weight(apart)
    ensemble.requires_grad_(False)
    return ensemble


def exported_heads(ensemble: HeadEnsemble | None) -> Tensor | None:
    """What `write_heads` writes, on the CPU; None for no ensemble. Every process must call it.

    Args:
        ensemble: of a scalar model.
    """
    if ensemble is None:
        return None
    with gathered(ensemble.layer.weight, writing=False) as (weight,):
        return weight.detach().to("cpu", copy=True)


def write_heads(folder: Path, apart: Tensor, dtype: torch.dtype | None = None) -> None:
    """Write the heads beside a reward model.

    Args:
        folder: of the model.
        apart: weights of a `HeadEnsemble`, `[K, D]`.
        dtype: type of the saved weights; None for the one they have.
    """
    centred = apart.float() - apart.float().mean(dim=0)
    save_file({_APART: centred.to(dtype or apart.dtype).contiguous()}, folder / HEADS_FILE, metadata={"format": "pt"})
