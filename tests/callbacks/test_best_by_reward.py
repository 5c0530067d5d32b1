"""The model whose answers a reward likes best is kept, and training does not notice."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from transformers import AutoModelForCausalLM

from helpers.best_runs import run
from helpers.distributed import run_in_processes
from helpers.stages import (
    adamw,
    fit,
    instruction_rows,
    preference_rows,
    same_weights,
    save_llama,
    save_reward_model,
    weights,
)
from rlhf_lightning import (
    DPOModule,
    FineTune,
    InstructionDataModule,
    KeepBestByReward,
    NonFiniteError,
    PreferenceDataModule,
    RewardModule,
    Sampling,
    SFTModule,
    UserError,
)
from rlhf_lightning.data.rows import prompt_key
from rlhf_lightning.evaluation import Judge, Policy
from rlhf_lightning.evaluation.rows import read_rows

STEPS = 4
SHORT = Sampling(max_new_tokens=6)


def lengths(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward: the length of each response. It draws random numbers, which is nobody's business."""
    torch.rand(3)
    return [float(len(response)) for response in responses]


class Says:
    """A reward that says what it is told to, one number for each time that it is asked."""

    def __init__(self, *scores: float) -> None:
        self.scores = [*scores]
        self.seen: list[tuple[list[str], list[str]]] = []

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        self.seen.append((prompts, responses))
        return [self.scores[len(self.seen) - 1]] * len(prompts)


class Weights(Callback):
    """Keeps the weights of each validation."""

    def __init__(self) -> None:
        self.at: dict[int, Any] = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.at[trainer.global_step] = weights(pl_module.export_model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"), layers=1)


@pytest.fixture(scope="module")
def reward_folder(folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_reward_model(tmp_path_factory.mktemp("reward"), folder)


def sft(folder: str, **options: Any) -> tuple[SFTModule, InstructionDataModule]:
    """Steps on four rows each, with dropout to notice random numbers by."""
    data = InstructionDataModule(folder, instruction_rows(32), validation_split=0.3, batch_size=4, max_length=48)
    return SFTModule(folder, optimizer=adamw(1e-2), sampling=SHORT, **options), data


def trained(folder: str, *callbacks: Callback, steps: int = STEPS, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(3)
    module, data = sft(folder, **options.pop("module", {}))
    logger = fit(module, data, callbacks=[*callbacks], max_steps=steps, val_check_interval=1, **options)
    return module, logger


@pytest.mark.parametrize("finetune", [FineTune(), FineTune("lora", rank=2, alpha=8, dropout=0.3)])
def test_training_is_the_same_with_and_without_it(folder, tmp_path, finetune):
    ends, logs, modes = [], [], []
    for callbacks in ([], [KeepBestByReward(lengths, num_prompts=4, dirpath=str(tmp_path / "best"))]):
        module, logger = trained(folder, *callbacks, module={"finetune": finetune})
        logs.append(logger)
        ends.append((weights(module), torch.get_rng_state()))
        modes.append([(name, part.training) for name, part in module.named_modules()])
    assert same_weights(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])
    assert modes[0] == modes[1]
    for name in ("train/loss", "train/grad_norm", "val/loss"):
        assert logs[0].series(name) == logs[1].series(name)
    assert len(logs[1].series("val/reward_score")) == STEPS
    assert logs[0].series("val/reward_score") == []


def test_the_best_is_kept_whatever_comes_after(folder, tmp_path, caplog):
    kept, at = KeepBestByReward(Says(1, 3, 2, 3), num_prompts=3, dirpath=str(tmp_path / "best")), Weights()
    with caplog.at_level(logging.INFO, logger="pytorch_lightning.utilities.rank_zero"):
        _, logger = trained(folder, kept, at)
    assert logger.series("val/reward_score") == [1, 3, 2, 3]
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "best").state_dict()
    assert same_weights(best, at.at[2])  # the first of equals
    assert not same_weights(best, at.at[4])
    assert f"the reward liked best '{tmp_path / 'best'}': val/reward_score 3 (step 2 of 4)" in caplog.text
    assert "val/reward_score" in (tmp_path / "best" / "README.md").read_text()


def test_the_score_is_that_of_the_answers_to_held_out_prompts(folder, reward_folder, tmp_path):
    seen = Says(*[0.0] * STEPS)
    trained(folder, KeepBestByReward(seen, num_prompts=64, dirpath=str(tmp_path / "a")))
    _, data = sft(folder)
    held_out = read_rows(data.data, "finetune", part="validation", splits=data.splits)
    assert seen.seen[0][0] == [row.written.text for row in held_out]
    assert len(held_out) < 20
    learnt = [row for row in instruction_rows(32) if row["prompt"] not in seen.seen[0][0]]
    assert not {prompt_key(row["prompt"]) for row in learnt} & {prompt_key(prompt) for prompt in seen.seen[0][0]}
    assert len({tuple(responses) for _, responses in seen.seen}) > 1  # the model changes, the prompts do not
    assert len({tuple(prompts) for prompts, _ in seen.seen}) == 1

    kept = KeepBestByReward(reward_folder, num_prompts=64, dirpath=str(tmp_path / "b"))
    _, logger = trained(folder, kept)
    policy, judge = Policy.load(tmp_path / "b"), Judge.load(reward_folder)
    written = [row.written for row in held_out]
    answers = policy.answer(written, SHORT, policy.row_generators(0, [("reward score", r.row) for r in held_out]))
    said = [policy.as_taught(*one) for one in zip(written, answers, strict=True)]
    scores = judge.scores(written, said, [one.ended for one in answers])
    assert kept.best is not None
    assert kept.best.score == max(logger.series("val/reward_score")) == pytest.approx(float(scores.mean()), abs=1e-4)


def test_fewer_prompts_are_drawn_from_what_is_held_out(folder, tmp_path):
    few, other = Says(*[0.0] * STEPS), Says(*[0.0] * STEPS)
    trained(folder, KeepBestByReward(few, num_prompts=3, dirpath=str(tmp_path)))
    assert len(few.seen[0][0]) == 3
    given = [{"prompt": "the chain"}, {"messages": []} | {"prompt": "bake bread"}]
    trained(folder, KeepBestByReward(other, data=given[:1], dirpath=str(tmp_path)))
    assert other.seen[0][0] == ["the chain"]


def test_a_resumed_run_goes_on_with_the_best(folder, tmp_path):
    def run_it(name: str, scores: list[float], ckpt_path: Path | None = None) -> tuple[Any, Any]:
        kept = KeepBestByReward(Says(*scores), num_prompts=3, dirpath=str(tmp_path / name))
        saver = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=1, save_top_k=-1)
        module, _ = trained(folder, kept, saver, enable_checkpointing=True, ckpt_path=ckpt_path)
        return kept, weights(module)

    whole, end = run_it("best", [1, 3, 2, 2.5])
    before = (tmp_path / "best" / "model.safetensors").read_bytes()
    resumed, resumed_end = run_it("best", [2, 2.5], tmp_path / "saved" / "step=3.ckpt")
    assert resumed.best == whole.best == (3, 2)
    assert same_weights(end, resumed_end)
    assert (tmp_path / "best" / "model.safetensors").read_bytes() == before

    shutil.rmtree(tmp_path / "best")
    with pytest.warns(UserWarning, match="of step 2, is not in .* the best is looked for anew"):
        anew, _ = run_it("best", [2, 2.5], tmp_path / "saved" / "step=3.ckpt")
    assert anew.best is not None
    assert anew.best.step > 2
    assert (tmp_path / "best" / "model.safetensors").is_file()


def test_a_checkpoint_can_be_kept_by_it(folder, tmp_path):
    kept = KeepBestByReward(Says(1, 3, 2, 0), num_prompts=3, dirpath=str(tmp_path / "best"))
    by_it = {"monitor": "val/reward_score", "mode": "max", "save_on_train_epoch_end": False}
    saver = ModelCheckpoint(tmp_path / "saved", "{step}", **by_it)
    trained(folder, kept, saver, enable_checkpointing=True)
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["step=2.ckpt"]


def test_nothing_is_kept_of_a_check(folder, tmp_path):
    reward = Says(*[1.0] * STEPS)
    options = {"num_sanity_val_steps": 1}
    trained(folder, KeepBestByReward(reward, num_prompts=3, dirpath=str(tmp_path / "best")), **options)
    assert len(reward.seen) == STEPS
    trained(folder, KeepBestByReward(Says(1.0), num_prompts=3, dirpath=str(tmp_path / "none")), fast_dev_run=1)
    assert not (tmp_path / "none").exists()


def test_dpo_is_kept_by_it_too(folder, tmp_path):
    data = PreferenceDataModule(folder, preference_rows(24), validation_split=0.3, batch_size=4, max_length=48)
    kept = KeepBestByReward(lengths, num_prompts=3, sampling=SHORT, dirpath=str(tmp_path / "best"))
    logger = fit(DPOModule(folder), data, callbacks=[kept], max_steps=2, val_check_interval=1)
    assert kept.best is not None
    assert kept.best.score == max(logger.series("val/reward_score"))


@pytest.mark.matrix
def test_two_processes_keep_what_one_keeps(folder, reward_folder, tmp_path):
    models = {"folder": folder, "reward": reward_folder}
    one = run("auto", **models, best=str(tmp_path / "one"))
    names = ["ddp", "zero3", "fsdp2"]
    runs = [{"name": name, **models, "best": str(tmp_path / name)} for name in names]
    results = run_in_processes("helpers.best_runs:run_all", runs=runs)
    assert one["scores"][0] != one["scores"][1]
    for first, second in zip(*results, strict=True):
        assert first["state"] == second["state"]
        assert first["scores"] == pytest.approx(one["scores"], abs=1e-4, rel=1e-4)
        assert first["state"]["best"]["step"] == one["state"]["best"]["step"]
    assert all((tmp_path / name / "model.safetensors").is_file() for name in ("one", *names))


def test_what_cannot_be_kept_is_refused(folder, tmp_path):
    kept = KeepBestByReward(lengths, dirpath=str(tmp_path / "best"))
    pairs = PreferenceDataModule(folder, preference_rows(16), validation_split=0.3, batch_size=4, max_length=48)
    with pytest.raises(UserError, match="RewardModule trains no language model"):
        fit(RewardModule(folder), pairs, callbacks=[kept])
    nothing = InstructionDataModule(folder, instruction_rows(8), validation_split=0, max_length=48)
    with pytest.raises(UserError, match=r"finds no held-out prompts: .* validation_split is 0"):
        fit(SFTModule(folder), nothing, callbacks=[kept])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("of somebody else")
    with pytest.raises(UserError, match="is not an export"):
        trained(folder, KeepBestByReward(lengths, dirpath=str(tmp_path / "mine")))
    with pytest.raises(UserError, match="neither a reward model folder nor"):
        trained(folder, KeepBestByReward("nowhere"))
    with pytest.raises(NonFiniteError, match="a score is not finite"):
        trained(folder, KeepBestByReward(Says(float("nan")), num_prompts=3, dirpath=str(tmp_path / "best")))
    with pytest.raises(UserError, match="num_prompts"):
        KeepBestByReward(lengths, num_prompts=0)
