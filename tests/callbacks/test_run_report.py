"""A run ends with its report, whatever it logs to, and never fails by it."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import LambdaCallback
from pytorch_lightning.demos.boring_classes import BoringModel
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from helpers.stages import MemoryLogger
from rlhf_lightning import RunReport
from rlhf_lightning.runs.signals import Stopped


class Logs(BoringModel):
    """Logs its loss as the stages do."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", loss["loss"])
        return loss


def fit(root, *callbacks, logger=None, **options):
    """Three steps, the report first, so that it must wait for those that come after it."""
    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=root,
        max_steps=3,
        limit_val_batches=1,
        log_every_n_steps=1,
        logger=TensorBoardLogger(root, name="", version="") if logger is None else logger,
        callbacks=[*callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    trainer.fit(Logs())


@pytest.fixture
def said(caplog):
    caplog.set_level("INFO", logger="pytorch_lightning.utilities.rank_zero")
    return caplog


def test_it_holds_what_was_logged_to_the_last_step_and_what_others_wrote_at_the_end(tmp_path, said):
    export = LambdaCallback(on_fit_end=lambda *_: (tmp_path / "export").mkdir())
    fit(tmp_path, RunReport(), export)
    page = (tmp_path / "report.html").read_text()
    assert "3 steps" in page
    assert str(tmp_path / "export") in page
    assert (tmp_path / "report/loss.png").exists()
    (summary,) = [message for message in said.messages if message.startswith("Run: 3 steps")]
    assert ["report", str(tmp_path / "report.html")] in [line.split() for line in summary.splitlines()]
    assert "Training loss" in summary


def test_a_csv_will_do(tmp_path):
    fit(tmp_path, RunReport(str(tmp_path / "mine/page.html")), logger=CSVLogger(tmp_path, name="logs"))
    assert "3 steps" in (tmp_path / "mine/page.html").read_text()


@pytest.mark.parametrize("logger", [False, MemoryLogger()])
def test_without_logs_that_it_can_read_one_line_says_so(tmp_path, said, logger):
    fit(tmp_path, RunReport(), logger=logger)
    assert said.messages[-1] == "no report: this run has no logs of TensorBoardLogger or CSVLogger"
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("stopped", [KeyboardInterrupt(), Stopped("SIGINT")])
def test_a_run_that_is_stopped_by_hand_has_one_too(tmp_path, stopped):
    def stop(trainer, *_):
        if trainer.global_step == 2:
            raise stopped

    with pytest.raises(SystemExit):
        fit(tmp_path, RunReport(), LambdaCallback(on_train_batch_end=stop))
    assert "Training loss" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(("error", "at"), [(ValueError(), 2), (KeyboardInterrupt(), 0), (Stopped("SIGTERM"), 2)])
def test_a_run_that_fails_or_never_began_has_none(tmp_path, error, at):
    def stop(trainer, *_):
        if trainer.global_step == at:
            raise error

    with pytest.raises((SystemExit, ValueError)):
        fit(tmp_path, RunReport(), LambdaCallback(on_train_batch_start=stop))
    assert not (tmp_path / "report.html").exists()


def test_a_fast_dev_run_leaves_nothing_behind(tmp_path):
    fit(tmp_path, RunReport(), fast_dev_run=1)
    assert not [*tmp_path.rglob("report*")]


def test_a_report_that_cannot_be_written_is_one_warning(tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match=r"^no report was written: the report cannot be written to '.*file"):
        fit(tmp_path, RunReport(str(tmp_path / "file" / "page.html")))
