"""The same gradient, clipping, schedule and step count on every strategy; real DeepSpeed, real processes."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.demos.boring_classes import BoringModel
from pytorch_lightning.strategies import DeepSpeedStrategy as LightningDeepSpeedStrategy
from pytorch_lightning.strategies import FSDPStrategy, SingleDeviceStrategy

import rlhf_lightning
from helpers.cli_runs import environment
from helpers.distributed import run_in_processes
from helpers.strategy_cases import (
    CLIPPED_ADAM,
    HALVES,
    POISONS,
    UNCLIPPED_SGD,
    UNEVEN,
    WHOLE,
    alone,
    assert_same_on_both,
    assert_same_training,
    assert_stopped,
    distance,
    runs_of,
)
from helpers.strategy_runs import Runs, fit, save_model, validate
from rlhf_lightning.errors import UserError
from rlhf_lightning.runs.checkpoint_files import check_whole, files_of, read_manifest
from rlhf_lightning.training import DeepSpeedStrategy, GradientAccumulation
from rlhf_lightning.training.checkpoint_folders import plain_loading

pytestmark = pytest.mark.matrix

CONFIGS = Path(__file__).parents[2] / "configs" / "trainer"
OPTIMIZERS = {"clipped AdamW": CLIPPED_ADAM, "unclipped SGD": UNCLIPPED_SGD}
SPLITS = {
    "ddp whole": {"name": "ddp", **WHOLE},
    "ddp halves": {"name": "ddp", **HALVES},
    "ddp uneven": {"name": "ddp", **UNEVEN},
    "zero0 halves": {"name": "zero0", **HALVES},
    "zero1 halves": {"name": "zero1", **HALVES},
    "zero1 uneven": {"name": "zero1", **UNEVEN},
    "zero2 halves": {"name": "zero2", **HALVES},
    "zero2 uneven": {"name": "zero2", **UNEVEN},
    "zero2-offload uneven": {"name": "zero2-offload", **UNEVEN},
    "zero3 halves": {"name": "zero3", **HALVES},
    "zero3-offload uneven": {"name": "zero3-offload", **UNEVEN},
    "zero3 uneven": {"name": "zero3", **UNEVEN},
}
# Uneven splits differ from halves in what may go wrong with the scale, which plain SGD shows best.
SPLITS_AND_OPTIMIZERS = [
    (split, optimizer)
    for split in SPLITS
    for optimizer in OPTIMIZERS
    if optimizer == "unclipped SGD" or not split.endswith("uneven")
]
DISTRIBUTED = ["ddp", "zero0", "zero1", "zero2", "zero3"]
_PARTS = [f"checkpoint/zero_pp_rank_{rank}_mp_rank_00" for rank in (0, 1)]
SAVED = {
    "zero2": ["checkpoint/mp_rank_00_model_states.pt", *(f"{part}_optim_states.pt" for part in _PARTS)],
    "zero3": [f"{part}_{what}_states.pt" for part in _PARTS for what in ("model", "optim")],
}
"""Files of tensors in DeepSpeed's checkpoints."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tmp_path_factory.mktemp(name) for name in SAVED}


@pytest.fixture(scope="module")
def two_processes(folder: str, checkpoints: dict[str, Path]) -> dict[Any, list[dict[str, Any]]]:
    """Every two-process run of this file, done in one start of two processes; name -> result of each rank."""
    runs: dict[Any, dict[str, Any]] = {
        (split, optimizer): SPLITS[split] | OPTIMIZERS[optimizer] for split, optimizer in SPLITS_AND_OPTIMIZERS
    }
    for name in DISTRIBUTED:
        runs |= runs_of(name, "two passes", *POISONS)
    for name in ["ddp", "zero0", "zero2", "zero3"]:
        runs |= runs_of(name, "bf16", "validate")
    bf16 = {"name": "zero2", "trainer_options": {"precision": "bf16-mixed", "limit_train_batches": 2}, **HALVES}
    runs["zero2", "bf16 gradient"] = bf16 | {"poison": "gradient"}
    runs["zero2", "bf16 one batch"] = bf16 | {"trainer_options": bf16["trainer_options"] | {"limit_train_batches": 1}}
    for name in ["zero2", "zero3"]:
        path = str(checkpoints[name])
        training = {"name": name, "trainer_options": {"max_epochs": 2}, **HALVES, **CLIPPED_ADAM}
        runs[name, "two epochs"] = training | {"checkpoints": path}
        first = f"{path}/epoch=0.ckpt"
        Path(f"{first}.partial").mkdir()
        Path(f"{first}.partial", "left.pt").write_text("by a run that was killed while it wrote")
        runs[name, "resumed"] = training | {"resume": first}
        in_bf16 = {"trainer_options": {"precision": "bf16-mixed"}}
        for other, changes in (("precision", in_bf16), ("stage", {"name": "zero1"})):
            runs[name, "other", other] = training | changes | {"resume": first}
        for file in [*SAVED[name], "latest"]:
            for how in ("code", "damage", "missing") if file != "latest" else ("damage", "missing"):
                runs[name, "spoil", how, file] = {"task": "spoil", "checkpoint": first, "file": file, "how": how}
                runs[name, how, file] = {"task": "check", "checkpoint": first, "settings": None}
        runs[name, "spoil"] = {"task": "spoil", "checkpoint": first, "file": SAVED[name][0], "how": "code"}
        runs[name, "resumed from code"] = training | {"resume": first}
        runs[name, "resumed from a file"] = training | {"resume": f"{first}/latest"}
    for name in ["ddp", "zero2"]:
        runs |= runs_of(name, "forgetful")
    runs["zero2", "self-clipping"] = {"module_class": "SelfClippingModule", "name": "zero2", **WHOLE}
    runs["zero3", "unannounced"] = {"module_class": "UnannouncedModule", "name": "zero3", **WHOLE}
    ranks = run_in_processes("helpers.strategy_runs:run_all", runs=[run | {"folder": folder} for run in runs.values()])
    return {key: [results[i] for results in ranks] for i, key in enumerate(runs)}


@pytest.fixture(scope="module")
def one_process(folder: str) -> Any:
    """In this process."""
    return alone(folder)


def test_references_are_sharp_enough_to_tell_wrong_scales_apart(one_process: Any, folder: str) -> None:
    clipped, free = one_process(**CLIPPED_ADAM), one_process(**UNCLIPPED_SGD)

    assert min(clipped["norms"]) > 2 * CLIPPED_ADAM["gradient_clip_val"]
    assert clipped["rates"] == pytest.approx([1e-2 / 2, 1e-2 / 3, 1e-2 / 4])
    assert free["global_step"] == 3
    start = fit(folder=folder, micro_sizes=[8], trainer_options={"limit_train_batches": 0})
    assert start["global_step"] == 0
    first = fit(folder=folder, micro_sizes=[8], trainer_options={"limit_train_batches": 1})
    assert distance(first, free) > 1e-2


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("micro_sizes", [[4, 4, 4], [2, 2, 2], [8, 3, 1]])
def test_one_process_is_the_same_for_every_split(
    one_process: Any, folder: str, micro_sizes: list[int], optimizer: str
) -> None:
    result = fit(folder=folder, micro_sizes=micro_sizes, **OPTIMIZERS[optimizer])

    assert_same_training(result, one_process(**OPTIMIZERS[optimizer]))


@settings(max_examples=6, deadline=None, derandomize=True)
@given(micro_sizes=st.lists(st.integers(1, 8), min_size=3, max_size=3))
def test_any_split_gives_the_same_weights(one_process: Any, folder: str, micro_sizes: list[int]) -> None:
    assert_same_training(fit(folder=folder, micro_sizes=micro_sizes, **CLIPPED_ADAM), one_process(**CLIPPED_ADAM))


@pytest.mark.parametrize(("split", "optimizer"), SPLITS_AND_OPTIMIZERS)
def test_two_processes_are_the_same_as_one(two_processes: Any, one_process: Any, split: str, optimizer: str) -> None:
    assert_same_on_both(two_processes[split, optimizer], one_process(**OPTIMIZERS[optimizer]))


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_several_steps_inside_one_training_step(two_processes: Any, one_process: Any, name: str) -> None:
    expected = one_process(passes=2, **CLIPPED_ADAM)

    assert expected["global_step"] == 6
    assert_same_training(two_processes[name, "two passes"][0], expected, atol=5e-6)


@pytest.mark.parametrize("split", ["ddp halves", "ddp uneven"])
def test_ddp_reduces_gradients_once_per_optimizer_step(two_processes: Any, split: str) -> None:
    assert two_processes[split, "unclipped SGD"][0]["reductions"] == 3


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("name", DISTRIBUTED)
def test_non_finite_on_one_rank_stops_every_rank_with_weights_untouched(
    two_processes: Any, one_process: Any, name: str, poison: str
) -> None:
    before = one_process(trainer_options={"limit_train_batches": 1})
    assert_stopped(two_processes[name, poison], poison, before)


@pytest.mark.parametrize("poison", POISONS)
def test_non_finite_on_one_process(one_process: Any, poison: str) -> None:
    before, result = one_process(trainer_options={"limit_train_batches": 1}), one_process(poison=poison)

    assert "after 1 optimizer steps, in rows of rank 0; the weights were not changed" in result["error"]
    assert distance(result, before) == 0


@pytest.mark.parametrize("name", ["ddp", "zero0", "zero2", "zero3"])
def test_bfloat16_stays_close(two_processes: Any, one_process: Any, name: str) -> None:
    expected, result = one_process(**CLIPPED_ADAM), two_processes[name, "bf16"][0]

    assert result["error"] == ""
    assert result["global_step"] == 3
    assert result["norms"] == pytest.approx(expected["norms"], rel=0.05)
    assert result["losses"] == pytest.approx(expected["losses"], rel=0.02)


def test_bfloat16_refuses_a_bad_gradient_too(two_processes: Any) -> None:
    result, before = two_processes["zero2", "bf16 gradient"][0], two_processes["zero2", "bf16 one batch"][0]

    assert "the gradient is not finite after 1 optimizer steps" in result["error"]
    assert distance(result, before) == 0


@pytest.mark.parametrize("name", ["ddp", "zero0", "zero2", "zero3"])
def test_validation_without_training(two_processes: Any, folder: str, name: str) -> None:
    expected = validate("auto", folder=folder, micro_sizes=[8])

    for result in two_processes[name, "validate"]:
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_resuming_changes_nothing_though_frozen_weights_are_not_saved(two_processes: Any, name: str) -> None:
    whole, resumed = two_processes[name, "two epochs"][0], two_processes[name, "resumed"][0]

    assert resumed["error"] == ""
    assert whole["global_step"] == resumed["global_step"] == 6
    assert resumed["norms"] == whole["norms"][3:]
    assert resumed["rates"] == whole["rates"][3:]
    assert distance(resumed, whole) == 0


@pytest.mark.parametrize("name", SAVED)
def test_a_checkpoint_folder_has_a_manifest_of_all_its_files(two_processes: Any, checkpoints: Any, name: str) -> None:
    folder = checkpoints[name] / "epoch=1.ckpt"
    check_whole(folder)
    assert read_manifest(folder)["settings"] == {"ZeRO stage": int(name[-1]), "processes": 2, "precision": "32"}
    scripts = ["latest", "zero_to_fp32.py", "zero_to_torch.py"]
    assert sorted(read_manifest(folder)["files"]) == files_of(folder) == sorted([*SAVED[name], *scripts])
    assert not list(checkpoints[name].glob("*.partial"))


@pytest.mark.parametrize("name", SAVED)
def test_a_checkpoint_folder_that_is_not_as_it_was_written_is_refused_on_all_processes(
    two_processes: Any, checkpoints: Any, name: str
) -> None:
    folder = checkpoints[name] / "epoch=0.ckpt"
    for file in SAVED[name]:
        code = f"'{folder}/{file}' holds an object of posix.system, which could run code, so it is not loaded"
        assert two_processes[name, "code", file] == [code] * 2
    for file in [*SAVED[name], "latest"]:
        for how, why in (("damage", "has changed"), ("missing", "is missing")):
            message = f"'{folder}' is not a complete checkpoint ('{file}' {why}); resume from another one"
            assert two_processes[name, how, file] == [message] * 2
    for result in two_processes[name, "resumed from code"]:
        assert "UserError: " in result["error"]
        assert "holds an object of posix.system, which could run code" in result["error"]
    for result in two_processes[name, "resumed from a file"]:
        assert result["error"].endswith(
            "latest' is a checkpoint of another strategy; resume with the one that wrote it"
        )
    assert not list(checkpoints[name].glob("* ran"))


@pytest.mark.parametrize("name", SAVED)
def test_a_checkpoint_folder_of_other_settings_is_refused(two_processes: Any, checkpoints: Any, name: str) -> None:
    was = f"UserError: '{checkpoints[name]}/epoch=0.ckpt' was saved with"
    for result in two_processes[name, "other", "precision"]:
        assert result["error"] == f"{was} precision 32, now it is bf16; resume with the same"
    for result in two_processes[name, "other", "stage"]:
        assert result["error"] == f"{was} ZeRO stage {name[-1]}, now it is 1; resume with the same"


def test_whatever_asks_torch_for_code_gets_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"module": Runs(f"{tmp_path}/ran"), "w": torch.ones(2)}, tmp_path / "states.pt")
    with plain_loading(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "states.pt", weights_only=False)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "states.pt", weights_only=False)
    assert (tmp_path / "ran").exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_sums_and_ties_and_synced_forwards(two_processes: Any, one_process: Any) -> None:
    for split in SPLITS:
        first, second = two_processes[split, "unclipped SGD"]
        assert first["sum"] == second["sum"] == [[3, 20]]
        assert first["tied"]
        assert first["synced"] == second["synced"] == split.startswith("zero3")
    assert one_process()["sum"] == [[1, 10]]
    assert not one_process()["synced"]
    assert one_process()["tied"]


@pytest.mark.parametrize(
    ("module_class", "micro_sizes", "message"),
    [
        ("TwoOptimizersModule", [8, 8, 8], "has 2 optimizers: use one with parameter groups"),
        ("MiscountingModule", [2, 1], "1 micro-batches still to come"),
        ("MiscountingModule", [1, 2], "more often than num_micro_batches"),
    ],
)
def test_misuse_is_named(folder: str, module_class: str, micro_sizes: list[int], message: str) -> None:
    assert message in fit(folder=folder, module_class=module_class, micro_sizes=micro_sizes)["error"]


@pytest.mark.parametrize(
    ("strategy", "precision", "message"),
    [
        (LightningDeepSpeedStrategy(), "32-true", "set trainer.strategy to rlhf_lightning.DeepSpeedStrategy"),
        (FSDPStrategy(), "32-true", "strategy FSDPStrategy is not supported"),
        (DeepSpeedStrategy(), "16-mixed", "set trainer.precision to bf16-mixed"),
        (SingleDeviceStrategy("cpu"), "16-true", "set trainer.precision to bf16-mixed"),
    ],
)
def test_unsupported_setups_say_what_to_use_instead(strategy: Any, precision: str, message: str) -> None:
    module = SimpleNamespace(trainer=SimpleNamespace(strategy=strategy, precision=precision))

    with pytest.raises(UserError, match=message):
        GradientAccumulation(module, 1)  # type: ignore[arg-type]


def test_two_different_clip_values_are_refused(folder: str) -> None:
    strategy = DeepSpeedStrategy(config={"gradient_clipping": 1.0, "zero_optimization": {"stage": 2}})
    strategy._lightning_module = SimpleNamespace(gradient_clip_val=0.5)  # type: ignore[assignment]

    with pytest.raises(UserError, match=r"gradient_clipping is 1.0 .* gradient_clip_val is 0.5"):
        strategy._format_config()


WITHOUT_DEEPSPEED = """
import sys
sys.modules["deepspeed"] = None  # importing it fails, as where it is not installed
from helpers.stages import fit, preference_rows, prompt_rows, save_llama, share_of_letters
from rlhf_lightning import DPOModule, FineTune, PPOModule, PreferenceDataModule, PromptDataModule, Sampling
from rlhf_lightning.cli.main import main

save_llama("lm")
lora = FineTune("lora", rank=2)
fit(DPOModule("lm", finetune=lora), PreferenceDataModule("lm", preference_rows(8), max_length=48), max_steps=1)
sizes = {"rollout_batch_size": 4, "minibatch_size": 4, "sampling": Sampling(max_new_tokens=4)}
module = PPOModule("lm", share_of_letters, finetune=lora, **sizes)
fit(module, PromptDataModule("lm", prompt_rows(8), rollout_batch_size=4, max_prompt_length=40), max_steps=1)
main(["fit", "--config=sft.yaml", "--config=trainer/deepspeed_zero2.yaml", "--trainer.accelerator=cpu"])
"""


def test_all_runs_without_deepspeed_but_its_strategy_which_says_what_to_install(tmp_path: Path) -> None:
    words = [sys.executable, "-c", WITHOUT_DEEPSPEED]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == (
        "error: DeepSpeedStrategy needs DeepSpeed (Linux): pip install 'rlhf-lightning[deepspeed]'"
    )


# What our code leans on in the libraries; a failure here means that something above can be made simpler.


def test_upstream_stock_strategy_refuses_the_cpu() -> None:
    trainer = pl.Trainer(accelerator="cpu", strategy=LightningDeepSpeedStrategy(), logger=False)

    with pytest.raises(RuntimeError, match="only supported on CUDA"):
        trainer.strategy.setup_environment()


def test_nothing_is_compiled_on_cpus(two_processes: Any) -> None:
    assert [*Path(os.environ["TORCH_EXTENSIONS_DIR"]).rglob("*")] == []


def test_upstream_deepspeed_forgets_gradients_without_our_accumulation(two_processes: Any, one_process: Any) -> None:
    expected = one_process(**UNCLIPPED_SGD)

    assert distance(two_processes["ddp", "forgetful"][0], expected) <= 2e-6
    assert distance(two_processes["zero2", "forgetful"][0], expected) > 1e-2


def test_upstream_clip_gradients_does_nothing_on_deepspeed(two_processes: Any, one_process: Any) -> None:
    assert distance(two_processes["zero2", "self-clipping"][0], one_process(**UNCLIPPED_SGD)) <= 2e-6


def test_upstream_from_pretrained_fails_under_zero_3_unless_transformers_is_told(two_processes: Any) -> None:
    for result in two_processes["zero3", "unannounced"]:
        assert result["error"] != ""
        assert result["global_step"] == 0


@pytest.mark.parametrize(
    ("file", "strategy", "stage"),
    [
        ("cpu.yaml", SingleDeviceStrategy, None),
        ("ddp.yaml", pl.strategies.DDPStrategy, None),
        ("deepspeed_zero1.yaml", DeepSpeedStrategy, 1),
        ("deepspeed_zero2.yaml", DeepSpeedStrategy, 2),
        ("deepspeed_zero3.yaml", DeepSpeedStrategy, 3),
        ("deepspeed_zero3_offload.yaml", DeepSpeedStrategy, 3),
    ],
)
def test_trainer_configs_build_the_trainer_they_promise(
    file: str, strategy: type, stage: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rlhf_lightning, "DeepSpeedStrategy", DeepSpeedStrategy, raising=False)
    arguments = ["--config", str(CONFIGS / file), "--trainer.accelerator=cpu", "--trainer.logger=false"]
    monkeypatch.setattr("sys.argv", ["rlhf"])
    cli = LightningCLI(BoringModel, args=arguments, run=False, seed_everything_default=False)
    trainer = cli.trainer

    assert type(trainer.strategy) is strategy
    if stage is not None:
        assert trainer.strategy.config["zero_optimization"]["stage"] == stage
