"""What the command line says, and leaves with, when a run is stopped, or must not begin."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from helpers.cli_runs import SFT, save_model, save_pairs, short, working_folder
from helpers.forked import run_ranks
from rlhf_lightning import InstructionDataModule
from rlhf_lightning.cli.main import main
from rlhf_lightning.runs.lock import LOCK, locked


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopping")
    save_model(folder / "lm")
    save_pairs(folder / "pairs.jsonl")
    return folder


def recipe(root, hook, step, **arguments):
    """A file of callbacks, one of which sends SIGTERM."""
    path = root / f"{hook}-{step}.yaml"
    arguments = {"hook": hook, "step": step} | arguments
    path.write_text(
        "trainer:\n  callbacks:\n"
        "  - class_path: ModelCheckpoint\n    init_args: {every_n_train_steps: 100, save_last: true}\n"
        "  - class_path: rlhf_lightning.HFExport\n"
        f"  - class_path: helpers.stopped.SignalAt\n    init_args: {arguments}\n".replace("'", "")
    )
    return f"--config={path.name}"


@pytest.fixture
def leaves(root, monkeypatch, capfd):
    """Runs the command line in the folder; its exit code and what it says on stderr."""

    def run(*words):
        monkeypatch.setattr("sys.argv", ["rlhf"])
        capfd.readouterr()
        with working_folder(root), pytest.raises(SystemExit) as error:
            main([*words])
        return error.value.code, capfd.readouterr().err

    return run


def fit(folder, *more, steps=8):
    return ["fit", *SFT, *more, *short("lm", "pairs.jsonl", folder, steps=steps)]


def test_sigterm_during_training_ends_with_143_and_how_to_go_on(root, leaves):
    code, said = leaves(*fit("stopped", recipe(root, "on_train_batch_start", 2)))
    assert code == 143
    assert said.splitlines()[-1].startswith("stopped by SIGTERM after 3 optimizer steps; go on from 'stopped/checkpoi")
    assert {path.name for path in (root / "stopped/checkpoints").iterdir()} == {"last.ckpt"}
    assert not (root / "stopped" / LOCK).exists()


def test_sigterm_while_data_are_prepared_ends_with_143_and_leaves_nothing(root, leaves, monkeypatch):
    monkeypatch.setattr(InstructionDataModule, "prepare_data", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    code, said = leaves(*fit("prepared"))
    assert (code, said.splitlines()[-1].split(";")[0]) == (143, "stopped by SIGTERM after 0 optimizer steps")
    assert not (root / "prepared").exists()


def test_sigterm_while_the_command_is_read_has_its_line_too(root, leaves, monkeypatch):
    monkeypatch.setattr(InstructionDataModule, "__init__", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    code, said = leaves(*fit("read"))
    assert (code, said.splitlines()[-1]) == (143, "stopped by SIGTERM before anything was done")


def test_sigterm_in_the_export_completes_the_run(root, leaves):
    code, said = leaves(*fit("exported", recipe(root, "on_fit_end", 2), steps=2))
    assert code == 143
    assert said.splitlines()[-1] == "the run was complete when SIGTERM ended the process"
    assert (root / "exported/export/model.safetensors").exists()


def test_a_second_run_in_a_folder_is_refused_before_anything_is_written(root, leaves):
    with locked(root / "shared"):
        code, said = leaves(*fit("shared", "--overwrite=true"))
        assert {path.name for path in (root / "shared").iterdir()} == {LOCK}
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert line.startswith("error: 'shared' is in use by another run (process ")
    assert "loading" not in said


def test_a_folder_that_cannot_be_written_is_said_before_models_are_loaded(root, leaves):
    (root / "file").touch()
    code, said = leaves(*fit("file/run"))
    assert code == 2
    assert said.splitlines()[-1].startswith(
        "error: --trainer.default_root_dir: 'file/run' cannot be written (Not a dir"
    )
    assert "loading" not in said


@pytest.fixture
def limit():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_becomes_full_ends_a_run_in_one_line_and_leaves_the_checkpoint_before(root, leaves, limit):
    (root / "full.yaml").write_text(
        "trainer:\n  callbacks:\n"
        "  - class_path: ModelCheckpoint\n    init_args: {every_n_train_steps: 2, save_last: true}\n"
        "  - class_path: helpers.stopped.FullDisk\n    init_args: {step: 2, size: 40000}\n"
    )
    code, said = leaves(*fit("full", "--config=full.yaml"))
    written = [path.name for path in (root / "full/checkpoints").iterdir()]
    assert (code, sorted(written)) == (2, ["epoch=0-step=2.ckpt", "last.ckpt"])
    assert torch.load(root / "full/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    assert said.partition("error")[2].splitlines() == [
        ": the checkpoint 'full/checkpoints/epoch=0-step=4.ckpt' was not written: File too large"
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_stop_at_the_same_batch_whichever_is_asked(root, rank):
    words = fit(f"rank{rank}", recipe(root, "on_train_batch_start", 1, rank=rank), "--config=trainer/ddp.yaml")
    words.append("--trainer.devices=2")
    ranks = run_ranks(words, root)
    assert [each.returncode for each in ranks] == [143, 143]
    last = [each.stderr.strip().splitlines()[-1] for each in ranks]
    assert last[0].startswith("stopped by SIGTERM after 2 optimizer steps; go on from ")
    assert "stopped by" not in last[1]
    assert torch.load(Path(root, f"rank{rank}/checkpoints/last.ckpt"), weights_only=True)["global_step"] == 2
