"""Switches of PPO: value warm-up, clipping apart, updates that end early, where the learning rate ends."""

import math
from itertools import pairwise

import pytest
import torch
from pytorch_lightning.callbacks import LambdaCallback, ModelCheckpoint

from helpers.stages import (
    adamw,
    disturb_random_numbers,
    fit,
    prompt_rows,
    same_weights,
    save_llama,
    save_reward_model,
    sgd,
    share_of_letters,
    weights,
)
from rlhf_lightning import GRPOModule, Objective, PPOModule, PromptDataModule, Sampling, ScoreShaping, UserError

CONSTANT = {"lr_schedule": "constant", "warmup_steps": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def reward_folder(folder, tmp_path_factory):
    return save_reward_model(tmp_path_factory.mktemp("reward"), folder)


def make(folder, reward=share_of_letters, **settings):
    """Two updates per iteration."""
    given = {"rollout_batch_size": 8, "minibatch_size": 4, "ppo_epochs": 1, "sampling": Sampling(max_new_tokens=6)}
    return PPOModule(folder, reward, **given | {"optimizer": adamw(1e-3)} | CONSTANT | settings)


def run(module, iterations=3, **settings):
    disturb_random_numbers(0)
    rows = prompt_rows(8 * iterations)
    size = module.rollout_batch_size
    data = PromptDataModule(
        module.model_name_or_path, rows, validation_split=0.0, max_prompt_length=40, rollout_batch_size=size
    )
    return fit(module, data, **settings)


def weights_by_iteration(module):
    """A callback, and where it puts policy and value weights after each iteration."""
    kept = []

    def keep(*args):
        kept.append((weights(module.policy), weights(module.value)))

    return LambdaCallback(on_train_start=keep, on_train_batch_end=keep), kept


@pytest.mark.parametrize("trunk", ["own", "policy"])
def test_only_the_value_model_learns_while_it_warms_up(folder, reward_folder, trunk):
    options = {"value_trunk": trunk, "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.5)}
    module = make(folder, reward_folder, value_warmup_iterations=2, **options)
    callback, kept = weights_by_iteration(module)
    log = run(module, callbacks=[callback])
    for (policy, value), (policy_after, value_after) in pairwise(kept[:3]):
        assert same_weights(policy, policy_after)
        assert not same_weights(value, value_after)
    assert not same_weights(kept[2][0], kept[3][0])
    assert not same_weights(kept[2][1], kept[3][1])
    # The policy's optimizer has made the steps of the last iteration only.
    optimizer = module.optimizers()
    steps = {part: {int(optimizer.state[p]["step"]) for p in getattr(module, part).parameters() if p.requires_grad}
             for part in ("policy", "value")}  # fmt: skip
    assert steps == {"policy": {2}, "value": {6}}
    assert log.series("train/grad_norm_policy")[:2] == [0, 0]
    assert log.series("train/grad_norm_policy")[2] > 0
    assert log.series("train/grad_norm")[:2] == pytest.approx(log.series("train/grad_norm_value")[:2])
    assert log.series("train/ratio")[:1] == pytest.approx([1.0], abs=1e-4)


def test_a_warm_up_is_the_training_of_the_value_model_alone(folder, reward_folder):
    """What the value model learns meanwhile is what it learns beside a policy that does not move."""
    alone = make(folder, reward_folder, value_warmup_iterations=9, gradient_clip_val=None)
    still = make(folder, reward_folder, gradient_clip_val=None, optimizer=adamw(0.0), value_lr=1e-3)
    run(alone)
    run(still)
    assert same_weights(weights(alone.policy), weights(still.policy))
    assert same_weights(weights(alone.value), weights(still.value))


def test_the_end_of_the_warm_up_says_what_it_has_brought(folder, reward_folder, caplog):
    with caplog.at_level("INFO", "pytorch_lightning"):
        log = run(make(folder, reward_folder, value_warmup_iterations=2))
    explained = log.series("train/explained_variance")
    said = f"for 2 iterations: the variance that it explains went from {explained[0]:.2f} to {explained[2]:.2f}"
    assert said in caplog.text


@pytest.mark.parametrize("iterations", [1, 2])  # cut in the warm-up, and at its end
def test_a_run_that_is_cut_in_its_warm_up_goes_on_as_if_it_had_not_been(folder, reward_folder, tmp_path, iterations):
    def fresh():
        return make(folder, reward_folder, value_warmup_iterations=2, **CONSTANT)

    whole, half, resumed = fresh(), fresh(), fresh()
    run(whole)
    steps = iterations * whole.steps_per_batch
    half_log = run(half, max_steps=steps)
    assert half.trainer.global_step == steps
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    log = run(resumed, ckpt_path=str(tmp_path / "half.ckpt"))
    assert same_weights(weights(resumed.policy), weights(whole.policy))
    assert same_weights(weights(resumed.value), weights(whole.value))
    assert resumed.run_state()["explained_at_first"] == half_log.series("train/explained_variance")[0]
    assert len(log.series("train/score")) == 3 - iterations


def norms_at_the_step(module):
    """Norms of the gradients of policy and value model, as the optimizer is given them."""
    found = []
    module.configure_model()

    def before(optimizer, *args):
        parts = (
            [p.grad for p in getattr(module, part).parameters() if p.grad is not None] for part in ("policy", "value")
        )
        found.append([torch.stack([g.norm() for g in grads]).norm().item() for grads in parts])

    def on_train_start(trainer, pl_module):
        trainer.optimizers[0].register_step_pre_hook(before)

    return LambdaCallback(on_train_start=on_train_start), found


def test_policy_and_value_model_are_clipped_apart(folder, reward_folder):
    module = make(folder, reward_folder, gradient_clip_val=1e-3, value_gradient_clip_val=2e-4)
    callback, found = norms_at_the_step(module)
    log = run(module, callbacks=[callback], iterations=1)
    assert log.series("train/grad_norm_policy")[0] > 1e-3
    assert log.series("train/grad_norm_value")[0] > 2e-4
    for policy, value in found:
        assert policy == pytest.approx(1e-3, rel=1e-3)
        assert value == pytest.approx(2e-4, rel=1e-2)
    only_value = make(folder, reward_folder, gradient_clip_val=None, value_gradient_clip_val=2e-4)
    callback, found = norms_at_the_step(only_value)
    log = run(only_value, callbacks=[callback], iterations=1)
    assert found[0][1] == pytest.approx(2e-4, rel=1e-2)
    assert sum(policy for policy, _ in found) / 2 == pytest.approx(log.series("train/grad_norm_policy")[0], rel=1e-4)


def updates_of(folder, limit, kind=PPOModule, **settings):
    given = {"rollout_batch_size": 8, "minibatch_size": 2, "ppo_epochs": 1, "sampling": Sampling(max_new_tokens=6)}
    given |= {"samples_per_prompt": 2, "minibatch_size": 4} if kind is GRPOModule else {}
    module = kind(folder, share_of_letters, optimizer=sgd(3.0), max_approx_kl=limit, **given, **CONSTANT, **settings)
    return module, run(module, iterations=2)


@pytest.mark.parametrize("kind", [PPOModule, GRPOModule])
def test_updates_of_a_rollout_end_where_the_policy_has_gone_far_enough(folder, kind):
    module, log = updates_of(folder, 1e-6, kind)
    updates, seen = log.series("train/updates"), log.series("train/approx_kl")
    assert all(2 <= count <= 4 for count in updates)  # the first one is made by the policy that has answered
    assert min(updates) < 4
    assert module.trainer.global_step == sum(updates)
    assert all(kl > 0 for kl in seen)


def test_a_limit_that_is_never_reached_changes_nothing(folder):
    (module, log), (plain, plain_log) = updates_of(folder, 1e6), updates_of(folder, None)
    assert log.series("train/updates") == [4, 4]
    assert not plain_log.series("train/updates")
    assert same_weights(weights(module.policy), weights(plain.policy))


def test_the_learning_rate_ends_at_its_share(folder):
    ends = {}
    for factor in (0.0, 0.1):
        module = make(folder, lr_schedule="cosine", min_lr_factor=factor)
        log = run(module)
        ends[factor] = log.series("train/lr")
        total = 3 * module.steps_per_batch
        progress = [step / total for step in (0, 2, 4)]  # at the first update of each iteration
        expected = [1e-3 * (factor + (1 - factor) * 0.5 * (1 + math.cos(math.pi * share))) for share in progress]
        assert log.series("train/lr") == pytest.approx(expected, rel=1e-5)
    assert ends[0.0] != ends[0.1]


def test_settings_that_are_off_are_the_run_of_before(folder, reward_folder):
    """Named with what they amount to by default, they change no bit."""
    plain = make(folder, reward_folder)
    named = make(
        folder,
        reward_folder,
        objective=Objective(clip_range_high=0.2, dual_clip=1e9, value_gae_lambda=0.95),
        score=ScoreShaping(missing_eos_score=None, overlong_buffer=None),
        value_warmup_iterations=0,
        min_lr_factor=0.5,  # of a rate that stays
    )
    run(plain)
    run(named)
    assert same_weights(weights(plain.policy), weights(named.policy))
    assert same_weights(weights(plain.value), weights(named.value))


def test_a_buffer_longer_than_a_response_is_refused(folder):
    with pytest.raises(
        UserError, match=r"^score\.overlong_buffer \(9\) must be at most sampling\.max_new_tokens \(6\)$"
    ):
        make(folder, score=ScoreShaping(overlong_buffer=9))


@pytest.mark.parametrize("monitor", [None, "train/score"])
def test_checkpoints_are_saved_where_the_steps_of_an_iteration_pass_a_multiple(folder, tmp_path, monitor):
    """Two steps an iteration: 3 and 9 are never reached, but passed; 6 is."""
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1, save_last=True, monitor=monitor)
    module = make(folder)
    run(module, iterations=5, callbacks=[saver], enable_checkpointing=True)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["last", "step=10", "step=4", "step=6"]
    # A resumed run counts from where it goes on, and finds the state of the callback.
    again = ModelCheckpoint(tmp_path / "b", "{step}", every_n_train_steps=3, save_top_k=-1, monitor=monitor)
    checkpoint = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    assert again.state_key in checkpoint["callbacks"]
    run(make(folder), 5, callbacks=[again], enable_checkpointing=True, ckpt_path=str(tmp_path / "step=4.ckpt"))
    assert sorted(path.stem for path in (tmp_path / "b").iterdir()) == ["step=10", "step=6"]
