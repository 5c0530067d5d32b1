"""What is sampled, where responses end, and what has no say in it."""

import math
from collections import Counter
from functools import wraps
from itertools import product

import pytest
import torch

from helpers.answers import generate
from helpers.models import table_lm, table_tokenizer, tiny_causal_lm
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.errors import UserError
from rlhf_lightning.forward.backbone import evaluation_mode
from rlhf_lightning.generation.decoding import takes_own_mask
from rlhf_lightning.generation.engine import Generation, decode_responses
from rlhf_lightning.generation.sampling import Sampling, sample_tokens

EOS = 3
P = [[0.7, 0.1, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4], [0.05, 0.15, 0.2, 0.6], [0.25, 0.35, 0.3, 0.1]]
CHAIN = [[1.0, 0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1.0], [0, 1.0, 0, 0]]
"""0 repeats itself for ever, 1 is followed by 2, 2 by the EOS."""
GREEDY = Sampling(temperature=0.0, max_new_tokens=4)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def answer(table, prompts, sampling, pad_id=0, generator=None, **options):
    """Generate after prompts of one token each."""
    ids = torch.tensor(prompts).unsqueeze(1)
    model, tokenizer = table_lm(table), table_tokenizer(pad_id)
    return generate(model, ids, torch.ones_like(ids).bool(), sampling, tokenizer, generator, **options)


def check_frequencies(counts, probabilities):
    """Chi-square test at 0.1%; what has probability 0 never occurs."""
    total = sum(counts.values())
    possible = {outcome: p for outcome, p in probabilities.items() if p > 0}
    assert set(counts) <= set(possible)
    statistic = sum((counts[o] - total * p) ** 2 / (total * p) for o, p in possible.items())
    freedom = len(possible) - 1
    # Wilson and Hilferty's approximation of the 99.9% quantile.
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3


def normalised(weights):
    return {token: weight / sum(weights) for token, weight in enumerate(weights)}


@pytest.mark.parametrize(
    ("sampling", "weights"),
    [
        (Sampling(), [0.1, 0.2, 0.3, 0.4]),
        (Sampling(temperature=0.5), [0.01, 0.04, 0.09, 0.16]),
        (Sampling(temperature=2.0), [math.sqrt(p) for p in P[1]]),
        (Sampling(top_k=3), [0, 0.2, 0.3, 0.4]),
        (Sampling(top_k=2, temperature=0.5), [0, 0, 0.09, 0.16]),
        (Sampling(top_k=99), [0.1, 0.2, 0.3, 0.4]),
        (Sampling(top_p=0.75), [0, 0.2, 0.3, 0.4]),
        (Sampling(top_p=0.6), [0, 0, 0.3, 0.4]),
        (Sampling(top_p=0.75, temperature=0.5), [0, 0, 0.09, 0.16]),  # temperature first
        (Sampling(top_k=3, top_p=0.7), [0, 0, 0.3, 0.4]),  # then top-k, then top-p: 0.7 / 0.9 is enough
    ],
    ids=str,
)
def test_tokens_are_drawn_with_their_probabilities(sampling, weights):
    logits = torch.tensor(P[1]).log().expand(20_000, 4)
    drawn = sample_tokens(logits, sampling, seeded())
    check_frequencies(Counter(drawn.tolist()), normalised(weights))


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(top_k=1), Sampling(top_p=0.05)], ids=str)
def test_only_the_most_likely_token(sampling):
    drawn = sample_tokens(torch.tensor(P).log().repeat(50, 1), sampling, seeded())
    assert drawn.tolist() == [0, 3, 3, 1] * 50


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_whole_responses_are_drawn_with_their_probabilities(temperature):
    table = [[p ** (1 / temperature) for p in row] for row in P]
    table = [[p / sum(row) for p in row] for row in table]
    expected = {(EOS,): table[1][EOS]}
    for first, second in product(range(3), range(4)):
        expected[first, second] = table[1][first] * table[first][second]
    assert sum(expected.values()) == pytest.approx(1)

    sampling = Sampling(temperature=temperature, max_new_tokens=2)
    generation = answer(P, [1] * 10_000, sampling, generator=seeded())
    rows = zip(generation.response_ids, generation.response_mask, strict=True)
    check_frequencies(Counter(tuple(ids[mask].tolist()) for ids, mask in rows), expected)


@pytest.mark.parametrize("pad_id", [0, EOS, None])
def test_where_responses_end(pad_id):
    generation = answer(CHAIN, [1, 2, 0], GREEDY, pad_id)
    filler = 0 if pad_id == 0 else EOS
    # Ended with an EOS; only an EOS; cut at the limit, made of token 0, which counts even where it is the pad token.
    ids = [[2, EOS, filler, filler], [EOS, filler, filler, filler], [0, 0, 0, 0]]
    assert generation.response_ids.tolist() == ids
    assert generation.response_mask.sum(dim=1).tolist() == [2, 1, 4]
    assert generation.response_mask[0].tolist() == [True, True, False, False]
    assert generation.ended.tolist() == [True, True, False]


def test_generation_stops_with_the_longest_response():
    steps = []
    generation = answer(CHAIN, [1, 2], Sampling(temperature=0.0, max_new_tokens=50), on_token=steps.append)
    assert generation.response_ids.tolist() == [[2, EOS], [EOS, 0]]
    assert steps == [1, 2]


def test_an_eos_at_the_limit_is_an_end():
    generation = answer(CHAIN, [1, 0], Sampling(temperature=0.0, max_new_tokens=2))
    assert generation.ended.tolist() == [True, False]
    assert generation.response_mask.all()


def test_min_new_tokens_puts_off_every_eos():
    # After b the EOS is most likely, then b itself.
    generation = answer(P, [2], Sampling(temperature=0.0, max_new_tokens=5, min_new_tokens=2))
    assert generation.response_ids.tolist() == [[2, 2, EOS]]
    assert generation.ended.tolist() == [True]
    sampled = answer(P, [2] * 500, Sampling(max_new_tokens=3, min_new_tokens=3), generator=seeded())
    assert not (sampled.response_ids == EOS).any()


def test_a_stop_string_ends_a_response_and_belongs_to_it():
    alternate = [[1.0, 0, 0, 0], [0, 0, 1.0, 0], [0, 1.0, 0, 0], [0, 0, 0, 1.0]]
    sampling = Sampling(temperature=0.0, max_new_tokens=6, stop_strings=["zz", "ab"])
    generation = answer(alternate, [1, 2, 0], sampling)
    # The prompt's own `a` does not make `ab` with the response's first `b`.
    assert decode_responses(table_tokenizer(), generation)[:2] == ["bab", "ab"]
    assert generation.response_mask.sum(dim=1).tolist() == [3, 2, 6]
    assert generation.ended.tolist() == [True, True, False]


def test_a_stop_string_ends_no_response_before_it_may_end():
    """As lm-human-preferences cuts a text at the first full stop from its 16th token on."""
    alternate = [[1.0, 0, 0, 0], [0, 0, 1.0, 0], [0, 1.0, 0, 0], [0, 0, 0, 1.0]]  # after a comes b, after b comes a

    def said(least, stop):
        sampling = Sampling(temperature=0.0, max_new_tokens=6, min_new_tokens=least, stop_strings=[stop])
        generation = answer(alternate, [1], sampling)
        return *decode_responses(table_tokenizer(), generation), generation.ended.item()

    assert said(0, "b") == ("b", True)
    assert said(1, "b") == said(2, "b") == ("bab", True)
    assert said(2, "ba") == ("baba", True)
    assert said(1, "ba") == ("ba", True)  # begun before, complete after
    assert said(6, "b") == ("bababa", False)


@pytest.mark.parametrize("extra", [2, [2], [EOS, 2]])
def test_every_eos_of_the_generation_config_ends_a_response(extra):
    model, ids = table_lm(CHAIN), torch.tensor([[1], [0]])
    model.generation_config.eos_token_id = extra
    generation = generate(model, ids, torch.ones_like(ids).bool(), GREEDY, table_tokenizer())
    assert generation.response_mask.sum(dim=1).tolist() == [1, 4]
    assert generation.response_ids[0, 0].item() == 2
    assert generation.ended.tolist() == [True, False]


@pytest.mark.parametrize("sampling", [Sampling(max_new_tokens=12), Sampling(temperature=0.0, max_new_tokens=12)])
def test_the_model_s_own_generation_config_has_no_influence(sampling):
    model, ids = tiny_causal_lm(), torch.tensor([[40, 41, 42], [50, 51, 52]])
    arguments = ids, torch.ones_like(ids).bool(), sampling, tiny_tokenizer()
    plain = generate(model, *arguments, seeded())
    model.generation_config.update(
        repetition_penalty=5.0, top_k=1, top_p=0.1, temperature=0.1, do_sample=True, max_new_tokens=2,
        no_repeat_ngram_size=1, suppress_tokens=plain.response_ids.flatten().tolist(), num_beams=3,
    )  # fmt: skip
    again = generate(model, *arguments, seeded())
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], again[:3], strict=True))


def test_random_numbers_come_from_the_generator_alone():
    model, ids = table_lm(P), torch.zeros(20, 1, dtype=torch.long)
    arguments = model, ids, ids == 0, Sampling(max_new_tokens=8), table_tokenizer()
    first = generate(*arguments, seeded(5))
    torch.rand(3)
    state = torch.get_rng_state()
    again = generate(*arguments, seeded(5))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.response_ids, again.response_ids)
    assert not torch.equal(first.response_ids, generate(*arguments, seeded(6)).response_ids)


def test_without_a_generator_the_global_one_is_used():
    with torch.random.fork_rng([]):
        runs = []
        for _ in range(2):
            torch.manual_seed(1)
            runs.append(answer(P, [0] * 20, Sampling(max_new_tokens=8)).response_ids)
    assert torch.equal(*runs)


def test_decoded_responses_continue_their_prompts():
    tokenizer = tiny_tokenizer()
    texts = [" can you help", "Mix flour, water", ""]
    rows = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in texts]
    length = max(map(len, rows))
    ids = torch.tensor([row + [77] * (length - len(row)) for row in rows])
    mask = torch.arange(length) < torch.tensor([[len(row)] for row in rows])
    assert decode_responses(tokenizer, Generation(ids, mask, mask.any(dim=1))) == texts


def test_evaluation_mode_is_left_again_after_an_error():
    model = torch.nn.Dropout().train()

    with pytest.raises(KeyError, match="False"), evaluation_mode(model):
        raise KeyError(model.training)
    assert model.training


def test_a_policy_without_any_eos_is_refused():
    tokenizer = table_tokenizer()
    tokenizer.eos_token = None
    ids = torch.tensor([[1]])
    with pytest.raises(UserError, match="no EOS token"):
        generate(table_lm(CHAIN), ids, ids.bool(), GREEDY, tokenizer)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"temperature": -0.1}, r"temperature \(-0.1\)"),
        ({"top_p": 0.0}, r"top_p \(0.0\)"),
        ({"top_p": 1.1}, r"top_p \(1.1\)"),
        ({"top_k": -1}, r"top_k \(-1\)"),
        ({"max_new_tokens": 0}, r"max_new_tokens \(0\) must be at least 1"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, r"min_new_tokens \(9\)"),
        ({"min_new_tokens": -1}, r"min_new_tokens \(-1\)"),
    ],
)
def test_impossible_sampling_is_refused(options, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        Sampling(**options)
    assert "\n" not in str(error.value)


def test_a_synced_rank_goes_on_until_the_last_rank_has_ended(monkeypatch):
    others_unfinished = iter([1, 1, 0])

    def all_reduce(unfinished, op):
        assert op == torch.distributed.ReduceOp.MAX
        unfinished.clamp_(min=next(others_unfinished))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    steps = []
    generation = answer(CHAIN, [2], GREEDY, synced=True, on_token=steps.append)
    assert steps == [1, 2, 3]
    assert generation.response_ids.tolist() == [[EOS]]
    assert generation.ended.tolist() == [True]


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([[True, True], [True, True]], None),
        ([[True, True], [False, True]], [[[[True, True, True]]], [[[False, True, True]]]]),
        ([[True], [False]], [[[[True, True]]], [[[False, True]]]]),  # a prompt without tokens is one pad wide
    ],
)
def test_a_model_is_given_the_mask_of_a_token_as_attention_takes_it(monkeypatch, mask, expected):
    """So that transformers need not look at it, for which a GPU would have to be waited for."""
    model, seen = tiny_causal_lm("llama"), []
    forward = model.base_model.forward

    @wraps(forward)
    def watched(input_ids, attention_mask, **kwargs):
        seen.append(attention_mask if input_ids.shape[1] == 1 else "of prompts")
        return forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    ids, mask = torch.tensor([[5, 6], [7, 8]])[:, : len(mask[0])], torch.tensor(mask)
    sampling = Sampling(temperature=0.0, max_new_tokens=2, min_new_tokens=2)
    generate(model, ids, mask, sampling, tiny_tokenizer())  # a model is tried out before its first use
    monkeypatch.setattr(model.base_model, "forward", watched)
    generate(model, ids, mask, sampling, tiny_tokenizer())
    last = seen[-1]
    assert (last if last is None else last.tolist()) == expected


@pytest.mark.parametrize("change", [{"alibi": True}, {"_attn_implementation": "eager"}])
def test_other_models_are_given_a_mask_of_columns(change):
    model = tiny_causal_lm("llama")
    assert takes_own_mask(model, [None, None])
    assert not takes_own_mask(model, [None, 4])
    setattr(model.config, *next(iter(change.items())))
    assert not takes_own_mask(model, [None, None])
