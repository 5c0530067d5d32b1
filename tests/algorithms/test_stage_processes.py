"""Every stage on two processes, under DDP and real DeepSpeed, is the same run as on one process."""

import pytest
import torch

from helpers.distributed import run_in_processes
from helpers.models import save_folder
from helpers.stage_runs import STAGES, run
from helpers.stages import save_llama, save_reward_model
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning import load_causal_lm, load_reward_model

STRATEGIES = ["ddp", "zero2", "zero3"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    base = save_llama(root / "llama", layers=1)  # test_strategies.py and test_resume_processes.py have two
    reference = load_causal_lm(base)
    with torch.no_grad():
        for weight in reference.parameters():
            weight.mul_(1.3)
    save_folder(root / "llama-reference", reference, tiny_tokenizer())
    return {"folder": base, "reward": save_reward_model(root / "reward", base)}


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def one(folders, exports):
    return {stage: run(stage, "auto", **folders, export=str(exports / f"{stage} auto")) for stage in STAGES}


@pytest.fixture(scope="module")
def two(folders, exports):
    """Every run of this file on two processes, started once; (stage, strategy), or `skips` -> result of each rank."""
    names = [(stage, name) for name in STRATEGIES for stage in STAGES]
    runs = [{"stage": s, "name": n, "export": str(exports / f"{s} {n}"), **folders} for s, n in names]
    skips = {"folder": folders["folder"], "root": str(exports / "skips")}
    results = run_in_processes("helpers.stage_runs:run_all", runs=runs, skips=skips)
    return dict(zip([*names, "skips"], zip(*results, strict=True), strict=True))


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_as_one(one, two, stage, name):
    first, second = two[stage, name]
    assert first["steps"] == second["steps"] == one[stage]["steps"]
    assert first["after"].keys() == one[stage]["after"].keys()
    for when in ("before", "after"):
        for weight, expected in one[stage][when].items():
            torch.testing.assert_close(
                torch.tensor(first[when][weight]), torch.tensor(expected), atol=1e-5, rtol=0, msg=f"{when} {weight}"
            )
    assert first["before"] != first["after"]


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_log_as_one(one, two, stage, name):
    first, second = two[stage, name]
    parts = {metric for metric in one[stage]["metrics"] if metric.startswith("train/grad_norm_")}
    assert len(parts) == (2 if stage == "ppo" else 0)
    left_out = set() if name == "ddp" else parts  # ZeRO holds gradients in pieces
    assert one[stage]["metrics"].keys() - first["metrics"].keys() == left_out
    for metric, expected in one[stage]["metrics"].items():
        if metric in left_out:
            continue
        assert first["metrics"][metric] == pytest.approx(expected, abs=1e-4, rel=1e-4), metric
    assert {m: first["metrics"][m] for m in second["metrics"]} == second["metrics"]


@pytest.mark.parametrize("stage", STAGES)
def test_clipping_was_at_work(one, stage):
    assert min(one[stage]["metrics"]["train/grad_norm"]) > 0.1


@pytest.mark.parametrize("name", STRATEGIES)
def test_exports_hold_the_trained_weights(two, exports, name):
    for stage, load in [(stage, load_reward_model if stage == "reward" else load_causal_lm) for stage in STAGES]:
        loaded = load(exports / f"{stage} {name}")
        model = loaded if stage != "reward" else loaded.model
        (trained, _) = two[stage, name]
        for weight, tensor in model.state_dict().items():
            assert tensor.tolist() == trained["after"][f"0 {weight}"], weight


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.usefixtures("one", "two")
def test_reward_models_are_calibrated_over_all_processes(exports, name):
    single, loaded = load_reward_model(exports / "reward auto"), load_reward_model(exports / f"reward {name}")
    assert loaded.calibration.mean == pytest.approx(single.calibration.mean, abs=1e-5)
    assert loaded.calibration.std == pytest.approx(single.calibration.std, abs=1e-5)
    assert loaded.probe_error() < 1e-4


def test_a_step_is_skipped_on_all_processes(two, exports):
    """A bad row of one process leaves no trace on either."""
    for result in two["skips"]:
        assert result["skipped"]["skips"] == 1
        assert result["without"]["skips"] == 0
        assert result["skipped"]["steps"] == result["without"]["steps"] == 2
        assert result["skipped"]["weights"] == result["without"]["weights"] == two["skips"][0]["skipped"]["weights"]
    names = {f"1_rank{rank}.{kind}" for rank in (0, 1) for kind in ("pt", "txt")}
    assert {path.name for path in (exports / "skips" / "non_finite").iterdir()} == names
