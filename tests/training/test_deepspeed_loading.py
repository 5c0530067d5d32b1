"""What DeepSpeed's strategy loads runs no code; its own folders: tests/training/test_strategies.py."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from rlhf_lightning import DeepSpeedStrategy
from rlhf_lightning.errors import UserError
from rlhf_lightning.runs.checkpoint_files import load_plain
from rlhf_lightning.training.checkpoint_folders import plain_loading


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


class Attribute:
    """Pickled as `getattr` of something."""

    def __init__(self, of: Any, name: str) -> None:
        self.of, self.name = of, name

    def __reduce__(self) -> Any:
        return getattr, (self.of, self.name)


def test_members_of_enums_are_loaded_as_any_python_writes_them(tmp_path):
    """Those of 3.11.0 to 3.11.3, Debian 12's among them, write `getattr` of the class."""
    torch.save({"stage": Attribute(ZeroStageEnum, "weights"), "other": ZeroStageEnum.gradients}, tmp_path / "a.pt")
    with plain_loading():
        assert load_plain(tmp_path / "a.pt") == {"stage": ZeroStageEnum.weights, "other": ZeroStageEnum.gradients}


@pytest.mark.parametrize("of", [(LossScaler, "__init__"), (ZeroStageEnum, "mro"), (ZeroStageEnum, "__subclasses__")])
def test_nothing_else_is_taken_from_them(tmp_path, of):
    torch.save({"stage": Attribute(*of)}, tmp_path / "a.pt")
    with plain_loading(), pytest.raises(UserError, match="holds an object of getattr, which could run code"):
        load_plain(tmp_path / "a.pt")
