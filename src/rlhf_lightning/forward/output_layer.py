"""The output layer of a language model, applied where its logits are needed and without holding them all.

Notation: B batch, T padded length, P padded prompt length, R padded response length, N tokens, D hidden size, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rlhf_lightning.forward.casts import PRODUCT_WEIGHT
from rlhf_lightning.functional import (
    LogitScaling,
    cross_entropy_sum,
    entropy,
    linear_cross_entropy_sum,
    linear_token_logprobs,
    rows_on,
    token_logprobs,
)
from rlhf_lightning.host import places_of
from rlhf_lightning.training.sharded import is_sharded, kind_of

_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma 2, RecurrentGemma, xLSTM


def logit_scaling(model: PreTrainedModel) -> LogitScaling:
    """What a model's own forward does to the products of its output layer.

    Args:
        model: a language model.
    """
    config = model.config
    scale = getattr(config, "logit_scale", None)  # Cohere
    divisor = getattr(config, "logits_scaling", None)  # Granite
    cap = next((value for name in _CAPS if (value := getattr(config, name, None)) is not None), None)
    return LogitScaling((1.0 if scale is None else scale) / (divisor or 1.0), cap)


def is_tied(model: PreTrainedModel, output: nn.Module) -> bool:
    """Whether a layer's weights are those of the input embeddings.

    Args:
        model: a language model or a classifier.
        output: its output layer.
    """
    embeddings = {id(p) for p in model.get_input_embeddings().parameters()}
    return any(id(p) in embeddings for p in output.parameters())


def output_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits from hidden states, as the model's own forward computes them.

    For a few positions: training and scoring use `cross_entropy_at` and `response_logprobs`, which never hold the
    logits of all tokens.

    Args:
        model: a language model.
        hidden: `[..., D]`.

    Returns:
        `[..., V]`.
    """
    scale, cap = logit_scaling(model)
    logits = model.get_output_embeddings()(hidden)  # [..., V]
    if scale != 1.0:
        logits = logits * scale
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


def cross_entropy_at(
    model: PreTrainedModel, hidden: Tensor, targets: Tensor, mask: Tensor, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the targets that count, summed, without the logits.

    Args:
        model: a language model.
        hidden: the hidden states from which the targets are predicted, `[B, T, D]`.
        targets: `[B, T]`, int64.
        mask: True for the targets that count, `[B, T]`, bool.
        label_smoothing: share of each target spread evenly over the vocabulary.

    Returns:
        Two scalars in nats, float32: the loss, and the negative log-likelihood, which has no gradient.
    """
    where = places_of(mask).rows, places_of(mask).columns
    hidden, targets = hidden[where], targets[where]  # [N, D], [N]

    def fused(head: nn.Linear, rows: Tensor) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy_sum(
            rows,
            head.weight,
            head.bias,
            targets,
            scaling=logit_scaling(model),
            label_smoothing=label_smoothing,
            cast=getattr(head, PRODUCT_WEIGHT, None),
        )

    def plain(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return cross_entropy_sum(logits, ids, label_smoothing), cross_entropy_sum(logits.detach(), ids)

    if _has_plain_head(model):
        return _inside_head(model, fused, hidden)
    losses, nlls = zip(*_by_chunks(model, plain, hidden, targets), strict=True)
    return torch.stack(losses).sum(), torch.stack(nlls).sum()


def logprobs_from_hidden(
    model: PreTrainedModel,
    hidden: Tensor,
    sequences: Tensor,
    response_mask: Tensor,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `hidden.response_logprobs`, where the hidden states are there already.

    Args:
        model: a language model; its output layer is used.
        hidden: from `hidden.response_hidden`, `[B, R, D]`.
        sequences: prompts and responses, `[B, P + R]`, int64.
        response_mask: True for response tokens, `[B, R]`, bool.
        temperature: the sampling temperature.
        with_entropy: also compute the entropy of each prediction.
    """
    # Only real response positions meet the output matrix, a chunk at a time.
    where = places_of(response_mask).rows, places_of(response_mask).columns
    token_ids = sequences[:, -response_mask.shape[1] :][where]  # [N]
    logprobs, entropies = token_logprobs_at(model, hidden[where], token_ids, temperature, with_entropy)
    zeros = torch.zeros(response_mask.shape, dtype=torch.float32, device=sequences.device)  # [B, R]
    padded = [zeros if x is None else zeros.index_put(where, x.float()) for x in (logprobs, entropies)]
    return padded[0], padded[1]


def token_logprobs_at(
    model: PreTrainedModel, hidden: Tensor, token_ids: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of tokens, without the logits.

    Args:
        model: a language model.
        hidden: the hidden states from which the tokens are predicted, `[N, D]`.
        token_ids: `[N]`, int64.
        temperature: the sampling temperature.
        with_entropy: also compute the entropy of each prediction.

    Returns:
        Log-probabilities in nats, `[N]`, and entropies, `[N]`, if asked for.
    """

    def fused(head: nn.Linear, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        return linear_token_logprobs(
            rows,
            head.weight,
            head.bias,
            token_ids,
            scaling=logit_scaling(model),
            temperature=temperature,
            with_entropy=with_entropy,
            cast=getattr(head, PRODUCT_WEIGHT, None),
        )

    def plain(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        return token_logprobs(logits, ids, temperature), entropy(logits, temperature) if with_entropy else None

    if _has_plain_head(model):
        return _inside_head(model, fused, hidden)
    logprobs, entropies = zip(*_by_chunks(model, plain, hidden, token_ids), strict=True)
    return torch.cat(logprobs), torch.cat(entropies) if with_entropy else None


def _has_plain_head(model: PreTrainedModel) -> bool:
    # A subclass (quantised, with an adapter) or a forward of its own may compute something else from the same weight.
    head = model.get_output_embeddings()
    return kind_of(head) is nn.Linear and "forward" not in vars(head)


def _inside_head(model: PreTrainedModel, compute: Callable[[nn.Linear, Tensor], Any], hidden: Tensor) -> Any:
    """`inside_layer` of a model's output layer."""
    return inside_layer(model.get_output_embeddings(), compute, hidden)


def inside_layer(layer: Any, compute: Callable[[nn.Linear, Tensor], Any], hidden: Tensor) -> Any:
    """Call `compute(layer, hidden)` as the forward of a linear layer.

    ZeRO-3 holds a layer's whole weight only while the layer is called, and for the backward pass of what the call
    returned. All chunks share one call, since its gathering must happen equally often on every rank.

    Args:
        layer: an `nn.Linear`.
        compute: takes the layer and the hidden states.
        hidden: `[N, D]`.
    """
    layer.forward = lambda rows: compute(layer, rows)
    try:
        return layer(hidden)
    finally:
        del layer.forward


def _by_chunks(
    model: PreTrainedModel, compute: Callable[[Tensor, Tensor], Any], hidden: Tensor, token_ids: Tensor
) -> list[Any]:
    """`compute(logits, ids)` of each chunk of rows, for any output layer; backward computes the logits again."""

    def of_rows(rows: Tensor, ids: Tensor) -> Any:
        return compute(output_logits(model, rows), ids)

    if is_sharded(model.get_output_embeddings()):
        # Ranks have different numbers of rows, but under ZeRO-3 must call each layer equally often.
        return [of_rows(hidden, token_ids)]
    num_rows = rows_on(hidden.device, model.config.get_text_config().vocab_size)
    pieces = zip(hidden.split(num_rows), token_ids.split(num_rows), strict=True)
    return [checkpoint(of_rows, *piece, use_reentrant=False) for piece in pieces]
