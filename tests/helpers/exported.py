"""Writes a shelf of exports for `helpers.opened`, which another version of transformers runs.

    python -m helpers.exported FOLDER

Every stage in every form that it is exported in, and models of many families as an export leaves them; `expected.json`
holds what each gives here.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from helpers.models import VOCAB_SIZE, spread_weights
from helpers.opened import answers
from helpers.stages import adamw, fit, instruction_rows, preference_rows, prompt_rows
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning import (
    DPOModule,
    FineTune,
    HFExport,
    InstructionDataModule,
    PPOModule,
    PreferenceDataModule,
    PromptDataModule,
    RewardModule,
    Sampling,
    SFTModule,
)
from rlhf_lightning.models.portable import rewrite_config, save_tokenizer

CONSTANT = {"lr_schedule": "constant", "warmup_steps": 0}
_SHAPE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2}
_SHAPE |= {"head_dim": 16, "intermediate_size": 32, "max_position_embeddings": 64}
_BASE = {"rope_type": "default", "rope_theta": 300.0}
_YARN = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 300.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_EXPERTS |= {"shared_expert_intermediate_size": 16}
_WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
_MAMBA = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
_LONG = {"rope_type": "longrope", "rope_theta": 300.0, "short_factor": [1.5] * 8, "long_factor": [3.0] * 8}


def _rope(**rope: Any) -> dict[str, Any]:
    return {"rope_parameters": rope}


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _rope(**_BASE) | {"tie_word_embeddings": True}),
    "llama-3": ("llama", _rope(**_LLAMA3, original_max_position_embeddings=16)),
    "llama-linear": ("llama", _rope(rope_type="linear", factor=4.0, rope_theta=300.0)),
    "llama-dynamic": ("llama", _rope(rope_type="dynamic", factor=4.0, rope_theta=300.0)),
    "mistral": ("mistral", _rope(**_BASE) | {"sliding_window": 4}),
    "mixtral": ("mixtral", _rope(**_BASE) | {"num_local_experts": 4}),
    "qwen2": ("qwen2", _rope(**_BASE)),
    "qwen2-yarn": ("qwen2", _rope(**_YARN, original_max_position_embeddings=16)),
    "qwen2-yarn-over-all": ("qwen2", _rope(**_YARN)),
    "qwen2-moe": ("qwen2_moe", _rope(**_BASE) | _EXPERTS),
    "qwen3": ("qwen3", _rope(**_BASE)),
    "qwen3-moe": ("qwen3_moe", _rope(**_BASE) | _EXPERTS),
    "gemma": ("gemma", _rope(**_BASE)),
    # The cap is left out: not every attention of transformers 5 computes it.
    "gemma2": ("gemma2", _rope(**_BASE) | {"sliding_window": 4, "attn_logit_softcapping": None}),
    "gemma3": (
        "gemma3_text",
        _WINDOWS
        | _rope(
            full_attention={"rope_type": "linear", "factor": 8.0, "rope_theta": 300.0},
            sliding_attention={"rope_type": "default", "rope_theta": 50.0},
        ),
    ),
    "cohere2": ("cohere2", _rope(**_BASE) | _WINDOWS),
    "phi": ("phi", _rope(**_BASE, partial_rotary_factor=0.25)),
    "phi3": ("phi3", _rope(**_BASE, partial_rotary_factor=0.5)),
    "phi3-long": (
        "phi3",
        _rope(**_LONG, partial_rotary_factor=1.0)
        | {"max_position_embeddings": 128, "original_max_position_embeddings": 64},
    ),
    "glm4": ("glm4", _rope(**_BASE, partial_rotary_factor=0.25)),
    "stablelm": ("stablelm", _rope(**_BASE, partial_rotary_factor=0.5)),
    "gpt-neox": ("gpt_neox", _rope(**_BASE, partial_rotary_factor=0.5)),
    "falcon": ("falcon", {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2} | _rope(**_BASE)),
    "olmo2": ("olmo2", _rope(**_BASE)),
    "starcoder2": ("starcoder2", _rope(**_BASE)),
    "granite": ("granite", _rope(**_BASE) | {"logits_scaling": 4.0}),
    "mamba2": (
        "mamba2",
        {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1},
    ),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "opt": ("opt", {"ffn_dim": 32, "word_embed_proj_dim": 32}),
}
"""Model type and settings, none of them those that transformers 4.51 takes where it finds none."""

_NO_CLASSIFIER = {"gemma3_text", "olmo2"}
"""Those for which only the newer transformers has a sequence classifier."""

_WHOLE = {"gpt2", "falcon", "mamba2"}
"""Those whose settings go by other names than `_SHAPE`'s."""

TOKENIZERS = {
    "plain": tiny_tokenizer,
    "bos": partial(tiny_tokenizer, bos=True, chat_template=True),
    "eos-as-pad": partial(tiny_tokenizer, pad="eos", chat_template=True),
}


def config_of(name: str) -> PretrainedConfig:
    """The config of a family's small model."""
    model_type, options = FAMILIES[name]
    ids = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 1}
    return AutoConfig.for_model(model_type, **ids | ({} if model_type in _WHOLE else _SHAPE) | options)


def family(name: str, kind: Any, folder: Path) -> bool:
    """Write a model with random weights; False where its family has no such model, here or there."""
    config = config_of(name)
    if config.model_type in _NO_CLASSIFIER and kind is AutoModelForSequenceClassification:
        return False
    torch.manual_seed(3)
    try:
        model = kind.from_config(config).eval()
    except ValueError:
        return False
    spread_weights(model)
    model.save_pretrained(folder)
    rewrite_config(folder)
    return True


def more_tokens() -> PreTrainedTokenizerFast:
    """A tokenizer with what 4.51 and 5 write in different places."""
    tokenizer = tiny_tokenizer(chat_template=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<a>", "<b>"]})
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    tokenizer.model_max_length = 64
    return tokenizer


def base(folder: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    """What the stages start from: a Llama with another rotary base than the usual one."""
    options = _SHAPE | {"rope_parameters": _BASE, "vocab_size": len(tokenizer), "num_hidden_layers": 2}
    options |= {"head_dim": 32}  # the least that vLLM takes on a CPU
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**options | ids))
    spread_weights(model)
    model.save_pretrained(folder)
    rewrite_config(folder)  # an adapter is read on it as it stands
    save_tokenizer(tokenizer, folder)
    return str(folder)


def stages(root: Path) -> list[str]:
    """Train each stage for two steps, and export it; what they are called."""
    written = []

    def export(name: str, module: Any, data: Any) -> str:
        fit(module, data, callbacks=[HFExport(str(root / name))])
        written.append(name)
        return str(root / name)

    rows, pairs, prompts = instruction_rows(8), preference_rows(8), prompt_rows(8)
    lora = {"merged": FineTune("lora", rank=4), "adapter": FineTune("lora", rank=4, export="adapter")}
    options = {"optimizer": adamw(3e-2), **CONSTANT}
    pretrained = base(root / "base", tiny_tokenizer(chat_template=True))
    for name, tokenizer in (("sft-bos", TOKENIZERS["bos"]()), ("sft-more-tokens", more_tokens())):
        model = base(root / f"{name}-base", tokenizer)
        data = InstructionDataModule(model, rows, batch_size=4, max_length=48)
        export(name, SFTModule(model, **options), data)
    data = InstructionDataModule(pretrained, rows, batch_size=4, max_length=48)
    sft = export("sft", SFTModule(pretrained, **options), data)
    comparisons = partial(PreferenceDataModule, batch_size=4, max_length=48)
    reward = export("reward", RewardModule(sft, **options), comparisons(sft, pairs, validation_data=pairs[:4]))
    for form, finetune in lora.items():
        export(f"sft-{form}", SFTModule(pretrained, finetune=finetune, **options), data)
        module = RewardModule(sft, finetune=finetune, **options)
        export(f"reward-{form}", module, comparisons(sft, pairs, validation_data=pairs[:4]))
    export("dpo", DPOModule(sft, **options), comparisons(sft, pairs))
    sampling = {"rollout_batch_size": 4, "minibatch_size": 4, "sampling": Sampling(max_new_tokens=6)}
    ppo = PPOModule(sft, reward, **sampling, **options)
    export("ppo", ppo, PromptDataModule(sft, prompts, rollout_batch_size=4, max_prompt_length=40))
    return written


def main(root: Path) -> None:
    """Write all folders, and what they give."""
    names = stages(root)
    for name in FAMILIES:
        for kind, suffix in ((AutoModelForCausalLM, "lm"), (AutoModelForSequenceClassification, "reward")):
            if family(name, kind, root / f"{name}-{suffix}"):
                names.append(f"{name}-{suffix}")
    expected = {name: answers(root / name) for name in names}
    (root / "expected.json").write_text(json.dumps(expected), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
