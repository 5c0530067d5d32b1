"""The same promises for every model family: logits, padding, log-probabilities, generation, dropout."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from helpers.answers import generate
from helpers.models import (
    FAMILIES,
    WITHOUT_CLASSIFIER,
    closeness,
    precise,
    spread_weights,
    tiny_causal_lm,
    with_dropout,
)
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.forward.hidden import hidden_states, response_hidden, response_logprobs
from rlhf_lightning.forward.output_layer import output_logits
from rlhf_lightning.functional import entropy
from rlhf_lightning.generation.sampling import Sampling
from rlhf_lightning.models.causal_lm import disable_dropout

PAD, EOS = 0, 2
PROMPTS = [[31], [40, 41, 42, 43, 44, 45], [50, 51, 52]]
RESPONSES = [[60, 61, 62, 63, EOS], [70, 71, 72, 73, 74], [EOS]]  # ended, cut at the limit, only EOS
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def sequences(left=0, right=0, pad_id=PAD):
    """Ids, sequence mask and response mask, with `left` and `right` columns of padding more than needed."""
    width, length = max(map(len, PROMPTS)) + left, max(map(len, RESPONSES)) + right
    rows, masks = [], []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        before, after = width - len(prompt), length - len(response)
        rows.append([pad_id] * before + prompt + response + [pad_id] * after)
        masks.append([False] * before + [True] * (len(prompt) + len(response)) + [False] * after)
    mask = torch.tensor(masks)
    return torch.tensor(rows), mask, mask[:, width:]


def naive_logprobs(model, temperature):
    """One response at a time, without any padding, from the logits of the model's own forward."""
    logprobs, entropies = [], []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logits = model(torch.tensor([prompt + response])).logits[0] / temperature
        rows = logits[len(prompt) - 1 : -1].log_softmax(dim=-1)
        logprobs.append([rows[r, token].item() for r, token in enumerate(response)])
        entropies.append(entropy(rows).tolist())
    return logprobs, entropies


@EVERY_FAMILY
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_logits_from_hidden_states_are_the_model_s_own(family, tied):
    model = precise(tiny_causal_lm(family, tie_word_embeddings=tied))
    ids, mask, _ = sequences()
    ours = output_logits(model, hidden_states(model, ids, mask))[mask]
    for row, prompt in enumerate(PROMPTS):
        whole = model(torch.tensor([prompt + RESPONSES[row]])).logits[0]
        lengths = mask.sum(dim=1)
        mine = ours[lengths[:row].sum() : lengths[: row + 1].sum()]
        torch.testing.assert_close(mine, whole, **closeness(model))


@EVERY_FAMILY
@torch.no_grad()
def test_response_logprobs_are_those_of_each_response_alone(family):
    model = precise(tiny_causal_lm(family))
    ids, mask, response_mask = sequences()
    logprobs, entropies = response_logprobs(model, ids, mask, response_mask, temperature=0.7, with_entropy=True)
    expected = naive_logprobs(model, temperature=0.7)
    for row, response in enumerate(RESPONSES):
        assert logprobs[row, : len(response)].tolist() == pytest.approx(expected[0][row], abs=closeness(model)["atol"])
        assert entropies[row, : len(response)].tolist() == pytest.approx(expected[1][row], abs=closeness(model)["atol"])
        assert not logprobs[row, len(response) :].any()
        assert not entropies[row, len(response) :].any()


@EVERY_FAMILY
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(family):
    model = precise(tiny_causal_lm(family))
    plain, _ = response_logprobs(model, *sequences())
    for pad_id in (PAD, EOS, 99):
        padded, _ = response_logprobs(model, *sequences(left=3, right=2, pad_id=pad_id))
        torch.testing.assert_close(padded[:, : plain.shape[1]], plain, **closeness(model))
        assert not padded[:, plain.shape[1] :].any()


@EVERY_FAMILY
def test_greedy_generation_is_that_of_transformers(family):
    model = tiny_causal_lm(family, seed=3, tie_word_embeddings=False)
    ids, mask, _ = sequences()
    prompt_ids, prompt_mask = ids[:, :6], mask[:, :6]
    theirs = model.generate(prompt_ids, attention_mask=prompt_mask.long(), do_sample=False, max_new_tokens=9)
    model.train()
    ours = generate(model, prompt_ids, prompt_mask, Sampling(temperature=0.0, max_new_tokens=9), tiny_tokenizer())
    assert model.training
    assert torch.equal(ours.response_ids, theirs[:, 6:])
    assert len(set(ours.response_ids[ours.response_mask].tolist())) > 3  # it says something

    for row, prompt in enumerate(PROMPTS):  # nor does a prompt's company matter
        prompt = torch.tensor([prompt])
        sampling = Sampling(temperature=0.0, max_new_tokens=9)
        alone = generate(model, prompt, torch.ones_like(prompt).bool(), sampling, tiny_tokenizer())
        assert torch.equal(alone.response_ids[0], ours.response_ids[row, ours.response_mask[row]])


@EVERY_FAMILY
@pytest.mark.parametrize("kind", [AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_disable_dropout_leaves_nothing_to_chance(family, kind):
    if kind is AutoModelForSequenceClassification and family in WITHOUT_CLASSIFIER:
        kind = AutoModelForCausalLM
    config = with_dropout(family)
    asked_for = config.to_dict()
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = precise(kind.from_config(config)).train()
        spread_weights(model)
        ids, mask, _ = sequences()
        assert not torch.equal(hidden_states(model, ids, mask), hidden_states(model, ids, mask))

        disable_dropout(model)
        once, again = hidden_states(model, ids, mask), hidden_states(model, ids, mask)
    assert torch.equal(once, again)
    torch.testing.assert_close(once[mask], hidden_states(model.eval(), ids, mask)[mask], **closeness(model))
    saved = model.config.to_dict()
    assert {k: v for k, v in saved.items() if "drop" in k} == {k: v for k, v in asked_for.items() if "drop" in k}


def test_response_hidden_starts_one_before_the_response():
    model = tiny_causal_lm("llama")
    ids, mask, response_mask = sequences()
    length = response_mask.shape[1]
    whole = hidden_states(model, ids, mask)
    assert torch.equal(response_hidden(model, ids, mask, length), whole[:, ids.shape[1] - length - 1 : -1])


def test_gradients_of_logprobs_reach_the_policy():
    model = tiny_causal_lm("llama")
    logprobs, _ = response_logprobs(model, *sequences())
    logprobs.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
