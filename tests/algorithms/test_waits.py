"""How often a step makes the host wait for the device; `tests/gpu/waits.py` says how often it may."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script for GPUs as a module."""
    for folder in ("benchmarks", "tests/gpu"):
        monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / folder))
    return importlib.import_module("waits")


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_waits_for_the_device_no_more_often_than_it_must(waits: Any, device: str, tmp_path: Path) -> None:
    found = waits.waits_on(device, str(tmp_path))
    assert found.keys() == waits.LIMITS.keys()
    assert waits.above_limits(found, device) == []
    assert all(found.values())  # or nothing has been counted


def test_a_wait_too_many_is_told_with_its_line(waits: Any) -> None:
    assert waits.above_limits({"one SFT step": [("here:1", 1), ("there:2", 1)]}) == []
    (told,) = waits.above_limits({"one SFT step": [("here:1", 2), ("there:2", 1)]})
    assert told.startswith("one SFT step waits 3 times, and may 2: [('here:1', 2)")
