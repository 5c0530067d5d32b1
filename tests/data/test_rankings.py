"""Rankings as examples of their own: nothing is lost on the way to a batch, nor when a run is taken up again."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch

from data.test_resume import Cut, Recorder, checkpoint_every, trainer
from helpers.rankings import ranking_rows
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.batches import PreferenceBatch, RankingBatch
from rlhf_lightning.data import Blend, PreferenceDataModule, Table
from rlhf_lightning.data.collate import EncodedPair, collate_rankings
from rlhf_lightning.data.rankings import ranking_of
from rlhf_lightning.data.shares import blank
from rlhf_lightning.errors import UserError

SIZES = [4, 2, 5, 3, 2, 4, 2, 3, 6, 2, 2, 3, 4]
ROWS = ranking_rows(SIZES, ties=True)
PAIRS = [{"prompt": f"question {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(5)]


def data_module(data=ROWS, **changes):
    settings = {"validation_split": 0.0, "batch_size": 4, "max_length": 64, "whole_rankings": True, "seed": 7} | changes
    return PreferenceDataModule(tiny_tokenizer(), data, **settings)


def batches(data):
    data.setup("fit")
    return list(data.train_dataloader())


def pairs_by_row(found):
    """Of each row its pairs, as lists of ids, with margin and weight; rows that come twice are said once."""
    rows = {}
    for batch in found:
        for i, row in enumerate(batch.row_ids.tolist()):
            if isinstance(batch, PreferenceBatch):
                sides = ((batch.chosen_ids[i], batch.chosen_mask[i]), (batch.rejected_ids[i], batch.rejected_mask[i]))
                said = [*(ids[mask].tolist() for ids, mask in sides), batch.margins[i].item(), batch.weights[i].item()]
                rows.setdefault(row, []).append(said)
                continue
            rows[row] = [
                [
                    *(batch.input_ids[i, n][batch.attention_mask[i, n]].tolist() for n in pair),
                    batch.margins[i, number].item(),
                    batch.weights[i, number].item(),
                ]
                for number, pair in enumerate(batch.pairs[i].tolist())
                if pair[0] >= 0
            ]
    return {row: sorted(said) for row, said in rows.items()}


def test_an_epoch_holds_each_row_once_with_all_its_pairs():
    data = data_module()
    found = batches(data)
    assert all(isinstance(batch, RankingBatch) for batch in found)
    rows = [row for batch in found for row in batch.row_ids.tolist()]
    assert sorted(rows) == [*range(len(ROWS))] != rows
    assert [len(batch.row_ids) for batch in found] == [4, 4, 4, 1]
    assert data.counts["train"] == len(ROWS)
    assert pairs_by_row(found) == pairs_by_row(batches(data_module(whole_rankings=False)))
    for batch in found:
        counts = batch.attention_mask.any(dim=2).sum(dim=1).tolist()
        assert counts == [SIZES[row] for row in batch.row_ids.tolist()]
        assert batch.attention_mask.any(dim=2).sum(dim=1).max() == batch.attention_mask.shape[1]


def test_pairs_are_rankings_of_two():
    assert pairs_by_row(batches(data_module(PAIRS))) == pairs_by_row(batches(data_module(PAIRS, whole_rankings=False)))


def test_a_batch_by_hand():
    first = [EncodedPair([1, 5], [1, 6, 7], 1, 3, 0.5, 0.25), EncodedPair([1, 6, 7], [1, 5], 1, 3, 0.5, 0.75)]
    second = [EncodedPair(np.array([2, 3, 9]), np.array([2, 3, 8, 8]), 2, 4)]
    batch = collate_rankings([ranking_of(first), blank(ranking_of(second))], filler=0)
    assert batch.input_ids.tolist() == [[[1, 5, 0, 0], [1, 6, 7, 0]], [[2, 3, 9, 0], [2, 3, 8, 8]]]
    assert batch.attention_mask.sum(dim=2).tolist() == [[2, 3], [3, 4]]
    assert batch.pairs.tolist() == [[[0, 1], [1, 0]], [[0, 1], [-1, -1]]]
    assert batch.margins.tolist() == [[0.5, 0.5], [0, 0]]
    assert batch.weights.tolist() == [[0.25, 0.75], [0, 0]]  # a blank counts for nothing
    assert batch.row_ids.tolist() == [3, -1]
    assert batch.prompt_lengths.tolist() == [1, 2]
    assert [field.dtype for field in (batch.input_ids, batch.attention_mask, batch.margins)] == [
        torch.int64,
        torch.bool,
        torch.float32,
    ]


def test_rankings_of_similar_length_go_together_and_a_blend_weighs_rows():
    data = data_module(length_grouped=True, batch_size=2)
    found = batches(data)
    longest = [batch.attention_mask.sum(dim=2).amax(dim=1) for batch in found]
    table = data._part("train")
    assert table.total_lengths.tolist() == [max(len(ids) for ids in ranking.sequences) for ranking in table]
    assert max(table.total_lengths) in longest[0].tolist()
    blend = data_module(Blend([Table(ROWS[:6]), Table(ROWS[6:])], [2.0, 1.0]))
    rows = sorted(row for batch in batches(blend) for row in batch.row_ids.tolist())
    assert rows == sorted([*range(len(ROWS)), *range(6)])


def test_a_table_goes_to_other_processes_and_knows_itself():
    data = data_module()
    data.setup("fit")
    table = data._part("train")
    copy = pickle.loads(pickle.dumps(table))
    assert copy.identity == table.identity
    assert len(copy[2:4]) == 2
    assert str(copy[-1]) == str(table[len(table) - 1])
    other = data_module(ranking_rows([2, 4, *SIZES[2:]], ties=True))
    other.setup("fit")
    assert other._part("train").identity != table.identity


def test_each_held_out_response_is_scored_once():
    data = data_module(validation_data=ROWS[:3])
    data.setup("predict")
    found = list(data.predict_dataloader())
    said = [(row, role) for batch in found for row, role in zip(batch.row_ids.tolist(), batch.roles, strict=True)]
    assert said == [*[(0, "response")] * 4, (1, "chosen"), (1, "rejected"), *[(2, "response")] * 5]
    texts = [text for batch in found for text in batch.responses]
    assert texts[:4] == ROWS[0]["responses"]


# Taken up again.


def stream(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return Table(str(path), streaming=True)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("step", [2, 6])
def test_a_run_goes_on_where_it_was_cut_and_with_rankings_only(tmp_path, streaming, step):
    settings = {"data": stream(tmp_path) if streaming else ROWS}
    whole, part, rest = Recorder(), Recorder(cut_after=step + 1), Recorder()
    trainer(None, enable_checkpointing=False).fit(whole, data_module(**settings))
    assert len({row for _, _, rows, _ in whole.seen[:4] for row in rows}) == len(ROWS)
    with pytest.raises(Cut):
        trainer(tmp_path, [checkpoint_every(tmp_path, 2)]).fit(part, data_module(**settings))
    again = trainer(tmp_path, enable_checkpointing=False)
    again.fit(rest, data_module(**settings), ckpt_path=tmp_path / f"step={step}.ckpt")
    assert [rows for _, _, rows, _ in rest.seen] == [rows for _, _, rows, _ in whole.seen[step:]]

    with pytest.raises(UserError, match="in the middle of an epoch with"):
        trainer(tmp_path, enable_checkpointing=False).fit(
            Recorder(), data_module(**settings, whole_rankings=False), ckpt_path=tmp_path / f"step={step}.ckpt"
        )


def test_a_stream_holds_what_would_be_prepared(tmp_path):
    assert pairs_by_row(batches(data_module(stream(tmp_path)))) == pairs_by_row(batches(data_module()))


def test_loader_processes_give_the_same_batches():
    alone, helped = (batches(data_module(num_workers=workers)) for workers in (0, 1))
    assert [str(batch) for batch in alone] == [str(batch) for batch in helped]
