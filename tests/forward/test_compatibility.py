"""Models that keep a state, read padding or count in ways of their own: right, or refused in one line."""

import warnings

import pytest
import torch

from helpers.answers import generate
from helpers.models import DROPOUT, tiny_causal_lm
from helpers.other_families import REFUSED, RIGHT, other_causal_lm
from helpers.prefixes import shared_hidden_states
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.errors import UserError
from rlhf_lightning.forward.hidden import (
    hidden_states,
    response_logprobs,
    takes_left_padding,
    unpadded_hidden_states,
)
from rlhf_lightning.forward.numerics import tolerance
from rlhf_lightning.forward.packed import packing_error
from rlhf_lightning.generation.decoding import supports_cache
from rlhf_lightning.generation.sampling import Sampling

PROMPTS = [[31, 45, 77, 90], [40], [50, 51]]
RESPONSES = [[60, 61, 62], [70, 71, 72, 73], [80]]
EVERY_FAMILY = pytest.mark.parametrize("family", RIGHT)
LONGEST = 6


def sequences(left=0):
    """Prompts padded on the left, responses on the right, both with the id of a real token; masks of both."""
    rows = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        before, after = 4 - len(prompt) + left, 4 - len(response)
        real = [False] * before + [True] * (len(prompt) + len(response)) + [False] * after
        rows.append(([33] * before + prompt + response + [33] * after, real))
    ids, mask = torch.tensor([row for row, _ in rows]), torch.tensor([real for _, real in rows])
    return ids, mask, mask[:, 4 + left :]


@EVERY_FAMILY
@torch.no_grad()
def test_log_probabilities_are_those_of_the_model_s_own_forward(family):
    model = other_causal_lm(family)
    for left in (0, 2):
        ids, mask, response_mask = sequences(left)
        logprobs, _ = response_logprobs(model, ids, mask, response_mask)
        for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            logits = model(torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).squeeze(1)
            torch.testing.assert_close(logprobs[row, : len(response)], expected, atol=2e-4, rtol=1e-4)


@EVERY_FAMILY
@torch.no_grad()
def test_answers_are_the_most_likely_tokens_of_a_forward_over_the_whole_text(family):
    model = other_causal_lm(family)
    ids, mask, _ = sequences()
    sampling = Sampling(temperature=0.0, max_new_tokens=LONGEST, min_new_tokens=LONGEST)
    answers = generate(model, ids[:, :4], mask[:, :4], sampling, tiny_tokenizer()).response_ids
    for row, prompt in enumerate(PROMPTS):
        text = prompt
        for _ in range(LONGEST):
            logits = model(torch.tensor([text]), use_cache=False).logits[0, -1]
            logits[2] = float("-inf")  # the EOS
            text = [*text, int(logits.argmax())]
        assert answers[row].tolist() == text[len(prompt) :]


@EVERY_FAMILY
@torch.no_grad()
def test_other_layouts_of_rows_are_right_or_not_used(family):
    model = other_causal_lm(family)
    pairs = torch.tensor([[[31, 45, 77, 90, 60], [31, 45, 77, 91, 33]]])
    mask = torch.ones_like(pairs).bool()
    mask[:, 1, 4] = False
    alone = [model.base_model(pairs[0, k, : 5 - k][None], use_cache=False).last_hidden_state[0] for k in (0, 1)]
    shared = shared_hidden_states(model, pairs, mask)
    torch.testing.assert_close(shared[0, 0], alone[0], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(shared[0, 1, :4], alone[1], atol=1e-4, rtol=1e-3)
    if (row := unpadded_hidden_states(model, pairs[0], mask[0])) is not None:
        torch.testing.assert_close(row[mask[0]], torch.cat(alone), atol=1e-4, rtol=1e-3)
    if packing_error(model, torch.arange(40, 56)) > tolerance(model):
        return  # and `check_packing` refuses it
    packed = torch.cat([pairs[0, 0], pairs[0, 1, :4]])[None]
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    found = hidden_states(model, packed, torch.ones_like(packed).bool(), positions)[0]
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_right_is_refused_in_one_line(family):
    model = other_causal_lm(family)
    ids, mask, _ = sequences()
    for _ in range(2):
        with pytest.raises(UserError, match=REFUSED[family][1]) as error:
            hidden_states(model, ids, mask)
        assert "\n" not in str(error.value)
    for shared in (False, True):
        pairs = torch.tensor([[[31, 45, 77, 90, 60], [31, 45, 77, 91 if shared else 33, 33]]])
        with pytest.raises(UserError, match=REFUSED[family][1]):
            shared_hidden_states(model, pairs, torch.ones_like(pairs).bool())
    with pytest.raises(UserError, match=REFUSED[family][1]):
        generate(model, ids[:, :4], mask[:, :4], Sampling(max_new_tokens=2), tiny_tokenizer())


def test_a_model_is_tried_out_once_and_left_in_its_mode(monkeypatch):
    model = tiny_causal_lm("gpt2", **DROPOUT["gpt2"]).train()  # the trial itself leaves nothing out
    assert takes_left_padding(model)
    assert model.training
    monkeypatch.setattr(model.base_model, "forward", None)
    assert takes_left_padding(model)


@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_mamba", "jamba", "qwen3_next", "lfm2", "mixtral"])
def test_a_state_that_goes_from_token_to_token_is_kept(family):
    """Also where no layer attends, and a mask of the earlier tokens would be taken for one of the new."""
    assert supports_cache(other_causal_lm(family), tiny_tokenizer())


def test_a_model_that_forgets_is_read_again_with_a_line_that_says_so():
    ids, mask, _ = sequences()
    sampling = Sampling(temperature=0.0, max_new_tokens=2)
    model = other_causal_lm("rwkv")
    with pytest.warns(UserWarning, match="RwkvForCausalLM keeps what it has read") as said:
        generate(model, ids[:, :4], mask[:, :4], sampling, tiny_tokenizer())
    assert len([w for w in said if "keeps what" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, ids[:, :4], mask[:, :4], sampling, tiny_tokenizer())
