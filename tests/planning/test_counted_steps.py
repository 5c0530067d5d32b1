"""A plan beside real steps on a CPU, whose tensors are counted one by one."""

from __future__ import annotations

import itertools

import pytest

from helpers.planned import Counted, arguments, planned, save_models

pytestmark = pytest.mark.long
CASES = [
    ("sft", {}, "32-true"),
    ("sft", {"micro_batch_size": 2}, "32-true"),
    ("sft", {"micro_batch_size": 1, "gradient_checkpointing": True}, "32-true"),
    ("sft", {"micro_batch_size": 2}, "bf16-true"),
    ("sft", {"micro_batch_size": 2}, "bf16-mixed"),
    ("sft", {"finetune": {"mode": "lora"}, "micro_batch_size": 2}, "bf16-true"),
    ("sft", {"finetune": {"mode": "last_layer"}}, "32-true"),
    ("reward", {"micro_batch_size": 2}, "32-true"),
    ("reward", {"finetune": {"mode": "lora"}, "gradient_checkpointing": True}, "32-true"),
    ("reward", {"lm_coef": 1.0, "micro_batch_size": 2}, "32-true"),
    ("reward", {"lm_coef": 1.0, "finetune": {"mode": "lora"}}, "bf16-true"),
    ("dpo", {"micro_batch_size": 2}, "32-true"),
    ("dpo", {"finetune": {"mode": "lora"}}, "32-true"),
    ("ppo", {"micro_batch_size": 2}, "32-true"),
    ("ppo", {"finetune": {"mode": "lora"}, "micro_batch_size": 2}, "32-true"),
    ("ppo", {"micro_batch_size": 1, "gradient_checkpointing": True, "value_trunk": "policy"}, "bf16-mixed"),
    ("ppo", {"micro_batch_size": 1, "value_trunk": "policy", "generation_batch_size": 2}, "32-true"),
    ("ppo", {"frozen_dtype": "bfloat16", "micro_batch_size": 4}, "32-true"),
    ("ppo", {"micro_batch_size": 2, "texts": 8}, "32-true"),
    ("ppo", {"micro_batch_size": 1, "texts": 4, "gradient_checkpointing": True, "value_trunk": "policy"}, "bf16-mixed"),
    ("rloo", {"micro_batch_size": 2}, "32-true"),
    ("grpo", {"finetune": {"mode": "lora"}}, "32-true"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"), layers=2)


@pytest.fixture(
    scope="module", params=CASES, ids=lambda case: "-".join(map(str, (case[0], *case[1].values(), case[2])))
)
def both(request, models):
    kind, given, precision = request.param
    made = arguments(kind, *models, **given)
    return planned(kind, made, trainer={"precision": precision}), Counted(kind, made, precision=precision)


def test_weights_gradients_and_optimizer_are_exact(both):
    plan, real = both
    assert sum(role.weights for role in plan.roles) == real.weights
    assert sum(role.optimizer + role.copies for role in plan.roles) == real.state
    assert sum(role.gradients for role in plan.roles) == real.gradients


def test_the_worst_moment_is_within_15_percent(both):
    plan, real = both
    assert plan.worst.together == pytest.approx(real.worst, rel=0.15)


def test_so_is_that_of_each_part(both):
    plan, real = both
    for name, parts in {"rollout": ("answers", "measures"), "update": ("updates", "learns", "steps")}.items():
        if name in real.moments:
            worst = max(part.together for part in plan.parts if part.name.startswith(parts))
            assert worst == pytest.approx(real.moments[name], rel=0.15)


def test_cases_hold_each_kind_of_stage_and_each_mode():
    kinds, modes = zip(*((kind, given.get("finetune", {}).get("mode", "all")) for kind, given, _ in CASES), strict=True)
    assert set(kinds) == {"sft", "reward", "dpo", "ppo", "rloo", "grpo"}
    assert set(itertools.chain(modes)) == {"all", "lora", "last_layer"}
