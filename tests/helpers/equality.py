"""Which runs on several processes are compared with one process, how, and the table that is made of it.

`python -m helpers.equality PAGE` runs them all on two processes and writes the table into a page of the documentation.
"""

from __future__ import annotations

import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from helpers.distributed import run_in_processes
from helpers.models import save_folder
from helpers.stage_runs import STAGES, run
from helpers.stages import save_llama, save_reward_model
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning import load_causal_lm

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "zero3-offload", "fsdp2")
BEGIN, END = "<!-- made by `make equality` -->\n", "<!-- end -->\n"


class Case(NamedTuple):
    """A stage on a strategy, with LoRA or all weights, and each step in several pieces or in one."""

    stage: str
    strategy: str
    lora: bool
    pieces: bool


FULL = [Case(*each) for each in product(STAGES, STRATEGIES, (False, True), (False, True))]


SOME = [
    Case("sft", "zero3", True, True),
    Case("reward", "fsdp2", False, True),
    Case("dpo", "zero3", False, False),
    Case("ppo", "fsdp2", True, False),
    Case("ppo trunk", "ddp", False, False),
    Case("ppo on-policy", "ddp", True, True),
    Case("rloo", "zero2", True, False),
    Case("rloo", "zero3", False, False),
    Case("grpo", "zero2", False, True),
]
"""Of each stage a case, and of each of a few strategies both of everything."""


BESIDE = [
    Case("reward terms", "zero3", False, True),
    Case("reward terms", "fsdp2", False, False),
    Case("reward tied terms", "fsdp2", False, True),
    Case("reward tied terms", "zero3", True, False),
    Case("reward rankings", "ddp", False, True),
    Case("reward rankings", "zero3", True, False),
    Case("dpo rankings", "ddp", True, True),
    Case("dpo rankings", "fsdp2", False, False),
    Case("ppo others", "zero3", False, True),
    Case("ppo switched", "ddp", False, True),
    Case("ppo switched", "fsdp2", True, False),
    Case("ppo trunk switched", "ddp", False, False),
]
"""An output layer beside a reward model, of its own or shared with the input embeddings, whole rankings, and switches
of PPO: no stages of their own."""


def prepare(root: Path) -> dict[str, str]:
    """A language model, another one as DPO's reference, one with tied embeddings, and a reward model."""
    base = save_llama(root / "llama", layers=1)  # test_strategies.py and test_resume_processes.py have two
    reference = load_causal_lm(base)
    with torch.no_grad():
        for weight in reference.parameters():
            weight.mul_(1.3)
    save_folder(root / "llama-reference", reference, tiny_tokenizer())
    tied: Any = load_causal_lm(base)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    save_folder(root / "llama-tied", tied, tiny_tokenizer())
    return {"folder": base, "reward": save_reward_model(root / "reward", base)}


def settings(case: Case, folders: dict[str, str]) -> dict[str, Any]:
    """What `helpers.stage_runs.run` takes."""
    return {"stage": case.stage, "name": case.strategy, "lora": case.lora, "pieces": case.pieces, **folders}


def run_one(cases: list[Case], folders: dict[str, str]) -> dict[Case, dict[str, Any]]:
    """The same on one process, each stage once whatever the strategy; in one piece, as pieces change nothing."""
    alone = {(case.stage, case.lora) for case in cases}
    done = {(stage, lora): run(stage, "auto", **folders, lora=lora, pieces=False) for stage, lora in sorted(alone)}
    return {case: done[case.stage, case.lora] for case in cases}


def distance(result: dict[str, Any], expected: dict[str, Any], when: str = "after") -> float:
    """Largest difference of any trained weight."""
    assert result[when].keys() == expected[when].keys()
    pairs = [(torch.tensor(result[when][name]), torch.tensor(value)) for name, value in expected[when].items()]
    return max(float((mine - other).abs().max()) for mine, other in pairs)


def table(distances: dict[Case, float]) -> str:
    """A row for each stage, a column for each strategy: the largest difference among its runs."""
    lines = ["| | " + " | ".join(STRATEGIES) + " |", "|---|" + "---|" * len(STRATEGIES)]
    for stage in STAGES:
        worst = [
            max(far for case, far in distances.items() if (case.stage, case.strategy) == (stage, strategy))
            for strategy in STRATEGIES
        ]
        lines.append(f"| {stage} | " + " | ".join(f"{far:.0e}" for far in worst) + " |")
    return "\n".join(lines) + "\n"


def main(page: Path) -> None:
    """Run all cases and write the table into the page, between its marks."""
    with tempfile.TemporaryDirectory() as root:
        folders = prepare(Path(root))
        one = run_one(FULL, folders)
        results, _ = run_in_processes(
            "helpers.stage_runs:run_each", timeout=3600, runs=[settings(case, folders) for case in FULL]
        )
    text = page.read_text(encoding="utf-8")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    made = table({case: distance(result, one[case]) for case, result in zip(FULL, results, strict=True)})
    page.write_text(before + BEGIN + made + END + after, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
