"""What DeepSpeed's strategy loads runs no code; its own folders: tests/training/test_strategies.py."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning import DeepSpeedStrategy


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("weights_only", [False, None, True])
def test_whole_weights_are_loaded_without_code_whatever_the_caller_says(tmp_path, weights_only):
    """`load_full_weights` reads one file, of anybody, into weights that ZeRO-3 has split."""
    torch.save({"state_dict": {}, "more": Touch(tmp_path / "made")}, tmp_path / "whole.ckpt")
    strategy = DeepSpeedStrategy(stage=3, load_full_weights=True)
    with pytest.raises(pickle.UnpicklingError):
        strategy.load_checkpoint(tmp_path / "whole.ckpt", weights_only=weights_only)
    assert not (tmp_path / "made").exists()
