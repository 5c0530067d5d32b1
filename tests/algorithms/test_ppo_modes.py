"""PPO with less memory or less work: the same iteration to rounding, or the same with fewer weights trained."""

import pytest
import torch
from peft import PeftModel

from helpers.stages import (
    adamw,
    assert_close_weights,
    disturb_random_numbers,
    fit,
    prompt_rows,
    same_weights,
    save_llama,
    save_reward_model,
    sgd,
    weights,
)
from rlhf_lightning import GRPOModule, HFExport, PPOModule, PromptDataModule, RLOOModule, Sampling
from rlhf_lightning.algorithms.online import rollout
from rlhf_lightning.algorithms.online.models import logprobs_and_values
from rlhf_lightning.compat import is_checkpointing
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import TransformersEngine
from rlhf_lightning.models.causal_lm import load_causal_lm
from rlhf_lightning.models.finetune_settings import FineTune

# One token is certain in each state, so the responses cannot depend on rounding.
CERTAIN = Sampling(top_k=1, max_new_tokens=10, stop_strings=list("aeiou"))
LORA = FineTune(mode="lora", rank=4)
SIZES = {"rollout_batch_size": 8, "minibatch_size": 8, "ppo_epochs": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def reward_folder(folder, tmp_path_factory):
    return save_reward_model(tmp_path_factory.mktemp("reward"), folder)


def ppo(folder, reward, kind=PPOModule, **settings):
    fixed = {"sampling": CERTAIN, "lr_schedule": "constant", "optimizer": sgd(0.1), "gradient_clip_val": None}
    return kind(folder, reward, **SIZES | fixed | settings)


def run(module, iterations=2, **settings):
    disturb_random_numbers(0)
    data = PromptDataModule(
        module.model_name_or_path,
        prompt_rows(8 * iterations),
        rollout_batch_size=8,
        validation_split=0.0,
        max_prompt_length=40,
    )
    return fit(module, data, **settings)


def trained(module):
    return {**weights(module.policy), **{f"value.{name}": tensor for name, tensor in weights(module.value).items()}}


SEVERAL = {"minibatch_size": 4, "ppo_epochs": 2}
"""Updates on one rollout."""


@pytest.fixture
def passes_of_policy(monkeypatch):
    """Responses that the policy was run over in scoring."""
    seen = []

    def counted(policy, value, ids, *rest, **options):
        seen.extend(ids)
        return logprobs_and_values(policy, value, ids, *rest, **options)

    monkeypatch.setattr(rollout, "logprobs_and_values", counted)
    return seen


@pytest.mark.parametrize("trunk", ["own", "policy"])
@pytest.mark.parametrize(
    "options", [{}, SEVERAL, {**SEVERAL, "finetune": LORA}, {**SEVERAL, "samples_per_prompt": 2}], ids=str
)
def test_the_samplers_log_probabilities_spare_a_pass_of_the_policy(
    folder, reward_folder, trunk, options, passes_of_policy
):
    logs, modules, passes = [], [], []
    for reuse in ("auto", False):
        modules.append(ppo(folder, reward_folder, value_trunk=trunk, reuse_logprobs=reuse, **options))
        logs.append(run(modules[-1]))
        passes.append(len(passes_of_policy))
    assert passes == [0, 2 * 8 * options.get("samples_per_prompt", 1)]
    assert_close_weights(*map(trained, modules))
    # Several updates see the entropy fall, and count tokens whose values may stand on either side of a border.
    moved = {"entropy", "value_clip_fraction"} if options else set()
    for name in logs[1].names("train") - {"tokens_per_second", "memory_gib"} - moved:
        if not name.startswith("seconds"):
            values = [log.series(f"train/{name}") for log in logs]
            assert values[0] == pytest.approx(values[1], abs=2e-5), name
    assert logs[0].series("train/entropy")[0] > 0


@pytest.mark.parametrize("kind", [RLOOModule, GRPOModule])
def test_so_they_do_for_groups(folder, reward_folder, kind, passes_of_policy):
    options = {**SEVERAL, "samples_per_prompt": 2}
    modules = [ppo(folder, reward_folder, kind, reuse_logprobs=reuse, **options) for reuse in ("auto", False)]
    passes = []
    for module in modules:
        run(module)
        passes.append(len(passes_of_policy))
    assert passes == [0, 2 * 16]
    assert_close_weights(*(weights(module.policy) for module in modules))


@pytest.mark.parametrize(
    ("options", "trainer", "spared"),
    [
        ({}, {"precision": "bf16-true"}, True),  # one update is on the policy that answered
        (SEVERAL, {"precision": "bf16-true"}, False),
        ({**SEVERAL, "reuse_logprobs": True}, {"precision": "bf16-true"}, True),
        ({**SEVERAL, "engine": TransformersEngine}, {}, False),  # somebody's own
        ({**SEVERAL, "frozen_dtype": "bfloat16"}, {}, False),
    ],
    ids=str,
)
def test_where_both_are_not_the_same_to_rounding_the_policy_is_measured(
    folder, reward_folder, options, trainer, spared, passes_of_policy
):
    run(ppo(folder, reward_folder, **options), iterations=1, **trainer)
    assert (not passes_of_policy) is spared


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_token_budget_changes_nothing(folder, reward_folder, epochs):
    modules = [ppo(folder, reward_folder, max_tokens_per_batch=limit, ppo_epochs=epochs) for limit in (None, 40)]
    for module in modules:
        run(module)
    assert_close_weights(*map(trained, modules))


@pytest.mark.parametrize("settings", [{}, {"value_trunk": "policy"}, {"finetune": LORA}], ids=["own", "trunk", "lora"])
def test_gradient_checkpointing_changes_nothing(folder, reward_folder, settings):
    modules = [ppo(folder, reward_folder, gradient_checkpointing=on, **settings) for on in (False, True)]
    for module in modules:
        run(module)
    assert is_checkpointing(modules[1].policy)
    assert_close_weights(*map(trained, modules))


@pytest.mark.parametrize("mode", ["last_layer", "lora"])
def test_only_the_chosen_weights_move(folder, reward_folder, mode):
    module = ppo(folder, reward_folder, finetune=FineTune(mode=mode, rank=4), optimizer=adamw(1e-2))
    module.configure_model()
    before = trained(module)
    log = run(module)
    after = trained(module)
    learns = {name for part in (module.policy, module.value) for name, p in part.named_parameters() if p.requires_grad}
    moved = {name.removeprefix("value.") for name in before if not torch.equal(before[name], after[name])}
    assert moved == learns
    assert log.series("train/ratio")[0] == pytest.approx(1, abs=1e-5)
    assert log.series("train/kl")[0] == pytest.approx(0, abs=1e-5)
    assert abs(log.series("train/kl")[1]) > 1e-4


def test_a_shared_trunk_learns_values_and_policy(folder, reward_folder):
    module = ppo(folder, reward_folder, value_trunk="policy", optimizer=adamw(1e-2))
    module.configure_model()
    before = trained(module)
    log = run(module, iterations=3)
    assert all(not torch.equal(before[name], tensor) for name, tensor in trained(module).items())
    assert log.series("train/value_loss")[0] > 0
    assert log.series("train/ratio")[0] == pytest.approx(1, abs=1e-5)


def test_four_bits_train_and_export_an_adapter(folder, reward_folder, tmp_path):
    four_bits = {"frozen_dtype": "nf4", "finetune": FineTune(mode="lora", rank=4, export="adapter")}
    module = ppo(folder, reward_folder, **four_bits, optimizer=adamw(1e-2))
    log = run(module, callbacks=[HFExport(str(tmp_path / "export"))])
    assert log.series("train/kl")[0] == pytest.approx(0, abs=1e-5)
    assert abs(log.series("train/kl")[1]) > 1e-5

    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        trained, base = module.policy(ids).logits, load_causal_lm(folder)(ids).logits
        again = PeftModel.from_pretrained(load_causal_lm(folder, nf4=True), tmp_path / "export")(ids).logits
        merged = load_causal_lm(tmp_path / "export")(ids).logits  # on the base as it was before the four bits
    torch.testing.assert_close(again, trained)
    assert (merged - base).abs().max() > 1e-4


def test_two_limits_at_once_are_refused(folder, reward_folder):
    with pytest.raises(UserError, match="give one of them"):
        ppo(folder, reward_folder, micro_batch_size=2, max_tokens_per_batch=64)


@pytest.mark.parametrize("settings", [{"finetune": LORA}, {"value_trunk": "policy"}], ids=["lora", "trunk"])
def test_resumes_bit_for_bit(folder, reward_folder, tmp_path, settings):
    whole = ppo(folder, reward_folder, **settings, optimizer=adamw(1e-2))
    run(whole, iterations=4)

    class Stop(PPOModule):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 1:
                self.trainer.save_checkpoint(tmp_path / "half.ckpt")

    half = ppo(folder, reward_folder, Stop, **settings, optimizer=adamw(1e-2))
    run(half, iterations=4)
    rest = ppo(folder, reward_folder, **settings, optimizer=adamw(1e-2))
    run(rest, iterations=4, ckpt_path=tmp_path / "half.ckpt")
    assert rest.iteration == 4
    assert same_weights(trained(whole), trained(rest))
