"""Sampling responses from a policy.

A plain loop over the cache: prefill the prompts once, then one token at a time. It keeps three promises that a general
`generate` does not: lengths are recorded where a response ends (never found by looking for the pad id), the sampled
distribution is `softmax(logits / temperature)` unless the caller asks for more (the model's own generation config is
not consulted), and the random numbers come from the generator that is passed in.

Left out: beam search, penalties, speculative decoding. Notation: B batch, P padded prompt length, R padded response
length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.causal_lm import output_logits, run_backbone
from rlhf_lightning.models.tokenizer import eos_ids, filler_id


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Args:
        temperature: the logits are divided by it; 0 takes the most likely token.
        top_k: sample among the k most likely tokens only; 0 for all.
        top_p: sample among the most likely tokens that together have this probability; 1 for all.
        max_new_tokens: a response is cut here if it has not ended.
        min_new_tokens: a response may not end before it has this many tokens, the EOS not counted.
        stop_strings: a response ends as soon as its text contains one of these.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 64
    min_new_tokens: int = 0
    stop_strings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature ({self.temperature}) must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p ({self.top_p}) must be above 0 and at most 1")
        if self.top_k < 0:
            raise UserError(f"top_k ({self.top_k}) must be 0 (all tokens) or more")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens or self.max_new_tokens < 1:
            raise UserError(
                f"min_new_tokens ({self.min_new_tokens}) must be between 0 and max_new_tokens ({self.max_new_tokens}), "
                "and max_new_tokens at least 1"
            )


class Generation(NamedTuple):
    """What was generated.

    Attributes:
        response_ids: `[B, R]`, int64, filler after the end.
        response_mask: True for the tokens the policy produced, the EOS included, `[B, R]`, bool.
        ended: True where the response ended by itself (EOS or stop string) rather than being cut, `[B]`, bool.
    """

    response_ids: Tensor
    response_mask: Tensor
    ended: Tensor


def _filter(logits: Tensor, sampling: Sampling) -> Tensor:
    if sampling.top_k:
        logits = TopKLogitsWarper(sampling.top_k)(None, logits)
    if sampling.top_p < 1:
        logits = TopPLogitsWarper(sampling.top_p)(None, logits)
    return logits


def sample_tokens(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """Draw one token per row.

    Args:
        logits: `[B, V]`, any float type.
        sampling: temperature, top-k and top-p are used.
        generator: source of the random numbers, on the device of the logits.

    Returns:
        `[B]`, int64.

    Example:
        >>> sample_tokens(torch.tensor([[0.0, 9.0, 1.0]]), Sampling(temperature=0.0))
        tensor([1])
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probs = torch.softmax(_filter(logits.float() / sampling.temperature, sampling), dim=-1)
    return torch.multinomial(probs, num_samples=1, generator=generator).squeeze(1)


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode for the length of a `with` block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _found_stop_string(tokenizer: PreTrainedTokenizerBase, ids: list[Tensor], stop_strings: list[str]) -> Tensor:
    texts = tokenizer.batch_decode(torch.stack(ids, dim=1), skip_special_tokens=False)
    return torch.tensor([any(s in text for s in stop_strings) for text in texts], device=ids[0].device)


def _all_finished(finished: Tensor, synced: bool) -> bool:
    if not synced:
        return bool(finished.all())
    unfinished = (~finished).any().int()
    dist.all_reduce(unfinished, op=dist.ReduceOp.MAX)
    return not bool(unfinished)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase,
    generator: torch.Generator | None = None,
    synced: bool = False,
    on_token: Callable[[int], None] | None = None,
) -> Generation:
    """Continue each prompt until EOS, a stop string or the limit.

    Args:
        model: a language model; left in the mode it came in.
        prompt_ids: padded on the left, `[B, P]`, int64.
        prompt_mask: True for real tokens, `[B, P]`, bool.
        sampling: how tokens are drawn and how many at most.
        tokenizer: names the EOS (besides those of the model's generation config) and decodes the text in which stop
            strings are looked for.
        generator: source of the random numbers, on the device of the prompts; torch's global one if None.
        synced: every rank runs the same number of forwards, until the last response of all ranks has ended (ZeRO-3).
        on_token: called with the number of tokens generated so far.

    Returns:
        Response ids and mask, cut to the longest response, and which responses ended by themselves.
    """
    batch, device = prompt_ids.shape[0], prompt_ids.device
    ends = torch.tensor(eos_ids(tokenizer, model.generation_config.eos_token_id), device=device)
    filler = filler_id(tokenizer)
    mask = torch.cat([prompt_mask, prompt_mask.new_ones(batch, sampling.max_new_tokens)], dim=1)
    finished = torch.zeros(batch, dtype=torch.bool, device=device)
    lengths = torch.zeros(batch, dtype=torch.long, device=device)
    cache, tokens, step_ids = DynamicCache(config=model.config), [], prompt_ids
    with evaluation_mode(model):
        for step in range(sampling.max_new_tokens):
            width = prompt_ids.shape[1] + step
            output = run_backbone(model, step_ids, mask[:, :width], past_key_values=cache, use_cache=True)
            logits = output_logits(model, output.last_hidden_state[:, -1])
            if step < sampling.min_new_tokens:
                logits = logits.index_fill(-1, ends, float("-inf"))
            token = torch.where(finished, filler, sample_tokens(logits, sampling, generator))
            tokens.append(token)
            lengths += ~finished
            finished = finished | torch.isin(token, ends)
            if sampling.stop_strings:
                finished = finished | _found_stop_string(tokenizer, tokens, sampling.stop_strings)
            if on_token is not None:
                on_token(step + 1)
            if _all_finished(finished, synced):
                break
            step_ids = token.unsqueeze(1)
    longest = int(lengths.max())
    response_ids = torch.stack(tokens, dim=1)[:, :longest]
    response_mask = torch.arange(longest, device=device) < lengths.unsqueeze(1)
    return Generation(response_ids, response_mask, finished)


def decode_responses(tokenizer: PreTrainedTokenizerBase, generation: Generation) -> list[str]:
    """Text of each response without special tokens, as it continues its prompt (leading space included).

    Args:
        tokenizer: the policy's.
        generation: what was generated.
    """
    rows = zip(generation.response_ids, generation.response_mask, strict=True)
    return [str(tokenizer.decode(ids[mask], skip_special_tokens=True)) for ids, mask in rows]
