"""A language model whose weights are written down by a formula, so that other software's numbers can be compared."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY, EOS = 17, 1


def closed_form_lm(offset: float) -> LlamaForCausalLM:
    """Weights `sin(1.7 i + 0.013 i^2 + n + offset) / 3` for the n-th parameter by name, norms 1, float64."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    model = LlamaForCausalLM(config).double()
    with torch.no_grad():
        for number, (name, weight) in enumerate(sorted(model.named_parameters())):
            place = torch.arange(weight.numel(), dtype=torch.float64)
            values = torch.sin(1.7 * place + 0.013 * place**2 + number + offset) / 3
            weight.copy_(torch.ones_like(weight) if "norm" in name else values.view_as(weight))
    return model


def save_closed_form_lm(folder: Path, offset: float) -> str:
    """A folder with such a model, whose tokens are called `t0` to `t16`."""
    words = WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="t1", pad_token="t0")
    closed_form_lm(offset).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def gradient_of_one_step(before: dict[str, Tensor], module: pl.LightningModule) -> dict[str, float]:
    """What plain gradient descent with learning rate 1 has moved the weights by, summed up."""
    after = dict(module.export_model.named_parameters())
    gradient = {name: before[name] - after[name].detach() for name in before}
    return {
        "norm": float(torch.cat([g.flatten() for g in gradient.values()]).norm()),
        "embed_tokens": float(gradient["model.embed_tokens.weight"].sum()),
        "q_proj": float(gradient["model.layers.0.self_attn.q_proj.weight"].sum()),
        "down_proj": float(gradient["model.layers.0.mlp.down_proj.weight"].sum()),
        "lm_head[12]": float(gradient["lm_head.weight"][12].sum()),
    }
