"""The data modules over prepared folders, with packing, grouping by length, weights, and parts of their own."""

import json
from types import SimpleNamespace

import pytest
import torch

from data.test_data_modules import ALL, HH_ROWS, hh, ready, texts
from helpers.preparing import build, row_ids
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.data import (
    Blend,
    InstructionDataModule,
    PreferenceDataModule,
    PromptDataModule,
    Table,
)
from rlhf_lightning.data.preparing.filters import Splits
from rlhf_lightning.data.preparing.preparation import Preparation
from rlhf_lightning.errors import UserError

# A prepared folder


@pytest.fixture
def prepared(tmp_path):
    rows = [{"prompt": f"question {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(60)]
    return build(tmp_path / "prepared", rows, splits=Splits(0.2, 0.2))


@pytest.mark.parametrize(("kind", "need"), [*zip(ALL, ["finetune", "preference", "prompts"], strict=True)])
def test_the_three_data_modules_read_one_prepared_folder(prepared, kind, need):
    size = {"rollout_batch_size": 1} if kind is PromptDataModule else {}
    data = ready(kind, "fit", "test", "predict", data=str(prepared.path), **size)
    loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
    seen = [sorted(row for batch in loader for row in batch.row_ids.tolist()) for loader in loaders]
    assert seen == [sorted(numbers) for numbers in row_ids(prepared, need).values()]
    predicted = [row for batch in data.predict_dataloader() for row in batch.row_ids.tolist()]
    assert sorted(set(predicted)) == seen[1]
    parts = dict(zip(("train", "validation", "test"), map(len, seen), strict=True))
    assert data.counts == {"rows": 60, "kept": 60, **parts}


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda", True)])
def test_batches_for_a_gpu_are_pinned(prepared, device, pinned):
    data = ready(InstructionDataModule, "fit", "test", data=str(prepared.path))
    strategy = SimpleNamespace(root_device=torch.device(device))
    data.trainer = SimpleNamespace(strategy=strategy, world_size=1, global_rank=0)
    loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
    assert [loader.pin_memory for loader in loaders] == [pinned] * 3


def test_a_prepared_folder_that_does_not_fit_is_refused(prepared, tmp_path):
    other = tiny_tokenizer(bos=True)
    other.name_or_path = "other/model"
    path = str(prepared.path)
    with pytest.raises(
        UserError, match=r"was prepared with tokenizer .* now it is tokenizer other/model \(.*; use that"
    ):
        ready(InstructionDataModule, "fit", tokenizer=other, data=path)
    with pytest.raises(UserError, match=r"is a prepared folder with parts of its own; leave out test_data"):
        ready(InstructionDataModule, "fit", data=path, test_data=HH_ROWS)
    with pytest.raises(UserError, match=r"was prepared without the turns that `loss_on: turns` needs"):
        ready(InstructionDataModule, "fit", data=path, loss_on="turns")
    alone = build(tmp_path / "alone", HH_ROWS, kinds=("preference",))
    with pytest.raises(UserError, match=r"holds no prompts_train.arrow, only preference"):
        ready(PromptDataModule, "fit", data=alone.path)

    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 4}))
    with pytest.raises(UserError, match=r"the longest row of .*prepared \(\d+\) is beyond the 4 positions"):
        ready(InstructionDataModule, "fit", tokenizer=str(tmp_path / "model"), data=path, max_length=4, response_room=1)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (InstructionDataModule, {"max_length": 8, "response_room": 2}),
        (PreferenceDataModule, {"max_length": 8, "response_room": 2}),
        (PromptDataModule, {"max_prompt_length": 4, "rollout_batch_size": 1}),
    ],
)
def test_a_limit_that_a_prepared_folder_does_not_obey_is_said(prepared, kind, settings):
    limit = settings.get("max_length", settings.get("max_prompt_length"))
    with pytest.warns(UserWarning, match=rf"prepared holds rows of up to \d+ tokens, more than the limit of {limit} "):
        ready(kind, "fit", data=str(prepared.path), **settings)


# Earlier turns, packing, lengths, parts


def test_every_turn_of_the_assistant_is_taught_if_asked():
    dialogue = hh("hi", "hello") + hh("bye", "farewell")
    rows = [{"chosen": dialogue, "rejected": dialogue + "!"}]
    data = ready(InstructionDataModule, "fit", data=rows, loss_on="turns", validation_split=0)
    batch = next(iter(data.train_dataloader()))
    assert texts(data, batch.input_ids, batch.attention_mask) == [dialogue + "<|end|>"]
    assert texts(data, batch.input_ids, batch.loss_mask) == [" hello farewell<|end|>"]


def test_packed_rows_hold_every_example_once():
    data = ready(InstructionDataModule, "fit", data=HH_ROWS, packing=True, max_length=160, batch_size=2)
    batches = list(data.train_dataloader())
    rows = [row for batch in batches for row in batch.row_ids.flatten().tolist() if row >= 0]
    assert sorted(rows) == sorted(data._part("train").row_ids.tolist())
    assert all(batch.input_ids.shape[1] <= 160 and batch.position_ids is not None for batch in batches)
    assert len(batches) < len(rows) / 4
    assert all(batch.position_ids is None for batch in data.val_dataloader())
    with pytest.raises(UserError, match="packing fills every row, so there is nothing for length_grouped to do"):
        InstructionDataModule(tiny_tokenizer(), HH_ROWS, packing=True, length_grouped=True)


@pytest.mark.parametrize("kind", [InstructionDataModule, PreferenceDataModule])
def test_batches_are_grouped_by_length_if_asked(kind):
    rows = [{"prompt": "p" * (1 + i % 24), "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(96)]

    def padding(**settings):
        data = ready(kind, "fit", data=rows, validation_split=0, batch_size=4, **settings)
        batches = list(data.train_dataloader())
        masks = [getattr(batch, "attention_mask", None) for batch in batches]
        masks = [batch.chosen_mask for batch in batches] if masks[0] is None else masks
        return sum((~mask).sum().item() for mask in masks), [row for b in batches for row in b.row_ids.tolist()]

    grouped, seen = padding(length_grouped=True)
    assert sorted(seen) == list(range(96))
    assert grouped < padding()[0] / 2


def test_rows_of_a_source_are_seen_as_often_as_its_weight_says():
    blend = Blend([Table(HH_ROWS[:10]), Table(HH_ROWS[10:30])], [2, 0.25])
    data = ready(PreferenceDataModule, "fit", data=blend, validation_split=0)
    seen = [row for batch in data.train_dataloader() for row in batch.row_ids.tolist()]
    assert sorted(row for row in seen if row < 10) == sorted([*range(10), *range(10)])
    assert len({row for row in seen if row >= 10}) == 5 == len(seen) - 20


@pytest.mark.parametrize("kind", ALL)
def test_a_test_part_is_held_out_or_given(kind):
    size = {"rollout_batch_size": 1} if kind is PromptDataModule else {}
    data = ready(kind, "fit", "test", data=HH_ROWS, test_split=0.3, **size)
    parts = [set(data._part(part).row_ids.tolist()) for part in ("train", "validation", "test")]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 40
    assert {row for batch in data.test_dataloader() for row in batch.row_ids.tolist()} == parts[2]
    given = ready(kind, "fit", "test", data=HH_ROWS, test_data=HH_ROWS[:3], test_split=0.3, **size)
    assert [row for batch in given.test_dataloader() for row in batch.row_ids.tolist()] == [0, 1, 2]
    assert (given.counts["test rows"], given.counts["test"]) == (3, 3)


@pytest.mark.parametrize("kind", ALL)
def test_a_second_start_reads_the_cache(kind, tmp_path, monkeypatch):
    size = {"rollout_batch_size": 1} if kind is PromptDataModule else {}
    first = ready(kind, "fit", data=HH_ROWS, cache_dir=tmp_path, **size)
    monkeypatch.setattr(Preparation, "build", None)
    second = ready(kind, "fit", data=HH_ROWS, cache_dir=str(tmp_path), **size)
    assert second.counts == first.counts
    batches = zip(first.train_dataloader(), second.train_dataloader(), strict=True)
    assert all(torch.equal(a.row_ids, b.row_ids) for a, b in batches)
