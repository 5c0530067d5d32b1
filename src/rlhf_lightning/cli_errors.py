"""Turns jsonargparse's many-line complaints into one line that says what to do."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterable

from jsonargparse import ArgumentParser

import rlhf_lightning
from rlhf_lightning.recipes import recipe_names

_BOILERPLATE = (
    "Does not validate",
    "Subtypes:",
    "Errors:",
    "Given value",
    "Parser key",
    "Problem with",
    "Expected a",
    "Not of type",
)


def _suggest(word: str, known: Iterable[str], shown: str = "{}") -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{shown.format(close[0])}'?" if close else ""


def _arguments_of(class_path: str) -> list[str]:
    """Arguments of a class, those of its dataclass arguments after a dot."""
    module_name, _, name = class_path.rpartition(".")
    parser = ArgumentParser(add_help=False)
    parser.add_class_arguments(getattr(importlib.import_module(module_name), name))
    return [action.dest for action in parser._actions]


def _unknown_key(message: str, path: str, known_keys: Iterable[str]) -> str | None:
    """A key or option that nothing takes, with the nearest one that exists."""
    inside = re.search(r"Option '([\w.]+)' is not accepted", message)
    group = re.search(r"(Group|Subcommand) '(\w+)' does not accept option '([\w.]+)'", message)
    option = re.search(r"[Uu]nrecognized arguments: (-*)([^\s=]+)", message)
    if inside:
        name = inside[1]
    elif group:
        name = f"{group[2]}.{group[3]}" if group[1] == "Group" else group[3]
    elif option:
        name = option[2]
        if not option[1]:
            return f"unexpected word '{name}'; options begin with --"
    else:
        return None
    # The innermost class that the message names is the one that does not know the key.
    classes = re.findall(r"(?:class_path=|given class_path )'([\w.]+)'", message)
    if not classes:
        return f"unknown key '{name}'{_suggest(name, known_keys)}"
    owner = classes[-1]
    return (
        f"unknown key '{path}.{name}': {owner.rpartition('.')[2]} has no such argument"
        f"{_suggest(name, _arguments_of(owner), path + '.{}')}"
    )


def _unknown_class(message: str, path: str) -> str | None:
    """A `class_path` that leads nowhere."""
    if attribute := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        known = dir(importlib.import_module(attribute[1]))
        hint = _suggest(attribute[2], known, attribute[1] + ".{}")
        return f"{path}: there is no class '{attribute[1]}.{attribute[2]}'{hint}"
    if module := re.search(r"No module named '([\w.]+)'", message):
        return f"{path}: there is no Python module '{module[1]}'"
    word = re.search(r"Expected a dot import path string: (\S+)", message)
    if word and path in ("model", "data"):
        hint = _suggest(word[1], rlhf_lightning.__all__, "rlhf_lightning.{}") or "; write package.module.Class"
        return f"{path}: there is no class '{word[1]}'{hint}"
    return None


def _readable(expected: str) -> str:
    """`int` for `<class 'int'>`, `one of a, b` for a Literal."""
    if literal := re.match(r"typing\.Literal\[(.*)\]", expected):
        return "one of " + literal[1].replace("'", "")
    return re.sub(r"<class '([\w.]+)'>.*", r"\1", expected)


def _wrong_type(message: str, path: str) -> str | None:
    """A value of the wrong type."""
    expected = [e.split(". Got value")[0] for e in re.findall(r"Expected an? (.+)", message)]
    ignored = ("NoneType", "Namespace", "path but", "dot import path", "torch.Tensor")
    kinds = dict.fromkeys(_readable(e) for e in expected if not any(word in e for word in ignored))
    given = re.findall(r"(?:Got value|Given value): (.+)", message)
    if not (path and kinds and given):
        return None
    return f"{path}: expected {' or '.join(kinds)}, got {given[0].split('. Got value')[0].strip()}"


def one_line(message: str, known_keys: Iterable[str] = ()) -> str:
    """Condense an error message of jsonargparse.

    Args:
        message: as jsonargparse words it.
        known_keys: keys that the parser takes, for suggestions.

    Example:
        >>> one_line("Subcommand 'fit' does not accept option 'modle'", ["model", "data"])
        "unknown key 'modle'; did you mean 'model'?"
    """
    path = ".".join(dict.fromkeys(re.findall(r'[Pp]arser key "([\w.]+)"', message)))
    if required := re.search(r"arguments are required: (\w+(?:, \w+)*)$", message):
        names = required[1].split(", ")
        return f"{' and '.join(names)} missing; pass {' and '.join(f'--{name}' for name in names)}"
    if "arguments are required: " in message:
        return f"nothing says which model and data to use; pass --config with a recipe ({', '.join(recipe_names())})"
    if missing := re.search(r"""(?:Key|Option) ["']([\w.]+)["'] is required""", message):
        name = f"{path}.{missing[1]}" if path else missing[1]
        return f"{name} is missing; pass --{name}"
    for found in (_unknown_key(message, path, known_keys), _unknown_class(message, path), _wrong_type(message, path)):
        if found:
            return found
    lines = [line.strip(" -") for line in message.splitlines()]
    telling = [line for line in lines if line and not line.startswith(_BOILERPLATE)] or lines[:1]
    return ": ".join(part for part in (path, "; ".join(dict.fromkeys(telling))) if part)
