"""Where config files are found, and what a broken one is told; nothing here is slow to import."""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from rlhf_lightning.errors import UserError
from rlhf_lightning.yaml_text import check_values, load_yaml

_PACKAGE = Path(__file__).parents[1]
RECIPES = next(folder for folder in (_PACKAGE / "configs", _PACKAGE.parents[1] / "configs") if folder.is_dir())
"""The recipes: inside the installed package, or at the top of a checkout."""

_OTHERS = {"data.yaml", "evaluate.yaml", "pipeline.yaml", "quickstart.yaml"}
"""Those of other commands than the stages'."""


def recipe_names() -> list[str]:
    """Every recipe of the package, as it is named on the command line."""
    return sorted(path.relative_to(RECIPES).as_posix() for path in RECIPES.rglob("*.yaml"))


def stage_recipes() -> list[str]:
    """Those of an algorithm."""
    return [name for name in recipe_names() if "/" not in name and name not in _OTHERS]


def recipe_list() -> str:
    """Every recipe for a message of one line: those of a folder share its name."""
    folders: dict[str, list[str]] = {}
    for path in map(Path, recipe_names()):
        folders.setdefault("" if path.parent == Path() else f"{path.parent.as_posix()}/", []).append(path.stem)
    alone = [f"{stem}.yaml" for stem in folders.pop("", [])]
    return ", ".join(alone + [f"{folder}{{{','.join(stems)}}}.yaml" for folder, stems in folders.items()])


def find_recipe(name: str) -> str:
    """Path of a config file: as given from the working folder, else among the package's recipes.

    Args:
        name: a path.

    Raises:
        UserError: it is in neither place.
    """
    for candidate in (Path(name), RECIPES / name, Path(os.path.expanduser(name))):
        with contextlib.suppress(OSError, ValueError):  # a name that no file can have
            if candidate.is_file():
                return str(candidate)
    if os.path.isdir(name):
        raise UserError(f"config '{name}' is a folder; name a file in it, or a recipe ({recipe_list()})")
    stem, names = Path(name).with_suffix("").as_posix(), recipe_names()
    close = [n for n in names if Path(n).stem == Path(stem).name] or difflib.get_close_matches(f"{stem}.yaml", names, 1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    name = name if len(name) < 300 else name[:300] + " ..."
    raise UserError(f"config '{name}' is neither in the working folder nor a recipe ({recipe_list()}){hint}")


def read_config(path: str) -> dict[str, Any]:
    """The keys and values of a config file.

    Args:
        path: a YAML or JSON file that exists.

    Raises:
        UserError: it is no YAML, or no mapping.
    """
    try:
        config = copy.deepcopy(_parsed(Path(path).read_text(encoding="utf-8"), f"config '{path}'"))
    except UnicodeDecodeError as e:
        raise UserError(f"config '{path}' is no text file; pass a YAML file") from e
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark else ""
        reason = getattr(e, "problem", None) or str(e)
        raise UserError(f"config '{path}'{place}: broken YAML ({' '.join(reason.split())})") from e
    if not isinstance(config, dict):
        raise UserError(f"config '{path}' holds no 'key: value' lines; pass a recipe such as sft.yaml")
    if wrong := _misshapen({"": config}):
        raise UserError(f"config '{path}': {wrong}")
    return config


@functools.lru_cache(maxsize=16)  # a start asks for each config five times
def _parsed(text: str, name: str) -> Any:
    return load_yaml(text, name, keys_once=True)


def _misshapen(config: dict[str, Any], prefix: str = "") -> str:
    """Which key below another holds no settings, or no name of a class, though it should; empty if none."""
    for key, value in config.items():
        name = f"{prefix}.{key}".strip(".")
        if key == "init_args" or name == "trainer":
            if value is None:
                return f"{name} holds nothing; write 'key: value' lines below it, or leave it out"
            if not isinstance(value, dict):
                return f"{name} holds {value!r}, not settings as 'key: value' lines"
        elif (key == "class_path" and not isinstance(value, str | None)) or (name == "model" and value is True):
            return f"{name} holds {value!r}, not the name of a class"
        items = value if isinstance(value, list) else [value]
        for inner in items:
            if isinstance(inner, dict) and (wrong := _misshapen(inner, name)):
                return wrong
    return ""


def resolve_recipes(args: Sequence[str]) -> list[str]:
    """Put the config files first, by the paths they are found at, so that options win over them wherever they stand.

    Args:
        args: words of the command line.

    Raises:
        UserError: a config file is missing or broken, a `--config` at the end names none, or a value is beyond bounds.
    """
    configs: list[str] = []
    others: list[str] = []
    words = iter(args)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in ("--config", "-c"):
            others.append(word)
            continue
        value = value if equals else next(words, "")
        if not value:
            raise UserError(f"{name} names no file; pass a recipe ({recipe_list()})")
        path = find_recipe(value)
        read_config(path)
        configs.append(f"--config={path}")
    check_values(others)
    return configs + others


def config_paths(options: Sequence[str]) -> list[str]:
    """The config files among words that `resolve_recipes` gave, in order.

    Example:
        >>> config_paths(["--config=sft.yaml", "--config=cpu.yaml", "--trainer.max_steps", "3"])
        ['sft.yaml', 'cpu.yaml']
    """
    return [word.removeprefix("--config=") for word in options if word.startswith("--config=")]


def named_classes(options: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What configs and options say of the model and the data class: `class_path` and `init_args`, later ones win.

    Args:
        options: words of the command line, recipes resolved.

    Example:
        >>> named_classes(["--model=SFTModule", "--data", "my.Data"])
        {'model': {'class_path': 'SFTModule'}, 'data': {'class_path': 'my.Data'}}
    """
    named: dict[str, dict[str, Any]] = {}
    for path in config_paths(options):
        for key, value in read_config(path).items():
            if key in ("model", "data") and value:
                named[key] = named.get(key, {}) | (value if isinstance(value, dict) else {"class_path": value})
    for word, following in pairwise([*options, ""]):
        name, _, value = word.partition("=")
        if name in ("--model", "--data"):
            named[name.removeprefix("--")] = {"class_path": value or following}
    return named
