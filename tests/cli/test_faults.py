"""What breaks under a run: one line, an exit code, nothing half-written."""

from __future__ import annotations

import errno
import sys
from pathlib import Path

import pytest
import torch
from pytorch_lightning.loggers import TensorBoardLogger

from helpers.cli_runs import SFT, save_model, save_pairs, short, working_folder
from rlhf_lightning import SFTModule
from rlhf_lightning.cli.main import main
from rlhf_lightning.models.written_folders import ModelFolder


def break_logger(monkeypatch):
    def log_metrics(*_, **__):
        raise OSError(errno.EIO, "", "/logs/events")

    monkeypatch.setattr(TensorBoardLogger, "log_metrics", log_metrics)


def fill_disk_in_export(monkeypatch):
    def write(self, folder, *_):
        (folder / "model.safetensors").write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "", str(folder / "model.safetensors"))

    monkeypatch.setattr(ModelFolder, "write", write)


def run_out_of_memory(monkeypatch):
    def training_step(*_):
        torch.empty(2**62, dtype=torch.uint8)

    monkeypatch.setattr(SFTModule, "training_step", training_step)


def exit_in_a_hook(monkeypatch):
    monkeypatch.setattr(SFTModule, "on_train_batch_start", lambda *_: sys.exit(0))


FAULTS = [
    (break_logger, 1, "/logs/events: Input/output error; the disk, or the way to it, failed"),
    (fill_disk_in_export, 2, "model.safetensors: No space left on device; make room, or write to another disk"),
    (run_out_of_memory, 2, "memory ran out ("),
    (exit_in_a_hook, 1, "something that the run called ended it by sys.exit after 0 optimizer steps"),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "lm")
    save_pairs(folder / "pairs.jsonl")
    return folder


@pytest.mark.parametrize(("fault", "code", "said"), FAULTS)
def test_a_fault_is_one_line_with_its_exit_code(inputs, tmp_path, monkeypatch, capfd, fault, code, said):
    quiet = ["--trainer.log_every_n_steps=1", "--trainer.num_sanity_val_steps=0"]
    monkeypatch.setattr("sys.argv", ["rlhf"])
    fault(monkeypatch)
    with working_folder(tmp_path), pytest.raises(SystemExit) as end:
        main(["fit", *SFT, *short(inputs / "lm", inputs / "pairs.jsonl", tmp_path), *quiet])
    err = capfd.readouterr().err
    assert end.value.code == code, err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert said in errors[0]
    assert "Traceback" not in err
    assert not (tmp_path / "export").exists()
    assert not list(tmp_path.glob(".export*"))
