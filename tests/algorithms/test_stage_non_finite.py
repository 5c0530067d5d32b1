"""NaN and infinity stop a run with the rows named and the weights as they were."""

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from helpers.stages import (
    fit,
    instruction_rows,
    preference_rows,
    prompt_rows,
    same_weights,
    save_llama,
    save_reward_model,
    sgd,
    weights,
)
from rlhf_lightning import (
    InstructionDataModule,
    NonFiniteError,
    PPOModule,
    PreferenceDataModule,
    PromptDataModule,
    RewardModule,
    Sampling,
    SFTModule,
)

CONSTANT = {"lr_schedule": "constant", "warmup_steps": 0}


class KeepWeights(pl.Callback):
    """Copies the trained model before every batch."""

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.copy = weights(pl_module.export_model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def reward_folder(folder, tmp_path_factory):
    return save_reward_model(tmp_path_factory.mktemp("reward"), folder)


def supervised(stage, folder, reward_folder, lr=0.1):
    """A module of the stage, and its two batches of rows 0 to 3 and 4 to 7, in this order."""
    if stage == "sft":
        module = SFTModule(folder, optimizer=sgd(lr), **CONSTANT, micro_batch_size=2, gradient_clip_val=None)
        data = InstructionDataModule(folder, instruction_rows(8), eval_batch_size=4, max_length=48)
    else:
        module = RewardModule(reward_folder, optimizer=sgd(lr), **CONSTANT, micro_batch_size=2, gradient_clip_val=None)
        data = PreferenceDataModule(reward_folder, preference_rows(8), eval_batch_size=4, max_length=48)
    data.validation_data, data.validation_split = data.data, 0.0
    data.setup("fit")
    return module, DataLoader(list(data.val_dataloader()), batch_size=None)


def fails(module, loader):
    keep = KeepWeights()
    with pytest.raises(NonFiniteError) as error:
        fit(module, loader, callbacks=[keep])
    assert same_weights(keep.copy, weights(module.export_model))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_loss_that_is_nan(folder, reward_folder, stage):
    module, loader = supervised(stage, folder, reward_folder)
    module.configure_model()
    norm = module.export_model.base_model.norm.weight
    with torch.no_grad():
        norm[0] = float("nan")
    message = fails(module, loader)
    assert message.startswith("the loss is nan after 0 optimizer steps, in rows 0, 1, 2, 3; the weights were not")


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_learning_rate_that_is_far_too_high(folder, reward_folder, stage):
    module, loader = supervised(stage, folder, reward_folder, lr=1e30)
    message = fails(module, loader)
    assert "after 1 optimizer steps, in rows 4, 5, 6, 7; the weights were not changed" in message


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_a_score_that_is_not_finite(folder, bad):
    def reward(prompts, responses):
        return [float(bad) if prompt.startswith(("3:", "6:")) else 0.5 for prompt in prompts]

    settings = {"sampling": Sampling(max_new_tokens=4), "rollout_batch_size": 4, "minibatch_size": 4}
    module = PPOModule(folder, reward, **settings, optimizer=sgd(0.1))
    data = PromptDataModule(folder, prompt_rows(8), rollout_batch_size=4, max_prompt_length=40, validation_split=0.0)
    message = fails(module, data)

    assert message.startswith(f"step {module.trainer.global_step}: a score is not finite (rows ")
    named = message[message.index("rows ") + 5 : message.index(")")].split(", ")
    assert named
    assert set(named) <= {"3", "6"}
