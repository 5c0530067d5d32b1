from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.data.sampler import LateLoader, ResumableSampler


def order(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


@given(st.integers(1, 30), st.integers(1, 4), st.booleans(), st.integers(0, 3), st.integers(0, 30))
def test_a_resumed_epoch_is_the_tail_of_a_whole_one(size, world, drop_last, epoch, consumed):
    for rank in range(world):
        whole = ResumableSampler(range(size), world, rank, seed=3, drop_last=drop_last)
        resumed = ResumableSampler(range(size), world, rank, seed=3, drop_last=drop_last)
        resumed.resume(epoch, consumed)

        assert len(resumed) == len(whole) == len(order(whole, epoch))
        assert list(resumed) == order(whole, epoch)[consumed:]
        assert order(resumed, epoch + 1) == order(whole, epoch + 1)
        assert order(resumed, epoch) == order(whole, epoch)[consumed:]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_processes_share_all_examples(world):
    parts = [order(ResumableSampler(range(12), world, rank, seed=1), 0) for rank in range(world)]
    assert sorted(chain.from_iterable(parts)) == list(range(12))


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
