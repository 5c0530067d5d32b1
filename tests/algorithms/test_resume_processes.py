"""On several processes, too, a run that is cut and resumed ends as one that was not.

`MATRIX=full` takes every stage on every strategy, as `make torture` does.
"""

import json
import os
from functools import partial

import pytest

from helpers import stage_runs
from helpers.forked import run_ranks
from helpers.resumed_runs import BATCHES, CUT_AFTER, EPOCHS, cut_and_resume
from helpers.stages import save_llama, save_reward_model

STAGES = {"ddp": ["sft", "reward"], "zero2": ["ppo"], "zero3": ["sft"]}
if os.environ.get("MATRIX") == "full":
    STAGES = {strategy: [*stage_runs.STAGES] for strategy in ("ddp", "zero1", "zero2", "zero3")}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What came of all runs, made in one start of two processes."""
    root = tmp_path_factory.mktemp("models")
    base = save_llama(root / "llama", hidden_size=16)
    job = partial(cut_and_resume, STAGES, base, save_reward_model(root / "reward", base), str(root))

    ranks = run_ranks(["--version"], root, before=job, timeout=1200)

    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(rank.stderr[-3000:] for rank in ranks)
    return json.loads((root / "0.json").read_text())


@pytest.mark.parametrize("strategy", STAGES)
def test_two_processes_that_are_cut_end_as_if_they_had_not_been_cut(results, strategy):
    assert results[strategy].keys() == set(STAGES[strategy])
    for stage, (whole, resumed) in results[strategy].items():
        assert resumed["steps"] == whole["steps"] > 0
        assert resumed["weights"] == whole["weights"]
        assert any(name.startswith("val/") for name in whole["logged"])
        whole["logged"].pop("epoch")  # with each of the others
        for name, values in whole["logged"].items():
            assert len(values) == EPOCHS * BATCHES
            # The checkpoint was saved before its step was logged and validated.
            assert resumed["logged"][name] == values[CUT_AFTER - 1 :], (stage, name)
