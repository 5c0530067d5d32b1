"""Turns jsonargparse's many-line complaints into one line that says what to do."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from jsonargparse import ArgumentParser

from rlhf_lightning.cli.recipes import recipe_list, recipe_names
from rlhf_lightning.cli.spelling import nearest
from rlhf_lightning.compat import parser_actions

_MOST_SHOWN = 10
_HOMES = {
    "model": "rlhf_lightning",
    "data": "rlhf_lightning",
    "callbacks": "pytorch_lightning.callbacks",
    "logger": "pytorch_lightning.loggers",
    "optimizer": "torch.optim",
}

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


def _nearest(word: str, known: Iterable[str]) -> str:
    found = nearest(word, known)
    return f"; did you mean '{found}'?" if found else ""


def find_class(class_path: str) -> type:
    """The class at an import path; a name alone is one of this package's.

    Args:
        class_path: `package.module.Class`, or `Class`.
    """
    module_name, _, name = class_path.rpartition(".")
    cls: type = getattr(importlib.import_module(module_name or "rlhf_lightning"), name)
    return cls


def arguments_of(class_path: Any, key: str) -> list[str]:
    """Arguments of a class below a key, those of its dataclass arguments after a dot; none if there is no such class.

    Args:
        class_path: as for `find_class`.
        key: where the class stands in the config.
    """
    parser = ArgumentParser(add_help=False)
    try:
        parser.add_class_arguments(find_class(class_path), key)
    except (ImportError, AttributeError, ValueError):
        return []
    return [action.dest for action in parser_actions(parser)]


def _unknown_key(message: str, path: str, known_keys: Iterable[str]) -> str | None:
    """A key or option that nothing takes, with the nearest one that exists."""
    inside = re.search(r"Option '([\w.-]+)' is not accepted", message)
    group = re.search(r"(Group|Subcommand) '(\w+)' does not accept option '([\w.-]+)'", message)
    short = re.search(r"ambiguous option: --([^\s=]+)", message)
    option = re.search(r"[Uu]nrecognized arguments: (-*)([^\s=]+)", message)
    if inside:
        name = inside[1]
    elif group:
        name = f"{group[2]}.{group[3]}" if group[1] == "Group" else group[3]
    elif short:
        name = short[1]
    elif option:
        name = option[2]
        if not option[1]:
            hint = f"; did you mean --config {name}?" if name.endswith(".yaml") else ""
            return f"unexpected word '{name}'; options begin with --{hint}"
    else:
        return None
    # The innermost class that the message names is the one that does not know the key.
    classes = re.findall(r"(?:class_path=|given class_path )'([\w.]+)'", message)
    if not classes:
        name = f"{path}.{name}" if inside and path else name
        return f"unknown key '{name}'{_nearest(name, known_keys)}"
    owner, name = classes[-1], f"{path}.{name}"
    known = {*arguments_of(owner, path), *known_keys}
    return f"unknown key '{name}': {owner.rpartition('.')[2]} has no such argument{_nearest(name, known)}"


def _unknown_class(message: str, path: str) -> str | None:
    """A `class_path` that leads nowhere."""
    if attribute := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        known = dir(importlib.import_module(attribute[1]))
        hint = _suggest(attribute[2], known, attribute[1] + ".{}")
        return f"{path}: there is no class '{attribute[1]}.{attribute[2]}'{hint}"
    if module := re.search(r"No module named '([\w.]+)'", message):
        return f"{path}: there is no Python module '{module[1]}'"
    word = re.search(r"Expected a dot import path string: (\S+)", message)
    if word and (home := _HOMES.get(path.rpartition(".")[2])):
        package = importlib.import_module(home)
        classes = {name.lower(): name for name in dir(package) if isinstance(getattr(package, name), type)}
        close = difflib.get_close_matches(word[1].lower(), list(classes), n=1, cutoff=0.5)
        hint = f"did you mean '{home}.{classes[close[0]]}'?" if close else "write package.module.Class"
        return f"{path}: there is no class '{word[1]}'; {hint}"
    return None


def _value_for_a_group(message: str, path: str, known_keys: Sequence[str]) -> str | None:
    """A value for something that has settings of its own."""
    value = re.search(r"Unable to load config '(.*)'", message)
    if value is None:
        return None
    inside = [key for key in known_keys if key.startswith(f"{path}.") and not key.endswith(".help")]
    recipes = [recipe for recipe in recipe_names() if recipe in (value[1], f"{path}/{value[1]}.yaml")]
    if path == "model.finetune":
        hint = f"did you mean --model.finetune.mode {value[1]}?"
    elif recipes:
        hint = f"did you mean --config {recipes[0]}?"
    else:
        hint = f"set {_one_of([f'--{key}' for key in inside])}"
    return f"--{path} {value[1]}: {path} has settings of its own; {hint}"


def _one_of(options: Sequence[str]) -> str:
    return f"one of them, such as {options[0]}" if len(options) > _MOST_SHOWN else " or ".join(options)


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
    given = re.findall(r"(?:Got value|Given value): (.*)", message)
    if not (path and given):
        return None
    got = re.sub(r"NestedArg\(key='\w+', val='(.*)'\)", r"\1", given[0].split(". Got value")[0].strip())
    if not kinds:
        return None if got else f"{path} needs a value, or leave it out"
    return f"{path}: expected {' or '.join(kinds)}, got {got or 'nothing'}"


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
    if lacking := re.search(
        r"Problem with given class_path '([\w.]+)':\s+the following arguments are required: (.+)", message
    ):
        return f"{path}: {lacking[1].rpartition('.')[2]} needs {lacking[2]}; write it below init_args"
    if bare := re.fullmatch(r"Unexpected config: (\w+):\s*(?:null)?\s*", message):
        return f"{bare[1]} holds nothing; give it a value, or leave it out"
    if "arguments are required: " in message:
        return f"nothing says which model and data to use; pass --config with a recipe ({recipe_list()})"
    if missing := re.search(r"""(?:Key|Option) ["']([\w.]+)["'] is required""", message):
        name = f"{path}.{missing[1]}" if path else missing[1]
        return f"{name} is missing; pass --{name}"
    known = sorted(known_keys)
    for found in (
        _unknown_key(message, path, known),
        _unknown_class(message, path),
        _value_for_a_group(message, path, known),
        _wrong_type(message, path),
    ):
        if found:
            return found
    if option := re.fullmatch(r"argument (--[\w.]+)(?:/\S+)?: expected one argument", message):
        return f"{option[1]} needs a value" + (
            f": {option[1]} true" if option[1] in ("--overwrite", "--allow_mismatch") else ""
        )
    lines = [line.strip(" -") for line in message.splitlines()]
    telling = [line for line in lines if line and not line.startswith(_BOILERPLATE)] or lines[:1]
    return ": ".join(part for part in (path, "; ".join(dict.fromkeys(telling))) if part)
