"""How many of our files one step passes through, and how often it goes from one to another.

    python benchmarks/structure.py [--step ppo|sft] [--list]

Trains a random model of a few thousand weights for two steps on the CPU, in seconds, and counts the second: the first
also makes the checks that are made once. A step is all that happens between the start and the end of a batch. For PPO
that is one iteration: four prompts, four new tokens each, two epochs of two minibatches as in the recipe.

A file is passed through when one of its functions is called. A switch is a call of a function that stands in another of
our files than the function called before it; returning is none, and other packages in between are not seen. So often
somebody who reads the step from top to bottom has to open another file. The calls are those that `sys.setprofile`
reports, one for each item of a generator too; comprehensions are left out, since Python 3.12 calls them no more.

Both numbers grow with the work of a step, so compare versions of the code by them and not one step with another.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
import transformers
from _synthetic import Shape, instruction_batches, prompt_batches, write_model
from measuring import table

import rlhf_lightning
from rlhf_lightning import PPOModule, Sampling, SFTModule

STEPS = ("ppo", "sft")
SHAPE = Shape(2, 16, 2, 2, 32, 64, rows=4, max_length=32, micro_tokens=64, prompts=4, prompt_length=16, new_tokens=4)
PACKAGE = f"{Path(rlhf_lightning.__file__).parent}/"
COMPREHENSIONS = ("<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>")


class CallRecorder(pl.Callback):
    """Writes down the file of each of our functions that the last step called, in order."""

    def __init__(self) -> None:
        self.files: list[str] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.files = []
        sys.setprofile(self.note)

    def on_train_batch_end(self, *_: Any) -> None:
        sys.setprofile(None)

    def on_exception(self, *_: Any) -> None:
        sys.setprofile(None)

    def note(self, frame: FrameType, event: str, _: Any) -> None:
        """What `sys.setprofile` calls."""
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE) and code.co_name not in COMPREHENSIONS:
            self.files.append(code.co_filename.removeprefix(PACKAGE))


def switches(files: Sequence[str]) -> Counter[tuple[str, str]]:
    """How often each file was followed by each other one.

    Example:
        >>> switches(["a", "a", "b", "a", "b"])
        Counter({('a', 'b'): 2, ('b', 'a'): 1})
    """
    return Counter((before, after) for before, after in pairwise(files) if before != after)


def calls_of_step(step: str, folder: Path) -> list[str]:
    """The file of each call of ours in the second step, in order."""
    policy, reward = write_model(SHAPE, folder)
    constant: dict[str, Any] = {"lr_schedule": "constant", "warmup_steps": 0}
    batches: list[Any]
    module: pl.LightningModule
    if step == "sft":
        batches, module = instruction_batches(SHAPE, 1)[0], SFTModule(policy, **constant)
    else:
        new = SHAPE.new_tokens
        sampling = Sampling(max_new_tokens=new, min_new_tokens=new)
        sizes: dict[str, Any] = {"rollout_batch_size": SHAPE.prompts, "minibatch_size": SHAPE.prompts // 2}
        module = PPOModule(policy, reward, sampling=sampling, ppo_epochs=2, **sizes, **constant)
        batches = prompt_batches(SHAPE, 1)
    recorder = CallRecorder()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[recorder],
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches * 2, batch_size=None))  # type: ignore[arg-type]
    return recorder.files


def tell(calls: dict[str, list[str]], listed: bool) -> str:
    """The counts of each step as Markdown, with `listed` its files and its pairs of files too."""
    rows = [[step, str(len({*files})), str(switches(files).total())] for step, files in calls.items()]
    text = [table(["step", "files", "switches"], rows)]
    for step, files in calls.items() if listed else ():
        text.append(table([f"{step}: file", "calls"], [[name, str(n)] for name, n in Counter(files).most_common()]))
        pairs = [[before, after, str(n)] for (before, after), n in switches(files).most_common()]
        text.append(table([f"{step}: from", "to", "switches"], pairs))
    return "\n".join(text)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", choices=STEPS, help="one step only")
    parser.add_argument(
        "--list", action="store_true", help="also name the files and the pairs, the most frequent first"
    )
    return parser.parse_args()


def main() -> None:
    """Run each step and tell."""
    options = parse()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    calls = {}
    for step in [options.step] if options.step else STEPS:
        with tempfile.TemporaryDirectory() as folder:
            calls[step] = calls_of_step(step, Path(folder))
    print(tell(calls, options.list))


if __name__ == "__main__":
    main()
