"""What a step asks of the device: its kernels by name and kind, and how often the host waits for it."""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from _gpu_decoding import load, prompts_of
from _gpu_peaks import Peaks
from _gpu_ppo import ppo_module
from _gpu_settings import Part, Result, Settings, fit
from _gpu_training import known
from _gpu_waits import as_on_gpu, counted_waits
from _synthetic import instruction_batches, preference_batches, prompt_batches
from measuring import median, steady, synchronize, table
from torch.profiler import ProfilerActivity, profile

KINDS = (
    ("attention", r"flash|fmha|attention|attn|sdpa"),
    ("matrix products", r"gemm|gemv|cutlass|xmma|nvjet|cublas|splitk|::(add)?b?mm\b|::(mv|linear|mkldnn)|matmul"),
    ("copies and casts", r"copy|memcpy|memset|::(clone|cat)\b|catarray"),
    (
        "elementwise",
        r"elementwise|triton|multi_tensor|foreach|softmax|norm|reduce|::(add|mul|div|sub|exp|silu|pow|sum|mean)",
    ),
)
"""Of kernels on a GPU, or of operators on a CPU, by what stands in their names; the first that fits."""

OTHER = "other"
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
"""What the profiler calls the device's work."""

Times = list[tuple[str, float, int]]
"""Name, milliseconds and number of each kernel."""


def kind_of(name: str) -> str:
    """The kind of a kernel.

    Args:
        name: as the profiler shows it.

    Example:
        >>> kind_of("nvjet_tst_256x128_64x4_2x1_v_bz_TNT"), kind_of("Memcpy DtoD (Device -> Device)")
        ('matrix products', 'copies and casts')
    """
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), OTHER)


def kernels_of_trace(events: list[dict[str, Any]]) -> Times:
    """The device's work in a trace.

    Args:
        events: `traceEvents`, as the profiler exports them, microseconds in them.
    """
    spent: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for event in events:
        if event.get("cat") in ON_DEVICE:
            spent[event["name"]] += event["dur"]
            count[event["name"]] += 1
    return [(name, microseconds / 1e3, count[name]) for name, microseconds in spent.items()]


def times_of(profiler: Any, device: str) -> Times:
    """Kernels that a profiler saw, or on a CPU operators, without those that they called."""
    if device == "cpu":
        return [(event.key, event.self_cpu_time_total / 1e3, event.count) for event in profiler.key_averages()]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        return kernels_of_trace(json.loads(path.read_text(encoding="utf-8"))["traceEvents"])


def sft_module(settings: Settings) -> Any:
    """What is profiled."""
    from rlhf_lightning import SFTModule

    arguments = known(SFTModule, max_tokens_per_batch=settings.shape().micro_tokens)
    return SFTModule(settings.policy(), lr_schedule="constant", warmup_steps=0, **arguments)


def profiled(name: str, settings: Settings) -> Result:
    """Kernels of the last of several steps of SFT; the others tell what the profiler itself costs."""
    on_cpu = settings.device == "cpu"
    profiler = profile(activities=[ProfilerActivity.CPU if on_cpu else ProfilerActivity.CUDA])
    last, wall = settings.steps - 1, [0.0]

    def before(step: int) -> None:
        if step == last:
            synchronize()
            profiler.start()
            wall[0] = time.perf_counter()

    def after(step: int) -> None:
        if step == last:
            wall[0] = time.perf_counter() - wall[0]
            profiler.stop()

    batches = instruction_batches(settings.shape(), 1)[0] * settings.steps  # the same one, for all to be compared
    seconds, _ = fit(sft_module(settings), batches, settings, before, after)
    times = times_of(profiler, settings.device)
    if not times:
        raise RuntimeError("the profiler saw no kernels")
    without = median(steady(seconds[:last], settings.warmup)) if last else wall[0]
    return {"times": times, "wall": 1e3 * wall[0], "without": 1e3 * without, "of": "operator" if on_cpu else "kernel"}


# Waiting


def waits_of_step(module: Any, batches: list[Any], settings: Settings) -> Counter[str]:
    """Waits of the last step: of `training_step`, not of Lightning around it."""
    plain, found = module.training_step, Counter[str]()

    def counted(batch: Any, batch_idx: int) -> Any:
        if batch_idx + 1 < len(batches):
            return plain(batch, batch_idx)
        with counted_waits(settings.device) as places:
            loss = plain(batch, batch_idx)
        found.update(places)
        return loss

    module.training_step = counted
    with as_on_gpu():
        fit(module, batches, settings)
    return found


def waits_of_token(settings: Settings) -> Counter[str]:
    """Waits of 16 decoded tokens: those of 24 less those of 8."""
    from rlhf_lightning.generation.engine import TransformersEngine

    model, tokenizer = load(settings, settings.weight_dtype)
    engine = TransformersEngine(model, tokenizer, compiled=False)
    prompts = prompts_of(settings.shape(), settings.device)
    counts = []
    for new in (8, 8, 24):  # the first tries the model
        with settings.autocast(), as_on_gpu(), counted_waits(settings.device) as places:
            engine.generate(prompts.ids, prompts.mask, prompts.sampling(new))
        counts.append(places)
    return counts[2] - counts[1]


def syncs(name: str, settings: Settings) -> Result:
    """How often the host waits in each kind of step."""
    from rlhf_lightning import RewardModule

    shape, steps = settings.shape(), 2
    reward = RewardModule(
        settings.policy(),
        lr_schedule="constant",
        warmup_steps=0,
        **known(RewardModule, max_tokens_per_batch=shape.micro_tokens),
    )
    found = {
        "one SFT step": waits_of_step(sft_module(settings), instruction_batches(shape, steps)[0], settings),
        "one reward-model step": waits_of_step(reward, preference_batches(shape, steps)[0], settings),
        "one PPO iteration": waits_of_step(ppo_module("ppo", settings), prompt_batches(shape, steps), settings),
        "16 decoded tokens": waits_of_token(settings),
    }
    return {"waits": {title: places.most_common() for title, places in found.items()}}


PARTS = {"profile": Part(profiled), "syncs": Part(syncs)}


# Telling


def tell(results: dict[str, Result], peaks: Peaks) -> str:
    """Tables of both."""
    text = []
    if "profile" in results:
        text.append(tell_profile(**{name: results["profile"][name] for name in ("times", "wall", "without", "of")}))
    if "syncs" in results:
        text.append(tell_waits(results["syncs"]["waits"]))
    return "\n".join(text)


def tell_profile(times: Times, wall: float, without: float, of: str) -> str:
    """The kinds, and the ten that took longest.

    Args:
        times: of the kernels or operators, in milliseconds.
        wall: milliseconds of the step.
        without: the same without the profiler.
        of: what they are called.
    """
    busy, started = sum(time for _, time, _ in times), sum(count for *_, count in times)
    first = f"One SFT step: {started:,} {of}s, busy for {busy:,.1f} of {wall:,.1f} ms ({busy / wall:.0%}); without the "
    first += f"profiler a step takes {without:,.1f} ms ({busy / without:.0%}).\n"
    rows = []
    for kind in (*(kind for kind, _ in KINDS), OTHER):
        spent = sum(milliseconds for name, milliseconds, _ in times if kind_of(name) == kind)
        rows.append([kind, f"{spent:,.1f}", f"{spent / busy:.1%}"])
    text = [first, table([f"kind of {of}", "ms", "share"], rows)]
    top = sorted(times, key=lambda entry: -entry[1])[:10]
    rows = [
        [f"`{name[:70].replace('|', ' ')}`", kind_of(name), f"{count:,}", f"{spent:,.1f}", f"{spent / busy:.1%}"]
        for name, spent, count in top
    ]
    return "\n".join([*text, table([of, "kind", "times", "ms", "share"], rows)])


def tell_waits(waits: dict[str, list[tuple[str, int]]]) -> str:
    """How often, and the lines that wait most often.

    Args:
        waits: by what was run, the lines with their counts, the most frequent first.
    """
    rows = []
    for title, places in waits.items():
        shown = ", ".join(f"{place} ({count})" for place, count in places[:5])
        rows.append([title, f"{sum(count for _, count in places):,}", shown])
    return table(["the host waits for the device in", "times", "most often in"], rows)
