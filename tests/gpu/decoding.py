"""On a GPU, too, the compiled decoding step, a graph there, answers as the plain one does, whatever was trained.

    PYTHONPATH=src python tests/gpu/decoding.py [--device cpu]

Needs torch, transformers, pytorch-lightning, peft, jsonargparse and protobuf. All weights, and LoRA adapters, which are
merged in place for the graph, are changed between rollouts. Prints the largest difference of a log-probability in
float32, and ends with 1 if one is above the tolerance, if a token differs, or if the step was given up.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from _synthetic import TINY, new_model, new_tokenizer, padded

from rlhf_lightning import FineTune, Sampling
from rlhf_lightning.generation.engine import TransformersEngine
from rlhf_lightning.models.lora import add_adapter

ROLLOUTS, TOLERANCE = 5, 1e-4
"""Times that is decoded: a graph is replayed from the third token on, and weights are others in each rollout."""


def distances(device: str, lora: bool) -> list[float]:
    """Decode both ways, with other weights each time; how far log-probabilities are apart, infinite for other tokens.

    Args:
        device: `cuda` or `cpu`.
        lora: change adapters alone.
    """
    model, tokenizer = new_model(TINY, device).eval(), new_tokenizer(TINY.vocabulary)
    if lora:
        add_adapter(model, FineTune("lora", rank=4))
    plain, compiled = (TransformersEngine(model, tokenizer, TINY.prompts, compiled=each) for each in (False, True))
    ids, mask = (part.to(device) for part in padded(random.Random(0), [9, 7, 12, 5], TINY.vocabulary, left=True))
    found = []
    for rollout in range(ROLLOUTS):
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if not lora or "lora_" in name:
                    weight.add_(0.02 * torch.randn_like(weight))
        said = [
            engine.generate(
                ids,
                mask,
                Sampling(max_new_tokens=TINY.new_tokens),
                generator=torch.Generator(device).manual_seed(rollout),
                with_logprobs=True,
            )
            for engine in (plain, compiled)
        ]
        same = torch.equal(said[0].response_ids, said[1].response_ids)
        assert said[0].logprobs is not None
        assert said[1].logprobs is not None
        found.append(float((said[0].logprobs - said[1].logprobs).abs().max()) if same else float("inf"))
    assert compiled.compiled_step is not None
    return found if compiled.compiled_step.trusted else [float("inf")]


def main() -> int:
    """Run, compare, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; try the script with --device cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    worst = 0.0
    for lora in (False, True):
        found = distances(options.device, lora)
        worst = max(worst, *found)
        print(f"{'adapters' if lora else 'all weights'}: {', '.join(f'{each:.0e}' for each in found)}")
    return int(not worst <= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
