"""`rlhf plan`: what memory a run takes on each GPU, and what it sends, before anything is loaded or started."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import pytorch_lightning as pl
from rich.console import Console

from rlhf_lightning.algorithms.stage import Stage
from rlhf_lightning.cli.errors import find_class
from rlhf_lightning.cli.recipes import resolve_recipes
from rlhf_lightning.cli.spelling import check_keys, check_words
from rlhf_lightning.cli.stages import RLHFCLI
from rlhf_lightning.compat import say_nothing_of_models
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.reward_functions import import_from_working_folder
from rlhf_lightning.planning import Request, plan
from rlhf_lightning.planning.advice import advise
from rlhf_lightning.planning.table import as_json, print_plan
from rlhf_lightning.warning_filters import filter_warnings

HELP = """\
usage: rlhf plan --config RECIPE [--config configs/trainer/FILE] [--gpus N] [--gpu_memory GIB] [options]

Says what memory a run takes on each GPU, by role and by what it does, what each GPU sends, and what to change if it
does not fit. It reads the recipes and options of `rlhf fit`; of the models it needs their config.json alone.

  --gpus N           of all machines together; by default what the trainer's devices and num_nodes say, or 1
  --nodes M          machines that they are in; by default one for every 8
  --gpu_memory GIB   of each GPU; without it nothing is said of whether the run fits
  --json             print plain values, sizes in bytes
"""
_NUMBERS = {"--gpus": int, "--nodes": int, "--gpu_memory": float}
_WIDTH = 120
_A_MACHINE = 8


def main(options: Sequence[str]) -> None:
    """Entry point of `rlhf plan`.

    Args:
        options: the words after `plan`, recipes resolved.

    Raises:
        UserError: something the user can fix.
    """
    if not options or {"-h", "--help"} & set(options):
        print(HELP, end="")
        return
    machines, as_values, rest = _own_options(options)
    with say_nothing_of_models():
        request = request_of(rest, **machines)
        planned = plan(request)
        changes = advise(planned)
    if as_values:
        print(json.dumps(as_json(planned, changes), indent=1, allow_nan=False))
        return
    console = Console()
    print_plan(planned, changes, console if console.is_terminal else Console(width=_WIDTH))


def request_of(
    options: Sequence[str], gpus: int | None = None, nodes: int | None = None, gpu_memory: float | None = None
) -> Request:
    """What a command line asks for.

    Args:
        options: recipes and options as `rlhf fit` takes them.
        gpus: of all machines together; None for what the trainer's devices say.
        nodes: machines; None for what the trainer says, or one for every 8 GPUs.
        gpu_memory: of each GPU, GiB.

    Raises:
        UserError: something the user can fix.
    """
    filter_warnings()
    import_from_working_folder()
    options = resolve_recipes(options)
    check_words(options)
    check_keys("fit", options)
    config = _parsed(options)
    trainer = config["trainer"]
    devices, machines = trainer.get("devices"), int(trainer.get("num_nodes") or 1)
    if gpus is None:
        gpus = (int(devices) if str(devices).isdigit() else 1) * machines
    stage = find_class(config["model"]["class_path"])
    if not issubclass(stage, Stage):
        raise UserError(f"nothing is known of the memory of {stage.__name__}: it is no Stage of rlhf_lightning")
    return Request(
        stage=stage,
        model=config["model"].get("init_args") or {},
        data=config["data"].get("init_args") or {},
        trainer=trainer,
        gpus=gpus,
        nodes=nodes or max(machines, -(-gpus // _A_MACHINE)),
        gpu_memory=gpu_memory,
        on_gpu=trainer.get("accelerator") != "cpu",
    )


class _ParsedError(Exception):
    """Not an error: the config is parsed, and nothing is to be made from it."""


class _PlanCLI(RLHFCLI):
    """LightningCLI as far as its parser."""

    def before_instantiate_classes(self) -> None:
        """Leave with the config."""
        raise _ParsedError(self.config)


def _parsed(options: Sequence[str]) -> dict[str, Any]:
    """Every setting of a stage, as plain values."""
    sys.argv = [sys.argv[0], "fit", *options, "--seed_everything=false"]
    try:
        _PlanCLI(
            "fit",
            ExitStack(),
            model_class=pl.LightningModule,
            datamodule_class=pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            auto_configure_optimizers=False,
            parser_kwargs={"prog": "rlhf", "fit": {"usage": "rlhf plan --config RECIPE [options]"}},
        )
    except _ParsedError as parsed:
        settings: dict[str, Any] = parsed.args[0]["fit"].as_dict()
        return settings
    raise AssertionError("LightningCLI asked for no classes")


def _own_options(options: Sequence[str]) -> tuple[dict[str, Any], bool, list[str]]:
    """This command's own options, and the others."""
    found: dict[str, Any] = {}
    rest: list[str] = []
    words = iter(options)
    as_values = False
    for word in words:
        name, equals, value = word.partition("=")
        name = name.replace("-", "_").replace("__", "--", 1) if name.startswith("--") else name
        if name == "--json":
            as_values = True
        elif name in _NUMBERS:
            found[name.removeprefix("--")] = _number(name, value if equals else next(words, ""))
        elif name.startswith("--") and (close := difflib.get_close_matches(name, _NUMBERS, n=1, cutoff=0.8)):
            raise UserError(f"unknown option {name}; did you mean {close[0]}?")
        else:
            rest.append(word)
    return found, as_values, rest


def _number(name: str, value: str) -> float:
    kind = _NUMBERS[name]
    try:
        number = kind(value)
    except ValueError:
        number = 0
    if not 0 < number < 1e6:
        raise UserError(f"{name} '{value}' is not a {'whole ' if kind is int else ''}number above 0")
    return number
