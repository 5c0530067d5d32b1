"""What `rlhf fit --help` says: each option in one line with the value that it has, at once."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from rlhf_lightning.cli.options import Described, as_word, describe
from rlhf_lightning.cli.recipes import config_paths, named_classes, read_config, stage_recipes

RUN = {
    "config": "a recipe or YAML file; several are stacked, later ones win",
    "ckpt_path": "checkpoint to go on from, `last`, or `auto`: the last if there is one",
    "overwrite": "start anew in a folder that holds an earlier run",
    "allow_mismatch": "warn where models, data and checkpoint do not fit, instead of stopping",
    "report": "false for no report.html in the folder at the end of fit",
    "seed_everything": "of all random numbers",
    "print_config": "print the whole recipe, to start one of your own from",
}
TRAINER = {
    "default_root_dir": "folder of the run: checkpoints, logs, export",
    "max_epochs": "times through the data",
    "max_steps": "optimizer steps; -1 for no limit",
    "max_time": "such as 00:12:00:00 (days, hours, minutes, seconds)",
    "accelerator": "cpu, gpu, mps, or auto",
    "devices": "how many, or which",
    "num_nodes": "machines",
    "strategy": "ddp, or one of the recipes trainer/...",
    "precision": "32-true, bf16-mixed or bf16-true",
    "val_check_interval": "validate after this many batches, or this share of an epoch",
    "check_val_every_n_epoch": "validate after this many epochs; null to count batches across them",
    "limit_train_batches": "of an epoch, a number or a share",
    "limit_val_batches": "of a validation, a number or a share",
    "log_every_n_steps": "training steps between two logged ones",
    "logger": "TensorBoard by default; false for none",
    "callbacks": "such as rlhf_lightning.HFExport and SampleTexts",
    "fast_dev_run": "try everything out on one batch, and leave nothing behind",
    "enable_progress_bar": "show one",
}
"""Options of Lightning's Trainer that are set most often."""

_LEFT_OUT = {"data.tokenizer", "data.rollout_batch_size"}  # follow from the model's
_COLUMN = 44


def short_help(command: str, options: Sequence[str]) -> str:
    """Options of a stage, those of the model's and the data's class included.

    Args:
        command: `fit`, `validate`, `test` or `predict`.
        options: words of the command line, recipes resolved.
    """
    lines = [f"usage: rlhf {command} --config RECIPE [options]", "", "run"]
    lines += [_line(name, None, text) for name, text in RUN.items()]
    named = named_classes(options)
    for key in ("model", "data"):
        lines += ["", *_section(key, named.get(key, {}))]
    given: dict[str, Any] = {}
    for path in config_paths(options):
        given |= read_config(path).get("trainer") or {}
    lines += ["", "trainer"]
    lines += [_line(f"trainer.{name}", _shown(given.get(name)), text) for name, text in TRAINER.items()]
    return "\n".join([*lines, "", *_more(command)]) + "\n"


def _section(key: str, config: dict[str, Any]) -> list[str]:
    """A class and all its options."""
    path = config.get("class_path")
    described = describe(path)
    if described is None:
        what = f"{path}: for its options write --help_all" if path else f"--{key} CLASS, or a recipe: --config ..."
        return [f"{key}  {what}", *([] if path else [f"  {', '.join(stage_recipes())}"])]
    values = _flat(config.get("init_args") or {}, described)
    lines = [_wrapped(f"{key}  {str(path).rpartition('.')[2]}: ", _first_sentence(described.summary))]
    alone = [name for name in described.options if "." not in name]
    lines += _lines(key, alone, described, values)
    for group, text in described.groups.items():
        lines.append(_wrapped(f" {key}.{group}  ", _first_sentence(text)))
        lines += _lines(key, [n for n in described.options if n.startswith(f"{group}.")], described, values)
    return lines


def _lines(key: str, names: Iterable[str], described: Described, values: dict[str, Any]) -> list[str]:
    lines = []
    for name in names:
        option = described.options[name]
        if f"{key}.{name}" in _LEFT_OUT:
            continue
        value = _shown(values[name]) if name in values else option.default
        choices = f" [{'|'.join(option.choices)}]" if option.choices and "true" not in option.choices else ""
        lines.append(_line(f"{key}.{name}", value, _first_sentence(option.help) + choices))
        inside = values.get(name)
        if isinstance(inside, dict) and "class_path" in inside:
            given = inside.get("init_args") or {}
            lines += [_line(f"{key}.{name}.{argument}", as_word(v), "") for argument, v in given.items()]
    return lines


def _first_sentence(text: str) -> str:
    return re.split(r"(?<!et al)\. ", text)[0].rstrip(".")


def _line(name: str, value: str | None, text: str) -> str:
    """One option, its text in two lines of the terminal at most."""
    option = f"  --{name}" + (f"={value}" if value else "")
    return _wrapped(f"{option:{_COLUMN}}  ", text, max_lines=2, placeholder=" ...") if text else option


def _wrapped(first: str, text: str, **options: Any) -> str:
    """A text after what its first line begins with."""
    width = min(max(shutil.get_terminal_size((120, 24)).columns, 80), 120)
    later = " " * (_COLUMN + 2)
    return "\n".join(textwrap.wrap(text, width, initial_indent=first, subsequent_indent=later, **options))


def _shown(value: Any) -> str:
    if isinstance(value, dict) and "class_path" in value:
        return str(value["class_path"])
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        named = (item.get("class_path", "") if isinstance(item, dict) else item for item in value)
        return ",".join(str(name).rpartition(".")[2] for name in named)
    return "" if value is None else as_word(value)


def _flat(values: dict[str, Any], described: Described) -> dict[str, Any]:
    """Values by option, those of the groups after a dot."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if name in described.groups and isinstance(value, dict):
            flat |= {f"{name}.{field}": inside for field, inside in value.items()}
        else:
            flat[name] = value
    return flat


def _more(command: str) -> list[str]:
    recipe = f"rlhf {command} --config sft.yaml"
    return [
        "more",
        f"  {recipe} --help_all           every option, its type and all that is said of it",
        f"  {recipe} --model.optimizer.help torch.optim.SGD",
        f"  {recipe} --print_config       the whole recipe",
    ]
