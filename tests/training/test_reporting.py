"""Texts reach every logger that takes them, in the way that it takes them."""

import logging
import sys
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, create_autospec

import pytest
import torch
from pytorch_lightning.loggers import (
    CometLogger,
    CSVLogger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers.stages import MemoryLogger
from rlhf_lightning.training import reporting
from rlhf_lightning.training.reporting import log_text, peak_memory


def log(*loggers: Any) -> None:
    trainer = SimpleNamespace(is_global_zero=True, loggers=list(loggers))
    log_text(SimpleNamespace(trainer=trainer), "train/sample", "# An answer", 3)


class MlflowClient:
    """As `mlflow.MlflowClient` has it: the run comes first."""

    def log_text(self, run_id: str, text: str, artifact_file: str) -> None: ...


class CometExperiment:
    """As `comet_ml.CometExperiment` has it."""

    def log_text(self, text: Any, step: Any = None, metadata: Any = None) -> None: ...


def of_kind(kind: type, experiment: Any, **attributes: Any) -> Any:
    """A logger of Lightning's whose package need not be installed."""
    return type(kind.__name__, (kind,), {"__init__": lambda self: None, "experiment": experiment, **attributes})()


def test_mlflow_gets_a_file_of_the_run():
    client = create_autospec(MlflowClient, instance=True)
    log(of_kind(MLFlowLogger, client, run_id="run 7"))
    client.log_text.assert_called_once_with("run 7", "# An answer", "train/sample/step=00000003.md")


def test_comet_gets_a_text_of_the_step():
    experiment = create_autospec(CometExperiment, instance=True)
    log(of_kind(CometLogger, experiment))
    experiment.log_text.assert_called_once_with("# An answer", step=3, metadata={"key": "train/sample"})


def test_wandb_gets_a_table():
    table = MagicMock()
    log(of_kind(WandbLogger, MagicMock(spec=[]), log_text=table))
    table.assert_called_once_with("train/sample", columns=["text"], data=[["# An answer"]], step=3)


def test_tensorboard_gets_a_text(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    log(logger)
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["tensors"] == ["train/sample/text_summary"]


@pytest.mark.parametrize("kind", [CSVLogger, MemoryLogger])
def test_for_a_logger_without_texts_one_line_says_so_once(tmp_path, caplog, kind):
    reporting._say_left_out.cache_clear()
    logger = kind(tmp_path) if kind is CSVLogger else kind()
    with caplog.at_level(logging.INFO, "pytorch_lightning"):
        log(logger)
        log(logger)
    assert caplog.messages == [f"{kind.__name__} takes no texts: sampled answers are left out of it"]


def test_memory_grows_by_what_is_held():
    before = peak_memory(torch.device("cpu"))["memory_gib"]
    held = bytearray(b"x") * 2**28
    after = peak_memory(torch.device("cpu"))["memory_gib"]
    assert len(held) == 2**28
    assert 0.05 < before <= after
    assert after > 0.25


def test_on_a_gpu_it_is_what_tensors_take_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    assert peak_memory(torch.device("cuda", 0)) == {"memory_gib": 3.0}


def test_where_memory_cannot_be_asked_nothing_is_logged(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory(torch.device("cpu")) == {}


def test_patience_is_over_once_in_a_while(monkeypatch):
    monkeypatch.setattr(reporting.time, "monotonic", iter([0.0, 3.0, 4.5, 5.0, 8.4, 8.5]).__next__)
    patience = reporting.Patience(4.0)
    assert [patience.is_over() for _ in range(5)] == [False, True, False, False, True]
