"""Perplexity is the exponential of the mean surprise at response tokens, in whichever batches they are read."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from helpers.stages import instruction_rows, save_llama, trainer
from rlhf_lightning import InstructionDataModule, SFTModule
from rlhf_lightning.chat.messages import RefusedTurnsError
from rlhf_lightning.data.preparing.filters import Splits
from rlhf_lightning.evaluation import perplexity as of
from rlhf_lightning.evaluation.perplexity import Perplexity
from rlhf_lightning.evaluation.results import Lines
from rlhf_lightning.evaluation.rows import read_rows
from rlhf_lightning.evaluation.task import Bench


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def said(monkeypatch):
    """Warnings."""
    lines: list[str] = []
    monkeypatch.setattr(of, "rank_zero_warn", lines.append)
    return lines


def measured(folder, out, rows, max_length=None, **options):
    """Values of all rows by metric, and the lines."""
    results, _ = Perplexity(max_length).run(rows, Bench([folder], **options), Lines(out))
    found = {result.metric: result for result in results if result.group == "all"}
    return found, [json.loads(line) for line in (out / "evaluation.jsonl").read_text().splitlines()]


def test_it_is_that_of_the_whole_logits(folder, tmp_path):
    rows = read_rows(instruction_rows(12), "finetune")
    found, lines = measured(folder, tmp_path, rows)
    policy = Bench([folder]).policy(folder)
    nll, tokens = 0.0, 0
    for line in lines:
        prompt, response = policy.chat.encode_dialogue(line["prompt"], line["response"])
        ids = torch.tensor([[*prompt, *response]])
        logprobs = policy.model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
        nll -= logprobs.gather(1, ids[0, len(prompt) :, None]).sum().item()
        tokens += len(response)
    assert sum(line["tokens"] for line in lines) == tokens
    assert found["nll_per_token"].value == pytest.approx(nll / tokens, rel=1e-4)
    assert found["perplexity"].value == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    letters = sum(len(row["response"]) for row in instruction_rows(12))
    assert found["bits_per_byte"].value == pytest.approx(nll / math.log(2) / letters, rel=1e-4)
    assert found["perplexity"].low < found["perplexity"].value < found["perplexity"].high


def test_it_is_the_loss_that_training_validates_with(folder, tmp_path):
    rows, split = instruction_rows(60), 0.4
    data = InstructionDataModule(folder, rows, validation_split=split, max_length=20)
    (logged,) = trainer().validate(SFTModule(folder), data, verbose=False)
    held_out = read_rows(rows, "finetune", part="validation", splits=Splits(split))
    found, _ = measured(folder, tmp_path, held_out, 20)
    assert found["nll_per_token"].value == pytest.approx(logged["val/loss"], rel=1e-4)
    assert found["nll_per_token"].count == len(held_out)


def test_batches_do_not_change_it(folder, tmp_path):
    rows = read_rows(instruction_rows(20), "finetune")
    _, few = measured(folder, tmp_path / "few", rows, max_tokens=24)
    _, many = measured(folder, tmp_path / "many", rows, max_tokens=10_000)
    surprise = [{line["row"]: line["nll"] for line in lines} for lines in (few, many)]
    assert surprise[0] == pytest.approx(surprise[1], rel=1e-4)


def test_each_source_has_its_own(folder, tmp_path):
    rows = read_rows(instruction_rows(20), "finetune")
    rows = [row._replace(source="even" if row.row % 2 == 0 else "odd") for row in rows]
    results, _ = Perplexity().run(rows, Bench([folder]), Lines(tmp_path))
    groups = {result.group: result for result in results if result.metric == "nll_per_token"}
    assert [(name, one.count) for name, one in groups.items()] == [("all", 20), ("source=even", 10), ("source=odd", 10)]
    alone, _ = Perplexity().run(rows[::2], Bench([folder]), Lines(tmp_path / "alone"))
    assert groups["source=even"].value == pytest.approx(alone[1].value, rel=1e-4)


def test_rows_that_are_too_long_are_cut_and_counted(folder, tmp_path, said):
    rows = read_rows({"prompt": ["small happy " * 60, "small"], "response": ["bread", "bread"]}, "finetune")
    _, lines = measured(folder, tmp_path, rows)
    assert [line["cut"] for line in sorted(lines, key=lambda line: line["row"])] == [True, False]
    assert np.isfinite([line["nll"] for line in lines]).all()
    assert said == [f"{folder}: 1 of 2 rows are longer than it may read, and were cut"]


def test_of_a_response_that_was_cut_only_what_was_read_counts(folder, tmp_path):
    rows = read_rows({"prompt": ["small"], "response": ["happy bread " * 20]}, "finetune")
    _, (line,) = measured(folder, tmp_path, rows, 24)
    policy = Bench([folder]).policy(folder)
    prompt, response = policy.chat.encode_dialogue("small", line["response"])
    read = policy.chat.decode([response[: 24 - len(prompt)]])[0]
    assert (line["tokens"], line["bytes"]) == (24 - len(prompt), len(read))
    assert line["cut"]


def test_rows_that_a_template_refuses_are_counted_and_the_others_measured(folder, tmp_path, said, monkeypatch):
    rows = read_rows(instruction_rows(4), "finetune")
    bench = Bench([folder])
    writer = bench.policy(folder).chat._writer
    write = writer.write

    def refuse(dialogue, *options):
        if dialogue.prompt.startswith("2"):
            raise RefusedTurnsError("no", "no such turns")
        return write(dialogue, *options)

    monkeypatch.setattr(writer, "write", refuse)
    results, _ = Perplexity().run(rows, bench, Lines(tmp_path))
    assert results[0].count == 3
    assert said[0].endswith(
        "1 of 4 rows have no perplexity, the first since the dialogue format refuses the turns: no such turns"
    )
