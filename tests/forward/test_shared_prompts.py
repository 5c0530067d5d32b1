"""Responses that share their prompts get the numbers that each of them gets with a prompt of its own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.models import LAYOUTS, tiny_causal_lm, tiny_classifier
from rlhf_lightning.forward.hidden import response_logprobs
from rlhf_lightning.forward.prefix import share_rows
from rlhf_lightning.forward.shared_prompts import SharedPrompts, same_prompts
from rlhf_lightning.models.finetune import enable_gradient_checkpointing
from rlhf_lightning.models.scalar_lm import Calibration, ScalarLM, response_values

EOS = 2
A, B, ONE = [5, 6, 7, 8, 9], [11, 12, 13], [14]
CASES = {
    "two": [(A, [[20, 21, EOS], [22, EOS]])],
    "four": [(A, [[20, 21, EOS], [22, EOS], [23, 24, 25, 26], [20, 21, 27]])],
    "a prompt of one token": [(ONE, [[20, 21, EOS], [22, EOS], [20, EOS], [EOS]])],
    "prompts of several lengths": [(A, [[20, EOS], [21, 22, EOS]]), (ONE, [[20, EOS], [23]]), (B, [[EOS], [20, 21]])],
    "groups of several sizes": [(A, [[20, EOS]]), (B, [[20, 21], [22, EOS], [23, 24, EOS]]), (ONE, [[EOS], [20]])],
    "only EOS": [(A, [[EOS], [EOS], [EOS], [EOS]]), (B, [[EOS], [20, EOS]])],
    "equal responses": [(A, [[20, 21, EOS], [20, 21, EOS], [20, 21, EOS]])],
    "one goes on where another ends": [(A, [[20], [20, 21], [20, 21, 22]])],
    "the same prompt twice": [(A, [[20, EOS], [21, EOS]]), (A, [[20, EOS], [22, EOS]])],
    "prompts that begin alike": [(A, [[20, EOS], [21, EOS]]), (A[:3], [[8, 9, EOS], [22, EOS]])],
    "no truncated token is the EOS": [(B, [[20, 21, 22], [23, 24, 25]])],
    "nothing shared": [(A, [[20, EOS]]), (B, [[21, 22, EOS]])],
}


def batch(groups, pad=0, left=0, right=0):
    """Sequences, their mask and their response mask, `[B, P + R]`, `[B, P + R]`, `[B, R]`, and the sizes of groups."""
    rows = [(prompt, response) for prompt, responses in groups for response in responses]
    width = left + max(len(prompt) for prompt, _ in rows)
    length = right + max(len(response) for _, response in rows)
    ids = [[pad] * (width - len(p)) + p + r + [pad] * (length - len(r)) for p, r in rows]
    mask = [[width - len(p) <= t < width + len(r) for t in range(width + length)] for p, r in rows]
    kept = torch.tensor(mask)
    return (torch.tensor(ids), kept, kept[:, width:]), [len(responses) for _, responses in groups]


def lm_of(kind):
    family, _, checkpointing = kind.partition(" ")
    lm = tiny_causal_lm(family).double()
    if checkpointing:  # computes the padding, too
        enable_gradient_checkpointing(lm)
        lm.train()
    return lm


def assert_same(models, arguments, groups):
    """Log-probabilities, entropies, values and scores agree, and so do the gradients of all weights."""
    lm, scalar = models
    found = []
    for rows in (SharedPrompts.of(*arguments, groups), None):
        said = [
            *response_logprobs(lm, *arguments, temperature=0.7, with_entropy=True, rows=rows),
            response_values(scalar, *arguments, rows),
            scalar.scores(*arguments[:2], rows),
        ]
        weights = [*lm.parameters(), *scalar.parameters()]
        for weight in weights:
            weight.grad = None
        source = torch.Generator().manual_seed(0)
        sum((one * torch.randn(one.shape, generator=source)).sum() for one in said).backward()
        found.append((said, [weight.grad for weight in weights]))
    (shared, shared_gradients), (apart, apart_gradients) = found
    for a, b in zip(shared + shared_gradients, apart + apart_gradients, strict=True):
        torch.testing.assert_close(a, b, **LAYOUTS)


@pytest.fixture(scope="module", params=["llama", "gpt2", "llama checkpointing"])
def models(request):
    scalar = ScalarLM(tiny_classifier(request.param.partition(" ")[0], seed=1).double())
    scalar.calibration = Calibration(mean=0.3, std=2.0)
    return lm_of(request.param), scalar


@pytest.mark.parametrize("pad", [0, EOS], ids=["own pad", "pad is EOS"])
@pytest.mark.parametrize("case", CASES)
def test_numbers_and_gradients_are_those_of_prompts_of_their_own(models, case, pad):
    arguments, groups = batch(CASES[case], pad, left=2, right=1)
    assert_same(models, arguments, groups)


tokens = st.integers(1, 4)  # few, so that prompts and responses begin alike, pads and EOS among them
responses = st.lists(st.lists(tokens, min_size=1, max_size=4), min_size=1, max_size=4)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.lists(tokens, min_size=1, max_size=5), responses), min_size=1, max_size=4))
def test_whatever_is_asked_and_answered(models, groups):
    arguments, sizes = batch(groups)
    assert_same(models, arguments, sizes)


def test_the_layout_by_hand():
    arguments, groups = batch([([5, 6], [[7, 8], [9]]), ([4], [[3], [3, 2]])])
    shared = SharedPrompts.of(*arguments, groups)
    assert shared.rows.ids.tolist() == [[5, 6, 7, 8, 9], [4, 3, 2, 0, 0]]
    assert shared.rows.positions.tolist() == [[0, 1, 2, 3, 2], [0, 1, 2, 0, 0]]
    counted = [
        [place for place, real in zip(*row, strict=True) if real]
        for row in zip(shared.before, arguments[2], strict=True)
    ]
    # The first tokens of the first two come from the prompt's last, place 1; the second row begins at place 5.
    assert [[int(place) for place in row] for row in counted] == [[1, 2], [1], [5], [5, 6]]
    assert shared.ends.tolist() == [3, 4, 6, 7]


def test_padding_does_not_all_read_one_place():
    arguments, groups = batch([([5, 6], [[7] * 12, *[[8]] * 3])])
    shared = SharedPrompts.of(*arguments, groups)
    assert shared.before[~arguments[2]].bincount().max() <= 3


def test_a_prompt_goes_through_the_model_once():
    arguments, groups = batch(CASES["four"])
    lm, shown = tiny_causal_lm("llama"), []
    SharedPrompts.of(*arguments, groups).response_hidden(lm)  # tries the model out
    hook = lm.base_model.embed_tokens.register_forward_hook(lambda _, args, __: shown.append(args[0].tolist()))
    SharedPrompts.of(*arguments, groups).response_hidden(lm)
    hook.remove()
    assert shown == [[[*A, 20, 21, EOS, 22, EOS, 23, 24, 25, 26, 20, 21, 27]]]


def test_a_group_may_lack_members():
    ids = torch.tensor(
        [[[5, 6, 7], [5, 6, 8], [5, 9, 0]], [[5, 6, 7], [0, 0, 0], [0, 0, 0]], [[4, 3, 0], [4, 2, 1], [0] * 3]]
    )
    mask = ids > 0
    rows = share_rows(ids, mask)
    assert rows.ids.tolist() == [[5, 6, 7, 6, 8, 9], [5, 6, 7, 0, 0, 0], [4, 3, 2, 1, 0, 0]]
    assert rows.parts() == [[1, 2, 2, 1], [3, 0, 0, 0], [1, 1, 2, 0]]
    assert torch.equal(rows.spread(rows.ids)[mask], ids[mask])


def test_prompts_are_compared_by_what_is_real_of_them():
    ids = torch.tensor([[0, 5, 6], [9, 5, 6], [5, 5, 6], [7, 0, 6], [0, 5, 6]])
    mask = torch.tensor([[False, True, True], [False, True, True], [True] * 3, [True] * 3, [False, False, True]])
    assert same_prompts(ids, mask) == [0, 0, 2, 3, 4]
