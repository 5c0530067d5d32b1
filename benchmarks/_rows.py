"""Prepares what both sides of a comparison start from: the rows of every step as token ids, and a reward model.

    python benchmarks/_rows.py JOB

The rows are those that our own data module makes of the data file, in the order of its first epoch. Run by compare.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning import InstructionDataModule, PreferenceDataModule, PromptDataModule
from rlhf_lightning.models.scalar_lm import new_scalar_lm
from rlhf_lightning.models.tokenizer import load_tokenizer, own_pad_token

Job = dict[str, Any]


def data_module(job: Job) -> Any:
    """The data module of a stage, exactly as our side trains on it."""
    common: dict[str, Any] = {
        "tokenizer": job["model"],
        "data": job["data"],
        "validation_split": 0.0,
        "cache_dir": job["cache"],
    }
    if job["stage"] in ("ppo", "generate"):
        return PromptDataModule(**common, max_prompt_length=job["max_prompt_length"], rollout_batch_size=job["rows"])
    cls = InstructionDataModule if job["stage"] == "sft" else PreferenceDataModule
    return cls(**common, max_length=job["max_length"], batch_size=job["rows"])


def rows_of(batch: Any, stage: str) -> Iterator[dict[str, Any]]:
    """The rows of one batch without their padding."""

    def ids(name: str, mask: Tensor, row: int) -> list[int]:
        return list(getattr(batch, name)[row][mask[row]].tolist())

    for row, row_id in enumerate(batch.row_ids.tolist()):
        if stage == "sft":
            mask = batch.attention_mask
            taught = batch.loss_mask[row][mask[row]].long().tolist()
            yield {"row": row_id, "input_ids": ids("input_ids", mask, row), "completion_mask": taught}
        elif stage == "reward":
            sides = {f"{side}_ids": ids(f"{side}_ids", getattr(batch, f"{side}_mask"), row) for side in SIDES}
            yield {"row": row_id, **sides}
        else:
            yield {"row": row_id, "input_ids": ids("prompt_ids", batch.prompt_mask, row)}


SIDES = ("chosen", "rejected")


def write_rows(job: Job) -> None:
    """One line for each row of each step; the rows of a step follow one another."""
    data = data_module(job)
    data.prepare_data()
    data.setup("fit")
    steps = 1 if job["stage"] == "generate" else job["steps"]  # decoding answers the same prompts again and again
    batches = list(islice(data.train_dataloader(), steps))
    if len(batches) < steps or len(batches[-1].row_ids) < job["rows"]:
        sys.exit(f"the data make {len(batches)} batches of up to {job['rows']} rows, too few for {steps} steps")
    lines = [json.dumps(row) for batch in batches for row in rows_of(batch, job["stage"])]
    Path(job["rows_file"]).write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_reward_model(job: Job) -> None:
    """A reward model with a fresh head and a pad token of its own, whole and as a LoRA adapter that is still zero."""
    torch.manual_seed(job["seed"])
    scalar = new_scalar_lm(job["model"])
    tokenizer = load_tokenizer(job["model"])
    scalar.model.config.pad_token_id = own_pad_token(tokenizer, scalar.model.get_input_embeddings().num_embeddings)
    scalar.model.save_pretrained(job["reward"])
    tokenizer.save_pretrained(job["reward"])
    if job["variant"] != "lora":
        return
    from peft import LoraConfig, get_peft_model

    scalar.model.name_or_path = job["model"]
    config = LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"], **job["lora"])
    adapter = get_peft_model(scalar.model, config)
    adapter.peft_config["default"].base_model_name_or_path = job["model"]
    adapter.save_pretrained(job["reward_adapter"])
    tokenizer.save_pretrained(job["reward_adapter"])


if __name__ == "__main__":
    the_job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    write_rows(the_job)
    if the_job["stage"] in ("reward", "ppo"):
        write_reward_model(the_job)
