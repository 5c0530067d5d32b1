"""The model card of an export, whoever writes it: the end of a fit, or `rlhf export`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers
import yaml

from rlhf_lightning import __version__

CARD = "README.md"
_MARK = "rlhf_lightning"
_HOW_TO_SCORE = """
The score is the one at the end of the last turn. Many chat templates write a line break after it: strip that from
`apply_chat_template(messages, tokenize=False)`, or the score is read one token late.
"""


class Told(NamedTuple):
    """What a card says.

    Attributes:
        stage: name of the class of the stage.
        base: folder or hub id that training started from.
        steps: optimizer steps that were made.
        settings: of the run, as plain values.
        metrics: the last of each, by name.
        is_adapter: the folder holds an adapter, not a model.
        scores_turns: it is a reward model whose dialogues have a chat template.
        checkpoint: which the folder was made from; None at the end of a fit.
    """

    stage: str
    base: str
    steps: int
    settings: dict[str, Any]
    metrics: dict[str, Any]
    is_adapter: bool = False
    scores_turns: bool = False
    checkpoint: str | None = None


def card_text(told: Told) -> str:
    """Markdown that says what a folder is: stage, base model, data, settings, last metrics, versions.

    Args:
        told: what it says.
    """
    metrics = {name: float(f"{float(value):.6g}") for name, value in sorted(told.metrics.items())}
    library = "peft" if told.is_adapter else "transformers"
    head = yaml.safe_dump({"base_model": told.base, "library_name": library, "tags": [_MARK]})
    source = f"\nWritten by `rlhf export` from the checkpoint `{told.checkpoint}`.\n" if told.checkpoint else ""
    return f"""---
{head}---

# {told.stage} export

Made by `{_MARK}`: stage `{told.stage}`, started from `{told.base}`, after {told.steps} optimizer
steps. Versions: rlhf-lightning {__version__}, torch {torch.__version__}, transformers {transformers.__version__}.
{source}{_HOW_TO_SCORE if told.scores_turns else ""}
## Settings

```yaml
{yaml.safe_dump(told.settings, sort_keys=True)}```

## Last metrics

```yaml
{yaml.safe_dump(metrics)}```
"""
