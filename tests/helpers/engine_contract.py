"""What every rollout engine must do, as functions that take a factory: `for check in CONTRACT: check(make_engine)`.

The model is a tiny one in float64, so that an engine which takes the same weights says the same tokens.
"""

from __future__ import annotations

import copy
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers import answers
from helpers.answers import model_of, responses
from helpers.models import LAYOUTS
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.errors import UserError
from rlhf_lightning.forward.hidden import response_hidden, response_logprobs
from rlhf_lightning.generation.engine import EngineFactory, Generation, RolloutEngine, respond
from rlhf_lightning.generation.sampling import Sampling
from rlhf_lightning.models.eos import eos_ids
from rlhf_lightning.models.tokenizer import filler_id

LENGTHS = [3, 17, 1, 9, 9, 12, 2]
GREEDY = Sampling(temperature=0.0, max_new_tokens=8)


def prompts(extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of prompts of several lengths, padded on the left by `extra` more than needed."""
    return answers.prompts(LENGTHS, extra)


def small(seed: int = 3) -> PreTrainedModel:
    """One layer, for engines that compile, and heads wide enough for those that ask for it."""
    model: PreTrainedModel = model_of("llama-wide-heads", seed, layers=1)
    return model


def a_model() -> PreTrainedModel:
    """Some of its greedy answers end by themselves, after different numbers of tokens, and some do not."""
    return copy.deepcopy(_a_model())


@cache
def _a_model() -> PreTrainedModel:
    model = small().double()
    tokens = [token for ids, _ in greedy(model, tiny_tokenizer(), GREEDY) for token in ids[1:5]]
    model.generation_config.eos_token_id = [2, *(token for token, _ in Counter(tokens).most_common(2))]
    return model


@torch.no_grad()
def greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Sampling
) -> list[tuple[list[int], bool]]:
    """The likeliest tokens after each prompt, read alone and without padding, and whether they end by themselves."""
    ends, found = eos_ids(tokenizer, model.generation_config.eos_token_id), []
    for prompt in responses(Generation(*prompts(), ended=torch.tensor([]))):
        said: list[int] = []
        ended = False
        while len(said) < sampling.max_new_tokens and not ended:
            logits = model(input_ids=torch.tensor([prompt + said]), use_cache=False).logits[0, -1]
            if len(said) < sampling.min_new_tokens:
                logits[ends] = float("-inf")
            said.append(int(logits.argmax()))
            text, begun = tokenizer.decode(said), tokenizer.decode(said[: sampling.min_new_tokens])
            later = [text.find(stop, max(0, len(begun) - len(stop) + 1)) for stop in sampling.stop_strings]
            ended = said[-1] in ends or max(later, default=-1) >= 0
        found.append((said, ended))
    return found


def ask(
    engine: RolloutEngine, sampling: Sampling, seed: int | list[int] = 0, extra: int = 0, **options: Any
) -> Generation:
    """What an engine says to the prompts, checked as far as it must be so of every answer.

    One seed is for all of them; of a list each has its own.
    """
    ids, mask = prompts(extra=extra)
    given = ids.clone(), mask.clone()
    seeds = [seed] if isinstance(seed, int) else seed
    random = [torch.Generator().manual_seed(each) for each in seeds]
    source = random[0] if isinstance(seed, int) else random
    generation = engine.generate(ids, mask, sampling, generator=source, **options)
    assert torch.equal(ids, given[0])
    assert torch.equal(mask, given[1])
    lengths = generation.response_mask.sum(dim=1)
    longest = generation.response_ids.shape[1]
    assert generation.response_ids.shape == generation.response_mask.shape == (len(LENGTHS), longest)
    assert generation.ended.shape == (len(LENGTHS),)
    dtypes = [field.dtype for field in generation[:3]]
    assert dtypes == [torch.long, torch.bool, torch.bool]
    assert torch.equal(generation.response_mask, torch.arange(longest) < lengths.unsqueeze(1))
    assert lengths.min() >= 1
    assert lengths.max() == longest <= sampling.max_new_tokens
    assert (lengths[~generation.ended] == sampling.max_new_tokens).all()
    return generation


def check_greedy(
    make: EngineFactory, sampling: Sampling, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[tuple[list[int], bool]]:
    """Temperature 0 takes the likeliest token of the plain model; what follows a response is filler."""
    model, tokenizer = a_model(), tokenizer or tiny_tokenizer()
    expected = greedy(model, tokenizer, sampling)
    generation = ask(make(model, tokenizer, None), sampling)
    assert list(zip(responses(generation), generation.ended.tolist(), strict=True)) == expected
    assert (generation.response_ids[~generation.response_mask] == filler_id(tokenizer)).all()
    return expected


def check_where_responses_end(make: EngineFactory) -> None:
    """The EOS belongs to its response, whatever the pad token is; without one a response is cut and has not ended."""
    for pad in ("own", "eos", "none"):
        expected = check_greedy(make, GREEDY, tiny_tokenizer(pad=pad))
        assert {ended for _, ended in expected} == {True, False}
        assert len({len(ids) for ids, _ in expected}) > 2


def check_limits(make: EngineFactory) -> None:
    """An EOS at the limit is an end, and none comes before the least number of tokens."""
    for most in (1, 3):
        check_greedy(make, Sampling(temperature=0.0, max_new_tokens=most))
    least = check_greedy(make, Sampling(temperature=0.0, max_new_tokens=9, min_new_tokens=4))
    assert min(len(ids) for ids, _ in least) > 4


def check_stop_strings(make: EngineFactory) -> None:
    """A response ends with the token that completes a stop string, which belongs to it."""
    tokenizer = tiny_tokenizer()
    plain = greedy(a_model(), tokenizer, GREEDY)
    longest = max(ids for ids, ended in plain if not ended)
    stop = tokenizer.decode(longest[3:5])
    stopped = check_greedy(make, Sampling(temperature=0.0, max_new_tokens=8, stop_strings=["no such text", stop]))
    assert stopped != plain
    # What is complete before the least number of tokens ends nothing; what becomes so with the next one does.
    settings = {"temperature": 0.0, "max_new_tokens": 8, "stop_strings": [stop]}
    before, at, after = (check_greedy(make, Sampling(**settings, min_new_tokens=least)) for least in (5, 4, 3))
    row = plain.index((longest, False))
    assert (at[row], after[row]) == ((longest[:5], True), (longest[:5], True))
    assert len(before[row][0]) > 5


def check_order(make: EngineFactory) -> None:
    """Answers come in the order of the prompts, however many are answered at once and however far they are padded."""
    model = a_model()
    expected = [ids for ids, _ in greedy(model, tiny_tokenizer(), GREEDY)]
    for size in (1, 5):
        assert responses(ask(make(model, tiny_tokenizer(), size), GREEDY, extra=2)) == expected


def check_sampling(make: EngineFactory) -> None:
    """Tokens are drawn as the settings say and from the generator alone; the model's own settings have no say."""
    model = a_model()
    likeliest = [ids for ids, _ in greedy(model, tiny_tokenizer(), GREEDY)]
    engine = make(model, tiny_tokenizer(), None)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 0.01}):
        assert responses(ask(engine, Sampling(max_new_tokens=8, **narrow))) == likeliest
    drawn = Sampling(max_new_tokens=8)
    state = torch.get_rng_state()
    first = responses(ask(engine, drawn, seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert first not in (likeliest, responses(ask(engine, drawn, seed=2)))
    own, others = [*range(len(LENGTHS))], [*range(1, len(LENGTHS) + 1)]
    each = responses(ask(engine, drawn, seed=own))
    assert each == responses(ask(engine, drawn, seed=own))
    assert each not in (likeliest, responses(ask(engine, drawn, seed=others)))
    model.generation_config.update(
        top_k=1, temperature=0.1, max_new_tokens=2, repetition_penalty=5.0, suppress_tokens=[*range(40, 80)]
    )
    assert responses(ask(make(model, tiny_tokenizer(), None), drawn, seed=1)) == first


def check_abilities(make: EngineFactory) -> None:
    """What an engine says it can return is what the plain model says; what it cannot is refused in one line."""
    model, tokenizer = a_model().train(), tiny_tokenizer()
    engine = make(model, tokenizer, None)
    ids, mask = prompts()
    batch = PromptBatch(ids, mask, [""] * len(ids), torch.arange(len(ids)))
    sampling = Sampling(max_new_tokens=6, temperature=0.7, top_k=9)
    for name, has in (("logprobs", engine.has_logprobs), ("hidden", engine.has_hidden)):
        asked: dict[str, Any] = {f"with_{name}": True, "generator": torch.Generator().manual_seed(0)}
        if not has:
            with pytest.raises(UserError, match=f"{type(engine).__name__} returns no ") as error:
                respond(engine, tokenizer, batch, sampling, **asked)
            assert "\n" not in str(error.value)
            continue
        generation, _ = respond(engine, tokenizer, batch, sampling, **asked)
        answered = generation.response_mask
        whole = torch.cat([ids, generation.response_ids], dim=1), torch.cat([mask, answered], dim=1)
        with torch.no_grad():
            expected, _ = response_logprobs(model, *whole, answered, sampling.temperature)
            if name == "hidden":
                expected = response_hidden(model, *whole, answered.shape[1]) * answered.unsqueeze(2)
        torch.testing.assert_close(getattr(generation, name), expected, **LAYOUTS)
    assert model.training


def check_sampler_logprobs(make: EngineFactory) -> None:
    """What an engine says of the distribution that it drew from is so: temperature, top-k and least length included."""
    model, tokenizer = a_model(), tiny_tokenizer()
    engine = make(model, tokenizer, None)
    for options in ({"temperature": 0.7}, {"top_k": 9}, {"top_p": 0.6, "temperature": 1.3}, {"min_new_tokens": 4}):
        sampling = Sampling(max_new_tokens=6, **options)
        generation = ask(engine, sampling)
        if generation.sampler_logprobs is None:
            continue
        for row, said in enumerate(generation.sampler_logprobs):
            length = int(generation.response_mask[row].sum())
            prompt = responses(Generation(*prompts(), ended=torch.tensor([])))[row]
            expected = _drawn_from(model, tokenizer, prompt, generation.response_ids[row, :length].tolist(), sampling)
            torch.testing.assert_close(said[:length], expected, atol=1e-2, rtol=0)
            assert not said[length:].any()


@torch.no_grad()
def _drawn_from(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int], said: list[int], sampling: Sampling
) -> torch.Tensor:
    """Log-probabilities of tokens under the distribution that they are to be drawn from."""
    logits = model(input_ids=torch.tensor([prompt + said]), use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    logits[: sampling.min_new_tokens, eos_ids(tokenizer, model.generation_config.eos_token_id)] = float("-inf")
    logits = logits / sampling.temperature
    if sampling.top_k:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[:, -1:], float("-inf"))
    if sampling.top_p < 1:
        ordered = logits.softmax(dim=1).sort(dim=1, descending=True)
        gone = ordered.values.cumsum(dim=1) - ordered.values >= sampling.top_p
        logits = logits.masked_fill(torch.zeros_like(gone).scatter(1, ordered.indices, gone), float("-inf"))
    return logits.log_softmax(dim=1).gather(1, torch.tensor(said).unsqueeze(1)).squeeze(1)


def check_sync_weights(make: EngineFactory) -> None:
    """After the weights have changed and been taken over, the answers are the new model's."""
    model, tokenizer = a_model(), tiny_tokenizer()
    engine = make(model, tokenizer, None)
    before = responses(ask(engine, GREEDY))
    model.load_state_dict(small(4).state_dict())
    engine.sync_weights()
    after = [ids for ids, _ in greedy(model, tokenizer, GREEDY)]
    assert after != before
    assert responses(ask(engine, GREEDY)) == after


def check_sleep_and_wake(make: EngineFactory) -> None:
    """A rollout, an update, and a rollout again: what an engine has laid down for the update it takes up again."""
    model, tokenizer = a_model(), tiny_tokenizer()
    engine = make(model, tokenizer, None)
    for seed in (4, 5):
        engine.wake()
        engine.sync_weights()
        assert responses(ask(engine, GREEDY)) == [ids for ids, _ in greedy(model, tokenizer, GREEDY)]
        engine.sleep()
        model.load_state_dict(small(seed).state_dict())


def check_on_token(make: EngineFactory) -> None:
    """Whoever listens is told ever more tokens, and never more than there can be."""
    told: list[int] = []
    ask(make(a_model(), tiny_tokenizer(), 5), GREEDY, on_token=told.append)
    assert told == sorted(set(told))
    assert all(0 < count <= 8 * 3 for count in told)


CONTRACT = [
    check_where_responses_end,
    check_limits,
    check_stop_strings,
    check_order,
    check_sampling,
    check_abilities,
    check_sampler_logprobs,
    check_sync_weights,
    check_sleep_and_wake,
    check_on_token,
]
