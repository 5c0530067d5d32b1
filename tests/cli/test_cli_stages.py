"""The three stages as a user runs them, each in a process of its own, handing over by export folders."""

import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from helpers.cli_runs import (
    PPO,
    REWARD,
    SFT,
    command,
    environment,
    run,
    save_model,
    save_pairs,
    save_rows,
    short,
    working_folder,
)
from helpers.forked import Finished
from rlhf_lightning.cli.main import main

FROM_PYTHON = """
import pytorch_lightning as pl
from rlhf_lightning import InstructionDataModule, Sampling, SFTModule

module = SFTModule("lm", sampling=Sampling(max_new_tokens=4))
data = InstructionDataModule("lm", "pairs.jsonl", max_length=64, batch_size=4, validation_split=0.25)
options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
pl.Trainer(max_steps=2, default_root_dir="python", **options).fit(module, data)
"""


PLACES = {"report": "report.html", "export": "export", "checkpoints": "checkpoints", "samples": "samples.md"}


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Finished]]:
    root = tmp_path_factory.mktemp("stages")
    save_model(root / "lm")
    save_pairs(root / "pairs.jsonl")
    done = {
        "sft": run("fit", *SFT, *short("lm", "pairs.jsonl", "sft", report=True), cwd=root),
        "reward": run("fit", *REWARD, *short("sft/export", "pairs.jsonl", "reward", report=True), cwd=root),
        "ppo": run(
            "fit",
            *PPO,
            *short("sft/export", "pairs.jsonl", "ppo", 4, report=True),
            "--model.reward=reward/export",
            cwd=root,
        ),
    }
    for result in done.values():
        assert result.returncode == 0, result.stderr
    return root, done


def test_each_stage_starts_from_what_the_one_before_exported(stages):
    root, _ = stages
    start = AutoModelForCausalLM.from_pretrained(root / "lm").state_dict()
    sft = AutoModelForCausalLM.from_pretrained(root / "sft/export").state_dict()
    policy = AutoModelForCausalLM.from_pretrained(root / "ppo/export").state_dict()
    reward = AutoModelForSequenceClassification.from_pretrained(root / "reward/export")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(start[name], sft[name])
    assert not torch.equal(sft[name], policy[name])
    torch.testing.assert_close(sft[name], policy[name], atol=1e-4, rtol=0)
    assert reward.config.num_labels == 1
    torch.testing.assert_close(sft[name], reward.state_dict()[name], atol=1e-3, rtol=0)


def test_a_run_leaves_one_folder_with_config_checkpoints_export_and_samples(stages):
    root, _ = stages
    for stage, more in {"sft": {"samples.md"}, "reward": set(), "ppo": {"samples.md"}}.items():
        names = {path.name for path in (root / stage).iterdir() if not path.name.startswith("events.out")}
        files = {"config.yaml", "hparams.yaml", "lineage.json", "finished.json", "report.html", "trained_on.npy"}
        assert names == files | {"checkpoints", "export", "report"} | more
        assert [path.name for path in (root / stage / "checkpoints").iterdir()] == ["last.ckpt"]
    assert sorted(path.name for path in root.iterdir()) == ["lm", "pairs.jsonl", "ppo", "reward", "sft"]


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_run_says_only_what_concerns_the_user(stages, stage):
    root, done = stages
    assert done[stage].stdout == ""
    lines = done[stage].stderr.strip().splitlines()
    expected = [
        "Seed set",
        "GPU available",
        "DataModule: rows 24",
        "loading ",
        "models: ",
        *([] if stage == "ppo" else ["max_tokens_per_batch auto: 512 tokens" if stage == "sft" else "1024 tokens"]),
        "Trainer.fit` stopped",
        "exported to",
    ]
    for line, part in zip(lines, expected, strict=False):
        assert part in line
    summary = lines[len(expected) :]
    title = {"sft": "SFT: 2 steps", "reward": "Reward model: 2 steps", "ppo": "PPO: 1 iteration"}[stage]
    assert summary[0].startswith(title)
    assert all(line.startswith("  ") for line in summary[1:]), done[stage].stderr
    places = dict(line.split(maxsplit=1) for line in summary if line.split()[0] in PLACES)
    assert places == {name: str(Path(stage, path)) for name, path in PLACES.items() if (root / stage / path).exists()}


@pytest.mark.launched
def test_a_run_from_python_says_no_more(stages):
    root, done = stages
    words = [sys.executable, "-c", FROM_PYTHON]
    result = subprocess.run(words, capture_output=True, text=True, cwd=root, env=environment(), check=False)
    assert result.returncode == 0, result.stderr
    said = [line for line in done["sft"].stderr.splitlines() if "Seed set" not in line and "exported to" not in line]
    # What the command line's default callbacks say and a plain Trainer has no callbacks for.
    said = [line for line in said if not line.startswith(("models: ", "SFT: ", "  "))]
    assert result.stderr.splitlines() == said


def test_the_saved_config_parses_and_trains_to_the_same_weights(stages, monkeypatch):
    root, _ = stages
    monkeypatch.setattr("sys.argv", ["rlhf"])
    with working_folder(root):
        main(["fit", "--config=sft/config.yaml", "--trainer.default_root_dir=again"])
    assert (root / "again/export/model.safetensors").read_bytes() == (
        root / "sft/export/model.safetensors"
    ).read_bytes()
    first, again = (yaml.safe_load((root / name / "config.yaml").read_text()) for name in ("sft", "again"))
    assert first["trainer"].pop("default_root_dir") == "sft"
    assert again["trainer"].pop("default_root_dir") == "again"
    assert first == again


def test_predict_scores_a_file_without_training_data(stages, monkeypatch):
    root, _ = stages
    monkeypatch.setattr("sys.argv", ["rlhf"])
    save_rows(root / "answers.jsonl", [{"prompt": f"Question {i}?", "response": "Happy to help!"} for i in range(6)])
    with working_folder(root):
        result = run(
            "predict",
            *REWARD,
            "--model.model_name_or_path=reward/export",
            "--data.predict_data=answers.jsonl",
            "--trainer.default_root_dir=scores",
            "--trainer.enable_progress_bar=false",
        )
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (root / "scores/predictions.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(6))
    assert [row["prompt"] for row in rows] == [f"Question {i}?" for i in range(6)]
    assert all(isinstance(row["score"], float) for row in rows)
    assert [path.name for path in (root / "scores").iterdir()] == ["predictions.jsonl"]
    assert "predictions: 6 rows in 'scores/predictions.jsonl'" in result.stderr


def test_predict_answers_a_file_without_training_data(stages, monkeypatch):
    root, _ = stages
    monkeypatch.setattr("sys.argv", ["rlhf"])
    save_rows(root / "prompts.jsonl", [{"prompt": f"Question {i}?"} for i in range(5)])
    options = ["--data.predict_data=prompts.jsonl", "--trainer.default_root_dir=answers"]
    with working_folder(root):
        main(["predict", *SFT, "--model.model_name_or_path=sft/export", *options])
    rows = [json.loads(line) for line in (root / "answers/predictions.jsonl").read_text().splitlines()]
    assert [(row["row"], row["prompt"]) for row in rows] == [(i, f"Question {i}?") for i in range(5)]
    assert all({"row", "prompt", "response", "ended"} <= set(row) for row in rows)


def test_validate_measures_an_export_and_leaves_it_as_it_was(stages, monkeypatch, capsys):
    root, _ = stages
    monkeypatch.setattr("sys.argv", ["rlhf"])
    before = (root / "reward/config.yaml").read_bytes()
    with working_folder(root):
        main(["validate", *REWARD, *short("reward/export", "pairs.jsonl", "reward")])
    assert "val/accuracy" in capsys.readouterr().out
    assert (root / "reward/config.yaml").read_bytes() == before


def test_the_exported_policy_generates_with_plain_transformers(stages):
    root, _ = stages
    tokenizer = AutoTokenizer.from_pretrained(root / "ppo/export")
    model = AutoModelForCausalLM.from_pretrained(root / "ppo/export")
    ids = tokenizer("\n\nHuman: how do i bake bread?\n\nAssistant:", return_tensors="pt")
    output = model.generate(**ids, max_new_tokens=3, do_sample=False)
    assert output.shape[1] <= ids["input_ids"].shape[1] + 3


def test_ctrl_c_ends_with_one_line_and_the_run_resumes(stages, monkeypatch):
    root, _ = stages
    (root / "callbacks.yaml").write_text(
        "trainer:\n  max_epochs: -1\n  callbacks:\n"
        "  - class_path: ModelCheckpoint\n    init_args: {every_n_train_steps: 2, save_last: true}\n"
        "  - class_path: rlhf_lightning.HFExport\n  - class_path: helpers.cli_runs.Announce\n"
    )
    args = ["fit", *SFT, "--config=callbacks.yaml", *short("lm", "pairs.jsonl", "stopped", steps=100_000, report=True)]
    with working_folder(root):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        # A test run in the background inherits a SIGINT that is ignored; the command must hear it.
        hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        process = subprocess.Popen(command(*args), env=environment(), text=True, preexec_fn=hear, **pipes)
        assert process.stdout is not None
        assert process.stdout.readline() == "checkpoint written\n", process.communicate()[1]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=600)
        assert process.returncode == 130, err
        last_line = err.strip().splitlines()[-1]
        assert "Traceback" not in out + err
        assert last_line.startswith("stopped by SIGINT after ")
        assert last_line.endswith("/last.ckpt' by adding --ckpt_path auto to the same command")
        saved = torch.load("stopped/checkpoints/last.ckpt", weights_only=True)["global_step"]
        assert int(last_line.split()[4]) == saved
        assert not list(Path("stopped").glob("export*"))
        assert Path("stopped/report.html").exists()
        monkeypatch.setattr("sys.argv", ["rlhf"])
        goal = saved + 2 + saved % 2  # at which a checkpoint is due
        main([*args, "--ckpt_path=last", f"--trainer.max_steps={goal}"])
        assert torch.load("stopped/checkpoints/last.ckpt", weights_only=True)["global_step"] == goal
        assert (root / "stopped/export/model.safetensors").is_file()
