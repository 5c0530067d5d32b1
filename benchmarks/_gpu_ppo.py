"""PPO from prompts to updates: where the time of an iteration goes, with the decoding step compiled and as it is."""

from __future__ import annotations

from typing import Any

from _gpu_peaks import Peaks
from _gpu_settings import Part, Result, Settings, fit, memory_text
from _gpu_training import known
from _synthetic import prompt_batches
from measuring import median, steady, table

SPLIT = ("generating", "scoring", "updating")


def compiling_failed(engine: Any) -> str:
    """Why an engine's compiled step is not what was measured; nothing if it is."""
    import torch

    if not engine.compiled_step.trusted:
        return f"the step was not compiled: {engine.compiled_step.reason or 'it was never needed'}"
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    return f"CUDA graphs were skipped {skipped} times" if skipped else ""


def ppo_module(name: str, settings: Settings) -> Any:
    """PPO with all weights trained, or with LoRA, and one update of the whole rollout.

    Args:
        name: of the part.
        settings: of the model.
    """
    from rlhf_lightning import FineTune, PPOModule, Sampling

    shape = settings.shape()
    return PPOModule(
        settings.policy(),
        str(settings.models() / "reward"),
        sampling=Sampling(max_new_tokens=shape.new_tokens, min_new_tokens=shape.new_tokens),
        rollout_batch_size=shape.prompts,
        minibatch_size=shape.prompts,
        ppo_epochs=1,
        lr_schedule="constant",
        finetune=FineTune(mode="lora" if name == "ppo-lora" else "all"),
        compile_decoding=name == "ppo-compiled",
        **known(PPOModule, max_tokens_per_batch=shape.micro_tokens),
    )


def iterations(name: str, settings: Settings) -> Result:
    """Seconds of an iteration and of its parts."""
    module = ppo_module(name, settings)
    seconds, logged = fit(module, prompt_batches(settings.shape(), settings.fewer_steps), settings)
    counted = logged[settings.warmup :]
    split = {part: median([step[f"train/seconds_{part}"] for step in counted]) for part in SPLIT}
    not_so = compiling_failed(module.rollout_engine) if name == "ppo-compiled" else ""
    notes = [f"{name}: {not_so}"] if not_so else []
    return {"seconds": median(steady(seconds, settings.warmup)), "split": split, "first": seconds[0], "notes": notes}


PARTS = {name: Part(iterations) for name in ("ppo", "ppo-compiled", "ppo-lora")}


def tell(results: dict[str, Result], peaks: Peaks) -> str:
    """One table."""
    rows = [
        [
            part,
            f"{result['seconds']:.3f}",
            *(f"{result['split'][each]:.3f}" for each in SPLIT),
            f"{result['first']:.1f}",
            memory_text(result),
        ]
        for part, result in results.items()
    ]
    return table(["one iteration", "seconds", *SPLIT, "the first", "peak memory"], rows)
