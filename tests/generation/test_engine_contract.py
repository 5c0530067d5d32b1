"""Every engine keeps the contract: ours, and one of somebody else; and the contract sees what is wrong."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from helpers.compiling import count_compiling
from helpers.engine_contract import (
    CONTRACT,
    check_abilities,
    check_limits,
    check_on_token,
    check_order,
    check_sampling,
    check_sleep_and_wake,
    check_stop_strings,
    check_sync_weights,
    check_where_responses_end,
)
from helpers.models import table_tokenizer
from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.chat.text_so_far import completes_stop
from rlhf_lightning.generation.engine import Generation, RolloutEngine, TransformersEngine, respond
from rlhf_lightning.generation.sampling import Sampling, one_seed
from rlhf_lightning.models.eos import eos_ids
from rlhf_lightning.models.tokenizer import filler_id


class Ends(StoppingCriteria):
    """Where responses end: at an EOS, or when their text completes a stop string after the least number of tokens."""

    def __init__(self, tokenizer, ends, prompt, sampling):
        self.tokenizer, self.ends, self.prompt, self.sampling = tokenizer, ends, prompt, sampling
        self.lengths = {}

    def __call__(self, input_ids, scores, **kwargs):
        said = input_ids[:, self.prompt :]
        least, stops = self.sampling.min_new_tokens, self.sampling.stop_strings
        texts = zip(self.tokenizer.batch_decode(said), self.tokenizer.batch_decode(said[:, :least]), strict=True)
        for row, (ids, both) in enumerate(zip(said.tolist(), texts, strict=True)):
            if row not in self.lengths and (ids[-1] in self.ends or completes_stop(*both, stops)):
                self.lengths[row] = len(ids)
        return torch.tensor([row in self.lengths for row in range(len(said))])


class LibraryEngine(RolloutEngine):
    """transformers' own `generate` on weights of its own, which it gives away while it sleeps."""

    def __init__(self, model, tokenizer, batch_size=None):
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.wake()

    def wake(self):
        self.copy = copy.deepcopy(self.model).eval()

    def sync_weights(self):
        self.copy.load_state_dict(self.model.state_dict())

    def sleep(self):
        self.copy = None

    @torch.no_grad()
    def generate(self, prompt_ids, prompt_mask, sampling, *, generator=None, **options):
        size = (len(prompt_ids), sampling.max_new_tokens)
        ids = torch.full(size, filler_id(self.tokenizer))
        lengths, ended = torch.full(size[:1], size[1]), torch.zeros(size[:1], dtype=torch.bool)
        with torch.random.fork_rng([]):
            torch.manual_seed(one_seed(generator))
            for rows in torch.arange(size[0]).split(self.batch_size or size[0]):
                said, ends = self._answer(prompt_ids[rows], prompt_mask[rows], sampling)
                ids[rows, : said.shape[1]] = said
                for row, length in ends.items():
                    lengths[rows[row]], ended[rows[row]] = length, True
        longest = int(lengths.max())
        mask = torch.arange(longest) < lengths.unsqueeze(1)
        return Generation(ids[:, :longest].masked_fill(~mask, filler_id(self.tokenizer)), mask, ended)

    def _answer(self, ids, mask, sampling):
        ends = eos_ids(self.tokenizer, self.model.generation_config.eos_token_id)
        drawn = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        self.copy.generation_config = GenerationConfig(
            do_sample=sampling.temperature > 0,
            max_new_tokens=sampling.max_new_tokens,
            min_new_tokens=sampling.min_new_tokens,
            eos_token_id=ends,
            pad_token_id=filler_id(self.tokenizer),
            **(drawn if sampling.temperature else {}),
        )
        watched = Ends(self.tokenizer, ends, ids.shape[1], sampling)
        said = self.copy.generate(ids, attention_mask=mask.long(), stopping_criteria=StoppingCriteriaList([watched]))
        return said[:, ids.shape[1] :], watched.lengths


def compiled(model, tokenizer, batch_size):
    return TransformersEngine(model, tokenizer, batch_size, compiled=True)


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
@pytest.mark.parametrize("make", [TransformersEngine, compiled, LibraryEngine], ids=lambda make: make.__name__)
def test_an_engine_keeps_the_contract(make, check, monkeypatch):
    count_compiling(monkeypatch)
    check(make)


class WithoutEos(TransformersEngine):
    def generate(self, *prompts, **options):
        found = super().generate(*prompts, **options)
        lengths = found.response_mask.sum(dim=1, keepdim=True) - found.ended.unsqueeze(1).long()
        return found._replace(response_mask=torch.arange(found.response_ids.shape[1]) < lengths)


class OneLong(TransformersEngine):
    def generate(self, ids, mask, sampling, **options):
        longer = Sampling(**{**vars(sampling), "max_new_tokens": 9, "min_new_tokens": 0})
        return super().generate(ids, mask, longer, **options)


class WithoutStops(TransformersEngine):
    def generate(self, ids, mask, sampling, **options):
        return super().generate(ids, mask, Sampling(**{**vars(sampling), "stop_strings": []}), **options)


class Sorted(TransformersEngine):
    def generate(self, ids, mask, sampling, **options):
        order = mask.sum(dim=1).argsort(stable=True)
        return super().generate(ids[order], mask[order], sampling, **options)


class AlwaysGreedy(TransformersEngine):
    def generate(self, ids, mask, sampling, **options):
        return super().generate(ids, mask, Sampling(**{**vars(sampling), "temperature": 0.0}), **options)


class Unscaled(TransformersEngine):
    def generate(self, ids, mask, sampling, **options):
        found = super().generate(ids, mask, sampling, **options)
        return found if found.logprobs is None else found._replace(logprobs=found.logprobs * sampling.temperature)


class Stale(LibraryEngine):
    def sync_weights(self):
        pass


class StaysAsleep(LibraryEngine):
    def wake(self):
        if not hasattr(self, "copy"):
            super().wake()


class Loud(TransformersEngine):
    def generate(self, *prompts, on_token=None, **options):
        if on_token is not None:
            on_token(99)
        return super().generate(*prompts, **options)


@pytest.mark.parametrize(
    ("make", "check"),
    [
        (WithoutEos, check_where_responses_end),
        (OneLong, check_limits),
        (WithoutStops, check_stop_strings),
        (Sorted, check_order),
        (AlwaysGreedy, check_sampling),
        (Unscaled, check_abilities),
        (Stale, check_sync_weights),
        (StaysAsleep, check_sleep_and_wake),
        (Loud, check_on_token),
    ],
)
def test_the_contract_sees_what_is_wrong(make, check):
    with pytest.raises((AssertionError, AttributeError)):
        check(make)


class Recorder(RolloutEngine):
    """An engine that keeps what it was asked."""

    has_logprobs = has_hidden = True

    def __init__(self):
        self.asked = []

    def generate(self, *prompts, **options):
        self.asked.append((prompts, options))
        ids = torch.tensor([[2, 3], [3, 0]])
        return Generation(ids, torch.tensor([[True, True], [True, False]]), torch.tensor([True, True]))


def test_the_engine_is_asked_what_the_caller_asks():
    engine, sampling = Recorder(), Sampling(max_new_tokens=2)
    ids = torch.tensor([[0, 1], [1, 2]])
    batch = PromptBatch(ids, ids > 0, ["a", "ab"], torch.arange(2))
    options = {
        "generator": torch.Generator(),
        "synced": True,
        "on_token": print,
        "with_logprobs": True,
        "with_hidden": True,
    }
    _, texts = respond(engine, table_tokenizer(), batch, sampling, **options)
    respond(engine, table_tokenizer(), batch, sampling)
    assert texts == ["b", ""]
    plain = {"generator": None, "synced": False, "on_token": None, "with_logprobs": False, "with_hidden": False}
    assert [asked for _, asked in engine.asked] == [options, plain]
    for given, _ in engine.asked:
        assert all(a is b for a, b in zip(given, (batch.prompt_ids, batch.prompt_mask, sampling), strict=True))
