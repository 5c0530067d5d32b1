"""A judge of texts says what the reward model says in its own training, and what a function returns."""

from __future__ import annotations

import pytest
import torch

from helpers.stages import save_llama, save_reward_model, share_of_letters
from rlhf_lightning.chat.written import WrittenPrompt
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation import Judge

PROMPTS = [WrittenPrompt("\n\nHuman: hi\n\nAssistant:"), WrittenPrompt("the cat"), WrittenPrompt("a dog sat on")]
RESPONSES = ["hello there", " sat", " the mat and slept"]


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> Judge:
    folder = tmp_path_factory.mktemp("models")
    return Judge.load(save_reward_model(folder / "reward", save_llama(folder / "base")))


def test_scores_do_not_depend_on_the_company(judge):
    together = judge.scores(PROMPTS, RESPONSES, max_tokens=40)
    alone = torch.cat([judge.scores([p], [r]) for p, r in zip(PROMPTS, RESPONSES, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert len(set(together.tolist())) == 3


def test_a_response_that_was_cut_is_read_without_its_end(judge):
    assert judge.scores(PROMPTS[:1], RESPONSES[:1], [True]) != judge.scores(PROMPTS[:1], RESPONSES[:1], [False])


def test_a_function_is_given_prompts_as_people_read_them():
    seen = []

    def record(prompts, responses):
        seen.extend(zip(prompts, responses, strict=True))
        return share_of_letters(prompts, responses)

    judge = Judge.load(record)
    assert judge.name == "record"
    assert judge.scores(PROMPTS, RESPONSES).tolist() == pytest.approx(share_of_letters([], RESPONSES))
    assert seen[0] == ("hi", "hello there")


def test_a_function_that_returns_nonsense_is_named():
    with pytest.raises(UserError, match="'<lambda>' returned 0 scores for 3 responses"):
        Judge.load(lambda prompts, responses: []).scores(PROMPTS, RESPONSES)
