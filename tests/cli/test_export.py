"""`rlhf export`: the folder that a run ends with, made again from its last checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import cli_runs
from helpers.cli_runs import PPO, SFT, run, save_model, save_pairs, short

REWARD = [*cli_runs.REWARD, "--trainer.val_check_interval=1"]
LORA = ["--model.finetune.mode=lora", "--model.finetune.rank=2"]
ADAPTER = [*LORA, "--model.finetune.export=adapter"]
LAST_LAYER = ["--model.finetune.mode=last_layer"]
BFLOAT16 = ["--trainer.precision=bf16-true"]
DPO = ["--config=dpo.yaml", "--data.max_length=64", "--data.batch_size=4"]
GROUPS = ["--data.max_prompt_length=48", "--model.sampling.max_new_tokens=4", "--model.rollout_batch_size=2"]
GROUPS += ["--model.samples_per_prompt=2", "--model.minibatch_size=4", "--model.micro_batch_size=2"]
RUNS = {
    "sft": SFT,
    "sft-lora": [*SFT, *LORA],
    "sft-dora": [*SFT, *LORA, "--model.finetune.use_dora=true"],
    "sft-adapter": [*SFT, *ADAPTER],
    "sft-last": [*SFT, *LAST_LAYER],
    "sft-bf16": [*SFT, *BFLOAT16],
    "sft-lora-bf16": [*SFT, *LORA, *BFLOAT16],
    "sft-mixed": [*SFT, "--trainer.precision=bf16-mixed"],
    "reward": REWARD,
    "reward-lora": [*REWARD, *LORA],
    "reward-adapter": [*REWARD, *ADAPTER],
    "reward-last": [*REWARD, *LAST_LAYER],
    "dpo": DPO,
    "dpo-lora": [*DPO, *LORA],
    "rloo": ["--config=rloo.yaml", *GROUPS],
    "grpo-lora": ["--config=grpo.yaml", *GROUPS, *LORA],
    "ppo": PPO,
    "ppo-lora": [*PPO, *LORA, "--model.frozen_dtype=bfloat16"],
}
ONLINE = ("ppo", "rloo", "grpo")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a language model, `lm`, data, `pairs.jsonl`, and a run of each of `RUNS` that is asked for."""
    root = tmp_path_factory.mktemp("shelf")
    save_model(root / "lm", chat_template=True)
    save_pairs(root / "pairs.jsonl")
    return root


def trained(shelf: Path, name: str) -> Path:
    """The folder of a run of `RUNS`."""
    root = shelf / name
    if not root.exists():
        reward = [f"--model.reward={trained(shelf, 'reward') / 'export'}"] if name.startswith(ONLINE) else []
        done = run("fit", *RUNS[name], *short(shelf / "lm", shelf / "pairs.jsonl", root), *reward, cwd=shelf)
        assert done.returncode == 0, done.stderr
    return root


def files(folder: Path, without: tuple[str, ...] = ("README.md",)) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in without}


@pytest.mark.parametrize("name", RUNS)
def test_it_is_the_folder_that_the_run_ended_with(shelf, name):
    root = trained(shelf, name)
    done = run("export", str(root / "checkpoints" / "last.ckpt"), "--out", str(root / "again"), cwd=shelf)
    assert (done.returncode, done.stderr) == (0, "")
    assert files(root / "again") == files(root / "export")
