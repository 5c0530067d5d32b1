"""What an evaluation finds is read as it was written, and goes on where it was stopped."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.results import Curve, Evaluation, Lines, Result, key_of_settings

RESULTS = [
    Result("perplexity", "runs/sft", "all", 12.3456, 11.0, 13.0, 500),
    Result("perplexity", "runs/sft", "source=helpful", 1234.5, None, None, 1),
]
CURVE = Curve("reliability", "runs/reward", "predicted", "observed", [(0.55, 0.6, 0.5, 0.7, 120)], {"ece": 0.1})


def line(row: int, **more):
    return {"metric": "perplexity", "model": "m", "row": row, "key": "k", **more}


def test_what_is_read_is_what_was_written(tmp_path):
    evaluation = Evaluation({"seed": 1}, RESULTS, [CURVE])
    evaluation.save(tmp_path / "new")
    for place in (tmp_path / "new", tmp_path / "new" / "evaluation.json"):
        assert Evaluation.read(place) == evaluation
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["evaluation.json"]


def test_numbers_that_are_none_are_null(tmp_path):
    Evaluation(results=[RESULTS[0]._replace(high=float("inf"), low=float("nan"))]).save(tmp_path)
    said = json.loads((tmp_path / "evaluation.json").read_text())["results"][0]
    assert (said["low"], said["high"]) == (None, None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "does not exist; make it with `rlhf evaluate`"),
        ("{", "is not what `rlhf evaluate` writes"),
        ("[]", "is not what `rlhf evaluate` writes"),
        ('{"version": 1, "results": [{}]}', "is not what `rlhf evaluate` writes"),
        ('{"version": 7}', "has version 7, this package reads 1"),
    ],
)
def test_a_file_of_others_is_named(tmp_path, text, said):
    file = tmp_path / "evaluation.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=said):
        Evaluation.read(file)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Evaluation().save(tmp_path / "file" / "folder")


def test_the_table_shows_every_number_with_its_interval():
    out = io.StringIO()
    Evaluation(results=RESULTS).print_table(Console(file=out, width=100))
    first, second = out.getvalue().splitlines()[1:]
    assert first.split() == ["perplexity", "runs/sft", "all", "12.346", "11.000", "to", "13.000", "500"]
    assert second.split() == ["source=helpful", "1,234", "1"]


def test_lines_of_the_same_settings_are_not_made_again(tmp_path):
    Lines(tmp_path).add([line(0, nll=1.5), line(1), line(2, key="other")])
    again = Lines(tmp_path)
    assert again.made_before("perplexity", "m", "k") == {0: line(0, nll=1.5), 1: line(1)}
    assert Lines(tmp_path).made_before("perplexity", "other", "k") == {}
    assert Lines(tmp_path).made_before("rouge", "m", "k") == {}


def test_a_line_that_was_cut_off_is_made_again_and_harms_none_after_it(tmp_path):
    lines = Lines(tmp_path)
    lines.add([line(0), line(1)])
    whole = lines.path.read_text()
    lines.path.write_text(whole[:-8])
    resumed = Lines(tmp_path)
    assert list(resumed.made_before("perplexity", "m", "k")) == [0]
    resumed.add([line(1)])
    assert list(Lines(tmp_path).made_before("perplexity", "m", "k")) == [0, 1]
    resumed.finish()
    assert lines.path.read_text() == whole


def test_in_the_end_only_the_lines_of_this_evaluation_are_left_in_order(tmp_path):
    Lines(tmp_path).add([line(5, key="old"), line(1), line(0)])
    lines = Lines(tmp_path)
    lines.made_before("perplexity", "m", "k")
    lines.add([line(9, model="other"), line(3), line(2, bad=float("nan"))])
    lines.finish()
    left = [json.loads(text) for text in lines.path.read_text().splitlines()]
    assert [(one["model"], one["row"]) for one in left] == [("m", 0), ("m", 1), ("m", 2), ("m", 3), ("other", 9)]
    assert left[2]["bad"] is None


def test_a_key_says_all_that_it_is_made_of():
    def function():
        pass

    keys = {key_of_settings("a", {"b": 1}), key_of_settings("a", {"b": 2}), key_of_settings("a", function)}
    assert len(keys) == 3


def test_a_table_shows_names_as_they_are_and_numbers_that_are_small():
    said = io.StringIO()
    row = RESULTS[0]._replace(model="runs/[/b][red]x", group="source=[i]", value=0.00042, low=0.0, high=0.0213)
    Evaluation(results=[row]).print_table(Console(file=said, width=120))
    assert "runs/[/b][red]x" in said.getvalue()
    assert "source=[i]" in said.getvalue()
    assert "0.00042" in said.getvalue()
    assert "0.000 to 0.021" in said.getvalue()


@pytest.mark.parametrize("content", ["[]", '{"accuracy": 0.9}', "[" * 9999, "not JSON"])
def test_files_of_others_are_not_replaced(tmp_path, content):
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(UserError, match=r"evaluation.json is not what `rlhf evaluate` writes; name another folder"):
        Evaluation(results=RESULTS).save(tmp_path)
    assert (tmp_path / "evaluation.json").read_text() == content
    (tmp_path / "evaluation.jsonl").write_text('{"mine": 1}\n{"mine": 2}\n')
    with pytest.raises(UserError, match=r"evaluation.jsonl is not what `rlhf evaluate` writes"):
        Lines(tmp_path)


def test_an_evaluation_holds_no_passwords(tmp_path):
    Evaluation({"data": "https://me:s3cret@host/rows.jsonl"}, RESULTS).save(tmp_path)
    assert "s3cret" not in (tmp_path / "evaluation.json").read_text()
    Evaluation({"seed": 2}, RESULTS).save(tmp_path)  # its own may be replaced
