"""Sequence classifiers of several families, with random weights and labels, and tokenizers that take pairs of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import processors
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

from helpers.models import VOCAB_SIZE, save_folder, spread_weights
from helpers.tokenizers import tiny_tokenizer

ATTRIBUTES = ["helpfulness", "correctness", "coherence", "complexity", "verbosity"]
WEIGHTS = {"helpfulness": 0.65, "correctness": 0.8, "verbosity": -0.4}

_SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_PLACES = {"max_position_embeddings": 80}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": _SHAPE | _PLACES,
    "roberta": _SHAPE | _PLACES | {"pad_token_id": 1, "type_vocab_size": 1},
    "deberta-v2": _SHAPE | _PLACES | {"pooler_hidden_size": 16, "type_vocab_size": 0, "relative_attention": True},
    "distilbert": {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2} | _PLACES,
    "electra": _SHAPE | _PLACES | {"embedding_size": 16},
    "albert": _SHAPE | _PLACES | {"embedding_size": 8},
    "modernbert": _SHAPE | _PLACES,
}
"""Model type and config of those whose head is not linear in the last hidden states."""
TYPED = {"bert", "electra", "albert"}
"""Those whose tokenizers number the two texts of a pair."""


def named(labels: list[str]) -> dict[str, Any]:
    """What a config says of labels."""
    return {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}


def pair_tokenizer(kind: str = "bert") -> PreTrainedTokenizerFast:
    """A tokenizer that writes pairs as BERT's or RoBERTa's does; the pad token has the id that its model expects."""
    tokenizer = tiny_tokenizer()
    backend = tokenizer.backend_tokenizer
    begin, end = "<|start|>", "<|end|>"
    pair = f"{begin} $A {end} $B:1 {end}:1" if kind in TYPED else f"{begin} $A {end} {end} $B {end}"
    special = [(token, backend.token_to_id(token)) for token in (begin, end)]
    backend.post_processor = processors.TemplateProcessing(f"{begin} $A {end}", pair, special)
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if kind in TYPED else [])]
    pad = "<|bos|>" if kind == "roberta" else "<|pad|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, sep_token=end, cls_token=begin, model_input_names=names
    )


def encoder(kind: str, **options: Any) -> PreTrainedModel:
    """An encoder with a classifier, in evaluation mode."""
    ids = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 2, "sep_token_id": 2}
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        config = AutoConfig.for_model(kind, **ids | ENCODERS[kind] | options)
        model = AutoModelForSequenceClassification.from_config(config).eval()
        spread_weights(model)
    return model


def save_encoder(folder: Path, kind: str = "bert", **options: Any) -> str:
    """An encoder with its tokenizer."""
    return save_folder(folder, encoder(kind, **options), pair_tokenizer(kind))
