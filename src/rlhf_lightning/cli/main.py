"""The command line: what answers at once. What needs torch is imported when it runs."""

from __future__ import annotations

import functools
import gc
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType

from rlhf_lightning import __version__
from rlhf_lightning.cli.places import refuse_empty
from rlhf_lightning.cli.recipes import recipe_names, resolve_recipes
from rlhf_lightning.cli.short_help import short_help
from rlhf_lightning.cli.spelling import HELP_ALL, check_keys, check_words, command_hint
from rlhf_lightning.cli.streams import begin_line, flush_output, open_streams, watch_output
from rlhf_lightning.cli.unexpected import said_of, take_debug, wants_traceback
from rlhf_lightning.errors import RankError, UserError
from rlhf_lightning.runs.secrets import without_secrets

STAGE_COMMANDS = ("fit", "validate", "test", "predict")
COMMANDS = {
    "quickstart": "quickstart",
    "toy": "toy",
    "pipeline": "pipeline",
    "prepare": "prepare",
    "evaluate": "evaluate",
    "report": "report",
    "plan": "plan",
    "generate": "generate",
    "score": "score",
    "sample": "sample",
    "export": "export",
    "chat": "chat",
    "env": "env",
    "completion": "completion",
}
"""Commands beside the stages, and the module of `cli` whose `main` is given the words after them."""

AT_ONCE = ("pipeline", "report", "env", "completion")
"""Those that need no PyTorch."""

IN_FILES = {*STAGE_COMMANDS, "quickstart", "toy", "pipeline", "prepare", "evaluate", "sample", "export"}
"""Those whose result is in files, and which go on when nobody reads what they say."""
_ONLY_SAYS = ("-h", "--help", HELP_ALL, "--print_config", "--dry_run")

OVERVIEW = """\
usage: rlhf COMMAND [options]

Align a language model with human preferences: supervised fine-tuning, reward
model, PPO, RLOO, GRPO, DPO.

commands:
  quickstart   train a tiny model through all stages in a few minutes; needs no data and no network
  toy          write the quickstart's data and random model, to try anything on
  pipeline     run stages one after the other by one YAML file; what is unchanged is left alone
  prepare      turn data into token ids once, for all stages, and report what was kept, cut and dropped
  fit          train one stage
  plan         what memory a stage takes on each GPU, and what to change if it does not fit; loads nothing
  validate     measure one stage on held-out data
  test         the same on test data
  predict      answer prompts, or score answers, and write them to a file
  evaluate     compare models, and see whether a reward model can be trusted: perplexity, KL, accuracy, calibration
  report       write what came of one or several runs into an HTML page: curves, answers, evaluations
  generate     what a model answers to a prompt, or to all prompts of a file
  chat         talk to models in the browser or the terminal, and say which answers are better
  score        what a reward model says of the answers in a file
  sample       the best of several answers to each prompt, by a reward: rows for the next fine-tuning
  export       the model in a checkpoint of a run as a Hugging Face folder
  env          versions and devices, to paste into a bug report
  completion   what makes Tab complete commands, recipes and options: `rlhf completion bash`

the stages, each starting from what the one before exported:
  rlhf fit --config sft.yaml --model.model_name_or_path MODEL --data.data FILE
  rlhf fit --config reward.yaml --model.model_name_or_path runs/sft/export --data.data FILE
  rlhf fit --config ppo.yaml --model.model_name_or_path runs/sft/export --model.reward runs/reward/export \\
      --data.data FILE                        (or rloo.yaml, grpo.yaml; dpo.yaml needs no reward model)
  rlhf predict --config reward.yaml --model.model_name_or_path runs/reward/export --data.predict_data FILE

data first, if you want to see what is in it (the stages then take --data.data runs/data):
  rlhf prepare --config data.yaml --tokenizer MODEL --data FILE --out runs/data

recipes for --config, found in the working folder first, then in the package; several may be stacked:
  {recipes}

more:
  rlhf fit --config sft.yaml --help           the options of the model, the data and the trainer
  rlhf fit --config sft.yaml --print_config   the whole recipe, to start one of your own from
  rlhf fit ... --ckpt_path last               resume a run that was stopped
  rlhf fit ... --ckpt_path auto               the same, or start it if there is nothing to resume
  rlhf ... --debug                            the traceback of an error, beside its one line
  rlhf --version
"""


def main(args: Sequence[str] | None = None) -> None:
    """Entry point: print the overview, run the quickstart, prepare data, or hand over to LightningCLI.

    Leaves with one line on stderr and code 2 where the user can fix something, and code 1 where something failed that
    nobody foresaw; with 130 after Ctrl-C; with 141 where nobody reads its output any more. Tracebacks are shown with
    `--debug` or `RLHF_DEBUG=1` only.

    Args:
        args: the words after `rlhf`; None for those of this process.
    """
    open_streams()
    words = take_debug(list(sys.argv[1:] if args is None else args))
    watch_output(is_needed=_only_says(words))
    try:
        try:
            _answer(words)
        finally:
            flush_output()
    except KeyboardInterrupt:
        begin_line()
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as e:
        begin_line()
        if wants_traceback():
            traceback.print_exception(e)
        line, code = said_of(e)
        if line:  # of several processes one says it
            is_stop = isinstance(e, RankError) and e.is_stop
            print(f"{'' if is_stop else 'error: '}{without_secrets(' '.join(line.split()))}", file=sys.stderr)
        sys.exit(code)


def _only_says(words: list[str]) -> bool:
    """Whether a command has no other result than what it prints."""
    asked = {word.partition("=")[0] for word in words}
    return not words or words[0] not in IN_FILES or not asked.isdisjoint(_ONLY_SAYS)


def _answer(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help", "help"):
        print(OVERVIEW.format(recipes="\n  ".join(recipe_names())), end="")
    elif words[0] == "--version":
        print(f"rlhf-lightning {__version__}")
    else:
        _dispatch(words[0], words[1:])


def _say_what_takes_long() -> None:
    if sys.stderr.isatty():  # somebody waits for it
        print("loading PyTorch and Lightning", file=sys.stderr)


def _leave_frames_out() -> None:
    """Keep PyTorch from writing 50 lines of its own stack whenever another process of the run is gone."""
    if not wants_traceback():
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when it is imported


def _keep_matplotlib_quiet() -> None:
    """Leave out what it says of its cache where a home cannot be written; it is imported by much, before any filter."""
    said = ("mkdir -p failed for path", "Matplotlib created a temporary cache directory")
    logging.getLogger("matplotlib").addFilter(lambda record: not record.getMessage().startswith(said))


def _load(name: str) -> ModuleType:
    """A module of `cli`, with all that it imports, which no search for garbage goes through, now or later.

    That took one of the eight seconds of the imports, and almost another in the first steps.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        module = importlib.import_module(f"rlhf_lightning.cli.{name}")
        _keep_what_is_there()
    finally:
        if collects:
            gc.enable()
    return module


@functools.cache  # once: what a caller from Python drops later shall be collected
def _keep_what_is_there() -> None:
    gc.freeze()


def _dispatch(command: str, options: list[str]) -> None:
    resolved = resolve_recipes(options)
    _keep_matplotlib_quiet()
    if command in STAGE_COMMANDS:
        check_words(resolved)
        if {"--help", "-h"} & set(resolved):
            print(short_help(command, resolved), end="")
            sys.exit(0)
        check_keys(command, resolved)
        refuse_empty(command, resolved)
        _leave_frames_out()
        _say_what_takes_long()
        _load("stages").run_stage(command, resolved)
    elif command in COMMANDS:
        refuse_empty(command, resolved)
        if command not in AT_ONCE:
            _say_what_takes_long()
        _load(COMMANDS[command]).main(resolved)
    else:
        raise UserError(f"unknown command '{command}'; {command_hint(command, [*STAGE_COMMANDS, *COMMANDS])}")
