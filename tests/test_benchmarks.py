"""The benchmarks' own arithmetic, and that the script for GPUs runs where there is none."""

from __future__ import annotations

import importlib
import json
import operator
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import rlhf_lightning
from helpers.compiling import count_compiling
from helpers.stages import preference_rows, save_llama
from rlhf_lightning.batches import InstructionBatch
from rlhf_lightning.forward import hidden

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of the folder as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def test_training_flops_by_hand(bench: Any) -> None:
    shape = bench("_synthetic").TINY._replace(layers=1, hidden=4, heads=2, kv_heads=1, intermediate=8, vocabulary=10)
    # Queries and output 4 x 4, keys and values 4 x 2, three matrices of 4 x 8.
    assert shape.block_weights == 2 * 16 + 2 * 8 + 3 * 32
    # 6 x weights x 5 tokens, 6 x hidden x vocabulary x 2 targets, 6 x hidden x (2^2 + 3^2).
    work = shape.training_work([2, 3], targets=2)
    assert work.flops == 6 * 144 * 5 + 6 * 40 * 2 + 6 * 4 * 13
    assert work.unhalved == 6 * 144 * 5 + 6 * 40 * 2 + 12 * 4 * 13


def test_warm_up_steps_do_not_count_and_medians_do(bench: Any) -> None:
    compare = bench("compare")
    report = {"seconds": [9.0, 1.0, 3.0], "cpu_seconds": [9.0, 1.0, 3.0], "peak": 4 * 2**30, "libraries": 2**30}
    peer = {**report, "seconds": [9.0, 4.0, 6.0], "peak": 9 * 2**30}
    sides = {"ours": compare.Side("us", [report]), "peer": compare.Side("them", [peer])}
    job = {"stage": "sft", "rows": 2, "new_tokens": 0, "device": "cpu"}
    text = compare.comparison(sides, job, [100, 10, 30], 1)
    assert "| seconds a step, median | 2.000 | 5.000 | 2.50 times as fast |" in text
    assert "| real tokens/s | 10 | 4 | **2.50** times |" in text
    assert "| peak memory of the process | 4.00 GiB | 9.00 GiB | **0.44** |" in text


def test_a_side_that_saw_other_rows_is_found_out(bench: Any) -> None:
    compare = bench("compare")
    sides = {"ours": compare.Side("us", [{"tokens": [5, 7]}]), "peer": compare.Side("them", [{"tokens": [5, 8]}])}
    with pytest.raises(SystemExit, match="them saw"):
        compare.check_tokens(sides, [5, 7])


def test_our_side_reports_the_tokens_of_the_shared_rows(
    tmp_path: Path, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, model = tmp_path / "data.jsonl", save_llama(tmp_path / "model")
    data.write_text("\n".join(map(json.dumps, preference_rows(12))), encoding="utf-8")
    compare, rows, ours = map(bench, ("compare", "_rows", "_ours"))
    arguments = ["--stage", "reward", "--model", model, "--data", str(data), "--steps", "2", "--rows", "4"]
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments, "--max-length", "32"])
    job = compare.make_job(compare.parse(), tmp_path)
    rows.write_rows(job)
    rows.write_reward_model(job)
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["_ours.py", str(tmp_path / "job.json"), str(tmp_path / "report.json")])
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")  # what the script sets is undone afterwards
    ours.main()
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["tokens"] == compare.tokens_of_steps(job)
    assert len(report["seconds"]) == len(report["metrics"]["loss"]) == 2
    assert report["peak"] >= report["libraries"] > 0


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
@pytest.mark.parametrize("side", ["ours", "peer"])
def test_what_ships_is_measured_as_the_recipe_says(
    stage: str, side: str, tmp_path: Path, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare, ours = map(bench, ("compare", "_ours"))
    arguments = ["--stage", stage, "--model", "m", "--data", "d", "--as-shipped"]
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
    options = compare.parse()
    assert compare.find_peer(options) is None  # our best options
    job = ours.sided(compare.make_job(options, tmp_path), ["_ours.py", "job", "report", side])
    chosen, fused = ours.options(getattr(ours, ours.MODULES[stage]), job), ours.optimizer(job).keywords.get("fused")
    expected = ("auto", None) if side == "ours" else (ours.BEST[stage]["max_tokens_per_batch"], True)
    assert (chosen["max_tokens_per_batch"], fused) == expected


def test_switches_are_counted_between_files_that_follow_each_other(bench: Any) -> None:
    structure = bench("structure")
    counts = structure.switches(["a", "a", "b", "a", "b", "c"])
    assert counts == {("a", "b"): 2, ("b", "a"): 1, ("b", "c"): 1}
    text = structure.tell({"sft": ["a", "a", "b", "a", "b", "c"]}, listed=True)
    assert "| sft | 3 | 4 |" in text
    assert "| a | 3 |" in text
    assert "| a | b | 2 |" in text


@pytest.mark.parametrize("step", ["ppo", "sft"])
def test_structure_script_sees_our_files_and_no_others(tmp_path: Path, bench: Any, step: str) -> None:
    files = bench("structure").calls_of_step(step, tmp_path)
    package = Path(rlhf_lightning.__file__).parent
    assert all((package / file).is_file() for file in files)
    assert any(file.startswith("algorithms/") for file in files)
    assert any(file.startswith("functional/") for file in files)
    assert sys.getprofile() is None


# gpu.py

TRIED = ("profile", "syncs", "sft", "reward", "layouts", "optimizer", "head", "ppo", "decoding")
"""Parts of it of each kind; the others are these with another model or batch, or need other libraries."""


def test_gpu_script_runs_on_a_cpu(tmp_path: Path, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, parts, settings_of, peaks = map(bench, ("gpu", "_gpu_parts", "_gpu_settings", "_gpu_peaks"))
    count_compiling(monkeypatch)  # the compiler itself has tests elsewhere
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", pytest.fail)
    settings = settings_of.Settings("cpu", True, "32-true", 1, 0, str(tmp_path))
    for name in ("0.5B", "1B"):
        bench("_synthetic").write_model(settings.shape(name), settings.models(name), with_reward=name == "0.5B")
    results = {part: parts.run_part(part, settings) for part in (*TRIED, "sft-1b", "sft-compiled")}
    limits = peaks.Peaks(0.5, 10.0, "as given")
    text = "\n".join(gpu.tell(results, group, limits) for group in parts.GROUPS)
    assert "\nsft-compiled: the first step took " in text
    for row in (*TRIED[2:4], "sft-1b", "sft-compiled", "ppo", "padded", "unpadded", "packed in rows of 512", "fused"):
        assert f"\n| {row} |" in text
    for row in ("`aten::mm`", "one SFT step", "one PPO iteration", "16 decoded tokens", "cross-entropy, 2,048 words"):
        assert f"\n| {row} |" in text
    for way in ("ours", "ours, compiled", "plain `generate`"):
        assert f"\n| decoding: {way} | 4 |" in text
    made = {part: bench("_gpu_ppo").ppo_module(part, settings) for part in bench("_gpu_ppo").PARTS}
    said = {part: (module.compile_decoding, module.finetune.mode) for part, module in made.items()}
    assert said == {"ppo": (False, "all"), "ppo-compiled": (True, "all"), "ppo-lora": (False, "lora")}


def test_what_failed_is_left_out_with_a_line_and_the_rest_is_told(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    gpu, process = bench("gpu"), bench("_gpu_process")
    device = {"machine": "a machine", "name": "NVIDIA H100 80GB HBM3", "tflops": 700.0, "bandwidth": 3000.0}
    outcomes = {
        "look_at_device": process.Outcome(device),
        "write_models": process.Outcome(None),
        "optimizer": process.Outcome({"seconds": {"fused": 0.002}, "bytes": 3350 * 10**6, "notes": ["a note"]}),
        "head": process.Outcome(None, "RuntimeError: no", True, "Traceback"),
        "vllm": process.Outcome(None, "vllm is not installed"),
    }

    def alone(context: Any, function: Any, arguments: tuple[Any, ...], seconds: float) -> Any:
        return outcomes[arguments[0] if function.__name__ == "measure" else function.__name__]

    monkeypatch.setattr(gpu, "run_alone", alone)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    file = tmp_path / "report.md"
    options = gpu.parse(["--parts", "vllm", "head", "optimizer", "--markdown", str(file)])
    run = gpu.Run(options, str(tmp_path))
    run.run()
    text, errors = capsys.readouterr()
    assert "a machine; bf16-mixed. Peak as its maker states: 989 TFLOP/s, 3,350 GB/s (matrix product here 700" in text
    assert (
        "| fused | 2.00 | 50.0% |\n\na note\n\nhead is left out: RuntimeError: no\n\nvllm is left out: vllm is" in text
    )
    assert file.read_text(encoding="utf-8") == text
    assert "Traceback" in errors
    assert run.failed
    run.ends = 0.0
    assert run.alone("head", None).reason == "the 10 minutes are over"


def test_a_function_in_a_process_of_its_own_says_how_it_ended(bench: Any) -> None:
    process = bench("_gpu_process")
    context = process.make_context(True, ())

    def end_of(function: Any, *arguments: Any, seconds: float = 60) -> tuple[Any, ...]:
        return tuple(process.run_alone(context, function, arguments, seconds))[:3]

    assert end_of(json.loads, "[1]") == ([1], "", False)
    assert end_of(operator.truediv, 1, 0) == (None, "ZeroDivisionError: division by zero", True)
    assert end_of(process.need, "json", "a_package_of_nobody") == (None, "a_package_of_nobody is not installed", False)
    assert end_of(os._exit, 3) == (None, "its process ended with 3", True)
    assert end_of(time.sleep, 60, seconds=1) == (None, "it was ended after 1 s", False)


def test_packed_rows_hold_each_example_once_in_the_first_row_with_room(bench: Any) -> None:
    lengths = torch.tensor([3, 4, 2])
    mask = torch.arange(4) < lengths.unsqueeze(1)
    ids = torch.arange(1, 13).view(3, 4) * mask
    taught = mask & (torch.arange(4) > 0)
    packed = bench("_synthetic").packed(InstructionBatch(ids, mask, taught, torch.arange(3)), 5)
    assert packed.input_ids.tolist() == [[1, 2, 3, 9, 10], [5, 6, 7, 8, 0]]
    assert packed.attention_mask.tolist() == [[True] * 5, [True] * 4 + [False]]
    assert packed.loss_mask.tolist() == [[False, True, True, False, True], [False, True, True, True, False]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert packed.row_ids.tolist() == [[0, 2], [1, -1]]


def test_layouts_compute_the_padding_only_where_they_say_so(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = bench("_gpu_layouts")
    allowed: list[bool] = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", allowed.append)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: allowed.append(None))
    monkeypatch.setattr(hidden, "can_unpad", lambda *_: True)
    peaks: dict[str, int] = {}
    ways = [layouts.Way("padded", True, True), layouts.Way("unpadded", False, False)]
    before, after = layouts.switching(ways, 2, peaks)
    unpads = []
    for step in range(4):
        before(step)
        unpads.append(hidden.can_unpad(None, None))
        after(step)
    assert unpads == [False, False, True, True]
    assert allowed == [True, None, True, False, None, False]
    assert [*peaks] == ["padded, cuDNN on", "unpadded, cuDNN off"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNT", "matrix products"),
        (
            "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x1_tn_align8>",
            "matrix products",
        ),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>", "matrix products"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<cutlass::bfloat16_t>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "attention"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>", "copies and casts"),
        ("Memcpy HtoD (Pageable -> Device)", "copies and casts"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::silu_kernel>", "elementwise"),
        ("void at::native::multi_tensor_apply_kernel<at::native::FusedAdamMathFunctor>", "elementwise"),
        ("void at::native::index_elementwise_kernel<128, 4, at::native::gpu_index_kernel>", "elementwise"),
        ("void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel", "other"),
        ("aten::addmm", "matrix products"),
        ("aten::add", "elementwise"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::cat", "copies and casts"),
        ("aten::empty", "other"),
    ],
)
def test_kernels_are_told_apart_by_their_names(bench: Any, name: str, kind: str) -> None:
    assert bench("_gpu_kernels").kind_of(name) == kind


def test_busy_share_by_hand(bench: Any) -> None:
    kernels = bench("_gpu_kernels")
    times = kernels.kernels_of_trace(
        [
            {"cat": "kernel", "name": "gemm", "dur": 2000.0},
            {"cat": "kernel", "name": "gemm", "dur": 1000.0},
            {"cat": "gpu_memcpy", "name": "Memcpy DtoD", "dur": 1000.0},
            {"cat": "gpu_user_annotation", "name": "Optimizer.step", "dur": 9000.0},  # the kernels in it once more
            {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "dur": 9000.0},
            {"name": "process_name", "ph": "M"},
        ]
    )
    assert times == [("gemm", 3.0, 2), ("Memcpy DtoD", 1.0, 1)]
    text = kernels.tell_profile(times, 16.0, 8.0, "kernel")
    assert "3 kernels, busy for 4.0 of 16.0 ms (25%)" in text
    assert "a step takes 8.0 ms (50%)" in text
    assert "| matrix products | 3.0 | 75.0% |" in text
    assert "| `Memcpy DtoD` | copies and casts | 1 | 1.0 | 25.0% |" in text


def test_waits_are_counted_where_they_are_made(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = bench("_gpu_waits")
    numbers = torch.tensor([1.0, 2.0], requires_grad=True)
    numbers.grad = torch.ones(2)
    with kernels.counted_waits("cpu") as places:
        numbers.sum().item()
        float(numbers.max().detach())
        numbers[numbers > 1].sum().backward()
        torch.where(numbers > 1, numbers, 0)
        (numbers > 1).nonzero()
        torch.optim.AdamW([numbers]).step()  # whose count of steps lies on the host
    assert sum(places.values()) == 5  # the gradient of what a mask has chosen is written through the mask
    assert all(place.startswith("tests/test_benchmarks.py:") for place in places)
    with kernels.counted_waits("cpu") as places:
        (numbers > 1).tolist()
        mask = (numbers > 1).cpu()
        assert mask.any()  # and all else that the host does by itself
        mask.nonzero().tolist()
        int(mask.sum().to(numbers.device))
    assert sum(places.values()) == 3
    assert all(place.startswith("tests/test_benchmarks.py:") for place in places)
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with kernels.counted_waits("cuda") as places:
        for message in ("called a synchronizing CUDA operation", "another", "called a synchronizing CUDA operation"):
            warnings.warn(message, stacklevel=1)
    assert modes == ["warn", "default"]
    assert [*places.values()] == [2]
    assert all(place.startswith("tests/test_benchmarks.py:") for place in places)


def test_decoding_is_told_without_the_first_token(bench: Any) -> None:
    decoding, peaks = bench("_gpu_decoding"), bench("_gpu_peaks")
    shape = bench("_synthetic").TINY._replace(prompts=2)
    mask = torch.ones(2, 3, dtype=torch.bool)
    prompts, model = decoding.Prompts(mask.long(), mask, 5), torch.nn.Linear(4, 2, bias=False)
    row = decoding.row_of("ours", (1.0, 3.0), shape, prompts, model, 2)
    # Four tokens of two prompts in two seconds, the weights and the cache of 6 + 2 * 5 / 2 tokens read for each.
    assert row["tokens_per_second"] == 4
    assert row["bytes_per_second"] == (8 + 11 * shape.cache_elements) * 2 / 0.5
    assert row["in_all"] == 10 / 3
    blank = decoding.row_of("all", (None, 2.0), shape, prompts, model, 2)
    text = decoding.tell({"decoding": {"rows": [row, blank]}}, peaks.Peaks(1.0, 1.0, "as given"))
    assert "| decoding: ours | 2 | 4 |  | 0.0% | 1,000.0 | 3 |" in text
    assert "| decoding: all | 2 |  |  |  |  | 5 |" in text


def test_rates_leave_the_warm_up_out(bench: Any) -> None:
    work = [bench("_synthetic").Work(10.0, 1.0)] * 3
    found = bench("_gpu_training").rates([9.0, 1.0, 3.0], [100, 10, 30], work, 1)
    assert found == {
        "seconds": 2.0,
        "tokens_per_second": 10.0,
        "flops_per_second": 22 / 4,
        "unhalved_per_second": 24 / 4,
    }


@pytest.mark.parametrize(
    ("name", "given", "found"),
    [
        ("NVIDIA H100 PCIe", (None, None), (756, 2000, "as its maker states")),
        ("NVIDIA H100 80GB HBM3", (None, 3000.0), (989, 3000.0, "as its maker states")),
        ("", (None, None), (0.5, 20.0, "as measured here")),
        ("NVIDIA L40S", (100.0, None), (100.0, 864, "as given")),
    ],
)
def test_peaks_are_those_given_else_stated_else_measured(
    bench: Any, name: str, given: tuple[Any, ...], found: tuple[Any, ...]
) -> None:
    assert bench("_gpu_peaks").choose_peaks({"name": name, "tflops": 0.5, "bandwidth": 20.0}, *given) == found


def test_growth_measures_a_point_and_compares_it_with_the_first(bench: Any) -> None:
    growth, synthetic = bench("growth"), bench("_synthetic")
    settings = bench("_gpu_settings").Settings("cpu", True, "32-true", steps=2, warmup=1, folder="")
    shape = synthetic.TINY._replace(rows=2, max_length=16)
    found = growth.point(shape, settings)
    batches, work = synthetic.instruction_batches(shape, 2)
    assert found["tokens"] == float(batches[1].attention_mask.sum())
    assert found["flops"] == work[1].flops
    assert found["seconds"] > 0
    twice = {"seconds": 4.0, "tokens": 20.0, "flops": 8e9, "above": 2**30}
    text = growth.cost("rows", {2: {"seconds": 1.0, "tokens": 10.0, "flops": 2e9, "above": 0}, 4: twice})
    assert "| 4 | 20 | 200,000.0 us | 2.00 | 2.00 | 2 | 1.00 GiB |" in text
    assert "| 10 | 8 | 1.00 GiB | 0.00 GiB | 1342177.28 |" in growth.memory({(10, 8): twice})
