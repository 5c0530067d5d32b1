"""What a run has logged in the end does not depend on where it was cut, nor how often."""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint, OnExceptionCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from helpers.stages import adamw, instruction_rows, save_llama, trainer
from rlhf_lightning import HFExport, InstructionDataModule, SampleTexts, Sampling, SFTModule
from rlhf_lightning.runs.event_files import PATTERN, find_event_files, read_event_file

CLOCK = ("tokens_per_second", "memory_gib")
BATCHES, EPOCHS = 4, 2


class Cut(Exception):
    """Ends a run."""


class CutAt(pl.Callback):
    """Ends a run in one of its hooks, at its `count`-th call; the last callback but those that save."""

    def __init__(self, hook, count):
        self.count = count
        setattr(self, hook, self.cut)

    def cut(self, *args):
        self.count -= 1
        if self.count == 0:
            raise Cut


class CutAfterSaving(ModelCheckpoint):
    """Saves after every batch, and ends a run when it has."""

    def __init__(self, folder, cut_after=None):
        super().__init__(folder, "last", every_n_train_steps=1, enable_version_counter=False)
        self.cut_after = cut_after

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.save_checkpoint(self.dirpath + "/last.ckpt")
        if trainer.global_step == self.cut_after:
            raise Cut


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"), hidden_size=16)


def run(base, folder, cut=None, saver=None, **limits):
    """Fit, from the last checkpoint if there is one, until something ends it."""
    torch.manual_seed(3)
    rows = instruction_rows(16)
    module = SFTModule(base, optimizer=adamw(1e-3), sampling=Sampling(max_new_tokens=4))
    data = InstructionDataModule(base, rows, validation_data=rows[:3], max_length=48, batch_size=4)
    samples = SampleTexts(["how are you?"])
    callbacks = [LearningRateMonitor("step"), samples, *([cut] if cut else []), saver or CutAfterSaving(folder)]
    loggers = [
        TensorBoardLogger(folder, name="", version="", default_hp_metric=False),
        CSVLogger(folder, name="", version=""),
    ]
    settings = {"max_epochs": EPOCHS, "val_check_interval": 2, "default_root_dir": folder, **limits}
    fitting = trainer(logger=loggers, callbacks=[*callbacks, HFExport()], enable_checkpointing=True, **settings)
    last = folder / "last.ckpt"
    try:
        fitting.fit(module, data, ckpt_path=last if last.exists() else None, weights_only=True)
    except Cut:
        for logger in loggers:
            logger.finalize("failed")
    return fitting


def outcome(folder):
    """Points of each name in the order of the files, rows of the table, the samples, and the model card's metrics."""
    points = {}
    for path in find_event_files(folder):
        for name, values in read_event_file(path).scalars.items():
            points.setdefault(name, []).extend(value[:2] for value in values)
    points = {name: values for name, values in points.items() if not any(word in name for word in CLOCK)}
    table = CSVTable(folder / "metrics.csv")
    card = (folder / "export" / "README.md").read_text().partition("## Last metrics")[2].splitlines()
    metrics = [line for line in card if not any(word in line for word in CLOCK)]
    return points, table.rows, (folder / "samples.md").read_text(), metrics


class CSVTable:
    def __init__(self, path):
        names, *rows = (line.split(",") for line in path.read_text().splitlines())
        kept = [place for place, name in enumerate(names) if not any(word in name for word in CLOCK)]
        self.rows = [[names[place] + "=" + row[place] for place in kept] for row in rows]


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(base, folder)
    points, table, samples, metrics = outcome(folder)
    assert len(points["train/loss"]) == BATCHES * EPOCHS
    assert [step for step, _ in points["val/loss"]] == [1, 3, 5, 7]
    assert samples.count("## Step ") == 5
    assert any("val/loss" in line for line in metrics)
    return points, table, samples, metrics


FINALLY = ("on_fit_end", 1)
CUTS = {
    "before its first checkpoint": [("on_train_batch_start", 1)],
    "right after it has saved": [("saved", 3)],
    "right after it has saved the last batch of an epoch": [("saved", 4)],
    "right after it has saved the last batch": [("saved", 8)],
    "in a validation": [("on_validation_batch_end", 2)],
    "in the validation at an epoch's end": [("on_validation_batch_start", 2)],
    "after a validation": [("on_train_batch_start", 3)],
    "at an epoch's end": [("on_train_epoch_end", 1)],
    "between two epochs": [("on_train_epoch_start", 2)],
    "at the end of training": [("on_train_end", 1)],
    "in the export": [FINALLY],
    "five times": [
        ("saved", 2),
        ("on_train_batch_start", 2),
        ("on_validation_end", 1),
        ("saved", 5),
        ("on_fit_end", 1),
    ],
}


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_a_cut_run_has_logged_what_one_has_that_was_not_cut(base, whole, tmp_path, cuts):
    for hook, count in cuts:
        if hook == "saved":
            run(base, tmp_path, saver=CutAfterSaving(tmp_path, cut_after=count))
        else:
            run(base, tmp_path, cut=CutAt(hook, count))
    if not (tmp_path / "last.ckpt").exists():  # the command line removes them
        for path in [*tmp_path.glob(PATTERN), tmp_path / "samples.md"]:
            path.unlink()

    run(base, tmp_path)

    for found, expected in zip(outcome(tmp_path), whole, strict=True):
        assert found == expected


@pytest.mark.parametrize("steps", [6, 7])
def test_what_comes_after_the_last_step_is_made_up_for(base, tmp_path, steps):
    """With a validation, and without one; in the middle of an epoch."""
    run(base, tmp_path / "whole", max_steps=steps)
    run(base, tmp_path / "cut", max_steps=steps, saver=CutAfterSaving(tmp_path / "cut", cut_after=steps))
    assert not (tmp_path / "cut" / "export").exists()

    trainer = run(base, tmp_path / "cut", max_steps=steps)

    assert trainer.max_steps == trainer.global_step == steps
    for found, expected in zip(outcome(tmp_path / "cut"), outcome(tmp_path / "whole"), strict=True):
        assert found == expected


def test_a_batch_that_failed_is_logged_once(base, whole, tmp_path):
    """`LearningRateMonitor` logs as a batch begins."""

    class FailAt3(CutAt):
        def on_before_optimizer_step(self, trainer, *_):
            if trainer.global_step == 3:
                raise Cut

    run(base, tmp_path, cut=FailAt3("on_sanity_check_start", 1), saver=OnExceptionCheckpoint(tmp_path, "last"))

    run(base, tmp_path)

    for found, expected in zip(outcome(tmp_path), whole, strict=True):
        assert found == expected
