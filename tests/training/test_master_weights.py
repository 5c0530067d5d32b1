"""Float32 copies of bfloat16 weights: small steps arrive, and a run can be cut and resumed bit for bit."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_lightning.strategies import DeepSpeedStrategy, SingleDeviceStrategy
from torch import nn

from rlhf_lightning.training.master_weights import MasterWeights, with_master_weights
from rlhf_lightning.training.optim import learning_rates, parameter_groups, schedule_learning_rate

OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1),
    "adamw in a loop": lambda groups: torch.optim.AdamW(groups, lr=1e-3, foreach=False, amsgrad=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9, nesterov=True),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=1e-2, initial_accumulator_value=0.125),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=1e-2),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=1e-3),
}


def small_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))


def rounded(model):
    """The same weights held in bfloat16."""
    return copy.deepcopy(model).to(torch.bfloat16)


def gradients(seed, model):
    """Gradients that bfloat16 holds exactly."""
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=random).to(torch.bfloat16) for p in model.parameters()]


def give(model, grads):
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        parameter.grad = grad.to(parameter.dtype)


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("name", OPTIMIZERS)
@settings(max_examples=10, deadline=None)
@given(steps=st.integers(1, 8), seed=st.integers(0, 1000))
def test_weights_are_those_of_a_float32_run_rounded(name, steps, seed):
    low = rounded(small_model(seed))
    wide = copy.deepcopy(low).float()
    masters = MasterWeights(OPTIMIZERS[name](parameter_groups(low)))
    plain = OPTIMIZERS[name](parameter_groups(wide))
    schedules = [schedule_learning_rate(optimizer, "linear", 3, 8) for optimizer in (masters, plain)]
    for step in range(steps):
        grads = gradients(seed + step, low)
        for model, optimizer, schedule in zip((low, wide), (masters, plain), schedules, strict=True):
            give(model, grads)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    for a, b in zip(low.parameters(), wide.parameters(), strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b.to(torch.bfloat16))


@pytest.mark.parametrize("lr", [1e-6, 1e-5])
def test_many_tiny_steps_arrive_where_plain_bfloat16_stands_still(lr):
    start = torch.full((64,), 0.02, dtype=torch.bfloat16)
    plain, kept = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    bare = torch.optim.AdamW([plain], lr=lr, weight_decay=0.0)
    optimizer = MasterWeights(torch.optim.AdamW([kept], lr=lr, weight_decay=0.0))
    for _ in range(500):
        plain.grad = kept.grad = None
        for weight, stepped in ((plain, bare), (kept, optimizer)):
            weight.grad = torch.ones_like(weight)
            stepped.step()
    assert torch.equal(plain, start)
    expected = start.float() - 500 * lr  # a constant gradient moves AdamW by the learning rate
    torch.testing.assert_close(kept.float(), expected, rtol=2**-8, atol=0)
    torch.testing.assert_close(optimizer.state_dict()["master_weights"][0], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_is_float32(name):
    model = rounded(small_model())
    optimizer = MasterWeights(OPTIMIZERS[name](parameter_groups(model)))
    give(model, gradients(0, model))
    optimizer.step()
    tensors = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    assert tensors
    assert {x.dtype for x in tensors} == {torch.float32}
    assert len(optimizer.state) == len(list(model.parameters()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_goes_on_bit_for_bit(name):
    def start():
        model = rounded(small_model())
        optimizer = MasterWeights(OPTIMIZERS[name](parameter_groups(model)))
        return model, optimizer, schedule_learning_rate(optimizer, "linear", 3, 8)

    def go(model, optimizer, schedule, steps):
        for step in steps:
            give(model, gradients(step, model))
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    whole, cut, resumed = start(), start(), start()
    go(*whole, range(8))
    go(*cut, range(4))
    file = io.BytesIO()
    torch.save([cut[0].state_dict(), cut[1].state_dict(), cut[2].state_dict()], file)
    file.seek(0)
    for part, saved in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(saved)
    go(*resumed, range(4, 8))

    for a, b in zip(parameters(whole[0]), parameters(resumed[0]), strict=True):
        assert torch.equal(a, b)
    masters = [optimizer.state_dict()["master_weights"] for optimizer in (whole[1], resumed[1])]
    for a, b in zip(*masters, strict=True):
        assert torch.equal(a, b)
    assert learning_rates(whole[1]) == learning_rates(resumed[1])


def test_the_copies_of_a_checkpoint_win_over_the_rounded_weights():
    model = rounded(small_model())
    optimizer = MasterWeights(torch.optim.SGD(model.parameters(), lr=1.0))
    state = copy.deepcopy(optimizer.state_dict())
    state["master_weights"][0] += 1.0
    optimizer.load_state_dict(state)
    assert torch.equal(model[0].weight, state["master_weights"][0].to(torch.bfloat16))


def test_states_go_between_float32_and_bfloat16_runs():
    wide, low = small_model(), rounded(small_model())
    plain = torch.optim.AdamW(parameter_groups(wide), lr=1e-3)
    masters = MasterWeights(torch.optim.AdamW(parameter_groups(low), lr=1e-3))
    give(wide, gradients(0, wide))
    plain.step()
    before = parameters(low)
    masters.load_state_dict(plain.state_dict())
    assert [s["exp_avg"].dtype for s in masters.state.values()] == [torch.float32] * 4
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(low), strict=True))
    fresh = torch.optim.AdamW(parameter_groups(small_model()), lr=1e-3)
    fresh.load_state_dict(masters.state_dict())
    assert all(
        torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in zip(fresh.state.values(), plain.state.values(), strict=True)
    )


def test_groups_belong_to_the_model_and_their_options_reach_the_inner_optimizer():
    model = rounded(small_model())
    inner = torch.optim.SGD([{"params": [model[0].weight], "lr": 0.5}, {"params": [model[1].weight]}], lr=0.25)
    optimizer = MasterWeights(inner)
    assert [group["params"] for group in optimizer.param_groups] == [[model[0].weight], [model[1].weight]]
    assert learning_rates(optimizer) == [0.5, 0.25]
    before = parameters(model)
    optimizer.param_groups[1]["lr"] = 0.0
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[1].weight.grad = torch.ones_like(model[1].weight)
    optimizer.step()
    assert torch.equal(model[0].weight, (before[0].float() - 0.5).to(torch.bfloat16))
    assert torch.equal(model[1].weight, before[2])


def test_an_optimizer_that_writes_into_its_groups_is_heard():
    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            self.param_groups[0]["count"] = self.param_groups[0].get("count", 0) + 1
            return super().step(closure)

    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = MasterWeights(Counting([weight], lr=0.1))
    for _ in range(3):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert optimizer.param_groups[0]["count"] == optimizer.state_dict()["param_groups"][0]["count"] == 3


def test_float32_weights_among_the_others_are_stepped_as_they_are():
    low, wide = nn.Parameter(torch.ones(3, dtype=torch.bfloat16)), nn.Parameter(torch.ones(3))
    optimizer = MasterWeights(torch.optim.SGD([low, wide], lr=1e-3))
    low.grad, wide.grad = torch.ones_like(low), torch.ones_like(wide)
    optimizer.step()
    assert torch.equal(wide, torch.full((3,), 1 - 1e-3))
    assert len(optimizer.state_dict()["master_weights"]) == 1


def test_weights_without_a_gradient_stay():
    model = rounded(small_model())
    optimizer = MasterWeights(OPTIMIZERS["adamw"](parameter_groups(model)))
    before = parameters(model)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    optimizer.step()
    after = parameters(model)
    assert not torch.equal(before[0], after[0])
    assert all(torch.equal(a, b) for a, b in zip(before[1:], after[1:], strict=True))


def test_gradients_are_gone_after_the_step():
    model = rounded(small_model())
    optimizer = MasterWeights(OPTIMIZERS["sgd"](parameter_groups(model)))
    give(model, gradients(0, model))
    optimizer.step()
    assert all(p.grad is None for p in model.parameters())
    before = parameters(model)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(model), strict=True))


def test_a_group_added_later_is_trained_too():
    model = rounded(small_model())
    optimizer = MasterWeights(torch.optim.SGD(model[0].parameters(), lr=0.5))
    optimizer.add_param_group({"params": model[1].parameters(), "lr": 0.25})
    give(model, [torch.ones_like(p) for p in model.parameters()])
    before = parameters(model)
    optimizer.step()
    for old, new, lr in zip(before, parameters(model), (0.5, 0.5, 0.25, 0.25), strict=True):
        assert torch.equal(new, (old.float() - lr).to(torch.bfloat16))


def test_a_closure_computes_the_gradient():
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = MasterWeights(torch.optim.SGD([weight], lr=0.5))

    def closure():
        loss = (2 * weight).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2
    assert weight.item() == 0


class RunningTrainer:
    """As much of a Trainer as is asked for its strategy."""

    def __init__(self, strategy):
        self.strategy = strategy


@pytest.mark.parametrize(
    ("dtype", "strategy", "wrapped"),
    [
        (torch.bfloat16, SingleDeviceStrategy(), True),
        (torch.float32, SingleDeviceStrategy(), False),
        (torch.bfloat16, DeepSpeedStrategy(), False),
    ],
)
def test_copies_are_made_where_they_are_needed(dtype, strategy, wrapped):
    optimizer = torch.optim.SGD(small_model().to(dtype).parameters(), lr=0.1)
    chosen = with_master_weights(optimizer, RunningTrainer(strategy))
    assert isinstance(chosen, MasterWeights) == wrapped
    assert (chosen is optimizer) != wrapped
