"""Self tests: whether a model computes the same when its sequences are laid out another way.

Several sequences in one row (packed, sharing a prefix, without padding) are right for most families and wrong for some.
What can be looked up is looked up; then a few dummy tokens are computed both ways.

Notation: T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lightning.compat import called_plainly
from rlhf_lightning.errors import UserError
from rlhf_lightning.forward.backbone import evaluation_mode
from rlhf_lightning.forward.casts import own_weights
from rlhf_lightning.training.sharded import blocks_compute_in

Found = TypeVar("Found")

_FAILURES = (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError)
"""What a model raises that cannot be run in some way; code of a model folder's own may do anything."""

_said: set[str] = set()
_AMPLIFIED = 256  # by attention and norms, at most; 10 was seen
_LARGEST = 0.1  # a leak is of order 1


def self_test(model: PreTrainedModel, test: Callable[[], Found]) -> Found | Exception:
    """Run a test on a model in evaluation mode, without gradients and in its own precision.

    Args:
        model: every process must test it equally often.
        test: runs the model on dummy tokens, so that every process finds the same.

    Returns:
        What the test returns, or the error that it ended in.

    Raises:
        torch.OutOfMemoryError: there is no room for the test, which says nothing of the model.
        UserError: the test refused the model.
    """
    avoid_plans(model.device)  # here, for whatever runs a model tests it first
    plain = torch.autocast(model.device.type, enabled=False)
    with evaluation_mode(model), own_weights(model), called_plainly(model), torch.no_grad(), plain:
        try:
            return test()
        except (torch.OutOfMemoryError, UserError):
            raise
        except _FAILURES as error:
            return error


def avoid_plans(device: torch.device) -> None:
    """Switch off, for the whole process, the attention that makes a plan for each new shape of a batch, cuDNN's.

    On an H200 a plan took about half a second, and batches of texts have many shapes.

    Args:
        device: of a model that is about to be used.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def say_once(message: str) -> None:
    """Tell one line, on rank 0, the first time that it is to be told in this process.

    Args:
        message: which faster way a class of models does not take, and why.
    """
    if message not in _said:
        _said.add(message)
        rank_zero_info(message)


def tolerance(model: PreTrainedModel) -> float:
    """How far hidden states may be apart, relative to their norm, and still be called the same.

    Args:
        model: the model that computed them, under the same autocast.
    """
    kind = model.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else _coarsest(model)
    if dtype == torch.float64:
        dtype = torch.float32  # transformers computes norms and rotary positions in it whatever the model is held in
    config = model.config.get_text_config()
    return allowed_rounding(dtype, config.hidden_size, 2 * config.num_hidden_layers, kind)


def _coarsest(model: PreTrainedModel) -> torch.dtype:
    """What a model is held in, or, if that is coarser, what its four-bit layers or its sharded blocks compute in."""
    quantization = getattr(model.config, "quantization_config", None)
    computes_in = getattr(quantization, "bnb_4bit_compute_dtype", None), blocks_compute_in(model)
    return max([model.dtype, *filter(None, computes_in)], key=lambda dtype: torch.finfo(dtype).eps)


def typical_tolerance(model: PreTrainedModel) -> float:
    """As `tolerance`, where a mistake would refuse a model: many families normalise in float32 whatever they are in.

    Args:
        model: as for `tolerance`.
    """
    return max(tolerance(model), 1e-5)


def allowed_rounding(dtype: torch.dtype, terms: int, sums: int = 1, device_type: str = "cpu") -> float:
    """The largest relative difference between two orders of the same sums, on any processor.

    Rounding errors of n additions grow like the square root of n, and those of layers that stand in a row likewise
    (Higham, Accuracy and Stability of Numerical Algorithms, section 2.8).

    Args:
        dtype: of the numbers.
        terms: of each sum.
        sums: that stand in a row, two for each layer of a transformer.
        device_type: where they are computed, which may take float32 for less than it is (TF32).

    Example:
        >>> f"{allowed_rounding(torch.float32, terms=576, sums=60):.4f}"
        '0.0057'
    """
    if dtype == torch.float32 and not is_float32_exact(device_type):
        return _LARGEST
    return min(_AMPLIFIED * torch.finfo(dtype).eps * (terms * sums) ** 0.5, _LARGEST)


def is_float32_exact(device_type: str) -> bool:
    """Whether products of float32 are computed in float32, and not in TF32 or bfloat16 for speed.

    Args:
        device_type: `cuda`, or another for the CPU.
    """
    backend = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    return backend.matmul.fp32_precision in ("none", "ieee")


def relative_distance(found: Tensor, expected: Tensor) -> float:
    """The largest distance of any token's hidden states, relative to their norm.

    Args:
        found: `[..., D]`.
        expected: `[..., D]`.

    Example:
        >>> relative_distance(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([[4.0, 0.0], [0.0, 2.0]]))
        0.25
    """
    dtype = torch.promote_types(expected.dtype, torch.float32)
    found, expected = found.to(dtype), expected.to(dtype)
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def typical_distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest, over sequences, of the median distance of their tokens' hidden states, relative to their norm.

    Where the largest of all would be misled: rounding may choose another expert for some token.

    Args:
        found: of each sequence, `[T, D]`.
        expected: as `found`.

    Example:
        >>> typical_distance([torch.tensor([[9.0], [2.0], [3.0]])], [torch.tensor([[1.0], [2.0], [4.0]])])
        0.25
    """
    distances = [
        ((a.float() - b.float()).norm(dim=-1) / b.float().norm(dim=-1)).median()
        for a, b in zip(found, expected, strict=True)
    ]
    return float(torch.stack(distances).max())


def dummy_tokens(model: PreTrainedModel, count: int) -> Tensor:
    """Ids to try a model with, the same on every process, `[count]`, int64.

    Args:
        model: on whose device, and of whose vocabulary.
        count: how many.
    """
    return (torch.arange(count, device=model.device) * 7919 + 11) % model.config.get_text_config().vocab_size
