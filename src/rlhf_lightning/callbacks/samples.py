"""Answers to the same prompts again and again: the surest way to see what training does."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from rlhf_lightning.arguments import check_arguments
from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.data.collate import EncodedPrompt, collate_prompts
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import TransformersEngine, respond
from rlhf_lightning.generation.sampling import Sampling
from rlhf_lightning.models.tokenizer import filler_id
from rlhf_lightning.rng import generator
from rlhf_lightning.training import synced
from rlhf_lightning.training.reporting import log_text

_HEADING = b"## Step "


class SampleTexts(Callback):
    """Answers fixed prompts before, during and after training, to every logger and to a Markdown file.

    During training that is at each validation.

    The random numbers are the same each time and are not those of training, so the samples differ only by what was
    learnt, and taking them changes nothing.

    Args:
        prompts: as in the data: plain text, or a dialogue in Human and Assistant turns.
        path: the Markdown file, appended to; by default `samples.md` in the trainer's `default_root_dir`.
        sampling: how answers are drawn; by default as the module's, or `Sampling()`.
    """

    def __init__(self, prompts: list[str], path: str | None = None, sampling: Sampling | None = None) -> None:
        check_arguments(SampleTexts, locals())
        if not prompts:
            raise UserError("SampleTexts: prompts is empty; give at least one")
        self.prompts = prompts
        self.path = path
        self.sampling = sampling
        self._answered_at: int | None = None
        self._size = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Answer before the first step; a resumed run has done so, and takes back what came after its checkpoint."""
        if self._answered_at is None:
            self._write(trainer, pl_module)
        elif trainer.is_global_zero:
            self._cut(self._file(trainer))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Answer after each validation during training."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Answer after the last step, unless a validation has come after it."""
        if trainer.global_step != self._answered_at:
            self._write(trainer, pl_module)

    @property
    def state_key(self) -> str:
        """One for each file and its prompts, so that several keep their states apart."""
        return f"SampleTexts {self.path} {self.prompts}"

    def state_dict(self) -> dict[str, Any]:
        """The step that was answered at last, and the length of the file then, in bytes."""
        return {"answered_at": self._answered_at, "size": self._size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._answered_at, self._size = state_dict["answered_at"], state_dict["size"]

    def _file(self, trainer: pl.Trainer) -> Path:
        return Path(self.path).expanduser() if self.path else Path(trainer.default_root_dir) / "samples.md"

    def _cut(self, path: Path) -> None:
        rest = path.read_bytes()[self._size :] if path.is_file() else b""
        if rest and _HEADING.startswith(rest[: len(_HEADING)]):  # else it is another run's file
            os.truncate(path, self._size)

    @torch.no_grad()
    def _write(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._answered_at = trainer.global_step
        if not pl_module.export_model.can_generate():
            raise UserError(f"SampleTexts: {type(pl_module).__name__} trains no language model; leave the callback out")
        sampling = self.sampling or getattr(pl_module, "sampling", None) or Sampling()
        tokenizer = pl_module.tokenizer
        chat = getattr(getattr(trainer, "datamodule", None), "chat", None) or ChatEncoder(tokenizer)
        encoded = [chat.encode_prompt(prompt) for prompt in self.prompts]
        rows = [EncodedPrompt(row_id=i, ids=ids, text=text) for i, (text, ids) in enumerate(encoded)]
        batch = trainer.strategy.batch_to_device(collate_prompts(rows, filler_id(tokenizer)))
        with trainer.precision_plugin.forward_context():
            _, texts = respond(
                TransformersEngine(pl_module.export_model, tokenizer),
                tokenizer,
                batch,
                sampling,
                generator=generator(pl_module.device, "sample texts"),
                synced=synced(pl_module),
            )
        if not trainer.is_global_zero:
            return
        samples = [sample_section(prompt, text) for prompt, text in zip(self.prompts, texts, strict=True)]
        section = "\n\n".join([f"{_HEADING.decode()}{trainer.global_step}", *samples])
        log_text(pl_module, "samples", section, trainer.global_step)
        path = self._file(trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(section + "\n\n")
        self._size = path.stat().st_size


def sample_section(prompt: str, answer: str) -> str:
    """Markdown: the prompt quoted, the answer fenced, so that neither can end the section or look like a heading.

    Example:
        >>> print(sample_section("hi?", "# no heading"))
        > hi?
        <BLANKLINE>
        ```text
        # no heading
        ```
    """
    quoted = "\n".join(f"> {line}".rstrip() for line in prompt.strip().splitlines())
    longest = max((len(run) for run in re.findall("`+", answer)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{quoted}\n\n{fence}text\n{answer.strip()}\n{fence}"
