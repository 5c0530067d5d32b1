import math
import warnings
from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from helpers.stages import (
    MemoryLogger,
    adamw,
    assert_close_weights,
    clock,
    disturb_random_numbers,
    fit,
    preference_rows,
    save_gpt2,
    save_llama,
    save_reward_model,
    sgd,
    trainer,
    unpadded,
    weights,
)
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning import HFExport, PreferenceDataModule, RewardModule, UserError, load_reward_model
from rlhf_lightning.algorithms.pairs import both_sides
from rlhf_lightning.batches import PreferenceBatch
from rlhf_lightning.forward.prefix import sharing_pays

CONSTANT = {"lr_schedule": "constant", "warmup_steps": 0}
LOSSES = ["last_token", "average", "per_sample"]
ROWS = preference_rows(24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def reward_folder(folder, tmp_path_factory):
    return save_reward_model(tmp_path_factory.mktemp("reward"), folder)


def data_module(folder, rows, **settings):
    return PreferenceDataModule(folder, rows, max_length=48, **{"validation_split": 0.0, **settings})


def batches(folder, rows, **settings):
    data = data_module(folder, rows, **settings)
    data.setup("fit")
    return list(data.train_dataloader())


def token_scores(folder, ids, mask):
    """Raw score of every token of each row, without padding, by transformers' own modules."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        return [model.score(model.model(row).last_hidden_state)[0, :, 0].tolist() for row in unpadded(ids, mask)]


def loss_by_hand(kind, chosen_ids, rejected_ids, chosen, rejected):
    """One pair; lists of ids and of scores without padding."""

    def bradley_terry(margin):
        return math.log(1 + math.exp(-margin))

    if kind == "last_token":
        return bradley_terry(chosen[-1] - rejected[-1])
    start = next(i for i, (c, r) in enumerate(zip(chosen_ids, rejected_ids, strict=False)) if c != r)
    if kind == "average":
        chosen, rejected = chosen[start:], rejected[start:]
        return bradley_terry(sum(chosen) / len(chosen) - sum(rejected) / len(rejected))
    end = max(len(chosen), len(rejected))
    held = [scores + scores[-1:] * (end - len(scores)) for scores in (chosen, rejected)]
    return sum(bradley_terry(held[0][i] - held[1][i]) for i in range(start, end)) / (end - start)


def expected_metrics(folder, batch, kind="last_token"):
    chosen = token_scores(folder, batch.chosen_ids, batch.chosen_mask)
    rejected = token_scores(folder, batch.rejected_ids, batch.rejected_mask)
    ids = zip(batch.chosen_ids.tolist(), batch.rejected_ids.tolist(), strict=True)
    losses = [loss_by_hand(kind, *pair, c, r) for pair, c, r in zip(ids, chosen, rejected, strict=True)]
    size = len(losses)
    margins = [c[-1] - r[-1] for c, r in zip(chosen, rejected, strict=True)]
    metrics = {
        "loss": sum(losses) / size,
        "accuracy": sum(margin > 0 for margin in margins) / size,
        "chosen_score": sum(c[-1] for c in chosen) / size,
        "rejected_score": sum(r[-1] for r in rejected) / size,
        "margin": sum(margins) / size,
    }
    return {name: pytest.approx(value, abs=1e-5) for name, value in metrics.items()}


def calibration_by_hand(folder, batch):
    """Bins of a twentieth, each off by the difference of its confidences and of its pairs that are right."""
    off = Counter()
    chosen = token_scores(folder, batch.chosen_ids, batch.chosen_mask)
    rejected = token_scores(folder, batch.rejected_ids, batch.rejected_mask)
    for c, r in zip(chosen, rejected, strict=True):
        margin = c[-1] - r[-1]
        confidence = 1 / (1 + math.exp(-abs(margin)))
        off[math.ceil(confidence * 20)] += confidence - (margin > 0)
    return pytest.approx(sum(map(abs, off.values())) / len(chosen), abs=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_learns_which_of_two_is_better(folder, loss):
    disturb_random_numbers(0)
    rows = preference_rows(8)
    module = RewardModule(folder, loss=loss, optimizer=adamw(1e-2), **CONSTANT, micro_batch_size=4)
    data = data_module(folder, rows, batch_size=8, validation_data=preference_rows(8))
    log = fit(module, data, max_epochs=12, check_val_every_n_epoch=12)

    margins = log.series("train/margin")
    assert margins[-1] > max(2, margins[5], margins[0])
    assert log.series("train/accuracy")[-1] == log.series("val/accuracy")[-1] == 1
    assert log.series("train/loss")[-1] < 0.1


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_change_nothing(reward_folder, loss):
    data = batches(reward_folder, ROWS, batch_size=8)
    trained = {}
    for size in (None, 8, 4, 2, 3):
        module = RewardModule(
            reward_folder, loss=loss, optimizer=sgd(0.1), **CONSTANT, micro_batch_size=size, gradient_clip_val=None
        )
        fit(module, DataLoader(data, batch_size=None))
        trained[size] = weights(module.scalar)
    for size in (8, 4, 2, 3):
        assert_close_weights(trained[None], trained[size])


@pytest.mark.parametrize("loss", LOSSES)
def test_prefix_sharing_changes_nothing(reward_folder, loss):
    rows = [row | {"rejected": row["chosen"] + " salt"} if i % 3 == 0 else row for i, row in enumerate(ROWS)]
    data = batches(reward_folder, rows, batch_size=8)  # some pairs share more than their prompt
    found = []
    for sharing in (True, False):
        module = RewardModule(
            reward_folder, loss=loss, optimizer=sgd(0.1), **CONSTANT, prefix_sharing=sharing, gradient_clip_val=None
        )
        log = fit(module, DataLoader(data, batch_size=None), max_steps=1)
        (validated,) = trainer().validate(module, DataLoader(data, batch_size=None), verbose=False)
        numbers = {name: log.series(f"train/{name}") for name in ("loss", "margin", "grad_norm")}
        found.append((weights(module.scalar), numbers, validated))
    (shared, numbers, validated), (apart, expected, expected_validated) = found
    assert_close_weights(shared, apart)
    assert numbers == {name: pytest.approx(values, abs=1e-5) for name, values in expected.items()}
    assert validated == {name: pytest.approx(value, abs=1e-5) for name, value in expected_validated.items()}


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_token_budget_changes_nothing_but_the_size_of_micro_batches(reward_folder, loss, sharing, monkeypatch):
    monkeypatch.setattr(
        "rlhf_lightning.forward.hidden.DEVICES", set()
    )  # so that the model is shown whole micro-batches
    data = batches(reward_folder, ROWS, batch_size=8)
    pairs_apart = 1 if sharing else 2
    trained = []
    for max_tokens in (None, 250, 150, 1):
        settings = {"prefix_sharing": sharing, "gradient_clip_val": None, "max_tokens_per_batch": max_tokens}
        module = RewardModule(reward_folder, loss=loss, optimizer=sgd(0.1), **CONSTANT, **settings)
        module.configure_model()
        sharing_pays(module.export_model, *both_sides(data[0]))  # tries the model out
        shown = []
        module.export_model.get_input_embeddings().register_forward_hook(
            lambda _, args, __, shown=shown: shown.append(args[0].shape)
        )
        fit(module, DataLoader(data, batch_size=None), max_steps=1)
        trained.append(weights(module.scalar))
        if budget := max_tokens:
            assert_close_weights(trained[0], trained[-1])
            assert all(rows * width <= budget or rows == pairs_apart for rows, width in shown)
            assert any(rows > pairs_apart for rows, _ in shown) is (budget > 1)
            assert len(shown) > 1


def test_two_limits_at_once_are_refused(folder):
    with pytest.raises(UserError, match=r"both limit a forward pass: give one of them$"):
        RewardModule(folder, micro_batch_size=2, max_tokens_per_batch=100)
    with pytest.raises(UserError, match=r"^max_tokens_per_batch \(0\) must be at least 1$"):
        RewardModule(folder, max_tokens_per_batch=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_more_padding_changes_nothing(reward_folder, loss):
    def widened(batch):
        wide = [torch.nn.functional.pad(field, (0, 9)) for field in batch[:4]]
        return PreferenceBatch(*wide, batch.row_ids)

    plain = batches(reward_folder, preference_rows(16), batch_size=8)
    trained = []
    for loader in (plain, [widened(batch) for batch in plain]):
        module = RewardModule(reward_folder, loss=loss, optimizer=sgd(0.1), **CONSTANT)
        fit(module, DataLoader(loader, batch_size=None))
        trained.append(weights(module.scalar))
    assert_close_weights(*trained)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_number_by_hand(reward_folder, loss):
    rows = preference_rows(7)
    (batch,) = batches(reward_folder, rows)
    expected = expected_metrics(reward_folder, batch, loss)

    module = RewardModule(reward_folder, loss=loss, optimizer=sgd(0.1), micro_batch_size=3)
    log = fit(module, data_module(reward_folder, rows), max_steps=1)

    assert {name: log.series(f"train/{name}")[0] for name in expected} == expected
    assert log.names("train") == {*expected, "lr", "grad_norm", "tokens_per_second", "padding_share", "memory_gib"}
    assert log.series("train/lr") == pytest.approx([0.1])


def test_validation_and_test_weigh_every_pair_alike(reward_folder):
    rows = preference_rows(7)
    (everything,) = batches(reward_folder, rows)
    expected = expected_metrics(reward_folder, everything)
    data = data_module(reward_folder, rows, validation_data=rows, test_data=rows, eval_batch_size=3)

    module = RewardModule(reward_folder)
    (validated,) = trainer().validate(module, data, verbose=False)
    (tested,) = trainer().test(module, data, verbose=False)

    expected["calibration_error"] = calibration_by_hand(reward_folder, everything)
    assert validated == {f"val/{name}": value for name, value in expected.items()}
    assert tested == {f"test/{name}": value for name, value in expected.items()}


@pytest.mark.parametrize("dropout", [False, True])
def test_dropout_is_active_only_if_asked_for_and_depends_on_the_seed_alone(tmp_path, dropout):
    base = save_gpt2(tmp_path / "gpt2", dropout=0.3)
    folder = save_reward_model(tmp_path / "reward", base)
    losses = []
    for seed, drawn_before in [(1, 0), (1, 1000), (2, 0)]:
        disturb_random_numbers(seed)
        torch.rand(drawn_before)
        module = RewardModule(folder, optimizer=sgd(0.1), dropout=dropout)
        losses.append(fit(module, data_module(folder, preference_rows(8), batch_size=4)).series("train/loss"))
    assert losses[0] == losses[1]
    assert (losses[0] == losses[2]) is not dropout


def export(folder, target, **settings):
    module = RewardModule(folder, optimizer=adamw(1e-3), **CONSTANT)
    data = data_module(folder, preference_rows(16), validation_data=preference_rows(7), eval_batch_size=3)
    trainer(callbacks=[HFExport(str(target))], logger=MemoryLogger(), **settings).fit(module, data)
    return module, data


@pytest.mark.parametrize("validated_during_fit", [True, False])
def test_exported_scores_have_mean_0_and_deviation_1_on_held_out_chosen_responses(
    folder, tmp_path, validated_during_fit
):
    settings = {} if validated_during_fit else {"check_val_every_n_epoch": 5}
    module, data = export(folder, tmp_path / "export", max_epochs=2, **settings)

    loaded = load_reward_model(tmp_path / "export")
    loader = data.val_dataloader()
    with torch.no_grad():
        scores = torch.cat([loaded.scores(batch.chosen_ids, batch.chosen_mask) for batch in loader])
    assert len(scores) == 7
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert loaded.probe_error() < 1e-5
    assert 0 < len(loaded.calibration.probe_ids) <= 64

    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export")
    (first, *_) = unpadded(*next(iter(loader))[:2])
    raw = scores[0] * loaded.calibration.std + loaded.calibration.mean
    assert plain(first).logits.item() == pytest.approx(raw.item(), abs=1e-5)
    assert module.export_model.config.pad_token_id == plain.config.pad_token_id


def test_the_pad_token_of_an_export_is_not_the_eos(tmp_path):
    base = save_llama(tmp_path / "base", tiny_tokenizer(pad="eos"))
    export(base, tmp_path / "export")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export")
    assert tokenizer.pad_token_id == plain.config.pad_token_id != tokenizer.eos_token_id


def test_scores_responses_calibrated_and_raw(reward_folder):
    rows = [{"prompt": f"{i}:", "response": "happy" * i} for i in range(1, 4)]
    answers = trainer().predict(RewardModule(reward_folder), data_module(reward_folder, rows, predict_data=rows))
    for row, answer in zip(rows, [answer for batch in answers for answer in batch], strict=True):
        assert (answer["prompt"], answer["response"], answer["role"]) == (row["prompt"], row["response"], "response")
        assert answer["score"] == pytest.approx((answer["raw_score"] - 0.5) / 2, abs=1e-6)


def test_without_validation_data_scores_stay_as_they_are_and_this_is_said(folder):
    module = RewardModule(folder)
    with pytest.warns(UserWarning, match="no validation data: the reward model's scores stay uncalibrated"):
        fit(module, data_module(folder, preference_rows(8)))
    assert (module.scalar.calibration.mean, module.scalar.calibration.std) == (0, 1)


def test_one_held_out_pair_gives_a_mean_but_no_deviation(folder):
    module = RewardModule(folder)
    data = data_module(folder, preference_rows(8), validation_data=preference_rows(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "The '\\w+_dataloader' does not have many workers")
        fit(module, data)
    assert module.scalar.calibration.mean != 0
    assert module.scalar.calibration.std == 1


@pytest.mark.parametrize("task", ["validate", "test", "predict"])
def test_a_head_that_nobody_trained_is_refused(folder, task):
    rows = preference_rows(4)
    data = data_module(folder, rows, validation_data=rows, test_data=rows)
    with pytest.raises(UserError, match="has no trained reward head; pass the export folder of a reward model"):
        getattr(trainer(), task)(RewardModule(folder), data)


@pytest.mark.parametrize("task", ["validate", "test", "predict"])
def test_a_checkpoint_makes_the_head_a_trained_one(folder, tmp_path, task):
    rows = preference_rows(4)
    data = data_module(folder, rows, validation_data=rows, test_data=rows)
    run = trainer()
    run.fit(RewardModule(folder), data)
    run.save_checkpoint(tmp_path / "trained.ckpt")
    module = RewardModule(folder)
    assert getattr(trainer(), task)(module, data, ckpt_path=tmp_path / "trained.ckpt", weights_only=True)
    assert module.scalar.calibration.std != 1


def test_speed_norm_and_rate_by_hand(reward_folder, monkeypatch):
    """One step of gradient descent without clipping: the gradient is what the weights moved by."""
    rows = preference_rows(7)
    (batch,) = batches(reward_folder, rows)
    clock(monkeypatch)
    module = RewardModule(reward_folder, optimizer=sgd(0.1), gradient_clip_val=None, **CONSTANT)
    module.configure_model()
    before = weights(module.scalar)
    log = fit(module, data_module(reward_folder, rows), max_steps=1)
    moved = torch.stack([(weights(module.scalar)[name] - old).norm() for name, old in before.items()]).norm().item()
    tokens = int(batch.chosen_mask.sum() + batch.rejected_mask.sum())
    assert log.series("train/grad_norm") == pytest.approx([moved / 0.1], rel=1e-3)
    assert log.series("train/lr") == pytest.approx([0.1])
    assert log.series("train/tokens_per_second") == pytest.approx([tokens / 2])
