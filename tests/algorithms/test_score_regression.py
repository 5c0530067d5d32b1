"""Regression on scores: masked errors by hand, any micro-batches, the export in plain transformers, and PPO with it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from helpers.distributed import run_in_processes
from helpers.stage_runs import run
from helpers.stages import (
    adamw,
    assert_close_weights,
    disturb_random_numbers,
    fit,
    prompt_rows,
    same_weights,
    save_llama,
    save_reward_model,
    sgd,
    trainer,
    weights,
    words,
)
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning import (
    FineTune,
    HFExport,
    PPOModule,
    PromptDataModule,
    RatingDataModule,
    Sampling,
    ScoreRegressionModule,
    UserError,
)
from rlhf_lightning.algorithms.reward_metrics import Correlations
from rlhf_lightning.functional import correlation
from rlhf_lightning.models.calibration import Calibration
from rlhf_lightning.models.labels import labels_of
from rlhf_lightning.models.scalar_lm import load_reward_model

NAMES = ["helpfulness", "verbosity"]
CONSTANT: dict[str, Any] = {"lr_schedule": "constant", "warmup_steps": 0, "gradient_clip_val": None}
NAN = math.nan


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"), tiny_tokenizer(pad="eos"))


def rated_rows(count: int = 24) -> list[dict[str, Any]]:
    """Longer answers are more verbose; every third has no helpfulness, and one has no score at all."""
    rows = []
    for i in range(count):
        said = words(1 + i % 6, seed=i)
        given = {"helpfulness": None if i % 3 == 2 else float(i % 4), "verbosity": (i % 6) / 2}
        rows.append({"prompt": f"say {i} {words(2, seed=100 + i)}", "response": f" {said}", **given})
    return [*rows, {"prompt": "nothing", "response": " at all", "helpfulness": None, "verbosity": None}]


def data(folder: str, rows: Any = None, **settings: Any) -> RatingDataModule:
    options = {"max_length": 48, "validation_split": 0.25, "batch_size": 6, "attributes": NAMES} | settings
    return RatingDataModule(folder, rated_rows() if rows is None else rows, **options)


def make(folder: str, lr: float = 0.05, **settings: Any) -> ScoreRegressionModule:
    disturb_random_numbers(3)
    return ScoreRegressionModule(folder, attributes=NAMES, **CONSTANT | {"optimizer": sgd(lr)} | settings)


def errors_by_hand(module: Any, batch: Any) -> tuple[Tensor, int]:
    """Sum of squared errors over the scores that are there, row by row without padding, and how many those are."""
    total, count = torch.zeros(()), 0
    for ids, mask, scores, said in zip(*batch[:4], strict=True):
        hidden = module.model.base_model(input_ids=ids[mask].unsqueeze(0)).last_hidden_state[0, -1]
        for predicted, score, there in zip(module.model.score(hidden), scores, said, strict=True):
            if there:
                total, count = total + (predicted - score) ** 2, count + 1
    return total, count


def test_rows_become_scores_with_those_missing_masked(folder):
    module = data(folder, validation_split=0.0, batch_size=24)
    module.setup("fit")
    (batch,) = module.train_dataloader()
    assert module.counts["kept"] == 24
    assert sum(count for name, count in module.counts.items() if "no score is given" in name) == 1
    rows = rated_rows()
    for row, scores, said in zip(batch.row_ids.tolist(), batch.scores, batch.score_mask.tolist(), strict=True):
        assert said == [rows[row]["helpfulness"] is not None, True]
        assert scores[1] == rows[row]["verbosity"]
        assert scores[0] == (rows[row]["helpfulness"] or 0.0)


@pytest.mark.parametrize("cut", [{"micro_batch_size": 1}, {"micro_batch_size": 4}, {"max_tokens_per_batch": 30}])
def test_the_loss_is_a_mean_over_all_scores_of_the_step_however_it_is_cut(folder, cut):
    source = data(folder, validation_split=0.0, batch_size=24)
    whole, pieces = make(folder, max_tokens_per_batch=None), make(folder, **{"max_tokens_per_batch": None} | cut)
    log = fit(whole, source, max_epochs=1)
    fit(pieces, data(folder, validation_split=0.0, batch_size=24), max_epochs=1)
    assert_close_weights(weights(whole.model), weights(pieces.model))
    fresh = make(folder)
    fresh.tokenizer = tiny_tokenizer(pad="eos")
    fresh.load_models()
    (batch,) = source.train_dataloader()
    total, count = errors_by_hand(fresh, batch)
    assert count == 24 + 16
    assert log.series("train/mse")[0] == pytest.approx((total / count).item(), rel=1e-4)
    gradient = torch.autograd.grad(total / count, fresh.model.score.weight)[0]
    moved = fresh.model.score.weight - 0.05 * gradient
    torch.testing.assert_close(whole.model.score.weight, moved, atol=1e-5, rtol=1e-4)


def test_validation_measures_errors_and_correlations_over_the_whole_set(folder):
    module, source = make(folder), data(folder, eval_batch_size=2)
    log = fit(module, source, max_epochs=2, limit_val_batches=1.0)
    batches = list(source.val_dataloader())
    assert len(batches) > 1
    sums = [errors_by_hand(module.eval(), batch) for batch in batches]
    mse = float(sum(total for total, _ in sums)) / sum(count for _, count in sums)
    assert log.series("val/mse")[-1] == pytest.approx(mse, rel=1e-4)
    with torch.no_grad():
        found = torch.cat([module.predicted(batch.input_ids, batch.attention_mask) for batch in batches])
    given, said = (torch.cat([batch[i] for batch in batches]) for i in (2, 3))
    for place, name in enumerate(NAMES):
        x, y = found[said[:, place], place].double(), given[said[:, place], place].double()
        expected = float(torch.corrcoef(torch.stack([x, y]))[0, 1])
        assert log.series(f"val/pearson_{name}")[-1] == pytest.approx(expected, abs=1e-5)


def test_it_learns(folder):
    module = make(folder, optimizer=adamw(3e-3))
    log = fit(module, data(folder, validation_split=0.0), max_epochs=15)
    series = log.series("train/mse")
    assert sum(series[-4:]) < 0.3 * sum(series[:4])


def test_correlations_by_hand():
    metric = Correlations()
    said = torch.tensor([[True, True], [True, False], [True, True]])
    metric.update(torch.tensor([[1.0, 1.0], [2.0, 9.0], [3.0, 2.0]]), torch.tensor([[1.0, 5], [3, 0], [2, 4]]), said)
    assert metric.compute().tolist() == pytest.approx([0.5, -1.0])
    assert correlation(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 2.0])) == 0.0
    assert correlation(torch.tensor([1.0]), torch.tensor([1.0])) == 0.0


@pytest.mark.parametrize("finetune", [FineTune(), FineTune(mode="last_layer"), FineTune(mode="lora", rank=4)])
def test_the_export_says_in_plain_transformers_what_the_module_says(folder, tmp_path, finetune):
    module, export = make(folder, optimizer=adamw(1e-3), finetune=finetune), tmp_path / "export"
    source = data(folder)
    fit(module, source, max_epochs=1, callbacks=[HFExport(str(export))])
    plain = AutoModelForSequenceClassification.from_pretrained(export).eval()
    assert plain.config.id2label == dict(enumerate(NAMES))
    assert plain.config.problem_type == "regression"
    tokenizer = AutoTokenizer.from_pretrained(export)
    assert tokenizer.pad_token_id == plain.config.pad_token_id != tokenizer.eos_token_id
    batch = next(iter(source.val_dataloader()))
    with torch.no_grad():
        ours = module.eval().predicted(batch.input_ids, batch.attention_mask)
        padded = batch.input_ids.masked_fill(~batch.attention_mask, plain.config.pad_token_id)
        theirs = plain(input_ids=padded, attention_mask=batch.attention_mask.long()).logits
        weighed = load_reward_model(export, weights={"helpfulness": 0.5, "verbosity": -2.0})
        scores = weighed.scores(batch.input_ids, batch.attention_mask)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores, theirs @ torch.tensor([0.5, -2.0]), atol=1e-5, rtol=1e-5)
    again = ScoreRegressionModule(str(export), attributes=NAMES)
    (measured,) = trainer().validate(again, data(str(export)), verbose=False)
    assert measured["val/mse"] < 10


def test_an_adapter_s_labels_are_weighed_beside_the_policy_s_base(folder, tmp_path):
    settings = FineTune(mode="lora", rank=4, export="adapter")
    module, export = make(folder, optimizer=adamw(1e-2), finetune=settings), tmp_path / "adapter"
    source = data(folder)
    fit(module, source, max_epochs=1, callbacks=[HFExport(str(export))])
    assert json.loads((export / "reward_calibration.json").read_text())["labels"] == NAMES
    batch = next(iter(source.val_dataloader()))
    with torch.no_grad():
        expected = module.eval().predicted(batch.input_ids, batch.attention_mask) @ torch.tensor([0.5, -2.0])
        merged = load_reward_model(export, weights={"helpfulness": 0.5, "verbosity": -2.0})
        torch.testing.assert_close(merged.scores(batch.input_ids, batch.attention_mask), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match=r"2 labels \(helpfulness, verbosity\)"):
        load_reward_model(export)
    options: dict[str, Any] = {"rollout_batch_size": 8, "minibatch_size": 8, "finetune": FineTune(mode="lora", rank=4)}
    options |= {"sampling": Sampling(max_new_tokens=6), "reward_weights": {"helpfulness": 0.5, "verbosity": -2.0}}
    policy = PPOModule(folder, str(export), optimizer=adamw(1e-3), lr_schedule="constant", **options)
    prompts = PromptDataModule(folder, prompt_rows(18), rollout_batch_size=8, max_prompt_length=24)
    assert fit(policy, prompts, max_steps=2).series("train/score")
    with torch.no_grad():
        beside = policy.scorer.model.scores(batch.input_ids, batch.attention_mask)
    torch.testing.assert_close(beside, expected, atol=1e-4, rtol=1e-4)


def test_a_killed_run_goes_on_bit_for_bit(folder, tmp_path):
    def trained(**options: Any) -> ScoreRegressionModule:
        module, ckpt = make(folder, optimizer=adamw(1e-3)), options.pop("ckpt_path", None)
        one = trainer(max_epochs=2, **options)
        one.fit(module, data(folder), ckpt_path=ckpt)
        options.get("max_steps") and one.save_checkpoint(tmp_path / "half.ckpt")
        return module

    whole = trained()
    trained(max_steps=4)
    resumed = trained(ckpt_path=str(tmp_path / "half.ckpt"))
    assert same_weights(weights(whole.model), weights(resumed.model))


def test_what_does_not_fit_is_refused_in_one_line(folder, tmp_path):
    with pytest.raises(UserError, match=r"needed: prompt and response, or messages, and a column for each of"):
        data(folder, attributes=["helpfulness", "humour"]).setup("fit")
    with pytest.raises(UserError, match="attributes: 'scores' is the name of a column with a meaning"):
        data(folder, attributes=["scores"]).setup("fit")
    with pytest.raises(UserError, match="each once"):
        data(folder, attributes=["helpfulness", "helpfulness"])
    with pytest.raises(UserError, match=r"model.attributes are helpfulness, verbosity, data.attributes verbosity"):
        fit(make(folder), data(folder, attributes=["verbosity", "helpfulness"]), max_steps=1)
    module, swapped = make(folder), data(folder, attributes=["verbosity", "helpfulness"], test_split=0.2)
    fit(module, data(folder), max_steps=1)
    for measure in (trainer().validate, trainer().test):
        with pytest.raises(UserError, match=r"model.attributes are helpfulness, verbosity, data.attributes verbosity"):
            measure(module, swapped, verbose=False)
    one = data(folder, attributes=["verbosity"])
    one.setup("fit")
    with pytest.raises(UserError, match=r"a batch has 1 scores of each response, model.attributes are helpfulness"):
        trainer(max_steps=1).fit(make(folder), one.train_dataloader())
    with pytest.raises(UserError, match="has no trained head"):
        trainer().validate(make(folder), data(folder), verbose=False)
    rows = [*rated_rows(), {"prompt": "a", "response": " b", "helpfulness": "much", "verbosity": 1}]
    with pytest.raises(UserError, match="helpfulness is not a number"):
        data(folder, rows, on_bad_row="error").setup("fit")


def test_prepared_ratings_are_read_with_their_attributes(folder, tmp_path):
    from rlhf_lightning.cli.prepare import prepare

    rows = rated_rows()
    options: dict[str, Any] = {"validation_split": 0.25, "max_length": 48, "attributes": NAMES}
    prepare(tmp_path / "out", folder, rows, **options)
    ready, fresh = data(folder, str(tmp_path / "out"), validation_split=0.1), data(folder)
    for module in (ready, fresh):
        module.setup("fit")
    for one, other in zip(ready.train_dataloader(), fresh.train_dataloader(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    with pytest.raises(UserError, match="prepared with the attributes helpfulness, verbosity, not verbosity"):
        data(folder, str(tmp_path / "out"), attributes=["verbosity"]).setup("fit")
    assert {path.name for path in Path(tmp_path / "out").glob("rated_*.arrow")} >= {"rated_train.arrow"}


def test_a_calibration_of_a_reward_model_does_not_stay_with_what_goes_on_from_it(folder, tmp_path):
    begun = save_reward_model(tmp_path / "reward", folder)
    scalar = load_reward_model(begun)
    scalar.calibration = Calibration(mean=0.5, std=2.0, probe_ids=[5, 6], probe_score=1.0)
    scalar.model.save_pretrained(begun)
    (label,) = labels_of(begun)
    for finetune in (FineTune(), FineTune(mode="lora", rank=2, export="adapter")):
        export = tmp_path / finetune.mode
        module = ScoreRegressionModule(begun, attributes=[label], finetune=finetune, **CONSTANT)
        columns = {label: "helpfulness"}
        fit(module, data(begun, attributes=[label], columns=columns), max_steps=1, callbacks=[HFExport(str(export))])
        assert load_reward_model(export).calibration == Calibration()


def test_rows_that_are_only_scored_may_lack_renamed_attributes(folder):
    rows = [row | {"help": row.pop("helpfulness")} for row in rated_rows()]
    module = make(folder)
    source = data(
        folder, rows, columns={"helpfulness": "help"}, predict_data=[{"prompt": "bake", "response": " bread"}]
    )
    fit(module, source, max_steps=1)
    assert len(trainer().predict(module, source)) == 1
    with pytest.raises(UserError, match=r"needed: .* a column for each of `attributes`"):
        data(folder, rows, columns={"helpfulness": "helped"}).setup("fit")


def test_predictions_name_the_attributes(folder, tmp_path):
    module, export = make(folder), tmp_path / "export"
    fit(module, data(folder), max_epochs=1, callbacks=[HFExport(str(export))])
    source = data(str(export), None, predict_data=[{"prompt": "bake", "response": " bread"}])
    (rows,) = trainer().predict(ScoreRegressionModule(str(export), attributes=NAMES), source)
    assert {"row", "prompt", "response", "score_helpfulness", "score_verbosity"} == rows[0].keys()
    assert load_file(export / "model.safetensors")["score.weight"].shape[0] == 2


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["ddp", "zero3"])
def test_two_processes_learn_and_measure_what_one_does(folder, name):
    settings: dict[str, Any] = {"stage": "regression", "folder": folder, "reward": ""}
    one = run(name="auto", **settings)
    first, _ = run_in_processes("helpers.stage_runs:run_each", runs=[{"name": name, **settings}])
    two = first[0]
    assert one["after"].keys() == two["after"].keys()
    for weight, numbers in one["after"].items():
        torch.testing.assert_close(torch.tensor(two["after"][weight]), torch.tensor(numbers), atol=1e-5, rtol=1e-4)
    assert one["before"] != one["after"]
    for metric in ("train/mse", "val/mse", "val/pearson_a", "val/pearson_b"):
        assert two["metrics"][metric] == pytest.approx(one["metrics"][metric], rel=1e-3, abs=1e-5)
