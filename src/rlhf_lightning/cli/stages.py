"""LightningCLI over the stages.

`rlhf fit --config sft.yaml` and its like are LightningCLI in subclass mode. What is added: the tokenizer and the
rollout size are named once, one run lives in one folder, and mistakes get one line.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytorch_lightning as pl
from jsonargparse import ActionConfigFile, ArgumentParser
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.callbacks import ModelCheckpoint, ModelSummary, ProgressBar
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from rlhf_lightning.algorithms.stage import Stage
from rlhf_lightning.callbacks import RunReport, ShortSummary, StageProgressBar, Stopping
from rlhf_lightning.callbacks.run_folder import RunFolder
from rlhf_lightning.callbacks.stopping import is_launched
from rlhf_lightning.cli.errors import arguments_of, find_class, one_line
from rlhf_lightning.cli.places import at_home, expand_home
from rlhf_lightning.cli.recipes import named_classes
from rlhf_lightning.cli.resuming import begin_together, check_ckpt_path, is_over, measure_together, shows
from rlhf_lightning.cli.spelling import HELP_ALL
from rlhf_lightning.cli.stacking import StackedConfig, as_configs
from rlhf_lightning.cli.unexpected import said_of
from rlhf_lightning.compat import parser_actions
from rlhf_lightning.errors import RankError, UserError
from rlhf_lightning.models.folders import check_model_folder
from rlhf_lightning.models.reward_functions import import_from_working_folder
from rlhf_lightning.runs.ending import limits_of, mark_finished
from rlhf_lightning.runs.lock import holder, locked
from rlhf_lightning.runs.peers import Peers, TellPeers, join, join_to_fail
from rlhf_lightning.runs.signals import EXIT_CODES, SignalWatch, Stopped
from rlhf_lightning.warning_filters import filter_warnings

_MOST_A_CORE = 4  # processes
LINKS = {
    "model.init_args.model_name_or_path": "data.init_args.tokenizer",
    "model.init_args.rollout_batch_size": "data.init_args.rollout_batch_size",
}
"""What is named once, with the model, and handed to the data."""


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are one line and exit code 2."""

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        """Add an argument; lists of a later `--config` take the place of earlier ones."""
        if kwargs.get("action") in (ActionConfigFile, "config"):
            kwargs["action"] = StackedConfig
        return super().add_argument(*args, **kwargs)

    def dump(self, *args: Any, **kwargs: Any) -> str:
        """Write a config that was parsed, and thereby checked; once more would take as long as to parse it."""
        return super().dump(*args, **{"skip_validation": True, **kwargs})

    def known_keys(self) -> set[str]:
        """Every option, for suggestions."""
        return _keys(self)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and leave; an inner parser raises, so that the outer one can say where."""
        if not self.exit_on_error:
            super().error(message, ex)
        print(f"error: {one_line(message, self.known_keys())}", file=sys.stderr)
        sys.exit(2)


class StageParser(OneLineParser):
    """One that knows the arguments of the classes that the command line names, too."""

    def known_keys(self) -> set[str]:
        """Every option, for suggestions."""
        named = {key: config.get("class_path") for key, config in named_classes(sys.argv[1:]).items()}
        return super().known_keys().union(*(arguments_of(path, key) for key, path in named.items()))


def _keys(parser: ArgumentParser) -> set[str]:
    """The keys of a parser and of its subcommands."""
    keys = {action.dest for action in parser_actions(parser)}
    subparsers = [action.choices for action in parser_actions(parser) if isinstance(action.choices, dict)]
    return keys.union(*(_keys(sub) for choices in subparsers for sub in choices.values()))


class RLHFCLI(LightningCLI):
    """LightningCLI with the links and defaults of this package.

    Args:
        command: the one it is made for; parsers of the others, which take as long to build, are left out.
        held: what the run holds until it has ended, however it ends.
        **kwargs: as LightningCLI takes them.
    """

    def __init__(self, command: str, held: ExitStack, **kwargs: Any) -> None:
        self.command, self.held = command, held
        super().__init__(**kwargs)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override] # static there, called on the instance
        """The command, and what of the trainer's method is no option."""
        return {self.command: LightningCLI.subcommands()[self.command]}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that takes `--config`."""
        parser = StageParser(**kwargs)
        parser.add_argument("-c", "--config", action=ActionConfigFile, help="A recipe or YAML file; later ones win.")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Name the model once, and the rollout size once."""
        parser.add_argument(
            "--overwrite", type=bool, default=False, help="Start anew in a folder that holds an earlier run."
        )
        parser.add_argument(
            "--report", type=bool, default=True, help="Write report.html into the folder at the end of fit."
        )
        parser.add_argument(
            "--allow_mismatch",
            type=bool,
            default=False,
            help="Warn, where models, data and checkpoint do not fit one another, instead of stopping.",
        )
        for source, target in LINKS.items():
            parser.link_arguments(source, target)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line."""
        command, *options = sys.argv[1:]
        # Checkpoints hold plain data only; loading one never runs code from it.
        self.config = parser.parse_args([command, "--weights_only=true", *as_configs(options)])
        given = self.config[command]
        expand_home(given.trainer)
        if given.get("ckpt_path"):
            given.ckpt_path = str(at_home(given.ckpt_path))

    def _parse_ckpt_path(self) -> None:
        """Take weights and progress from a checkpoint, and every setting from the command line.

        LightningCLI would let the checkpoint's hyperparameters win over what the user has just written.
        """
        command = self.config["subcommand"]
        if path := self.config[command].get("ckpt_path"):
            check_ckpt_path(command, str(path))

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the trainer: one folder per run, a short summary, a bar that looks inside PPO iterations."""
        config = self.config_init[self.subcommand].trainer
        if not self.model.automatic_optimization:
            refuse_trainer_options(config)
        if config.logger is None or config.logger is True:
            folder = config.default_root_dir or "."
            tensorboard = TensorBoardLogger(folder, name="", version="", default_hp_metric=False)
            kwargs["logger"] = self.subcommand != "predict" and tensorboard
        given = config.callbacks or []
        callbacks = [*given] if isinstance(given, list) else [given]
        if config.enable_progress_bar is not False and not _any(ProgressBar, callbacks):
            callbacks.append(StageProgressBar())
        if config.enable_model_summary is not False and not _any(ModelSummary, callbacks):
            callbacks.append(ShortSummary())
        if self.subcommand == "fit" and self.config_init.fit.report and not _any(RunReport, callbacks):
            callbacks.append(RunReport())
        if not _any(Stopping, callbacks):
            callbacks.append(Stopping())
        callbacks.insert(0, TellPeers())
        for callback in callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(Path(config.default_root_dir or ".") / "checkpoints")
        try:
            trainer = super().instantiate_trainer(**kwargs, callbacks=callbacks)
        except UserError:
            raise
        except (MisconfigurationException, ValueError, TypeError) as e:
            raise UserError(f"--trainer: {e}") from e
        cores = os.cpu_count() or 1
        if isinstance(trainer.accelerator, CPUAccelerator) and trainer.num_devices > _MOST_A_CORE * cores:
            raise UserError(
                f"--trainer.devices {trainer.num_devices}: without GPUs each is a process, and there are {cores} cores"
            )
        return trainer

    def after_instantiate_classes(self) -> None:
        """Look for the model before its tokenizer or the data are loaded."""
        if isinstance(self.model, Stage):
            self.model.allow_mismatch = self.config[self.subcommand].allow_mismatch
        if isinstance(name := getattr(self.model, "model_name_or_path", None), str):
            check_model_folder(name)

    def before_fit(self) -> None:
        """Leave a run alone that is over; else keep others out, choose where it begins, and lose nothing of it."""
        config, self.limits = self.config[self.subcommand], limits_of(self.trainer)
        peers = self._join()
        over = partial(is_over, config, self.trainer, self.limits)
        self.is_over = over() if peers is None else peers.decide("is over", over)
        if self.is_over:
            return
        root, is_tried = Path(self.trainer.default_root_dir), config.trainer.fast_dev_run
        if self.trainer.is_global_zero and not is_tried:
            self.held.enter_context(locked(root))
        # The first is what Lightning acts on, the second what `RunFolder` sees.
        self.config_init[self.subcommand].ckpt_path = config.ckpt_path = begin_together(config, self.trainer, peers)
        if peers is not None and not is_tried:
            self._compare_disks(root, peers.decide("lock", partial(holder, root)))

    def fit(self, **kwargs: Any) -> None:
        """Train, unless the run is over."""
        if not self.is_over:
            self.trainer.fit(**kwargs)

    def after_fit(self) -> None:
        """Say in its folder that the run is over; nothing comes after that."""
        if not self.is_over:
            mark_finished(self.trainer, self.limits)

    def before_validate(self) -> None:
        """Choose what is measured."""
        config = self.config_init[self.subcommand]
        config.ckpt_path = measure_together(config.ckpt_path, self.trainer, self._join())

    before_test = before_predict = before_validate

    def _compare_disks(self, root: Path, held: str | None) -> None:
        """Say where a process does not see what the first one writes."""
        if held is None or self.trainer.local_rank != 0 or shows(lambda: holder(root) == held):
            return
        print(
            f"rank {self.trainer.global_rank} on {socket.gethostname()} does not see the folder '{root}' that rank 0 "
            "writes to: what is saved there is on that disk alone; a run can be resumed where all nodes see its folder",
            file=sys.stderr,
        )

    def _join(self) -> Peers | None:
        """Find the other processes of the run; from now on each ends with the first that fails."""
        peers = join(self.trainer, _described)
        return peers if peers is None else self.held.enter_context(peers)


def _any(kind: type, callbacks: Sequence[Any]) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)


def refuse_trainer_options(config: Any) -> None:
    """Point to the module's own options for what the Trainer cannot do under manual optimisation.

    Args:
        config: the trainer's part of the config.

    Raises:
        UserError: such an option is set.
    """
    if config.accumulate_grad_batches not in (None, 1):
        raise UserError(
            f"--trainer.accumulate_grad_batches {config.accumulate_grad_batches}: the stages accumulate by themselves; "
            "set --data.batch_size to the whole batch and --model.micro_batch_size to what fits in memory"
        )
    for name in ("gradient_clip_val", "gradient_clip_algorithm"):
        if config[name] is not None:
            raise UserError(f"--trainer.{name}: the stages clip by themselves; set --model.gradient_clip_val instead")


def help_for_classes(options: Sequence[str]) -> str:
    """Help for every argument of the model and data classes that configs or options name, the configs' values shown.

    Args:
        options: words of the command line, recipes resolved.
    """
    linked = {target.rpartition(".")[2] for target in LINKS.values()}
    texts = []
    for key, config in named_classes(options).items():
        if "class_path" not in config:
            continue
        parser = ArgumentParser(prog="rlhf", usage="%(prog)s COMMAND [options]", add_help=False)
        skip = linked if key == "data" else set()
        parser.add_class_arguments(find_class(config["class_path"]), key, skip=skip)
        known = {action.dest for action in parser_actions(parser)}
        values = _flat(key, config.get("init_args") or {}, known)
        parser.set_defaults({name: value for name, value in values.items() if name in known})
        texts.append(parser.format_help().partition("\n\n")[2])
    return "\n".join(texts)


def _flat(key: str, values: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"key.a.b": 1}`, as deep as the parser knows arguments."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{key}.{name}"
        if isinstance(value, dict) and any(other.startswith(path + ".") for other in known):
            flat |= _flat(path, value, known)
        flat[path] = value
    return flat


def user_error(error: BaseException) -> UserError | None:
    """What of an error the user can fix, if anything.

    Args:
        error: as it left Lightning or jsonargparse, which wraps what a constructor raises.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return cause
        cause = cause.__cause__
    if isinstance(error, MisconfigurationException):
        return UserError(str(error))
    if "`val_check_interval`" in str(error):
        return UserError(f"--trainer: {str(error).strip()}")
    if str(error).startswith("Does not validate against"):
        return UserError(one_line(str(error)))
    if str(error).startswith("Error(s) in loading state_dict"):
        return UserError(f"--ckpt_path: made with another model or stage ({str(error).splitlines()[-1].strip()})")
    return None


def _described(error: Exception) -> tuple[str, int]:
    return said_of(user_error(error) or error)


def _tell_others(kind: Any, error: BaseException | None, traceback: Any) -> None:
    """Let no process of the run wait for one that has failed before it knew of them."""
    if isinstance(error, Exception) and not isinstance(error, RankError) and (peers := join_to_fail(_described)):
        with peers:
            raise error


def run_stage(command: str, options: Sequence[str]) -> None:
    """Run one stage by LightningCLI.

    Args:
        command: `fit`, `validate`, `test` or `predict`.
        options: the words after it, recipes resolved and checked; `--help_all` prints everything there is to say.

    Raises:
        UserError: something the user can fix.
    """
    filter_warnings()
    import_from_working_folder()  # the classes that configs name
    if HELP_ALL in options:
        print(help_for_classes(options))
        options = [word if word != HELP_ALL else "--help" for word in options]
    sys.argv = [sys.argv[0], command, *options]  # what LightningCLI reads, and the processes of a strategy run
    usage = {command: {"usage": f"rlhf {command} --config RECIPE [options]"}}
    with SignalWatch() as watch, ExitStack() as held:
        held.push(_tell_others)
        try:
            cli = RLHFCLI(
                command,
                held,
                model_class=pl.LightningModule,
                datamodule_class=pl.LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=RunFolder,
                auto_configure_optimizers=False,  # they are arguments of the modules
                parser_kwargs={"prog": "rlhf", **usage},
            )
        except (MisconfigurationException, ValueError, RuntimeError) as e:
            if fixable := user_error(e):
                raise fixable from e
            raise
        except Stopped as e:
            if not e.explained:
                print(f"stopped by {e.name} before anything was done", file=sys.stderr)
            raise
        except SystemExit as e:
            # Lightning turns a Ctrl-C that ends a run at once into exit code 1.
            if isinstance(e.__context__, KeyboardInterrupt):
                sys.exit(EXIT_CODES["SIGINT"])
            raise
        if watch.received is not None and not is_launched(cli.trainer):
            print(f"the run was complete when {watch.received} ended the process", file=sys.stderr)
            stopped = Stopped(watch.received)
            stopped.agreed = True
            raise stopped
