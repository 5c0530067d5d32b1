"""What the host knows of tensors: what it reads, what it keeps, and when it forgets."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_lightning import host
from rlhf_lightning.host import alike, on_host, places_of, to_device


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors were read each time the device was waited for."""
    counted: list[int] = []
    read = host._read

    def counting(tensors: list[Tensor]) -> list[Tensor]:
        counted.append(len(tensors))
        return read(tensors)

    monkeypatch.setattr(host, "_read", counting)
    return counted


def same(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found, expected)


def test_tensors_of_all_kinds_are_read_at_once_and_only_once(reads: list[int]) -> None:
    tensors = (
        torch.tensor([[True], [False], [True]]),
        torch.arange(6).view(2, 3).T,
        torch.tensor(0.5, dtype=torch.float64, requires_grad=True),
        torch.zeros(0, 2, dtype=torch.bfloat16),
    )
    assert all(same(copy, tensor.detach()) for copy, tensor in zip(on_host(*tensors), tensors, strict=True))
    assert all(same(copy, tensor.detach()) for copy, tensor in zip(on_host(*tensors), tensors, strict=True))
    on_host(tensors[0], tensors[1][:1])
    assert reads == [4, 1]


def test_what_was_written_to_is_read_again(reads: list[int]) -> None:
    mask = torch.tensor([[True, True]])
    assert places_of(mask).lengths == [2]
    mask[0, 1] = False
    assert places_of(mask).lengths == [1]
    assert on_host(mask)[0].tolist() == [[True, False]]
    assert reads == [1, 1]


def test_of_tensors_that_count_no_writes_nothing_is_kept(reads: list[int]) -> None:
    with torch.inference_mode():
        mask = torch.tensor([[True, True]])
        sent = to_device(torch.tensor([1]), "cpu")
        assert places_of(mask).lengths == [2]
        mask[0, 1] = False
        assert places_of(mask).lengths == [1]
        assert on_host(sent)[0].tolist() == [1]
    assert reads == [1, 1, 1]


def test_what_is_sent_or_made_of_what_is_known_is_known(reads: list[int]) -> None:
    index, known, unknown = to_device(torch.tensor([1, 0]), "cpu"), torch.tensor([[1, 2], [3, 4]]), torch.ones(2, 2)
    on_host(known)
    picked = alike(lambda field, index: field[index][:, 1:], known, index)
    assert picked.tolist() == on_host(picked)[0].tolist() == [[4], [2]]
    assert reads == [1]
    assert on_host(alike(lambda field, index: field[index], unknown, index))[0].tolist() == [[1.0, 1.0]] * 2
    assert reads == [1, 1]


def test_what_is_gone_is_forgotten() -> None:
    gc.collect()
    before = len(host._copies._known), len(host._places._known)
    mask = torch.tensor([[True]])
    places_of(mask)
    alike(lambda mask: mask[:1], mask)
    to_device(torch.tensor([1]), "cpu")
    del mask
    gc.collect()
    assert (len(host._copies._known), len(host._places._known)) == before


@given(rows=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=4))
def test_places_choose_what_the_mask_chooses(rows: list[list[bool]]) -> None:
    mask = torch.tensor(rows)
    values = torch.arange(mask.numel() * 2).view(*mask.shape, 2)
    places = places_of(mask)
    assert torch.equal(values[places.rows, places.columns], values[mask])
    assert torch.equal(values.flatten(0, 1)[places.flat], values[mask])
    assert places.lengths == mask.sum(dim=1).tolist()


def test_a_single_number_with_gaps_beside_it_is_read() -> None:
    lengths = torch.tensor([[3, 4]])[:, 1]  # contiguous, at a stride of 2
    assert lengths.stride() == (2,)
    assert same(on_host(lengths)[0], torch.tensor([4]))
