"""`rlhf pipeline`: steps run in order, what is unchanged is left alone, what was stopped goes on, nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.cli_runs import command, environment, save_model, save_pairs
from rlhf_lightning.cli import pipeline
from rlhf_lightning.cli.main import main
from rlhf_lightning.cli.pipeline import record
from rlhf_lightning.errors import UserError

SFT: dict[str, Any] = {
    "config": "sft.yaml",
    "options": {"model.model_name_or_path": "{model}", "data": {"data": "{data}"}},
}
REWARD: dict[str, Any] = {
    "config": "reward.yaml",
    "options": {"model.model_name_or_path": "{sft}", "data.data": "{data}"},
}
SAMPLE: dict[str, Any] = {
    "run": "sample",
    "options": {"policy": "{sft}", "reward": "{reward}", "data": "{data}", "k": 2},
}
VALUES = {"model": "model", "data": "pairs.jsonl"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with what the first step begins with."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    return tmp_path


def write(name: str = "p.yaml", **said: Any) -> str:
    Path(name).write_text(yaml.safe_dump(said, sort_keys=False))
    return name


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that steps gave, each of which leaves what such a command leaves."""
    commands: list[list[str]] = []

    def call(words: list[str]) -> tuple[int, int]:
        commands.append(list(words))
        options = dict(word.removeprefix("--").split("=", 1) for word in words[1:] if "=" in word)
        if words[0] == "fit":
            export = Path(options["trainer.default_root_dir"]) / "export"
            export.mkdir(parents=True, exist_ok=True)
            model = options["model.model_name_or_path"]
            read = [file.read_text() for file in sorted(Path(model).rglob("*")) if file.is_file()]
            (export / "weights").write_text(json.dumps([words, read]))
        elif words[0] == "sample":
            Path(options["out"]).parent.mkdir(parents=True, exist_ok=True)
            Path(options["out"]).write_text("{}\n")
        return 0, 0

    monkeypatch.setattr(pipeline, "_call", call)
    return commands


def run(*words: str) -> None:
    main(["pipeline", *words])


def steps_of(commands: list[list[str]]) -> list[str]:
    """What was run, the report left out."""
    folders = (next(w for w in words if w.startswith(("--trainer.default_root_dir=", "--out="))) for words in commands
               if words[0] != "report")  # fmt: skip
    return [Path(folder.partition("=")[2]).name.replace("rows.jsonl", "rows") for folder in folders]


def test_steps_are_given_values_and_what_earlier_ones_left(here: Path, called: list[list[str]]) -> None:
    write(out="runs/all", values=VALUES, steps={"sft": SFT, "reward": REWARD, "best": SAMPLE})
    run("--config", "p.yaml")
    sft, reward, best, report = called
    assert sft[0] == "fit"
    assert sft[1].endswith("sft.yaml")
    assert sft[2:] == [
        "--model.model_name_or_path=model",
        "--data.data=pairs.jsonl",
        "--trainer.default_root_dir=runs/all/sft",
        "--ckpt_path=auto",
    ]
    assert "--model.model_name_or_path=runs/all/sft/export" in reward
    assert best == ["sample", "--policy=runs/all/sft/export", "--reward=runs/all/reward/export", "--data=pairs.jsonl",
                    "--k=2", "--out=runs/all/best/rows.jsonl"]  # fmt: skip
    assert report == ["report", "runs/all/sft", "runs/all/reward", "--out", "runs/all/report.html"]


def test_what_is_unchanged_is_left_alone_and_what_follows_a_change_is_made_anew(
    here: Path, called: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    steps = {"sft": SFT, "reward": REWARD, "best": SAMPLE}
    write(values=VALUES, steps=steps)
    run("--config", "p.yaml")
    called.clear()
    capsys.readouterr()
    run("--config", "p.yaml")
    assert steps_of(called) == []
    assert capsys.readouterr().out.count("unchanged, left alone") == 3

    # An option of the second: the first stays, the third reads other scores.
    changed = {**REWARD, "options": {**REWARD["options"], "model.loss": "average"}}
    write(values=VALUES, steps={**steps, "reward": changed})
    run("--config", "p.yaml")
    assert steps_of(called) == ["reward", "rows"]
    assert "its command has changed" in capsys.readouterr().out
    assert (here / "runs/pipeline/reward.1/export/weights").is_file()  # nothing is lost
    called.clear()

    # The data of all of them.
    Path("pairs.jsonl").write_text("{}\n{}\n")
    run("--config", "p.yaml")
    assert steps_of(called) == ["sft", "reward", "rows"]
    assert "'pairs.jsonl' has changed" in capsys.readouterr().out
    called.clear()

    # A recipe, and an export that somebody has removed.
    Path("own.yaml").write_text((pipeline.steps.Path(pipeline.steps.find_recipe("sft.yaml"))).read_text())
    write(values=VALUES, steps={**steps, "sft": {**SFT, "config": "own.yaml"}, "reward": changed})
    run("--config", "p.yaml")
    called.clear()
    Path("own.yaml").write_text(Path("own.yaml").read_text() + "\n# another word\n")
    run("--config", "p.yaml")
    assert steps_of(called)[0] == "sft"
    called.clear()
    (here / "runs/pipeline/best/rows.jsonl").unlink()
    run("--config", "p.yaml")
    assert steps_of(called) == ["rows"]


def test_files_that_options_name_themselves_are_looked_at_too(here: Path, called: list[list[str]]) -> None:
    """And texts that are no paths are not."""
    options = {
        "model.model_name_or_path": "model",
        "data.data": ["pairs.jsonl"],
        "data.plain_format.user": "\n" + "a" * 999,
        "data.plain_format.assistant": "~nobody: ",
    }
    write(steps={"sft": {"config": "sft.yaml", "options": options}})
    for expected in (["sft"], [], ["sft"]):
        called.clear()
        run("--config", "p.yaml")
        assert steps_of(called) == expected
        if not expected:
            Path("pairs.jsonl").write_text("{}\n{}\n{}\n")


def test_files_that_a_config_or_a_glob_names_are_looked_at(here: Path, called: list[list[str]]) -> None:
    parts = here / "parts"
    parts.mkdir()
    (parts / "1.jsonl").write_text("{}\n")
    (here / "own.jsonl").write_text("{}\n")
    (here / "other.jsonl").write_text("{}\n")
    init_args = {"data": [{"path": "own.jsonl"}], "validation_data": "other.jsonl"}
    write(
        "own.yaml", data={"class_path": "SFTDataModule", "init_args": init_args}, trainer={"default_root_dir": "logs"}
    )
    options = {"model.model_name_or_path": "{model}", "data.validation_data": "parts/*.jsonl"}
    write(values=VALUES, steps={"sft": {"config": ["sft.yaml", "own.yaml"], "options": options}})
    for changed, again in [
        (None, True),
        ("own.jsonl", True),
        ("other.jsonl", False),  # an option names another
        ("parts/1.jsonl", True),
        ("parts/2.jsonl", True),
        ("parts/note.txt", False),
        ("logs/log", False),
        ("logs/more", False),  # where the config says that it is to work, and the pipeline another place
    ]:
        if changed:
            Path(changed).parent.mkdir(exist_ok=True)
            Path(changed).write_text("another\n")
        called.clear()
        run("--config", "p.yaml")
        assert steps_of(called) == (["sft"] if again else []), changed
    (parts / "2.jsonl").unlink()
    called.clear()
    run("--config", "p.yaml")
    assert steps_of(called) == ["sft"]


@pytest.mark.parametrize("edited", ["own.yaml", "pairs.jsonl"])
def test_what_is_edited_while_a_step_runs_has_changed_the_next_time(
    here: Path,
    called: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    edited: str,
) -> None:
    Path("own.yaml").write_text(Path(pipeline.steps.find_recipe("sft.yaml")).read_text())
    write(values=VALUES, steps={"sft": {**SFT, "config": "own.yaml"}})
    working = pipeline._call

    def slow(words: list[str]) -> tuple[int, int]:
        code = working(words)
        if words[0] == "fit":
            Path(edited).write_text(Path(edited).read_text() + "\n")
        return code

    monkeypatch.setattr(pipeline, "_call", slow)
    run("--config", "p.yaml")
    monkeypatch.setattr(pipeline, "_call", working)
    called.clear()
    run("--config", "p.yaml")
    assert steps_of(called) == ["sft"]
    assert f"'{edited}' has changed" in capsys.readouterr().out
    called.clear()
    run("--config", "p.yaml")
    assert steps_of(called) == []


def test_a_file_that_a_step_makes_itself_is_no_change(
    here: Path, called: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**SFT["options"], "trainer.logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "logs"}}}
    write(values=VALUES, steps={"sft": {**SFT, "options": options}})
    working = pipeline._call

    def logging(words: list[str]) -> tuple[int, int]:
        Path("logs").mkdir()
        Path("logs/metrics.csv").write_text("loss\n")
        return working(words)

    monkeypatch.setattr(pipeline, "_call", logging)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_report", lambda _: None)
        run("--config", "p.yaml")
        called.clear()
        run("--config", "p.yaml")
    assert steps_of(called) == []


@pytest.mark.parametrize("text", ["", " ", ".", "..", "/", "runs", "runs/pipeline", "/dev/zero"])
def test_a_text_that_names_where_the_pipeline_works_is_not_looked_into(
    here: Path, called: list[list[str]], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """Nor what has no end."""
    read: set[str] = set()
    monkeypatch.setattr(record, "_hash_of", lambda path: read.add(str(path)) or ",".join(map(str, here.rglob("*"))))
    (here / "runs/pipeline").mkdir(parents=True)
    options = {**SFT["options"], "data.data": "none.jsonl", "data.plain_format.system": text}
    write(values={"model": "none"}, steps={"sft": {**SFT, "options": options}})
    run("--config", "p.yaml")
    called.clear()
    run("--config", "p.yaml")
    assert steps_of(called) == []
    assert read == set()


@pytest.mark.parametrize("logs", ["logs", "runs/pipeline/sft/logs"])
def test_what_a_step_has_written_does_not_keep_it_from_going_on(
    here: Path, called: list[list[str]], monkeypatch: pytest.MonkeyPatch, logs: str
) -> None:
    options = {**SFT["options"], "trainer.logger": {"class_path": "CSVLogger", "init_args": {"save_dir": logs}}}
    write(values=VALUES, steps={"sft": {**SFT, "options": options}})
    working = pipeline._call

    def stopped(words: list[str]) -> tuple[int, int]:
        Path(logs).mkdir(parents=True, exist_ok=True)
        with Path(logs, "metrics.csv").open("a") as file:
            file.write("loss\n")
        Path("runs/pipeline/sft").mkdir(exist_ok=True)
        Path("runs/pipeline/sft/last.ckpt").touch()
        return 143, 0

    monkeypatch.setattr(pipeline, "_call", stopped)
    for _ in range(2):
        with pytest.raises(SystemExit):
            run("--config", "p.yaml")
    monkeypatch.setattr(pipeline, "_call", working)
    run("--config", "p.yaml")
    assert Path("runs/pipeline/sft/last.ckpt").is_file()
    assert Path(logs, "metrics.csv").read_text() == "loss\nloss\n"
    called.clear()
    run("--config", "p.yaml")
    assert steps_of(called) == []


def test_a_step_that_failed_ends_the_run_with_its_code_and_is_tried_again(
    here: Path, called: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(values=VALUES, steps={"sft": SFT, "reward": REWARD})
    working = pipeline._call
    monkeypatch.setattr(pipeline, "_call", lambda words: (2, 0) if "reward" in words[1] else working(words))
    with pytest.raises(SystemExit) as end:
        run("--config", "p.yaml")
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said == "2/2 reward: ended with code 2; the same command tries it again, once it is fixed\n"
    monkeypatch.setattr(pipeline, "_call", working)
    called.clear()
    run("--config", "p.yaml")
    assert steps_of(called) == ["reward"]
    assert not (here / "runs/pipeline/reward.1").exists()


def test_a_step_that_was_stopped_goes_on_only_with_what_it_had_begun_with(
    here: Path, called: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(values=VALUES, steps={"sft": SFT})
    working = pipeline._call

    def stopped(words: list[str]) -> tuple[int, int]:
        (here / "runs/pipeline/sft").mkdir(parents=True, exist_ok=True)
        (here / "runs/pipeline/sft/last.ckpt").write_text("half")
        return 143, 0

    for options, kept in ({}, "sft"), ({"model.loss_x": None}, "sft.1"):
        monkeypatch.setattr(pipeline, "_call", stopped)
        with pytest.raises(SystemExit):
            run("--config", "p.yaml")
        monkeypatch.setattr(pipeline, "_call", working)
        if options:
            write(values=VALUES, steps={"sft": {**SFT, "options": {**SFT["options"], "seed_everything": 7}}})
        run("--config", "p.yaml")
        assert (here / f"runs/pipeline/{kept}/last.ckpt").is_file()
        (here / "runs/pipeline/.sft.step.json").unlink()
        (here / f"runs/pipeline/{kept}/last.ckpt").unlink()
        subprocess.run(["rm", "-r", "runs"], check=True)


LATE = """
import json, os, signal, sys
from pathlib import Path

name = sys.argv[1]
out = next((word.partition("=")[2] for word in sys.argv if "default_root_dir=" in word), "")
if out:
    Path(out, "export").mkdir(parents=True)
    Path("calls").open("a").write(Path(out).name + " ")
    if Path(out).name == "sft":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.kill(os.getppid(), getattr(signal, NAME))  # and ends as if nothing had been
"""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_told_to_stop_when_a_step_has_all_but_ended_no_other_begins(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, code: int
) -> None:
    Path("late.py").write_text(LATE.replace("NAME", repr(name)))
    monkeypatch.setattr(pipeline, "_RLHF", (sys.executable, str(here / "late.py")))
    write(values=VALUES, steps={"sft": SFT, "reward": REWARD})
    number = getattr(signal, name)  # heard in the background, too, where some are ignored
    handler = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
    before = signal.signal(number, handler)
    try:
        with pytest.raises(SystemExit) as end:
            run("--config", "p.yaml")
        assert signal.getsignal(number) == handler
    finally:
        signal.signal(number, before)
    assert end.value.code == code
    assert "1/2 sft: stopped after it; the same command goes on from here" in capsys.readouterr().err
    run("--config", "p.yaml")
    assert Path("calls").read_text().split() == ["sft", "reward"]


def test_later_files_and_words_win(here: Path, called: list[list[str]]) -> None:
    write(out="a", values={"model": None, "data": "pairs.jsonl"}, steps={"sft": SFT})
    write("more.yaml", out="b", steps={"reward": REWARD})
    run("--config", "p.yaml", "--config", "more.yaml", "--set", "model=model", "--out", "c")
    assert steps_of(called) == ["sft", "reward"]
    assert "--trainer.default_root_dir=c/sft" in called[0]


def test_a_dry_run_says_what_would_be_done_and_does_nothing(
    here: Path, called: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    run("--config", "pipeline.yaml", "--set", "model=model", "--set", "data=pairs.jsonl", "--dry_run")
    said = capsys.readouterr().out
    assert not called
    assert not (here / "runs").exists()
    names = [line.split(":")[0] for line in said.splitlines() if not line.startswith(" ")]
    assert names == ["sft", "reward", "ppo", "evaluation"]
    assert "rlhf evaluate" in said


def test_a_dry_run_tells_steps_that_take_what_is_made_anew_from_those_that_do_not(
    here: Path, called: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """As the run does, whether a name or a path stands for what an earlier step leaves."""
    other = {**SFT, "options": {**SFT["options"], "seed_everything": 7}}
    by_path = {
        **REWARD,
        "options": {**REWARD["options"], "model.model_name_or_path": "runs/../runs/pipeline/sft/export"},
    }
    steps = {"sft": SFT, "other": other, "reward": REWARD, "by_path": by_path, "best": SAMPLE}
    write(values=VALUES, steps=steps)
    run("--config", "p.yaml")
    write(values=VALUES, steps={**steps, "sft": {**SFT, "options": {**SFT["options"], "trainer.max_epochs": 2}}})
    capsys.readouterr()
    run("--config", "p.yaml", "--dry_run")
    said = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if not line.startswith(" "))
    assert said == {
        "sft": "its command has changed",
        "other": "unchanged",
        "reward": "what it begins with is made anew",
        "by_path": "what it begins with is made anew",
        "best": "what it begins with is made anew",
    }
    called.clear()
    run("--config", "p.yaml")
    assert steps_of(called) == ["sft", "reward", "by_path", "rows"]


def one(values: Any = VALUES, **changes: Any) -> dict[str, Any]:
    """A file whose only step is changed."""
    return {"values": values, "steps": {"sft": {**SFT, **changes}}}


def then(run: str, config: str | None = None, **options: Any) -> dict[str, Any]:
    """A file whose last step is another command."""
    last = {"run": run, **({"config": config} if config else {}), "options": options}
    return {"values": VALUES, "steps": {"sft": SFT, "reward": REWARD, "last": last}}


SAMPLED = SAMPLE["options"]
EVALUATED: dict[str, Any] = {"models": ["{sft}"], "data": "{data}"}
WRONG: list[tuple[dict[str, Any], list[str], str]] = [
    (one({**VALUES, "data": None}), [], "the value 'data' is not set: pass --set data=..."),
    (one(), ["--set", "dat=x"], "--set dat: the pipeline has no value of that name; did you mean data?"),
    (one(), ["--set", "other=x"], "--set other: the pipeline has no value of that name; it has model, data"),
    (one(), ["--set", "data"], "--set takes NAME=VALUE, such as data=pairs.jsonl, not 'data'"),
    (
        one({"model": "model", "dta": "x"}),
        [],
        "step 'sft': '{data}' is neither a value nor an earlier step; did you mean '{dta}'?",
    ),
    (
        {"values": VALUES, "steps": {"reward": REWARD, "sft": SFT}},
        [],
        "step 'reward': '{sft}' is what a later step makes, or this one; put that step before it",
    ),
    (one(config="sfd.yaml"), [], "config 'sfd.yaml' is neither in the working folder"),
    (one(runs="fit"), [], "step 'sft': 'runs' is unknown; it may hold config, options, run"),
    (one(run="fits"), [], "step 'sft': run 'fits' is unknown; use fit, toy, prepare, sample, evaluate"),
    (one(options={**SFT["options"], "model.los": 1}), [], "step 'sft': unknown key 'model.los'"),
    (
        one(options={**SFT["options"], "model.sampling": {"temperatur_": 1}}),
        [],
        "unknown key 'model.sampling.temperatur_'",
    ),
    (
        one(options={**SFT["options"], "model.finetune.mode": "lorra"}),
        [],
        "step 'sft': model.finetune.mode: expected one of all, last_layer, lora, got lorra",
    ),
    (
        one(options={**SFT["options"], "model.finetune": {"mode": "lorra"}}),
        [],
        "step 'sft': model.finetune.mode: expected one of all, last_layer, lora, got lorra",
    ),
    (
        one(config=["sft.yaml", "modes.yaml"]),
        [],
        "step 'sft': model.lr_schedule: expected one of cosine, linear, constant, got cosin",
    ),
    (
        then("evaluate", "evaluate.yaml", **EVALUATED, taskss=["winrate"]),
        [],
        "step 'last': unknown key 'taskss'; `rlhf evaluate` has no such option; did you mean 'tasks'?",
    ),
    (then("evaluate", **EVALUATED, winrate={"jugde": "x"}), [], "unknown key 'winrate.jugde'"),
    (then("evaluate", **EVALUATED, report=1), [], "unknown key 'report'; `rlhf evaluate` has no such option"),
    (
        then("evaluate", "sft.yaml", **EVALUATED),
        [],
        "sft.yaml' is one of another command; `rlhf evaluate` takes one of its own",
    ),
    (then("evaluate", "own.yaml", **EVALUATED), [], "unknown key 'sampling.temperatur_'"),
    (then("evaluate", models=["{sft}"]), [], "step 'last': `rlhf evaluate` needs 'data': a file (.json, .jsonl"),
    (
        then("evaluate", **EVALUATED, part="tests"),
        [],
        "step 'last': part: expected one of all, train, validation, test, got tests",
    ),
    (then("sample", **SAMPLED, rewrd="x"), [], "step 'last': unknown key 'rewrd'"),
    (then("sample", policy="{sft}", data="{data}"), [], "step 'last': `rlhf sample` needs 'reward': folder or hub id"),
    (then("sample", **SAMPLED, keep="worst"), [], "step 'last': keep: expected one of best, all, pair, got worst"),
    (
        then("sample", **{**SAMPLED, "data": {"data": "x"}}),
        [],
        "--data.data belongs to the stages; `rlhf sample` takes",
    ),
    (then("prepare", "data.yaml", tokeniser="{sft}"), [], "unknown key 'tokeniser'"),
    (then("prepare", "data.yaml", filters={"duplicate": "all"}), [], "unknown key 'filters.duplicate'"),
    (then("toy", sed=1), [], "step 'last': unknown key 'sed'; `rlhf toy` has no such option; did you mean 'seed'?"),
    (then("toy", seed="abc"), [], "step 'last': seed: expected int, got abc"),
    (then("toy", seed=None), [], "step 'last': seed: expected int, got null"),
    (then("sample", **{**SAMPLED, "k": "many"}), [], "step 'last': k: expected int, got many"),
    (
        one(options={**SFT["options"], "model.optimizer": None}),
        [],
        "step 'sft': model.optimizer: expected a class or function, got null",
    ),
    (
        one(options={**SFT["options"], "model.max_tokens_per_batch": "lots"}),
        [],
        "step 'sft': model.max_tokens_per_batch: expected int or one of auto, got lots",
    ),
    ({**one(), "out": 5}, [], "'p.yaml': out must be the name of a folder, not 5"),
    (then("toy", "data.yaml"), [], "data.yaml' is one of another command; `rlhf toy` takes none"),
    (
        one(options={**SFT["options"], "ckpt_path": "some.ckpt"}),
        [],
        "step 'sft': leave out 'ckpt_path', the pipeline sets it itself: to 'auto'",
    ),
    (one(options={**SFT["options"], "ckpt": "last"}), [], "leave out 'ckpt', the pipeline sets 'ckpt_path' itself"),
    (
        one(options={**SFT["options"], "trainer": {"default_root_dir": "/else"}}),
        [],
        "leave out 'trainer.default_root_dir', the pipeline sets it itself: to 'runs/pipeline/sft'",
    ),
    (
        then("sample", **SAMPLED, out="x.jsonl"),
        [],
        "step 'last': leave out 'out', the pipeline sets it itself: to 'runs/pipeline/last/rows.jsonl'",
    ),
    (then("evaluate", **EVALUATED, out="x"), [], "leave out 'out', the pipeline sets it itself"),
    (then("toy", out="x"), [], "leave out 'out', the pipeline sets it itself"),
    (
        one(config=["sft.yaml", "resume.yaml"]),
        [],
        "config 'resume.yaml' says ckpt_path, which the pipeline sets itself",
    ),
    (one(options={**SFT["options"], "config": "own.yaml"}), [], "step 'sft': write config beside options, not below"),
    (
        {"values": VALUES, "steps": {"sft": SFT, "reward": None}},
        [],
        "step 'reward' is null: write 'config: ...' and 'options: ...' below it, or leave its name out",
    ),
    (one(config=[None]), [], "step 'sft': config must be the name of a file, or a list of such names"),
    (one(config=3), [], "step 'sft': config must be the name of a file, or a list of such names"),
    (one(options=["model"]), [], "step 'sft': options must hold 'name: value' lines"),
    ({"values": VALUES, "steps": {}}, [], "'p.yaml' has no steps"),
    ({"values": VALUES, "steps": {"data": SFT}}, [], "'data' is the name of a value and of a step"),
    ({"values": VALUES, "steps": {"a b": SFT}}, [], "step 'a b': use letters, digits and _"),
    ({"step": {}}, [], "pipeline 'p.yaml': 'step' is unknown; it may hold out, steps, values"),
    ({"steps": [SFT]}, [], "'p.yaml': steps must hold 'name: ...' lines"),
]


@pytest.mark.parametrize(("said", "words", "message"), WRONG)
def test_what_is_wrong_is_said_before_anything_runs(
    here: Path, called: list[list[str]], capsys: pytest.CaptureFixture[str], said: Any, words: list[str], message: str
) -> None:
    write(**said)
    write("own.yaml", sampling={"temperatur_": 1.0})
    write("resume.yaml", ckpt_path="some.ckpt")
    write("modes.yaml", model={"init_args": {"lr_schedule": "cosin"}})
    with pytest.raises(SystemExit) as end:
        run("--config", "p.yaml", *words)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not called


@pytest.mark.parametrize(
    "step",
    [
        then("evaluate", "evaluate.yaml", **EVALUATED, winrate={"judge": "{reward}"}, sampling={"top_k": 3}),
        then("evaluate", models=["{sft}"], data={"class_path": "Table", "init_args": {"path": "{data}"}}),
        then("sample", **SAMPLED, keep="all", reward_weights={"x": 1.0}, columns={"prompt": "question"}),
        then("prepare", "data.yaml", **{"tokenizer": "{sft}", "filters.duplicates": "exact", "kinds": ["prompts"]}),
        then("prepare", tokenizer="{sft}", data="{data}", plain_format={"user": "Q: "}),
        then("evaluate", **EVALUATED, winrate={"class_path": "WinRate", "init_args": {"judge": "x"}}),
        then("toy", seed=3),
        then("sample", **{**SAMPLED, "temperature": "1e-1", "columns": None}),
        one(
            options={**SFT["options"], "model.gradient_clip_val": None, "model.compile": "yes", "data.max_length": "64"}
        ),
        one(options={**SFT["options"], "model.max_tokens_per_batch": "auto", "data.stage_split": {"sft": 0.5}}),
    ],
)
def test_what_the_commands_take_is_taken(here: Path, called: list[list[str]], step: Any) -> None:
    write(**step)
    run("--config", "p.yaml", "--dry_run")


def test_no_file_is_named(here: Path) -> None:
    with pytest.raises(UserError, match="--config names no file"):
        pipeline.read_pipeline([], [], None)


SHORT = {
    "data.validation_split": 0.25,
    "trainer": {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False},
    "report": False,
}


@pytest.mark.launched
def test_a_whole_pipeline_is_stopped_goes_on_and_is_then_left_alone(tmp_path: Path) -> None:
    """SFT, reward model, the best of two answers, and SFT on those, by real commands."""
    save_model(tmp_path / "model")
    save_pairs(tmp_path / "pairs.jsonl", 24)
    texts = {"data.max_length": 64, "data.batch_size": 4}
    sft = {**SFT["options"], **texts, **SHORT, "model.sampling.max_new_tokens": 4}
    again = {**sft, "model.model_name_or_path": "{sft}", "data": {"data": "{best}"}}
    steps = {
        "sft": {"config": "sft.yaml", "options": sft},
        "reward": {"config": "reward.yaml", "options": {**REWARD["options"], **texts, **SHORT}},
        "best": {
            **SAMPLE,
            "options": {**SAMPLE["options"], "max_new_tokens": 4, "unfinished": "keep", "device": "cpu"},
        },
        "second": {"config": "sft.yaml", "options": again},
    }
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"values": VALUES, "steps": steps}, sort_keys=False))
    words = command("pipeline", "--config", "p.yaml")
    options: dict[str, Any] = {"cwd": tmp_path, "text": True, "env": environment()}
    said = ""
    # A child of what runs in the background ignores Ctrl-C, which is sent here.
    options |= {"preexec_fn": partial(signal.signal, signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, **options
    ) as first:
        assert first.stdout is not None
        for line in first.stdout:
            said += line
            if "2/4 reward" in said and line.startswith("models: "):  # it has begun
                os.killpg(first.pid, signal.SIGINT)  # as Ctrl-C does
    assert first.returncode == 130, said
    assert "the same command goes on from here" in said
    assert (tmp_path / "runs/pipeline/sft/export/config.json").is_file()

    second = subprocess.run(words, capture_output=True, timeout=600, check=False, **options)
    assert second.returncode == 0, second.stderr
    assert "1/4 sft: unchanged, left alone" in second.stdout
    rows = (tmp_path / "runs/pipeline/best/rows.jsonl").read_text().splitlines()
    assert len(rows) == 24
    assert (tmp_path / "runs/pipeline/second/export/config.json").is_file()
    assert (tmp_path / "runs/pipeline/report.html").is_file()
    assert not list((tmp_path / "runs/pipeline").glob("*.1"))

    third = subprocess.run(words, capture_output=True, timeout=600, check=False, **options)
    assert third.returncode == 0, third.stderr
    assert third.stdout.count("unchanged, left alone") == 4
