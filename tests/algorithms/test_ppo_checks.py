"""What PPO refuses: settings that do not go together, and models that are not what they should be."""

import threading
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.models import table_scalar
from helpers.stages import (
    adamw,
    fit,
    prompt_rows,
    same_weights,
    save_llama,
    save_reward_model,
    sgd,
    share_of_letters,
    trainer,
    weights,
)
from rlhf_lightning import (
    FineTune,
    HFExport,
    KLPenalty,
    Objective,
    PPOModule,
    PromptDataModule,
    Sampling,
    ScoreShaping,
    UserError,
    load_causal_lm,
)
from rlhf_lightning.algorithms.online import checks as ppo_checks
from rlhf_lightning.models.scalar_lm import Calibration
from rlhf_lightning.models.scorers import ModelScorer

SIZES = {"rollout_batch_size": 4, "minibatch_size": 4, "sampling": Sampling(max_new_tokens=4)}


@pytest.fixture
def folder(tmp_path):
    return save_llama(tmp_path / "llama")


@pytest.fixture
def reward_folder(folder, tmp_path):
    return save_reward_model(tmp_path / "reward", folder)


def run(module, rows=8, **settings):
    options = {"rollout_batch_size": 4, "max_prompt_length": 40, "validation_split": 0.0} | settings
    data = PromptDataModule(module.model_name_or_path, prompt_rows(rows), **options)
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
        module.reference_model.lm_head.weight.mul_(0.5)
    with pytest.raises(AssertionError, match=r"start from one model, yet their KL per token is \d"):
        run(module)


def test_a_reward_model_that_is_not_what_was_saved_is_noticed(folder, reward_folder):
    torch.manual_seed(0)
    run(PPOModule(folder, reward_folder, **SIZES))
    saved = load_file(Path(reward_folder) / "model.safetensors")["score.weight"]
    for changed in (saved + 0.1, -saved, torch.randn(saved.shape) * 0.1):
        change_weight(reward_folder, "score.weight", lambda _, changed=changed: changed)
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
    class Detached(PPOModule):
        def losses(self, batch):
            return ((0.0 * loss, logged) for loss, logged in super().losses(batch))

    with pytest.raises(AssertionError, match="the first update has no gradient, although there is something to learn"):
        run(Detached(folder, share_of_letters, **SIZES))


def constant(score):
    def const(prompts, responses):
        return [score] * len(responses)

    return const


ONE_TOKEN = Sampling(max_new_tokens=1)


@pytest.mark.parametrize(
    ("reward", "settings"),
    [
        (constant(0.0), {}),
        (constant(0.1), {}),  # no binary number: its mean may be off by rounding
        (constant(-1e6), {"score": ScoreShaping(scaling=False, clip=None)}),
        (constant(0.0), {"sampling": ONE_TOKEN}),
        (constant(0.7), {"sampling": ONE_TOKEN, "objective": Objective(value_coef=0.0)}),
        (constant(0.0), {"rollout_batch_size": 1, "minibatch_size": 1, "sampling": ONE_TOKEN}),
        (constant(0.3), {"kl": KLPenalty(0.0), "objective": Objective(whiten_advantages=False)}),
        (share_of_letters, {"rollout_batch_size": 1, "minibatch_size": 1, "sampling": ONE_TOKEN}),
    ],
)
def test_a_first_rollout_that_teaches_nothing_is_said_and_training_goes_on(folder, reward, settings):
    options = SIZES | settings
    module = PPOModule(folder, reward, **options)
    with pytest.warns(match="all responses of the first rollout got the same score") as warnings:
        run(module, rows=2 * options["rollout_batch_size"], rollout_batch_size=options["rollout_batch_size"])
    said = [w for w in warnings if "first rollout" in str(w.message)]
    assert len(said) == 1
    assert "\n" not in str(said[0].message)
    assert module.iteration == 2
    assert all(weight.isfinite().all() for weight in module.policy.parameters())


def test_a_rare_reward_is_learnt_once_it_comes(folder):
    calls = []

    def rare(prompts, responses):
        calls.append(responses)
        return [float(len(calls) > 1 and i == 0) for i in range(len(responses))]

    module = PPOModule(folder, rare, **SIZES, lr_schedule="constant", optimizer=sgd(0.5))
    module.configure_model()
    before = weights(module.policy)
    run(module)
    assert not same_weights(before, weights(module.policy))


def test_scores_that_differ_are_not_said_to_be_alike(folder):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="all responses of the first rollout")
        run(PPOModule(folder, share_of_letters, **SIZES))


FAR = {"kl": torch.tensor(0.6), "response_length": torch.tensor(3.0)}


def test_low_precision_may_differ_over_few_tokens_but_not_by_a_nat():
    with pytest.warns(match=r"KL per token is 0\.2\d*; lower precision does that over a few tokens"):
        ppo_checks.check_fresh_policy(FAR, exact=False)
    with pytest.warns(match=r"probability ratio is 1\.2\d*, not 1; lower precision"):
        ppo_checks.check_first_ratio(torch.tensor(1.2), exact=False)
    with pytest.raises(AssertionError, match="KL per token"):
        ppo_checks.check_fresh_policy(FAR, exact=True)
    with pytest.raises(AssertionError, match="KL per token"):
        ppo_checks.check_fresh_policy(FAR | {"response_length": torch.tensor(0.5)}, exact=False)
    with pytest.raises(AssertionError, match="probability ratio is 3"):
        ppo_checks.check_first_ratio(torch.tensor(3.0), exact=False)


def test_float32_is_exact_unless_products_may_be_rounded_for_speed():
    assert ppo_checks.computes_exactly("32-true", "auto")
    assert not ppo_checks.computes_exactly("bf16-mixed", "auto")
    assert not ppo_checks.computes_exactly("32-true", "bfloat16")
    torch.set_float32_matmul_precision("high")
    try:
        assert not ppo_checks.computes_exactly("32-true", "auto")
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_probe_may_be_off_by_rounding_where_scores_hardly_differ():
    scalar = table_scalar([1.0, 2.0, 3.0, 4.0])
    ids = [0, 1, 2]
    for calibration, problem in [
        (Calibration(3.0, 1.0, ids, 3.01), None),
        (Calibration(3.0, 1e-3, ids, 3.01), "warning"),  # ten deviations, but what bfloat16 may do to a 3
        (Calibration(3.0, 1e-3, ids, 3.5), "error"),
        (Calibration(3.0, 1.0, ids, 3.5), "error"),
    ]:
        scalar.calibration = calibration
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if problem == "error":
                with pytest.raises(AssertionError, match="standard deviations off"):
                    ppo_checks.check_probe(ModelScorer(scalar))
            else:
                ppo_checks.check_probe(ModelScorer(scalar))
        assert ["hardly differ" in str(w.message) for w in said] == [True] * (problem == "warning")


def exported_ppo(folder, tmp_path):
    """A policy that PPO moved away from `folder`, and what its last validation said."""
    module = PPOModule(folder, share_of_letters, **SIZES, lr_schedule="constant", optimizer=adamw(1e-2))
    data = PromptDataModule(
        folder, prompt_rows(16), validation_data=prompt_rows(4), rollout_batch_size=4, max_prompt_length=40
    )
    log = fit(module, data, callbacks=[HFExport(str(tmp_path / "export"))], val_check_interval=4)
    return str(tmp_path / "export"), log.series("val/kl")[-1]


def validated(policy, **settings):
    data = PromptDataModule(
        policy, prompt_rows(4), validation_data=prompt_rows(4), rollout_batch_size=4, max_prompt_length=40
    )
    module = PPOModule(policy, share_of_letters, **SIZES, **settings)
    (metrics,) = trainer().validate(module, data, verbose=False)
    return metrics["val/kl"]


def test_an_exported_policy_is_measured_against_the_model_it_came_from(folder, tmp_path):
    export, kl = exported_ppo(folder, tmp_path)
    assert abs(kl) > 0.01
    said = rf"'{export}' was trained from '{folder}': .* 0 by construction; pass --model\.reference {folder} "
    with pytest.warns(match=said):
        assert validated(export) == pytest.approx(0, abs=1e-5)
    for finetune in (FineTune(), FineTune(mode="lora", rank=4)):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*0 by construction")
            assert validated(export, reference=folder, finetune=finetune) == pytest.approx(kl, rel=1e-4)
            assert validated(folder) == pytest.approx(0, abs=1e-5)  # no export of PPO: nothing to say

    rows = trainer().predict(
        PPOModule(export, share_of_letters, **SIZES, reference=folder),
        PromptDataModule(export, predict_data=prompt_rows(4), rollout_batch_size=4, max_prompt_length=40),
    )
    assert sum(abs(row["kl"]) for batch in rows for row in batch) > 0.01


def test_training_may_be_held_near_another_model_than_it_starts_from(folder, tmp_path):
    export, _ = exported_ppo(folder, tmp_path)
    module = PPOModule(export, share_of_letters, **SIZES, reference=folder)
    run(module)  # no fresh policy is expected
    assert same_weights(weights(module.reference_model), weights(load_causal_lm(folder)))
    with torch.no_grad():
        module = PPOModule(folder, share_of_letters, **SIZES, reference=f"{folder}/../{Path(folder).name}")
        module.configure_model()
        module.reference_model.lm_head.weight.mul_(0.5)
    with pytest.raises(AssertionError, match="start from one model"):  # the same folder by another name
        run(module)


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
            r"the policy learns from sampled responses: sampling\.temperature must be above 0",
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
    message = r"^max_prompt_length \(41\) \+ sampling\.max_new_tokens \(24\) exceed the context of '.*' \(64 tokens\)"
    message += r"; lower --data\.max_prompt_length or --model\.sampling\.max_new_tokens$"
    with pytest.raises(UserError, match=message):
        run(PPOModule(folder, share_of_letters, **SIZES | {"sampling": sampling}), max_prompt_length=41)


def test_and_the_context_of_the_reward_model(folder, reward_folder):
    config = Path(reward_folder, "config.json")
    config.write_text(config.read_text().replace('"max_position_embeddings": 64', '"max_position_embeddings": 40'))
    with pytest.raises(
        UserError,
        match=r"exceed the context of '.*reward' \(40 tokens\); lower --data\.max_prompt_length or "
        r"--model\.sampling\.max_new_tokens$",
    ):
        run(PPOModule(folder, reward_folder, **SIZES))


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
        PPOModule(folder, share_of_letters, value_name_or_path="./nowhere", **SIZES)


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
