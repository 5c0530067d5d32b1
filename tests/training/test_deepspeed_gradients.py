"""Gradients in bfloat16 training are summed in float32, over micro-batches and processes, on each stage of ZeRO."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.distributed import run_in_processes
from helpers.gradient_runs import reference
from helpers.strategy_runs import save_model
from rlhf_lightning import DeepSpeedStrategy
from rlhf_lightning.errors import UserError

pytestmark = pytest.mark.matrix

RUNS = [(stage, dtype) for stage in (1, 2, 3) for dtype in ("auto", "bfloat16")]
FLOAT32 = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("tiny"), layers=1)


@pytest.fixture(scope="module")
def results(folder: str) -> dict[tuple[int, str], dict[str, Any]]:
    runs = [{"stage": stage, "gradient_dtype": dtype, "folder": folder} for stage, dtype in RUNS]
    return dict(zip(RUNS, run_in_processes("helpers.gradient_runs:run_all", runs=runs)[0], strict=True))


def error(result: dict[str, Any], expected: dict[str, torch.Tensor]) -> float:
    """Norm of the difference, by that of the gradient that was expected."""
    found = {name: torch.tensor(value, dtype=torch.float64) for name, value in result["gradient"].items()}
    assert found.keys() == expected.keys()
    squares = sum((found[name] - expected[name]).square().sum() for name in found)
    return float((squares / sum(value.square().sum() for value in expected.values())).sqrt())


@pytest.fixture(scope="module")
def errors(results: Any, folder: str) -> dict[tuple[int, str, torch.dtype], float]:
    """By stage, by the type of the sum, and by that in which the reference computes each micro-batch."""
    references = {dtype: reference(folder, dtype) for dtype in (torch.bfloat16, torch.float32)}
    return {(*run, dtype): error(results[run], wanted) for run in RUNS for dtype, wanted in references.items()}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_64_micro_batches_are_summed_without_rounding(results, errors, stage):
    assert results[stage, "auto"]["told"] == FLOAT32
    # The linear layers of ZeRO-3 round in other places than torch's.
    assert errors[stage, "auto", torch.bfloat16] < (2e-3 if stage == 3 else 1e-5)
    assert errors[stage, "auto", torch.float32] < 0.006


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_in_bfloat16_the_sum_is_rounded_at_each_of_them(results, errors, stage):
    assert results[stage, "bfloat16"]["told"] == dict.fromkeys(FLOAT32)
    assert errors[stage, "bfloat16", torch.bfloat16] > 0.007
    assert errors[stage, "bfloat16", torch.float32] > 0.009


def settings(stage: int, gradient_dtype: Any, module: Any, bf16: bool = True, **config: Any) -> dict[str, Any]:
    strategy = DeepSpeedStrategy(stage=stage, gradient_dtype=gradient_dtype)
    strategy.config |= {"bf16": {"enabled": bf16}, **config}
    strategy._lightning_module = module
    strategy._set_gradient_dtype()
    return {key: strategy.config.get(key) for key in FLOAT32}


def test_a_step_of_one_micro_batch_has_nothing_to_sum():
    whole = SimpleNamespace(micro_batch_size=None, max_tokens_per_batch=None)
    nothing = dict.fromkeys(FLOAT32)
    assert settings(2, "auto", whole) == nothing
    assert settings(2, "float32", whole) == FLOAT32
    for split in (SimpleNamespace(micro_batch_size=4, max_tokens_per_batch=None), SimpleNamespace()):
        assert settings(3, "auto", split) == FLOAT32
    assert settings(2, "float32", SimpleNamespace(), bf16=False) == nothing
    assert settings(0, "auto", SimpleNamespace()) == nothing


def test_what_the_users_config_says_is_kept():
    given = {"data_types": {"grad_accum_dtype": "bf16"}, "communication_data_type": "bf16"}
    assert settings(2, "auto", SimpleNamespace(), **given) == given


def test_without_zero_there_is_no_choice():
    with pytest.raises(UserError, match="gradient_dtype float32 needs ZeRO: set stage to 1, 2 or 3"):
        settings(0, "float32", SimpleNamespace())
    with pytest.raises(UserError, match="gradient_dtype"):
        DeepSpeedStrategy(gradient_dtype="float16")  # type: ignore[arg-type]
