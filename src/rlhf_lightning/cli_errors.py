"""Turns jsonargparse's many-line complaints into one line that says what to do."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Iterable


def _suggest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _arguments_of(class_path: str) -> list[str]:
    module_name, _, name = class_path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError):
        return []
    return list(inspect.signature(cls).parameters)


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
    class_paths = re.findall(r"(?:given class_path|subclass) '([\w.]+)'", message)
    if unknown := re.search(r"does not accept option '([\w.]+)'", message):
        return f"unknown key '{unknown[1]}'{_suggest(unknown[1], known_keys)}"
    if unknown := re.search(r"Option '([\w.]+)' is not accepted", message):
        arguments = _arguments_of(class_paths[-1]) if class_paths else []
        owner = f" of {class_paths[-1].rpartition('.')[2]}" if class_paths else ""
        return f"{path}: unknown argument '{unknown[1]}'{owner}{_suggest(unknown[1], arguments)}"
    if missing := re.search(r"""(?:Key|Option) ["']([\w.]+)["'] is required""", message):
        return f"{missing[1].replace('init_args.', '')} is missing: pass --{missing[1].replace('init_args.', '')}"
    if unrecognized := re.search(r"[Uu]nrecognized arguments: (\S+)", message):
        return f"unknown option {unrecognized[1]}{_suggest(unrecognized[1].lstrip('-').split('=')[0], known_keys)}"
    expected = [e for e in re.findall(r"Expected an? (.+)", message) if "NoneType" not in e and "Namespace" not in e]
    given = re.findall(r"(?:Given value|Got value|value): (.+)", message)
    if path and expected and given:
        kinds = " or ".join(dict.fromkeys(re.sub(r"<class '([\w.]+)'>.*", r"\1", kind) for kind in expected))
        return f"{path}: expected {kinds}, got {given[0].strip()}"
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    return " ".join(dict.fromkeys([lines[0], lines[-1]])) if lines else "bad arguments"
