"""ROUGE is what the rouge-score package says of the answers that were drawn."""

from __future__ import annotations

import json
import sys

import pytest
from rouge_score.rouge_scorer import RougeScorer

from helpers.stages import instruction_rows, save_llama
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.results import Lines
from rlhf_lightning.evaluation.rouge import Rouge, rouge_scorer, rouge_scores
from rlhf_lightning.evaluation.rows import read_rows
from rlhf_lightning.evaluation.task import Bench
from rlhf_lightning.generation.sampling import Sampling

TEXTS = ("The cat sat on the mats.", "the cat was sitting on a mat")


@pytest.mark.parametrize("stemming", [True, False])
def test_scores_are_those_of_the_package(stemming):
    theirs = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=stemming).score(*TEXTS)
    ours = rouge_scores(rouge_scorer(stemming), *TEXTS)
    assert ours == {f"rouge_{name[-1].lower()}": score.fmeasure for name, score in theirs.items()}
    assert 0 < ours["rouge_2"] < ours["rouge_l"] <= ours["rouge_1"]


def test_what_is_said_twice_over_is_all_in_common():
    assert rouge_scores(rouge_scorer(True), " a b c", "a b c") == {"rouge_1": 1, "rouge_2": 1, "rouge_l": 1}


def test_answers_are_measured_against_the_best_response(tmp_path):
    folder = save_llama(tmp_path / "llama")
    rows = read_rows(instruction_rows(5), "finetune")
    bench = Bench([folder], sampling=Sampling(max_new_tokens=8))
    results, _ = Rouge().run(rows, bench, Lines(tmp_path / "out"))
    lines = [json.loads(line) for line in (tmp_path / "out" / "evaluation.jsonl").read_text().splitlines()]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for line in lines:
        assert line["reference"] == instruction_rows(5)[line["row"]]["response"]
        theirs = scorer.score(line["reference"], line["response"])
        assert line["rouge_l"] == theirs["rougeL"].fmeasure
    value = {result.metric: result.value for result in results}
    assert value["rouge_1"] == pytest.approx(sum(line["rouge_1"] for line in lines) / 5)
    assert set(value) == {"rouge_1", "rouge_2", "rouge_l"}


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(UserError, match=r"pip install rlhf-lightning\[evaluation\]"):
        Rouge().check(Bench(["a"]))
