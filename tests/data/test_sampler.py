import json
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from rlhf_lightning.data.collate import EncodedPrompt
from rlhf_lightning.data.sampler import LateLoader, ResumableSampler, group_by_length
from rlhf_lightning.data.shares import evaluation_loader
from rlhf_lightning.errors import UserError


def order(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


@st.composite
def arrangements(draw):
    """Number of examples, number of processes, and settings of the sampler."""
    size, world = draw(st.integers(1, 40)), draw(st.integers(1, 4))
    settings = {"seed": 3, "drop_last": draw(st.booleans()), "batch_size": world * draw(st.integers(1, 4))}
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(1, 9), min_size=size, max_size=size))
        settings |= {"lengths": lengths, "length_grouped": True}
    if draw(st.booleans()):
        groups = draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))
        settings |= {"groups": groups, "weights": draw(st.lists(st.floats(0, 3), min_size=3, max_size=3))}
        assume(expected_counts(settings))
    return size, world, settings


def expected_counts(settings):
    """How many examples of each group an epoch sees."""
    sizes = Counter(settings["groups"])
    counts = {group: round(weight * sizes[group]) for group, weight in enumerate(settings["weights"])}
    return {group: count for group, count in counts.items() if count}


@given(arrangements(), st.integers(0, 3), st.integers(0, 40))
def test_a_resumed_epoch_is_the_tail_of_a_whole_one(arrangement, epoch, consumed):
    size, world, settings = arrangement
    for rank in range(world):
        whole = ResumableSampler(range(size), world, rank, **settings)
        resumed = ResumableSampler(range(size), world, rank, **settings)
        resumed.resume(epoch, consumed)

        assert len(resumed) == len(whole) == len(order(whole, epoch))
        assert list(resumed) == order(whole, epoch)[consumed:]
        assert order(resumed, epoch + 1) == order(whole, epoch + 1)
        assert order(resumed, epoch) == order(whole, epoch)[consumed:]
        assert resumed.order() == whole.order() == json.loads(json.dumps(whole.order()))


@given(arrangements(), st.integers(0, 3))
def test_an_epoch_sees_each_group_as_often_as_its_weight_says(arrangement, epoch):
    size, _, settings = arrangement
    seen = Counter(order(ResumableSampler(range(size), **settings), epoch))
    if "weights" not in settings:
        assert seen == Counter(range(size))
        return
    groups, weights = settings["groups"], settings["weights"]
    in_group = Counter(group for row, group in enumerate(groups) for _ in range(seen[row]))
    assert in_group == expected_counts(settings)
    for row, group in enumerate(groups):
        assert abs(seen[row] - weights[group]) < 1 + 1e-9  # as near as whole numbers get


@given(arrangements(), st.integers(0, 3))
def test_processes_share_the_batches_of_one_process(arrangement, epoch):
    size, world, settings = arrangement
    batch = settings["batch_size"]
    one = order(ResumableSampler(range(size), **settings), epoch)
    parts = [order(ResumableSampler(range(size), world, rank, **settings), epoch) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    for step in range(len(one) // batch if settings["drop_last"] else -(-len(one) // batch)):
        place = slice(step * batch // world, (step + 1) * batch // world)
        together = [row for part in parts for row in part[place]]
        assert sorted(row for row in together if row >= 0) == sorted(one[step * batch : (step + 1) * batch])
        assert len(together) % world == 0
    blanks = [row for part in parts for row in part if row < 0]
    assert len(blanks) == (0 if settings["drop_last"] else -len(one) % world)
    assert all(~row in one for row in blanks)


def test_a_half_is_drawn_anew_each_epoch_and_whole_weights_repeat_all():
    groups = [0] * 40 + [1] * 10
    sampler = ResumableSampler(range(50), groups=groups, weights=[0.5, 2])
    epochs = [order(sampler, epoch) for epoch in range(2)]
    halves = [{row for row in rows if row < 40} for rows in epochs]
    assert [len(half) for half in halves] == [20, 20]
    assert halves[0] != halves[1]
    for rows in epochs:
        assert Counter(row for row in rows if row >= 40) == dict.fromkeys(range(40, 50), 2)


def test_weights_of_one_change_nothing():
    plain = order(ResumableSampler(range(30), seed=5), 2)
    assert order(ResumableSampler(range(30), seed=5, groups=[0] * 10 + [1] * 20, weights=[1, 1]), 2) == plain


def test_weights_that_leave_nothing_are_refused():
    with pytest.raises(UserError, match=r"^the weights \[0.1\] leave no example to train on; raise them$"):
        ResumableSampler(range(4), groups=[0] * 4, weights=[0.1])


def padding_share(rows, lengths, batch_size):
    batches = [lengths[rows[start : start + batch_size]] for start in range(0, len(rows), batch_size)]
    return 1 - sum(batch.sum() for batch in batches) / sum(batch.max() * len(batch) for batch in batches)


def test_length_grouping_saves_padding_leads_with_the_longest_and_keeps_a_random_rest():
    lengths = np.random.default_rng(0).lognormal(5, 0.8, size=2003).astype(int) + 1
    grouped = ResumableSampler(range(2003), lengths=lengths, length_grouped=True, batch_size=8)
    epochs = [order(grouped, epoch) for epoch in range(3)]
    for epoch, rows in enumerate(epochs):
        plain = order(ResumableSampler(range(2003)), epoch)
        assert padding_share(rows, lengths, 8) < 0.1 < 0.5 < padding_share(plain, lengths, 8)
        assert rows[-3:] == plain[-3:]
        assert lengths[rows[0]] == max(lengths[rows[:-3]])
    batches = [{frozenset(rows[start : start + 8]) for start in range(0, 2000, 8)} for rows in epochs]
    assert not batches[0] & batches[1]
    first_of_batches = [lengths[row] for row in epochs[0][:2000:8]]
    assert sorted(first_of_batches, reverse=True) != first_of_batches


def test_length_grouping_by_hand():
    # 8 batches of 2, so stretches of 2 batches are sorted: the lengths of each stretch are 4 3 | 2 1.
    lengths = [1 + row % 4 for row in range(16)]
    in_order = group_by_length(np.arange(16), np.array(lengths), 2, torch.Generator().manual_seed(0))
    batches = [tuple(pair) for pair in in_order.reshape(-1, 2).tolist()]
    assert sorted(batches) == [(1, 0), (3, 2), (5, 4), (7, 6), (9, 8), (11, 10), (13, 12), (15, 14)]
    assert lengths[batches[0][0]] == 4


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_processes_share_all_examples(world):
    parts = [order(ResumableSampler(range(12), world, rank, seed=1), 0) for rank in range(world)]
    assert sorted(chain.from_iterable(parts)) == list(range(12))


@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 4))
def test_evaluation_deals_out_every_example_once_and_as_many_rows_to_each_process(count, world, size):
    examples = [EncodedPrompt([], "", row) for row in range(count)]
    parts = [list(evaluation_loader(examples, world, rank, batch_size=size, collate_fn=list)) for rank in range(world)]
    assert len({tuple(map(len, batches)) for batches in parts}) == 1
    rows = sorted(example.row_id for batches in parts for batch in batches for example in batch)
    assert rows == [-1] * (-count % world) + [*range(count)]


def test_order_depends_on_seed_and_epoch():
    orders = {
        (seed, epoch): tuple(order(ResumableSampler(range(50), seed=seed), epoch))
        for seed in (0, 9)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_the_late_loader_hears_what_is_said_after_its_iterator_is_made(workers):
    sampler = ResumableSampler(range(8), seed=1)
    batches = iter(LateLoader(range(8), batch_size=2, sampler=sampler, num_workers=workers, collate_fn=list))
    sampler.resume(epoch=5, consumed=4)

    assert list(chain.from_iterable(batches)) == order(ResumableSampler(range(8), seed=1), 5)[4:]
