"""The average of the trained weights follows its formula, is exported, and leaves training alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import LambdaCallback

from helpers.stages import (
    adamw,
    disturb_random_numbers,
    fit,
    instruction_rows,
    preference_rows,
    prompt_rows,
    same_weights,
    save_llama,
    save_reward_model,
    weights,
)
from rlhf_lightning import (
    EMA,
    FineTune,
    HFExport,
    InstructionDataModule,
    PPOModule,
    PreferenceDataModule,
    PromptDataModule,
    RewardModule,
    Sampling,
    SFTModule,
    UserError,
    load_causal_lm,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def reward_folder(folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_reward_model(tmp_path_factory.mktemp("reward"), folder)


def sft(folder: str, callbacks: list[Any], root: Path, **settings: Any) -> SFTModule:
    disturb_random_numbers(0)
    module = SFTModule(folder, optimizer=adamw(1e-2), lr_schedule="constant", warmup_steps=0)
    rows = instruction_rows(12)
    data = InstructionDataModule(folder, rows, validation_split=0.0, batch_size=4, max_length=48)
    fit(module, data, callbacks=callbacks, default_root_dir=root, max_epochs=2, **settings)
    return module


def kept_weights() -> tuple[LambdaCallback, list[dict[str, torch.Tensor]]]:
    seen: list[dict[str, torch.Tensor]] = []

    def keep(trainer: Any, module: Any, *_: Any) -> None:
        seen.append(weights(module.export_model))

    return LambdaCallback(on_train_start=keep, on_train_batch_end=keep), seen


def test_the_average_follows_its_formula_and_both_models_are_exported(folder: str, tmp_path: Path) -> None:
    keep, seen = kept_weights()
    module = sft(folder, [keep, EMA(decay=0.8), HFExport()], tmp_path)
    assert len(seen) == 7
    average = {name: weight.float() for name, weight in seen[0].items()}
    for after in seen[1:]:
        average = {name: 0.8 * weight + 0.2 * after[name] for name, weight in average.items()}
    last = weights(load_causal_lm(str(tmp_path / "export")))
    averaged = weights(load_causal_lm(str(tmp_path / "ema_export")))
    assert same_weights(last, seen[-1])
    assert same_weights(weights(module.export_model), seen[-1])
    for name, weight in average.items():
        torch.testing.assert_close(averaged[name], weight, atol=1e-6, rtol=1e-5)
    assert not same_weights(averaged, last)


def test_training_is_the_same_with_and_without(folder: str, tmp_path: Path) -> None:
    plain, averaged = sft(folder, [], tmp_path / "a"), sft(folder, [EMA()], tmp_path / "b")
    assert same_weights(weights(plain.export_model), weights(averaged.export_model))


@pytest.mark.parametrize("steps", [2, 3])  # within an epoch, and at its end
def test_a_resumed_run_goes_on_with_its_average(folder: str, tmp_path: Path, steps: int) -> None:
    whole, half, resumed = EMA(0.8), EMA(0.8), EMA(0.8)
    sft(folder, [whole], tmp_path / "whole")
    cut = sft(folder, [half], tmp_path / "half", max_steps=steps)
    cut.trainer.save_checkpoint(tmp_path / "half.ckpt")
    sft(folder, [resumed], tmp_path / "resumed", ckpt_path=str(tmp_path / "half.ckpt"))
    assert same_weights(resumed.average, whole.average)
    ends = [weights(load_causal_lm(str(tmp_path / run / "ema_export"))) for run in ("whole", "resumed")]
    assert same_weights(*ends)


def test_only_what_is_trained_is_averaged(folder: str, reward_folder: str, tmp_path: Path) -> None:
    """Of PPO's four models the adapters of one."""
    average = EMA(0.5)
    finetune = FineTune("lora", rank=2)
    module = PPOModule(
        folder, reward_folder, finetune=finetune, rollout_batch_size=4, minibatch_size=4, ppo_epochs=1,
        sampling=Sampling(max_new_tokens=4), optimizer=adamw(1e-2),
    )  # fmt: skip
    data = PromptDataModule(folder, prompt_rows(8), rollout_batch_size=4, max_prompt_length=40, validation_split=0.0)
    fit(module, data, callbacks=[average], default_root_dir=tmp_path)
    trained = {name for name, weight in module.policy.named_parameters() if weight.requires_grad}
    assert average.average.keys() == trained
    assert all("lora" in name for name in trained)
    # What is exported is a plain model, its adapters the averaged ones.
    merged = weights(load_causal_lm(str(tmp_path / "ema_export")))
    base = weights(load_causal_lm(folder))
    name = "model.layers.0.self_attn.q_proj.weight"
    a, b = (average.average[f"model.layers.0.self_attn.q_proj.lora_{part}.default.weight"] for part in "AB")
    torch.testing.assert_close(merged[name] - base[name], b @ a * finetune.alpha / 2, atol=1e-6, rtol=1e-4)


def test_other_weights_than_those_of_the_checkpoint_are_refused(folder: str, tmp_path: Path) -> None:
    average = EMA()
    average.load_state_dict({"average": {"nothing": torch.zeros(1)}, "steps": 1})
    with pytest.raises(UserError, match=r"^EMA: other weights are trained than in the checkpoint"):
        sft(folder, [average], tmp_path)


def test_a_reward_model_is_refused(folder: str, tmp_path: Path) -> None:
    data = PreferenceDataModule(folder, preference_rows(8), batch_size=4, max_length=48, validation_split=0.0)
    with pytest.raises(UserError, match=r"^EMA is for models that answer"):
        fit(RewardModule(folder), data, callbacks=[EMA()], default_root_dir=tmp_path)


def test_a_fast_dev_run_and_a_run_of_no_step_leave_nothing_behind(folder: str, tmp_path: Path) -> None:
    sft(folder, [EMA()], tmp_path, fast_dev_run=1)
    sft(folder, [EMA()], tmp_path, max_steps=0)
    assert not (tmp_path / "ema_export").exists()
