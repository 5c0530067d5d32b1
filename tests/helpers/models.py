"""Tiny models: one of each family with random weights, and two whose every number is written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    LlamaModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from rlhf_lightning.models.scalar_lm import ScalarLM

VOCAB_SIZE = 320
"""A few embedding rows more than the tiny tokenizer has tokens, as real models have."""

_SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
_GATED = _SHAPE | {"intermediate_size": 32, "num_key_value_heads": 1}
_OPT = _SHAPE | {"ffn_dim": 32}
_GPT_NEO = {
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "window_size": 4,
    "attention_types": [[["global", "local"], 1]],
    "max_position_embeddings": 64,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GATED),
    "qwen3": ("qwen3", _GATED | {"head_dim": 8}),
    "gpt2": ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "opt": ("opt", _OPT | {"word_embed_proj_dim": 16}),
    "opt-350m-like": ("opt", _OPT | {"word_embed_proj_dim": 12, "do_layer_norm_before": False}),
    "gpt-neox": ("gpt_neox", _SHAPE | {"intermediate_size": 32}),
    "gpt-neo": ("gpt_neo", _GPT_NEO),
    "gpt-j": ("gptj", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "rotary_dim": 4}),
    "falcon": ("falcon", _SHAPE | {"alibi": False}),
    "falcon-alibi": ("falcon", _SHAPE | {"alibi": True}),
    "bloom": ("bloom", {"hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "phi": ("phi", _SHAPE | {"intermediate_size": 32}),
    "stablelm": ("stablelm", _GATED),
    "gemma": ("gemma", _GATED | {"head_dim": 8}),
    "gemma2": ("gemma2", _GATED | {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 2.0}),
    "cohere": ("cohere", _GATED | {"logit_scale": 0.5}),
    "granite": ("granite", _GATED | {"logits_scaling": 4.0}),
}
"""Model type and config of each family; attention windows and logit caps are small enough to be felt."""

WITHOUT_CLASSIFIER = {"cohere", "granite"}
"""Families for which transformers has no `...ForSequenceClassification`."""

_DROPOUT = {"attention_dropout": 0.5}
_RESIDUAL = _DROPOUT | {"resid_pdrop": 0.5, "embd_pdrop": 0.5}
_HIDDEN = _DROPOUT | {"hidden_dropout": 0.5}
DROPOUT: dict[str, dict[str, float]] = {
    "gpt2": {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5},
    "gpt-j": {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5},
    "gpt-neo": _DROPOUT | {"resid_dropout": 0.5, "embed_dropout": 0.5},
    "opt": _DROPOUT | {"dropout": 0.5, "layerdrop": 0.5},
    "opt-350m-like": _DROPOUT | {"dropout": 0.5, "layerdrop": 0.5},
    "gpt-neox": _HIDDEN,
    "falcon": _HIDDEN,
    "falcon-alibi": _HIDDEN,
    "bloom": _HIDDEN,
    "stablelm": _HIDDEN,
    "phi": _RESIDUAL,
}
"""What each family calls its dropout; the others have `attention_dropout` only."""


def tiny_config(family: str, **options: Any) -> PretrainedConfig:
    """Config of a family, with the special ids of `tiny_tokenizer` (pad 0, BOS 1, EOS 2)."""
    model_type, shape = FAMILIES[family]
    ids = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoConfig.for_model(model_type, **ids | shape | options)


def with_dropout(family: str) -> PretrainedConfig:
    """Config of a family with every dropout at 0.5."""
    return tiny_config(family, **DROPOUT.get(family, _DROPOUT))


def tiny_causal_lm(family: str = "llama", seed: int = 0, **options: Any) -> PreTrainedModel:
    """A language model of a family in evaluation mode, its logits spread widely enough to tell tokens apart."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **options)).eval()
        spread_weights(model)
    return model


def tiny_classifier(family: str = "llama", seed: int = 0, **options: Any) -> PreTrainedModel:
    """A sequence classifier with one label, in evaluation mode."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        config = tiny_config(family, **{"num_labels": 1, **options})
        model = AutoModelForSequenceClassification.from_config(config).eval()
        spread_weights(model)
    return model


LAYOUTS = {"atol": 1e-5, "rtol": 1e-5}
"""How close two layouts of the same rows must come on models in float64; a wrong layout is of order 1.

transformers computes norms and rotary positions in float32 even then, so what is left is its epsilon, 1.2e-7,
amplified: 1e-6 was the most. Of models in float32 two processors make 2e-5.
"""


_NAN_IN_FLOAT64 = {"bloom", "gemma2"}
"""Their softmax is computed in float32, where the most negative number of float64 is -inf: padding becomes NaN."""


def precise(model: PreTrainedModel) -> PreTrainedModel:
    """A model in float64, if its family can be run so."""
    return model if model.config.model_type in _NAN_IN_FLOAT64 else model.double()


def closeness(model: PreTrainedModel) -> dict[str, float]:
    """How close two ways to compute the same must come on a model as `precise` returns it.

    In float32 what is added is its epsilon for each of a few dozen roundings of numbers up to 10.
    """
    return LAYOUTS if model.dtype is torch.float64 else {"atol": 1e-4, "rtol": 1e-4}


class _BlindToPlaces(LlamaModel):
    """Takes the places of tokens, and counts its own: examples packed into one row see each other."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids, attention_mask, **kwargs)


def mixing_causal_lm() -> Any:
    """A language model that mixes up the examples of a packed row, by construction."""
    model: Any = tiny_causal_lm("llama")
    model.model.__class__ = _BlindToPlaces
    return model


@torch.no_grad()
def spread_weights(model: nn.Module) -> None:
    """Add noise, so that no two layers do the same and no bias is zero."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.2)


def save_folder(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Write a Hugging Face folder; its path as a string."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class TableConfig(PretrainedConfig):
    """Config of the two models below."""

    model_type = "table"

    def __init__(self, hidden_size: int = 1, **kwargs: Any) -> None:
        self.hidden_size = self.vocab_size = hidden_size
        self.num_hidden_layers = 1
        super().__init__(**kwargs)


class _OneHot(nn.Module):
    """A transformer's place: the hidden state of a token is its one-hot vector, whatever stands around it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool, **_: Any) -> Any:
        return BaseModelOutputWithPast(last_hidden_state=nn.functional.one_hot(input_ids, self.size).float())


class TableLM(PreTrainedModel):
    """A language model whose logits after token i are row i of a table.

    Args:
        logits: `[V, V]`; trainable.
    """

    config_class = TableConfig
    base_model_prefix = "backbone"

    def __init__(self, logits: Tensor) -> None:
        super().__init__(TableConfig(len(logits)))
        self.backbone = _OneHot(len(logits))
        self.lm_head = nn.Linear(*logits.shape, bias=False)
        self.lm_head.weight.data.copy_(logits.T)
        self.generation_config = GenerationConfig()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> Any:
        hidden = self.backbone(input_ids, attention_mask, use_cache=False).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(hidden))


class _TableClassifier(PreTrainedModel):
    config_class = TableConfig
    base_model_prefix = "backbone"

    def __init__(self, scalars: Tensor) -> None:
        super().__init__(TableConfig(len(scalars)))
        self.backbone = _OneHot(len(scalars))
        self.score = nn.Linear(len(scalars), 1, bias=False)
        self.score.weight.data.copy_(scalars.unsqueeze(0))


def table_lm(probabilities: list[list[float]]) -> TableLM:
    """A language model that continues token i by token j with probability `probabilities[i][j]`."""
    # Not -inf for a probability of 0: a one-hot vector times it would be NaN.
    return TableLM(torch.tensor(probabilities).clamp(min=1e-30).log())


def table_scalar(scalars: list[float]) -> ScalarLM:
    """A scalar model that gives token i the scalar `scalars[i]`, wherever it stands."""
    return ScalarLM(_TableClassifier(torch.tensor(scalars)))


def table_tokenizer(pad_id: int | None = 0) -> PreTrainedTokenizerFast:
    """Tokenizer of four tokens for the models above: 0 `_`, 1 `a`, 2 `b`, 3 the EOS `.`; no spaces between.

    Args:
        pad_id: 0 for a pad token of its own, 3 for the EOS in its place, None for no pad token.
    """
    words = ["_", "a", "b", "."]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="_"))
    backend.decoder = decoders.Fuse()
    special = {} if pad_id is None else {"pad_token": words[pad_id]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=".", **special)
