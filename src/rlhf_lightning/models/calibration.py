"""What is known of a reward model's raw scores: in its `config.json`, or beside its adapter."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.adapter_folders import CALIBRATION_FILE
from rlhf_lightning.models.labels import LABELS
from rlhf_lightning.models.rendering import RENDERING

CALIBRATION = "reward_calibration"
"""Key of `config.json` under which mean and standard deviation of the raw scores are recorded."""


@dataclass(frozen=True)
class Calibration:
    """What is known of a reward model's raw scores; kept in its `config.json`.

    Attributes:
        mean: mean raw score of held-out chosen responses, or of samples.
        std: their standard deviation.
        probe_ids: token ids of one held-out sequence.
        probe_score: its raw score at the last token when the model was saved.
        over: whose scores these are: `chosen` for held-out chosen responses, as Stiennon et al. 2020 take references;
            `samples` for answers of a policy to held-out prompts, as Ziegler et al. 2019 do.
    """

    mean: float = 0.0
    std: float = 1.0
    probe_ids: list[int] = field(default_factory=list)
    probe_score: float = 0.0
    over: Literal["chosen", "samples"] = "chosen"


def as_record(calibration: Calibration) -> dict[str, Any]:
    """A calibration as plain values, from which `Calibration(**record)` is the same.

    `over` stands there only where it is not the usual, so that other records are what every version reads.

    Args:
        calibration: what is known.
    """
    record = asdict(calibration)
    if calibration.over == Calibration.over:
        del record["over"]
    return record


def restore_records(config: Any, name: str) -> None:
    """Put into a config what an adapter folder, which has none, keeps in a file of its own.

    Args:
        config: of the model, changed.
        name: the adapter folder.

    Raises:
        UserError: the file is damaged.
    """
    path = Path(name) / CALIBRATION_FILE
    setattr(config, CALIBRATION, None)
    setattr(config, RENDERING, None)
    if not path.is_file():
        return
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        setattr(config, RENDERING, records.pop(RENDERING, None))
        if records.pop(LABELS, None) is None:  # several labels have no calibration
            setattr(config, CALIBRATION, as_record(Calibration(**records)))
    except (ValueError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"'{path}' does not hold a calibration ({e}); export the reward model again") from e
