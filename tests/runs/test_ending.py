"""A run that is over says so, and within which limits."""

from __future__ import annotations

import json
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.demos.boring_classes import BoringModel

from rlhf_lightning.runs.ending import MARK, limits_of, mark_finished, steps_when_finished


def trainer(tmp_path: Any, **settings: Any) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(accelerator="cpu", default_root_dir=tmp_path, **quiet | settings)


def test_the_limits_of_a_trainer(tmp_path):
    assert limits_of(trainer(tmp_path)) == {"max_epochs": None, "max_steps": None, "max_time": None}
    assert limits_of(trainer(tmp_path, max_steps=3)) == {"max_epochs": None, "max_steps": 3, "max_time": None}
    both = trainer(tmp_path, max_epochs=2, max_time="00:01:00:00")
    assert limits_of(both) == {"max_epochs": 2, "max_steps": None, "max_time": 3600.0}


@pytest.mark.parametrize(
    "limit", [{"max_steps": 2}, {"max_epochs": 1, "limit_train_batches": 2, "max_time": "01:00:00:00"}]
)
def test_a_run_that_has_ended_is_over_until_a_limit_is_raised(tmp_path, limit):
    limit = {"limit_val_batches": 0, **limit}
    run = trainer(tmp_path, **limit)
    before = limits_of(run)
    mark_finished(run, before)  # it has not trained
    assert steps_when_finished(tmp_path, before) is None
    run.fit(BoringModel())
    mark_finished(run, before)
    assert [path.name for path in tmp_path.iterdir()] == [MARK]
    assert json.loads((tmp_path / MARK).read_text())["limits"] == before
    assert steps_when_finished(tmp_path, before) == 2
    for name, value in before.items():
        assert steps_when_finished(tmp_path, {**before, name: value and value - 1}) == 2
        if value is not None:
            assert steps_when_finished(tmp_path, {**before, name: value + 1}) is None
            assert steps_when_finished(tmp_path, {**before, name: None}) is None
        else:
            assert steps_when_finished(tmp_path, {**before, name: 1}) == 2


@pytest.mark.parametrize("content", ["", "[]", "null", '{"steps": 2}', '{"steps": 2, "limits": {}}', "[" * 100_000])
def test_half_a_mark_is_none(tmp_path, content):
    (tmp_path / MARK).write_text(content)
    assert steps_when_finished(tmp_path, {"max_epochs": 1, "max_steps": None, "max_time": None}) is None


def test_a_trial_run_is_no_run(tmp_path):
    run = trainer(tmp_path, fast_dev_run=True)
    run.fit(BoringModel())
    mark_finished(run, limits_of(run))
    assert not (tmp_path / MARK).exists()
