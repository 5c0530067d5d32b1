"""Options that name files, folders, data and models: `~` in them, and those that are empty.

An empty one is mostly `--data.data=$FILE` where nobody has set FILE; taken for a path it would be the working folder.
Nothing here is slow to import.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from rlhf_lightning.cli.recipes import config_paths, read_config
from rlhf_lightning.errors import UserError
from rlhf_lightning.yaml_text import load_yaml

_DATA = "a file, a folder or a hub id"
_MODEL = "a folder or a hub id"
_REWARD = "a folder, a hub id or a function"
_PLACE = "a place, or leave it out"
_WHAT_TO_NAME = {
    **dict.fromkeys(("data", "validation_data", "test_data", "predict_data", "file"), _DATA),
    **dict.fromkeys(("model_name_or_path", "value_name_or_path", "tokenizer", "model", "models", "policy"), _MODEL),
    **dict.fromkeys(("reference", "calibration_policy", "base"), _MODEL),
    **dict.fromkeys(("reward", "rewards", "judge"), _REWARD),
    **dict.fromkeys(("default_root_dir", "dirpath", "save_dir", "cache_dir", "out", "path", "folder"), _PLACE),
    **dict.fromkeys(("judgements", "examples"), _PLACE),
    "prompts": _DATA,
    "ckpt_path": "a .ckpt file, or last, or leave it out",
}
"""By the last part of an option's name."""
_NO_TEXTS = {
    **dict.fromkeys(("fit", "validate", "test", "predict", "plan"), ("model", "data", "trainer.callbacks.prompts")),
    "evaluate": ("reward",),
}
"""Options of commands that are called like one of those and name a class, or hold settings."""
_WRITTEN = re.compile(r"(dir|path|folder)$")
"""How settings of the trainer, its callbacks and its loggers are called that name a place."""


def at_home(text: str) -> Path:
    """A path, `~` in it replaced: the shell does that at the beginning of a word only, not in `--out=~/runs`.

    Args:
        text: of a command line or a config.
    """
    return Path(os.path.expanduser(text))


def expand_home(settings: Any) -> None:
    """Replace `~` in all places that settings name, so that whoever reads them sees the same.

    Args:
        settings: of the trainer; what they hold is changed.
    """
    if isinstance(settings, list):
        for each in settings:
            expand_home(each)
        return
    values = settings if isinstance(settings, dict) else getattr(settings, "__dict__", {})
    for name, value in values.items():
        if isinstance(value, str) and _WRITTEN.search(name):
            values[name] = os.path.expanduser(value)
        elif not isinstance(value, str):
            expand_home(value)


def refuse_empty(command: str, options: Sequence[str]) -> None:
    """Refuse an empty text where a file, a folder, data or a model is to be named.

    Args:
        command: of `rlhf`.
        options: the words after it, recipes resolved.

    Raises:
        UserError: names the option.
    """
    for before, word in pairwise(["", *options]):
        if not word and not re.fullmatch(r"--[\w.+-]+", before):
            raise UserError(f"a word after `rlhf {command}` is empty; write what it stands for, or leave it out")
    last = dict(_values(options, with_configs=command != "pipeline"))  # whose steps are looked at one by one
    for key, (shown, value) in last.items():
        hint = _WHAT_TO_NAME.get(key.rpartition(".")[2])
        if hint and key not in _NO_TEXTS.get(command, ()) and _is_empty(value):
            raise UserError(f"{shown} is empty; name {hint}")


def _is_empty(value: Any) -> bool:
    """Whether a value is an empty text, or a list of names that holds one."""
    texts = value if isinstance(value, list) else [value]
    return any(isinstance(text, str) and not text.strip() for text in texts)


def _values(options: Sequence[str], with_configs: bool) -> Iterator[tuple[str, tuple[str, Any]]]:
    """Every key of configs and options, dotted, without what only jsonargparse writes; how it is written; its value."""
    for path in config_paths(options) if with_configs else ():
        for key, value in _flat(read_config(path)):
            yield key, (key, value)
    for word, following in pairwise([*options, "--"]):
        if option := re.match(r"--([\w.-]+)\+?(=|$)", word):
            name = option[1].replace("init_args.", "")
            if option[2] or not following.startswith("--"):
                for key, value in _flat({name: _read(word[option.end() :] if option[2] else following)}):
                    yield key, (f"--{key}", value)


def _read(word: str) -> Any:
    """A list or settings that a word holds, or else the word."""
    with contextlib.suppress(yaml.YAMLError):
        return load_yaml(word, "an option") if word.startswith(("[", "{")) else word
    return word


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        key = prefix if name == "init_args" else f"{prefix}.{name}".strip(".")
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, dict):
                yield from _flat(each, key)
        if not isinstance(value, dict):
            yield key, value
