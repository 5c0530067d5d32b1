"""Log-probabilities of given tokens under given logits.

Notation: [...] any leading shape, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, token_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each token under the distribution it is drawn from.

    Args:
        logits: unnormalised scores, `[..., V]`, any float type; `logits[...]` must already be the prediction *for*
            `token_ids[...]`, that is, come from the position before it.
        token_ids: `[...]`, int64.
        temperature: the sampling temperature; the logits are divided by it, so that old and new log-probabilities speak
            of the distribution that was sampled (Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO").

    Returns:
        `[...]`, float32.

    Example:
        >>> token_logprobs(torch.tensor([[0.0, 0.0]]), torch.tensor([1])).exp()
        tensor([0.5000])
    """
    logits = logits.float() / temperature  # [..., V]
    chosen = logits.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)  # [...]
    return chosen - logits.logsumexp(dim=-1)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Shannon entropy in nats of the sampling distribution.

    Args:
        logits: `[..., V]`.
        temperature: the sampling temperature.

    Returns:
        `[...]`, float32.

    Example:
        >>> entropy(torch.zeros(1, 4)).exp()
        tensor([4.])
    """
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)  # [..., V]
    return -(logprobs.exp() * logprobs).sum(dim=-1)
