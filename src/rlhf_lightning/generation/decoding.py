"""One batch of prompts, answered token by token.

Notation: B prompts of the caller, N rows of this batch that are still in it, P width of its longest prompt, R tokens of
a response at most, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.chat.text_so_far import completes_stop
from rlhf_lightning.compat import SDPA, attention_kernel, takes_attention_functions
from rlhf_lightning.errors import UserError
from rlhf_lightning.forward.backbone import attends, cache_argument, position_ids, takes_positions
from rlhf_lightning.forward.capacity import LOOKUP_ERRORS, explain_lookup
from rlhf_lightning.forward.hidden import hidden_states, read_row, reads_rows, response_hidden
from rlhf_lightning.forward.numerics import dummy_tokens, self_test, typical_distance, typical_tolerance
from rlhf_lightning.forward.output_layer import output_logits
from rlhf_lightning.generation.cache import RolloutCache, attention_by_rows, rollout_cache
from rlhf_lightning.generation.compiled_step import CompiledStep
from rlhf_lightning.generation.picking import Rules, pick
from rlhf_lightning.generation.sampling import RandomSource, Sampling, uniforms
from rlhf_lightning.host import alike, on_host, to_device
from rlhf_lightning.models.eos import eos_ids

PREFILL_TOKENS = {"cpu": 512}
"""By device, tokens of a group of prompts, with its padding: enough to keep the device busy, and little padding."""
PREFILL_TOKENS_ELSEWHERE = 8192

LEAVING_SHARE = 8
"""Rows leave the batch when they are at least one in so many: moving the others costs a copy of their cache."""

SPARE_TOKENS = 8
"""Tokens decoded beyond those that a stop string can fill, for some are decoded to nothing."""

STEPS_BETWEEN_LOOKS = {"cpu": 1}
"""By device, how often to look whether responses have ended: for a CPU that costs nothing."""
STEPS_BETWEEN_LOOKS_ELSEWHERE = 8


_TEST_PROMPT, _TEST_RESPONSE = 4, 3
"""Tokens with which a model is tested."""


class Record:
    """What is drawn and what comes of it, for all prompts, in the caller's order.

    Attributes:
        uniforms: the random number of each token, `[B, R]`, float64.
        ids: `[B, R]`, int64, filler where nothing was produced.
        lengths: tokens produced, `[B]`, int64.
        ended: `[B]`, bool.
        logprobs: `[B, R]`, float32, 0 where nothing was produced; None if not asked for.
        hidden: `[B, R, D]`, 0 where nothing was produced; None if not asked for.
    """

    def __init__(
        self,
        batch: int,
        sampling: Sampling,
        *,
        filler: int,
        generator: RandomSource | None,
        device: torch.device,
        with_logprobs: bool,
        with_hidden: bool,
    ) -> None:
        shape = batch, sampling.max_new_tokens
        self.filler = filler
        greedy = sampling.temperature == 0
        self.uniforms = torch.ones(shape, device=device) if greedy else uniforms(shape, generator, device)
        self.ids = torch.full(shape, filler, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.ended = torch.zeros(batch, dtype=torch.bool, device=device)
        self.logprobs = torch.zeros(shape, dtype=torch.float32, device=device) if with_logprobs else None
        self.hidden: Tensor | None = None
        self._keeps_hidden = with_hidden

    def keep_hidden(self, rows: Tensor, step: int, hidden: Tensor, finished: Tensor) -> None:
        """Write down what the tokens of a step are predicted from, if asked for.

        Args:
            rows: places of the prompts, `[N]`, int64.
            step: number of the token.
            hidden: hidden states, `[N, D]`.
            finished: rows whose response has ended, `[N]`, bool.
        """
        if not self._keeps_hidden:
            return
        if self.hidden is None:  # not every model's last states have its config's hidden size
            self.hidden = hidden.new_zeros(*self.ids.shape, hidden.shape[1])
        self.hidden[rows, step] = hidden.masked_fill(finished.unsqueeze(1), 0.0)


class Decoding:
    """Answers some of the prompts together: first `prefill`, then iterate over it to run its steps.

    Args:
        model: a language model in evaluation mode.
        tokenizer: names the EOS and decodes the text in which stop strings are looked for.
        prompt_ids: all prompts, padded on the left, `[B, *]`, int64.
        prompt_mask: True for real tokens, `[B, *]`, bool.
        rows: those to be answered, the longest prompt first, `[N]`, int64.
        sampling: how tokens are drawn and how many at most.
        record: the results are written here.
        synced: every rank runs the same number of forwards.
        compiled: reads the tokens of a step, where it can.
        cached: keep keys, values and states of the tokens read; otherwise every step reads everything again.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        rows: Tensor,
        sampling: Sampling,
        record: Record,
        synced: bool,
        compiled: CompiledStep | None = None,
        cached: bool = True,
    ) -> None:
        self.model, self.tokenizer, self.sampling, self.record, self.synced = model, tokenizer, sampling, record, synced
        self.rows = rows
        shown = alike(lambda mask, rows: mask[rows], prompt_mask, rows)  # [N, *]
        self.lengths = shown.sum(dim=1)  # [N]
        lengths = on_host(shown)[0].sum(dim=1).tolist()
        self.widths = [max(1, length) for length in lengths]
        self.width = self.widths[0]
        self.prompt_ids = prompt_ids[rows, -self.width :]  # [N, P]
        response = prompt_mask.new_ones(len(rows), sampling.max_new_tokens)  # [N, R]
        self.mask = torch.cat([prompt_mask[rows, -self.width :], response], dim=1).long()  # [N, P + R]
        self.finished = torch.zeros_like(rows, dtype=torch.bool)  # [N]
        self.ends = to_device(torch.tensor(eos_ids(tokenizer, model.generation_config.eos_token_id)), rows.device)
        capacity = self.mask.shape[1] - 1  # the last token is never read
        self.cache = compiled.open(len(rows), self.width, capacity) if compiled is not None and cached else None
        self.compiled = None if self.cache is None else compiled
        if self.cache is None and cached:
            self.cache = rollout_cache(model.config, len(rows), self.width, capacity)
        self.any_cache = self.cache or (DynamicCache(config=model.config) if cached else None)
        self.cache_argument, self.attends = cache_argument(model), attends(model)
        device = rows.device.type
        self.reads_rows = self.cache is not None and reads_rows(model, lengths)
        self.prefill_tokens = PREFILL_TOKENS.get(device, PREFILL_TOKENS_ELSEWHERE)
        self.steps_between_looks = STEPS_BETWEEN_LOOKS.get(device, STEPS_BETWEEN_LOOKS_ELSEWHERE)
        self.takes_positions = takes_positions(model)
        self.makes_mask = self.cache is not None and self.attends and takes_own_mask(model, self.cache.windows)
        self.has_empty = min(lengths) == 0
        self.rules = Rules(sampling, record.filler, record.logprobs is not None)
        self.hidden: Tensor | None = None

    def prefill(self) -> None:
        """Read the prompts."""
        if self.cache is None:
            everything = slice(0, len(self.rows))
            self.hidden = self._read_again(0) if self.any_cache is None else self._read_batch(everything)
            return
        read = self._read_row if self.reads_rows else self._read_batch
        self.hidden = torch.cat([read(group) for group in self._groups()])  # at their ends, [N, D]
        self.cache.decode(self.widths)
        if self.compiled is not None:
            self.compiled.begin(self.mask[:, : self.width].bool())

    def __iter__(self) -> Iterator[int]:
        """Run the steps; yields the number of each when its tokens are recorded."""
        assert self.hidden is not None, "prefill first"
        hidden = self.hidden
        for step in range(self.sampling.max_new_tokens):
            self.record.keep_hidden(self.rows, step, hidden, self.finished)
            self._pick(step, hidden)
            yield step
            if step + 1 == self.sampling.max_new_tokens:
                return
            if (step + 1) % self.steps_between_looks == 0:
                if self._is_over():
                    return
                self._drop_finished()
            hidden = self._continue(step)

    def _groups(self) -> Iterator[slice]:
        """Rows whose prompts are read together."""
        if self.synced:
            yield slice(0, len(self.rows))
            return
        start, tokens = 0, 0
        for row, width in enumerate(self.widths):
            tokens = tokens + width if self.reads_rows else (row + 1 - start) * self.widths[start]
            if tokens > self.prefill_tokens and row > start:
                yield slice(start, row)
                start, tokens = row, width
        yield slice(start, len(self.rows))

    def _read_row(self, group: slice) -> Tensor:
        assert isinstance(self.cache, RolloutCache)
        lengths = self.widths[group]
        self.cache.prefill_row(group, lengths)
        ids = self.prompt_ids[group][self.mask[group, : self.width].bool()]  # [real tokens of the group]
        try:
            return read_row(self.model, ids, lengths, self.cache)
        except LOOKUP_ERRORS as error:
            explain_lookup(error, self.model, ids.unsqueeze(0), self.mask[group, : self.width])
            raise

    def _read_batch(self, group: slice) -> Tensor:
        width = self.widths[group.start]
        if self.cache is not None:
            self.cache.prefill(group, width)
        part = group, slice(self.width - width, self.width)
        return self._read(self.prompt_ids[part], self.mask[part], position_ids(self.mask[part].bool()))

    def _continue(self, step: int) -> Tensor:
        """Read the tokens of a step; hidden states, `[N, D]`."""
        if self.any_cache is None:
            return self._read_again(step + 1)
        ids, positions = self.record.ids[self.rows, step], self.lengths + step  # [N], [N]
        hidden = None
        if self.compiled is not None:
            # The first of all is read both ways, into the same column.
            expected = None if self.compiled.trusted else self._continue_plain(ids, positions, step)
            hidden = self.compiled.read(ids, positions, expected)
            self.compiled = None if hidden is None else self.compiled
        if hidden is None:
            hidden = self._continue_plain(ids, positions, step)
        if self.cache is not None:
            self.cache.advance()
        return hidden

    def _continue_plain(self, ids: Tensor, positions: Tensor, step: int) -> Tensor:
        first = 0 if self.cache is None else self.cache.place.first
        mask = self.mask[:, first : self.width + step + 1]  # [N, columns that are seen]
        return self._read(ids.unsqueeze(1), mask, positions.unsqueeze(1), self.makes_mask)

    def _read_again(self, tokens: int) -> Tensor:
        """Read prompts and the tokens drawn so far; hidden states at their ends, `[N, D]`."""
        ids = torch.cat([self.prompt_ids, self.record.ids[self.rows, :tokens]], dim=1)  # [N, P + tokens]
        return hidden_states(self.model, ids, self.mask[:, : ids.shape[1]].bool())[:, -1]

    def _read(self, ids: Tensor, mask: Tensor, positions: Tensor, makes_mask: bool = False) -> Tensor:
        kwargs: dict[str, Any] = {"position_ids": positions} if self.takes_positions else {}
        kwargs[self.cache_argument] = self.any_cache
        seen: Tensor | None = mask if self.attends else mask[:, -ids.shape[1] :]
        if makes_mask:  # as transformers would, which looks at it first, and so waits for the device
            padded = self.has_empty or self.widths[-1] < self.widths[0]
            seen = mask.bool()[:, None, None] if padded else None  # [N, 1, 1, columns]
        try:
            output = self.model.base_model(input_ids=ids, attention_mask=seen, use_cache=True, **kwargs)
        except LOOKUP_ERRORS as error:
            explain_lookup(error, self.model, ids, mask)
            raise
        hidden: Tensor = output.last_hidden_state[:, -1]  # [N, D]
        return hidden

    def _pick(self, step: int, hidden: Tensor) -> None:
        """Draw the tokens of a step from hidden states `[N, D]`, and write them down."""
        record, rows = self.record, self.rows
        how = record.uniforms[rows, step], self.finished, self.ends, step >= self.sampling.min_new_tokens, self.rules
        picked = None if self.compiled is None or step == 0 else self.compiled.pick(hidden, *how)
        if picked is None:
            logits = output_logits(self.model, hidden)  # [N, V]
            if step == 0 and logits.isnan().any():  # once, for asking stops the device
                raise UserError(
                    "the policy's logits are not a number: its training has diverged, or its weights are broken; "
                    "go back to an earlier checkpoint and lower the learning rate"
                )
            picked = pick(logits, *how)
        record.ids[rows, step] = picked.ids
        record.lengths[rows] += ~self.finished
        if record.logprobs is not None and picked.logprobs is not None:
            record.logprobs[rows, step] = picked.logprobs
        self.finished = picked.finished
        if self.sampling.stop_strings and step >= self.sampling.min_new_tokens:
            self._look_for_stop_strings(step)
        record.ended[rows] = self.finished

    def _look_for_stop_strings(self, step: int) -> None:
        places = (~self.finished).nonzero().squeeze(1)
        if not len(places):
            return
        stop_strings = self.sampling.stop_strings
        # A token is a byte at least, and what stands before the last few was looked at before.
        tail = max(len(stop.encode()) for stop in stop_strings) + SPARE_TOKENS
        ids = self.record.ids[self.rows[places], max(0, step + 1 - tail) : step + 1]  # [places, up to tail]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=False)
        earlier = max(0, self.sampling.min_new_tokens - max(0, step + 1 - tail))  # tokens in which none may end it
        begun = self.tokenizer.batch_decode(ids[:, :earlier], skip_special_tokens=False) if earlier else [""] * len(ids)
        found = [completes_stop(*both, stop_strings) for both in zip(texts, begun, strict=True)]
        self.finished[places] = torch.tensor(found, device=ids.device)

    def _is_over(self) -> bool:
        if not self.synced:
            return bool(on_host(self.finished)[0].all())
        unfinished = (~self.finished).any().int()
        dist.all_reduce(unfinished, op=dist.ReduceOp.MAX)
        return not bool(unfinished)

    def _drop_finished(self) -> None:
        """Take the rows that have ended out of the batch, if there are enough of them."""
        if (self.cache is None and self.any_cache is not None) or self.synced or self.compiled is not None:
            return
        (finished,) = on_host(self.finished)
        leaving = int(finished.sum())
        if leaving == 0 or leaving * LEAVING_SHARE < len(self.rows):
            return
        staying = (~finished).nonzero().squeeze(1)
        self.widths = [self.widths[place] for place in staying.tolist()]
        kept = to_device(staying, self.rows.device)
        if self.cache is not None:
            self.cache.keep(kept, self.widths)
        self.prompt_ids = self.prompt_ids[kept]
        self.rows, self.lengths, self.mask = self.rows[kept], self.lengths[kept], self.mask[kept]
        self.finished = self.finished[kept]


_supports_cache: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def supports_cache(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a model goes on from our caches as if it had read everything again; tested once.

    What keeps a state in a way of its own would answer without memory, or read padding. If so, a line says what it
    costs.

    Args:
        model: a language model in evaluation mode; every process asks equally often.
        tokenizer: as for `Decoding`.
    """
    if model not in _supports_cache:
        right = self_test(model, partial(_cache_is_right, model, tokenizer)) is True
        if not right:
            rank_zero_warn(
                f"{type(model).__name__} keeps what it has read in a way that is not known here: every token of a "
                "response reads the whole text again, which is right but slow for long ones"
            )
        _supports_cache[model] = right
    return _supports_cache[model]


def takes_own_mask(model: PreTrainedModel, windows: Sequence[int | None]) -> bool:
    """Whether the mask of a token may be given to a model as attention takes it, for all layers alike.

    Args:
        model: a language model.
        windows: for each layer, how far back it sees, None for all the way.
    """
    alibi = getattr(model.config.get_text_config(), "alibi", False)  # made of the mask
    usual = takes_attention_functions(model) and takes_positions(model) and not alibi
    return usual and attention_kernel(model) == SDPA and not any(windows)


def _cache_is_right(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the hidden states of two short responses are those of a plain forward pass."""
    device = model.device
    width, length, short = _TEST_PROMPT, _TEST_RESPONSE, _TEST_PROMPT // 2
    ids = dummy_tokens(model, 2 * width).view(2, width)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, : width - short] = False
    sampling = Sampling(temperature=0.0, max_new_tokens=length, min_new_tokens=length)
    record = Record(2, sampling, filler=0, generator=None, device=device, with_logprobs=False, with_hidden=True)
    decoding = Decoding(
        model,
        tokenizer,
        prompt_ids=ids,
        prompt_mask=mask,
        rows=torch.arange(2, device=device),
        sampling=sampling,
        record=record,
        synced=False,
    )
    decoding.prefill()
    with attention_by_rows(model, decoding.cache):
        for _ in decoding:
            pass
    mask = torch.cat([mask, mask.new_ones(2, length)], dim=1)
    expected = response_hidden(model, torch.cat([ids, record.ids], dim=1), mask, length)  # [2, R, D]
    assert record.hidden is not None
    # NaN is not judged here.
    return not typical_distance(list(record.hidden), list(expected)) > typical_tolerance(model)
