"""What runs the checks elsewhere calls commands that exist, on the Pythons that the package says it supports."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.browser import COMMANDS

ROOT = Path(__file__).parents[1]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def load(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def made(commands: list[str]) -> list[str]:
    """The targets of `make` commands."""
    return [target for command in commands for target in command.removeprefix("make ").split()]


def what_make_would_do(*words: str) -> str:
    """What `make -n` prints, the same under another make, which would have it say where it is."""
    outside = {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}}
    command = ["make", "-n", "--no-print-directory", *words]
    return subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True, check=True).stdout


def test_the_workflow_runs_the_commands_of_the_readme_and_the_checks():
    steps = load(".github/workflows/ci.yml")["jobs"]["tests"]["steps"]
    targets = made([step["run"] for step in steps if "run" in step])
    assert {"demo", "test", "test-slow", "lint", "types"} == set(targets)
    assert set(targets) <= TARGETS


def test_the_workflow_covers_the_supported_versions():
    matrix = load(".github/workflows/ci.yml")["jobs"]["tests"]["strategy"]["matrix"]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert matrix["python"] == re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    assert f'requires-python = ">={matrix["python"][0]}"' in project


def test_the_hooks_call_targets_of_the_makefile():
    (repository,) = load(".pre-commit-config.yaml")["repos"]
    targets = made([hook["entry"] for hook in repository["hooks"]])
    assert {"lint", "types"} == set(targets) <= TARGETS


def run_checks(folder: Path, user: str, apt_get: str) -> tuple[str, list[str]]:
    """Run `.ci/run` on a machine without a browser and a zsh, whose commands only note that they were called.

    Args:
        folder: for those commands.
        user: number of the user.
        apt_get: exit code of `apt-get install`.

    Returns:
        What it says on stderr, and the calls.
    """
    calls = folder / "calls"
    programs = {
        "id": f"echo {user}",
        "apt-get": f'echo "apt-get $*" >> {calls}; [ "$1" = update ] || exit {apt_get}',
        "make": f'echo "make $*" >> {calls}',
    }
    for name, script in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    (folder / "dirname").symlink_to("/usr/bin/dirname")
    ran = subprocess.run(
        ["/bin/bash", ROOT / ".ci/run"], env={"PATH": str(folder)}, capture_output=True, text=True, check=True
    )
    return ran.stderr, calls.read_text().splitlines()


SIDE_BY_SIDE = "--jobs=2 --output-sync types test-exports"
CHECKS = [f"make {words}" for words in ("lint", SIDE_BY_SIDE, "test", "test-slow", "test-numbers")]


def test_the_checks_install_what_tests_need(tmp_path):
    said, calls = run_checks(tmp_path, user="0", apt_get="0")
    assert said == ""
    assert [call for call in calls if call.startswith("make")] == CHECKS
    update, install = (call for call in calls if call.startswith("apt-get"))  # beside the first of them
    assert (update.split()[1], install.split()[1]) == ("update", "install")
    assert install.split()[-2:] == ["chromium", "zsh"]
    assert calls.index(install) < calls.index("make test")


@pytest.mark.parametrize(("user", "apt_get"), [("1000", "0"), ("0", "100")])
def test_the_checks_say_that_they_cannot_install_it_and_go_on(tmp_path, user, apt_get):
    said, calls = run_checks(tmp_path, user, apt_get)
    assert len(said.splitlines()) == 1
    assert "chromium zsh" in said
    assert [call for call in calls if call.startswith("make")] == CHECKS


def test_the_checks_look_for_the_browsers_that_the_tests_would_take():
    (named,) = re.findall(
        r"command -v (.+) >/dev/null .* missing\+=\(chromium\)", (ROOT / ".ci/run").read_text(encoding="utf-8")
    )
    assert tuple(named.split()) == COMMANDS


def test_no_two_test_files_share_a_name():
    """Pytest could not collect both: test folders are no packages."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_what_the_numerical_tests_leave_out_is_there():
    left_out = re.findall(r"--ignore=(\S+)", what_make_would_do("test-numbers-anyway"))
    assert left_out
    assert all((ROOT / path).is_file() for path in left_out)


def test_what_make_test_leaves_out_lies_where_make_test_slow_looks():
    said, marks = what_make_would_do("test-slow"), ("matrix", "launched", "long")
    assert f'-m "{" or ".join(marks)}"' in said
    assert f'-m "{" and ".join(f"not {mark}" for mark in marks)}"' in what_make_would_do("test")
    files = (ROOT / "tests").rglob("test_*.py")
    marked = {path for path in files if re.search(rf"mark\.({'|'.join(marks)})\b", path.read_text(encoding="utf-8"))}
    assert marked
    folders = {path.relative_to(ROOT).parts[1] for path in marked - {Path(__file__)}}
    assert folders <= set(re.findall(r"tests/(\w+)", said))


@pytest.mark.parametrize(("own", "asked", "again"), [("avx2", "avx2", False), ("avx512", "avx2", True)])
def test_numerical_tests_are_not_run_a_second_time_under_the_same_instructions(own, asked, again):
    said = what_make_would_do("test-numbers", f"OWN=echo {own}", f"CAPABILITY={asked}", "READY=pyproject.toml")
    assert (f"ATEN_CPU_CAPABILITY={asked} ONEDNN" in said) is again
    assert ("is this machine's own instruction set" in said.splitlines()[-1]) is not again
