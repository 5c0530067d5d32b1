"""`quickstart.yaml`: the quickstart as commands, with the settings that it has when it runs them by itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import yaml
from pytorch_lightning.demos.boring_classes import BoringModel
from transformers import AutoModelForCausalLM

from rlhf_lightning.cli import quickstart
from rlhf_lightning.cli.main import main
from rlhf_lightning.cli.pipeline.steps import read_pipeline
from rlhf_lightning.cli.quickstart import toy as embedded
from rlhf_lightning.cli.quickstart.stages import SAMPLING, Settings, settings_of
from rlhf_lightning.cli.quickstart.toy import ToyPaths, toy_paths, write_toy_data
from rlhf_lightning.cli.toy import write_toy
from rlhf_lightning.errors import UserError

OTHERS = ("rloo", "grpo", "dpo")
STAGES = [("sft",), ("reward",), ("policy",), *(("policy", f"quickstart/{name}.yaml") for name in OTHERS)]


@pytest.mark.parametrize("stage", STAGES, ids="-".join)
def test_a_stage_has_the_settings_of_its_command(
    stage: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, *others = stage
    monkeypatch.chdir(tmp_path)
    for before in ("sft", "reward"):  # modules look whether what they begin with is there
        folder = tmp_path / "runs" / "quickstart_pipeline" / before / "export"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    settings = settings_of(name, 5, *others)
    pipeline = read_pipeline(["quickstart.yaml", *others], ["seed=5"], None)
    (step,) = (step for step in pipeline.steps if step.name == name)
    monkeypatch.setattr("sys.argv", ["rlhf"])
    with pytest.raises(SystemExit) as end:
        main([*pipeline.words(step), "--print_config"])
    assert end.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["seed_everything"] == 5
    ours, theirs = hyperparameters(settings), printed["model"]["init_args"]
    optimizer, command_s = settings.model["optimizer"], theirs.pop("optimizer")
    assert optimizer["class_path"] == command_s["class_path"] == "torch.optim.AdamW"
    given = optimizer["init_args"]
    assert {key: command_s["init_args"][key] for key in given} == given
    assert ours == theirs
    for part in ("data", "trainer"):
        said, mine = printed[part].get("init_args", printed[part]), getattr(settings, part)
        paths = {key for key, value in mine.items() if isinstance(value, str) and "{" in value}
        assert {key: said[key] for key in mine if key not in paths} == {
            key: value for key, value in mine.items() if key not in paths
        }


def hyperparameters(settings: Settings) -> dict[str, Any]:
    """Those of the module that is built, as a config writes them."""
    named = {"{toy}/model": "toy/model", "{sft}": "sft/export", "{reward}": "reward/export"}
    arguments = {
        key: f"runs/quickstart_pipeline/{named[value]}" if isinstance(value, str) and value in named else value
        for key, value in settings.model.items()
    }
    module = settings.classes["model"](**arguments)
    given = {name: value for name, value in module.hparams.items() if name != "optimizer"}
    groups = {name: asdict(getattr(module, name)) for name in ("kl", "score", "sampling") if hasattr(module, name)}
    none = {name: None for name, value in given.items() if value == {}}
    return given | none | {name: group for name, group in groups.items() if name in given}


def test_files_of_the_working_folder_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = settings_of("policy", 1, "quickstart/rloo.yaml")
    (tmp_path / "quickstart").mkdir()
    for name in ("quickstart.yaml", "quickstart/rloo.yaml", "rloo.yaml"):
        (tmp_path / name).write_text("steps: {policy: {config: sft.yaml}}")
    monkeypatch.chdir(tmp_path)
    assert settings_of("policy", 1, "quickstart/rloo.yaml") == before


def test_what_answers_in_the_end_samples_as_training_does() -> None:
    sampling = settings_of("policy", 1).model["sampling"]
    assert {name: getattr(SAMPLING, name) for name in sampling} == sampling


@pytest.mark.parametrize("algorithm", OTHERS)
def test_another_algorithm_takes_the_place_of_ppo(algorithm: str) -> None:
    pipeline = read_pipeline(["quickstart.yaml", f"quickstart/{algorithm}.yaml"], [], None)
    pipeline.check()
    assert [step.name for step in pipeline.steps] == ["toy", "sft", "reward", "policy", "evaluation"]
    assert Path(pipeline.steps[3].configs[0]).name == f"{algorithm}.yaml"


def test_toy_data_are_those_of_the_quickstart_and_the_model_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "rlhf_lightning.cli.toy.write_toy_data", lambda folder, seed: write_toy_data(folder, seed, **SIZES)
    )
    main(["toy", "--out", str(tmp_path / "made"), "--seed", "3"])
    written = write_toy_data(tmp_path / "data", 3, **SIZES)
    for made, expected in zip(toy_paths(tmp_path / "made"), written, strict=True):
        assert made.read_bytes() == expected.read_bytes()
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == str(tmp_path / "made" / "model")
    assert AutoModelForCausalLM.from_pretrained(said[-1]).num_parameters() > 500_000
    before = json.loads(Path(said[0]).read_text().splitlines()[0])
    main(["toy", "--out", str(tmp_path / "made"), "--seed", "4"])  # its own files are replaced
    assert json.loads(Path(said[0]).read_text().splitlines()[0]) != before


def test_toy_data_replace_nothing_of_others(tmp_path: Path) -> None:
    (tmp_path / "diary.txt").touch()
    with pytest.raises(UserError, match="holds no toy data; choose another --out"):
        write_toy(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["diary.txt"]


SIZES = {"num_sft": 60, "num_pairs": 10, "num_prompts": 10, "num_heldout": 5}


def stop_at(monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    """Let Ctrl-C come while the toy data's file of this name is written."""
    whole = embedded._write_rows

    def write(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
        whole(path, rows)
        if path.stem == name:
            raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "_write_rows", write)


@pytest.mark.parametrize("name", ToyPaths._fields)
def test_toy_data_that_were_stopped_are_made_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(
        "rlhf_lightning.cli.toy.write_toy_data", lambda folder, seed: write_toy_data(folder, seed, **SIZES)
    )
    with monkeypatch.context() as patch:
        stop_at(patch, name)
        with pytest.raises(KeyboardInterrupt):
            write_toy(tmp_path / "made", 1)
    write_toy(tmp_path / "made", 1)
    assert {path.name for path in (tmp_path / "made").iterdir()} == {
        "model",
        *(path.name for path in toy_paths(tmp_path)),
    }


@pytest.mark.parametrize("name", ToyPaths._fields)
def test_a_quickstart_that_was_stopped_at_its_data_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(quickstart, "write_toy_data", lambda folder, seed: write_toy_data(folder, seed, **SIZES))
    with monkeypatch.context() as patch:
        stop_at(patch, name)
        with pytest.raises(KeyboardInterrupt):
            quickstart.main(["--out", str(tmp_path / "quick")])
    monkeypatch.setattr(quickstart, "_three_stages", lambda *_: (_ for _ in ()).throw(LookupError("it goes on")))
    with pytest.raises(LookupError, match="it goes on"):
        quickstart.main(["--out", str(tmp_path / "quick")])


def test_ctrl_c_in_training_ends_a_quickstart_with_the_code_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted(BoringModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "default_root_dir": tmp_path}
    fit = pl.Trainer(max_steps=1, accelerator="cpu", enable_checkpointing=False, **options).fit
    monkeypatch.setattr(quickstart, "_three_stages", lambda *_: fit(Interrupted()))
    with pytest.raises(SystemExit) as end:
        main(["quickstart", "--out", str(tmp_path / "quick")])
    assert end.value.code == 130
    assert "interrupted" in capsys.readouterr().err


def test_files_of_the_same_names_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("mine")
    (tmp_path / "quick" / "data").mkdir(parents=True)
    (tmp_path / "quick" / "data" / "prompts.jsonl").write_text("mine")
    with pytest.raises(UserError, match="holds no toy data; choose another --out"):
        write_toy(tmp_path, 1)
    with pytest.raises(UserError, match="holds no quickstart; choose another --out"):
        quickstart.main(["--out", str(tmp_path / "quick")])
    assert (tmp_path / "prompts.jsonl").read_text() == "mine"


@pytest.mark.parametrize("place", ["diary.txt", "sft.jsonl"])
def test_a_folder_of_others_beside_an_empty_one_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "data").mkdir()
    for path in toy_paths(tmp_path) if place == "sft.jsonl" else [tmp_path / place]:
        path.touch()
    with pytest.raises(UserError, match="holds no quickstart; choose another --out"):
        quickstart.main(["--out", str(tmp_path)])


def test_folders_without_a_file_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a quickstart leaves them that is stopped before its first file."""
    (tmp_path / "quick" / "data").mkdir(parents=True)
    monkeypatch.setattr(quickstart, "_three_stages", lambda *_: (_ for _ in ()).throw(LookupError("it goes on")))
    with pytest.raises(LookupError, match="it goes on"):
        quickstart.main(["--out", str(tmp_path / "quick")])
