"""docs/rejection.md: its loop of sampling and fine-tuning runs as it stands there, and so does its recipe."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.cli_runs import QUESTIONS, run, save_model, save_rows
from helpers.signatures import parameters
from helpers.stages import save_reward_model
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning import load_causal_lm
from rlhf_lightning.callbacks import KeepBestByReward
from rlhf_lightning.cli.sample import sample

PAGE = (Path(__file__).parents[1] / "docs" / "rejection.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
(LOOP,) = [text.splitlines() for kind, text in BLOCKS if kind == "bash"]
(RECIPE,) = [text for kind, text in BLOCKS if kind == "yaml"]
SMALL = {
    "sample": ["--k=4", "--max_new_tokens=8", "--unfinished=keep"],
    "fit": [
        *("--data.max_length=64", "--data.batch_size=4", "--data.validation_split=0.25", "--model.optimizer.lr=0.01"),
        *("--model.sampling.max_new_tokens=4", "--trainer.max_steps=2", "--trainer.accelerator=cpu"),
        *("--trainer.enable_progress_bar=false", "--report=false"),
    ],
}


@pytest.fixture(scope="module")
def working(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder after the page's commands."""
    folder = tmp_path_factory.mktemp("working")
    save_model(folder / "runs" / "sft" / "export")
    save_reward_model(folder / "runs" / "reward" / "export", str(folder / "runs" / "sft" / "export"), tiny_tokenizer())
    asked = [f"\n\nHuman: how do i {question} {i}?\n\nAssistant:" for i in range(4) for question in QUESTIONS]
    save_rows(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in asked])
    for line in LOOP:
        words = [word.replace("PROMPTS", "prompts.jsonl") for word in shlex.split(line)[1:]]
        ended = run(*words, *SMALL[words[0]], cwd=folder)
        assert ended.returncode == 0, f"{line}\n{ended.stderr}"
    return folder


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_each_round_asks_the_model_of_the_round_before(working):
    first, second = (rows_of(working / "runs" / "best" / f"{n}.jsonl") for n in (1, 2))
    assert len(first) + len(second) > 40
    assert {(row["iteration"], row["policy"], row["k"]) for row in first} == {("1", "runs/sft/export", 4)}
    assert {(row["iteration"], row["policy"], row["k"]) for row in second} == {("2", "runs/sft1/export", 4)}
    models = [load_causal_lm(working / "runs" / name / "export").state_dict() for name in ("sft", "sft1", "sft2")]
    for before, after in pairwise(models):
        assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_recipe_keeps_the_best_model(working):
    (working / "best.yaml").write_text(RECIPE)
    shutil.rmtree(working / "runs" / "sft1")
    line = re.findall(r"rlhf fit .*", RECIPE)[0].replace("...", LOOP[1].partition("sft.yaml")[2])
    ended = run(*shlex.split(line)[1:], *SMALL["fit"], "--trainer.val_check_interval=1", cwd=working)
    assert ended.returncode == 0, ended.stderr
    assert "the reward liked best 'runs/sft1/best_by_reward': val/reward_score" in ended.stderr
    for name in ("best_by_reward", "export"):
        load_causal_lm(working / "runs" / "sft1" / name)


def test_what_the_page_names_exists():
    named = set(re.findall(r"`--(\w+)[ `]", PAGE))
    assert len(named) > 7
    assert named <= {*parameters(sample), "tasks"}
    assert {"reward", "num_prompts", "data", "sampling"} <= set(parameters(KeepBestByReward))
