"""`rlhf evaluate`: its config, its words, its table, and its files."""

from __future__ import annotations

import io
import json

import pytest
import yaml
from rich.console import Console

from helpers.cli_runs import run, save_model, save_pairs
from helpers.signatures import parameters
from rlhf_lightning.cli.evaluate import list_words, reporting
from rlhf_lightning.cli.main import main
from rlhf_lightning.cli.recipes import RECIPES
from rlhf_lightning.evaluation.suite import evaluate
from rlhf_lightning.runs.lock import locked


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "a", seed=0)
    save_model(folder / "b", seed=1)
    save_pairs(folder / "pairs.jsonl", 40)
    return folder


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line a bad command ends with."""
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_one_command_gives_the_table_and_the_files(inputs):
    options = ["--models", "a", "b", "--reference", "a", "--validation_split", "0.3", "--sampling.max_new_tokens", "4"]
    words = [
        "evaluate",
        "--config",
        "evaluate.yaml",
        "--data",
        "pairs.jsonl",
        *options,
        "--perplexity.max_length",
        "90",
    ]
    ended = run(*words, cwd=inputs)
    assert ended.returncode == 0, ended.stderr
    for word in ("perplexity", "kl_k1", "against=a", "runs/evaluation/evaluation.json", "95% interval"):
        assert word in ended.stdout
    assert "perplexity of b" in ended.stderr
    said = json.loads((inputs / "runs" / "evaluation" / "evaluation.json").read_text())
    assert [one["model"] for one in said["results"] if one["metric"] == "perplexity"] == ["a", "b"]
    assert said["settings"]["models"] == ["a", "b"]
    assert (said["settings"]["num_samples"], said["settings"]["perplexity"]) == (500, {"max_length": 90})
    lines = (inputs / "runs" / "evaluation" / "evaluation.jsonl").read_text().splitlines()
    assert {json.loads(line)["metric"] for line in lines} == {"perplexity", "kl"}


def test_the_recipe_says_what_the_function_takes():
    recipe = RECIPES / "evaluate.yaml"
    given = yaml.safe_load(recipe.read_text())
    assert set(given) <= set(parameters(evaluate))
    header = recipe.read_text().partition("\ndata:")[0]
    assert "rlhf evaluate --config evaluate.yaml" in header
    for word in ("Hardware:", "Result:"):
        assert word in header


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "perplexty"], "'perplexty' is unknown; did you mean perplexity?"),
        (["--perplexity.max_len", "3"], "perplexity.max_len"),
        (["--part", "everything"], "part"),
        (["--config", "sft.yaml"], "is one of a stage; `rlhf evaluate` takes evaluate.yaml"),
        (["--models", "b"], "--models is given twice; pass all names after one --models"),
        (["--perplexity.max_length", "0"], "perplexity.max_length (0) must be at least 1"),
    ],
)
def test_bad_words_are_named_in_one_line(inputs, capsys, monkeypatch, words, said):
    monkeypatch.chdir(inputs)
    line = refused(["evaluate", "--data", "pairs.jsonl", "--models", "a", *words], capsys)
    assert line.startswith("error: ")
    assert said in line


def test_a_second_one_into_the_same_folder_is_refused(inputs, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(inputs)
    words = ["evaluate", "--data", "pairs.jsonl", "--models", "a", "--out", str(tmp_path / "out")]
    with locked(tmp_path / "out"):
        line = refused(words, capsys)
    assert line.startswith(f"error: '{tmp_path / 'out'}' is in use by another run (process ")
    assert line.endswith("or choose another --out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [[], ["--models", "a"]])
def test_one_that_fails_leaves_no_folder(inputs, capsys, monkeypatch, tmp_path, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").symlink_to(inputs / "a")
    refused(["evaluate", "--data", "none.jsonl", *words], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    for name in set(parameters(evaluate)) - {"report"}:
        assert f"--{name}" in printed
    assert "--report" not in printed


def test_names_after_a_list_are_all_its_own():
    words = ["--models", "a", "b", "--seed", "1", "--tasks", "[kl]", "--rewards", "r", "--out=x"]
    joined = ['--models=["a", "b"]', "--seed", "1", "--tasks=[kl]", '--rewards=["r"]', "--out=x"]
    assert list_words(words) == joined


def test_what_users_name_is_no_markup(inputs, monkeypatch, capsys):
    monkeypatch.chdir(inputs)
    words = ["--part", "all", "--num_samples", "2", "--rewards", "helpers.stages.share_of_letters"]
    main(["evaluate", "--data", "pairs.jsonl", *words, "--out", "runs/[/x][bold]"])
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == "each row  runs/[/x][bold]/evaluation.jsonl"
    assert "helpers.stages.share_of_letters  all" in said.out  # in one line, where there is no window


def test_away_from_a_terminal_progress_is_told_in_lines(monkeypatch):
    out, now = io.StringIO(), iter([0.0, 1.0, 5.5, 5.5, 6.0, 11.0, 11.0])
    monkeypatch.setattr("rlhf_lightning.cli.evaluate.time.monotonic", lambda: next(now))
    with reporting(Console(file=out)) as report:
        told = report("kl of [/a]", 40)
        for done in (1, 2.5, 3, 4):
            told(done)
    assert out.getvalue().splitlines() == [
        f"kl of [/a]: {said}" for said in ("40 rows", "2 of 40 rows", "4 of 40 rows")
    ]


def test_on_a_terminal_there_is_a_bar():
    out = io.StringIO()
    with reporting(Console(file=out, force_terminal=True, width=100)) as report:
        report("loading a", 0)
        report("kl of [/a]", 40)(10.5)
    assert "kl of [/a]" in out.getvalue()
