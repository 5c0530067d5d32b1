"""The models of a page: what a name stands for, answers as they come, and the scores of their tokens."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

from helpers.chat_page import tiny_models
from helpers.stages import save_llama, share_of_letters
from rlhf_lightning.app.models import Ask, Models, model_folders
from rlhf_lightning.chat.written import WrittenPrompt
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation import Policy
from rlhf_lightning.generation.engine import TransformersEngine
from rlhf_lightning.generation.sampling import Sampling

ASKED = WrittenPrompt([{"role": "user", "content": "how do i bake bread?"}])
SAMPLING = Sampling(max_new_tokens=8)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny_models(tmp_path_factory.mktemp("models"))


def test_a_run_stands_for_its_exports(tmp_path):
    for place in ("export", "checkpoints/step=8-hf", "checkpoints/step=4-hf"):
        save_llama(tmp_path / place)
    (tmp_path / "checkpoints" / "empty-hf").mkdir()
    found = model_folders(str(tmp_path))
    assert [str(Path(name).relative_to(tmp_path)) for name in found] == [
        "export",
        "checkpoints/step=4-hf",
        "checkpoints/step=8-hf",
    ]
    assert model_folders(found[0]) == found[:1]
    assert model_folders("owner/name") == ["owner/name"]
    assert Models([str(tmp_path), found[0]]).choices == found
    with pytest.raises(UserError, match="holds no model"):
        model_folders(str(tmp_path / "checkpoints" / "empty-hf"))


def test_answers_are_those_of_the_models_alone(models):
    asks = [Ask(models.choices[i], ASKED, (place,)) for i, place in ((0, 1), (1, 1), (0, 2))]
    *steps, last = models.stream(asks, SAMPLING, seed=5)
    for answer, ask in zip(last, asks, strict=True):
        policy = Policy.load(ask.model)
        policy.engine = TransformersEngine(policy.model, policy.tokenizer, half_weights=True)
        (alone,) = policy.answer([ASKED], SAMPLING, policy.row_generators(5, [ask.place]))
        assert answer.ids.tolist() == alone.ids.tolist()
    assert all(len(step) == 3 for step in steps)


def test_answers_are_written_from_half_weights_unless_a_type_is_asked_for(models):
    for dtype, halved in (("auto", True), ("float32", False)):
        engine = Models(models.choices, dtype=dtype).load(models.choices[0]).engine
        assert (engine.half_weights is not None) is halved


def test_a_stop_ends_the_answers_where_they_are(models):
    stopped = Event()
    steps = models.stream([Ask(models.choices[0], ASKED)], Sampling(max_new_tokens=24, min_new_tokens=24), 1, stopped)
    next(steps)
    stopped.set()
    assert len([*steps, None]) < 24


def test_whoever_goes_away_leaves_the_models_to_the_others(models, monkeypatch):
    whole, closed = Policy.stream, Event()

    def endlessly(self, *args):
        try:
            for step in whole(self, *args):
                while True:
                    yield step
        finally:
            closed.set()

    monkeypatch.setattr(Policy, "stream", endlessly)
    steps = models.stream([Ask(models.choices[0], ASKED)], SAMPLING, 1)
    next(steps)
    steps.close()
    assert closed.wait(20)
    monkeypatch.undo()
    assert list(models.stream([Ask(models.choices[0], ASKED)], SAMPLING, 1))


def test_many_at_once_get_what_each_gets_alone(models):
    def ask(place):
        return [*models.stream([Ask(models.choices[0], ASKED, (place,))], SAMPLING, 1)][-1][0].ids.tolist()

    with ThreadPoolExecutor(8) as visitors:
        assert list(visitors.map(ask, range(8))) == [ask(place) for place in range(8)]


def test_what_fails_is_told_to_whoever_asked(models):
    with pytest.raises(UserError, match="is none of the models here"):
        list(models.stream([Ask("another", ASKED)], SAMPLING, 1))
    with pytest.raises(UserError, match="lower max_new_tokens"):
        list(models.stream([Ask(models.choices[0], ASKED)], Sampling(max_new_tokens=500), 1))
    assert list(models.stream([Ask(models.choices[0], ASKED)], SAMPLING, 1)), "and the next one is answered"


def test_the_last_token_has_the_score_of_the_whole(models):
    for ended in (True, False):
        verdict = models.verdict(ASKED, "mix flour and water 🍞", ended)
        _, answer = models.judge.scores_by.chat.encode_dialogue(ASKED.prompt, "mix flour and water 🍞", ended=ended)
        assert len(verdict.tokens) == len(answer)
        assert verdict.tokens[-1].score == pytest.approx(verdict.score, abs=1e-4)
        assert "".join(token.text for token in verdict.tokens).strip() == "mix flour and water 🍞"
    half = models.verdict(ASKED, "mix flour and", False)
    whole = models.verdict(ASKED, "mix flour and water", False)
    assert [t.score for t in whole.tokens[: len(half.tokens)]] == pytest.approx(
        [t.score for t in half.tokens], abs=1e-4
    )


def test_a_function_scores_whole_answers(models):
    scored = Models(models.choices[:1], "helpers.stages.share_of_letters")
    verdict = scored.verdict(ASKED, "a1")
    assert verdict.score == pytest.approx(share_of_letters([""], ["a1"])[0])
    assert verdict.tokens == []
    assert Models(models.choices[:1]).verdict(ASKED, "a") is None
