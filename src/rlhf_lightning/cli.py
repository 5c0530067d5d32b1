"""The command line: LightningCLI over the stages, plus the quickstart.

`rlhf fit --config sft.yaml` and its like are LightningCLI in subclass mode. What is added: recipes are found inside the
package, the tokenizer and the rollout size are named once, one run lives in one folder, and mistakes get one line.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytorch_lightning as pl
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser
from pytorch_lightning.callbacks import ProgressBar
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from pytorch_lightning.loggers import TensorBoardLogger

from rlhf_lightning.callbacks import StageProgressBar
from rlhf_lightning.cli_errors import one_line
from rlhf_lightning.errors import UserError

STAGE_COMMANDS = ("fit", "validate", "test", "predict")

RECIPES = next(
    folder for folder in (Path(__file__).parent / "configs", Path(__file__).parents[2] / "configs") if folder.is_dir()
)
"""The recipes: inside the installed package, or at the top of a checkout."""

OVERVIEW = """\
usage: rlhf COMMAND [options]

commands:
  quickstart   train a tiny model through all three stages in a few minutes; needs no data and no network
  fit          train one stage:        rlhf fit --config sft.yaml
  validate     evaluate one stage:     rlhf validate --config reward.yaml --model.model_name_or_path FOLDER
  test         the same on test data
  predict      answer or score a file: rlhf predict --config reward.yaml --data.predict_data FILE

recipes, found in the working folder first, then in the package:
  {recipes}

rlhf COMMAND --help                    the options of a command
rlhf fit --config sft.yaml --help      ... and every option of the model and data of that recipe
rlhf fit --config sft.yaml --print_config
"""


def recipe_names() -> list[str]:
    """Every recipe of the package, as it is named on the command line."""
    return sorted(path.relative_to(RECIPES).as_posix() for path in RECIPES.rglob("*.yaml"))


def find_recipe(name: str) -> str:
    """Path of a config file: as given from the working folder, else among the package's recipes.

    Args:
        name: a path.

    Raises:
        UserError: it is in neither place.
    """
    for candidate in (Path(name), RECIPES / name):
        if candidate.is_file():
            return str(candidate)
    raise UserError(f"config '{name}' is neither in the working folder nor a recipe ({', '.join(recipe_names())})")


def resolve_recipes(args: Sequence[str]) -> list[str]:
    """Replace the values of `--config` by the paths they are found at."""
    resolved: list[str] = []
    for arg in args:
        if resolved and resolved[-1] in ("--config", "-c"):
            resolved.append(find_recipe(arg))
        elif arg.startswith("--config="):
            resolved.append("--config=" + find_recipe(arg.removeprefix("--config=")))
        else:
            resolved.append(arg)
    return resolved


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are one line and exit code 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and leave."""
        known = {action.dest.split(".")[0] for action in self._actions}
        for parser in getattr(self, "_subcommand_parsers", {}).values():
            known |= {action.dest for action in parser._actions}
        print(f"error: {one_line(message, known)}", file=sys.stderr)
        sys.exit(2)


class FitConfigCallback(SaveConfigCallback):
    """Saves the config beside the checkpoints when training starts, and never when a finished run is evaluated."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Save the config of a `fit`."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class RLHFCLI(LightningCLI):
    """LightningCLI with the links and defaults of this package."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that takes `--config`."""
        parser = OneLineParser(**kwargs)
        parser.add_argument("-c", "--config", action=ActionConfigFile, help="A recipe or YAML file; later ones win.")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Name the model once, and the rollout size once."""
        parser.add_argument(
            "--overwrite", type=bool, default=False, help="Start anew in a folder that holds an earlier run."
        )
        parser.link_arguments("model.init_args.model_name_or_path", "data.init_args.tokenizer")
        parser.link_arguments("model.init_args.rollout_batch_size", "data.init_args.rollout_batch_size")

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the trainer, with one folder per run and a bar that looks inside PPO iterations by default."""
        config = self.config_init[self.subcommand].trainer
        if config.logger is None or config.logger is True:
            kwargs["logger"] = TensorBoardLogger(config.default_root_dir or ".", name="", version="")
        if config.enable_progress_bar is not False:
            given = config.callbacks or []
            callbacks = given if isinstance(given, list) else [given]
            if not any(isinstance(callback, ProgressBar) for callback in callbacks):
                kwargs["callbacks"] = [*callbacks, StageProgressBar()]
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Lose nothing of an earlier run, and resume only from what is there."""
        config = self.config[self.subcommand]
        root = Path(config.trainer.default_root_dir or ".")
        checkpoints = sorted(root.glob("checkpoints/*.ckpt"))
        if config.ckpt_path == "last" and not checkpoints:
            raise UserError(f"--ckpt_path last: there is no checkpoint in '{root / 'checkpoints'}'")
        if config.ckpt_path not in (None, "last") and not Path(config.ckpt_path).exists():
            raise UserError(f"--ckpt_path: '{config.ckpt_path}' does not exist")
        if config.ckpt_path is None and not config.overwrite and (checkpoints or (root / "export").exists()):
            raise UserError(
                f"'{root}' holds an earlier run: resume it with --ckpt_path last, choose another "
                "--trainer.default_root_dir, or start anew in it with --overwrite true"
            )


def help_for_classes(options: Sequence[str]) -> str:
    """Help for every argument of the model and data classes that configs or options name.

    Args:
        options: words of the command line, recipes resolved.
    """
    named: dict[str, str] = {}
    for word, following in zip(options, [*options[1:], ""], strict=True):
        name, _, value = word.partition("=")
        value = value or following
        if name in ("--config", "-c"):
            config = yaml.safe_load(Path(value).read_text(encoding="utf-8")) or {}
            named |= {key: config[key]["class_path"] for key in ("model", "data") if key in config}
        elif name in ("--model", "--data"):
            named[name.removeprefix("--")] = value
    texts = []
    for key, class_path in named.items():
        module_name, _, class_name = class_path.rpartition(".")
        parser = ArgumentParser(prog="rlhf", usage=argparse.SUPPRESS, add_help=False)
        parser.add_class_arguments(getattr(importlib.import_module(module_name or "rlhf_lightning"), class_name), key)
        texts.append(parser.format_help())
    return "\n".join(texts)


def run_stage(args: Sequence[str]) -> None:
    """Run one stage by LightningCLI.

    Args:
        args: a subcommand of LightningCLI and its options.
    """
    command, *options = resolve_recipes(args)
    if {"--help", "-h"} & set(options) and (text := help_for_classes(options)):
        print(text)
    # Checkpoints hold plain data only; loading one never runs code from it.
    sys.argv = ["rlhf", command, "--weights_only=true", *options]
    RLHFCLI(
        model_class=pl.LightningModule,
        datamodule_class=pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=FitConfigCallback,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"prog": "rlhf"},
    )


def main(args: Sequence[str] | None = None) -> None:
    """Entry point: print the overview, run the quickstart, or hand over to LightningCLI.

    Args:
        args: the words after `rlhf`; None for those of this process.
    """
    words = list(sys.argv[1:] if args is None else args)
    if not words or words[0] in ("-h", "--help", "help"):
        print(OVERVIEW.format(recipes=", ".join(recipe_names())))
        return
    try:
        if words[0] == "quickstart":
            from rlhf_lightning.quickstart import main as quickstart

            quickstart(words[1:])
        elif words[0] in STAGE_COMMANDS:
            run_stage(words)
        else:
            close = difflib.get_close_matches(words[0], [*STAGE_COMMANDS, "quickstart"], n=1)
            hint = f"; did you mean `rlhf {close[0]}`?" if close else "; see `rlhf --help`"
            raise UserError(f"unknown command '{words[0]}'{hint}")
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
