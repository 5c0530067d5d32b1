"""How much of a device our stages use: SFT, reward model, PPO and decoding of a 0.5B model, on synthetic rows.

    python benchmarks/gpu.py [--device cpu --tiny]

Needs torch, transformers, pytorch-lightning, peft, jsonargparse and protobuf, and downloads nothing: the model is
random, of Llama's shape, and its tokenizer a list of words. Each part runs in a process of its own. Prints Markdown.
Linux only.

Model FLOP utilisation is the arithmetic that the maths of a step asks for, by the time it took and the device's peak:
6 x (weights in the matrices of the blocks) for each real token, 6 x hidden x vocabulary for each token that is taught,
and 6 x layers x hidden x L^2 for the causal attention of an example of L tokens. Padding, recomputation and the logits
of tokens that are not taught are no part of it, and what both sides of a pair share counts once. The share of bandwidth
is what a decoding step must read at the least, the weights once and the keys and values of the tokens so far, by its
time and the device's bandwidth.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from _synthetic import FULL, TINY, Shape, instruction_batches, preference_batches, prompt_batches, write_model
from measuring import (
    GIB,
    arguments_of,
    between,
    device_peak_memory,
    machine,
    median,
    peak_memory,
    steady,
    synchronize,
    table,
)

PARTS = ("sft", "reward", "ppo", "ppo-lora", "decoding")
PEAKS = {
    "B200": (2250, 8000),
    "H200": (989, 4800),
    "H100 PCIe": (756, 2000),
    "H100": (989, 3350),
    "A100": (312, 2039),
    "L40S": (362, 864),
    "L4": (121, 300),
    "A10": (125, 600),
    "4090": (165, 1008),
    "3090": (71, 936),
}
"""Dense bfloat16 TFLOP/s and GB/s by a part of the device's name, as the makers state them; the first that fits."""


# The parts, each in a process of its own


def known(module: type, **wanted: Any) -> dict[str, Any]:
    """Those arguments that the module has."""
    names = arguments_of(module)
    return {name: value for name, value in wanted.items() if name in names}


def fit(module: Any, batches: list[Any], options: argparse.Namespace) -> tuple[list[float], list[dict[str, float]]]:
    """Train on the batches; seconds of each step and what it logged."""
    import pytorch_lightning as pl

    ends: list[float] = []
    logged: list[dict[str, float]] = []

    class Clock(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            ends.append(time.perf_counter())

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *arguments: Any) -> None:
            logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})
            synchronize()
            ends.append(time.perf_counter())

    trainer = pl.Trainer(
        max_steps=len(batches),
        accelerator="gpu" if options.device == "cuda" else "cpu",
        devices=1,
        precision=options.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Clock()],
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return between(ends), logged


def supervised(part: str, shape: Shape, policy: str, options: argparse.Namespace) -> dict[str, Any]:
    """SFT or the reward model: tokens per second and model FLOP utilisation."""
    from rlhf_lightning import RewardModule, SFTModule

    kind: Any = SFTModule if part == "sft" else RewardModule
    batches, work = (instruction_batches if part == "sft" else preference_batches)(shape, options.steps)
    arguments = known(kind, max_tokens_per_batch=shape.micro_tokens)
    module = kind(policy, lr_schedule="constant", warmup_steps=0, **arguments)
    seconds, _ = fit(module, batches, options)
    masks = ("attention_mask", "chosen_mask", "rejected_mask")
    tokens = [sum(int(getattr(batch, name).sum()) for name in masks if hasattr(batch, name)) for batch in batches]
    of_steps = list(zip(seconds, tokens, [each.flops for each in work], strict=True))[options.warmup :]
    time_spent = sum(step[0] for step in of_steps)
    return {
        "seconds": median(steady(seconds, options.warmup)),
        "tokens_per_second": sum(step[1] for step in of_steps) / time_spent,
        "flops_per_second": sum(step[2] for step in of_steps) / time_spent,
    }


def reinforced(part: str, shape: Shape, policy: str, reward: str, options: argparse.Namespace) -> dict[str, Any]:
    """PPO: where the time of an iteration goes."""
    import rlhf_lightning
    from rlhf_lightning import PPOModule, Sampling

    lora = {"finetune": rlhf_lightning.FineTune(mode="lora")} if part == "ppo-lora" else {}
    compiled = {"compile_decoding": True} if options.compile_decoding else {}
    module = PPOModule(
        policy,
        reward,
        sampling=Sampling(max_new_tokens=shape.new_tokens, min_new_tokens=shape.new_tokens),
        rollout_batch_size=shape.prompts,
        minibatch_size=shape.prompts,
        ppo_epochs=1,
        lr_schedule="constant",
        **lora,
        **compiled,
        **known(PPOModule, max_tokens_per_batch=shape.micro_tokens),
    )
    seconds, logged = fit(module, prompt_batches(shape, options.steps), options)
    parts = ("generating", "scoring", "updating")
    split = {name: median([step[f"train/seconds_{name}"] for step in logged[options.warmup :]]) for name in parts}
    not_so = compiling_failed(module.rollout_engine) if options.compile_decoding else ""
    notes = [f"{part}: {not_so}"] if not_so else []
    return {"seconds": median(steady(seconds, options.warmup)), "split": split, "notes": notes}


def batched_continuously(model: Any, rows: list[list[int]], new: int) -> None:
    """The same tokens by transformers' continuous batching, which is left with its own choices but for memory."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    lengths = {"max_new_tokens": new, "eos_token_id": -1, "pad_token_id": 0}
    config = GenerationConfig(do_sample=True, top_k=0, **lengths)
    share = ContinuousBatchingConfig(max_memory_percent=0.3 if model.device.type == "cuda" else 0.05)  # allocated whole
    with torch.no_grad():
        answers = model.generate_batch(rows, config, share, progress_bar=False)
    found = {len(answer.generated_tokens) for answer in answers.values()}
    if len(answers) != len(rows) or found != {new}:
        raise RuntimeError(f"{len(answers)} of {len(rows)} prompts were answered, with {sorted(found)} tokens")


def decoding(shape: Shape, policy: str, options: argparse.Namespace) -> dict[str, Any]:
    """Sampling by ours and by plain `generate`, by turns; new tokens per second and bytes read."""
    from transformers import AutoModelForCausalLM

    from rlhf_lightning import Sampling
    from rlhf_lightning.generation.engine import TransformersEngine
    from rlhf_lightning.models.tokenizer import load_tokenizer

    dtype = torch.float32 if options.precision == "32-true" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=dtype).to(options.device).eval()
    tokenizer, new = load_tokenizer(policy), shape.new_tokens
    batch = prompt_batches(shape, 1)[0]
    ids, mask = batch.prompt_ids.to(options.device), batch.prompt_mask.to(options.device)
    sampling = Sampling(max_new_tokens=new, min_new_tokens=new)

    @torch.no_grad()
    def plain() -> Any:
        lengths = {"min_new_tokens": new, "max_new_tokens": new}
        return model.generate(ids, attention_mask=mask.long(), do_sample=True, top_k=0, pad_token_id=0, **lengths)

    ours, compiled = (TransformersEngine(model, tokenizer, compiled=compiled) for compiled in (False, True))
    rows = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
    ways = {
        "ours": lambda: ours.generate(ids, mask, sampling),
        "ours, compiled": lambda: compiled.generate(ids, mask, sampling),
        "plain": plain,
        "continuous batching": lambda: batched_continuously(model, rows, new),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    notes: list[str] = []
    for _ in range(options.steps):
        for name in [*times]:
            began = time.perf_counter()
            try:
                ways[name]()
            except Exception as error:
                if name != "continuous batching":
                    raise
                notes.append(f"{name} is left out: {error}")  # the library's, and young
                del times[name]
                continue
            synchronize()
            times[name].append(time.perf_counter() - began)
    if not_so := compiling_failed(compiled):
        notes.append(f"decoding: {not_so}")
        del times["ours, compiled"]
    weights = sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name)
    cached = shape.cache_elements * (float(mask.sum()) + shape.prompts * new / 2)
    size = torch.finfo(dtype).bits // 8
    medians = {name: median(steady(seconds, options.warmup)) for name, seconds in times.items()}
    return {
        "tokens_per_second": {name: shape.prompts * new / seconds for name, seconds in medians.items()},
        "bytes_per_second": {name: (weights + cached) * size * new / seconds for name, seconds in medians.items()},
        "notes": notes,
    }


def compiling_failed(engine: Any) -> str:
    """Why an engine's compiled step is not what was measured; nothing if it is."""
    if not engine.compiled_step.trusted:
        return f"the step was not compiled: {engine.compiled_step.reason or 'it was never needed'}"
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    return f"CUDA graphs were skipped {skipped} times" if skipped else ""


def measured_peaks(device: str, precision: str, tiny: bool) -> tuple[float, float]:
    """TFLOP/s of a large matrix product and GB/s of a large copy, as this device really does them."""
    dtype = torch.float32 if precision == "32-true" else torch.bfloat16
    size = 512 if tiny else 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn((2 if tiny else 256) * 2**20, device=device)
    target = torch.empty_like(source)

    def best(work: Any) -> float:
        times = []
        for _ in range(4):
            synchronize()
            began = time.perf_counter()
            work()
            synchronize()
            times.append(time.perf_counter() - began)
        return min(times)

    flops = 2 * size**3 / best(lambda: torch.mm(a, b))
    return flops / 1e12, 2 * source.numel() * 4 / best(lambda: target.copy_(source)) / 1e9


# Telling


def stated_peaks(options: argparse.Namespace, measured: tuple[float, float]) -> tuple[float, float, str]:
    """Peaks to compare with, and whose word that is."""
    name = torch.cuda.get_device_name() if options.device == "cuda" else ""
    flops, bandwidth = next((peaks for key, peaks in PEAKS.items() if key in name), measured)
    source = "as measured here" if (flops, bandwidth) == measured else "as its maker states"
    if options.peak_tflops:
        flops, source = options.peak_tflops, "as given"
    return flops, options.peak_bandwidth or bandwidth, source


def tell(results: dict[str, dict[str, Any]], options: argparse.Namespace, measured: tuple[float, float]) -> str:
    """All parts as Markdown."""
    flops, bandwidth, source = stated_peaks(options, measured)
    text = [
        f"{machine()}; {options.precision}. Peak {source}: {flops:.3g} TFLOP/s, {bandwidth:,.3g} GB/s "
        f"(matrix product here {measured[0]:.3g} TFLOP/s, copy {measured[1]:,.3g} GB/s).\n"
    ]
    memory = {part: f"{(result['device_peak'] or result['peak']) / GIB:.2f} GiB" for part, result in results.items()}
    rows = [
        [
            part,
            f"{result['seconds']:.3f}",
            f"{result['tokens_per_second']:,.0f}",
            f"{result['flops_per_second'] / 1e12:.3g}",
            f"{result['flops_per_second'] / 1e12 / flops:.1%}",
            memory[part],
        ]
        for part, result in results.items()
        if "flops_per_second" in result
    ]
    head = ["training", "seconds a step", "real tokens/s", "TFLOP/s", "of the peak", "peak memory"]
    text.append(table(head, rows) if rows else "")
    rows = [
        [part, f"{result['seconds']:.3f}", *(f"{each:.3f}" for each in result["split"].values()), memory[part]]
        for part, result in results.items()
        if "split" in result
    ]
    head = ["one iteration", "seconds", "generating", "scoring", "updating", "peak memory"]
    text.append(table(head, rows) if rows else "")
    if "decoding" in results:
        result = results["decoding"]
        rates, read = result["tokens_per_second"], result["bytes_per_second"]
        rows = [
            [name, f"{rates[name]:,.0f}", f"{rates[name] / rates['plain']:.2f}", f"{read[name] / 1e9 / bandwidth:.1%}"]
            for name in rates
        ]
        text.append(table(["decoding", "new tokens/s", "to plain `generate`", "of the bandwidth"], rows))
    text += [note for result in results.values() for note in result.get("notes", [])]
    return "\n".join(part for part in text if part)


def run_part(part: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One part, in this process."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    shape = TINY if options.tiny else FULL
    policy, reward = str(folder / "policy"), str(folder / "reward")
    torch.manual_seed(0)
    if part == "decoding":
        result = decoding(shape, policy, options)
    elif part.startswith("ppo"):
        result = reinforced(part, shape, policy, reward, options)
    else:
        result = supervised(part, shape, policy, options)
    return {**result, "peak": peak_memory(), "device_peak": device_peak_memory()}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand weights, to try the script")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--precision", choices=["bf16-mixed", "bf16-true", "32-true"], default="bf16-mixed")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2, help="first steps that do not count (%(default)s)")
    parser.add_argument("--compile-decoding", action="store_true", help="in PPO; decoding is measured both ways anyway")
    parser.add_argument("--peak-tflops", type=float, help="of the device; by default by its name, or measured")
    parser.add_argument("--peak-bandwidth", type=float, help="the same in GB/s")
    parser.add_argument("--markdown", type=Path, help="append the report to this file too")
    parser.add_argument("--part-in", type=Path, help=argparse.SUPPRESS)  # set for the process of one part
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; try the script with --device cpu --tiny")
    return options


def main() -> None:
    """Make the model, run each part in its process, and tell."""
    options = parse()
    if options.part_in:
        print("RESULT" + json.dumps(run_part(options.parts[0], options.part_in, options)))
        return
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        write_model(TINY if options.tiny else FULL, Path(temporary))
        passed = [f"--{name}={getattr(options, name)}" for name in ("device", "precision", "steps", "warmup")]
        passed += [f"--{name}" for name in ("tiny", "compile-decoding") if getattr(options, name.replace("-", "_"))]
        for part in options.parts:
            command = [sys.executable, __file__, *passed, "--part-in", temporary, "--parts", part]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode:
                print(f"{part} failed:\n{done.stdout[-3000:]}", file=sys.stderr)
                continue
            results[part] = json.loads(done.stdout.rpartition("RESULT")[2].splitlines()[0])
    text = tell(results, options, measured_peaks(options.device, options.precision, options.tiny))
    print(text)
    if options.markdown:
        with options.markdown.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
