"""What a policy says outside of training is what the engine says, whatever stands beside it."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.models import save_folder, tiny_causal_lm
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.chat.written import WrittenPrompt
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation import Policy
from rlhf_lightning.generation.sampling import Sampling
from rlhf_lightning.models.rendering import RENDERING, rendering_of

PROMPTS = [WrittenPrompt(text) for text in ("the cat", "a dog sat on the mat and", "it", "where is")]
SAMPLING = Sampling(max_new_tokens=6)


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Policy:
    folder = save_folder(tmp_path_factory.mktemp("policy"), tiny_causal_lm(), tiny_tokenizer())
    return Policy.load(folder, batch_size=3)


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(len(PROMPTS))), count=st.integers(1, len(PROMPTS)))
def test_an_answer_depends_on_its_own_prompt_and_place_alone(policy, order, count):
    def ask(rows):
        random = policy.row_generators(3, [(row,) for row in rows])
        return policy.answer([PROMPTS[row] for row in rows], SAMPLING, random, with_logprobs=True)

    whole = ask(range(len(PROMPTS)))
    for row, answer in zip(order[:count], ask(order[:count]), strict=True):
        assert answer.ids.tolist() == whole[row].ids.tolist()
        assert answer.text == whole[row].text
        torch.testing.assert_close(answer.logprobs, whole[row].logprobs, atol=1e-4, rtol=1e-4)


def test_log_probabilities_are_those_that_were_drawn_by(policy):
    answers = policy.answer(PROMPTS, SAMPLING, torch.Generator().manual_seed(1), with_logprobs=True)
    said = policy.logprobs([answer.prompt_ids for answer in answers], [answer.ids for answer in answers], max_tokens=24)
    for answer, logprobs in zip(answers, said, strict=True):
        torch.testing.assert_close(answer.logprobs, logprobs, atol=1e-4, rtol=1e-4)


def test_a_prompt_beyond_the_context_loses_its_beginning(policy):
    long = WrittenPrompt(" ".join(["dog"] * 200) + " end")
    batch = policy.read([long], room=6)
    assert batch.prompt_ids.shape[1] == policy.context - 6
    assert batch.prompts[0].endswith("end")
    assert batch.written == [long]
    (answer,) = policy.answer([long], SAMPLING)
    assert 1 <= len(answer.ids) <= 6


def test_a_response_longer_than_the_context_is_refused(policy):
    with pytest.raises(UserError, match="lower max_new_tokens"):
        policy.read(PROMPTS, room=policy.context)


def test_dialogues_are_written_as_the_model_says_it_was_taught(tmp_path):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    tokenizer, model = tiny_tokenizer(), tiny_causal_lm()
    tokenizer.chat_template = template
    asked = [WrittenPrompt([{"role": "user", "content": "hi"}])]
    assert "<user>hi" in Policy(model, tokenizer).read(asked).prompts[0]
    setattr(model.config, RENDERING, rendering_of(ChatEncoder(tokenizer, "plain")))
    folder = save_folder(tmp_path, model, tokenizer)
    assert "Human: hi" in Policy.load(folder).read(asked).prompts[0]


@settings(max_examples=15, deadline=None)
@given(rows=st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, max_size=4), temperature=st.sampled_from([0.0, 1.5]))
def test_a_stream_grows_into_the_answer(policy, rows, temperature):
    prompts, sampling = [PROMPTS[row] for row in rows], Sampling(temperature=temperature, max_new_tokens=6)
    places = [(row,) for row in rows]
    *steps, last = policy.stream(prompts, sampling, policy.row_generators(3, places))
    answers = policy.answer(prompts, sampling, policy.row_generators(3, places))
    for i, answer in enumerate(answers):
        assert last[i].text == answer.text
        assert last[i].raw == answer.raw
        assert last[i].ids.tolist() == answer.ids.tolist()
        assert last[i].ended == answer.ended
        grown = [step[i] for step in (*steps, last)]
        for before, after in itertools.pairwise(grown):
            assert after.text.startswith(before.text)
            assert after.ids[: len(before.ids)].tolist() == before.ids.tolist()
    assert max(len(answer.ids) for answer in last) == len(steps) + 1 or len(rows) > 3, "one step for each token"


def test_a_stream_can_be_stopped_and_leaves_the_model_as_it_was(policy):
    kinds = [type(module) for module in policy.model.modules()]
    attention = policy.model.config._attn_implementation
    steps = policy.stream(PROMPTS[:1], SAMPLING)
    (first,) = next(steps)
    assert len(first.ids) == 1
    steps.close()
    assert [type(module) for module in policy.model.modules()] == kinds
    assert policy.model.config._attn_implementation == attention
    assert torch.is_grad_enabled()


def test_an_answer_that_is_interrupted_leaves_the_model_as_it_was(policy):
    kinds, attention = [type(module) for module in policy.model.modules()], policy.model.config._attn_implementation

    def interrupt(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        policy.answer(PROMPTS, SAMPLING, on_token=interrupt)
    assert caught.tb, "which keeps every frame alive"
    assert [type(module) for module in policy.model.modules()] == kinds
    assert policy.model.config._attn_implementation == attention
