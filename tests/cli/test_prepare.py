"""`rlhf prepare`: its config, its errors, and that a folder appears whole or not at all."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from helpers.cli_runs import save_pairs
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.cli.main import main
from rlhf_lightning.data.preparing.preparation import Preparation
from rlhf_lightning.data.preparing.prepared import PreparedFolder

PARTS = ("train", "validation", "test")
FILES = {
    *(f"{kind}_{part}.arrow" for kind in ("finetune", "preference", "prompts") for part in PARTS),
    *(
        "args.json",
        "example_prompt.json",
        "manifest.json",
        "prompt_hashes.npz",
        "report.json",
        "report.txt",
        "lengths.png",
    ),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    save_pairs(folder / "pairs.jsonl")
    return folder


@pytest.fixture(autouse=True)
def _no_picture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty file in its place where the picture is not looked at: it takes two thirds of a run."""
    if "report" not in request.node.name:
        place = "rlhf_lightning.data.preparing.report.draw_lengths"
        monkeypatch.setattr(place, lambda path, *_: path.touch())


@pytest.fixture
def words(inputs: Path) -> list[str]:
    """The command, but for `--out`."""
    data = [f"--tokenizer={inputs / 'tokenizer'}", f"--data={inputs / 'pairs.jsonl'}"]
    return ["prepare", "--config=data.yaml", *data, "--max_length=64", "--validation_split=0.25", "--num_proc=1"]


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line a bad command ends with."""
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


SOURCE = """
from rlhf_lightning import Table
from rlhf_lightning.data.sources import Source


class Doubled(Source):
    name = "doubled"

    def open(self):
        return Table([{"prompt": "one?", "response": "two"}] * 2).open()
"""


def test_a_source_of_the_working_folder_is_found(words, tmp_path, monkeypatch):
    (tmp_path / "doubled_here.py").write_text(SOURCE)
    (tmp_path / "doubled.yaml").write_text("data: {class_path: doubled_here.Doubled}")
    monkeypatch.chdir(tmp_path)
    without_data = [word for word in words if not word.startswith("--data=")]
    main([*without_data, "--config=doubled.yaml", "--validation_split=0", "--out=out"])
    assert PreparedFolder.open(Path("out")).manifest["sources"]["data"]["counts"]["rows"] == 2


def test_one_command_gives_the_folder_and_the_report(words, tmp_path, capsys):
    out = tmp_path / "deep" / "data"
    main([*words, f"--out={out}"])
    assert {path.name for path in out.iterdir()} == FILES
    assert list(out.parent.iterdir()) == [out]
    printed = capsys.readouterr().out
    saved = (out / "report.txt").read_text(encoding="utf-8")
    for text in (printed, saved):
        assert "= kept" in text
        assert "⟦ Happy to help!<|end|>⟧" in text
    assert str(out / "lengths.png") in printed
    assert (out / "lengths.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((out / "report.json").read_text(encoding="utf-8"))["written"]
    assert sum(written["preference"].values()) == 24
    assert written["preference"]["validation"] > 0
    assert len(PreparedFolder.open(out).part("preference", "train")) == written["preference"]["train"]


def test_settings_of_the_recipe_are_overridden_one_by_one(words, capsys):
    with pytest.raises(SystemExit) as end:
        main([*words, "--filters.duplicates=keep", "--stage_split={sft: 0.5, ppo: 0.5}", "--print_config"])
    assert end.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    recipe = yaml.safe_load(Path(__file__).parents[2].joinpath("configs", "data.yaml").read_text())
    assert set(recipe) <= set(printed)
    assert printed["filters"] == recipe["filters"] | {"duplicates": "keep", "shuffle": False, "seed": 42} | {
        "remove_evaluation_prompts": False
    }
    assert printed["stage_split"] == {"sft": 0.5, "ppo": 0.5}
    assert (printed["max_length"], printed["long_prompts"]) == (64, "cut")


def test_a_printed_config_is_a_config_itself(words, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*words, f"--out={tmp_path / 'data'}", "--print_config"])
    own = tmp_path / "own.yaml"
    own.write_text(capsys.readouterr().out)
    main(["prepare", "--config", str(own)])
    assert PreparedFolder.open(tmp_path / "data").manifest["arguments"]["limits"]["max_length"] == 64


def test_help_documents_every_argument(capsys):
    with pytest.raises(SystemExit) as end:
        main(["prepare", "--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "rlhf prepare --config RECIPE --out DIR" in text
    assert "--minimum_response_length MINIMUM_RESPONSE_LENGTH drop rows with a response of fewer tokens" in text
    assert "--filters.remove_same_inputs {true,false} keep the first of the rows" in text
    assert "--plain_format.user" in text
    assert "Lightning Trainer" not in text


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (["--max_lenght=3"], "unknown key 'max_lenght'; did you mean 'max_length'?"),
        (["--max_length=many"], "max_length: expected int, got many"),
        (["--max_length=0"], "max_length (0) must be at least 1"),
        (["--num_proc=0"], "num_proc (0) must be at least 1"),
        (["--data=nowhere.jsonl"], "nowhere.jsonl does not exist; check the path"),
        (["--tokenizer=./nowhere"], "nowhere"),
        (["--stage_split={sft: 0.5, rm: 0.5}"], "'rm' is not one of sft, reward, dpo, ppo"),
        (["--kinds=[demos]"], "kinds"),
        (["--columns={prompt: question}"], "no column 'question'"),
    ],
)
def test_a_mistake_gets_one_line_and_leaves_nothing(words, tmp_path, capsys, changed, expected):
    assert expected in refused([*words, f"--out={tmp_path / 'data'}", *changed], capsys)
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_named(words, capsys):
    assert refused(words, capsys) == "out missing; pass --out"
    assert refused(["prepare", "--out=x"], capsys) == "tokenizer and data missing; pass --tokenizer and --data"


def test_a_folder_of_something_else_is_never_touched(words, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    for more in ([], ["--overwrite=true"]):
        line = refused([*words, f"--out={tmp_path}", *more], capsys)
        assert line == f"--out: {tmp_path} is not empty and not a prepared folder; name another"
    assert "is a file" in refused([*words, f"--out={tmp_path / 'notes.txt'}"], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_prepared_folder_that_holds_something_else_too_is_not_replaced(words, tmp_path, capsys):
    out = tmp_path / "data"
    main([*words, f"--out={out}"])
    (out / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert "holds more than prepared data (notes.txt)" in refused([*words, f"--out={out}", "--overwrite=true"], capsys)

    other = tmp_path / "app"
    other.mkdir()
    (other / "manifest.json").write_text('{"name": "some app"}')
    assert "not a prepared folder" in refused([*words, f"--out={other}", "--overwrite=true"], capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["app", "data"]


def test_an_empty_folder_is_filled_and_a_prepared_one_replaced_only_on_demand(words, tmp_path, capsys):
    out = tmp_path / "data"
    out.mkdir()
    main([*words, f"--out={out}"])
    before = (out / "manifest.json").read_bytes()
    capsys.readouterr()
    assert "--overwrite true" in refused([*words, f"--out={out}", "--max_length=48"], capsys)
    assert (out / "manifest.json").read_bytes() == before
    main([*words, f"--out={out}", "--max_length=48", "--overwrite=true"])
    assert PreparedFolder.open(out).manifest["arguments"]["limits"]["max_length"] == 48
    assert list(tmp_path.iterdir()) == [out]


def test_an_interrupted_run_leaves_what_was_there(words, tmp_path, capsys, monkeypatch):
    def interrupted(preparation: Preparation, folder: Path) -> None:
        (folder / "finetune_train.arrow").write_bytes(b"half")
        raise KeyboardInterrupt

    out = tmp_path / "data"
    main([*words, f"--out={out}"])
    before = (out / "manifest.json").read_bytes()
    monkeypatch.setattr(Preparation, "build", interrupted)
    for more in ([f"--out={out}", "--overwrite=true"], [f"--out={tmp_path / 'new'}"]):
        with pytest.raises(SystemExit) as end:
            main([*words, *more])
        assert end.value.code == 130
    assert (out / "manifest.json").read_bytes() == before
    assert list(tmp_path.iterdir()) == [out]


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(words, tmp_path, monkeypatch):
    out = tmp_path / "data"
    main([*words, f"--out={out}"])
    before = (out / "manifest.json").read_bytes()
    rename = os.rename

    def failing(self: Path, target: Path) -> None:
        if self.name == "new":
            raise KeyboardInterrupt
        rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(SystemExit):
        main([*words, f"--out={out}", "--overwrite=true"])
    assert (out / "manifest.json").read_bytes() == before
    assert list(tmp_path.iterdir()) == [out]


def test_a_disk_that_takes_no_more_is_one_line_that_names_the_folder(words, tmp_path, capsys):
    out, limits = tmp_path / "data", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        said = refused([*words, f"--out={out}"], capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"--out: {out} cannot be written (File too large); make room, or name another" in said
    assert not [*tmp_path.iterdir()]


def test_a_folder_that_a_killed_run_had_put_aside_comes_back(words, tmp_path, capsys, monkeypatch):
    out, workplace = tmp_path / "data", tmp_path / ".data.unfinished"
    main([*words, f"--out={out}"])
    before = (out / "manifest.json").read_bytes()
    (workplace / "notes").mkdir(parents=True)
    out.rename(workplace / "old")
    assert "holds prepared data already" in refused([*words, f"--out={out}"], capsys)
    assert (out / "manifest.json").read_bytes() == before
    assert [path.name for path in workplace.iterdir()] == ["notes"]  # somebody else's


def test_the_rest_of_a_killed_run_is_cleared_away(words, tmp_path):
    left = tmp_path / ".data.unfinished" / "new"
    left.mkdir(parents=True)
    (left / "finetune_train.arrow").write_bytes(b"half")
    main([*words, f"--out={tmp_path / 'data'}"])
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert {path.name for path in (tmp_path / "data").iterdir()} == FILES


def test_of_two_runs_at_once_the_second_is_refused(words, tmp_path, capsys):
    workplace = tmp_path / ".data.unfinished"
    workplace.mkdir()
    with FileLock(workplace / "lock"):
        assert "another `rlhf prepare` is writing" in refused([*words, f"--out={tmp_path / 'data'}"], capsys)
    assert not (tmp_path / "data").exists()


def test_rows_come_in_any_class_of_source(words, inputs, tmp_path, capsys):
    config = tmp_path / "blend.yaml"
    table = {"class_path": "rlhf_lightning.data.Table", "init_args": {"path": str(inputs / "pairs.jsonl"), "name": "a"}}
    blend = {"class_path": "rlhf_lightning.data.Blend", "init_args": {"sources": [table, table], "weights": [1, 2]}}
    config.write_text(yaml.safe_dump({"data": blend}))
    command = [word for word in words if not word.startswith("--data=")]
    main([*command, "--config", str(config), "--filters.duplicates=keep", f"--out={tmp_path / 'data'}"])
    assert PreparedFolder.open(tmp_path / "data").manifest["sources"]["data"]["source_weights"] == [1.0, 2.0]
    blend["init_args"]["weights"] = [1]
    config.write_text(yaml.safe_dump({"data": blend}))
    capsys.readouterr()
    line = refused([*command, "--config", str(config), f"--out={tmp_path / 'other'}"], capsys)
    assert line == "a blend of 2 sources has 1 weights; give one for each"
