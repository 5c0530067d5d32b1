"""A run folder as data, whatever it lacks."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pytorch_lightning.loggers import CSVLogger

from helpers.runs import run, write_run
from rlhf_lightning.callbacks.samples import sample_section
from rlhf_lightning.errors import UserError
from rlhf_lightning.report.headline import differing_settings, headlines, summary_lines, verdict
from rlhf_lightning.report.run import read_run, read_runs
from rlhf_lightning.report.samples import Sample, read_samples

CARD = """---
tags:
- rlhf_lightning
---

# PPOModule export

Made by `rlhf_lightning`: stage `PPOModule`, started from `sft`, after 8 optimizer
steps.

## Settings

```yaml
module:
  ppo_epochs: 2
  rollout_batch_size: 4
  samples_per_prompt: 1
  minibatch_size: 2
```
"""


def logged(folder, **metrics):
    """A folder with a CSV of Lightning's."""
    folder.mkdir(parents=True, exist_ok=True)
    logger = CSVLogger(folder, name="", version="")
    logger.log_metrics(metrics or {"train/loss": 1.0}, 0)
    logger.save()
    return folder


written = st.text(st.characters(blacklist_categories=("Cs",)), min_size=1).filter(lambda text: text.strip())


@given(st.lists(st.tuples(written, written), min_size=1, max_size=3), st.lists(st.integers(0, 9), max_size=4))
def test_samples_are_read_as_they_were_written(pairs, steps):
    text = "".join(
        "\n\n".join([f"## Step {step}", *(sample_section(*pair) for pair in pairs)]) + "\n\n" for step in steps
    )
    read = read_samples(text)
    kept = [step for place, step in enumerate(steps) if all(step < later for later in steps[place + 1 :])]
    assert [*read] == kept
    for samples in read.values():
        assert [each.answer for each in samples] == [answer.strip() for _, answer in pairs]
        for sample, (prompt, _) in zip(samples, pairs, strict=True):
            assert sample.prompt == "\n".join(line.rstrip() for line in prompt.strip().splitlines())


def test_half_a_sample_at_the_end_is_left_out():
    text = "## Step 0\n\n" + sample_section("a", "b") + "\n\n## Step 1\n\n> a\n\n```text\nhal"
    assert read_samples(text) == {0: [Sample("a", "b")]}


def test_settings_come_from_the_fullest_record(tmp_path):
    folder = logged(tmp_path)
    assert (read_run(folder).settings, read_run(folder).stage) == ({}, "Run")
    (folder / "hparams.yaml").write_text("beta: 0.1\n")
    assert read_run(folder).settings == {"module": {"beta": 0.1}}
    (folder / "export").mkdir()
    (folder / "export/README.md").write_text(CARD)
    (folder / "samples.md").write_text("## Step 8\n\n" + sample_section("a", "b"))
    read = read_run(folder)
    assert read.stage == "PPO"
    assert [*read.samples] == [2], "in iterations, not in optimizer steps"
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"class_path": "mine.Own", "init_args": {}}}))
    assert read_run(folder).stage == "Own"


def test_what_is_broken_is_said_and_the_rest_read(tmp_path):
    folder = logged(tmp_path)
    (folder / "config.yaml").write_text("a: [")
    (folder / "evaluation.json").write_text("{")
    read = read_run(folder)
    assert read.problems[0] == f"'{folder / 'config.yaml'}' is no YAML that can be read"
    assert "evaluation.json is not what `rlhf evaluate` writes" in read.problems[1]
    assert "train/loss" in read.curves
    (folder / "evaluation.json").write_text(json.dumps({"version": 99}))
    assert "evaluation.json has version 99" in read_run(folder).problems[1]


@pytest.mark.parametrize(
    ("metric", "stage"),
    [
        ("train/value_loss", "PPO"),
        ("train/no_signal", "GRPO"),
        ("train/chosen_reward", "DPO"),
        ("train/chosen_score", "Reward model"),
        ("train/perplexity", "SFT"),
        ("train/own", "Run"),
    ],
)
def test_a_stage_without_settings_is_known_by_what_it_logged(tmp_path, metric, stage):
    assert read_run(logged(tmp_path, **{metric: 1.0})).stage == stage


def test_bad_folders_end_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"'.*nowhere' does not exist; pass the --trainer.default_root_dir of a run"):
        read_run(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file, not a run folder"):
        read_run(tmp_path / "file")
    with pytest.raises(UserError, match="holds no logs of TensorBoard or CSV that a report could show"):
        read_run(tmp_path)
    below = logged(tmp_path / "ppo")
    with pytest.raises(UserError, match=f"holds no logs, but {below} do; pass these"):
        read_run(tmp_path)


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [logged(tmp_path / name) for name in ("a/ppo", "b/ppo", "sft")]
    assert [each.name for each in read_runs([*folders, folders[0]])] == ["a/ppo", "b/ppo", "sft"]


def test_before_after_and_best():
    score, kl = headlines(run({"train/kl": [0.0] * 10 + [5.0] * 10, "val/score": [1.0, 3.0, 2.0]}))
    assert (score.before, score.after, score.best, score.best_at, score.better) == (1.0, 2.0, 3.0, 1.0, True)
    assert (kl.before, kl.after, kl.best, kl.better) == (0.0, 5.0, None, None)
    (loss,) = headlines(run({"val/loss": [2.0]}, stage="SFT"))
    assert (loss.before, loss.course, loss.better) == (None, "2", None)
    (worse,) = headlines(run({"val/loss": [2.0, 3.0]}, stage="SFT"))
    assert worse.better is False
    assert headlines(run({"val/loss": [float("nan")]}, stage="SFT")) == []


def test_the_verdict_says_what_happened():
    rising = [0.0, 1.0, 2.0, 3.0]
    assert "a judge that training has not seen must say" in verdict(run({"val/score": rising}))
    judged = {"val/score": rising, "judge/kl": rising}
    assert "over-optimised. The judge was best, 2, at iteration 1" in verdict(
        run({**judged, "judge/score": [0.0, 2.0, 1.0, 0.5]})
    )
    better = verdict(run({**judged, "judge/score": [0.0, 1.0, 1.9, 2.0]}))
    assert better.endswith("the answers became better, not only the score.")
    overfit = verdict(run({"val/loss": [3.0, 2.0, 2.5]}, stage="SFT"))
    assert "lowest, 2, at step 1 and has risen to 2.5" in overfit
    assert verdict(run({"val/loss": [3.0, 2.0]}, stage="SFT")) == "The held-out loss fell: 3 -> 2."
    assert "puts 70.0% of the held-out pairs" in verdict(run({"val/accuracy": [0.7]}, stage="Reward model"))
    assert verdict(run({}, stage="SFT")) == ""


def test_the_summary_fits_a_terminal(tmp_path):
    folder = logged(tmp_path, **{"val/score": 1.5, "train/kl": 2.0, "train/value_loss": 1.0})
    (folder / "export").mkdir()
    lines = summary_lines(read_run(folder), "there.html")
    assert [" ".join(line.split()) for line in lines] == [
        "PPO: 1 iteration",
        "Held-out score 1.5 best 1.5 at 1",
        "KL to the reference 2",
        "report there.html",
        f"export {folder / 'export'}",
    ]


def test_settings_that_differ_are_named():
    one, other = run({}), run({})
    one.settings["model"] = {"lr": 1, "same": [1, 2], "only": True}
    other.settings.update({"model": {"lr": 2, "same": [1, 2]}})
    both = [one._replace(settings={"model": {"lr": 1, "same": [1], "only": True}}), other]
    assert differing_settings([*both]) == {
        "model.lr": ["1", "2"],
        "model.same": ["[1]", "[1, 2]"],
        "model.only": ["True", "-"],
    }


def test_a_run_that_is_named_twice_is_one(tmp_path):
    write_run(tmp_path / "a", steps=2)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "b").mkdir()
    folders = [tmp_path / "a", tmp_path / "b" / ".." / "a", tmp_path / "link"]
    assert [run.folder for run in read_runs(folders)] == [tmp_path / "a"]
