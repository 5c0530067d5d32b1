"""What people write for an option, and which one they mean."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from rlhf_lightning.cli.options import Option, as_word, describe, describe_function, literal_words, trainer_keys
from rlhf_lightning.cli.recipes import config_paths, named_classes, read_config, recipe_names, stage_recipes
from rlhf_lightning.errors import UserError
from rlhf_lightning.yaml_text import load_yaml

_ALSO_CALLED = {
    "model.optimizer.lr": ["lr", "learning_rate"],
    "model.optimizer": ["optimiser", "optim"],
    "model.lr_schedule": ["lr_scheduler", "scheduler", "lr_scheduler_type"],
    "model.finetune.mode": ["lora", "peft", "use_lora", "use_peft"],
    "model.model_name_or_path": ["model", "name", "model_name", "model_path", "base_model", "path", "folder"],
    "model.sampling.max_new_tokens": ["max_tokens"],
    "data.data": ["file", "files", "path", "train_file", "train_data", "dataset", "dataset_name", "data_path"],
    "data.max_length": ["max_seq_length", "max_seq_len", "cutoff_len"],
    "data.batch_size": ["per_device_train_batch_size", "train_batch_size"],
    "data.validation_split": ["val_split", "test_size", "val_size"],
    "trainer.max_epochs": ["epoch", "epochs", "num_epochs", "num_train_epochs"],
    "trainer.max_steps": ["steps", "num_steps", "train_steps"],
    "trainer.default_root_dir": ["output_dir", "output", "out", "run_dir", "save_dir"],
    "trainer.devices": ["gpus", "num_gpus", "n_gpus"],
    "trainer.precision": ["bf16", "fp16", "dtype"],
    "trainer.accelerator": ["device", "gpu", "cpu"],
    "ckpt_path": ["ckpt", "checkpoint", "resume", "resume_from_checkpoint"],
    "seed_everything": ["seed"],
    "tokenizer": ["tokeniser", "model", "model_name_or_path"],  # of `rlhf prepare`
}
HELP_ALL = "--help_all"
"""Prints everything that there is to say of a stage's options."""

_OF_EVERY_RUN = {
    "config",
    "trainer",
    "model",
    "data",
    "seed_everything",
    "overwrite",
    "allow_mismatch",
    "report",
    "print_config",
    "help",
    "help_all",
}
FUNCTIONS = {
    "toy": "cli.toy.write_toy",
    "prepare": "cli.prepare.prepare",
    "sample": "cli.sample.sample",
    "evaluate": "evaluation.suite.evaluate",
}
"""Commands that are one function each, and its place in the package."""
_FROM_PYTHON = {"report"}  # what a function takes and its command does not
_MEANT_FOR = {"model": "model_name_or_path", "data": "data"}
_BOOLEANS = {"true", "false", "yes", "no", "on", "off"}
_CLASS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_DATA_FILE = re.compile(r".+\.(jsonl?|csv|tsv|parquet|txt|gz)")
_COMMANDS = {"train": "fit", "evaluate": "validate", "eval": "validate"}


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The option that a word is most likely meant for.

    Args:
        word: as it was written, groups before dots.
        known: the options that there are.

    Example:
        >>> options = ["model.optimizer", "data.batch_size", "trainer.max_epochs"]
        >>> nearest("model.optimiser.lr", options), nearest("batch-size", options), nearest("trainer.epochs", options)
        ('model.optimizer.lr', 'data.batch_size', 'trainer.max_epochs')
    """
    options = sorted({name for name in known if not name.endswith(".help")}, key=lambda name: (len(name), name))
    word = word.replace("-", "_").replace(".init_args.", ".")
    group, last = word.split(".")[0], word.rpartition(".")[2]
    if word in options:
        return word
    meant = [name for name, others in _ALSO_CALLED.items() if last in others and _exists(name, options)]
    same_name = [name for name in options if name.rpartition(".")[2] == last]
    for found in (meant, same_name):
        if found:
            return next((name for name in found if name.split(".")[0] == group), found[0])
    by_last = {name.rpartition(".")[2]: name for name in reversed(options) if name.split(".")[0] == group}
    close = difflib.get_close_matches(last, by_last, n=1, cutoff=0.7) or difflib.get_close_matches(word, options, n=1)
    return by_last.get(close[0], close[0]) if close else None


def _is_no_class(value: str) -> bool:
    return not _CLASS.fullmatch(value) or Path(value).exists() or _DATA_FILE.fullmatch(value) is not None


def _exists(name: str, options: Sequence[str]) -> bool:
    """Also inside a class that is chosen by the user, such as an optimizer."""
    return name in options or name.rpartition(".")[0] in options


def command_hint(word: str, commands: Sequence[str]) -> str:
    """What to write instead of a command that does not exist.

    Args:
        word: as it was written.
        commands: those that there are.
    """
    recipe = word if word.endswith(".yaml") else f"{word}.yaml"
    if recipe in recipe_names() or word.endswith(".yaml"):
        return f"did you mean `rlhf {'prepare' if word.startswith('data') else 'fit'} --config {recipe}`?"
    close = [_COMMANDS[word]] if word in _COMMANDS else difflib.get_close_matches(word, commands, n=1)
    return f"did you mean `rlhf {close[0]}`?" if close else "see `rlhf --help`"


def check_words(options: Sequence[str]) -> None:
    """Refuse what would be read as something else than it is meant for.

    Args:
        options: the words after a stage's command, recipes resolved.

    Raises:
        UserError: says what to write instead.
    """
    if options and not options[0].startswith("-"):
        hint = f"; did you mean --config {options[0]}?" if options[0].endswith((".yaml", ".yml")) else ""
        raise UserError(f"unexpected word '{options[0]}'; options begin with --{hint}")
    for word in options:
        if re.fullmatch(r"-[A-Za-z][\w.-]+(=.*)?", word):
            raise UserError(f"unexpected word '{word}'; options begin with two dashes: -{word}")
    named = named_classes(options)
    for key, argument in _MEANT_FOR.items():
        value = named.get(key, {}).get("class_path")
        if isinstance(value, str) and _is_no_class(value):
            raise UserError(f"--{key} {value}: --{key} names a class; did you mean --{key}.{argument} {value}?")
    in_config = "tokenizer" in (named.get("data", {}).get("init_args") or {})
    if in_config or any(re.match(r"--data\.(init_args\.)?tokenizer(=|$)", word) for word in options):
        raise UserError("data.tokenizer: leave it out, the stages take that of --model.model_name_or_path")
    if {"--help", "-h", HELP_ALL} & set(options):
        return
    if lacking := [key for key in _MEANT_FOR if "class_path" not in named.get(key, {})]:
        raise UserError(
            f"nothing says which {' and '.join(lacking)} class to use; pass --config with a recipe "
            f"({', '.join(stage_recipes())}), or write class_path and init_args below '{lacking[0]}:'"
        )


def check_keys(command: str, options: Sequence[str]) -> None:
    """Refuse a key that nothing takes, and a value that is none of a few words, before anything slow is imported.

    What cannot be known without importing it passes: classes of others, what is inside an optimizer or a callback, and
    a word that is the beginning of an option.

    Args:
        command: `fit`, `validate`, `test` or `predict`.
        options: the words after it, recipes resolved.

    Raises:
        UserError: names the key, and the one that it is most likely meant for; or the value, and the words.
    """
    made, called = trainer_keys(command)
    known = _OF_EVERY_RUN | called | {f"trainer.{name}" for name in made}
    owners, groups = {}, {"model", "data", "trainer"}
    options_of: dict[str, Option] = {}
    for part, config in named_classes(options).items():
        if described := describe(path := config.get("class_path")):
            owners[part] = str(path).rpartition(".")[2]
            groups |= {f"{part}.{name}" for name in described.groups}
            options_of |= {f"{part}.{name}": option for name, option in described.options.items()}
            known |= options_of.keys() | groups
    written_values = list(_written(options, known))
    for written, _ in written_values:
        key = written.removesuffix("+")  # which adds to a list
        part = key.partition(".")[0]
        if part in ("model", "data") and "." in key:
            passes = part not in owners or key in known
        else:
            passes = any(name.startswith(key) for name in known)
        if passes or any(key.startswith(f"{name}.") for name in known - groups):
            continue
        owner = f": {owners[part]} has no such argument" if part in owners and "." in key else ""
        hint = f"; did you mean '{found}'?" if (found := nearest(key, known)) else ""
        raise UserError(f"unknown key '{key}'{owner}{hint}")
    _check_values(written_values, options_of)


def check_function(command: str, options: Sequence[str]) -> None:
    """Refuse what the parser of a command that is one function would refuse, before anything slow is imported.

    Whether a value is of its type is not looked at, but for those that are one of a few words.

    Args:
        command: one of `FUNCTIONS`.
        options: the words after it, recipes resolved, values after `=`.

    Raises:
        UserError: names a key that nothing takes, one that is lacking, or a value that is none of the words.
    """
    described = describe_function(FUNCTIONS[command])
    for path in config_paths(options):
        if command == "toy" or "model" in read_config(path):
            takes = "none" if command == "toy" else "one of its own"
            raise UserError(f"config '{path}' is one of another command; `rlhf {command}` takes {takes}")
    groups = set(described.groups)
    classes = {f"{group}.{name}" for group in groups for name in ("class_path", "init_args")}
    known = ({*described.options, "config"} | groups | classes) - _FROM_PYTHON
    values = list(_written(options, known))
    written = [key.removesuffix("+") for key, _ in values]
    if "data.data" in written:
        raise UserError(f"--data.data belongs to the stages; `rlhf {command}` takes --data")
    for key in written:
        if key not in known and not any(key.startswith(f"{name}.") for name in known - groups):
            hint = f"; did you mean '{found}'?" if (found := nearest(key, known - classes - {"config"})) else ""
            raise UserError(f"unknown key '{key}'; `rlhf {command}` has no such option{hint}")
    there = {key.partition(".")[0] for key in written}
    for name, option in described.options.items():
        if option.default is None and "." not in name and name not in there:
            raise UserError(f"`rlhf {command}` needs '{name}': {option.help.rstrip('.')}")
    _check_values(values, described.options)


def _check_values(written: Iterable[tuple[str, Any]], options: Mapping[str, Option]) -> None:
    """Refuse a value that an option cannot take, as far as its source tells; of several for one the last counts."""
    for key, value in dict(written).items():
        word = as_word(value)
        if key in options and (expected := _expected(options[key], value)):
            raise UserError(f"{key}: expected {expected}, got {word or 'nothing'}")
        inside = next((name for name in options if name.startswith(f"{key}.")), None)
        if inside and (word == "null" or not isinstance(value, str | dict)):  # a text may name a file with settings
            raise UserError(f"{key} has settings of its own, and {word} is none; set {inside}, or leave {key} out")


def _expected(option: Option, value: Any) -> str:
    """What an option takes, where a value is plainly nothing of it; otherwise an empty text."""
    word, words = as_word(value), [choice for kind in option.kinds for choice in literal_words(kind)]
    takes: list[str] = []
    for kind in option.kinds:
        if kind in ("int", "float"):
            takes, fits = [*takes, kind], _is_number(word)
        elif kind == "bool":
            takes, fits = [*takes, kind], word.lower() in _BOOLEANS
        elif kind == "None" or kind.startswith("Literal["):
            fits = word == "null" if kind == "None" else word in words
        else:  # what else there is can only be told from null, a text from that neither
            name = "a class or function" if kind.startswith("Callable") else kind.partition("[")[0]
            takes, fits = [*takes, name], word != "null" or kind in ("", "str")
        if fits:
            return ""
    return " or ".join([*takes, *([f"one of {', '.join(words)}"] if words else [])])


def _is_number(word: str) -> bool:
    with contextlib.suppress(ValueError):
        return float(word.replace(".inf", "inf")) is not None
    return False


def _written(options: Sequence[str], known: set[str]) -> Iterator[tuple[str, Any]]:
    """Every key of configs and options, dotted, without what only jsonargparse writes, and its value."""
    for path in config_paths(options):
        yield from _keys(read_config(path), known)
    for word, following in pairwise([*options, ""]):
        if (option := re.match(r"--([\w.-]+)\+?(=|$)", word)) and not option[1].endswith(".help"):
            value = word[option.end() :] if option[2] else following if following[:2] != "--" else ""
            yield from _keys({option[1].replace(".init_args.", ".", 1): _group(value)}, known)


def _group(value: str) -> Any:
    """The settings that a word holds between braces, or else the word."""
    with contextlib.suppress(yaml.YAMLError):
        read = load_yaml(value, "an option") if value.startswith("{") else value
        return read if isinstance(read, dict) else value
    return value


def _keys(config: dict[str, Any], known: set[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        key = f"{prefix}{name}"
        if prefix in ("model.", "data.") and name in ("class_path", "init_args", "dict_kwargs"):
            yield from _keys(value, known, prefix) if name == "init_args" and isinstance(value, dict) else ()
        elif isinstance(value, dict) and any(other.startswith(f"{key}.") for other in known):
            yield from _keys(value, known, f"{key}.")
        else:
            yield key, value
