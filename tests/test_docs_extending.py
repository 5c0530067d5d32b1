"""Every example of docs/extending.md runs as it stands there, and what the page says of callbacks is so."""

from __future__ import annotations

import copy
import importlib
import json
import re
import shlex
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from transformers import AutoModelForCausalLM

from helpers.engine_contract import CONTRACT
from helpers.stages import (
    MemoryLogger,
    adamw,
    fit,
    instruction_rows,
    preference_rows,
    prompt_rows,
    save_llama,
    save_reward_model,
    sgd,
    share_of_letters,
    trainer,
    weights,
)
from rlhf_lightning import (
    GRPOModule,
    InstructionDataModule,
    PPOModule,
    PreferenceDataModule,
    PromptDataModule,
    RLOOModule,
    Sampling,
    SFTModule,
)
from rlhf_lightning.cli.main import main
from rlhf_lightning.models.reward_functions import import_from_working_folder

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+) ?(\S*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
FILES = {name: text for _, name, text in BLOCKS if name}
MODULES = [name.removesuffix(".py") for name in FILES if name.endswith(".py")]
COMMANDS = [line for language, _, text in BLOCKS if language == "bash" for line in text.splitlines()]
SHORT = [
    "--report=false",
    "--data.validation_split=0.25",
    "--trainer.max_steps=4",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
]
SMALL = {
    "InstructionDataModule": ["--data.batch_size=4", "--data.max_length=48"],
    "PreferenceDataModule": ["--data.batch_size=4", "--data.max_length=48"],
    "reward.yaml": ["--data.batch_size=1", "--data.max_length=64"],
    "ppo.yaml": [
        "--data.max_prompt_length=40",
        "--model.sampling.max_new_tokens=4",
        "--model.rollout_batch_size=4",
        "--model.minibatch_size=2",
        "--model.micro_batch_size=1",
    ],
}
"""Options that make a run on a recipe, or on a file of the page with such data, a short one."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the page, and what its commands name."""
    folder = tmp_path_factory.mktemp("page")
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    for name in ("MODEL", "STUDENT", "SFT"):
        save_llama(folder / name)
    save_llama(folder / "TEACHER", hidden_size=48)
    save_reward_model(folder / "REWARD", str(folder / "SFT"))
    rows = {"DEMONSTRATIONS": instruction_rows(8), "PAIRS": preference_rows(8)}
    for name, some in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Be in the folder of the page, and let nothing be found there afterwards."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["rlhf"])
    yield folder
    for name in MODULES:
        sys.modules.pop(name, None)


def example(name: str) -> ModuleType:
    import_from_working_folder()
    return importlib.import_module(name)


def test_the_page_has_an_example_for_each_kind_and_none_is_long():
    assert len(MODULES) == 6
    assert all(len(FILES[f"{name}.py"].splitlines()) < 40 for name in MODULES)
    assert [name for name in FILES if name.endswith(".yaml") and f"--config {name}" not in "".join(COMMANDS)] == []


@pytest.mark.parametrize("line", COMMANDS, ids=[re.sub(r".*--config (\S+).*", r"\1", line) for line in COMMANDS])
def test_a_command_of_the_page_trains(line, here, tmp_path):
    words = shlex.split(line)
    data = "DEMONSTRATIONS.jsonl" if "distillation.yaml" in line else "PAIRS.jsonl"
    read = "".join(FILES.get(word, word) for word in words)
    small = [option for name, options in SMALL.items() if name in read for option in options]
    # What stands for the user's own file is the last word of each command, or stands in its YAML file.
    given = [] if "thumbs.yaml" in words else [f"--data.data={data}"]
    given += ["--model.demonstrations=DEMONSTRATIONS.jsonl", "--model.max_length=48"] if "ptx.yaml" in words else []
    main([*words[1:], *SHORT, *small, *given, f"--trainer.default_root_dir={tmp_path / 'run'}"])
    assert (tmp_path / "run" / "config.yaml").exists()


def test_the_algorithm_brings_the_student_to_the_teacher_and_exports_it(here, tmp_path):
    module = example("distillation").Distillation("STUDENT", "TEACHER", optimizer=adamw(1e-2), micro_batch_size=3)
    data = InstructionDataModule("STUDENT", instruction_rows(8), batch_size=8, max_length=48, validation_split=0.0)
    losses = fit(module, data, max_epochs=8).series("train/loss")
    assert losses[-1] < losses[0] / 2
    assert not any("teacher" in name for name, weight in module.named_parameters() if weight.requires_grad)


def test_the_algorithm_gives_one_loss_however_it_is_cut(here):
    data = InstructionDataModule("STUDENT", instruction_rows(8), batch_size=8, max_length=48, validation_split=0.0)
    kind = example("distillation").Distillation
    losses = [fit(kind("STUDENT", "TEACHER", micro_batch_size=size), data).series("train/loss") for size in (None, 3)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_loss_on_pairs_is_the_papers_and_learns(here):
    module = example("orpo").ORPO("MODEL", odds_coef=100.0, optimizer=adamw(1e-2))
    data = PreferenceDataModule("MODEL", preference_rows(8), batch_size=8, max_length=48, validation_split=0.0)
    data.prepare_data()
    data.setup("fit")
    (batch,) = data.train_dataloader()
    model = AutoModelForCausalLM.from_pretrained("MODEL")
    expected = torch.zeros(())
    for row, length in enumerate(batch.prompt_lengths.tolist()):
        odds = []
        for ids, mask in ((batch.chosen_ids, batch.chosen_mask), (batch.rejected_ids, batch.rejected_mask)):
            said = ids[row][mask[row]]
            logprobs = model(said.unsqueeze(0)).logits[0, :-1].log_softmax(-1).gather(1, said[1:, None])[length - 1 :]
            p = logprobs.mean().exp()
            odds.append((p / (1 - p), -logprobs.mean()))
        expected += odds[0][1] - 100 * torch.sigmoid((odds[0][0] / odds[1][0]).log()).log()
    log = fit(module, data, max_epochs=10)
    assert log.series("train/loss")[0] == pytest.approx(float(expected.detach()) / 8, rel=2e-5)
    assert log.series("train/accuracy")[-1] > log.series("train/accuracy")[0]


def ptx_step(module: Any) -> tuple[MemoryLogger, dict[str, torch.Tensor]]:
    data = PromptDataModule("SFT", prompt_rows(4), rollout_batch_size=4, max_prompt_length=40, validation_split=0.0)
    return fit(module, data), weights(module.policy)


def test_the_loss_beside_ppo_adds_its_own_gradient(here, monkeypatch):
    sizes = {"rollout_batch_size": 4, "minibatch_size": 4, "micro_batch_size": 2, "ppo_epochs": 1}
    plain = {"optimizer": sgd(1.0), "lr_schedule": "constant", "gradient_clip_val": None, **sizes}
    plain["sampling"] = Sampling(max_new_tokens=4)
    kind, seen = example("ptx").PPOWithPTX, []
    pieces = kind.pieces
    monkeypatch.setattr(kind, "pieces", lambda self, batch: seen.append(pieces(self, batch)) or seen[-1])
    moved = {}
    for coef in (0.0, 0.5):
        module = kind(
            "SFT", share_of_letters, demonstrations="DEMONSTRATIONS.jsonl", max_length=48, ptx_coef=coef, **plain
        )
        log, moved[coef] = ptx_step(module)
    model = AutoModelForCausalLM.from_pretrained("SFT")
    nll, count = torch.zeros(()), 0
    for _, batch in seen[-1]:
        for ids, taught in zip(batch.input_ids, batch.loss_mask, strict=True):
            logprobs = model(ids.unsqueeze(0)).logits[0, :-1].log_softmax(-1)
            nll = nll - logprobs.gather(1, ids[1:, None])[taught[1:]].sum()
            count += int(taught.sum())
    assert log.series("train/ptx_nll") == pytest.approx([float(nll) / count], rel=1e-4)
    (0.5 * nll / count).backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(moved[0.0][name] - moved[0.5][name], weight.grad, atol=1e-5, rtol=1e-3)


def test_the_form_of_data_gives_pairs(here):
    rows = example("thumbs").Thumbs("log.jsonl")
    data = PreferenceDataModule("MODEL", rows, batch_size=2, max_length=64, validation_split=0.0)
    data.prepare_data()
    data.setup("fit")
    (batch,) = data.train_dataloader()
    chosen = {
        data.tokenizer.decode(ids[mask][length:], skip_special_tokens=True).strip()
        for ids, mask, length in zip(batch.chosen_ids, batch.chosen_mask, batch.prompt_lengths, strict=True)
    }
    assert chosen == {"Mix flour, water, salt and yeast.", "Start with the chain."}


@pytest.mark.parametrize("check", CONTRACT)
def test_the_engine_keeps_the_contract(check, here):
    check(partial(example("copy_engine").CopyEngine, dtype="float64"))


def test_the_rewards_say_what_they_are_called(here):
    rewards = example("my_rewards")
    assert rewards.short_and_polite(["a", "a"], ["please", "no"]) == [pytest.approx(0.94), pytest.approx(-0.02)]
    turns = [[{"role": "user", "content": "Bake bread"}]]
    assert rewards.answers_the_last_turn(["x"], ["bread is good"], turns) == [0.5]


class Watch(pl.Callback):
    """Notes when its hooks are called, and what they see."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.norms: list[float] = []
        self.global_steps: list[int] = []
        self.losses: list[float] = []
        self.partial: list[float] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        weight = next(p for p in pl_module.export_model.parameters() if p.requires_grad)
        weight.register_hook(lambda gradient: self.partial.append(float(gradient.norm())))

    def on_before_backward(self, *_: Any) -> None:
        self.calls.append("before_backward")

    def on_after_backward(self, *_: Any) -> None:
        self.calls.append("after_backward")

    def on_before_zero_grad(self, *_: Any) -> None:
        self.calls.append("before_zero_grad")

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.calls.append("before_step")
        norms = [p.grad.norm() for p in pl_module.parameters() if p.grad is not None]
        self.norms.append(float(torch.stack(norms).norm()))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.global_steps.append(trainer.global_step)
        assert not outputs["loss"].requires_grad
        self.losses.append(float(outputs["loss"]))


class Steps(MemoryLogger):
    """Also keeps the step that each call was given."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int | None] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics)
        self.steps.append(step)


def watched(module: Any, data: Any, **settings: Any) -> tuple[Watch, Steps, pl.Trainer]:
    watch, logger = Watch(), Steps()
    running = trainer(logger=logger, callbacks=[watch, LearningRateMonitor()], **settings)
    running.fit(module, data)
    return watch, logger, running


def test_hooks_of_a_stage_with_one_step_for_each_batch(here):
    data = InstructionDataModule("MODEL", instruction_rows(8), batch_size=4, max_length=48, validation_split=0.0)
    watch, logger, running = watched(SFTModule("MODEL", micro_batch_size=2, gradient_clip_val=0.01), data)
    one = ["before_backward", "after_backward"]
    assert watch.calls == [*one, *one, "before_step"] * 2  # and never before_zero_grad
    assert watch.global_steps == [1, 2]
    assert running.global_step == 2
    assert watch.norms == pytest.approx([0.01] * 2, rel=1e-3)
    assert min(logger.series("train/grad_norm")) > 0.1
    assert len(watch.partial) == 4
    assert watch.losses == pytest.approx(logger.series("train/objective"))


@pytest.mark.parametrize(
    ("kind", "settings", "steps", "backwards"),
    [
        (PPOModule, {}, 4, 4),
        (RLOOModule, {"samples_per_prompt": 2, "ppo_epochs": 1}, 4, 2),
        (GRPOModule, {"samples_per_prompt": 2, "ppo_epochs": 3}, 12, 2),
    ],
)
def test_hooks_of_a_stage_with_several_steps_for_each_batch(here, tmp_path, kind, settings, steps, backwards):
    sizes = {
        "rollout_batch_size": 4,
        "minibatch_size": 2,
        "micro_batch_size": 1,
        "sampling": Sampling(max_new_tokens=4),
    }
    data = PromptDataModule("SFT", prompt_rows(8), rollout_batch_size=4, max_prompt_length=40, validation_split=0.0)
    module = kind("SFT", share_of_letters, **sizes | settings)
    watch, logger, running = watched(module, data, log_every_n_steps=2)
    assert module.steps_per_batch == steps
    assert watch.global_steps == [steps, 2 * steps]
    assert watch.calls.count("before_step") == 2 * steps
    assert watch.calls.count("after_backward") == watch.calls.count("before_backward") == 2 * steps * backwards
    assert "before_zero_grad" not in watch.calls
    assert len(watch.partial) == 2 * steps * 2  # micro-batches of one response
    assert set(logger.steps) == {1}  # of two batches, every second is logged, under its number
    assert running.callback_metrics["lr-AdamW/pg1"] == pytest.approx(1e-6)  # half of it is left


def test_checkpoints_are_saved_where_the_steps_reach_or_pass_a_multiple(here, tmp_path):
    sizes = {"rollout_batch_size": 2, "minibatch_size": 1, "ppo_epochs": 1, "sampling": Sampling(max_new_tokens=4)}
    data = PromptDataModule("SFT", prompt_rows(8), rollout_batch_size=2, max_prompt_length=40, validation_split=0.0)
    saved = {}
    for every in (3, 4):
        callback = ModelCheckpoint(tmp_path / str(every), "{step}", every_n_train_steps=every, save_top_k=-1)
        running = trainer(callbacks=[callback], enable_checkpointing=True)
        running.fit(PPOModule("SFT", share_of_letters, **sizes), copy.copy(data))
        saved[every] = sorted(path.stem for path in (tmp_path / str(every)).iterdir())
    assert saved == {3: ["step=4", "step=6"], 4: ["step=4", "step=8"]}


def test_callbacks_may_ask_any_stage_for_the_same_things(here):
    module = example("distillation").Distillation("STUDENT", "TEACHER")
    module.configure_model()
    for name in ("export_model", "tokenizer", "trained_parts", "finetune", "model_name_or_path"):
        assert getattr(module, name)
    assert module.run_state() == {}
