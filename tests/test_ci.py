"""What runs the checks elsewhere calls commands that exist, on the Pythons that the package says it supports."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def load(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def made(commands: list[str]) -> list[str]:
    """The targets of `make` commands."""
    return [target for command in commands for target in command.removeprefix("make ").split()]


def test_the_workflow_runs_the_commands_of_the_readme_and_the_checks():
    steps = load(".github/workflows/ci.yml")["jobs"]["tests"]["steps"]
    targets = made([step["run"] for step in steps if "run" in step])
    assert {"demo", "test", "lint", "types"} == set(targets)
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
