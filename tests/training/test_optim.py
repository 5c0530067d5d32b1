"""Which parameters decay, and the learning rate of every step."""

import math

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from helpers.models import tiny_causal_lm
from rlhf_lightning.errors import UserError
from rlhf_lightning.training.optim import (
    fuse,
    learning_rate_factor,
    learning_rates,
    parameter_groups,
    schedule_learning_rate,
)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("tied", [True, False])
def test_only_matrices_decay_and_tied_weights_count_once(family, tied):
    model = tiny_causal_lm(family, tie_word_embeddings=tied)
    matrices, vectors = parameter_groups(model, lr=3e-4)
    assert all(p.dim() == 2 for p in matrices["params"])
    assert all(p.dim() == 1 for p in vectors["params"])
    assert "weight_decay" not in matrices
    assert vectors["weight_decay"] == 0.0
    assert matrices["lr"] == vectors["lr"] == 3e-4
    grouped = [id(p) for p in matrices["params"] + vectors["params"]]
    assert sorted(grouped) == sorted({id(p) for p in model.parameters()})
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is embeddings) == tied
    assert grouped.count(id(head)) == grouped.count(id(embeddings)) == 1


def test_the_optimizer_s_own_weight_decay_reaches_matrices_only():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=0.1), weight_decay=0.5)
    bias = model.bias.detach().clone()
    weight = model.weight.detach().clone()
    (model(torch.zeros(1, 2)).sum() * 0).backward()
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), weight * (1 - 0.1 * 0.5))
    assert torch.equal(model.bias, bias)


def stepped(optimizer, model, steps=3):
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.full((2, 4), 1.0 + step, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    return [weight.detach().clone() for weight in model.parameters()]


def small_model():
    torch.manual_seed(0)
    return nn.Linear(4, 3).double()


@pytest.fixture(scope="module")
def trainer():
    return pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_a_fused_step_is_the_plain_one(kind, trainer):
    plain, ours = small_model(), small_model()
    options = {"lr": 1e-2, "weight_decay": 0.1}
    fused = fuse(kind(ours.parameters(), **options), trainer)
    assert fused.param_groups[0]["fused"]
    for expected, found in zip(stepped(kind(plain.parameters(), **options), plain), stepped(fused, ours), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


class OtherAdamW(torch.optim.AdamW):
    """Somebody's own, whose step may be another."""


@pytest.mark.parametrize(
    "make",
    [
        lambda weights: torch.optim.AdamW(weights, fused=False),
        lambda weights: torch.optim.AdamW(weights, foreach=True),
        lambda weights: torch.optim.AdamW(weights, capturable=True),
        lambda weights: torch.optim.SGD(weights, lr=0.1),
        lambda weights: OtherAdamW(weights),
    ],
)
def test_what_was_chosen_stays(make, trainer):
    optimizer = make(small_model().parameters())
    before = [group.get("fused") for group in optimizer.param_groups]
    assert [group.get("fused") for group in fuse(optimizer, trainer).param_groups] == before


def test_a_checkpoint_of_a_plain_optimizer_goes_on_fused(trainer):
    model = small_model()
    plain = torch.optim.AdamW(model.parameters())
    stepped(plain, model)
    fused = fuse(torch.optim.AdamW(model.parameters()), trainer)
    fused.load_state_dict(plain.state_dict())
    assert fused.param_groups[0]["fused"]
    stepped(fused, model)
    assert {float(state["step"]) for state in fused.state.values()} == {6.0}


def test_frozen_parameters_and_empty_groups_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.LayerNorm(2))
    model[1].requires_grad_(False)
    (group,) = parameter_groups(model)
    assert [id(p) for p in group["params"]] == [id(model[0].weight)]


def test_a_partitioned_matrix_is_known_by_its_full_shape():
    model = nn.Linear(2, 2)
    model.weight.data = torch.empty(0)
    model.weight.ds_shape, model.bias.ds_shape = (2, 2), (2,)
    matrices, vectors = parameter_groups(model)
    assert [id(p) for p in matrices["params"]] == [id(model.weight)]
    assert [id(p) for p in vectors["params"]] == [id(model.bias)]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25, 0, 0]),
        ("cosine", [0.5, 1, 1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0, 0]),
    ],
)
def test_factors_by_hand(kind, expected):
    factors = [learning_rate_factor(step, kind, warmup_steps=2, total_steps=6) for step in range(8)]
    assert factors == pytest.approx(expected, abs=1e-12)
    raised = [learning_rate_factor(step, kind, 2, 6, min_factor=0.1) for step in range(2, 8)]
    fall = [0.1 + 0.9 * factor for factor in expected[2:]]
    assert raised == pytest.approx(fall)


@given(st.sampled_from(["cosine", "linear", "constant"]), st.integers(0, 10), st.integers(1, 40), st.floats(0, 1))
def test_every_step_of_a_run_learns_and_the_rate_rises_then_falls(kind, warmup, total, floor):
    factors = [learning_rate_factor(step, kind, warmup, total, floor) for step in range(max(total, warmup + 1))]
    assert all(0 < factor <= 1 for factor in factors[:total])
    assert factors[: warmup + 1] == sorted(factors[: warmup + 1])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    assert factors[warmup] == 1
    ending = learning_rate_factor(max(total, warmup + 1), kind, warmup, total, floor)
    assert ending == pytest.approx(1 if kind == "constant" else floor)


def rates(warmup_steps, kind="linear", total_steps=10, steps=10, **options):
    """Learning rates of two groups at each optimizer step."""
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [w], "lr": lr} for w, lr in zip(weights, (1.0, 0.1), strict=True)])
    scheduler = schedule_learning_rate(optimizer, kind, warmup_steps, total_steps, **options)
    seen = []
    for _ in range(steps):
        seen.append(learning_rates(optimizer))
        optimizer.step()
        scheduler.step()
    return seen


def test_the_first_step_learns_and_groups_keep_their_ratio():
    seen = rates(warmup_steps=4)
    assert seen[0] == pytest.approx([0.25, 0.025])
    assert seen[3] == pytest.approx([1.0, 0.1])
    assert all(b == pytest.approx(a / 10) for a, b in seen)


def test_warm_up_as_a_share_of_the_run():
    assert rates(0.4) == rates(4)
    assert rates(0.31) == rates(4)  # rounded up
    assert rates(0)[0] == [1.0, 0.1]
    assert rates(1)[0] == [1.0, 0.1]  # one step, not the whole run


@pytest.mark.parametrize(("kind", "warmup"), [("cosine", 0), ("linear", 5), ("constant", 0.1)])
def test_a_run_without_an_end_cannot_decay(kind, warmup):
    with pytest.raises(UserError, match=r"set trainer.max_epochs or trainer.max_steps") as error:
        rates(warmup, kind, math.inf)
    assert "\n" not in str(error.value)


def test_a_constant_rate_needs_no_end():
    assert [pair[0] for pair in rates(2, "constant", math.inf, 4)] == [0.5, 1.0, 1.0, 1.0]
    for at_once in (0, 1):
        assert [pair[0] for pair in rates(at_once, "constant", math.inf, 2)] == [1.0, 1.0]


def test_a_rate_that_ends_above_0():
    assert [pair[0] for pair in rates(0, "linear", 2, 4, min_factor=0.5)] == [1.0, 0.75, 0.5, 0.5]


def test_an_unknown_schedule_is_none_of_the_known_ones():
    with pytest.raises(ValueError, match="kind 'cosin' is none of cosine, linear and constant"):
        learning_rate_factor(5, "cosin", 2, 10)


def test_a_schedule_resumed_into_a_longer_run_has_the_rate_of_its_step_there():
    def begun(total, lr):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
        return optimizer, schedule_learning_rate(optimizer, "linear", 2, total)

    finished, schedule = begun(6, lr=1.0)
    for _ in range(6):
        finished.step()
        schedule.step()
    assert learning_rates(finished) == [0]

    resumed, longer = begun(10, lr=0.5)
    resumed.load_state_dict(finished.state_dict())
    longer.load_state_dict(schedule.state_dict())

    assert learning_rates(resumed) == longer.get_last_lr() == [0.5 * learning_rate_factor(6, "linear", 2, 10)]
    resumed.step()
    longer.step()
    assert learning_rates(resumed) == [0.5 * learning_rate_factor(7, "linear", 2, 10)]


class Remembering(torch.optim.SGD):
    """Keeps a state of its own among the options, as some optimizers do."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["seen"] = group.get("seen", 0) + 1
            group["dampening"] = 0.5


def test_options_that_changed_win_over_the_checkpoint_and_state_among_them_goes_on():
    def made(**options):
        optimizer = Remembering([nn.Parameter(torch.zeros(2))], lr=0.1, **options)
        return optimizer, schedule_learning_rate(optimizer, "constant", 0, 10)

    optimizer, schedule = made(momentum=0.9, weight_decay=0.1)
    optimizer.step()
    schedule.step()
    state, place = optimizer.state_dict(), schedule.state_dict()

    optimizer, schedule = made(momentum=0.8, weight_decay=0.1)
    optimizer.load_state_dict(state)  # in this order, as Lightning does
    schedule.load_state_dict(place)

    (group,) = optimizer.param_groups
    assert (group["momentum"], group["weight_decay"], group["dampening"], group["seen"]) == (0.8, 0.1, 0.5, 1)
    assert schedule.options[0]["momentum"] == 0.8
