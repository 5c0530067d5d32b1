"""Options that name files and folders: `~` in them means one place for all, and an empty one is refused at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.cli_runs import SFT, run, save_model, save_pairs, short
from rlhf_lightning.cli.main import main
from rlhf_lightning.cli.pipeline.steps import read_pipeline
from rlhf_lightning.cli.places import refuse_empty
from rlhf_lightning.data.sources.files import open_parts
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.suite import run_tasks
from rlhf_lightning.models.folders import check_model_folder
from rlhf_lightning.models.tokenizer import load_tokenizer

DATA = "name a file, a folder or a hub id"
MODEL = "name a folder or a hub id"
REWARD = "name a folder, a hub id or a function"
PLACE = "name a place, or leave it out"
STAGE = ["fit", "--config=sft.yaml", "--model.model_name_or_path=lm", "--data.data=pairs.jsonl"]


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """A working folder that is also the home of nobody else."""
    home = tmp_path / "home"
    home.mkdir()
    folder = tmp_path / "work"
    save_model(folder / "lm")
    save_pairs(folder / "pairs.jsonl")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["rlhf"])
    return folder


def said(capsys, args):
    with pytest.raises(SystemExit) as end:
        main(args)
    captured = capsys.readouterr()
    assert (end.value.code, captured.out, captured.err.count("\n")) == (2, "", 1), captured.err
    return captured.err.removeprefix("error: ").rstrip("\n")


CASES = [
    ([*STAGE, "--data.data="], f"--data.data is empty; {DATA}"),
    ([*STAGE, "--data.data", ""], f"--data.data is empty; {DATA}"),
    ([*STAGE, "--data.data= "], f"--data.data is empty; {DATA}"),
    ([*STAGE, "--data.data=['pairs.jsonl', '']"], f"--data.data is empty; {DATA}"),
    ([*STAGE, "--data.init_args.data="], f"--data.data is empty; {DATA}"),
    ([*STAGE, "--data.validation_data="], f"--data.validation_data is empty; {DATA}"),
    (["predict", *STAGE[1:], "--data.predict_data="], f"--data.predict_data is empty; {DATA}"),
    ([*STAGE, "--data.cache_dir="], f"--data.cache_dir is empty; {PLACE}"),
    ([*STAGE, "--trainer.default_root_dir="], f"--trainer.default_root_dir is empty; {PLACE}"),
    ([*STAGE, "--model.model_name_or_path="], f"--model.model_name_or_path is empty; {MODEL}"),
    ([*STAGE, "--ckpt_path="], "--ckpt_path is empty; name a .ckpt file, or last, or leave it out"),
    ([*STAGE, "--config=empty.yaml"], f"data.data is empty; {DATA}"),
    ([*STAGE, "--config=dirpath.yaml"], f"trainer.callbacks.dirpath is empty; {PLACE}"),
    (["plan", *STAGE[1:], "--model.model_name_or_path="], f"--model.model_name_or_path is empty; {MODEL}"),
    (["prepare", "--tokenizer=", "--data=pairs.jsonl", "--out=x"], f"--tokenizer is empty; {MODEL}"),
    (["prepare", "--tokenizer=lm", "--data=", "--out=x"], f"--data is empty; {DATA}"),
    (["generate", "lm", "--file="], f"--file is empty; {DATA}"),
    (["generate", "", "--file=pairs.jsonl"], "a word after `rlhf generate` is empty; write what it stands for, or le"),
    (["score", "operator.eq", "--file", ""], f"--file is empty; {DATA}"),
    (["evaluate", "--models=lm", "--data="], f"--data is empty; {DATA}"),
    (["evaluate", "--models", "", "--data=pairs.jsonl"], f"--models is empty; {MODEL}"),
    (["sample", "--policy=lm", "--reward=", "--data=pairs.jsonl", "--out=x"], f"--reward is empty; {REWARD}"),
    (["sample", "--policy=lm", "--reward=operator.eq", "--data=pairs.jsonl", "--out="], f"--out is empty; {PLACE}"),
    (["toy", "--out="], f"--out is empty; {PLACE}"),
    (["quickstart", "--out", ""], f"--out is empty; {PLACE}"),
    (["report", ""], "a word after `rlhf report` is empty; write what it stands for, or leave it out"),
    (["pipeline", "--config=pipe.yaml", "--out="], f"--out is empty; {PLACE}"),
    (["pipeline", "--config=pipe.yaml", "--set", "data="], f"step 'sft': --data.data is empty; {DATA}"),
    (["pipeline", "--config=pipe.yaml", "--config=out.yaml"], "out is empty; name a folder, or leave it out"),
]
FILES = {
    "empty.yaml": "data: {init_args: {data: ''}}\n",
    "dirpath.yaml": "trainer: {callbacks: [{class_path: rlhf_lightning.EMA, init_args: {dirpath: ''}}]}\n",
    "out.yaml": "out: ''\n",
    "pipe.yaml": "values: {data: pairs.jsonl}\nsteps:\n  sft:\n    config: sft.yaml\n"
    "    options: {model: {model_name_or_path: lm}, data: {data: '{data}'}}\n",
}


@pytest.mark.parametrize(("args", "message"), CASES, ids=[" ".join([args[0], *args[-2:]]) for args, _ in CASES])
def test_an_empty_name_is_refused_before_anything_runs(inputs, capsys, args, message):
    for name, text in FILES.items():
        (inputs / name).write_text(text)
    config = [word for word in args if word == "--config=empty.yaml"]
    args = [word for word in args if not (config and word.startswith("--data.data="))]
    before = sorted(inputs.rglob("*"))
    assert said(capsys, args).startswith(message)
    assert sorted(inputs.rglob("*")) == before


def test_what_may_be_empty_and_what_is_named_later_passes():
    refuse_empty("generate", ["lm", "--prompt", ""])
    refuse_empty("fit", ["--data.plain_format.user=", "--data.data=", "--data.data=pairs.jsonl", "--data.predict_data"])
    refuse_empty("fit", ["--trainer.callbacks=[{class_path: rlhf_lightning.SampleTexts, init_args: {prompts: ['']}}]"])


def test_an_empty_name_is_not_the_working_folder_from_python_either(inputs):
    with pytest.raises(UserError, match="the data have an empty name"):
        open_parts("")
    with pytest.raises(UserError, match="the model has an empty name"):
        check_model_folder("")
    with pytest.raises(UserError, match="the tokenizer has an empty name"):
        load_tokenizer("")


def test_a_run_below_home_is_one_folder_and_can_be_resumed(inputs):
    words = ["fit", *SFT, *short("lm", "pairs.jsonl", "~/runs/x", report=True)]
    (inputs / "more.yaml").write_text(
        "trainer:\n  callbacks:\n  - {class_path: rlhf_lightning.HFExport}\n"
        "  - {class_path: ModelCheckpoint, init_args: {dirpath: ~/kept, save_last: true}}\n"
    )
    before = sorted(inputs.iterdir())
    first = run(*words, "--config=more.yaml", cwd=inputs)
    assert first.returncode == 0, first.stderr
    assert sorted(inputs.iterdir()) == before
    home = inputs.parent / "home"
    assert {"config.yaml", "export", "report.html"} <= {path.name for path in (home / "runs/x").iterdir()}
    assert (home / "kept/last.ckpt").is_file()
    more = [word.replace("max_steps=2", "max_steps=3") for word in words]
    resumed = run(*more, "--config=more.yaml", "--ckpt_path=last", cwd=inputs)
    assert resumed.returncode == 0, resumed.stderr
    words = [word for word in words[1:] if not word.startswith("--report")]
    measured = run("validate", *words, "--ckpt_path=~/kept/last.ckpt", cwd=inputs)
    assert measured.returncode == 0, measured.stderr
    assert sorted(inputs.iterdir()) == before


def test_toy_goes_to_the_home_folder(inputs):
    main(["toy", "--out=~/toy"])
    assert (inputs.parent / "home/toy/model/config.json").is_file()
    assert not (inputs / "~").exists()


def test_a_pipeline_and_its_config_lie_in_the_home_folder(inputs):
    home = inputs.parent / "home"
    (home / "pipe.yaml").write_text(FILES["pipe.yaml"] + "out: ~/all\n")
    assert read_pipeline(["~/pipe.yaml"], [], None).out == home / "all"
    assert read_pipeline(["~/pipe.yaml"], [], Path("~/other")).out == home / "other"


def test_an_evaluation_lies_in_the_home_folder(inputs):
    run_tasks([], None, lambda need: [], "~/evaluation", {})  # type: ignore[arg-type]
    assert (inputs.parent / "home/evaluation/evaluation.jsonl").is_file()
