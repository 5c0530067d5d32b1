"""A file of a run holds all of its new content, or all of what it held."""

import multiprocessing
import os
import signal

import pytest

from rlhf_lightning.runs.whole_files import write_whole

OLD, NEW = "old\n" * 1000, "new\n" * 2000


@pytest.mark.parametrize("content", ["ein Text: é\n", b"\xff\x00"])
def test_it_holds_what_was_written_and_nothing_is_left_beside_it(tmp_path, content):
    (tmp_path / ".a.json.unfinished").write_text("left by a process that was killed")
    write_whole(tmp_path / "a.json", content)
    assert (tmp_path / "a.json").read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def write_and_be_killed(path):
    def kill(descriptor):
        os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = kill
    write_whole(path, NEW)


def test_a_process_that_is_killed_leaves_what_was_there(tmp_path):
    write_whole(tmp_path / "a.json", OLD)
    process = multiprocessing.get_context("fork").Process(target=write_and_be_killed, args=(tmp_path / "a.json",))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "a.json").read_text() == OLD

    write_whole(tmp_path / "a.json", NEW)
    assert (tmp_path / "a.json").read_text() == NEW
