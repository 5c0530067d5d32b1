"""Configs and options stacked on each other: what comes later takes the place of what came before, whatever it is.

jsonargparse differs from that in two places: two lists of equal length are merged item by item, and a nested null is
taken for the word "None".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from jsonargparse import ActionConfigFile

from rlhf_lightning.cli.recipes import read_config
from rlhf_lightning.yaml_text import load_yaml

_NESTED = r"--(model|data)\.(?!optimizer\.|init_args\.)(\w+)\.(\w+)"
_OPTION = re.compile(r"--(\w[\w.]*)")


class StackedConfig(ActionConfigFile):
    """A `--config` whose lists take the place of those of the configs before it."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Parse a config file, or a config written out as JSON, and add it to `cfg`."""
        config = load_yaml(values, "--config") if values.lstrip().startswith("{") else read_config(values)
        for path in _lists(config if isinstance(config, dict) else {}):
            if isinstance(cfg.get(path), list):
                cfg[path] = []  # of another length, so that nothing is merged
        super().__call__(parser, cfg, values, option_string)


def _lists(config: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted paths of all lists in a config."""
    for key, value in config.items():
        if isinstance(value, list):
            yield prefix + str(key)
        elif isinstance(value, dict):
            yield from _lists(value, f"{prefix}{key}.")


def as_configs(options: Sequence[str]) -> list[str]:
    """Write options as inline configs where jsonargparse would not let them win: nested nulls, lists of classes.

    Args:
        options: words of the command line.

    Example:
        >>> as_configs(["--model.score.clip", "null", "--data.seed=1"])
        ['--config={"model": {"init_args": {"score": {"clip": null}}}}', '--data.seed=1']
        >>> as_configs(["--trainer.callbacks", "[{class_path: A}]"])
        ['--config={"trainer": {"callbacks": [{"class_path": "A"}]}}']
    """
    joined: list[str] = []
    for word in options:
        if joined and _OPTION.fullmatch(joined[-1]) and _as_config(f"{joined[-1]}={word}"):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return [_as_config(word) or word for word in joined]


def _as_config(word: str) -> str | None:
    name, _, value = word.partition("=")
    if not _OPTION.fullmatch(name):
        return None
    if value in ("null", "None"):
        nested = re.fullmatch(_NESTED, name)
        return nested and _inline([nested[1], "init_args", nested[2], nested[3]], None)
    classes = _list_of_classes(value)
    keys = name.removeprefix("--").split(".")
    if keys[0] in ("model", "data") and keys[1:2] != ["init_args"]:
        keys.insert(1, "init_args")
    return _inline(keys, classes) if classes else None


def _list_of_classes(value: str) -> list[Any] | None:
    if not value.startswith("["):
        return None
    try:
        items = load_yaml(value, "a list")
    except yaml.YAMLError:
        return None
    return items if isinstance(items, list) and any(isinstance(item, dict) for item in items) else None


def _inline(keys: Sequence[str], value: Any) -> str:
    for key in reversed(keys):
        value = {key: value}
    return "--config=" + json.dumps(value)
