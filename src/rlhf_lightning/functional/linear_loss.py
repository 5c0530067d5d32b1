"""Cross-entropy and log-probabilities from hidden states and output matrix, the logits a few rows at a time.

The logits of all tokens are the largest tensor of a language model's training by far, and autograd keeps several of
their size. Here a chunk of rows meets the output matrix, is reduced to a number per row, and is gone. The summed
cross-entropy has one gradient, so its forward pass computes that on the way; log-probabilities meet a gradient of their
own for each token, so their backward pass computes the logits again.

`torch.nn.functional.linear_cross_entropy` is not used: it is absent before torch 2.13, knows no soft cap, chunks
neither smoothed losses nor log-probabilities with entropy, and took over twice as long on a CPU.

Notation: N tokens, n of them in a chunk, D hidden size, V vocabulary; `part` is a chunk's slice of N.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CPU_ELEMENTS = 2**24
_MEMORY_PER_ELEMENT = 512
_MIN_ROWS = 256


class LogitScaling(NamedTuple):
    """What a model does to the product of hidden state and output matrix before it calls it logits.

    Attributes:
        scale: a factor (Cohere's `logit_scale`, one over Granite's `logits_scaling`).
        soft_cap: bound that a tanh draws the scaled logits into (Gemma 2); None for none.
    """

    scale: float = 1.0
    soft_cap: float | None = None


_PLAIN = LogitScaling()


def rows_per_chunk(vocab_size: int, gpu_memory: int = 0) -> int:
    """Rows of logits that are computed at once.

    About 64 MiB of float32 on a CPU. On a GPU, in float32 and with copies of half the size, a 64th to a 128th of its
    memory, for few and large products keep it busy, and the gradient of the output matrix is added up once for each.
    Always enough rows for a product to outweigh reading the output matrix.

    Args:
        vocab_size: V.
        gpu_memory: bytes of the GPU, all of them, so that a resumed run rounds as the first one did; 0 for a CPU.

    Example:
        >>> rows_per_chunk(49152), rows_per_chunk(152064, 80 * 10**9)
        (341, 882)
    """
    elements = 1 << int(math.log2(max(gpu_memory // _MEMORY_PER_ELEMENT, _CPU_ELEMENTS)))
    return max(elements // vocab_size, _MIN_ROWS)


def rows_on(device: torch.device, vocab_size: int) -> int:
    """`rows_per_chunk` of a device.

    Args:
        device: of the hidden states.
        vocab_size: V.
    """
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return rows_per_chunk(vocab_size, memory)


def linear_cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scaling: LogitScaling = _PLAIN,
    label_smoothing: float = 0.0,
    chunk_rows: int | None = None,
    cast: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Summed next-token cross-entropy in nats, `cross_entropy_sum` of the logits without the logits.

    Args:
        hidden: hidden states the targets are predicted from, `[N, D]`.
        weight: the output matrix, `[V, D]`.
        bias: `[V]`, or None.
        targets: `[N]`, int64.
        scaling: what becomes of the products.
        label_smoothing: share of the target spread evenly over the vocabulary (Szegedy et al. 2016, section 7).
        chunk_rows: rows of logits computed at once; None for `rows_on`.
        cast: the output matrix in the type of the products, if somebody has cast it already, `[V, D]`, no gradient.

    Returns:
        Two scalars, float32 (float64 for float64 inputs): the loss, and the negative log-likelihood, which is the loss
        without smoothing and has no gradient.

    Example:
        >>> loss, nll = linear_cross_entropy_sum(torch.zeros(3, 2), torch.zeros(4, 2), None, torch.tensor([0, 1, 2]))
        >>> loss, nll
        (tensor(4.1589), tensor(4.1589))
    """
    # Inside `forward` gradients are always off; only out here can be told whether there will be a backward pass.
    with_backward = torch.is_grad_enabled()
    rows = chunk_rows or rows_on(hidden.device, len(weight))
    chunks = _Chunks(rows, _product_dtype(hidden), scaling, cast=cast)
    sums: tuple[Tensor, Tensor] = _CrossEntropySum.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, chunks, label_smoothing, with_backward
    )
    return sums


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    scaling: LogitScaling = _PLAIN,
    temperature: float = 1.0,
    with_entropy: bool = False,
    chunk_rows: int | None = None,
    cast: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each token, `token_logprobs` and `entropy` of the logits without the logits.

    Args:
        hidden: hidden states the tokens are predicted from, `[N, D]`.
        weight: the output matrix, `[V, D]`.
        bias: `[V]`, or None.
        token_ids: `[N]`, int64.
        scaling: what becomes of the products.
        temperature: the sampling temperature, which divides the logits.
        with_entropy: also compute the entropy of each prediction.
        chunk_rows: rows of logits computed at once; None for `rows_on`.
        cast: the output matrix in the type of the products, if somebody has cast it already, `[V, D]`, no gradient.

    Returns:
        Log-probabilities and, when asked for, entropies in nats, each `[N]`, float32 (float64 for float64 inputs).

    Example:
        >>> logprobs, _ = linear_token_logprobs(torch.zeros(1, 3), torch.zeros(2, 3), None, torch.tensor([1]))
        >>> logprobs.exp()
        tensor([0.5000])
    """
    rows = chunk_rows or rows_on(hidden.device, len(weight))
    chunks = _Chunks(rows, _product_dtype(hidden), scaling, temperature, cast)
    of_tokens: tuple[Tensor, Tensor | None] = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, token_ids, chunks, with_entropy
    )
    return of_tokens


class _Chunks(NamedTuple):
    """How logits are computed.

    Attributes:
        rows: of a chunk at most.
        dtype: of the products.
        scaling: what becomes of the products.
        temperature: divides the logits.
        cast: the output matrix in the type of the products, `[V, D]`.
    """

    rows: int
    dtype: torch.dtype
    scaling: LogitScaling
    temperature: float = 1.0
    cast: Tensor | None = None

    def of(self, length: int) -> Iterator[slice]:
        """The chunks of so many rows."""
        return (slice(start, start + self.rows) for start in range(0, length, self.rows))


def _product_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunks: _Chunks,
        label_smoothing: float,
        with_backward: bool,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            output = _Output(hidden, weight, bias, chunks)
            grads = _Gradients(hidden, weight, bias, [with_backward and need for need in ctx.needs_input_grad[:3]])
            loss = torch.zeros((), dtype=_wide(chunks.dtype), device=hidden.device)
            nll = loss.clone()
            for part in chunks.of(len(hidden)):
                chosen = targets[part].unsqueeze(1)  # [n, 1]
                logits, slope = output.logits(part, with_slope=grads.wanted)  # [n, V]
                at_target = share = logits.gather(1, chosen).squeeze(1)  # [n]
                if label_smoothing:
                    share = (1 - label_smoothing) * at_target + label_smoothing * logits.mean(dim=1)  # [n]
                logsumexp = _softmax_(logits)  # [n]; logits are probabilities from here on
                nll += (logsumexp - at_target).sum()
                loss += (logsumexp - share).sum()
                if grads.wanted:
                    grad = logits.sub_(label_smoothing / len(weight)) if label_smoothing else logits  # [n, V]
                    grad.scatter_add_(1, chosen, grad.new_full(chosen.shape, label_smoothing - 1))
                    grads.add(part, output, _times_(grad, slope))
        ctx.save_for_backward(*grads.results())
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if grad is None else grad * grad_loss.to(grad.dtype) for grad in ctx.saved_tensors]
        return *scaled, *[None] * 4


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        chunks: _Chunks,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        logprobs = torch.empty(len(hidden), dtype=_wide(chunks.dtype), device=hidden.device)  # [N]
        entropies = torch.empty_like(logprobs) if with_entropy else None  # [N]
        with torch.autocast(hidden.device.type, enabled=False):
            output = _Output(hidden, weight, bias, chunks)
            for part in chunks.of(len(hidden)):
                log_softmax = output.logits(part)[0]  # [n, V]
                torch.log_softmax(log_softmax, dim=1, out=log_softmax)
                logprobs[part] = log_softmax.gather(1, token_ids[part].unsqueeze(1)).squeeze(1)
                if entropies is not None:
                    entropies[part] = -log_softmax.exp().mul_(log_softmax).sum(dim=1)
        ctx.save_for_backward(hidden, weight, bias, token_ids, entropies)
        ctx.set_materialize_grads(False)  # entropies that are only logged need no pass over the logits
        ctx.chunks = chunks
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, token_ids, entropies = ctx.saved_tensors
        if grad_logprobs is None:
            grad_logprobs = torch.zeros(len(hidden), dtype=_wide(ctx.chunks.dtype), device=hidden.device)  # [N]
        with torch.autocast(hidden.device.type, enabled=False):
            output = _Output(hidden, weight, bias, ctx.chunks)
            grads = _Gradients(hidden, weight, bias, ctx.needs_input_grad[:3])
            for part in ctx.chunks.of(len(hidden)):
                logits, slope = output.logits(part, with_slope=True)  # [n, V]
                factor = -grad_logprobs[part].unsqueeze(1)  # [n, 1]
                if entropies is not None and grad_entropies is not None:
                    # d entropy / d logit = -p (log p + entropy), d logprob / d logit = [chosen] - p
                    surprise = logits.log_softmax(dim=1).add_(entropies[part].unsqueeze(1))  # [n, V]
                    factor = factor - surprise.mul_(grad_entropies[part].unsqueeze(1))  # [n, V]
                _softmax_(logits)
                grad = logits.mul_(factor)  # [n, V]
                grad.scatter_add_(1, token_ids[part].unsqueeze(1), grad_logprobs[part].unsqueeze(1))
                grads.add(part, output, _times_(grad, slope))
        return *grads.results(), *[None] * 3


class _Output:
    """The output layer, a slice of rows at a time."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, chunks: _Chunks) -> None:
        self.hidden = hidden.to(chunks.dtype)  # [N, D]
        self.weight = (weight if chunks.cast is None else chunks.cast).to(chunks.dtype)  # [V, D]
        self.bias = None if bias is None else bias.to(chunks.dtype)  # [V]
        self.scaling = chunks.scaling
        self.temperature = chunks.temperature

    def logits(self, part: slice, with_slope: bool = False) -> tuple[Tensor, Tensor | float]:
        """Logits over the temperature, `[n, V]`, free to be overwritten; their derivative by the plain products."""
        scale, cap = self.scaling
        logits = torch.nn.functional.linear(self.hidden[part], self.weight, self.bias)  # [n, V]
        logits = logits.to(_wide(logits.dtype))
        if scale != 1.0:
            logits.mul_(scale)
        slope: Tensor | float = scale / self.temperature
        if cap is not None:
            logits.div_(cap).tanh_()
            if with_slope:
                slope = (1 - logits**2).mul_(slope)  # [n, V]
            logits.mul_(cap)
        if self.temperature != 1.0:
            logits.div_(self.temperature)
        return logits, slope


class _Gradients:
    """Sums over the chunks, in float32 at least, of those gradients that are asked for."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Any) -> None:
        self.inputs = hidden, weight, bias
        self.hidden, self.weight, self.bias = (
            torch.zeros_like(tensor, dtype=_wide(tensor.dtype)) if need and tensor is not None else None
            for tensor, need in zip(self.inputs, needs, strict=True)
        )

    @property
    def wanted(self) -> bool:
        return any(grad is not None for grad in (self.hidden, self.weight, self.bias))

    def add(self, part: slice, output: _Output, grad_logits: Tensor) -> None:
        """Take in one chunk: `grad_logits` is by the plain products, `[n, V]`."""
        if self.bias is not None:
            self.bias += grad_logits.sum(dim=0)  # [V]
        grad_logits = grad_logits.to(output.weight.dtype)
        if self.hidden is not None:
            self.hidden[part] = grad_logits @ output.weight  # [n, V] x [V, D]
        if self.weight is None:
            return
        if self.weight.dtype == grad_logits.dtype:
            self.weight.addmm_(grad_logits.t(), output.hidden[part])  # [V, n] x [n, D]
        else:
            self.weight += grad_logits.t() @ output.hidden[part]

    def results(self) -> list[Tensor | None]:
        """Gradients by hidden states, weight and bias, each in its tensor's own type."""
        sums = zip((self.hidden, self.weight, self.bias), self.inputs, strict=True)
        return [None if total is None or tensor is None else total.to(tensor.dtype) for total, tensor in sums]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _softmax_(logits: Tensor) -> Tensor:
    """Overwrite logits `[n, V]` with their softmax, one exponential per element; the logsumexp, `[n]`."""
    top = logits.amax(dim=1)  # [n]
    torch.softmax(logits, dim=1, out=logits)  # one kernel, where difference, exponential, sum and quotient are four
    return top - logits.amax(dim=1).log()  # the largest probability is 1 / V at the least


def _times_(tensor: Tensor, factor: Tensor | float) -> Tensor:
    """Multiply in place, but for a factor that changes nothing."""
    return tensor if isinstance(factor, float) and factor == 1.0 else tensor.mul_(factor)
