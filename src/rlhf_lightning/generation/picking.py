"""The next token of each row: drawn from logits, with what is to be written down of it; compiled where decoding is.

Between two steps of the model lie dozens of small kernels, from the output layer to what says that a response has
ended. Compiled by themselves they are few, and on CUDA a graph; and where one engine is asked for tokens in several
ways, each is compiled in seconds, without the model.

Notation: N rows of the step, n of them in use, D hidden size, V vocabulary, E ids that end a response.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lightning.compat import compiler_settings
from rlhf_lightning.forward.output_layer import output_logits
from rlhf_lightning.functional import token_logprobs
from rlhf_lightning.generation.sampling import Sampling, pick_tokens

MOST_WAYS = 64
"""Sizes, and ways to draw, that are compiled for in a process."""


class Rules(NamedTuple):
    """What holds for all tokens of a batch.

    Attributes:
        sampling: how they are drawn.
        filler: stands where a response has ended.
        with_logprobs: log-probabilities are asked for.
    """

    sampling: Sampling
    filler: int
    with_logprobs: bool


class Picked(NamedTuple):
    """The tokens of a step.

    Attributes:
        ids: filler where the response had ended before, `[N]`, int64.
        finished: rows whose response has ended by now, `[N]`, bool.
        logprobs: 0 where the response had ended before, `[N]`, float32; None if not asked for.
    """

    ids: Tensor
    finished: Tensor
    logprobs: Tensor | None


def pick(
    logits: Tensor, uniform: Tensor, finished: Tensor, ends: Tensor, may_end: bool | Tensor, rules: Rules
) -> Picked:
    """Draw the tokens of a step, and see which responses end with them.

    Args:
        logits: `[N, V]`, any float type.
        uniform: the random number of each row, `[N]`.
        finished: rows whose response has ended before, `[N]`, bool.
        ends: ids that end a response, `[E]`, int64.
        may_end: a response may end with this token; a tensor, `[1]`, bool, where it is no constant of a graph.
        rules: what holds for all tokens.
    """
    allowed = logits
    if may_end is not True:
        without = logits.index_fill(-1, ends, float("-inf"))  # [N, V]
        allowed = without if may_end is False else torch.where(may_end, logits, without)
    tokens = pick_tokens(allowed, rules.sampling, uniform)  # [N]
    logprobs = None
    if rules.with_logprobs:
        logprobs = token_logprobs(logits, tokens, rules.sampling.temperature or 1.0)  # [N]
        logprobs = logprobs.masked_fill(finished, 0.0)
    return Picked(torch.where(finished, rules.filler, tokens), finished | torch.isin(tokens, ends), logprobs)


class CompiledPick:
    """`pick`, the output layer before it included, compiled for a number of rows.

    Args:
        model: a language model.
        rows: N.
        replayed: as a CUDA graph.
    """

    def __init__(self, model: PreTrainedModel, rows: int, replayed: bool) -> None:
        self.model, self.rows = model, rows
        self._buffers: dict[tuple[Any, ...], tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self._compiled: Callable[..., Picked] = torch.compile(
            self._run, fullgraph=True, dynamic=False, mode="reduce-overhead" if replayed else "default"
        )

    def __call__(
        self, hidden: Tensor, uniform: Tensor, finished: Tensor, ends: Tensor, may_end: bool, rules: Rules
    ) -> Picked:
        """As `pick`, from hidden states, `[n, D]`; rows are n of the N.

        Args:
            hidden: what the tokens are predicted from, `[n, D]`.
            uniform: `[n]`.
            finished: `[n]`, bool.
            ends: `[E]`, int64.
            may_end: a response may end with this token.
            rules: what holds for all tokens.
        """
        states, numbers, over, ending = self._buffers_for(hidden, uniform)
        count = len(hidden)
        states[:count], numbers[:count], over[:count] = hidden, uniform, finished
        ending.fill_(may_end)
        always = rules.sampling.min_new_tokens == 0
        with compiler_settings(MOST_WAYS):
            ids, over, logprobs = self._compiled(states, numbers, over, ends, True if always else ending, rules)
        # Copies, for a graph that is replayed writes the same memory again.
        mine = None if logprobs is None else logprobs[:count].clone()
        return Picked(ids[:count].clone(), over[:count].clone(), mine)

    def _buffers_for(self, hidden: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a graph reads: `[N, D]`, `[N]`, `[N]` and `[1]`; rows that are not in use hold what was there."""
        kinds = hidden.dtype, uniform.dtype, hidden.device
        if kinds not in self._buffers:
            states = hidden.new_zeros(self.rows, hidden.shape[1])
            over, ending = (states.new_zeros(size, dtype=torch.bool) for size in (self.rows, 1))
            self._buffers[kinds] = states, uniform.new_ones(self.rows), over, ending
        return self._buffers[kinds]

    def _run(
        self, hidden: Tensor, uniform: Tensor, finished: Tensor, ends: Tensor, may_end: bool | Tensor, rules: Rules
    ) -> Picked:
        return pick(output_logits(self.model, hidden), uniform, finished, ends, may_end, rules)
