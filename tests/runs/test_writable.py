"""A place that cannot be written to is known before anything is lost there."""

from __future__ import annotations

import os

import pytest

from rlhf_lightning.errors import UserError
from rlhf_lightning.runs.writable import check_file, check_folder


def test_a_place_that_is_there_or_can_be_made_passes_and_is_not_made(tmp_path):
    check_folder("--out", tmp_path)
    check_folder("--out", tmp_path / "a" / "b")
    check_file("--out", tmp_path / "a" / "b.json")
    assert not any(tmp_path.iterdir())


def test_what_is_in_the_way_is_named(tmp_path):
    (tmp_path / "file").touch()
    for folder in ("file", "file/a", "file/a/b"):
        with pytest.raises(UserError, match=rf"^--out .*{folder}: '.*/file' is a file, and a folder is needed there"):
            check_folder("--out", tmp_path / folder)
    check_file("--out", tmp_path / "file")
    with pytest.raises(UserError, match="there is a folder of that name; name a file"):
        check_file("--out", tmp_path)


def test_a_folder_of_somebody_else_is_named(tmp_path, monkeypatch):
    tmp_path.chmod(0o500)
    if os.geteuid() == 0:  # who may write everywhere
        monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=r"nothing may be written to '.*'; name another place"):
        check_folder("--out", tmp_path / "a")
    tmp_path.chmod(0o700)
