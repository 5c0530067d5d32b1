"""Real steps of tiny stages whose every sequence is as long as it may be, with their live bytes counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.stages import save_reward_model, trainer
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning import (
    DPOModule,
    GRPOModule,
    InstructionDataModule,
    PPOModule,
    RewardModule,
    RLOOModule,
    SFTModule,
)
from rlhf_lightning.batches import InstructionBatch, PreferenceBatch, PromptBatch
from rlhf_lightning.planning import Plan, Request, plan
from rlhf_lightning.planning.live import LiveBytes, Moment, bytes_of, tensors_of

PROMPT, RESPONSE = 24, 24
LENGTH, EXAMPLES = PROMPT + RESPONSE, 4
STAGES: dict[str, type] = {
    "sft": SFTModule,
    "reward": RewardModule,
    "dpo": DPOModule,
    "ppo": PPOModule,
    "rloo": RLOOModule,
    "grpo": GRPOModule,
}
ONLINE = ("ppo", "rloo", "grpo")


def save_models(folder: Path, layers: int = 3) -> tuple[str, str]:
    """A language model and a reward model on it, their layers large against their embeddings."""
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    return str(folder / "lm"), save_reward_model(folder / "reward", str(folder / "lm"))


def arguments(kind: str, lm: str, reward: str, **given: Any) -> dict[str, Any]:
    """Of a stage that takes one optimizer step in each batch; `texts` are rows that PPO goes on learning in it."""
    online: dict[str, Any] = {}
    if kind in ONLINE:
        groups = {} if kind == "ppo" else {"samples_per_prompt": 2}
        sampling = {"max_new_tokens": RESPONSE, "min_new_tokens": RESPONSE}
        online = {"reward": reward, "rollout_batch_size": EXAMPLES // (2 if groups else 1), "minibatch_size": EXAMPLES}
        online |= {"ppo_epochs": 2, "sampling": sampling, "score": {"scaling": False}, **groups}
    if "texts" in given:
        given = {**given, "pretraining": texts(lm, given["texts"])}
        del given["texts"]
    if kind in ("reward", "dpo", "rloo", "grpo"):
        online["prefix_sharing"] = False
    return {"model_name_or_path": lm, "lr_schedule": "constant", "warmup_steps": 0, **online, **given}


def texts(lm: str, count: int) -> InstructionDataModule:
    """So many rows of text in each step, each as long as it may be and all of it learnt."""
    rows = [{"prompt": f"{number}", "response": " bread" * LENGTH} for number in range(3 * count)]
    options: dict[str, Any] = {"validation_split": 0.0, "max_length": LENGTH, "loss_on": "all"}
    return InstructionDataModule(lm, rows, batch_size=count, **options)


def planned(kind: str, arguments: dict[str, Any], **settings: Any) -> Plan:
    """The plan of such a stage on one process of a CPU."""
    data = {"max_length": LENGTH, "batch_size": EXAMPLES, "max_prompt_length": PROMPT}
    return plan(Request(STAGES[kind], arguments, data, on_gpu=False, **settings))


def batch(kind: str) -> Any:
    """One without padding."""
    ids = torch.randint(5, 200, (EXAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    full, rows = torch.ones_like(ids, dtype=torch.bool), torch.arange(EXAMPLES)
    if kind == "sft":
        return InstructionBatch(ids, full, full, rows)
    if kind in ("reward", "dpo"):
        return PreferenceBatch(ids, full, ids.flip(0), full, rows, prompt_lengths=torch.ones(EXAMPLES).long())
    prompts = EXAMPLES if kind == "ppo" else EXAMPLES // 2
    return PromptBatch(ids[:prompts, :PROMPT], full[:prompts, :PROMPT], ["a"] * prompts, rows[:prompts])


class Counted:
    """A run of three batches; what is alive in the last of them, when optimizer and engine have all that they keep.

    Attributes:
        weights: bytes of the models.
        state: bytes of the optimizer's state and float32 copies, numbers of steps aside.
        gradients: bytes of the gradients at the end of a backward pass.
        worst: bytes alive at the worst moment of the batch, weights and state aside.
        moments: the same of its parts: `rollout` and `update`, where a stage has them.
    """

    def __init__(self, kind: str, arguments: dict[str, Any], **settings: Any) -> None:
        self.moments: dict[str, float] = {}
        self.gradients, self._seen = 0.0, 0
        module: Any = STAGES[kind](**arguments)
        self._module, self._step = module, module.training_step
        for name in ("rollout", "update"):
            if hasattr(module, name):
                setattr(module, name, self._part(name, getattr(module, name)))
        module.training_step = self._counted
        batches = DataLoader([batch(kind)] * 3, batch_size=None)
        with torch.random.fork_rng(devices=[]):
            trainer(max_steps=-1, **settings).fit(module, batches)
        optimizer = self._optimizer()
        self.weights = bytes_of(module.parameters())
        self.state = sum(tensor.nbytes for tensor in self._kept(optimizer) if tensor.dim())

    def _optimizer(self) -> Any:
        return self._module.optimizers(use_pl_optimizer=False)

    def _kept(self, optimizer: Any) -> list[Tensor]:
        inner = getattr(optimizer, "inner", optimizer)
        copies = [master for _, master in getattr(optimizer, "_pairs", ())]
        state = [value for each in inner.state.values() for value in each.values() if isinstance(value, Tensor)]
        return [*copies, *state]

    def _part(self, name: str, call: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._seen < 3:
                return call(*args, **kwargs)
            self.live.begin()
            result = call(*args, **kwargs)
            worst = max(sum(moment) for moment in self.live.worst())
            self.moments[name] = max(worst, self.moments.get(name, 0))
            self.worst = max(self.worst, worst)
            return result

        return counted

    def _counted(self, batch: Any, batch_idx: int) -> Any:
        self._seen += 1
        if self._seen < 3:
            return self._step(batch, batch_idx)
        module = self._module
        self.live = LiveBytes()
        self.live.leave_out([*tensors_of(module), *self._kept(self._optimizer())])
        trained: list[nn.Parameter] = [p for p in module.parameters() if p.requires_grad]
        self.live.watch(trained)
        self._optimizer().register_step_pre_hook(self._before_step)
        self.worst = 0.0
        with self.live:
            self.live.begin()
            result = self._step(batch, batch_idx)
            self.worst = max(self.worst, *(sum(moment) for moment in self.live.worst()))
        return result

    def _before_step(self, *args: Any) -> None:
        self.gradients = self.live.now.gradients


__all__ = ["Counted", "Moment", "arguments", "planned", "save_models"]
