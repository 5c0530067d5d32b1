"""One side of the comparison of decoding: our sampling, or plain `generate` of transformers, in a process of its own.

    python benchmarks/_generate.py JOB REPORT ours|peer

Run by compare.py. One step answers all prompts once; both sides draw exactly `new_tokens` tokens at temperature 1.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from measuring import Recorder
from transformers import AutoModelForCausalLM, AutoTokenizer

Step = Callable[[], torch.Tensor]


def left_padded(rows: list[list[int]], filler: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as ids and mask, `[B, P]`."""
    width = max(map(len, rows))
    ids = [[filler] * (width - len(row)) + row for row in rows]
    mask = [[False] * (width - len(row)) + [True] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def our_step(job: dict[str, Any], model: Any, tokenizer: Any, ids: torch.Tensor, mask: torch.Tensor) -> Step:
    """Sampling as our rollouts do it."""
    from rlhf_lightning import Sampling
    from rlhf_lightning.generation.engine import TransformersEngine

    sampling = Sampling(max_new_tokens=job["new_tokens"], min_new_tokens=job["new_tokens"])
    engine = TransformersEngine(model, tokenizer, **job["ours_options"])
    return lambda: engine.generate(ids, mask, sampling).response_ids


def plain_step(job: dict[str, Any], model: Any, tokenizer: Any, ids: torch.Tensor, mask: torch.Tensor) -> Step:
    """`generate` as it comes, told to sample from the model's own distribution."""
    new = job["new_tokens"]
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": tokenizer.pad_token_id}

    def step() -> torch.Tensor:
        with torch.no_grad():
            whole = model.generate(
                ids, attention_mask=mask.long(), max_new_tokens=new, min_new_tokens=new, max_length=None, **options
            )
        return torch.as_tensor(whole[:, ids.shape[1] :])

    return step


def main() -> None:
    """Answer the prompts `steps` times and report."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    side, device = sys.argv[3], job["device"]
    if side == "ours":
        import rlhf_lightning.generation.engine  # noqa: F401  its libraries are to be counted as such
    recorder = Recorder()
    dtype = torch.bfloat16 if job["precision"].startswith("bf16") else torch.float32
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    lines = Path(job["rows_file"]).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)["input_ids"] for line in lines][: job["rows"]]
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    torch.manual_seed(job["seed"])
    step = (our_step if side == "ours" else plain_step)(job, model, tokenizer, *left_padded(rows, filler, device))
    recorder.start()
    for _ in range(job["steps"]):
        produced = step()
        recorder.end_step()
        recorder.tokens.append(sum(map(len, rows)))
        recorder.note(new_tokens=produced.numel())
    name = "rlhf_lightning" if side == "ours" else f"transformers {transformers.__version__}"
    recorder.write(sys.argv[2], name=name, settings={"dtype": str(dtype)})


if __name__ == "__main__":
    main()
