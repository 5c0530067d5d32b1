"""Stages that train a part of the weights: what moves, what checkpoints hold, and resuming bit for bit."""

import re

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from helpers.stages import (
    adamw,
    disturb_random_numbers,
    fit,
    instruction_rows,
    preference_rows,
    same_weights,
    save_gpt2,
    save_llama,
    sgd,
    trainer,
    weights,
)
from rlhf_lightning import FineTune, InstructionDataModule, PreferenceDataModule, RewardModule, SFTModule, UserError

MODES = {
    "last_layer": FineTune("last_layer"),
    "lora": FineTune("lora", rank=4),
    "lora with dropout": FineTune("lora", rank=4, dropout=0.3),
    "dora": FineTune("lora", rank=4, use_dora=True),
}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return save_gpt2(tmp_path_factory.mktemp("gpt2"), dropout=0.2)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


def sft(folder, finetune, **settings):
    module = SFTModule(folder, optimizer=adamw(1e-2), micro_batch_size=2, finetune=finetune, **settings)
    rows = instruction_rows(12)
    return module, InstructionDataModule(folder, rows, validation_data=rows[:3], max_length=48, batch_size=4)


def reward(folder, finetune, **settings):
    module = RewardModule(folder, optimizer=adamw(1e-2), micro_batch_size=2, finetune=finetune, **settings)
    rows = preference_rows(12)
    return module, PreferenceDataModule(folder, rows, validation_data=rows[:3], max_length=48, batch_size=4)


STAGES = [sft, reward]


def trained_names(module):
    return {name for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stage", STAGES)
def test_only_what_is_chosen_moves(llama, stage, mode):
    module, data = stage(llama, MODES[mode])
    torch.manual_seed(3)
    module.configure_model()
    before = weights(module)
    fit(module, data)
    moved = {name for name, tensor in weights(module).items() if not torch.equal(tensor, before.get(name, tensor))}
    assert moved == trained_names(module)
    assert len(moved) < len(before)


# How adapters are kept does not depend on the stage, and each stage keeps adapters and whole weights.
@pytest.mark.parametrize(
    ("stage", "mode"), [(sft, mode) for mode in MODES] + [(reward, "last_layer"), (reward, "lora with dropout")]
)
def test_a_cut_run_ends_as_if_it_had_not_been_cut(gpt2, tmp_path, stage, mode):
    def run(ckpt_path=None, **settings):
        disturb_random_numbers(1234 if ckpt_path is None else 99)
        module, data = stage(gpt2, MODES[mode], dropout=True)
        fit(module, data, max_epochs=2, ckpt_path=ckpt_path, **settings)
        module.trainer.save_checkpoint(tmp_path / "end.ckpt")
        return module, torch.load(tmp_path / "end.ckpt", weights_only=True)

    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    whole, end = run(callbacks=[keep], enable_checkpointing=True)
    resumed, again = run(tmp_path / "step=2.ckpt")

    frozen = {name for name, p in whole.named_parameters() if not p.requires_grad}
    assert not frozen & end["state_dict"].keys()
    assert trained_names(whole) <= end["state_dict"].keys()
    assert same_weights(weights(whole), weights(resumed))
    assert same_weights(end["state_dict"], again["state_dict"])
    assert end["global_step"] == again["global_step"] == 6
    moments, moments_again = (c["optimizer_states"][0]["state"] for c in (end, again))
    assert all(torch.equal(moments[i]["exp_avg"], moments_again[i]["exp_avg"]) for i in moments)
    assert end["rlhf_lightning"] == again["rlhf_lightning"]


@pytest.mark.parametrize(("saved", "resumed"), [("lora", "dora"), ("lora", "last_layer"), ("last_layer", "lora")])
def test_a_checkpoint_of_another_mode_is_refused(gpt2, tmp_path, saved, resumed):
    module, data = sft(gpt2, MODES[saved])
    fit(module, data, max_steps=1, limit_val_batches=0)
    module.trainer.save_checkpoint(tmp_path / "saved.ckpt")
    module, data = sft(gpt2, MODES[resumed])
    with pytest.raises(UserError, match="the checkpoint"):
        fit(module, data, ckpt_path=tmp_path / "saved.ckpt")


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("finetune", [MODES["lora"], MODES["lora with dropout"]])
def test_dropout_of_the_model_and_of_its_adapters_are_chosen_apart(gpt2, dropout, finetune):
    module, _ = sft(gpt2, finetune, dropout=dropout)
    module.configure_model()
    model = module.export_model
    of_adapters = {id(part) for name, part in model.named_modules() if "lora_dropout" in name}
    rates = {True: set(), False: set()}
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            rates[id(part) in of_adapters].add(part.p)
    assert rates[True] == ({finetune.dropout} if finetune.dropout else set())
    assert rates[False] == {0.2 if dropout else 0.0}


@pytest.mark.parametrize("mode", ["all", "lora"])
@pytest.mark.parametrize("stage", STAGES)
def test_gradient_checkpointing_trains_the_same(llama, stage, mode):
    ends = []
    for checkpointing in (False, True):
        module, data = stage(llama, FineTune(mode, rank=4), gradient_checkpointing=checkpointing)
        torch.manual_seed(3)
        module.optimizer = sgd(0.1)
        fit(module, data)
        assert any(getattr(part, "gradient_checkpointing", False) for part in module.modules()) is checkpointing
        ends.append(weights(module.export_model))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_one_line_says_how_much_is_trained(llama, stage, logged):
    module, data = stage(llama, MODES["lora"])
    fit(module, data, max_steps=2, limit_val_batches=0)
    (line,) = (line for line in logged() if line.startswith("training "))
    assert re.fullmatch(r"training \d+\.\d k of \d+\.\d k parameters \(lora, rank 4\)", line)


def test_before_training_adapters_say_what_the_base_says(llama):
    plain, data = sft(llama, FineTune())
    adapted, _ = sft(llama, MODES["lora"])
    assert trainer().validate(plain, data, verbose=False) == trainer().validate(adapted, data, verbose=False)
