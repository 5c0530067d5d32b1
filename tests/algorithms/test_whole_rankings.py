"""Rankings as elements of a batch teach what all their pairs in one batch teach, and each response is read once."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from helpers.rankings import ranking_rows
from helpers.stages import (
    MemoryLogger,
    assert_close_weights,
    disturb_random_numbers,
    fit,
    save_gpt2,
    save_reward_model,
    sgd,
    trainer,
    weights,
)
from rlhf_lightning import DPOModule, FineTune, PreferenceDataModule, RewardModule, UserError
from rlhf_lightning.algorithms.pairs import Pairs
from rlhf_lightning.algorithms.rankings import pairs_of
from rlhf_lightning.batches import RankingBatch, micro_batches
from rlhf_lightning.forward.hidden import hidden_states
from rlhf_lightning.forward.prefix import sharing_pays
from rlhf_lightning.functional import pairwise_loss

LOSSES = ["last_token", "average", "per_sample"]
SIZES = [4, 2, 5, 3, 2, 4]
DEPENDS_ON_LAYOUT = {"tokens_per_second", "padding_share", "memory_gib"}
CONSTANT = {"lr_schedule": "constant", "warmup_steps": 0, "gradient_clip_val": None}
TERMS = {"label_smoothing": 0.1, "center_coef": 0.05, "lm_coef": 0.7, "num_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A GPT-2: a Llama norms its hidden states in float32 whatever they are."""
    return save_gpt2(tmp_path_factory.mktemp("gpt2"), dropout=0.0)


@pytest.fixture(scope="module")
def reward_folder(folder, tmp_path_factory):
    return save_reward_model(tmp_path_factory.mktemp("reward"), folder)


@pytest.fixture
def float64(monkeypatch):
    """Scores and losses, which are float32 whatever the model is, in float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def one_batch(folder, rows, whole):
    """All of some rows in one batch, as prompts or as pairs."""
    size = len(rows) if whole else 1000
    data = PreferenceDataModule(
        folder, rows, max_length=64, validation_split=0.0, batch_size=size, whole_rankings=whole
    )
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert isinstance(batch, RankingBatch) == whole
    return batch


def train(folder, batch, kind=RewardModule, lr=0.1, **options):
    """A module after two steps on a batch in float64, and its log; always the same fresh head."""
    disturb_random_numbers(3)
    module = kind(folder, optimizer=sgd(lr), **CONSTANT, **options)
    log = fit(module, DataLoader([batch], batch_size=None), max_epochs=2, precision="64-true")
    return module, log


def all_weights(module):
    parts = [module.export_model, getattr(module, "language_head", None)]
    return weights(torch.nn.ModuleList([part for part in parts if part is not None]))


def assert_same(one, other):
    """Two modules with their logs, to rounding in float64."""
    (module, log), (second, second_log) = one, other
    mine, theirs = all_weights(module), all_weights(second)
    assert all(weight.dtype == torch.float64 for weight in mine.values())
    assert_close_weights(mine, theirs, 1e-10)
    for name in log.names("train") - DEPENDS_ON_LAYOUT:
        assert log.series(f"train/{name}") == pytest.approx(second_log.series(f"train/{name}"), abs=1e-6), name
    assert log.names("train") == second_log.names("train")


# The same as pairs.


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("sharing", [True, False])
def test_rankings_teach_what_all_their_pairs_in_one_batch_teach(folder, float64, loss, sharing):
    rows = ranking_rows(SIZES, ties=True)
    pairs = train(folder, one_batch(folder, rows, whole=False), loss=loss, prefix_sharing=sharing)
    whole = train(folder, one_batch(folder, rows, whole=True), loss=loss, prefix_sharing=sharing)
    assert_same(whole, pairs)
    start = RewardModule(folder)
    disturb_random_numbers(3)
    start.configure_model()
    moved = weights(start.export_model)
    assert max(float((moved[name] - w).abs().max()) for name, w in weights(whole[0].export_model).items()) > 1e-3


@pytest.mark.parametrize("cut", [{"micro_batch_size": 1}, {"micro_batch_size": 4}, {"max_tokens_per_batch": 130}])
@pytest.mark.parametrize("sharing", [True, False])
def test_however_a_step_is_cut(folder, float64, cut, sharing):
    batch = one_batch(folder, ranking_rows(SIZES, ties=True), whole=True)
    options = {"loss": "per_sample", **TERMS}
    uncut = train(folder, batch, **options, max_tokens_per_batch=None)
    assert_same(train(folder, batch, prefix_sharing=sharing, **options, **cut), uncut)


@pytest.mark.parametrize("options", [TERMS, {"finetune": FineTune("lora", rank=2)}, {"objective": "hinge"}])
def test_all_that_a_reward_model_may_learn_besides(folder, float64, options):
    rows = ranking_rows(SIZES)
    pairs, whole = (train(folder, one_batch(folder, rows, whole), **options) for whole in (False, True))
    assert_same(whole, pairs)


@pytest.mark.parametrize(
    "options",
    [{}, {"prefix_sharing": False, "micro_batch_size": 2}, {"precompute_reference": True, "length_normalized": True}],
)
def test_a_policy_learns_from_rankings_too(folder, reward_folder, float64, options):
    rows = ranking_rows(SIZES, ties=True)
    pairs, whole = (
        train(folder, one_batch(folder, rows, whole), DPOModule, sft_coef=0.3, **options) for whole in (False, True)
    )
    assert_same(whole, pairs)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(2, 6), min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from(LOSSES),
    st.sampled_from([{}, {"micro_batch_size": 1}, {"max_tokens_per_batch": 90}]),
)
def test_whatever_the_number_of_responses(folder, float64, sizes, ties, loss, cut):
    rows = ranking_rows(sizes, ties)
    pairs = train(folder, one_batch(folder, rows, whole=False), loss=loss)
    assert_same(train(folder, one_batch(folder, rows, whole=True), loss=loss, **cut), pairs)


# By hand.


@pytest.mark.parametrize("loss", LOSSES)
def test_a_prompt_weighs_one_and_its_pairs_share_that(reward_folder, loss):
    """With the scores of `ScalarLM.raw` of each response by itself, weights written out."""
    rows = [
        {"prompt": "first", "responses": ["so bread", "so", "so water", "so salt salt"], "ranks": [1, 2, 2, 4]},
        {"prompt": "second one", "responses": ["sad sad", "happy"], "ranks": [2, 1]},
    ]
    batch = one_batch(reward_folder, rows, whole=True)
    module, log = train(reward_folder, batch, lr=0.0, loss=loss)
    row = batch.row_ids.tolist().index(0)
    assert batch.weights[row].tolist() == pytest.approx([0.2] * 5)  # of 6 pairs one is a tie, and the others weigh 1
    assert batch.weights[1 - row].tolist() == [1, 0, 0, 0, 0]
    assert batch.pairs[row].tolist() == [[0, 1], [0, 2], [0, 3], [1, 3], [2, 3]]
    assert batch.pairs[1 - row].tolist() == [[0, 1]] + [[-1, -1]] * 4

    losses, right = [], []
    with torch.no_grad():
        for ids, mask, pairs in zip(batch.input_ids, batch.attention_mask, batch.pairs, strict=True):
            there = pairs[pairs[:, 0] >= 0]
            better, worse = ((ids[numbers], mask[numbers]) for numbers in there.unbind(dim=1))
            scores = [module.scalar.raw(*side) for side in (better, worse)]
            losses.append(pairwise_loss(*scores, better[0], worse[0], better[1], worse[1], loss).mean())
            ends = [
                s[torch.arange(len(s)), side[1].sum(dim=1) - 1] for s, side in zip(scores, (better, worse), strict=True)
            ]
            right.append((ends[0] > ends[1]).float().mean())
    assert log.series("train/loss")[0] == pytest.approx(float(sum(losses)) / 2, abs=1e-6)
    assert log.series("train/accuracy")[0] == pytest.approx(float(sum(right)) / 2, abs=1e-6)


def test_a_batch_without_weights_counts_each_prompt_once(reward_folder):
    batch = one_batch(reward_folder, [row | {"weight": 1.0} for row in ranking_rows(SIZES)], whole=True)
    (said,), (told,) = (
        trainer().validate(RewardModule(reward_folder), DataLoader([each], batch_size=None), verbose=False)
        for each in (batch._replace(weights=None), batch)
    )
    assert said == pytest.approx(told, abs=1e-6)


# What is read.


@pytest.mark.parametrize("sharing", [True, False])
def test_each_response_goes_through_the_model_once(folder, monkeypatch, sharing):
    batch = one_batch(folder, ranking_rows([9, 4]), whole=True)
    module = RewardModule(folder, prefix_sharing=sharing, max_tokens_per_batch=None)
    module.configure_model()
    pairs = module.laid_out(batch)
    mask = batch.attention_mask
    assert (pairs.rows is not None) == sharing
    common = [
        next(t for t in range(99) if len({tuple(row[: t + 1].tolist()) for row in ids[kept.any(dim=1)]}) > 1)
        for ids, kept in zip(batch.input_ids, mask, strict=True)
    ]
    again = sum(n * (size - 1) for n, size in zip(common, mask.any(dim=2).sum(dim=1).tolist(), strict=True))
    assert min(common) > 1
    assert int(pairs.shown.sum()) == int(mask.sum()) - again * sharing
    assert len(pairs.batch.row_ids) == 9 * 8 // 2 + 4 * 3 // 2


def test_responses_that_a_prompt_lacks_are_no_work_that_sharing_saves(folder):
    module = RewardModule(folder)
    module.configure_model()
    ids = torch.arange(5, 125).view(1, 2, 60)  # which have nothing in common
    mask = torch.ones_like(ids, dtype=torch.bool)
    lacking = [torch.cat([each, each.new_zeros(1, 7, 60)], dim=1) for each in (ids, mask)]
    assert not sharing_pays(module.export_model, ids, mask)
    assert not sharing_pays(module.export_model, *lacking)


def test_sides_are_found_however_they_were_read(folder):
    """Hidden states of all sides of pairs, of the same sequences run one by one."""
    batch = one_batch(folder, ranking_rows(SIZES), whole=True)
    module = RewardModule(folder)
    module.configure_model()
    model = module.export_model.double()
    plain = pairs_of(batch)
    with torch.no_grad():
        for shared in (True, False):
            found = Pairs.of(batch, shared).hidden_states(model)
            for number, (ids, mask) in enumerate([plain[:2], plain[2:4]]):
                expected = hidden_states(model, ids, mask)
                torch.testing.assert_close(found[:, number][mask], expected[mask], atol=1e-10, rtol=0)


def test_the_pairs_of_rankings_are_those_of_the_data(folder):
    rows = ranking_rows(SIZES, ties=True)
    plain, whole = one_batch(folder, rows, whole=False), pairs_of(one_batch(folder, rows, whole=True))

    def as_rows(batch):
        columns = []
        for ids, mask in (batch[:2], batch[2:4]):
            columns.append([tuple(row[kept].tolist()) for row, kept in zip(ids, mask, strict=True)])
        numbers = batch.row_ids, batch.margins, batch.weights, batch.prompt_lengths
        return sorted(zip(*columns, *(each.tolist() for each in numbers), strict=True))

    assert as_rows(plain) == as_rows(whole)


# A run.


@pytest.mark.parametrize("kind", [RewardModule, DPOModule])
def test_a_run_counts_prompts_and_validates_as_pairs_do(folder, tmp_path, kind):
    rows, held_out = ranking_rows(SIZES), ranking_rows([3, 2, 4, 5, 2])
    logs, modules = {}, {}
    for whole in (False, True):
        options = {"batch_size": 4 if whole else 1000, "eval_batch_size": 2 if whole else 5}
        data = PreferenceDataModule(
            folder, rows, validation_data=held_out, max_length=64, whole_rankings=whole, **options
        )
        disturb_random_numbers(3)
        modules[whole] = kind(folder, optimizer=sgd(0.0), **CONSTANT)
        logs[whole] = fit(modules[whole], data)
    assert [len(log.series("train/loss")) for log in logs.values()] == [1, 2]  # all pairs; 4 prompts and 2
    assert logs[True].names("val") == logs[False].names("val") != set()
    for name in logs[True].names("val"):
        assert logs[True].series(f"val/{name}") == pytest.approx(logs[False].series(f"val/{name}"), abs=1e-5), name
    if kind is RewardModule:
        said, told = (vars(modules[whole].scalar.calibration) for whole in (True, False))
        assert said["mean"] == pytest.approx(told["mean"], abs=1e-5)
        assert said["std"] == pytest.approx(told["std"], abs=1e-5)
        assert said["probe_ids"] == told["probe_ids"]


def test_calibrates_at_the_end_without_a_validation_there(folder):
    held_out = ranking_rows([3, 2, 4])
    found = []
    for whole in (False, True):
        data = PreferenceDataModule(
            folder, ranking_rows(SIZES), validation_data=held_out, max_length=64, batch_size=4, whole_rankings=whole
        )
        disturb_random_numbers(3)
        module = RewardModule(folder, optimizer=sgd(0.0), **CONSTANT)
        fit(module, data, max_steps=1, max_epochs=-1, check_val_every_n_epoch=50)
        found.append(vars(module.scalar.calibration))
    assert found[0]["std"] != 1
    assert found[1]["mean"] == pytest.approx(found[0]["mean"], abs=1e-5)
    assert found[1]["std"] == pytest.approx(found[0]["std"], abs=1e-5)


def test_speed_is_that_of_responses(folder, monkeypatch):
    seen: list[int] = []
    module = RewardModule(folder, optimizer=sgd(0.0), **CONSTANT)
    plain = module.throughput
    monkeypatch.setattr(
        module, "throughput", lambda masks, *args: seen.append(sum(int(m.sum()) for m in masks)) or plain(masks, *args)
    )
    batch = one_batch(folder, ranking_rows(SIZES), whole=True)
    log: MemoryLogger = fit(module, DataLoader([batch], batch_size=None))
    assert seen == [int(batch.attention_mask.sum())]
    assert log.series("train/padding_share")[0] >= 0


def test_prompts_of_unknown_length_are_refused_where_they_matter(folder):
    batch = one_batch(folder, ranking_rows(SIZES), whole=True)._replace(prompt_lengths=None)
    train(folder, batch)
    with pytest.raises(UserError, match=r"set RankingBatch\.prompt_lengths"):
        train(folder, batch, DPOModule)


# Micro-batches.


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 6), min_size=2, max_size=5), min_size=1, max_size=7),
    st.one_of(st.none(), st.integers(1, 3)),
    st.one_of(st.none(), st.integers(1, 60)),
)
def test_a_micro_batch_never_splits_a_prompt_and_keeps_to_its_tokens(lengths, size, max_tokens):
    responses, width = max(map(len, lengths)), max(map(max, lengths))
    mask = torch.zeros(len(lengths), responses, width, dtype=torch.bool)
    all_pairs = [[*combinations(range(len(row)), 2)] for row in lengths]
    pairs = torch.full((len(lengths), max(map(len, all_pairs)), 2), -1)
    for i, row in enumerate(lengths):
        pairs[i, : len(all_pairs[i])] = torch.tensor(all_pairs[i])
        for k, length in enumerate(row):
            mask[i, k, :length] = True
    batch = RankingBatch(torch.arange(mask.numel()).view(mask.shape) * mask, mask, pairs, torch.arange(len(lengths)))
    pieces = micro_batches(batch, size, max_tokens)

    assert sorted(row for piece in pieces for row in piece.row_ids.tolist()) == [*range(len(lengths))]
    for piece in pieces:
        rows = piece.row_ids
        assert torch.equal(piece.input_ids, batch.input_ids[rows, :, : piece.input_ids.shape[2]])
        assert int(piece.attention_mask.sum()) == int(batch.attention_mask[rows].sum())
        assert torch.equal(piece.pairs, batch.pairs[rows])
        shown = Pairs.of(piece, shared=False).shown
        assert size is None or len(rows) <= size
        assert max_tokens is None or len(rows) == 1 or shown.numel() <= max_tokens
