"""The script that compares decoding on a GPU says so on a CPU, too."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.long
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lora", [False, True])
def test_the_compiled_step_answers_as_the_plain_one(device: str, lora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("benchmarks", "tests/gpu"):
        monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / folder))
    script = importlib.import_module("decoding")
    found = script.distances(device, lora)
    assert len(found) == script.ROLLOUTS
    assert max(found) <= script.TOLERANCE
