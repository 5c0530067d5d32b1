"""Which checkpoint a run goes on from, and that it then ends as if nothing had happened."""

from __future__ import annotations

import inspect
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch

from algorithms.test_stage_resume import assert_same
from helpers.cli_runs import REWARD, SFT, save_model, save_pairs, short, working_folder
from helpers.forked import run_forked, run_ranks
from helpers.killed import die_in
from rlhf_lightning.cli.main import main
from rlhf_lightning.runs.checkpoint_files import MANIFEST
from rlhf_lightning.runs.ending import MARK
from rlhf_lightning.runs.lock import LOCK

CALLBACKS = """\
trainer:
  max_epochs: -1
  callbacks:
  - class_path: ModelCheckpoint
    init_args: {filename: "{step}", every_n_train_steps: 2, save_top_k: -1, save_last: true}
  - class_path: rlhf_lightning.HFExport
"""
STEPS = 6


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    save_model(root / "lm")
    save_pairs(root / "pairs.jsonl")
    (root / "callbacks.yaml").write_text(CALLBACKS)
    return root


@pytest.fixture
def folder(inputs: Path, tmp_path: Path) -> Path:
    """Where a run is started; its own folder is `run` in there."""
    for path in inputs.iterdir():
        if path.name in ("lm", "pairs.jsonl", "callbacks.yaml"):
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


def words(*more: str, steps: int = STEPS, stage: list[str] = SFT) -> list[str]:
    """A run of six steps of the seven of an epoch, with a checkpoint every two."""
    sizes = ["--config=callbacks.yaml", "--data.batch_size=3"]
    return ["fit", *stage, *sizes, *short("lm", "pairs.jsonl", "run", steps=steps), *more]


def fit(folder: Path, *more: str, **settings: Any) -> Path:
    with working_folder(folder):
        main(words(*more, **settings))
    return folder / "run"


@pytest.fixture(autouse=True)
def _own_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["rlhf"])


@pytest.fixture(scope="module")
def whole(inputs):
    """A run that nothing disturbed."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sys.argv", ["rlhf"])
        return fit(inputs)


@pytest.fixture
def copied(folder, whole):
    """The same for a test of its own."""
    shutil.copytree(whole, folder / "run")
    return folder / "run"


def snapshot(root: Path) -> dict[str, Any]:
    """All files, byte for byte, and when they were changed."""
    paths = [root, *root.rglob("*")] if root.exists() else []
    return {str(path): (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in paths}


def state(root: Path) -> dict[str, Any]:
    checkpoint = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["InstructionDataModule"].pop("done")  # a resumed run also saves when the hooks after the batch have run
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "rlhf_lightning", "InstructionDataModule")
    return {name: checkpoint[name] for name in kept if name in checkpoint}


def assert_ended_as(root: Path, whole: Path) -> None:
    assert_same(state(root), state(whole))
    assert (root / "export/model.safetensors").read_bytes() == (whole / "export/model.safetensors").read_bytes()
    assert (root / MARK).read_text() == (whole / MARK).read_text()
    names = ["last.ckpt", "step=2.ckpt", "step=4.ckpt", "step=6.ckpt"]
    assert sorted(path.name for path in (root / "checkpoints").iterdir()) == names


def test_a_finished_run_is_left_as_it_is(folder, copied, capsys):
    before = snapshot(copied)
    fit(folder, "--ckpt_path=last")
    fit(folder, "--ckpt_path=auto", steps=4)  # one way leads from either word, whatever the limit
    line = (
        "'run' is finished after 6 optimizer steps, nothing is left to do; to train on, raise "
        "--trainer.max_epochs, max_steps or max_time\n"
    )
    assert capsys.readouterr().out == 2 * line
    assert snapshot(copied) == before


def test_the_lock_of_a_run_that_was_killed_after_its_last_word_goes(folder, copied):
    (copied / LOCK).write_text("process 1 on another\n")
    fit(folder, "--ckpt_path=auto")
    assert not (copied / LOCK).exists()


@pytest.mark.matrix
def test_a_finished_run_is_left_as_it_is_by_all_processes(folder, copied):
    before = snapshot(copied)
    done = run_ranks(words("--ckpt_path=auto", "--trainer.strategy=ddp", "--trainer.devices=2"), folder)
    assert [rank.returncode for rank in done] == [0, 0], done
    assert [rank.stdout.count("is finished after 6 optimizer steps") for rank in done] == [1, 0]
    assert snapshot(copied) == before


def test_a_finished_run_goes_on_when_a_limit_is_raised(folder, copied):
    constant = "--model.lr_schedule=constant"  # others depend on where the run ends
    longer, root = folder / "longer", folder / "run"
    fit(folder, constant, "--overwrite=true")
    root.rename(longer)
    for steps, word in ((2, "auto"), (4, "last"), (6, "auto")):
        fit(folder, constant, f"--ckpt_path={word}", steps=steps)
    assert_ended_as(root, longer)


KILLED = {
    "before any checkpoint": ("torch.save", 1, []),
    # One for each of config.yaml and lineage.json; then one for the file, and one for its folder.
    "while a checkpoint is written": ("os.fsync", 7, ["last", "step=2"]),
    "between two checkpoints of a step": ("torch.save", 4, ["last", "step=2", "step=4"]),
    "in the export": ("rlhf_lightning.callbacks.hf_export.model_card", 1, ["last", "step=2", "step=4", "step=6"]),
    "before it is said to be over": (
        "rlhf_lightning.cli.stages.mark_finished",
        1,
        ["last", "step=2", "step=4", "step=6"],
    ),
}
"""Where a run dies: function, at which call, and the checkpoints that are there by then."""


@pytest.mark.parametrize("place", KILLED)
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(folder, whole, place):
    function, call, there = KILLED[place]
    before = partial(die_in, function, call)
    assert run_forked(words("--ckpt_path=auto"), cwd=folder, before=before).returncode == -9
    assert not (folder / "run" / MARK).exists()
    assert sorted(path.stem for path in folder.glob("run/checkpoints/*.ckpt")) == there
    assert_ended_as(fit(folder, "--ckpt_path=auto"), whole)


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda last: last.write_bytes(last.read_bytes()[:-1000]), "is not a complete checkpoint (it is cut off or"),
        (lambda last: last.unlink(), None),
    ],
)
def test_a_broken_last_is_passed_over_for_the_newest_that_is_whole(folder, whole, copied, recwarn, spoil, line):
    (copied / MARK).unlink()
    (copied / "checkpoints/step=6.ckpt").unlink()
    shutil.rmtree(copied / "export")
    spoil(copied / "checkpoints/last.ckpt")
    assert_ended_as(fit(folder, "--ckpt_path=last"), whole)
    said = [str(warning.message) for warning in recwarn if "passed over" in str(warning.message)]
    assert [text.split("' ")[1].startswith(str(line)) for text in said] == ([] if line is None else [True])


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *more: str) -> str:
    capsys.readouterr()
    before = snapshot(folder)
    with pytest.raises(SystemExit) as end:
        fit(folder, *more)
    assert end.value.code == 2
    before[str(folder / "run")] = ANY  # where its lock was
    assert snapshot(folder) == before
    return capsys.readouterr().err.splitlines()[-1].removeprefix("error: ")


def test_a_run_whose_checkpoints_are_all_broken_is_not_begun_anew(folder, capsys):
    (folder / "run/checkpoints").mkdir(parents=True)
    for name in ("last", "step=2"):
        (folder / f"run/checkpoints/{name}.ckpt").write_bytes(b"half")
    for word in ("last", "auto"):
        assert refused(capsys, folder, f"--ckpt_path={word}") == (
            f"--ckpt_path {word}: no checkpoint in 'run/checkpoints' is whole; start anew with --overwrite true, or "
            "choose another --trainer.default_root_dir"
        )


def test_auto_begins_where_nothing_is_but_never_over_an_export(folder, copied, capsys):
    both = refused(capsys, folder, "--ckpt_path=auto", "--overwrite=true")
    assert both == "--ckpt_path auto goes on where --overwrite true starts anew; leave one of them out"
    assert "holds an earlier run" in refused(capsys, folder)
    shutil.rmtree(copied / "checkpoints")
    assert "holds an earlier run" in refused(capsys, folder)
    (copied / MARK).unlink()
    assert "holds an earlier run" in refused(capsys, folder, "--ckpt_path=auto")


def test_a_checkpoint_of_weights_alone_is_none_to_train_from(folder, copied, capsys):
    weights = torch.load(copied / "checkpoints/last.ckpt", weights_only=True)
    del weights["optimizer_states"]
    torch.save(weights, folder / "weights.ckpt")
    message = refused(capsys, folder, "--ckpt_path=weights.ckpt")
    assert message.startswith(
        "--ckpt_path: 'weights.ckpt' holds no optimizer_states: it was saved with save_weights_on"
    )


@pytest.mark.parametrize(
    ("command", "path", "message"),
    [
        (
            "fit",
            "best",
            "--ckpt_path best: Lightning's word means nothing to a new process; pass last, or a .ckpt file",
        ),
        ("fit", "hpc", "--ckpt_path hpc: Lightning's word means nothing to a new process; pass last, or a .ckpt file"),
        ("validate", "best", "--ckpt_path best: Lightning's word means nothing to a new process"),
        ("test", "auto", "--ckpt_path auto is for fit, which can also start; test takes last, or a .ckpt file"),
        ("fit", "lm", "--ckpt_path: 'lm' is no Lightning checkpoint; a model goes to --model.model_name_or_path"),
        ("fit", "lm/model.safetensors", "--ckpt_path: 'lm/model.safetensors' is no Lightning checkpoint; a model goes"),
        ("fit", ".", "--ckpt_path: '.' is no Lightning checkpoint; pass one that a run wrote into its folder"),
        ("fit", "half", f"--ckpt_path: 'half' is not a complete checkpoint (it has no {MANIFEST}); resume from"),
        ("validate", "last", "--ckpt_path last: there is no checkpoint in 'run/checkpoints'"),
    ],
)
def test_words_and_paths_that_mean_nothing_get_one_line(folder, capsys, command, path, message):
    (folder / "half").mkdir()
    (folder / "half/latest").write_text("checkpoint")  # as DeepSpeed leaves it
    with working_folder(folder), pytest.raises(SystemExit) as end:
        main([command, *SFT, *short("lm", "pairs.jsonl", "run"), f"--ckpt_path={path}"])
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")
    assert not (folder / "run").exists()


def test_the_last_checkpoint_can_be_measured(folder, copied, monkeypatch):
    loaded = []

    def note(trainer: Any, function: Any, *args: Any) -> None:
        loaded.append(inspect.signature(function).bind(*args).arguments["ckpt_path"])

    monkeypatch.setattr("pytorch_lightning.trainer.call._call_and_handle_interrupt", note)
    options = [*SFT, *short("lm", "pairs.jsonl", "run")]
    with working_folder(folder):
        main(["validate", *options, "--ckpt_path=last"])
        (copied / "checkpoints/last.ckpt").write_bytes(b"half")
        main(["validate", *options, "--ckpt_path=last"])
        main(["validate", *options])
    assert loaded == ["run/checkpoints/last.ckpt", "run/checkpoints/step=6.ckpt", None]


def test_a_reward_model_that_was_killed_in_its_export_is_exported_with_its_calibration(folder):
    """What comes after the last step, a validation and what is made of it, is done again."""
    settings: dict[str, Any] = {"steps": 3, "stage": REWARD}
    fit(folder, **settings).rename(folder / "once")
    killed = partial(die_in, "rlhf_lightning.callbacks.hf_export.model_card")
    assert run_forked(words(**settings), cwd=folder, before=killed).returncode == -9
    root = fit(folder, "--ckpt_path=auto", **settings)
    for name in ("model.safetensors", "config.json"):
        assert (root / "export" / name).read_bytes() == (folder / "once/export" / name).read_bytes()


def test_the_checkpoint_that_a_run_goes_on_from_makes_room_for_the_next_unless_it_was_named(folder):
    (folder / "callbacks.yaml").unlink()
    (folder / "callbacks.yaml").write_text(CALLBACKS.replace("save_top_k: -1", "save_top_k: 1"))
    kept = fit(folder, steps=2) / "checkpoints"
    (kept / "last.ckpt").unlink()  # as if killed before it was written
    assert [path.name for path in kept.iterdir()] == ["step=2.ckpt"]
    shutil.copytree(folder / "run", folder / "before")

    fit(folder, "--ckpt_path=auto", steps=4)
    assert sorted(path.name for path in kept.iterdir()) == ["last.ckpt", "step=4.ckpt"]

    shutil.rmtree(folder / "run")
    (folder / "before").rename(folder / "run")
    fit(folder, f"--ckpt_path={kept / 'step=2.ckpt'}", steps=4)
    assert sorted(path.name for path in kept.iterdir()) == ["last.ckpt", "step=2.ckpt", "step=4.ckpt"]


def test_what_a_killed_process_was_about_to_remove_is_removed(folder):
    (folder / "callbacks.yaml").unlink()
    (folder / "callbacks.yaml").write_text(CALLBACKS.replace("save_top_k: -1", "save_top_k: 1"))
    died = partial(die_in, "pytorch_lightning.callbacks.ModelCheckpoint._remove_checkpoint", 1)
    run_forked(words(), folder, before=died)
    kept = folder / "run/checkpoints"
    (kept / "mine.ckpt").write_bytes((kept / "step=2.ckpt").read_bytes())
    os.utime(kept / "mine.ckpt", (0, 0))
    assert {"step=2.ckpt", "step=4.ckpt"} < {path.name for path in kept.iterdir()}

    fit(folder, "--ckpt_path=auto")

    assert sorted(path.name for path in kept.iterdir()) == ["last.ckpt", "mine.ckpt", "step=6.ckpt"]
