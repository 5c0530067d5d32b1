"""Stages with compiled layers train as without, and go on bit for bit where they are resumed."""

import pytest
import torch
from test_stage_resume import KEPT, STAGES, WITHIN, Cut, assert_same, run
from torch._dynamo.testing import CompileCounterWithBackend

from helpers.compiling import use_backend
from helpers.stages import fit, save_llama, save_reward_model
from rlhf_lightning.forward import compiled_layers

CLOSE = {"atol": 1e-3, "rtol": 1e-3}
"""Of what is logged, after six steps in float32, whose rounding each step amplifies."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    base = save_llama(root / "llama", layers=1)
    return {"base": base, "reward": save_reward_model(root / "reward", base)}


def forget():
    """As in a new process."""
    torch._dynamo.reset()
    compiled_layers._states.clear()


def with_layers(built, compiled):
    """A module and its data, with `compile` or without."""
    built[0].compiles_layers = compiled
    return built


@pytest.mark.long
@pytest.mark.parametrize("stage", list(STAGES))
def test_a_stage_logs_what_it_logs_without(stage, folders, monkeypatch):
    counter = CompileCounterWithBackend("aot_eager")
    use_backend(monkeypatch, counter)
    forget()
    logs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        logs.append(fit(*with_layers(STAGES[stage][0](folders), compiled), max_epochs=1, limit_val_batches=1))
        assert bool(counter.frame_count) is compiled
    plain, found = logs
    for name in ("train/loss", "train/grad_norm", "val/loss", "val/kl"):
        if plain.series(name):
            assert found.series(name) == pytest.approx(plain.series(name), rel=CLOSE["rtol"], abs=CLOSE["atol"]), name
    assert counter.frame_count <= 4 * 6  # four parts of a layer, with gradients and without, for a row and for several


@pytest.mark.long
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_cut_run_ends_as_if_it_had_not_been_cut(stage, folders, tmp_path, monkeypatch):
    """Code is generated anew, and the first batch that is compiled for is another than in the uninterrupted run."""
    build, steps = STAGES[stage]
    monkeypatch.setitem(STAGES, stage, (lambda folders: with_layers(build(folders), True), steps))
    forget()
    _, whole = run(stage, folders)
    forget()
    with pytest.raises(Cut):
        run(stage, folders, tmp_path, WITHIN)
    forget()
    _, resumed = run(stage, folders, ckpt_path=tmp_path / f"step={WITHIN * steps}.ckpt")
    for name in KEPT:
        assert_same(resumed[name], whole[name], name)
