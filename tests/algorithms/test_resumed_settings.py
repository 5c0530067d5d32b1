"""What is given at a resume and differs is applied or refused, as the table of `docs/reliability.md` says."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch

import rlhf_lightning
from helpers.stages import fit, instruction_rows, prompt_rows, save_llama, save_reward_model
from rlhf_lightning import (
    FineTune,
    InstructionDataModule,
    KLPenalty,
    PPOModule,
    PromptDataModule,
    Sampling,
    SFTModule,
    UserError,
)
from rlhf_lightning.arguments import constructor_arguments

PAGE = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text(encoding="utf-8")
TABLE = PAGE.partition("### What may change at a resume")[2].partition("\n#")[0]
CLASSES = [
    getattr(rlhf_lightning, name) for name in rlhf_lightning.__all__ if name.endswith("Module") and name != "Module"
]
ADAMW = partial(torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_the_table_names_each_argument_once(kind):
    first_columns = "".join(line.split("|")[1] for line in TABLE.splitlines() if line.startswith("| `"))
    named = re.findall(r"`([^`]+)`", first_columns)
    assert len(named) == len(set(named))
    assert not set(constructor_arguments(kind)) - set(named)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"), hidden_size=16)


def run(base, optimizer=ADAMW, ckpt_path=None, epochs=1, **options):
    module = SFTModule(base, optimizer=optimizer, warmup_steps=0, **options)
    data = InstructionDataModule(base, instruction_rows(8), validation_split=0.0, max_length=48, batch_size=4)
    log = fit(module, data, max_epochs=epochs, ckpt_path=ckpt_path)
    return module, log


@pytest.fixture(scope="module")
def checkpoint(base, tmp_path_factory):
    module, _ = run(base)
    path = tmp_path_factory.mktemp("saved") / "sft.ckpt"
    module.trainer.save_checkpoint(path)
    return path


def test_an_optimizer_goes_on_with_the_options_that_are_given(base, checkpoint):
    given = partial(torch.optim.AdamW, lr=3e-3, betas=(0.8, 0.9), weight_decay=0.2)

    module, log = run(base, given, checkpoint, epochs=2, lr_schedule="constant")

    matrices, vectors = module.trainer.optimizers[0].param_groups
    assert matrices["betas"] == vectors["betas"] == (0.8, 0.9)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.2, 0.0)
    assert log.series("train/lr") == [pytest.approx(3e-3)] * 2


def test_another_optimizer_is_refused(base, checkpoint):
    with pytest.raises(UserError, match=r"is torch\.optim\.sgd\.SGD, that of the checkpoint is .*AdamW, whose state"):
        run(base, partial(torch.optim.SGD, lr=0.1), checkpoint, epochs=2)


@pytest.mark.parametrize("mode", ["lora", "last_layer"])
def test_other_trained_weights_are_refused(base, checkpoint, mode):
    with pytest.raises(
        UserError, match=f"made with another model|finetune.mode is {mode}, that of the checkpoint is all"
    ):
        run(base, ckpt_path=checkpoint, epochs=2, finetune=FineTune(mode=mode, rank=2))


@pytest.mark.parametrize("change", [{"rank": 3}, {"target_modules": ["q_proj"]}, {"use_dora": True}], ids=str)
def test_other_adapters_are_refused(base, tmp_path, change):
    kept = {"mode": "lora", "rank": 2, "alpha": 4}
    module, _ = run(base, finetune=FineTune(**kept))
    module.trainer.save_checkpoint(tmp_path / "lora.ckpt")

    with pytest.raises(UserError, match="made with another model or stage"):
        run(base, ckpt_path=tmp_path / "lora.ckpt", epochs=2, finetune=FineTune(**kept | change))


def test_the_seed_of_the_checkpoint_goes_on_and_says_so(base, checkpoint, logged):
    saved = torch.load(checkpoint, weights_only=True)["rlhf_lightning"]["seed"]
    torch.manual_seed(saved + 1)

    module, _ = run(base, ckpt_path=checkpoint, epochs=2)

    assert module.seed == saved
    assert f"random numbers go on with seed {saved}, that of the checkpoint" in logged()


def ppo(base, reward, kl, **options):
    sizes = {"rollout_batch_size": 4, "minibatch_size": 4, "ppo_epochs": 1, "sampling": Sampling(max_new_tokens=4)}
    module = PPOModule(base, reward, kl=kl, **sizes, **options)
    return module, PromptDataModule(
        base, prompt_rows(4), validation_split=0.0, rollout_batch_size=4, max_prompt_length=40
    )


def test_a_fixed_kl_coefficient_is_that_of_the_settings_an_adaptive_one_that_of_the_checkpoint(base, tmp_path, logged):
    reward = save_reward_model(tmp_path / "reward", base)
    module, data = ppo(base, reward, KLPenalty(0.2, target=1.0, horizon=100))
    fit(module, data)
    adapted = module.kl_controller.coef
    module.trainer.save_checkpoint(tmp_path / "ppo.ckpt")

    module, data = ppo(base, reward, KLPenalty(0.3))
    log = fit(module, data, max_epochs=2, ckpt_path=tmp_path / "ppo.ckpt")
    assert log.series("train/kl_coef") == [pytest.approx(0.3)]
    assert not [line for line in logged() if "KL coefficient" in line]

    module, data = ppo(base, reward, KLPenalty(0.3, target=1.0, horizon=100))
    log = fit(module, data, max_epochs=2, ckpt_path=tmp_path / "ppo.ckpt")
    assert log.series("train/kl_coef") == [pytest.approx(adapted)]
    assert f"the adaptive KL coefficient goes on with {adapted:g}; kl.coef is where it starts" in logged()

    module, data = ppo(base, reward, KLPenalty(0.3), value_trunk="policy")
    with pytest.raises(UserError, match="made with another model or stage"):
        fit(module, data, max_epochs=2, ckpt_path=tmp_path / "ppo.ckpt")
