"""The KL of a policy to its reference, estimated from what the policy itself says."""

from __future__ import annotations

import json

import pytest
import torch

from helpers.cli_runs import save_model
from helpers.stages import prompt_rows, save_llama
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.kl import KL, kl_of_response
from rlhf_lightning.evaluation.results import Lines
from rlhf_lightning.evaluation.rows import read_rows
from rlhf_lightning.evaluation.task import Bench
from rlhf_lightning.generation.sampling import Sampling

SAMPLING = Sampling(max_new_tokens=6, temperature=0.7)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [str(save_model(folder / name, seed=seed)) for seed, name in enumerate("ab")]


def measured(models, reference, out, rows, **options):
    bench = Bench(models, reference=reference, sampling=SAMPLING, **options)
    results, _ = KL().run(rows, bench, Lines(out))
    return {(result.model, result.metric): result for result in results}


def lines_of(out):
    return [json.loads(line) for line in (out / "evaluation.jsonl").read_text().splitlines()]


def test_estimates_are_sums_over_the_tokens():
    found = kl_of_response(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0]))
    assert found["k1"] == pytest.approx(0.5 - 1.0)
    k3 = torch.tensor([-0.5, 1.0]).double()
    assert found["k3"] == pytest.approx(float((k3.exp() - 1 - k3).sum()))


def test_a_model_is_no_distance_from_itself(models, tmp_path):
    found = measured(models[:1], models[0], tmp_path, read_rows(prompt_rows(6), "prompts"))
    assert {one.value for (_, metric), one in found.items() if metric.startswith("kl")} == {0}
    assert found[models[0], "kl_k1"].group == f"against={models[0]}"


def test_it_is_that_of_the_logits_at_the_temperature_of_the_sampling(models, tmp_path):
    rows = read_rows(prompt_rows(6), "prompts")
    found = measured(models[1:], models[0], tmp_path, rows)
    bench = Bench(models)
    policy, reference = bench.policy(models[1]), bench.policy(models[0])
    drawn = policy.answer(
        [row.written for row in rows], SAMPLING, policy.row_generators(42, [("answer", row.row) for row in rows])
    )
    total = tokens = 0
    for one in drawn:
        ids = torch.cat([one.prompt_ids, one.ids])[None]
        own, other = (
            (each.model(ids).logits[0, len(one.prompt_ids) - 1 : -1] / 0.7).log_softmax(-1).gather(1, one.ids[:, None])
            for each in (policy, reference)
        )
        total, tokens = total + float((own - other).sum()), tokens + len(one.ids)
    assert found[models[1], "kl_k1"].value == pytest.approx(total / len(rows), rel=1e-3, abs=1e-4)
    assert found[models[1], "kl_k1_per_token"].value == pytest.approx(total / tokens, rel=1e-3, abs=1e-5)
    assert found[models[1], "response_length"].value == pytest.approx(tokens / len(rows))
    assert found[models[1], "kl_k3"].value > 0


def test_batches_do_not_change_what_is_drawn(models, tmp_path):
    rows = read_rows(prompt_rows(7), "prompts")
    for size in (2, 7):
        measured(models[1:], models[0], tmp_path / str(size), rows, batch_size=size)
    few, many = ({line["row"]: line for line in lines_of(tmp_path / size)} for size in ("2", "7"))
    assert {row: line["response"] for row, line in few.items()} == {row: line["response"] for row, line in many.items()}
    assert [line["k1"] for line in few.values()] == pytest.approx([many[row]["k1"] for row in few], abs=1e-4)


def test_prompts_that_are_too_long_are_counted(models, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("rlhf_lightning.evaluation.answers.rank_zero_warn", said.append)
    rows = read_rows({"prompt": ["a small happy " * 60, "small"]}, "prompts")
    measured(models[:1], models[0], tmp_path, rows)
    assert said == [f"{models[0]}: 1 of 2 prompts are longer than it may read and lost their beginning"]


def test_models_of_other_tokenizers_are_refused(models, tmp_path):
    from helpers.tokenizers import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["other", "words"])
    other = save_llama(tmp_path / "other", tokenizer)
    with pytest.raises(UserError, match="different tokenizers, so there is no KL"):
        measured(models[:1], other, tmp_path / "out", read_rows(prompt_rows(2), "prompts"))
