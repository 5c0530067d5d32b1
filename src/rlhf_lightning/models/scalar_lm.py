"""A transformer with a scalar head: the reward model and the value model.

It is Hugging Face's own `...ForSequenceClassification(num_labels=1)` inside, so what is saved loads in plain
transformers. Notation: B batch, T padded length.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rlhf_lightning.errors import UserError
from rlhf_lightning.functional import scores_at_end
from rlhf_lightning.models.causal_lm import disable_dropout, hidden_states, response_hidden
from rlhf_lightning.models.folders import LOADING_ERRORS, check_model_folder, read_config
from rlhf_lightning.rng import generator

CALIBRATION = "reward_calibration"
"""Key of `config.json` under which mean and standard deviation of the raw scores are recorded."""


@dataclass(frozen=True)
class Calibration:
    """What is known of a reward model's raw scores; kept in its `config.json`.

    Attributes:
        mean: mean raw score of held-out chosen responses.
        std: their standard deviation.
        probe_ids: token ids of one held-out sequence.
        probe_score: its raw score at the last token when the model was saved.
    """

    mean: float = 0.0
    std: float = 1.0
    probe_ids: list[int] = field(default_factory=list)
    probe_score: float = 0.0


class ScalarLM(nn.Module):
    """One calibrated scalar per token: `(raw - mean) / std`.

    The raw scalar is what plain transformers computes from the same folder. Mean and standard deviation are those of
    held-out chosen responses, found at the end of reward training and kept in the model's config; a model without them
    has mean 0 and standard deviation 1.

    Args:
        model: a Hugging Face sequence classifier with one label and a head named `score`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model: Any = model

    @property
    def calibration(self) -> Calibration:
        """Scale of the raw scores."""
        return Calibration(**(getattr(self.model.config, CALIBRATION, None) or {}))

    @calibration.setter
    def calibration(self, calibration: Calibration) -> None:
        setattr(self.model.config, CALIBRATION, asdict(calibration))

    def raw(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Raw scalar of every token, `[B, T]`, float32.

        Args:
            input_ids: `[B, T]`, int64.
            attention_mask: True for real tokens, `[B, T]`, bool, padded on either side.
        """
        return self.head(hidden_states(self.model, input_ids, attention_mask))

    def head(self, hidden: Tensor) -> Tensor:
        """Raw scalar from hidden states: `[..., D]` to `[...]`, float32."""
        return self.model.score(hidden).squeeze(-1).float()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Calibrated scalar of every token, `[B, T]`, float32; arguments as for `raw`."""
        return self.calibrate(self.raw(input_ids, attention_mask))

    def calibrate(self, raw: Tensor) -> Tensor:
        """Raw to calibrated scalars, any shape."""
        calibration = self.calibration
        return (raw - calibration.mean) / calibration.std

    def scores(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Calibrated score of each sequence, read at its last real token, `[B]`, float32; arguments as for `raw`."""
        return scores_at_end(self(input_ids, attention_mask), attention_mask)

    @torch.no_grad()
    def probe_error(self) -> float:
        """How far the probe's score is now from what it was when the model was saved, in standard deviations."""
        calibration = self.calibration
        if not calibration.probe_ids:
            return 0.0
        ids = torch.tensor([calibration.probe_ids], device=self.model.device)
        score = scores_at_end(self.raw(ids, torch.ones_like(ids, dtype=torch.bool)), torch.ones_like(ids).bool())
        return abs(float(score) - calibration.probe_score) / calibration.std


def _load(name: str, dropout: bool, trust_remote_code: bool) -> tuple[ScalarLM, set[str]]:
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name,
            num_labels=1,
            dtype=torch.get_default_dtype(),
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
        if missing := {key for key in info["missing_keys"] if not key.startswith("score.")}:
            raise ValueError(f"its weights lack {min(missing)}, which would be random")
    except LOADING_ERRORS as e:
        reason = str(e).strip().splitlines()[0]
        raise UserError(f"no model with a scalar head could be loaded from '{name}': {reason}") from e
    if getattr(model, "_hf_peft_config_loaded", False):  # its base would stay frozen, its head random
        raise UserError(
            f"'{name}' is a PEFT adapter; a model with a scalar head needs a whole model folder, so merge the adapter "
            "into its base and save that"
        )
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise UserError(
            f"'{name}' ({type(model).__name__}) has no linear head named 'score'; this family is not supported"
        )
    if not dropout:
        disable_dropout(model)
    return ScalarLM(model), set(info["missing_keys"])


@contextmanager
def _whole(weight: nn.Parameter) -> Iterator[nn.Parameter]:
    if not hasattr(weight, "ds_id"):
        yield weight
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):  # ZeRO-3: the first rank writes, all receive
        yield weight


def new_scalar_lm(
    name_or_path: str | os.PathLike[str],
    head: Literal["normal", "zero"] = "normal",
    dropout: bool = False,
    trust_remote_code: bool = False,
) -> ScalarLM:
    """Put a fresh scalar head, without bias, on a language model.

    Args:
        name_or_path: folder or hub id of a language model, usually the export of the SFT stage.
        head: `normal` draws the head with standard deviation 1/sqrt(d + 1) (Stiennon et al. 2020, appendix B.1);
            `zero` makes every scalar 0 at first (a value model that starts without an opinion).
        dropout: keep the dropout that the model's config asks for.
        trust_remote_code: allow the folder to run Python code of its own.

    Raises:
        UserError: there is no model at that place, or its family has no classifier in transformers.
    """
    scalar, _ = _load(check_model_folder(name_or_path), dropout, trust_remote_code)
    std = 0.0 if head == "zero" else (scalar.model.score.in_features + 1) ** -0.5
    # From a stream of its own, so that the head depends on the seed and not on what drew random numbers before.
    drawn = torch.randn(1, scalar.model.score.in_features, generator=generator("cpu", torch.initial_seed(), "head"))
    with torch.no_grad(), _whole(scalar.model.score.weight) as weight:
        weight.copy_(drawn * std)
    scalar.calibration = Calibration()
    return scalar


def has_reward_head(name_or_path: str | os.PathLike[str]) -> bool:
    """Whether a local folder holds a classifier rather than a language model."""
    architectures = read_config(check_model_folder(name_or_path)).get("architectures") or []
    return any("SequenceClassification" in a for a in architectures)


def load_reward_model(
    name_or_path: str | os.PathLike[str], dropout: bool = False, trust_remote_code: bool = False
) -> ScalarLM:
    """Load a trained reward model with its calibration; never one whose head is random.

    Args:
        name_or_path: folder or hub id of a sequence classifier with one label.
        dropout: keep the dropout that the model's config asks for.
        trust_remote_code: allow the folder to run Python code of its own.

    Raises:
        UserError: there is no such model, it is a language model without a trained head, or it has several labels.
    """
    name = check_model_folder(name_or_path)
    config: dict[str, Any] = read_config(name)
    untrained = (
        f"'{name}' has no trained reward head (it is a {(config.get('architectures') or ['model'])[0]}); "
        "train one with `rlhf fit --config reward.yaml` and pass its export folder"
    )
    if any("CausalLM" in a or "LMHead" in a for a in config.get("architectures") or []):
        raise UserError(untrained)
    if len(config.get("id2label") or {"0": ""}) != 1:
        raise UserError(f"'{name}' is a classifier with {len(config['id2label'])} labels; a reward model has one")
    scalar, missing = _load(name, dropout, trust_remote_code)
    if any(key.startswith("score.") for key in missing):
        raise UserError(untrained)
    return scalar


def response_values(model: ScalarLM, sequences: Tensor, sequence_mask: Tensor, response_mask: Tensor) -> Tensor:
    """Value before each response token, `V(x[<P+r])`, read from the hidden state at P + r - 1.

    Args:
        model: the value model.
        sequences: prompts padded on the left, then responses padded on the right, `[B, P + R]`, int64.
        sequence_mask: True for real tokens, `[B, P + R]`, bool.
        response_mask: True for response tokens, `[B, R]`, bool.

    Returns:
        `[B, R]`, float32, 0 after the last token.
    """
    hidden = response_hidden(model.model, sequences, sequence_mask, response_mask.shape[1])
    return torch.where(response_mask, model.calibrate(model.head(hidden)), 0)
