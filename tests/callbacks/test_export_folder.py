"""Exports in their place: nobody's files are lost, whenever a run is killed."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from pathlib import Path

import pytest

from rlhf_lightning.callbacks.export_folder import check_place, finish_replacing, replace_folder
from rlhf_lightning.errors import UserError
from rlhf_lightning.runs.lineage import new_record, write_record


def write(word):
    def into(folder):
        (folder / "weights").write_text(word)
        write_record(folder, new_record("SFTModule", {}))

    return into


def content(folder):
    return (folder / "weights").read_text()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_an_export_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    for word in ("one", "two"):
        replace_folder(tmp_path / "deep" / "export", write(word))
        assert content(tmp_path / "deep" / "export") == word
        assert names(tmp_path / "deep") == ["export"]


def test_files_of_others_beside_it_are_left_alone(tmp_path):
    for name in ("export.partial", "export.old", ".export.unfinished/mine"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "thesis.txt").write_text("three years of work")
    for word in ("one", "two"):
        replace_folder(tmp_path / "export", write(word))
    assert content(tmp_path / "export") == "two"
    assert len(list(tmp_path.rglob("thesis.txt"))) == 3


def fill_with_a_readme_that_names_us(folder):
    folder.mkdir()
    (folder / "README.md").write_text("Made with rlhf_lightning, and then by hand.\n")


def fill_with_a_file_of_that_name(folder):
    folder.mkdir()
    (folder / "lineage.json").write_text('{"made_by": "some other tool"}')


def fill_as_a_run(folder):
    """Its record is that of an export."""
    folder.mkdir()
    write_record(folder, new_record("SFTModule", {}))
    (folder / "checkpoints").mkdir()


@pytest.mark.parametrize(
    "make",
    [
        fill_with_a_readme_that_names_us,
        fill_with_a_file_of_that_name,
        fill_as_a_run,
        lambda place: place.write_text("a file"),
    ],
)
def test_what_is_not_an_export_is_refused_and_kept(tmp_path, make):
    make(tmp_path / "export")
    for attempt in (check_place, lambda place: replace_folder(place, write("ours"))):
        with pytest.raises(UserError, match="exists and is not an export of this package; choose another place"):
            attempt(tmp_path / "export")
    assert names(tmp_path) == ["export"]
    assert not list(tmp_path.rglob("weights"))


def test_a_link_stays_one_and_what_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "export").symlink_to(tmp_path / "disk" / "model")  # which is not there yet
    for word in ("one", "two"):
        replace_folder(tmp_path / "run" / "export", write(word))
        assert (tmp_path / "run" / "export").is_symlink()
        assert content(tmp_path / "disk" / "model") == word
        assert (names(tmp_path / "run"), names(tmp_path / "disk")) == (["export"], ["model"])


def test_links_in_a_circle_are_refused(tmp_path):
    (tmp_path / "export").symlink_to(tmp_path / "export")
    with pytest.raises(UserError, match="cannot be a folder to write to"):
        check_place(tmp_path / "export")


class Killed(BaseException):
    """Ends a run where it stands."""


def kill_at(monkeypatch, number):
    """Let the process end before its change number `number` of the disk, and change nothing afterwards."""
    count = itertools.count()

    def counted(change):
        def or_killed(*args, **kwargs):
            if next(count) >= number:
                raise Killed
            return change(*args, **kwargs)

        return or_killed

    for owner, name in ((Path, "rename"), (Path, "rmdir"), (Path, "mkdir"), (Path, "write_text"), (shutil, "rmtree")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))


@pytest.mark.parametrize("earlier", [False, True])
def test_a_run_that_is_killed_anywhere_leaves_one_whole_folder_at_the_next_start(tmp_path, monkeypatch, earlier):
    for number in range(30):
        root = tmp_path / str(number)
        if earlier:
            replace_folder(root / "export", write("one"))
        with monkeypatch.context() as patched, contextlib.suppress(Killed):
            kill_at(patched, number)
            replace_folder(root / "export", write("two"))
        finish_replacing(root / "export")
        left = names(root) if root.exists() else []
        assert left in ([["export"]] if earlier else [[], ["export"]])
        if left:
            check_place(root / "export")
            assert content(root / "export") in (("one", "two") if earlier else ("two",))
        replace_folder(root / "export", write("three"))
        assert content(root / "export") == "three"
        assert names(root) == ["export"]
    assert content(root / "export") == "three"


def test_what_somebody_put_there_meanwhile_is_kept(tmp_path):
    replace_folder(tmp_path / "export", write("one"))

    def write_while_others_work(folder):
        write("two")(folder)
        os.rename(tmp_path / "export", tmp_path / "backup")
        fill_with_a_readme_that_names_us(tmp_path / "export")

    with pytest.raises(UserError, match="exists and is not an export"):
        replace_folder(tmp_path / "export", write_while_others_work)
    assert names(tmp_path / "export") == ["README.md"]
    assert content(tmp_path / "backup") == "one"
    shutil.rmtree(tmp_path / "export")
    finish_replacing(tmp_path / "export")
    assert content(tmp_path / "export") == "two"
