"""A stage's models without their weights: the code that loads, shares, freezes and adapts them, on torch's meta device.

What is read of a model is its `config.json`. `from_pretrained` of transformers' Auto classes is replaced meanwhile, and
everything of this package runs as it does in training; so who shares what with whom need not be known here.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rlhf_lightning.algorithms.hyperparameters import from_config
from rlhf_lightning.algorithms.stage import Stage
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.adapter_folders import adapter_base, is_adapter
from rlhf_lightning.models.folders import check_model_folder, looks_local, reason_of
from rlhf_lightning.models.other_rewards import OtherReward
from rlhf_lightning.models.tokenizer import load_tokenizer

NAMES = ("model_name_or_path", "reference", "value_name_or_path", "reward")
"""Arguments of stages that name a model."""
OTHERS = "other_rewards"
"""The argument whose values do."""
_OF_HEADS = ("reward_combination", "reward_weights")


class Skeletons:
    """Folders with nothing but a `config.json` in them, which stand for the models that a stage names.

    Args:
        arguments: of the stage; models are named by `NAMES`.
        trust_remote_code: run Python code that comes with a model.

    Attributes:
        assumed: what had to be assumed, one line each.

    Raises:
        UserError: a model whose config is neither on this disk nor on the hub.
    """

    def __init__(self, arguments: Mapping[str, Any], trust_remote_code: bool = False) -> None:
        self.assumed: list[str] = []
        self._trust = trust_remote_code
        self._names = {key: name for key, name in _named(arguments).items() if isinstance(name, str)}
        self._configs: dict[str, tuple[PretrainedConfig, bool]] = {}
        for key, name in self._names.items():
            if not _is_reward(key) or _means_model(name):
                self._configs[key] = self._read(key, name)

    @property
    def depths(self) -> set[int]:
        """Blocks of each model."""
        return {int(config.get_text_config().num_hidden_layers) for config, _ in self._configs.values()}

    @property
    def period(self) -> int:
        """Blocks after which their kinds repeat themselves, at least 1."""
        longest = 1
        for config, _ in self._configs.values():
            kinds = list(getattr(config.get_text_config(), "layer_types", None) or [None])
            fits = (n for n in range(1, len(kinds)) if all(a == b for a, b in zip(kinds[n:], kinds, strict=False)))
            longest = max(longest, next(fits, len(kinds)))
        return longest

    def build(
        self, cls: type[Stage], arguments: Mapping[str, Any], dtype: torch.dtype, depth: int | None = None
    ) -> Stage:
        """A stage with its models, on the meta device.

        Args:
            cls: of the stage.
            arguments: of the stage.
            dtype: that models are loaded in.
            depth: blocks of each model; None for all.

        Raises:
            UserError: what training would refuse, as far as it can be told.
        """
        with tempfile.TemporaryDirectory() as folder, _without_weights(self._trust):
            stand_ins: dict[str, str] = {}
            for key, (config, is_scalar) in self._configs.items():
                # Under one name twice it is one model.
                place = next(i for i, other in enumerate(self._names.values()) if other == self._names[key])
                stand_ins[key] = str(Path(folder, f"{place}-{'scalar' if is_scalar else 'lm'}"))
                _write(config, stand_ins[key], is_scalar, depth, keeps_labels=not _is_reward(key))
            # Several heads or labels weigh next to nothing, and a stand-in has one.
            given = {name: value for name, value in arguments.items() if name not in _OF_HEADS}
            stage = cls(**_with_names(given, stand_ins))
            stage.tokenizer = load_tokenizer(stand_ins["model_name_or_path"])
            before = torch.get_default_dtype()
            try:
                torch.set_default_dtype(dtype)
                with torch.device("meta"):
                    stage.load_models()
            finally:
                torch.set_default_dtype(before)
        return stage

    def _read(self, key: str, name: str) -> tuple[PretrainedConfig, bool]:
        """Config of a model, and whether it is a classifier."""
        scalar = key == "value_name_or_path" or _is_reward(key)
        if scalar and looks_local(name) and not Path(name).expanduser().is_dir():
            self.assumed.append(f"'{name}' is not there yet: taken for a reward model of the policy's size")
            return self._configs["model_name_or_path"][0], True
        name = check_model_folder(name)
        if is_adapter(name):
            name = adapter_base(name)
            self.assumed.append(f"the adapter '{self._names[key]}' is taken for its base with the adapter merged")
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=self._trust)
        except Exception as e:
            raise UserError(f"no config.json could be read of '{name}': {reason_of(e)}") from e
        named = [str(each) for each in getattr(config, "architectures", None) or []]
        return config, scalar or any("SequenceClassification" in each for each in named)


def _named(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What the arguments of a stage name, by argument; a reward beside the main one by its own name."""
    others = {f"{OTHERS}.{name}": other.reward for name, other in _others(arguments).items()}
    return {key: arguments.get(key) for key in NAMES} | others


def _with_names(arguments: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The arguments with other names, by the keys of `_named`."""
    others = {
        name: replace(other, reward=names.get(f"{OTHERS}.{name}", other.reward), reward_weights=None)
        for name, other in _others(arguments).items()
    }
    given = {key: name for key, name in names.items() if not key.startswith(OTHERS)}
    return {**arguments, **given, **({OTHERS: others} if others else {})}


def _others(arguments: Mapping[str, Any]) -> dict[str, OtherReward]:
    return {name: from_config(OtherReward, other) for name, other in (arguments.get(OTHERS) or {}).items()}


def _is_reward(key: str) -> bool:
    return key == "reward" or key.startswith(OTHERS)


def _means_model(reward: str) -> bool:
    """Whether a reward names a model rather than a function."""
    return Path(reward).expanduser().is_dir() or "/" in reward


def _write(config: PretrainedConfig, folder: str, is_scalar: bool, depth: int | None, keeps_labels: bool) -> None:
    said = json.loads(config.to_json_string(use_diff=False))
    said["architectures"] = ["ForSequenceClassification" if is_scalar else "ForCausalLM"]
    said.pop("quantization_config", None)
    if is_scalar and not keeps_labels:
        said |= {"num_labels": 1}
        said.pop("id2label", None), said.pop("label2id", None)
    Path(folder).mkdir(exist_ok=True)
    Path(folder, "config.json").write_text(json.dumps(said), encoding="utf-8")
    if depth is None:
        return
    shorter = AutoConfig.from_pretrained(folder)
    text = shorter.get_text_config()
    full = int(text.num_hidden_layers)
    if full <= depth:
        return
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == full:  # something of each block
            setattr(text, name, value[:depth])
    text.num_hidden_layers = depth
    Path(folder, "config.json").write_text(shorter.to_json_string(use_diff=False), encoding="utf-8")


@contextmanager
def _without_weights(trust_remote_code: bool) -> Iterator[None]:
    """Let `from_pretrained` make models from their configs alone, and tokenizers from nothing."""
    with ExitStack() as replaced:
        for auto in (AutoModelForCausalLM, AutoModelForSequenceClassification):
            replaced.enter_context(patch.object(auto, "from_pretrained", _Maker(auto, trust_remote_code)))
        replaced.enter_context(patch.object(AutoTokenizer, "from_pretrained", _stand_in))
        yield


class _Maker:
    """In the place of `from_pretrained`."""

    def __init__(self, auto: Any, trust_remote_code: bool) -> None:
        self.auto, self.trust = auto, trust_remote_code

    def __call__(self, name: str, dtype: Any = None, num_labels: int | None = None, **options: Any) -> Any:
        config = AutoConfig.from_pretrained(name, trust_remote_code=self.trust)
        if num_labels is not None:
            config.num_labels = num_labels
        model: PreTrainedModel = self.auto.from_config(config, dtype=dtype, trust_remote_code=self.trust)
        return model.eval(), {"missing_keys": []}


def _stand_in(name: str, **options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer that is another for another size of vocabulary, and the same otherwise."""
    size = json.loads(Path(name, "config.json").read_text(encoding="utf-8"))
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, f"<of {size.get('vocab_size')}>": 3}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def fill(module: nn.Module, mode: Any) -> None:
    """Give a module on the meta device weights that torch takes for real ones on a CPU; shared ones stay shared.

    Args:
        module: changed in place.
        mode: `FakeTensorMode`.
    """
    made: dict[int, tuple[Any, Any]] = {}  # the old one is kept, or its id would be given away
    with mode:
        for owner in module.modules():
            for held in (owner._parameters, owner._buffers):
                for name, old in held.items():
                    if old is None or old.device.type != "meta":
                        continue
                    if id(old) not in made:
                        new: Any = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                        is_weight = isinstance(old, nn.Parameter)
                        made[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if is_weight else new, old
                    held[name] = made[id(old)][0]
