"""Other libraries on the same rows: SFT by TRL, answers by vLLM, where they are installed."""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch
from _gpu_process import UnavailableError, need
from _gpu_settings import Settings
from measuring import between, synchronize

ROWS_AT_ONCE = 16
"""Of TRL's micro-batches, which hold as many rows each, however long."""


def sft_by_trl(batches: list[Any], settings: Settings) -> tuple[list[float], str]:
    """TRL's SFTTrainer, its batches padded, as quick as its options allow: nothing is computed again.

    Args:
        batches: `InstructionBatch` of one example a row, all of as many rows.
        settings: of device and precision.

    Returns:
        Seconds of each step, and how it was run.

    Raises:
        UnavailableError: TRL or datasets is not installed.
    """
    need("trl", "datasets")
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if settings.precision == "bf16-true":
        raise UnavailableError("it trains weights in bfloat16 otherwise than we do")
    rows = len(batches[0].input_ids)
    together = next(size for size in range(min(rows, ROWS_AT_ONCE), 0, -1) if rows % size == 0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(settings.policy(), dtype=torch.float32),
            args=trl.SFTConfig(
                output_dir=folder,
                per_device_train_batch_size=together,
                gradient_accumulation_steps=rows // together,
                max_steps=len(batches),
                max_length=max(batch.input_ids.shape[1] for batch in batches),
                completion_only_loss=True,
                gradient_checkpointing=False,
                lr_scheduler_type="constant",
                bf16=settings.precision == "bf16-mixed",
                use_cpu=settings.device == "cpu",
                train_sampling_strategy="sequential",
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=_trl_rows(batches),
            processing_class=AutoTokenizer.from_pretrained(settings.policy()),
        )
        ends = _clock(trainer)
        trainer.train()
    return between(ends), f"TRL {trl.__version__}, {together} rows at once, padded, without gradient checkpointing"


def _trl_rows(batches: list[Any]) -> Any:
    """The rows of all batches, in order, as TRL takes them."""
    from datasets import Dataset

    rows = []
    for batch in batches:
        for ids, mask, taught in zip(batch.input_ids, batch.attention_mask, batch.loss_mask, strict=True):
            rows.append({"input_ids": ids[mask].tolist(), "completion_mask": taught[mask].int().tolist()})
    return Dataset.from_list(rows)


def _clock(trainer: Any) -> list[float]:
    """When the training began, and when each step ended; filled while it runs."""
    from transformers import TrainerCallback

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            synchronize()
            ends.append(time.perf_counter())

    trainer.add_callback(Clock())
    return ends


def vllm_engine(model: Any, tokenizer: Any, most_tokens: int) -> Any:
    """vLLM on the model's weights, as our rollouts run it.

    Args:
        model: a language model.
        tokenizer: its own.
        most_tokens: of prompt and answer together.
    """
    from rlhf_lightning.generation.vllm_engine import VLLMEngine

    return VLLMEngine(model, tokenizer, max_model_len=most_tokens)
