"""Sampling responses from a policy.

A plain loop over the cache: prefill the prompts once, then one token at a time. It keeps three promises that a general
`generate` does not: lengths are recorded where a response ends (never found by looking for the pad id), the sampled
distribution is `softmax(logits / temperature)` unless the caller asks for more (the model's own generation config is
not consulted), and the random numbers come from the generator that is passed in.

What makes it quick: prompts are read in groups of similar length, so that little of the prefill is padding; keys and
values live in buffers that are written in place; rows whose response has ended leave the batch; adapters are merged;
under autocast weights are cast once; on a CPU, products with few rows are taken the other way round.

Left out: beam search, penalties, speculative decoding.

Notation: B batch, P padded prompt length, R padded response length, D hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from contextlib import closing, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.chat.text_so_far import decode_response
from rlhf_lightning.errors import UserError
from rlhf_lightning.forward.backbone import evaluation_mode
from rlhf_lightning.forward.casts import CastWeights
from rlhf_lightning.generation.cache import attention_by_rows, attention_to_full_cache
from rlhf_lightning.generation.compiled_step import CompiledStep
from rlhf_lightning.generation.decoding import Decoding, Record, supports_cache
from rlhf_lightning.generation.half_weights import HalfWeights
from rlhf_lightning.generation.sampling import RandomSource, Sampling
from rlhf_lightning.generation.skinny_gemm import skinny_gemm
from rlhf_lightning.host import alike, on_host, to_device
from rlhf_lightning.models.merging import merged_adapters
from rlhf_lightning.models.tokenizer import filler_id


class Generation(NamedTuple):
    """What was generated.

    Attributes:
        response_ids: `[B, R]`, int64, filler after the end.
        response_mask: True for the tokens the policy produced, the EOS included, `[B, R]`, bool.
        ended: True where the response ended by itself (EOS or stop string) rather than being cut, `[B]`, bool.
        logprobs: when asked for, of each produced token under `softmax(logits / temperature)`, whatever top-k, top-p
            and `min_new_tokens` made of it, nats, 0 after the end, `[B, R]`, float32; temperature 0 counts as 1.
        hidden: when asked for, the hidden state that each produced token was predicted from, 0 after the end,
            `[B, R, D]`.
        sampler_logprobs: of each token under the distribution that it was drawn from, temperature, top-k and top-p
            included, 0 after the end, `[B, R]`, float32; None where that is the model's own, which then is not weighed.
    """

    response_ids: Tensor
    response_mask: Tensor
    ended: Tensor
    logprobs: Tensor | None = None
    hidden: Tensor | None = None
    sampler_logprobs: Tensor | None = None


class RolloutEngine(ABC):
    """Whatever answers prompts; an engine of your own writes `generate`, and what else it can do.

    `tests/helpers/engine_contract.py` holds what is asked of every engine, as functions to run on yours.

    Attributes:
        has_logprobs: `generate` can return log-probabilities. Without them the policy is always measured itself.
        has_hidden: `generate` can return hidden states. Without them a value head on the policy reads its own.
    """

    has_logprobs: bool = False
    has_hidden: bool = False

    @abstractmethod
    def generate(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        sampling: Sampling,
        *,
        generator: RandomSource | None = None,
        synced: bool = False,
        on_token: Callable[[int], None] | None = None,
        with_logprobs: bool = False,
        with_hidden: bool = False,
    ) -> Generation:
        """Continue each prompt until EOS, a stop string or the limit.

        What ends a response is `eos_ids` of the tokenizer and the model; nothing else of the model's generation config
        has a say.

        Args:
            prompt_ids: padded on the left, `[B, P]`, int64.
            prompt_mask: True for real tokens, `[B, P]`, bool.
            sampling: how tokens are drawn and how many at most.
            generator: source of the random numbers, on the device of the prompts: one for all, or a list of one for
                each prompt, so that its response does not depend on the others (an engine that cannot do so takes
                `one_seed` of them); torch's global one if None.
            synced: every rank runs the same number of forwards, until the last response of all ranks has ended
                (ZeRO-3); all ranks must have the same number of prompts.
            on_token: told the number of tokens generated so far, `max_new_tokens` for each batch that is done, as often
                as the engine knows it.
            with_logprobs: also return the log-probabilities of the tokens; asked only of engines that have them.
            with_hidden: also return the hidden states that the tokens were predicted from; likewise.

        Returns:
            Response ids and mask, cut to the longest response, and which responses ended by themselves, in the order of
            the prompts.
        """

    # Four things that an engine which reads the model's own weights, in the model's own process, need not do.

    def sync_weights(self) -> None:  # noqa: B027
        """Take over the model's weights; called after they have changed and before the next `generate`."""

    def wake(self) -> None:  # noqa: B027
        """Get ready to answer; called before a rollout. An engine is awake when it is made."""

    def sleep(self) -> None:  # noqa: B027
        """Give memory to training; called after each `generate`.

        The weights must be kept: they are taken over anew only after they have changed.
        """

    def close(self) -> None:  # noqa: B027
        """Give back all that is held; called when a run is over. Whoever asks again gets an answer all the same."""


EngineFactory = Callable[[PreTrainedModel, PreTrainedTokenizerBase, int | None], RolloutEngine]
"""Makes an engine, given the policy, its tokenizer and how many prompts are answered at once (None for all).

A function or a class that takes these three first. In YAML a class is named by `class_path`, and what else it takes by
`init_args`; its `__init__` says what types they have.
"""


class TransformersEngine(RolloutEngine):
    """Answers prompts with a transformers model, in plain PyTorch on any device.

    Every token of every response has its own random number, drawn before the first token. So a response depends
    neither on the other prompts, nor on their order, nor on the batch size (but for the rounding of the logits).

    Args:
        model: a language model; left in the mode it came in.
        tokenizer: names the EOS (besides those of the model's generation config) and decodes the text in which stop
            strings are looked for.
        batch_size: prompts answered at once, those of similar length together; None for all.
        compiled: compile the decoding step, which takes minutes once; keep the engine, for it keeps the step.
        half_weights: write answers to few prompts from copies of the weights in bfloat16, where those are float32 on a
            CPU: nearly the same answers, and a token takes little more than half the time. The weights must not change
            any more.
    """

    has_logprobs = True
    has_hidden = True

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int | None = None,
        compiled: bool = False,
        half_weights: bool = False,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.compiled_step = CompiledStep(model, batch_size or 1) if compiled else None
        self.half_weights = HalfWeights(model) if half_weights else None
        self.casts = CastWeights(model)

    @torch.no_grad()
    def generate(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        sampling: Sampling,
        *,
        generator: RandomSource | None = None,
        synced: bool = False,
        on_token: Callable[[int], None] | None = None,
        with_logprobs: bool = False,
        with_hidden: bool = False,
    ) -> Generation:
        """Continue each prompt until EOS, a stop string or the limit; see `RolloutEngine.generate`."""
        if self.compiled_step is not None and torch.is_inference_mode_enabled():
            # What lives on until the next rollout must not be made of inference tensors.
            with torch.inference_mode(False):
                return self.generate(
                    prompt_ids,
                    prompt_mask,
                    sampling,
                    generator=generator,
                    synced=synced,
                    on_token=on_token,
                    with_logprobs=with_logprobs,
                    with_hidden=with_hidden,
                )
        record = self._record(prompt_ids, sampling, generator, with_logprobs=with_logprobs, with_hidden=with_hidden)
        with closing(self._decode(prompt_ids, prompt_mask, sampling, record, synced=synced)) as steps:
            for done in steps:
                if on_token is not None:
                    on_token(done)
        return _recorded(record)

    @torch.no_grad()
    def stream(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        sampling: Sampling,
        *,
        generator: RandomSource | None = None,
    ) -> Generator[Generation]:
        """What `generate` returns, as far as it has got, after every token.

        Closing the iterator stops it. The model must not be used otherwise until it has ended or is closed, by the
        thread that went on with it: meanwhile adapters are merged, and attention and layers are those of decoding.

        Args:
            prompt_ids: padded on the left, `[B, P]`, int64.
            prompt_mask: True for real tokens, `[B, P]`, bool.
            sampling: how tokens are drawn and how many at most.
            generator: see `generate`.

        Yields:
            Views of what is being written: read them before going on.
        """
        record = self._record(prompt_ids, sampling, generator)
        with closing(self._decode(prompt_ids, prompt_mask, sampling, record)) as steps:
            for _ in steps:
                yield _recorded(record)

    def _record(
        self,
        prompt_ids: Tensor,
        sampling: Sampling,
        generator: RandomSource | None,
        *,
        with_logprobs: bool = False,
        with_hidden: bool = False,
    ) -> Record:
        return Record(
            len(prompt_ids),
            sampling,
            filler=filler_id(self.tokenizer),
            generator=generator,
            device=prompt_ids.device,
            with_logprobs=with_logprobs,
            with_hidden=with_hidden,
        )

    def _decode(
        self, prompt_ids: Tensor, prompt_mask: Tensor, sampling: Sampling, record: Record, *, synced: bool = False
    ) -> Generator[int]:
        """Answer the prompts, batch by batch, into the record; yields the tokens done after each step."""
        lengths = on_host(prompt_mask)[0].sum(dim=1)
        order = lengths.sort(descending=True, stable=True).indices  # [B], the longest first
        done, step_of = 0, self.compiled_step
        # A graph that is replayed reads the weights where they were when it was recorded.
        merging = merged_adapters(self.model, in_place=step_of is not None and step_of.is_replayed)
        # What is compiled goes on reading the casts where they were; otherwise they go after each rollout.
        casts = self.casts if step_of is not None else CastWeights(self.model)
        with evaluation_mode(self.model), merging, casts.used(), skinny_gemm(self.model):
            cached = supports_cache(self.model, self.tokenizer)
            for rows in order.split(self.batch_size or len(order)):
                decoding = Decoding(
                    self.model,
                    self.tokenizer,
                    prompt_ids=prompt_ids,
                    prompt_mask=prompt_mask,
                    rows=to_device(rows, prompt_ids.device),
                    sampling=sampling,
                    record=record,
                    synced=synced,
                    compiled=step_of,
                    cached=cached,
                )
                decoding.prefill()
                compiled = decoding.compiled is not None
                full, by_rows = attention_to_full_cache(self.model), attention_by_rows(self.model, decoding.cache)
                halved = nullcontext() if self.half_weights is None else self.half_weights.used()
                with full if compiled else by_rows, halved:
                    for step in decoding:
                        yield done + step + 1
                done += sampling.max_new_tokens


def _recorded(record: Record) -> Generation:
    lengths, _ = on_host(record.lengths, record.ids)
    longest = int(lengths.max())

    def before_end(lengths: Tensor) -> Tensor:
        return torch.arange(longest, device=lengths.device) < lengths.unsqueeze(1)

    return Generation(
        response_ids=alike(lambda ids: ids[:, :longest], record.ids),
        response_mask=alike(before_end, record.lengths),
        ended=record.ended,
        logprobs=None if record.logprobs is None else record.logprobs[:, :longest],
        hidden=None if record.hidden is None else record.hidden[:, :longest],
    )


def decode_responses(tokenizer: PreTrainedTokenizerBase, generation: Generation) -> list[str]:
    """Text of each response without special tokens, as it continues its prompt (leading space included).

    Args:
        tokenizer: the policy's.
        generation: what was generated.
    """
    rows = zip(*on_host(generation.response_ids, generation.response_mask), strict=True)
    return [decode_response(tokenizer, ids[mask]) for ids, mask in rows]


def respond(
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptBatch,
    sampling: Sampling,
    *,
    generator: RandomSource | None = None,
    synced: bool = False,
    on_token: Callable[[int], None] | None = None,
    with_logprobs: bool = False,
    with_hidden: bool = False,
) -> tuple[Generation, list[str]]:
    """Answer prompts.

    Args:
        engine: answers them.
        tokenizer: the policy's.
        prompts: the prompts, B of them.
        sampling: how responses are drawn.
        generator: source of the random numbers; torch's global one if None.
        synced: every rank runs the same number of forwards (ZeRO-3).
        on_token: told how many tokens of each response are done.
        with_logprobs: also keep the log-probability of each token.
        with_hidden: also keep the hidden state that each token was predicted from.

    Returns:
        Responses as ids and mask, `[B, R]`, and as B texts.

    Raises:
        UserError: the engine lacks what is asked for.
    """
    wanted = {
        "log-probabilities": (with_logprobs, engine.has_logprobs),
        "hidden states": (with_hidden, engine.has_hidden),
    }
    for name, (asked, has) in wanted.items():
        if asked and not has:
            raise UserError(
                f"{type(engine).__name__} returns no {name}: do not ask for them, or use TransformersEngine"
            )
    generation = engine.generate(
        prompts.prompt_ids,
        prompts.prompt_mask,
        sampling,
        generator=generator,
        synced=synced,
        on_token=on_token,
        with_logprobs=with_logprobs,
        with_hidden=with_hidden,
    )
    return generation, decode_responses(tokenizer, generation)


def response_rows(prompts: PromptBatch, generation: Generation, texts: list[str]) -> list[dict[str, Any]]:
    """Answers as `predict` returns them: `row`, `prompt`, `response`, `ended` and `tokens`.

    `ended` is False where the response was cut at the limit; `tokens` is its length, the EOS included.

    Args:
        prompts: the prompts.
        generation: their responses.
        texts: the responses as text.
    """
    names = ("row", "prompt", "response", "ended", "tokens")
    lengths = generation.response_mask.sum(dim=1).tolist()
    stripped = [text.strip() for text in texts]
    columns = (prompts.row_ids.tolist(), prompts.prompts, stripped, generation.ended.tolist(), lengths)
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
