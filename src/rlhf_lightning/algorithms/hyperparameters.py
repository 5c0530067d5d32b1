"""Settings of a module as plain data: what its checkpoint holds of them, and how they come back."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from functools import partial
from typing import Any, TypeVar

from torch.optim import Optimizer

from rlhf_lightning.errors import UserError

SettingsT = TypeVar("SettingsT")


def as_config(**settings: Any) -> dict[str, Any]:
    """Settings as they would be written in a config, so that a checkpoint with them loads without unpickling code.

    Args:
        **settings: groups of settings, what makes an optimizer, functions; anything else stays as it is.

    Returns:
        Dataclasses as dicts; classes with arguments as `class_path` and `init_args`; functions as their import path,
        which leads nowhere for those that are defined inside another function and for objects that can be called.

    Example:
        >>> import torch
        >>> as_config(optimizer=partial(torch.optim.SGD, lr=0.1), reward=len)
        {'optimizer': {'class_path': 'torch.optim.sgd.SGD', 'init_args': {'lr': 0.1}}, 'reward': 'builtins.len'}
    """
    return {name: _plain(value) for name, value in settings.items()}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, partial):
        # The command line's partial holds the class among the arguments of a function of its own.
        classes = [part for part in (value.func, *value.args) if isinstance(part, type)]
        if classes:
            return {"class_path": _path(classes[0]), "init_args": value.keywords}
    return _path(value) if callable(value) else value


def _path(named: Any) -> str:
    if hasattr(named, "__qualname__"):
        return f"{named.__module__}.{named.__qualname__}"
    return f"{type(named).__module__}.{type(named).__qualname__}.<instance>"


def from_config(kind: type[SettingsT], settings: SettingsT | Mapping[str, Any]) -> SettingsT:
    """A group of settings, given as such or as a dict.

    Args:
        kind: the dataclass.
        settings: the group, or its fields by name.
    """
    return kind(**settings) if isinstance(settings, Mapping) else settings


def optimizer_from_config(optimizer: Any) -> Any:
    """What makes an optimizer from parameters, given as such, or as `as_config` wrote it.

    Args:
        optimizer: a callable; or an import path; or a dict of `class_path` and `init_args`.

    Raises:
        UserError: there is nothing at that path.
    """
    if isinstance(optimizer, str):
        return _imported(optimizer)
    if not isinstance(optimizer, Mapping):
        return optimizer
    made = _imported(optimizer["class_path"])
    if not (isinstance(made, type) and issubclass(made, Optimizer)):
        raise UserError(f"optimizer: '{optimizer['class_path']}' is no torch.optim.Optimizer")
    return partial(made, **optimizer.get("init_args", {}))


def _imported(path: str) -> Any:
    module_name, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"optimizer: nothing can be imported as '{path}'; pass optimizer, also to load_from_checkpoint where it "
            "was a lambda"
        ) from error
