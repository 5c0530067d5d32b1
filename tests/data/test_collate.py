"""Batches against tensors written out by hand. 2 is the EOS, 0 a pad token of its own."""

import pickle
from functools import partial

import numpy as np
import pytest
import torch

from rlhf_lightning.chat.written import WrittenPrompt
from rlhf_lightning.data.collate import (
    EncodedExample,
    EncodedPair,
    EncodedPrompt,
    EncodedSequence,
    collate_instructions,
    collate_packed,
    collate_pairs,
    collate_prompts,
    collate_sequences,
    pad,
    taught_tokens,
)

T, F = True, False
WRITTEN = WrittenPrompt("Hi.")


def int32(ids):
    """Ids as prepared data hold them."""
    return np.array(ids, dtype=np.int32)


def check(tensor, expected):
    assert tensor.tolist() == expected
    assert tensor.dtype == torch.tensor(expected).dtype  # int64, bool or float32


@pytest.mark.parametrize("filler", [0, 2])
@pytest.mark.parametrize("packed", [list, int32])
def test_instructions(filler, packed):
    o = filler
    examples = [
        EncodedExample(packed([5, 6, 7, 8, 2]), 2, 10),  # an ordinary response
        EncodedExample(packed([5, 6, 2]), 2, 11),  # a response that is only EOS
        EncodedExample(packed([5, 6, 7]), 1, 12),  # one prompt token, a response that was cut
    ]
    batch = collate_instructions(examples, filler)

    check(batch.input_ids, [[5, 6, 7, 8, 2], [5, 6, 2, o, o], [5, 6, 7, o, o]])
    check(batch.attention_mask, [[T, T, T, T, T], [T, T, T, F, F], [T, T, T, F, F]])
    check(batch.loss_mask, [[F, F, T, T, T], [F, F, T, F, F], [F, T, T, F, F]])
    check(batch.row_ids, [10, 11, 12])

    everything = collate_instructions(examples, filler, loss_on="all")
    check(everything.loss_mask, [[F, T, T, T, T], [F, T, T, F, F], [F, T, T, F, F]])


def test_every_turn_of_the_assistant():
    dialogue = EncodedExample([1, 5, 6, 2, 7, 8, 2, 9, 4, 2], 8, 0, turns=np.array([2, 4, 5, 7], np.int32))
    batch = collate_instructions([dialogue, EncodedExample([5, 6, 2], 1, 1)], 0, loss_on="turns")
    check(batch.loss_mask, [[F, F, T, T, F, T, T, F, T, T], [F, T, T, F, F, F, F, F, F, F]])
    alone = collate_instructions([dialogue], 0)
    check(alone.loss_mask, [[F, F, F, F, F, F, F, F, T, T]])


def test_the_first_token_is_never_a_target():
    prompts_of_none = [EncodedExample([7, 2], 0, 0), EncodedExample([6, 2], 1, 1, turns=[0, 1])]
    for loss_on in ("response", "turns", "all"):
        check(collate_instructions(prompts_of_none, 0, loss_on).loss_mask, [[F, T], [F, T]])


@pytest.mark.parametrize("filler", [0, 2])
def test_packed_examples(filler):
    o = filler
    rows = [
        [EncodedExample(int32([5, 6, 7, 2]), 2, 10), EncodedExample([5, 2], 1, 11, turns=[0, 1])],
        [EncodedExample([5, 6, 8], 1, 12)],
    ]
    batch = collate_packed(rows, filler)

    check(batch.input_ids, [[5, 6, 7, 2, 5, 2], [5, 6, 8, o, o, o]])
    check(batch.attention_mask, [[T, T, T, T, T, T], [T, T, T, F, F, F]])
    check(batch.loss_mask, [[F, F, T, T, F, T], [F, T, T, F, F, F]])
    check(batch.position_ids, [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 0, 0]])
    check(batch.row_ids, [[10, 11], [12, -1]])
    check(collate_packed(rows, filler, loss_on="all").loss_mask, [[F, T, T, T, F, T], [F, T, T, F, F, F]])
    check(collate_packed(rows, filler, loss_on="turns").loss_mask, batch.loss_mask.tolist())


@pytest.mark.filterwarnings("error")
def test_ids_that_may_not_be_written_to():
    ids = np.frombuffer(np.array([5, 6, 2], np.int32).tobytes(), np.int32)
    assert not ids.flags.writeable
    check(collate_instructions([EncodedExample(ids, 1, 0)], 0).input_ids, [[5, 6, 2]])


@pytest.mark.parametrize("filler", [0, 2])
def test_pairs_share_one_length(filler):
    o = filler
    pairs = [EncodedPair([5, 6, 2], [5, 7, 8, 2], 1, 3), EncodedPair([5, 2], [5, 9, 2], 1, 4, 0.5, 2.0)]
    batch = collate_pairs(pairs, filler)

    check(batch.chosen_ids, [[5, 6, 2, o], [5, 2, o, o]])
    check(batch.chosen_mask, [[T, T, T, F], [T, T, F, F]])
    check(batch.rejected_ids, [[5, 7, 8, 2], [5, 9, 2, o]])
    check(batch.rejected_mask, [[T, T, T, T], [T, T, T, F]])
    check(batch.row_ids, [3, 4])
    check(batch.margins, [0.0, 0.5])
    check(batch.weights, [1.0, 2.0])
    check(batch.prompt_lengths, [1, 1])


def test_pairs_of_which_the_chosen_side_is_the_longer():
    batch = collate_pairs([EncodedPair([5, 6, 7, 2], [5, 2], 1, 0, margin=1, weight=2)], 0)
    check(batch.chosen_mask, [[T, T, T, T]])
    check(batch.rejected_ids, [[5, 2, 0, 0]])
    check(batch.rejected_mask, [[T, T, F, F]])
    check(batch.margins, [1.0])  # whole numbers in, floats out
    check(batch.weights, [2.0])


@pytest.mark.parametrize("filler", [0, 2])
def test_prompts_are_padded_on_the_left(filler):
    o = filler
    batch = collate_prompts([EncodedPrompt([5, 2, 6], "a", 0), EncodedPrompt(int32([7]), "b", 5)], filler)

    check(batch.prompt_ids, [[5, 2, 6], [o, o, 7]])
    check(batch.prompt_mask, [[T, T, T], [F, F, T]])
    assert batch.prompts == ["a", "b"]
    check(batch.row_ids, [0, 5])


@pytest.mark.parametrize(("each", "together"), [([WRITTEN, WRITTEN], [WRITTEN, WRITTEN]), ([WRITTEN, None], None)])
def test_prompts_as_their_rows_wrote_them_are_all_known_or_none(each, together):
    prompts = [EncodedPrompt([5], "Hi.", row, written) for row, written in enumerate(each)]
    assert collate_prompts(prompts, 0).written == together


def test_sequences_to_score():
    sequences = [EncodedSequence([5, 6, 2], "a", "b", "chosen", 7), EncodedSequence([5, 2], "a", "", "rejected", 7)]
    batch = collate_sequences(sequences, 2)

    check(batch.input_ids, [[5, 6, 2], [5, 2, 2]])
    check(batch.attention_mask, [[T, T, T], [T, T, F]])
    assert (batch.prompts, batch.responses, batch.roles) == (["a", "a"], ["b", ""], ["chosen", "rejected"])
    check(batch.row_ids, [7, 7])


def test_padding_on_either_side():
    assert [x.tolist() for x in pad([[1], [2, 3]], 9, "left")] == [[[9, 1], [2, 3]], [[F, T], [T, T]]]
    assert [x.tolist() for x in pad([[1], [2, 3]], 9, "right", length=3)] == [
        [[1, 9, 9], [2, 3, 9]],
        [[T, F, F], [T, T, F]],
    ]


def test_sequences_without_a_token_have_no_width():
    assert [x.shape for x in pad([[], []], 9, "right")] == [(2, 0), (2, 0)]


def test_types_do_not_follow_what_came_in():
    example = EncodedExample([5, 6, 2], 1, np.int32(7))
    assert taught_tokens(example, "response").dtype == np.bool_
    check(collate_instructions([example], 0).row_ids, [7])


def test_a_turn_without_an_end_is_an_error():
    with pytest.raises(ValueError, match="shorter"):
        taught_tokens(EncodedExample([1, 5, 2], 2, 0, turns=[1]), "turns")


def test_collate_functions_travel_to_workers():
    collate = pickle.loads(pickle.dumps(partial(collate_instructions, filler=0, loss_on="all")))
    assert collate([EncodedExample(int32([1, 2]), 1, 0)]).loss_mask.tolist() == [[F, T]]


def test_unknown_words_are_none_of_the_known_ones():
    with pytest.raises(ValueError, match="side 'middle' is neither left nor right"):
        pad([[1]], 0, side="middle")
    with pytest.raises(ValueError, match="loss_on 'respons' is none of response, turns and all"):
        collate_instructions([EncodedExample([1, 2], 1, 0)], 0, loss_on="respons")
