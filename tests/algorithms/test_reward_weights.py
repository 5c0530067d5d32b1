"""Margins and weights of pairs: a pair of weight 2 is the pair twice, wherever it falls."""

import math

import pytest
import torch
from torch.utils.data import DataLoader

from helpers.stages import (
    assert_close_weights,
    fit,
    preference_rows,
    save_llama,
    save_reward_model,
    sgd,
    trainer,
    unpadded,
    weights,
)
from rlhf_lightning import PreferenceDataModule, RewardModule
from rlhf_lightning.batches import PreferenceBatch

LOSSES = ["last_token", "average", "per_sample"]
WEIGHTS = [1.0, 3.0, 0.0, 2.0, 1.0, 4.0]
METRICS = ["loss", "accuracy", "chosen_score", "rejected_score", "margin"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = save_llama(tmp_path_factory.mktemp("llama"))
    return save_reward_model(tmp_path_factory.mktemp("reward"), base)


@pytest.fixture(scope="module")
def pairs(folder):
    data = PreferenceDataModule(folder, preference_rows(6), max_length=48, validation_split=0.0)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    return batch


def repeated(batch, times):
    """The batch with pair i standing in it `times[i]` times."""
    index = torch.repeat_interleave(torch.arange(len(times)), torch.tensor(times).int())
    return PreferenceBatch(*(field if field is None else field[index] for field in batch))


def train(folder, batch, loss="last_token", size=None, **settings):
    settings |= {"lr_schedule": "constant", "warmup_steps": 0, "micro_batch_size": size}
    module = RewardModule(folder, loss=loss, optimizer=sgd(0.1), **settings)
    log = fit(module, DataLoader([batch], batch_size=None), max_epochs=2)
    return weights(module.scalar), log


def validate(folder, batches):
    (metrics,) = trainer().validate(RewardModule(folder), DataLoader(batches, batch_size=None), verbose=False)
    return metrics


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("size", [None, 4, 1])
def test_a_pair_of_weight_2_is_the_pair_twice_in_any_micro_batches(folder, pairs, loss, size):
    weighted, weighted_log = train(folder, pairs._replace(weights=torch.tensor(WEIGHTS)), loss, size)
    twice, twice_log = train(folder, repeated(pairs, WEIGHTS), loss)

    assert_close_weights(weighted, twice)
    for name in METRICS:
        assert weighted_log.series(f"train/{name}") == pytest.approx(twice_log.series(f"train/{name}"), abs=1e-5)


def test_weights_count_in_validation_too(folder, pairs):
    batch = pairs._replace(weights=torch.tensor(WEIGHTS))
    halves = [PreferenceBatch(*(f if f is None else f[rows] for f in batch)) for rows in (slice(0, 4), slice(4, 6))]
    expected = validate(folder, [repeated(pairs, WEIGHTS)])
    assert validate(folder, halves) == {name: pytest.approx(value, abs=1e-5) for name, value in expected.items()}


def test_weights_of_one_change_nothing(folder, pairs):
    plain, _ = train(folder, pairs)
    ones, _ = train(folder, pairs._replace(weights=torch.ones(6)))
    assert_close_weights(ones, plain, 0)


def test_pairs_without_any_weight_teach_nothing(folder, pairs):
    untrained = RewardModule(folder)
    untrained.configure_model()
    after, log = train(folder, pairs._replace(weights=torch.zeros(6)))
    assert log.series("train/loss") == [0, 0]
    assert_close_weights(after, weights(untrained.scalar), 0)


def test_the_loss_asks_for_the_margin_and_the_metrics_do_not(folder, pairs):
    plain = validate(folder, [pairs])
    asked = validate(folder, [pairs._replace(margins=torch.full((6,), 0.7))])
    one = repeated(pairs, [1, 0, 0, 0, 0, 0])
    lead = validate(folder, [one])["val/margin"]
    loss = validate(folder, [one._replace(margins=torch.tensor([0.7]))])["val/loss"]

    assert loss == pytest.approx(math.log1p(math.exp(0.7 - lead)), abs=1e-5)
    assert asked["val/loss"] > plain["val/loss"]
    assert asked | {"val/loss": plain["val/loss"]} == plain


def test_padding_share_by_hand(folder, pairs):
    real = int(pairs.chosen_mask.sum() + pairs.rejected_mask.sum())
    _, log = train(folder, pairs, prefix_sharing=False)
    assert log.series("train/padding_share")[0] == pytest.approx(1 - real / (2 * pairs.chosen_ids.numel()), abs=1e-6)
    # One pair at a time is as wide as its longer side.
    longer = torch.maximum(pairs.chosen_mask.sum(dim=1), pairs.rejected_mask.sum(dim=1)).sum()
    _, log = train(folder, pairs, size=1, prefix_sharing=False)
    assert log.series("train/padding_share")[0] == pytest.approx(1 - real / (2 * int(longer)), abs=1e-6)


def test_padding_share_of_shared_rows_by_hand(folder, pairs):
    lengths = []
    for ids in zip(*(unpadded(*side) for side in (pairs[:2], pairs[2:4])), strict=True):
        chosen, rejected = (side[0].tolist() for side in ids)
        common = next(i for i, (c, r) in enumerate(zip(chosen, rejected, strict=False)) if c != r)
        lengths.append(len(chosen) + len(rejected) - common)
    _, log = train(folder, pairs)
    share = 1 - sum(lengths) / (len(lengths) * max(lengths))
    assert log.series("train/padding_share")[0] == pytest.approx(share, abs=1e-6)
    _, log = train(folder, pairs, size=1)
    assert log.series("train/padding_share") == [0, 0]
