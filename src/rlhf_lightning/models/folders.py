"""Finding a model: which strings are folders, which are hub ids, and what is wrong with them."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities.rank_zero import rank_zero_info

from rlhf_lightning.errors import UserError


def reason_of(error: Exception) -> str:
    """What a library says of files that are missing, cut short, or do not fit their config, on one line.

    Args:
        error: of any kind, for a config of other people may say anything.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    if "trust_remote_code" in str(error):
        return "it brings Python code of its own; if you trust its makers, allow that with trust_remote_code"
    return text or type(error).__name__


def looks_local(name_or_path: str | os.PathLike[str]) -> bool:
    """Whether a name means a folder on this disk rather than a hub id: it is one, or could not be anything else.

    Example:
        >>> looks_local("./runs/sft/export"), looks_local("a/b/c"), looks_local("facebook/opt-350m")
        (True, True, False)
    """
    name = os.fspath(name_or_path)
    beside_something = "/" in name and os.path.isdir(os.path.dirname(name))
    return os.path.isdir(name) or beside_something or name.startswith((".", "~", os.sep)) or name.count("/") > 1


def check_model_folder(name_or_path: str | os.PathLike[str]) -> str:
    """Return the name to load from, after the checks that need no network.

    Args:
        name_or_path: a Hugging Face folder or hub id.

    Raises:
        UserError: it means a folder, and the folder is missing or holds no model.
    """
    name = os.path.expanduser(os.fspath(name_or_path))
    if not name.strip():
        raise UserError("the model has an empty name; pass a Hugging Face folder or hub id")
    if not looks_local(name):
        return name
    folder = Path(name)
    if not folder.is_dir():
        raise UserError(f"model folder '{name}' does not exist; pass a Hugging Face folder or hub id")
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        hint = ""
        if any((folder / "export" / file).is_file() for file in ("config.json", "adapter_config.json")):
            hint = f"; the model of this run is in '{folder / 'export'}'"
        elif any(folder.glob("*.ckpt")):
            hint = "; it holds Lightning checkpoints, the model is in its export folder"
        raise UserError(f"'{name}' is not a model folder: it has no config.json{hint}")
    return name


def read_config(name: str, file: str = "config.json") -> dict[str, Any]:
    """What a JSON file of a local model folder holds; empty where there is none, as of a hub id.

    Args:
        name: a folder, or anything else.
        file: its name in the folder.

    Raises:
        UserError: the file is not a JSON object.
    """
    path = Path(name) / file
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise UserError(f"'{path}' is not valid JSON ({e}); export the model again") from e
    if not isinstance(config, dict):
        raise UserError(f"'{path}' does not hold a JSON object; export the model again")
    return config


@lru_cache
def say_trusted(name: str) -> None:
    """Say that a model or tokenizer may bring Python code along, which runs here; once.

    Args:
        name: a folder or hub id that is about to be loaded with `trust_remote_code`.
    """
    rank_zero_info(f"'{name}' may run Python code of its own, as trust_remote_code allows")


@lru_cache
def say_base(name: str, base: str) -> None:
    """Say which model an adapter names as its base, for its folder may come from others; once.

    Args:
        name: folder of the adapter.
        base: folder or hub id that is loaded.
    """
    rank_zero_info(f"the adapter '{name}' stands on '{base}', as its config says")


def architectures(name: str) -> list[str]:
    """The classes that the config of a local model folder names; none where it names none.

    Args:
        name: a folder, or anything else.
    """
    named = read_config(name).get("architectures")
    return [str(each) for each in named] if isinstance(named, list) else []


def same_model(name_or_path: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether two names mean the same folder or hub id.

    Example:
        >>> same_model("runs/sft/export", "./runs/sft/../sft/export"), same_model("a/b", "a/c")
        (True, False)
    """
    return os.path.realpath(os.path.expanduser(name_or_path)) == os.path.realpath(os.path.expanduser(other))
