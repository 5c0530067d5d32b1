"""The annotated tree of CONTRIBUTING.md is the tree: it names each file by its room, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from test_imports import FLOORS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
(TREE,) = re.findall(r"^```\n(configs/ .*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def rooms() -> dict[str, str]:
    """Each folder of the tree, from the root on, with what stands beside it."""
    found: dict[str, str] = {}
    path: list[str] = []
    for line in TREE.splitlines():
        if match := re.match(r"( {0,8})([\w/-]+)/ +(.*)", line):
            depth = len(match[1]) // 2
            path = [*path[:depth], match[2]]
            found["/".join(path)] = match[3]
        else:
            found["/".join(path)] += " " + line.strip()
    return found


ROOMS = rooms()
FOLDERS = [
    folder.relative_to(ROOT).as_posix() for folder in [*ROOT.glob("configs/**/"), *ROOT.glob("src/rlhf_lightning/**/")]
]
FOLDERS = [folder.rstrip("/") for folder in FOLDERS if "__pycache__" not in folder]


def test_the_tree_names_every_room():
    assert {room for room in ROOMS if room.startswith(("configs", "src"))} == set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_tree_names_every_file_of_a_room(folder):
    files = {path.name for path in (ROOT / folder).iterdir() if path.suffix in (".py", ".yaml")} - {"__init__.py"}
    assert set(re.findall(r"[\w]+\.(?:py|yaml)\b", ROOMS[folder])) == files


@pytest.mark.parametrize("room", ["tests", "benchmarks", "docs"])
def test_what_the_tree_names_elsewhere_exists(room):
    for name in re.findall(r"[\w]+\.(?:py|md)\b", ROOMS[room]):
        assert [*(ROOT / room).rglob(name)], name


def test_the_floors_are_those_that_are_tested():
    (block,) = re.findall(r"^```\n(cli\n.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    named = [set(re.split(r" \| |, ", line)) for line in block.splitlines()]
    assert named == [{room for room in floor if room} for floor in FLOORS if "" not in floor]
