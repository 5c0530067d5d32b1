"""The chat template that the data are written by is the one that modules generate by and exports carry."""

import pytest
import pytorch_lightning as pl
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor, LogitsProcessorList

from helpers.stage_runs import STAGES
from helpers.stages import save_llama, save_reward_model, trainer
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning import HFExport
from rlhf_lightning.generation.engine import TransformersEngine
from rlhf_lightning.generation.sampling import Sampling

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|start|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
"""Ends turns by a token that is not the EOS of the tokenizer."""


class Always(LogitsProcessor):
    """Lets a model say one token only."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -100.0).index_fill(1, torch.tensor([self.token]), 0.0)


class Seen(pl.Callback):
    """Keeps the template of the module's tokenizer when training begins, long before an export."""

    template: str | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.template = pl_module.tokenizer.chat_template


@pytest.mark.parametrize("stage", STAGES)
def test_modules_and_exports_know_the_template_that_the_data_module_sets(stage, tmp_path):
    folder = save_llama(tmp_path / "lm")
    module, data = STAGES[stage](folder, save_reward_model(tmp_path / "reward", folder), True)
    data.chat_template, data.cache_dir = TEMPLATE, tmp_path / "cache"
    seen = Seen()
    trainer(max_steps=1, limit_val_batches=0, callbacks=[seen, HFExport(str(tmp_path / "export"))]).fit(module, data)

    assert seen.template == TEMPLATE
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert tokenizer.chat_template == TEMPLATE
    if stage == "reward":
        return
    end = tokenizer.convert_tokens_to_ids("<|start|>")
    assert GenerationConfig.from_pretrained(tmp_path / "export").eos_token_id == [tokenizer.eos_token_id, end]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answers = model.generate(**prompt, max_new_tokens=4, logits_processor=LogitsProcessorList([Always(end)]))
    assert answers[0, prompt["input_ids"].shape[1] :].tolist() == [end]


def test_our_generation_ends_where_the_template_ends_a_turn(tmp_path):
    tokenizer = tiny_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(save_llama(tmp_path / "lm", tokenizer))
    end = tokenizer.convert_tokens_to_ids("<|start|>")
    with torch.no_grad():  # of all tokens the likeliest is always the one that ends turns
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
    model.lm_head.bias = torch.nn.Parameter(torch.nn.functional.one_hot(torch.tensor(end), len(tokenizer)) * 100.0)
    prompt = torch.tensor([tokenizer("hi").input_ids])
    for template, length in ((None, 3), (TEMPLATE, 1)):
        tokenizer.chat_template = template
        sampling = Sampling(top_k=1, max_new_tokens=3)
        generation = TransformersEngine(model, tokenizer).generate(
            prompt, torch.ones_like(prompt).bool(), sampling, generator=torch.Generator()
        )
        assert generation.response_mask.sum().item() == length
        assert generation.ended.tolist() == [template is not None]
