"""A transformer with a scalar head: the reward model and the value model.

It is Hugging Face's own `...ForSequenceClassification(num_labels=1)` inside, so what is saved loads in plain
transformers. Notation: B batch, T padded length.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rlhf_lightning.arguments import check_arguments
from rlhf_lightning.compat import has_unmerged_adapter
from rlhf_lightning.errors import UserError
from rlhf_lightning.forward.hidden import ResponseRows, hidden_states, response_hidden
from rlhf_lightning.functional import ScoreCombination, combine_scores, scores_at_end
from rlhf_lightning.models.adapter_folders import (
    CALIBRATION_FILE,
    adapter_base,
    fit_tokenizer,
    is_adapter,
    is_reward_adapter,
    merge_adapter,
)
from rlhf_lightning.models.causal_lm import disable_dropout, load_causal_lm, train_every_row
from rlhf_lightning.models.dtypes import keep_tables
from rlhf_lightning.models.folders import architectures, check_model_folder, read_config, reason_of, say_trusted
from rlhf_lightning.models.fused_lora import fuse_adapters
from rlhf_lightning.models.heads import HeadEnsemble, linear_in_float32, load_ensemble
from rlhf_lightning.models.peft_library import (
    PeftConfig,
    cast_adapter_dtype,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from rlhf_lightning.models.quantized import nf4_options, settle_nf4
from rlhf_lightning.models.rendering import RENDERING
from rlhf_lightning.models.stored import load_pretrained
from rlhf_lightning.rng import generator
from rlhf_lightning.training.sharded import dtype_ahead, gathered, is_sharded

HEAD_WEIGHT = "base_model.model.score.weight"
"""What an adapter folder calls the weight of the head."""

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
        ensemble: several heads, the mean of which that one is.

    Attributes:
        combination: what `scores` makes of those of several heads.
    """

    ensemble: HeadEnsemble | None

    def __init__(self, model: PreTrainedModel, ensemble: HeadEnsemble | None = None) -> None:
        super().__init__()
        self.model: Any = model
        self.ensemble = ensemble
        self.combination: ScoreCombination = "mean"

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
        return linear_in_float32(self.model.score, hidden).squeeze(-1)

    def heads(self, hidden: Tensor) -> Tensor:
        """Raw scalars of all heads, `[..., D]` to `[..., K]`, float32; K is 1 without an ensemble."""
        mean = self.head(hidden).unsqueeze(-1)
        return mean if self.ensemble is None else mean + self.ensemble(hidden)

    def combined(self, hidden: Tensor) -> Tensor:
        """One raw scalar of all heads, as `combination` says: `[..., D]` to `[...]`, float32."""
        return self.head(hidden) if self.combination == "mean" else combine_scores(self.heads(hidden), self.combination)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Calibrated scalar of every token, `[B, T]`, float32; arguments as for `raw`."""
        return self.calibrate(self.raw(input_ids, attention_mask))

    def calibrate(self, raw: Tensor) -> Tensor:
        """Raw to calibrated scalars, any shape."""
        calibration = self.calibration
        return (raw - calibration.mean) / calibration.std

    def scores(self, input_ids: Tensor, attention_mask: Tensor, rows: ResponseRows | None = None) -> Tensor:
        """Calibrated score of each sequence, read at its last real token, of several heads combined, `[B]`, float32.

        Args:
            input_ids: as for `raw`.
            attention_mask: likewise.
            rows: the same sequences, as they are to go through the model; None for each by itself.
        """
        if rows is not None:
            return self.calibrate(self.combined(rows.last_hidden(self.model)))
        if self.combination == "mean":
            return scores_at_end(self(input_ids, attention_mask), attention_mask)
        hidden = hidden_states(self.model, input_ids, attention_mask)
        return scores_at_end(self.calibrate(self.combined(hidden)), attention_mask)

    @torch.no_grad()
    def probe_error(self) -> float:
        """How far the probe's score is now from what it was when the model was saved, in standard deviations."""
        calibration = self.calibration
        if not calibration.probe_ids:
            return 0.0
        ids = torch.tensor([calibration.probe_ids], device=self.model.device)
        score = scores_at_end(self.raw(ids, torch.ones_like(ids, dtype=torch.bool)), torch.ones_like(ids).bool())
        return abs(float(score) - calibration.probe_score) / calibration.std


def _classifier(name: str, trust_remote_code: bool, **options: Any) -> tuple[Any, set[str]]:
    """A sequence classifier with one label, and which of its weights the folder lacks."""
    options |= {"num_labels": 1, "trust_remote_code": trust_remote_code}
    model, missing = load_pretrained(AutoModelForSequenceClassification, name, **options)
    if of_backbone := {key for key in missing if not key.startswith("score.")}:
        raise ValueError(f"its weights lack {min(of_backbone)}, which would be random")
    return model, missing


def _adapted_classifier(name: str, trust_remote_code: bool) -> tuple[Any, set[str]]:
    """As `_classifier`, from an adapter folder; a language model's adapter leaves the head random."""
    model, missing = _classifier(adapter_base(name), trust_remote_code)
    if is_reward_adapter(name):
        model = merge_adapter(model, name, trust_remote_code)
        _restore_records(model.config, name)
        return model, set() if HEAD_WEIGHT in load_peft_weights(name, device="cpu") else missing
    merged = load_causal_lm(name, dropout=True, trust_remote_code=trust_remote_code)
    fit_tokenizer(model, name, trust_remote_code)
    model.base_model.load_state_dict(merged.base_model.state_dict(), assign=True)
    return model.requires_grad_(True), {"score.weight"}


def _restore_records(config: Any, name: str) -> None:
    """Put into a config what an adapter folder, which has none, keeps in a file of its own."""
    path = Path(name) / CALIBRATION_FILE
    setattr(config, CALIBRATION, None)
    setattr(config, RENDERING, None)
    if not path.is_file():
        return
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        setattr(config, RENDERING, records.pop(RENDERING, None))
        setattr(config, CALIBRATION, asdict(Calibration(**records)))
    except (ValueError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"'{path}' does not hold a calibration ({e}); export the reward model again") from e


def _load(name: str, dropout: bool, trust_remote_code: bool, nf4: bool = False) -> tuple[ScalarLM, set[str]]:
    options = nf4_options(name) if nf4 else {}
    if trust_remote_code:
        say_trusted(name)
    try:
        if is_adapter(name):
            model, missing = _adapted_classifier(name, trust_remote_code)
        else:
            model, missing = _classifier(name, trust_remote_code, **options)
    except Exception as e:
        raise UserError(f"no model with a scalar head could be loaded from '{name}': {reason_of(e)}") from e
    if has_unmerged_adapter(model):  # its base would stay frozen, its head random
        raise UserError(f"'{name}' is a PEFT adapter; download it and pass the folder")
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise UserError(
            f"'{name}' ({type(model).__name__}) has no linear head named 'score'; this family is not supported"
        )
    settle_nf4(model)
    keep_tables(model)
    train_every_row(model)
    if not dropout:
        disable_dropout(model)
    return ScalarLM(model), missing


def new_scalar_lm(
    name_or_path: str | os.PathLike[str],
    head: Literal["normal", "zero"] = "normal",
    dropout: bool = False,
    trust_remote_code: bool = False,
) -> ScalarLM:
    """Put a fresh scalar head, without bias, on a language model.

    Args:
        name_or_path: folder or hub id of a language model, usually the export of the SFT stage, or folder of a PEFT
            adapter, which is merged into its base first.
        head: `normal` draws the head with standard deviation 1/sqrt(d + 1) (Stiennon et al. 2020, appendix B.1);
            `zero` makes every scalar 0 at first (a value model that starts without an opinion).
        dropout: keep the dropout that the model's config asks for.
        trust_remote_code: allow the folder to run Python code of its own.

    Raises:
        UserError: there is no model at that place, or its family has no classifier in transformers.
    """
    check_arguments(new_scalar_lm, {"head": head})
    scalar, _ = _load(check_model_folder(name_or_path), dropout, trust_remote_code)
    std = 0.0 if head == "zero" else (scalar.model.score.in_features + 1) ** -0.5
    # From a stream of its own, so that the head depends on the seed and not on what drew random numbers before.
    random, size = generator("cpu", torch.initial_seed(), "head"), (1, scalar.model.score.in_features)
    # The same numbers in every precision and on every device; Lightning loads models with theirs as the default.
    drawn = torch.randn(size, generator=random, dtype=torch.float32, device="cpu")
    with torch.no_grad(), gathered(scalar.model.score.weight):
        scalar.model.score.weight.copy_(drawn * std)
    scalar.calibration = Calibration()
    return scalar


def has_reward_head(name_or_path: str | os.PathLike[str]) -> bool:
    """Whether a local folder holds a classifier, or an adapter with its head, rather than a language model."""
    name = check_model_folder(name_or_path)
    return is_reward_adapter(name) or any("SequenceClassification" in each for each in architectures(name))


def check_reward_model(name_or_path: str | os.PathLike[str]) -> str:
    """Return the name to load a reward model from, after the checks that need neither weights nor network.

    Args:
        name_or_path: as for `load_reward_model`.

    Raises:
        UserError: as for `load_reward_model`, as far as its config tells.
    """
    name = check_model_folder(name_or_path)
    is_lm = any("CausalLM" in each or "LMHead" in each for each in architectures(name))
    if is_lm or (is_adapter(name) and not is_reward_adapter(name)):
        raise _untrained(name)
    labels = read_config(name).get("id2label")
    if isinstance(labels, dict) and len(labels) > 1:
        raise UserError(f"'{name}' is a classifier with {len(labels)} labels; a reward model has one")
    return name


def _untrained(name: str) -> UserError:
    kind = "language model's adapter" if is_adapter(name) else "model"
    return UserError(
        f"'{name}' has no trained reward head (it is a {(architectures(name) or [kind])[0]}); "
        "train one with `rlhf fit --config reward.yaml` and pass its export folder"
    )


def load_reward_model(
    name_or_path: str | os.PathLike[str], dropout: bool = False, trust_remote_code: bool = False, nf4: bool = False
) -> ScalarLM:
    """Load a trained reward model with its calibration and its heads; never one whose head is random.

    Args:
        name_or_path: folder or hub id of a sequence classifier with one label, or folder of a PEFT adapter with a head,
            which is merged into its base.
        dropout: keep the dropout that the model's config asks for.
        trust_remote_code: allow the folder to run Python code of its own.
        nf4: hold the linear layers of the backbone in four bits; they cannot be trained.

    Raises:
        UserError: there is no such model, it is a language model without a trained head, or it has several labels.
    """
    name = check_reward_model(name_or_path)
    scalar, missing = _load(name, dropout, trust_remote_code, nf4)
    if any(key.startswith("score.") for key in missing):
        raise _untrained(name)
    scalar.ensemble = load_ensemble(name, scalar.model.score)
    return scalar


def reward_adapter_base(name_or_path: str | os.PathLike[str]) -> str | None:
    """The base model's folder or hub id where a local folder holds a reward model's adapter, otherwise None.

    Args:
        name_or_path: folder or hub id of a reward model.
    """
    name = os.path.expanduser(os.fspath(name_or_path))
    return adapter_base(name) if is_reward_adapter(name) else None


def attach_reward_adapter(
    model: PreTrainedModel, name_or_path: str | os.PathLike[str], trainable: bool = False, adapter: str = "default"
) -> ScalarLM:
    """Put a reward model's adapter and head on its base, without merging: the base's weights may be shared.

    Args:
        model: a sequence classifier with one label that holds the base's weights and no adapter yet; its base is not
            changed and frozen, its head is replaced.
        name_or_path: the adapter folder.
        trainable: whether adapter and head are to be trained.
        adapter: the adapter's name inside the model.

    Returns:
        The calibrated reward model, all dropout off.

    Raises:
        UserError: the adapter does not fit, or the weights are sharded (ZeRO-3).
    """
    name = check_model_folder(name_or_path)
    if is_sharded(model):
        raise UserError(f"'{name}' is a PEFT adapter, which cannot be loaded on ZeRO-3: merge and save it before")
    try:
        config: Any = PeftConfig.from_pretrained(name)
        config.inference_mode, config.modules_to_save, config.lora_dropout = not trainable, None, 0.0
        weights = {key.removeprefix("base_model.model."): t for key, t in load_peft_weights(name, device="cpu").items()}
        if (head := weights.pop("score.weight", None)) is None:
            raise ValueError("it has no score.weight")
        untyped: Any = model
        dtype, device = dtype_ahead(untyped.score.weight), untyped.score.weight.device
        untyped.score = nn.Linear(head.shape[1], head.shape[0], bias=False, device=device, dtype=dtype)
        model.requires_grad_(False)
        inject_adapter_in_model(config, model, adapter)
        fuse_adapters(model)
        cast_adapter_dtype(model, adapter)
        loaded: Any = set_peft_model_state_dict(model, weights, adapter)
        if lacking := sorted(key for key in loaded.missing_keys if f".{adapter}." in key):
            raise ValueError(f"its weights lack {lacking[0]}")
    except Exception as e:
        raise UserError(f"the reward adapter '{name}' does not fit its base: {reason_of(e)}") from e
    with torch.no_grad():
        untyped.score.weight.copy_(head)
    untyped.score.requires_grad_(trainable)
    scalar = ScalarLM(model, load_ensemble(name, untyped.score))
    _restore_records(model.config, name)
    return scalar


def response_values(
    model: ScalarLM,
    sequences: Tensor,
    sequence_mask: Tensor,
    response_mask: Tensor,
    rows: ResponseRows | None = None,
) -> Tensor:
    """Value before each response token, `V(x[<P+r])`, read from the hidden state at P + r - 1.

    Args:
        model: the value model.
        sequences: prompts padded on the left, then responses padded on the right, `[B, P + R]`, int64.
        sequence_mask: True for real tokens, `[B, P + R]`, bool.
        response_mask: True for response tokens, `[B, R]`, bool.
        rows: the same sequences, as they are to go through the model; None for each by itself.

    Returns:
        `[B, R]`, float32, 0 after the last token.
    """
    hidden = response_hidden(model.model, sequences, sequence_mask, response_mask.shape[1], rows)
    return torch.where(response_mask, model.calibrate(model.head(hidden)), 0)
