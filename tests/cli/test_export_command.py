"""`rlhf export`: the folder that a run ends with, made again from its last checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from helpers import cli_runs
from helpers.cli_runs import PPO, SFT, run, save_model, save_pairs, short
from helpers.stages import same_weights
from helpers.strategy_runs import Runs
from rlhf_lightning import load_reward_model
from rlhf_lightning.cli.export import export
from rlhf_lightning.cli.main import main
from rlhf_lightning.models.scalar_lm import Calibration
from rlhf_lightning.runs.lineage import read_record, read_trained_on
from rlhf_lightning.runs.lock import locked

REWARD = [*cli_runs.REWARD, "--trainer.val_check_interval=1"]
BLOCK = re.compile(r"```yaml\n(.*?)```", re.DOTALL)
LORA = ["--model.finetune.mode=lora", "--model.finetune.rank=2"]
ADAPTER = [*LORA, "--model.finetune.export=adapter"]
LAST_LAYER = ["--model.finetune.mode=last_layer"]
BFLOAT16 = ["--trainer.precision=bf16-true"]
DPO = ["--config=dpo.yaml", "--data.max_length=64", "--data.batch_size=4"]
GROUPS = ["--data.max_prompt_length=48", "--model.sampling.max_new_tokens=4", "--model.rollout_batch_size=2"]
GROUPS += ["--model.samples_per_prompt=2", "--model.minibatch_size=4", "--model.micro_batch_size=2"]
RUNS = {
    "sft": SFT,
    "sft-lora": [*SFT, *LORA],
    "sft-dora": [*SFT, *LORA, "--model.finetune.use_dora=true"],
    "sft-adapter": [*SFT, *ADAPTER],
    "sft-last": [*SFT, *LAST_LAYER],
    "sft-bf16": [*SFT, *BFLOAT16],
    "sft-lora-bf16": [*SFT, *LORA, *BFLOAT16],
    "sft-mixed": [*SFT, "--trainer.precision=bf16-mixed"],
    "reward": REWARD,
    "reward-lora": [*REWARD, *LORA],
    "reward-adapter": [*REWARD, *ADAPTER],
    "reward-last": [*REWARD, *LAST_LAYER],
    "reward-heads": [*REWARD, "--model.num_heads=3", "--model.lm_coef=1"],
    "reward-heads-adapter": [*REWARD, *ADAPTER, "--model.num_heads=3"],
    "dpo": DPO,
    "dpo-lora": [*DPO, *LORA],
    "rloo": ["--config=rloo.yaml", *GROUPS],
    "grpo-lora": ["--config=grpo.yaml", *GROUPS, *LORA],
    "ppo": PPO,
    "ppo-lora": [*PPO, *LORA, "--model.frozen_dtype=bfloat16"],
    "ppo-nf4": [*PPO, *ADAPTER, "--model.frozen_dtype=nf4"],
}
ONLINE = ("ppo", "rloo", "grpo")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a language model, `lm`, data, `pairs.jsonl`, and a run of each of `RUNS` that is asked for."""
    root = tmp_path_factory.mktemp("shelf")
    save_model(root / "lm", chat_template=True)
    save_pairs(root / "pairs.jsonl")
    return root


def trained(shelf: Path, name: str) -> Path:
    """The folder of a run of `RUNS`."""
    root = shelf / name
    if not root.exists():
        reward = [f"--model.reward={trained(shelf, 'reward') / 'export'}"] if name.startswith(ONLINE) else []
        done = run("fit", *RUNS[name], *short(shelf / "lm", shelf / "pairs.jsonl", root), *reward, cwd=shelf)
        assert done.returncode == 0, done.stderr
    return root


def files(folder: Path, without: tuple[str, ...] = ("README.md",)) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in without}


@pytest.mark.long
@pytest.mark.parametrize("name", RUNS)
def test_it_is_the_folder_that_the_run_ended_with(shelf, name):
    root = trained(shelf, name)
    done = run("export", str(root / "checkpoints" / "last.ckpt"), "--out", str(root / "again"), cwd=shelf)
    assert (done.returncode, done.stderr) == (0, "")
    assert files(root / "again") == files(root / "export")


def last(root: Path) -> Path:
    return root / "checkpoints" / "last.ckpt"


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """The one line that a command line ends with, and nothing is written."""
    with pytest.raises(SystemExit) as left:
        main(["export", *map(str, words)])
    assert left.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err.removeprefix("error: ").strip()


def test_the_card_says_what_it_was_made_from(shelf):
    root = trained(shelf, "sft-lora")
    export(str(last(root)), str(root / "told"))
    card = (root / "told" / "README.md").read_text()
    assert f"Written by `rlhf export` from the checkpoint `{last(root)}`." in card
    head, settings, metrics = (yaml.safe_load(each) for each in (card.split("---\n")[1], *re.findall(BLOCK, card)))
    assert head["base_model"] == str(shelf / "lm")
    assert settings["module"]["finetune"]["mode"] == "lora"
    assert settings["data"]["max_length"] == 64
    assert metrics["train/loss"] > 0
    assert "SFTModule export" in card
    assert "after 2 optimizer" in card


def test_a_folder_of_a_run_means_its_newest_checkpoint_that_is_whole(shelf, tmp_path, capsys):
    root = tmp_path / "run"
    shutil.copytree(trained(shelf, "sft"), root)
    shutil.copy(last(root), root / "checkpoints" / "older.ckpt")
    last(root).write_bytes(last(root).read_bytes()[:1000])
    with pytest.warns(UserWarning, match="passed over a checkpoint"):
        export(str(root), str(tmp_path / "out"))
    assert f"exported '{root / 'checkpoints' / 'older.ckpt'}' to '{tmp_path / 'out'}'" in capsys.readouterr().out
    assert files(tmp_path / "out") == files(root / "export")
    for path in (root / "checkpoints").iterdir():
        path.unlink()
    assert "there is no checkpoint in it" in refused(capsys, root, "--out", tmp_path / "other")


def test_the_type_and_the_size_of_files_are_those_that_were_asked_for(shelf, tmp_path, capsys):
    root = trained(shelf, "sft")
    assert "--max_shard_size is '5 GiB'; give bytes" in refused(
        capsys, last(root), "--out", tmp_path / "out", "--max_shard_size", "5 GiB"
    )
    export(str(last(root)), str(tmp_path / "out"), dtype="bfloat16", max_shard_size="8KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).state_dict()
    expected = AutoModelForCausalLM.from_pretrained(root / "export", dtype=torch.bfloat16).state_dict()
    assert same_weights(found, expected)


def test_half_a_checkpoint_is_refused(shelf, tmp_path, capsys):
    half = tmp_path / "half.ckpt"
    half.write_bytes(last(trained(shelf, "sft")).read_bytes()[:-1000])
    said = refused(capsys, half, "--out", tmp_path / "out")
    assert said == f"'{half}' is not a complete checkpoint (it is cut off or damaged); export another one"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["export", "lm", "pairs.jsonl", "missing"])
def test_what_is_no_checkpoint_is_refused(shelf, tmp_path, capsys, what):
    path = trained(shelf, "sft") / "export" if what == "export" else shelf / what
    said = refused(capsys, path, "--out", tmp_path / "out")
    assert ("does not exist" if what == "missing" else "no Lightning checkpoint") in said or "cut off" in said


def changed(checkpoint: Path, path: Path, change: Any) -> Path:
    """A copy of a checkpoint whose content was changed."""
    content = torch.load(checkpoint, weights_only=True)
    change(content)
    torch.save(content, path)
    return path


CHANGES: dict[str, tuple[Any, str]] = {
    "foreign": (lambda c: c.pop("rlhf_lightning"), "was not made by this package"),
    "older": (lambda c: c["rlhf_lightning"].pop("export"), "is of an earlier version of this package: resume it"),
    "own": (lambda c: c["rlhf_lightning"].update(stage="Stage"), "is of a stage that is not of this package"),
    "lacking": (lambda c: c["state_dict"].pop("model.model.norm.weight"), "it has no weight 'model.norm.weight'"),
    "unknown": (lambda c: c["state_dict"].update({"model.more": torch.ones(1)}), "its weight 'model.more' is unknown"),
    "shape": (
        lambda c: c["state_dict"].update({"model.model.norm.weight": torch.ones(3)}),
        "its weight 'model.norm.weight' has the shape [3], not [16]",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_checkpoint_that_does_not_fit_is_refused(shelf, tmp_path, capsys, what):
    change, reason = CHANGES[what]
    path = changed(last(trained(shelf, "sft")), tmp_path / "changed.ckpt", change)
    assert reason in refused(capsys, path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_code_in_a_checkpoint_is_not_run(shelf, tmp_path, capsys):
    content = torch.load(last(trained(shelf, "sft")), weights_only=True)
    content["hyper_parameters"]["optimizer"] = Runs(str(tmp_path))
    torch.save(content, tmp_path / "bad.ckpt")
    assert "which could run code, so it is not loaded" in refused(
        capsys, tmp_path / "bad.ckpt", "--out", tmp_path / "out"
    )
    assert not (tmp_path.parent / f"{tmp_path.name} ran").exists()


@pytest.fixture
def moved(shelf: Path, tmp_path: Path) -> Path:
    """A run whose model has been moved: its checkpoint, beside the model."""
    trained(shelf, "sft-lora")
    shutil.copytree(shelf / "lm", tmp_path / "lm")
    gone = {"model_name_or_path": str(tmp_path / "gone")}
    return changed(
        last(shelf / "sft-lora"),
        tmp_path / "a.ckpt",
        lambda c: c["hyper_parameters"].update(gone),
    )


def test_a_model_that_was_moved_is_named(shelf, moved, capsys):
    out, base = moved.parent / "out", moved.parent / "lm"
    said = refused(capsys, moved, "--out", out)
    gone = moved.parent / "gone"
    assert said == f"the model that training started from is not at '{gone}'; name where it is now with --base"
    assert "name a folder that is there" in refused(capsys, moved, "--out", out, "--base", gone)
    export(str(moved), str(out), base=str(base))
    assert files(out, ("README.md", "trained_on.npy")) == files(
        shelf / "sft-lora" / "export", ("README.md", "trained_on.npy")
    )
    assert "is not in the folder of its run: which prompts it was trained on is not known" in capsys.readouterr().err


def test_a_model_that_was_changed_is_refused_where_its_frozen_weights_are_needed(shelf, moved, capsys):
    out, base = moved.parent / "out", moved.parent / "lm"
    save_model(base, chat_template=True, seed=7)
    said = refused(capsys, moved, "--out", out, "--base", base)
    assert f"'{base}' has other weights" in said
    assert "the checkpoint holds only what was trained" in said
    export(str(last(trained(shelf, "sft"))), str(out), base=str(base))  # which needs none of them
    assert files(out, ("README.md",)) == files(shelf / "sft" / "export")


def test_another_tokenizer_is_refused(shelf, tmp_path, capsys):
    path = last(trained(shelf, "sft"))
    shutil.copytree(shelf / "lm", tmp_path / "lm")
    content = json.loads((tmp_path / "lm" / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    a, b = [word for word in vocab if word.isalpha()][:2]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (tmp_path / "lm" / "tokenizer.json").write_text(json.dumps(content))
    assert "has another tokenizer" in refused(capsys, path, "--out", tmp_path / "out", "--base", tmp_path / "lm")


def test_nothing_of_others_is_in_danger(shelf, tmp_path, capsys):
    root = trained(shelf, "sft")
    thesis = tmp_path / "mine" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("three years of work")
    for words in ([], ["--overwrite", "true"]):
        said = refused(capsys, last(root), "--out", thesis.parent, *words)
        assert "exists and is not an export of this package" in said
        assert "the checkpoint lies in it" in refused(capsys, last(root), "--out", root, *words)
        assert "not an export" in refused(capsys, last(root), "--out", trained(shelf, "sft-lora"), *words)
    assert thesis.read_text() == "three years of work"
    assert last(root).is_file()
    assert "pass --out" in refused(capsys, last(root))


def test_an_export_is_replaced_only_if_that_is_asked_for(shelf, tmp_path, capsys):
    path, out = last(trained(shelf, "sft")), tmp_path / "out"
    export(str(last(trained(shelf, "sft-lora"))), str(out))
    capsys.readouterr()
    before = files(out, ())
    assert "an export lies there; pass --overwrite true to replace it" in refused(capsys, path, "--out", out)
    assert files(out, ()) == before
    export(str(path), str(out), overwrite=True)
    assert files(out) == files(shelf / "sft" / "export")


def test_a_second_one_into_the_same_folder_is_refused(shelf, tmp_path, capsys):
    with locked(tmp_path, "--out", "out"):
        line = refused(capsys, last(trained(shelf, "sft")), "--out", tmp_path / "out")
    assert f"'{tmp_path / 'out'}' is in use by another run (process " in line
    assert not [*tmp_path.iterdir()]


def test_the_scores_of_a_checkpoint_before_any_validation_are_not_calibrated(shelf, tmp_path, capsys):
    def before_validation(content: dict[str, Any]) -> None:
        content["rlhf_lightning"].update(calibrated_at=None, calibration={**vars(Calibration())})

    path = changed(last(trained(shelf, "reward")), tmp_path / "early.ckpt", before_validation)
    export(str(path), str(tmp_path / "out"))
    assert "so its scores are not calibrated (mean 0, std 1)" in capsys.readouterr().err
    assert load_reward_model(tmp_path / "out").calibration == Calibration()


def test_what_starts_from_it_knows_what_it_came_from(shelf, tmp_path):
    """The record and the prompts are those of the run's own export."""
    root = trained(shelf, "sft")
    export(str(last(root)), str(tmp_path / "out"))
    assert read_record(tmp_path / "out") == read_record(root / "export")
    assert len(read_trained_on(tmp_path / "out")) > 0
    assert read_trained_on(tmp_path / "out").tolist() == read_trained_on(root / "export").tolist()


def test_an_adapter_may_be_what_training_started_from(shelf, tmp_path):
    """What was frozen is then the base and the adapter, merged."""
    start, data, root = trained(shelf, "sft-adapter") / "export", shelf / "pairs.jsonl", tmp_path / "run"
    done = run("fit", *SFT, *LORA, *short(start, data, root), cwd=shelf)
    assert done.returncode == 0, done.stderr
    export(str(last(root)), str(tmp_path / "out"))
    assert files(tmp_path / "out") == files(root / "export")
