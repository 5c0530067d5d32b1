"""Settings of a module as plain data: what its checkpoint holds of them, and how they come back."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass, replace
from functools import partial
from typing import Any, TypeVar

from torch.optim import Optimizer

from rlhf_lightning.errors import UserError

SettingsT = TypeVar("SettingsT")
PLAIN = (str, int, float, bool, type(None))


def as_config(**settings: Any) -> dict[str, Any]:
    """Settings as they would be written in a config, so that a checkpoint with them loads without unpickling code.

    Args:
        **settings: groups of settings, what makes an optimizer, functions; anything else stays as it is.

    Returns:
        Dataclasses as dicts; classes with arguments as `class_path` and `init_args`; functions and other objects as
        their import path, which leads nowhere for what is defined inside a function and for single objects.

    Example:
        >>> import torch
        >>> as_config(optimizer=partial(torch.optim.SGD, lr=0.1), reward=len)
        {'optimizer': {'class_path': 'torch.optim.sgd.SGD', 'init_args': {'lr': 0.1}}, 'reward': 'builtins.len'}
    """
    return {name: _plain(value) for name, value in settings.items()}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, partial):
        # The command line's partial holds the class among the arguments of a function of its own.
        classes = [part for part in (value.func, *value.args) if isinstance(part, type)]
        if classes:
            return {"class_path": _path(classes[0]), "init_args": _plain(value.keywords)}
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value if isinstance(value, PLAIN) else _path(value)


def _path(named: Any) -> str:
    if hasattr(named, "__qualname__"):
        return f"{named.__module__}.{named.__qualname__}"
    return f"{type(named).__module__}.{type(named).__qualname__}.<instance>"


def from_config(
    kind: type[SettingsT], settings: SettingsT | Mapping[str, Any], default: SettingsT | None = None
) -> SettingsT:
    """A group of settings, given as such or as a dict.

    Args:
        kind: the dataclass.
        settings: the group, or its fields by name.
        default: holds the fields that a dict leaves out; None for the dataclass's own defaults.
    """
    if not isinstance(settings, Mapping):
        return settings
    return kind(**settings) if default is None else replace(default, **settings)  # type: ignore[type-var]


def optimizer_from_config(optimizer: Any) -> Any:
    """What makes an optimizer from parameters, given as such, or as `as_config` wrote it.

    Args:
        optimizer: a callable; or an import path; or a dict of `class_path` and `init_args`.

    Raises:
        UserError: there is nothing at that path, or no optimizer.
    """
    made = made_from_config("optimizer", optimizer)
    if isinstance(optimizer, Mapping) and not (isinstance(made.func, type) and issubclass(made.func, Optimizer)):
        raise UserError(f"optimizer: '{optimizer['class_path']}' is not a torch.optim.Optimizer")
    return made


def made_from_config(name: str, given: Any) -> Any:
    """What makes something, given as such, or as `as_config` wrote it.

    Args:
        name: of the argument, for messages.
        given: a callable or None; or an import path; or a dict of `class_path` and `init_args`.

    Raises:
        UserError: there is nothing at that path.
    """
    if isinstance(given, str):
        return _imported(name, given)
    if not isinstance(given, Mapping):
        return given
    return partial(_imported(name, given["class_path"]), **given.get("init_args", {}))


def _imported(argument: str, path: str) -> Any:
    module_name, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{argument}: nothing can be imported as '{path}'; pass {argument}, also to load_from_checkpoint where it "
            "was a lambda"
        ) from error
