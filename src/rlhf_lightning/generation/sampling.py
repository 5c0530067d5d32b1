"""How tokens are drawn, and drawing them from given random numbers.

One uniform number decides one token, by inverting the cumulative distribution. So a row's token depends on nothing but
its logits and its own number: not on the company it is in, on the order of the rows, or on who has left the batch.

Notation: N rows, V vocabulary, `blocks` of BLOCK tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from rlhf_lightning.arguments import AT_LEAST_1, Range, check_arguments
from rlhf_lightning.errors import UserError
from rlhf_lightning.rng import derive_seed

RandomSource = torch.Generator | Sequence[torch.Generator]
"""Where random numbers come from: one generator for all rows, or one for each, so that no row depends on the others."""


def one_seed(random: RandomSource | None) -> int:
    """A seed from given random numbers, for what takes no generator of its own for each row.

    Args:
        random: a generator, which moves on by one draw; or several, which are left as they are; None for torch's.

    Example:
        >>> one_seed([torch.Generator().manual_seed(row) for row in (1, 2)]) == derive_seed(1, 2)
        True
    """
    if isinstance(random, Sequence):
        return derive_seed(*(one.initial_seed() for one in random))
    device = "cpu" if random is None else random.device
    return int(torch.randint(2**62, (), generator=random, device=device))


BLOCK = 256
"""Tokens per block of the search; about the square root of a vocabulary."""


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Args:
        temperature: the logits are divided by it; 0 takes the most likely token.
        top_k: sample among the k most likely tokens only; 0 for all.
        top_p: sample among the most likely tokens that together have this probability; 1 for all.
        max_new_tokens: a response is cut here if it has not ended.
        min_new_tokens: a response may not end before it has this many tokens, the EOS not counted.
        stop_strings: a response ends as soon as its text, from `min_new_tokens` on, contains one of these.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 64
    min_new_tokens: int = 0
    stop_strings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_arguments(Sampling, vars(self), {"top_p": Range(above=0, at_most=1), "max_new_tokens": AT_LEAST_1})
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(
                f"min_new_tokens ({self.min_new_tokens}) must be at most max_new_tokens ({self.max_new_tokens})"
            )


def sample_tokens(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """Draw one token per row.

    Args:
        logits: `[N, V]`, any float type.
        sampling: temperature, top-k and top-p are used.
        generator: source of the random numbers, on the device of the logits.

    Returns:
        `[N]`, int64.

    Example:
        >>> sample_tokens(torch.tensor([[0.0, 9.0, 1.0]]), Sampling(temperature=0.0))
        tensor([1])
    """
    return pick_tokens(logits, sampling, uniforms((len(logits),), generator, logits.device))


def pick_tokens(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """The token of each row, given its random number.

    Args:
        logits: `[N, V]`, any float type.
        sampling: temperature, top-k and top-p are used.
        uniform: of `uniforms`, `[N]`; not looked at where the temperature is 0.

    Returns:
        `[N]`, int64.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    return draw_tokens(logits, uniform, sampling.temperature, sampling.top_k, sampling.top_p)


def uniforms(
    shape: tuple[int, ...], generator: RandomSource | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Random numbers for `draw_tokens`, above 0 and at most 1, in float64.

    Args:
        shape: shape of the result.
        generator: source of the random numbers, on the device; torch's global one if None.
        device: where they are made.
    """
    if isinstance(generator, Sequence):
        return torch.stack([uniforms(shape[1:], one, device) for one in generator])
    return 1 - torch.rand(shape, generator=generator, device=device, dtype=_wide(torch.device(device)))


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # mps has no float64


def draw_tokens(
    logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """The token of each row that its random number points at.

    Args:
        logits: `[N, V]`, any float type.
        uniform: of `uniforms`, `[N]`.
        temperature: the logits are divided by it; above 0.
        top_k: draw among the k most likely tokens only; 0 for all.
        top_p: draw among the most likely tokens that together have this probability; 1 for all.

    Returns:
        `[N]`, int64.

    Example:
        >>> logits = torch.tensor([[0.25, 0.75]]).log().expand(3, 2)
        >>> draw_tokens(logits, torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64))
        tensor([0, 0, 1])
    """
    logits = logits.float() / temperature
    if top_k:
        logits = TopKLogitsWarper(top_k)(None, logits)
    if top_p < 1:
        logits = TopPLogitsWarper(top_p)(None, logits)
    return _invert(logits, uniform)


def _invert(logits: Tensor, uniform: Tensor) -> Tensor:
    """First the block of tokens, then the token in it.

    A running sum over a whole vocabulary in float32 would lose the tail, and one in float64 is slow.
    """
    size = logits.shape[1]
    rounded, logits = -(-size // BLOCK) * BLOCK, logits - logits.amax(dim=1, keepdim=True)
    if torch.compiler.is_compiling():  # into one loop
        weights = torch.nn.functional.pad(logits.exp(), (0, rounded - size))  # [N, V rounded up]
    else:
        weights = logits.new_zeros(len(logits), rounded)  # [N, V rounded up]
        torch.exp(logits, out=weights[:, :size])
    blocks = weights.view(len(logits), -1, BLOCK)  # [N, blocks, BLOCK]
    before = blocks.sum(dim=2, dtype=uniform.dtype).cumsum(dim=1)  # [N, blocks]
    target = uniform.unsqueeze(1) * before[:, -1:]  # [N, 1]
    block = torch.searchsorted(before, target)  # [N, 1]
    # The search finds the first sum that is not below the target, which is positive: never a token without weight.
    target = target - torch.where(block > 0, before.gather(1, (block - 1).clamp(min=0)), 0)
    weights = blocks.gather(1, block.unsqueeze(2).expand(-1, 1, BLOCK)).squeeze(1)  # [N, BLOCK]
    inside = weights.to(uniform.dtype).cumsum(dim=1)  # [N, BLOCK]
    # The two sums round differently, so the target may lie a hair above the last one.
    return (block * BLOCK + torch.searchsorted(inside, target.minimum(inside[:, -1:]))).squeeze(1)
