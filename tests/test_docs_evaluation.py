"""docs/evaluation.md explains every number that `rlhf evaluate` gives, and its commands are taken."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from helpers.cli_runs import save_model
from helpers.stages import save_reward_model
from rlhf_lightning.cli.evaluate import list_words, settings_of
from rlhf_lightning.cli.recipes import resolve_recipes
from rlhf_lightning.evaluation.suite import evaluate
from rlhf_lightning.generation.sampling import Sampling

PAGE = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
EXPLAINED = set(re.findall(r"`(\w+)`", PAGE))
RANKED = [
    {"prompt": f"{i} a", "responses": ["a", "b", "c", "d"], "ranks": [1, 1 + i % 2, 2, 2], "margin": i}
    for i in range(4)
]
PAIRS = [{"prompt": f"{i} a", "chosen": "a b", "rejected": "c", "margin": float(i)} for i in range(4)]


def test_every_number_is_explained(tmp_path):
    model = str(save_model(tmp_path / "model"))
    reward = save_reward_model(tmp_path / "reward", model)
    options = {"part": "all", "sampling": Sampling(max_new_tokens=3)}
    asked = {"models": [model], "reference": model, "tasks": ["perplexity", "rouge", "kl"]}
    found = evaluate(PAIRS, **asked, **options, out=tmp_path / "models")
    ranked = evaluate(RANKED, rewards=[reward], **options, out=tmp_path / "rewards")
    metrics = {result.metric for result in [*found.results, *ranked.results]}
    assert metrics >= {"perplexity", "rouge_l", "kl_k3", "best_of_4", "ties_margin", "calibration_error"}
    assert metrics - EXPLAINED == set()
    assert {curve.metric for curve in ranked.curves} - EXPLAINED == set()


@pytest.mark.parametrize("line", re.findall(r"^rlhf evaluate .*$", PAGE, re.MULTILINE))
def test_its_commands_are_taken(line):
    settings = settings_of(list_words(resolve_recipes(shlex.split(line)[2:])))
    assert settings["data"] == "FILE"
    assert settings["models"] or settings["rewards"]
