"""A checkpoint is whole or it is not taken, however it came to be broken."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pytorch_lightning.demos.boring_classes import BoringModel
from pytorch_lightning.plugins.io import TorchCheckpointIO

from helpers.killed import killed_in
from helpers.stages import fit, instruction_rows, save_gpt2, trainer
from rlhf_lightning import InstructionDataModule, SFTModule, UserError
from rlhf_lightning.runs.checkpoint_files import (
    MANIFEST,
    WholeCheckpointIO,
    check_whole,
    checkpoints_in,
    checksum,
    files_of,
    newest_whole,
    put_in_place,
    read_manifest,
    remove_unfinished,
    write_manifest,
)


def build(folder: str) -> Any:
    return SFTModule(folder), InstructionDataModule(folder, instruction_rows(4), max_length=48, batch_size=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_gpt2(tmp_path_factory.mktemp("gpt2"), dropout=0.0)


@pytest.fixture(scope="module")
def real(folder, tmp_path_factory):
    """A checkpoint of a run of two steps."""
    module, data = build(folder)
    fit(module, data, max_steps=2)
    path = tmp_path_factory.mktemp("real") / "last.ckpt"
    module.trainer.save_checkpoint(path)
    return path


def same(a: Any, b: Any) -> bool:
    """Equal in type and bit for bit, on every level."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return [*a] == [*b] and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.fixture(scope="module")
def content_of_real(real):
    return torch.load(real, weights_only=True)


@pytest.fixture(scope="module")
def uncovered(real):
    """Places of the bytes that no checksum covers: headers, padding, the archive's directory."""
    covered = set()
    with zipfile.ZipFile(real) as archive:
        for record in archive.infolist():
            with archive.open(record) as opened:
                start = opened._orig_compress_start
            covered.update(range(start, start + record.file_size))
    return [place for place in range(real.stat().st_size) if place not in covered]


def refused(path: Path, to_train: bool = False) -> str:
    with pytest.raises(UserError) as error:
        check_whole(path, to_train)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_module_lets_its_checkpoints_be_written_whole(real):
    check_whole(real, to_train=True)
    assert torch.load(real, weights_only=True)["saved_at"] > 1e9  # only our writer says when
    assert [path.name for path in real.parent.iterdir()] == ["last.ckpt"]


@settings(max_examples=60)
@given(st.data())
def test_a_changed_byte_is_refused_or_changes_nothing(real, content_of_real, uncovered, tmp_path_factory, data):
    content, path = bytearray(real.read_bytes()), tmp_path_factory.getbasetemp() / "changed.ckpt"
    anywhere = st.one_of(st.integers(0, len(content) - 1), st.sampled_from(uncovered))
    content[data.draw(anywhere)] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        loaded = WholeCheckpointIO().load_checkpoint(path)
    except UserError as e:
        error = str(e)
    else:
        error = ""
        assert same(loaded, content_of_real)
    assert "\n" not in error


def test_a_record_that_is_said_to_be_a_folder_is_refused(real, tmp_path):
    """The one bit outside of all checksums that a test of the archive lets pass, and `torch.load` does not."""
    content, path = bytearray(real.read_bytes()), tmp_path / "last.ckpt"
    with zipfile.ZipFile(real) as archive:
        name = next(record.filename for record in archive.infolist() if "/data/" in record.filename)
    content[content.rindex(name.encode()) - 46 + 38] |= 0x10  # where the archive's directory describes it
    path.write_bytes(content)
    assert (
        refused(path)
        == f"'{path}' is not a complete checkpoint (its record '{name}' is damaged); resume from another one"
    )


@settings(max_examples=40)
@given(length=st.floats(0, 1, exclude_max=True))
@example(length=0.0)
def test_a_file_that_was_cut_off_is_refused(real, tmp_path_factory, length):
    content, path = real.read_bytes(), tmp_path_factory.getbasetemp() / "cut.ckpt"
    path.write_bytes(content[: int(length * len(content))])
    assert "is not a complete checkpoint" in refused(path)


class Runs:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def zipped(path: Path, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"state_dict": {}}))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b""), "is not a complete checkpoint (it is empty)"),
        (lambda path: path.write_bytes(b"PK\x03\x04 and no more"), "is not a complete checkpoint (it is cut off"),
        (lambda path: path.write_text("a text"), "is not a complete checkpoint (it is cut off or damaged)"),
        (lambda path: torch.save({"w": torch.ones(2)}, path), "is no Lightning checkpoint"),
        (lambda path: torch.save([1, 2], path), "is no Lightning checkpoint"),
        (lambda path: torch.save({"pytorch-lightning_version": "2.6.6"}, path), "is no Lightning checkpoint"),
        (lambda path: zipfile.ZipFile(path, "w").close(), "is no Lightning checkpoint"),
        (lambda path: zipped(path, zipfile.ZIP_DEFLATED), "is no Lightning checkpoint"),
        (zipped, "is no Lightning checkpoint"),
        (lambda path: torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path), "is no Lightning checkpoint"),
        (lambda path: path.mkdir(), "is no Lightning checkpoint"),
        (lambda path: None, "does not exist"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, write, message):
    write(tmp_path / "last.ckpt")
    assert message in refused(tmp_path / "last.ckpt")
    with pytest.raises(UserError):
        WholeCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")


def test_weights_alone_are_no_checkpoint_to_train_from(real, tmp_path):
    weights = torch.load(real, weights_only=True)
    del weights["optimizer_states"]
    torch.save(weights, tmp_path / "last.ckpt")
    check_whole(tmp_path / "last.ckpt")
    assert "holds no optimizer_states: it was saved with save_weights_only" in refused(tmp_path / "last.ckpt", True)


@pytest.mark.parametrize("weights_only", [None, True, False])
def test_no_code_of_a_file_is_run(real, tmp_path, weights_only):
    evil = {**torch.load(real, weights_only=True), "callbacks": Runs(tmp_path / "it ran")}
    torch.save(evil, tmp_path / "last.ckpt")
    message = refused(tmp_path / "last.ckpt")
    assert (
        message == f"'{tmp_path}/last.ckpt' holds an object of posix.system, which could run code, so it is not loaded"
    )
    with pytest.raises(UserError, match="could run code"):
        WholeCheckpointIO().load_checkpoint(tmp_path / "last.ckpt", weights_only=weights_only)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


# Writing.


OLD = {"pytorch-lightning_version": "2", "state_dict": {"w": torch.zeros(9)}}
NEW = {**OLD, "state_dict": {"w": torch.ones(9)}}


@pytest.mark.parametrize("function", ["torch.save", "os.fsync", "os.replace"])
@pytest.mark.parametrize("was_there", [True, False])
def test_killed_while_a_file_is_written_the_old_one_is_there(tmp_path, function, was_there):
    path = tmp_path / "last.ckpt"
    if was_there:
        WholeCheckpointIO().save_checkpoint(OLD, path)
    killed_in(lambda: WholeCheckpointIO().save_checkpoint(NEW, path), function)
    assert newest_whole([tmp_path]) == (path if was_there else None)
    assert not was_there or same(torch.load(path)["state_dict"], OLD["state_dict"])
    remove_unfinished([tmp_path])
    assert [*tmp_path.iterdir()] == [path] * was_there


def test_an_exception_while_a_file_is_written_leaves_the_old_one(tmp_path):
    WholeCheckpointIO().save_checkpoint(OLD, tmp_path / "last.ckpt")
    with pytest.raises(AttributeError):
        WholeCheckpointIO().save_checkpoint({**NEW, "callbacks": lambda: 0}, tmp_path / "last.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert same(torch.load(tmp_path / "last.ckpt")["state_dict"], OLD["state_dict"])


@pytest.mark.parametrize("where", ["write", "fsync"])
def test_a_full_disk_is_one_line_and_leaves_the_old_one(tmp_path, monkeypatch, where):
    path = tmp_path / "last.ckpt"
    WholeCheckpointIO().save_checkpoint(OLD, path)

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "fsync":
        monkeypatch.setattr("os.fsync", full)
    else:
        real = Path.open
        monkeypatch.setattr(Path, "open", lambda self, mode: real(Path("/dev/full"), mode))
    with pytest.raises(UserError) as error:
        WholeCheckpointIO().save_checkpoint(NEW, path)
    assert str(error.value) == f"the checkpoint '{path}' was not written: No space left on device"
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]
    assert same(torch.load(path)["state_dict"], OLD["state_dict"])


def test_checksums_are_written_though_they_were_turned_off(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        WholeCheckpointIO().save_checkpoint(OLD, tmp_path / "last.ckpt")
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    check_whole(tmp_path / "last.ckpt")


def test_a_link_to_another_checkpoint_is_replaced_and_not_followed(tmp_path):
    WholeCheckpointIO().save_checkpoint(OLD, tmp_path / "step=1.ckpt")
    (tmp_path / "last.ckpt").symlink_to("step=1.ckpt")
    WholeCheckpointIO().save_checkpoint(NEW, tmp_path / "last.ckpt")
    assert same(torch.load(tmp_path / "step=1.ckpt")["state_dict"], OLD["state_dict"])
    assert same(torch.load(tmp_path / "last.ckpt")["state_dict"], NEW["state_dict"])


def test_other_ways_of_writing_are_left_to_whoever_chose_them(tmp_path):
    with pytest.raises(TypeError):
        WholeCheckpointIO().save_checkpoint(OLD, tmp_path / "last.ckpt", storage_options={})
    WholeCheckpointIO().save_checkpoint(OLD, "memory://last.ckpt")
    assert same(WholeCheckpointIO().load_checkpoint("memory://last.ckpt"), OLD)


@pytest.mark.parametrize("chosen", [TorchCheckpointIO(), None])
def test_a_trainer_with_a_checkpoint_io_of_its_own_keeps_it(folder, chosen):
    module, data = build(folder)
    run = trainer(max_steps=1, plugins=[chosen] if chosen else [])
    run.fit(module, data)
    assert run.strategy.checkpoint_io is chosen if chosen else type(run.strategy.checkpoint_io) is WholeCheckpointIO


# Folders, as DeepSpeed writes them.


def written(folder: Path, content: str = "weights") -> Path:
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "latest").write_text("checkpoint")
    (folder / "checkpoint" / "0.pt").write_text(content)
    (folder / "checkpoint" / "1.pt").write_text(content)
    write_manifest(folder, {name: checksum(folder / name) for name in files_of(folder)}, {"stage": 2})
    return folder


def test_a_folder_says_what_belongs_to_it(tmp_path):
    folder = written(tmp_path / "last.ckpt")
    check_whole(folder)
    assert [*read_manifest(folder)["files"]] == ["checkpoint/0.pt", "checkpoint/1.pt", "latest"]
    assert read_manifest(folder)["settings"] == {"stage": 2}
    (folder / "notes.txt").write_text("of somebody else")
    check_whole(folder)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda folder: (folder / "latest").unlink(), "'latest' is missing"),
        (lambda folder: (folder / "checkpoint/1.pt").write_text("weightz"), "'checkpoint/1.pt' has changed"),
        (lambda folder: (folder / "checkpoint/1.pt").write_text(""), "'checkpoint/1.pt' has changed"),
        (lambda folder: shutil.rmtree(folder / "checkpoint"), "'checkpoint/0.pt' is missing"),
        (lambda folder: (folder / MANIFEST).unlink(), f"it has no {MANIFEST}"),
        (lambda folder: (folder / MANIFEST).write_text("{"), f"its {MANIFEST} is damaged"),
        (lambda folder: (folder / MANIFEST).write_text("[" * 100_000), f"its {MANIFEST} is damaged"),
        (
            lambda folder: (folder / MANIFEST).write_text('{"content": [], "crc32": 223132457}'),
            f"its {MANIFEST} is damaged",
        ),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(tmp_path, spoil, why):
    folder = written(tmp_path / "last.ckpt")
    check_whole(folder)
    spoil(folder)
    assert refused(folder) == f"'{folder}' is not a complete checkpoint ({why}); resume from another one"


@pytest.fixture(scope="module")
def a_folder(tmp_path_factory):
    return written(tmp_path_factory.mktemp("folder") / "last.ckpt")


@settings(max_examples=50)
@given(st.data())
def test_a_changed_byte_of_a_manifest_is_refused_or_changes_nothing(a_folder, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    said, content = read_manifest(a_folder), bytearray((a_folder / MANIFEST).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    (folder / MANIFEST).write_bytes(content)
    with contextlib.suppress(UserError):
        assert same(read_manifest(folder), said)


@pytest.mark.parametrize(("function", "call"), [("rename", 1), ("rename", 2), ("is_dir", 1)])
def test_killed_while_a_folder_is_replaced_one_of_the_two_is_whole(tmp_path, function, call):
    path = written(tmp_path / "last.ckpt", "old")
    new = written(tmp_path / "last.ckpt.partial", "new")
    killed_in(lambda: put_in_place(new, path), f"pathlib.Path.{function}", call)
    found = newest_whole([tmp_path])
    assert found is not None
    assert (found / "checkpoint/0.pt").read_text() == "old"
    remove_unfinished([tmp_path])
    assert [*tmp_path.iterdir()] == [found]
    put_in_place(written(tmp_path / "last.ckpt.partial", "new"), path)
    assert [*tmp_path.iterdir()] == [path]
    assert (path / "checkpoint/0.pt").read_text() == "new"


@pytest.mark.parametrize("was", ["file", "folder", "link to a folder"])
def test_a_file_takes_the_place_of_anything(tmp_path, was):
    path = tmp_path / "last.ckpt"
    if was == "file":
        path.write_text("old")
    elif was == "folder":
        written(path)
    else:
        path.symlink_to(written(tmp_path / "step=1.ckpt"))
    WholeCheckpointIO().save_checkpoint(NEW, path)
    check_whole(path)
    assert {each.name for each in tmp_path.iterdir()} <= {"last.ckpt", "step=1.ckpt"}
    assert was != "link to a folder" or (tmp_path / "step=1.ckpt/latest").exists()


# Which is the newest.


def test_the_newest_is_told_by_what_it_says_and_not_by_its_file(tmp_path, monkeypatch):
    for time, name in ((10.0, "step=2"), (30.0, "last"), (20.0, "step=4")):
        monkeypatch.setattr("time.time", lambda time=time: time)
        WholeCheckpointIO().save_checkpoint(OLD, tmp_path / f"{name}.ckpt")
    os.utime(tmp_path / "last.ckpt", (0, 0))  # as a copy may have it
    assert newest_whole([tmp_path, tmp_path / "missing"]) == tmp_path / "last.ckpt"
    assert len(checkpoints_in([tmp_path, tmp_path])) == 3
    monkeypatch.setattr("time.time", lambda: 40.0)
    assert newest_whole([tmp_path, written(tmp_path / "b" / "other.ckpt").parent]) == tmp_path / "b" / "other.ckpt"


def test_a_broken_one_is_passed_over_with_a_line(tmp_path, recwarn):
    assert newest_whole([tmp_path]) is None
    WholeCheckpointIO().save_checkpoint(OLD, tmp_path / "step=2.ckpt")
    (tmp_path / "last.ckpt").write_bytes(b"half")
    (tmp_path / "gone.ckpt").symlink_to("nowhere")
    assert newest_whole([tmp_path]) == tmp_path / "step=2.ckpt"
    assert [str(warning.message) for warning in recwarn] == [
        f"passed over a checkpoint: '{tmp_path}/last.ckpt' is not a complete checkpoint (it is cut off or damaged)"
    ]


def test_plain_python_is_told_which_one_is_whole(real, folder, tmp_path):
    shutil.copy(real, tmp_path / "step=2.ckpt")
    (tmp_path / "last.ckpt").write_bytes(b"half")
    module, data = build(folder)
    with pytest.raises(UserError, match=r"last.ckpt' is not .*; resume from another one, such as '.*/step=2.ckpt'$"):
        fit(module, data, ckpt_path=tmp_path / "last.ckpt")


def test_a_folder_for_one_process_is_refused(folder, tmp_path):
    module, data = build(folder)
    with pytest.raises(UserError, match="is the folder of another strategy; resume with the one that wrote it"):
        fit(module, data, ckpt_path=written(tmp_path / "last.ckpt"))


def test_what_others_write_is_left_to_them(tmp_path):
    """A module that is not of this package has Lightning's own way."""
    run = pl.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    run.fit(BoringModel())
    assert type(run.strategy.checkpoint_io) is TorchCheckpointIO
