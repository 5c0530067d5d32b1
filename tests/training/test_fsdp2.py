"""The same gradient, clipping, schedule and step count under FSDP2, and its checkpoints, on real processes."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.demos.boring_classes import BoringModel
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata

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
from helpers.strategy_runs import save_model, validate
from rlhf_lightning import FSDP2Strategy, UserError
from rlhf_lightning.models.sharing import copied_or_shared
from rlhf_lightning.runs.checkpoint_files import check_whole, files_of, newest_whole, read_manifest
from rlhf_lightning.training import GradientAccumulation, check_skipping
from rlhf_lightning.training.dcp_folders import INDEX, STATES, load_tensors, stored_tensors
from rlhf_lightning.training.fsdp2_models import _part_company
from rlhf_lightning.training.sharded import to_be_sharded

pytestmark = pytest.mark.matrix

CONFIGS = Path(__file__).parents[2] / "configs" / "trainer"
SPLITS: dict[str, dict[str, Any]] = {
    "whole, clipped AdamW": {"name": "fsdp2", **WHOLE, **CLIPPED_ADAM},
    "halves, each": {"name": "fsdp2-each", **HALVES, **UNCLIPPED_SGD},
    "halves, last, clipped AdamW": {"name": "fsdp2-last", **HALVES, **CLIPPED_ADAM},
    "uneven, each": {"name": "fsdp2-each", **UNEVEN, **UNCLIPPED_SGD},
    "uneven, last": {"name": "fsdp2-last", **UNEVEN, **UNCLIPPED_SGD},
    "uneven, offload": {"name": "fsdp2-offload", **UNEVEN, **CLIPPED_ADAM},
}
TWO_EPOCHS = {"name": "fsdp2", "trainer_options": {"max_epochs": 2}, **HALVES, **CLIPPED_ADAM}
IN_BFLOAT16 = TWO_EPOCHS | {
    "trainer_options": {"max_epochs": 2, "precision": "bf16-true"},
    "module_class": "MasteredModule",
}
FILES = [INDEX, "__0_0.distcp", "__1_0.distcp", STATES]
CODE = {INDEX: "plain code", STATES: "code"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tmp_path_factory.mktemp(name) for name in ("one", "two", "bf16")}


def on_one(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """FSDP2 on one process."""
    told = [
        run | {"trainer_options": run["trainer_options"] | {"devices": 1}, "micro_sizes": [4, 4, 4]} for run in runs
    ]
    (results,) = run_in_processes("helpers.strategy_runs:run_all", world_size=1, runs=told)
    return results


@pytest.fixture(scope="module")
def saved_by_one(folder: str, checkpoints: dict[str, Path]) -> dict[str, Any]:
    (result,) = on_one([TWO_EPOCHS | {"folder": folder, "checkpoints": str(checkpoints["one"])}])
    return result


@pytest.fixture(scope="module")
def two_processes(folder: str, checkpoints: dict[str, Path], saved_by_one: Any) -> dict[Any, list[Any]]:
    """Every two-process run of this file, done in one start of two processes; name -> result of each rank."""
    runs: dict[Any, dict[str, Any]] = SPLITS | runs_of("fsdp2")
    for when in ("each", "last"):
        skipping = {"module_class": "SkippingModule", "name": f"fsdp2-{when}", "poison": "gradient"}
        runs["skipping", when] = skipping | HALVES | CLIPPED_ADAM
    first = checkpoints["two"] / "epoch=0.ckpt"
    first.with_name(f"{first.name}.partial").mkdir()
    first.with_name(f"{first.name}.partial").joinpath("left.pt").write_text("by a run that was killed")
    runs["two epochs"] = TWO_EPOCHS | {"checkpoints": str(first.parent)}
    runs["resumed"] = TWO_EPOCHS | {"resume": str(first)}
    runs["resumed from one"] = TWO_EPOCHS | {"resume": f"{checkpoints['one']}/epoch=0.ckpt"}
    runs["bf16-true"] = IN_BFLOAT16 | {"checkpoints": str(checkpoints["bf16"])}
    runs["bf16-true resumed"] = IN_BFLOAT16 | {"resume": f"{checkpoints['bf16']}/epoch=0.ckpt"}
    spoiled = {"checkpoint": f"{checkpoints['two']}/epoch=1.ckpt"}
    for file in FILES:
        for how in (*([CODE[file]] if file in CODE else []), "damage", "missing"):
            runs["spoil", how, file] = {"task": "spoil", **spoiled, "file": file, "how": how}
            runs[how, file] = {"task": "check", **spoiled, "settings": None, "in_parts": True}
    runs["other strategy"] = {
        "task": "check",
        "checkpoint": str(first),
        "settings": {"ZeRO stage": 2},
        "in_parts": True,
    }
    runs["apart"] = {"task": "apart", "root": str(checkpoints["two"] / "apart")}
    ranks = run_in_processes("helpers.strategy_runs:run_all", runs=[run | {"folder": folder} for run in runs.values()])
    return {key: [results[i] for results in ranks] for i, key in enumerate(runs)}


@pytest.fixture(scope="module")
def one_process(folder: str) -> Any:
    """Without FSDP2, in this process."""
    return alone(folder)


@pytest.mark.parametrize("split", SPLITS)
def test_two_processes_are_the_same_as_one(two_processes: Any, one_process: Any, split: str) -> None:
    first, second = two_processes[split]
    optimizer = CLIPPED_ADAM if "adam" in SPLITS[split] else UNCLIPPED_SGD
    assert_same_on_both(two_processes[split], one_process(**optimizer))
    assert first["tied"]
    assert first["synced"]
    assert second["synced"]


def test_several_steps_inside_one_training_step(two_processes: Any, one_process: Any) -> None:
    assert_same_training(two_processes["fsdp2", "two passes"][0], one_process(passes=2, **CLIPPED_ADAM), atol=5e-6)


@pytest.mark.parametrize("poison", POISONS)
def test_non_finite_on_one_rank_stops_every_rank_with_weights_untouched(
    two_processes: Any, one_process: Any, poison: str
) -> None:
    before = one_process(trainer_options={"limit_train_batches": 1})
    assert_stopped(two_processes["fsdp2", poison], poison, before)


@pytest.mark.parametrize("when", ["each", "last"])
def test_a_step_that_is_skipped_leaves_nothing_behind(two_processes: Any, one_process: Any, when: str) -> None:
    expected = one_process(module_class="SkippingModule", poison="gradient", **CLIPPED_ADAM)
    assert expected["global_step"] == 2
    assert_same_training(two_processes["skipping", when][0], expected)


def test_bfloat16_stays_close(two_processes: Any, one_process: Any) -> None:
    expected, result = one_process(**CLIPPED_ADAM), two_processes["fsdp2", "bf16"][0]
    assert result["error"] == ""
    assert result["global_step"] == 3
    assert result["norms"] == pytest.approx(expected["norms"], rel=0.02)
    assert result["losses"] == pytest.approx(expected["losses"], rel=0.01)


def test_validation_without_training(two_processes: Any, folder: str) -> None:
    expected = validate("auto", folder=folder, micro_sizes=[8])
    for result in two_processes["fsdp2", "validate"]:
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)


def test_upstream_gradients_are_averaged_over_processes(two_processes: Any, one_process: Any) -> None:
    """Why losses are multiplied by the number of processes, and nothing else need be done."""
    assert distance(two_processes["fsdp2", "forgetful"][0], one_process(**UNCLIPPED_SGD)) <= 2e-6


# Checkpoints.


@pytest.mark.parametrize(("whole", "resumed"), [("two epochs", "resumed"), ("bf16-true", "bf16-true resumed")])
def test_resuming_changes_nothing_though_frozen_weights_are_not_saved(
    two_processes: Any, whole: str, resumed: str
) -> None:
    whole, resumed = two_processes[whole][0], two_processes[resumed][0]
    assert resumed["error"] == whole["error"] == ""
    assert whole["global_step"] == resumed["global_step"] == 6
    assert resumed["norms"] == whole["norms"][3:]
    assert resumed["rates"] == whole["rates"][3:]
    assert distance(resumed, whole) == 0


def test_low_precision_trains_float32_copies(two_processes: Any, one_process: Any) -> None:
    options = {"max_epochs": 2, "precision": "bf16-true"}
    expected = one_process(module_class="MasteredModule", trainer_options=options, **CLIPPED_ADAM)
    result = two_processes["bf16-true"][0]
    assert result["losses"] == pytest.approx(expected["losses"], rel=0.01)
    assert result["norms"] == pytest.approx(expected["norms"], rel=0.05)


def test_master_weights_are_saved(two_processes: Any, checkpoints: dict[str, Path]) -> None:
    stored = stored_tensors(checkpoints["bf16"] / "epoch=0.ckpt")
    masters = [tensor for name, tensor in stored.items() if ".master_weights." in name]
    assert masters
    assert {tensor.dtype for tensor in masters} == {torch.float32}
    weights = [tensor for name, tensor in stored.items() if name.startswith("state_dict.")]
    assert {tensor.dtype for tensor in weights} == {torch.bfloat16}


def test_two_processes_go_on_where_one_was_cut(two_processes: Any, saved_by_one: Any) -> None:
    result = two_processes["resumed from one"][0]
    assert_same_training(result | whole(result, saved_by_one), saved_by_one, atol=5e-6)


def whole(result: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """What was seen before a cut and after it."""
    return {key: before[key][:3] + result[key] for key in ("norms", "losses", "rates")}


def test_one_process_goes_on_where_two_were_cut(
    two_processes: Any, saved_by_one: Any, checkpoints: dict[str, Path], folder: str
) -> None:
    (result,) = on_one([TWO_EPOCHS | {"folder": folder, "resume": f"{checkpoints['two']}/epoch=0.ckpt"}])
    assert_same_training(result | whole(result, two_processes["two epochs"][0]), saved_by_one, atol=5e-6)


@pytest.mark.slow
def test_four_processes_go_on_where_two_were_cut(
    two_processes: Any, saved_by_one: Any, checkpoints: dict[str, Path], folder: str
) -> None:
    run = TWO_EPOCHS | {"folder": folder, "resume": f"{checkpoints['two']}/epoch=0.ckpt", "micro_sizes": [2, 1, 2]}
    run["trainer_options"] = {"max_epochs": 2, "devices": 4}
    ranks = run_in_processes("helpers.strategy_runs:run_all", world_size=4, runs=[run])
    result = ranks[0][0]
    assert_same_training(result | whole(result, two_processes["two epochs"][0]), saved_by_one, atol=5e-6)


def test_a_checkpoint_folder_is_whole_and_holds_what_is_trained(
    two_processes: Any, checkpoints: dict[str, Path]
) -> None:
    path = checkpoints["two"] / "epoch=0.ckpt"
    check_whole(path)
    assert read_manifest(path)["settings"] == {"strategy": "FSDP2"}
    assert files_of(path) == sorted(FILES)
    assert not list(checkpoints["two"].glob("*.partial"))
    names = {name for name in stored_tensors(path) if name.startswith("state_dict.")}
    assert "state_dict.model.model.embed_tokens.weight" in names
    assert not any("frozen" in name for name in names)


def test_a_folder_is_read_without_processes(two_processes: Any, checkpoints: dict[str, Path]) -> None:
    path, state = checkpoints["one"] / "epoch=1.ckpt", two_processes["resumed from one"][0]["state"]
    weights = {
        name: torch.empty_like(x, device="cpu") for name, x in stored_tensors(path).items() if "state_dict." in name
    }
    load_tensors(path, weights)
    assert weights.keys() == {f"state_dict.model.{name}" for name in state}
    for name, expected in state.items():
        found = weights[f"state_dict.model.{name}"].double()
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=5e-6, rtol=0)


def test_the_newest_folder_is_what_a_run_goes_on_from(two_processes: Any, checkpoints: dict[str, Path]) -> None:
    with pytest.warns(UserWarning, match="passed over a checkpoint"):  # the one that was spoiled
        assert newest_whole([checkpoints["two"]], to_train=True) == checkpoints["two"] / "epoch=0.ckpt"


def test_a_folder_that_is_not_as_it_was_written_is_refused_on_all_processes(
    two_processes: Any, checkpoints: dict[str, Path]
) -> None:
    path = checkpoints["two"] / "epoch=1.ckpt"
    for file in FILES:
        for how, why in (("damage", "has changed"), ("missing", "is missing")):
            message = f"'{path}' is not a complete checkpoint ('{file}' {why}); resume from another one"
            assert two_processes[how, file] == [message] * 2
    for file, how in CODE.items():
        message = f"'{path}/{file}' holds an object of posix.system, which could run code, so it is not loaded"
        assert two_processes[how, file] == [message] * 2
    assert not list(checkpoints["two"].glob("* ran"))


def test_a_folder_of_another_strategy_is_refused(two_processes: Any, checkpoints: dict[str, Path]) -> None:
    path = checkpoints["two"] / "epoch=0.ckpt"
    message = f"'{path}' was saved with ZeRO stage None, now it is 2; resume with the same"
    assert two_processes["other strategy"] == [message] * 2


def test_a_checkpoint_in_parts_on_disks_of_their_own_is_refused_when_it_is_written(two_processes: Any) -> None:
    for said, left in two_processes["apart"]:
        assert said.startswith("rank 0 on ")
        assert "does not see '1.pt' of the checkpoint 'x.ckpt', which another process wrote: nothing could be" in said
        assert left == []


class Attribute:
    """Unpickling it looks something up."""

    def __reduce__(self) -> Any:
        return getattr, (Metadata, "__init__")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (pickle.dumps(SimpleNamespace()), "holds an object of types.SimpleNamespace, which could run code"),
        (pickle.dumps({"a": 1}), "holds an object of dict, which could run code"),
        (pickle.dumps(Attribute()), "holds an object of builtins.getattr, which could run code"),
        (b"", "is damaged"),
        (b"PK\x03\x04", "is damaged"),
    ],
)
def test_an_index_that_describes_no_tensors_is_not_loaded(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(UserError, match=what):
        stored_tensors(tmp_path)


# Models, before they are sharded.


def test_what_will_be_sharded_is_loaded_once_more_rather_than_copied() -> None:
    model, partly = nn.Linear(2, 2), nn.Linear(2, 2)
    partly.bias.requires_grad_(False)
    with to_be_sharded():
        assert copied_or_shared(model) is None
        assert copied_or_shared(partly).bias is partly.bias
    assert copied_or_shared(model).weight is not model.weight


def test_frozen_weights_part_company_and_trained_ones_cannot() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    with pytest.raises(UserError, match="the weight 'weight' is trained in two models at once; use ddp"):
        _part_company([first, second])  # type: ignore[list-item]
    first.requires_grad_(False)
    assert _part_company([first, second]) == [((first, "weight"), [(second, "weight")])]  # type: ignore[list-item]
    assert second.weight is not first.weight
    assert second.weight.data_ptr() == first.weight.data_ptr()


# What it goes with.


def test_lightnings_own_strategy_is_refused() -> None:
    module = SimpleNamespace(trainer=SimpleNamespace(strategy=ModelParallelStrategy(), precision="32-true"))
    with pytest.raises(UserError, match=r"set trainer.strategy to rlhf_lightning.FSDP2Strategy"):
        GradientAccumulation(module, 1)  # type: ignore[arg-type]


def test_steps_can_be_skipped() -> None:
    check_skipping(SimpleNamespace(strategy=FSDP2Strategy()))  # type: ignore[arg-type]


def test_wrong_options_are_named() -> None:
    with pytest.raises(UserError, match="reduce_gradients"):
        FSDP2Strategy(reduce_gradients="never")  # type: ignore[arg-type]


@pytest.mark.parametrize(("file", "offload"), [("fsdp2.yaml", False), ("fsdp2_offload.yaml", True)])
def test_trainer_configs_build_the_trainer_they_promise(
    file: str, offload: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--config", str(CONFIGS / file), "--trainer.accelerator=cpu", "--trainer.logger=false"]
    monkeypatch.setattr("sys.argv", ["rlhf"])
    cli = LightningCLI(BoringModel, args=arguments, run=False, seed_everything_default=False)
    assert type(cli.trainer.strategy) is FSDP2Strategy
    assert cli.trainer.strategy.cpu_offload == offload
