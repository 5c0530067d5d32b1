"""What vLLM is asked, and what is made of its replies: the same for an engine in this process and for a server.

vLLM stops at EOS and at stop strings itself, so that nothing is generated in vain; where a response really ends is
decided here, by the rules of every engine.

Notation: B batch, P padded prompt length, R padded response length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.chat.text_so_far import completes_stop, decode_response
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import Generation
from rlhf_lightning.generation.sampling import RandomSource, Sampling, one_seed
from rlhf_lightning.models.eos import eos_ids
from rlhf_lightning.models.tokenizer import filler_id
from rlhf_lightning.rng import derive_seed

_COOLEST, _HOTTEST = 0.01, 2.0
"""vLLM raises lower temperatures to the first, in a line of its log, and refuses those above the second."""
_SEEDS = 2**63


class Request(NamedTuple):
    """A prompt of its own for vLLM.

    Attributes:
        prompt: its ids, without padding.
        seed: of its random numbers.
    """

    prompt: list[int]
    seed: int


class Reply(NamedTuple):
    """What vLLM said to a prompt.

    Attributes:
        ids: the tokens, the one that ended them included.
        logprobs: of each under the distribution that it was drawn from, nats.
        stopped: it ended by itself.
    """

    ids: list[int]
    logprobs: list[float]
    stopped: bool


def requests_of(
    prompt_ids: Tensor, prompt_mask: Tensor, random: RandomSource | None, longest: int, context: int | None
) -> list[Request]:
    """One request for each prompt, with a seed of its own.

    Args:
        prompt_ids: padded on the left, `[B, P]`, int64.
        prompt_mask: True for real tokens, `[B, P]`, bool.
        random: see `RolloutEngine.generate`.
        longest: tokens of a response at most.
        context: tokens that vLLM takes, prompt and response together; None if unknown.

    Raises:
        UserError: a prompt leaves no room for the longest response.
    """
    if isinstance(random, Sequence):
        seeds = [each.initial_seed() % _SEEDS for each in random]
    else:
        first = one_seed(random)
        seeds = [derive_seed(first, row) % _SEEDS for row in range(len(prompt_ids))]
    prompts = [ids[mask].tolist() for ids, mask in zip(prompt_ids.cpu(), prompt_mask.cpu(), strict=True)]
    width = max(map(len, prompts), default=0)
    if context is not None and width + longest > context:
        raise UserError(
            f"a prompt of {width} tokens and a response of {longest} need more than the {context} tokens that vLLM "
            "takes; raise the engine's max_model_len, or lower max_prompt_length or max_new_tokens"
        )
    return [Request(*each) for each in zip(prompts, seeds, strict=True)]


def sampling_fields(sampling: Sampling, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The settings of a request, by the names that vLLM has for them in Python and over HTTP.

    Args:
        sampling: how tokens are drawn.
        model: the policy, whose generation config names ids that end a response.
        tokenizer: the policy's.

    Raises:
        UserError: vLLM would draw at another temperature.
    """
    if sampling.temperature and not _COOLEST <= sampling.temperature <= _HOTTEST:
        raise UserError(
            f"vLLM draws at temperatures from {_COOLEST} to {_HOTTEST:g}, or takes the likeliest token at 0; "
            f"sampling.temperature is {sampling.temperature:g}"
        )
    return {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
        "min_tokens": sampling.min_new_tokens,
        "stop": list(sampling.stop_strings),
        "stop_token_ids": eos_ids(tokenizer, model.generation_config.eos_token_id),
        "ignore_eos": True,  # what ends a response are the ids above
        "logprobs": 0,  # of the token alone
    }


def generation_of(
    replies: Sequence[Reply], sampling: Sampling, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> Generation:
    """Put replies together.

    Args:
        replies: B of them, in the order of the prompts.
        sampling: what they were asked for with.
        tokenizer: the policy's.
        device: of the prompts.
    """
    replies = [_cut(reply, sampling, tokenizer) for reply in replies]
    lengths = torch.tensor([len(reply.ids) for reply in replies])
    size = len(replies), int(lengths.max())
    ids = torch.full(size, filler_id(tokenizer))
    logprobs = torch.zeros(size)
    for row, reply in enumerate(replies):
        ids[row, : len(reply.ids)] = torch.tensor(reply.ids)
        logprobs[row, : len(reply.ids)] = torch.tensor(reply.logprobs)
    return Generation(
        response_ids=ids.to(device),
        response_mask=(torch.arange(size[1]) < lengths.unsqueeze(1)).to(device),
        ended=torch.tensor([reply.stopped for reply in replies], device=device),
        sampler_logprobs=logprobs.to(device),
    )


def _cut(reply: Reply, sampling: Sampling, tokenizer: PreTrainedTokenizerBase) -> Reply:
    """The reply up to the first token that completes a stop string."""
    if not sampling.stop_strings or not _holds_stop(reply.ids, sampling, tokenizer):
        return reply
    length = next(n for n in range(1, len(reply.ids) + 1) if _holds_stop(reply.ids[:n], sampling, tokenizer))
    return Reply(reply.ids[:length], reply.logprobs[:length], stopped=True)


def _holds_stop(ids: list[int], sampling: Sampling, tokenizer: PreTrainedTokenizerBase) -> bool:
    begun = decode_response(tokenizer, ids[: sampling.min_new_tokens]) if sampling.min_new_tokens else ""
    return completes_stop(decode_response(tokenizer, ids), begun, sampling.stop_strings)
