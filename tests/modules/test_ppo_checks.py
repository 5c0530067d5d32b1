"""What PPO refuses: settings that do not go together, and models that are not what they should be."""

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.stages import fit, prompt_rows, save_llama, save_reward_model, share_of_letters
from rlhf_lightning import PPOModule, PromptDataModule, Sampling, UserError

SIZES = {"rollout_batch_size": 4, "minibatch_size": 4, "sampling": Sampling(max_new_tokens=4)}


@pytest.fixture
def folder(tmp_path):
    return save_llama(tmp_path / "llama")


@pytest.fixture
def reward_folder(folder, tmp_path):
    return save_reward_model(tmp_path / "reward", folder)


def run(module, **settings):
    options = {"rollout_batch_size": 4, "max_prompt_length": 40, "validation_split": 0.0} | settings
    data = PromptDataModule(module.model_name_or_path, prompt_rows(8), **options)
    fit(module, data)


def change_weight(folder, name, change):
    path = Path(folder) / "model.safetensors"
    weights = load_file(path)
    weights[name] = change(weights[name]).contiguous()
    save_file(weights, path, metadata={"format": "pt"})


def test_a_reference_that_is_not_the_policy_is_noticed(folder):
    module = PPOModule(folder, share_of_letters, **SIZES)
    module.configure_model()
    with torch.no_grad():
        module.reference.lm_head.weight.mul_(0.5)
    with pytest.raises(AssertionError, match=r"start from one model, yet their KL per token is \d"):
        run(module)


@pytest.mark.parametrize(
    "change", [lambda head: head + 0.1, lambda head: -head, lambda head: torch.randn(head.shape) * 0.1]
)
def test_a_reward_model_that_is_not_what_was_saved_is_noticed(folder, reward_folder, change):
    torch.manual_seed(0)
    run(PPOModule(folder, reward_folder, **SIZES))
    change_weight(reward_folder, "score.weight", change)
    with pytest.raises(AssertionError, match="standard deviations off from when it was saved"):
        run(PPOModule(folder, reward_folder, **SIZES))


def test_old_log_probabilities_that_are_not_the_policys_are_noticed(folder):
    class Forgetful(PPOModule):
        def rollout(self, prompts):
            experience, metrics = super().rollout(prompts)
            return experience._replace(logprobs=experience.logprobs - 0.01), metrics

    with pytest.raises(AssertionError, match=r"before the first update the probability ratio is 1\.01\d*, not 1"):
        run(Forgetful(folder, share_of_letters, **SIZES))


def test_an_update_without_gradient_is_noticed(folder):
    class Unmoved(PPOModule):
        def rollout(self, prompts):
            experience, metrics = super().rollout(prompts)
            nothing = torch.zeros_like(experience.advantages)
            return experience._replace(advantages=nothing, returns=nothing), metrics

    with pytest.raises(AssertionError, match="the first update has no gradient"):
        run(Unmoved(folder, share_of_letters, **SIZES))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rollout_batch_size": 6, "minibatch_size": 4},
            r"rollout_batch_size \(6\) must be a multiple of minibatch_size \(4\)",
        ),
        ({"micro_batch_size": 3}, r"minibatch_size \(4\) must be a multiple of micro_batch_size \(3\)"),
        ({"generation_batch_size": 3}, r"rollout_batch_size \(4\) must be a multiple of generation_batch_size \(3\)"),
        ({"minibatch_size": 0}, r"minibatch_size \(0\) must be at least 1"),
        (
            {"sampling": Sampling(temperature=0)},
            r"PPO learns from sampled responses: sampling\.temperature must be above 0",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused_at_once(settings, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        PPOModule("nowhere", share_of_letters, **SIZES | settings)


def test_a_loader_of_another_size_is_refused(folder):
    with pytest.raises(UserError, match=r"^the loader gives 8 prompts at once but rollout_batch_size is 4; set both"):
        run(PPOModule(folder, share_of_letters, **SIZES), rollout_batch_size=8)


def test_prompt_and_response_must_fit_the_context(folder):
    sampling = Sampling(max_new_tokens=24)
    run(PPOModule(folder, share_of_letters, **SIZES | {"sampling": sampling}))  # 40 + 24 = 64
    message = r"^max_prompt_length \(41\) \+ sampling\.max_new_tokens \(24\) exceed the context of '.*' \(64 tokens\)$"
    with pytest.raises(UserError, match=message):
        run(PPOModule(folder, share_of_letters, **SIZES | {"sampling": sampling}), max_prompt_length=41)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("nowhere", "is neither a reward model folder nor the import path of a function"),
        ("helpers.stages.nothing", "module 'helpers.stages' has no function 'nothing'"),
        ("./nowhere", "model folder './nowhere' does not exist"),
        (lambda prompts: [0.0], "takes \\(prompts\\), but is called with \\(prompts, responses\\)"),
    ],
)
def test_a_reward_that_is_nowhere_is_refused_before_there_are_data(folder, reward, message):
    with pytest.raises(UserError, match=message):
        PPOModule(folder, reward, **SIZES)


def test_models_that_are_nowhere_are_refused_before_there_are_data(folder):
    with pytest.raises(UserError, match=r"model folder '\./nowhere' does not exist"):
        PPOModule("./nowhere", share_of_letters, **SIZES)
    with pytest.raises(UserError, match=r"model folder '\./nowhere' does not exist"):
        PPOModule(folder, share_of_letters, "./nowhere", **SIZES)


def test_a_language_model_is_no_reward_and_a_reward_model_no_policy(folder, reward_folder):
    for settings in ({"reward": folder}, {"reward": share_of_letters, "value_name_or_path": folder}):
        with pytest.raises(UserError, match="has no trained reward head"):
            PPOModule(folder, **settings, **SIZES)
    with pytest.raises(UserError, match=r"is a reward model .* a language model is needed here"):
        run(PPOModule(reward_folder, reward_folder, **SIZES))


def test_a_reward_function_must_score_every_response(folder):
    def too_few(prompts, responses):
        return [1.0] * (len(responses) - 1)

    with pytest.raises(UserError, match="reward function 'too_few' returned 3 scores for 4 responses"):
        run(PPOModule(folder, too_few, **SIZES))


def test_a_reward_function_that_does_not_end_ends_the_run(folder):
    stop = threading.Event()

    def hangs(prompts, responses):
        stop.wait()
        return [1.0] * len(responses)

    with pytest.raises(UserError, match=r"reward function 'hangs' took more than 0.05 seconds .* over rows \d+, "):
        run(PPOModule(folder, hangs, **SIZES, reward_timeout=0.05))
    stop.set()
