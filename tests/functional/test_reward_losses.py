"""The three pairwise losses of the reward model, against numbers by hand and loops over single pairs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.functional import center_loss, divergence_index, lead_loss, pairwise_loss, scores_at_end

NAN = float("nan")
EOS, PAD = 2, 0
KINDS = ["last_token", "average", "per_sample"]


def log_loss(margin):
    return math.log1p(math.exp(-margin))


def stack(rows, width, filler):
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows])


def batch(pairs, pad_id=PAD, extra=0, hidden=NAN):
    """Arguments of `pairwise_loss` from pairs of `(ids, scores)` on each side."""
    width = max(len(ids) for pair in pairs for ids, _ in pair) + extra
    tensors = {}
    for number, side in enumerate(("chosen", "rejected")):
        ids, scores = zip(*(pair[number] for pair in pairs), strict=True)
        tensors[f"{side}_ids"] = stack(ids, width, pad_id)
        tensors[f"{side}_scores"] = stack(scores, width, hidden)
        tensors[f"{side}_mask"] = stack([[True] * len(i) for i in ids], width, False)
    return tensors


def first_difference(chosen, rejected):
    """Where two lists part; 0 if they are the same."""
    for position in range(max(len(chosen), len(rejected))):
        if chosen[position : position + 1] != rejected[position : position + 1]:
            return position
    return 0


def plain_loss(chosen, rejected, kind):
    """One pair, by the definition, without tensors."""
    (chosen_ids, chosen_scores), (rejected_ids, rejected_scores) = chosen, rejected
    if kind == "last_token":
        return log_loss(chosen_scores[-1] - rejected_scores[-1])
    start = first_difference(chosen_ids, rejected_ids)
    if kind == "average":
        means = []
        for scores in (chosen_scores, rejected_scores):
            own = scores[start:] or scores[-1:]
            means.append(sum(own) / len(own))
        return log_loss(means[0] - means[1])
    losses = []
    for position in range(start, max(len(chosen_ids), len(rejected_ids))):
        ours = chosen_scores[min(position, len(chosen_scores) - 1)]
        theirs = rejected_scores[min(position, len(rejected_scores) - 1)]
        losses.append(log_loss(ours - theirs))
    return sum(losses) / len(losses)


@st.composite
def pairs(draw):
    """A shared prompt of at least one token, then two continuations; few ids, so that they often agree."""
    prompt = draw(st.lists(st.integers(0, 2), min_size=1, max_size=3))
    sides = []
    for _ in range(2):
        ids = prompt + draw(st.lists(st.integers(0, 2), max_size=4))
        sides.append((ids, draw(st.lists(st.floats(-5, 5, width=32), min_size=len(ids), max_size=len(ids)))))
    return tuple(sides)


PAIR = (([5, 6, 7, EOS], [0.1, 0.2, 0.9, 2.0]), ([5, 6, EOS], [0.1, 0.2, 1.0]))


@pytest.mark.parametrize("pad_id", [PAD, EOS])
@pytest.mark.parametrize("extra", [0, 2])
def test_a_pair_by_hand(pad_id, extra):
    # The sides part at position 2. There the chosen side has scores 0.9 and 2.0, the rejected side 1.0, at its EOS.
    expected = {
        "last_token": log_loss(2.0 - 1.0),
        "average": log_loss((0.9 + 2.0) / 2 - 1.0),
        "per_sample": (log_loss(0.9 - 1.0) + log_loss(2.0 - 1.0)) / 2,
    }
    for kind, loss in expected.items():
        assert pairwise_loss(**batch([PAIR], pad_id, extra), kind=kind).tolist() == pytest.approx([loss])


def test_a_margin_by_hand():
    # As above, with the chosen side asked to lead by 0.5; at every position, for the loss that has several.
    expected = {
        "last_token": log_loss(2.0 - 1.0 - 0.5),
        "average": log_loss((0.9 + 2.0) / 2 - 1.0 - 0.5),
        "per_sample": (log_loss(0.9 - 1.0 - 0.5) + log_loss(2.0 - 1.0 - 0.5)) / 2,
    }
    for kind, loss in expected.items():
        margins = torch.tensor([0.5, 0.0])
        losses = pairwise_loss(**batch([PAIR, PAIR], extra=1), kind=kind, margins=margins)
        without = pairwise_loss(**batch([PAIR], extra=1), kind=kind).item()
        assert losses.tolist() == pytest.approx([loss, without])


def test_first_difference_by_hand():
    chosen = [[5, 6, 7], [5, EOS], [5, 6], [5, 6], [8]]
    rejected = [[5, 8, 7], [5, 6, EOS], [5, 6, EOS], [5, 6], [9]]
    sides = [tuple((ids, [0.0] * len(ids)) for ids in pair) for pair in zip(chosen, rejected, strict=True)]
    for pad_id in (PAD, EOS):
        tensors = {k: v for k, v in batch(sides, pad_id).items() if not k.endswith("scores")}
        assert divergence_index(**tensors).tolist() == [1, 1, 2, 0, 0]


def test_an_eos_that_only_one_side_has_is_a_difference_also_where_pad_is_eos():
    complete, cut = [5, 6, EOS], [5, 6]
    pair = (complete, [0.0, 0.0, 3.0]), (cut, [0.0, 1.0])
    tensors = batch([pair], pad_id=EOS)
    assert torch.equal(tensors["chosen_ids"], tensors["rejected_ids"])
    # The cut side has no token from the difference on; its last one, with score 1, stands for it.
    for kind in KINDS:
        assert pairwise_loss(**tensors, kind=kind).tolist() == pytest.approx([log_loss(3.0 - 1.0)])


def test_scores_are_read_at_the_last_real_token_on_either_padding_side():
    scores = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, NAN], [NAN, 2.0, 3.0], [1.0, NAN, NAN]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 1, 1], [1, 0, 0]]).bool()
    assert scores_at_end(scores, mask).tolist() == [3.0, 2.0, 3.0, 1.0]


@pytest.mark.parametrize("kind", KINDS)
@given(examples=st.lists(pairs(), min_size=1, max_size=4))
def test_losses_equal_a_loop_over_pairs(kind, examples):
    losses = pairwise_loss(**batch(examples), kind=kind)
    assert losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx([plain_loss(*pair, kind) for pair in examples], abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@given(examples=st.lists(pairs(), min_size=2, max_size=4), extra=st.integers(0, 3))
def test_a_pair_is_judged_by_itself(kind, examples, extra):
    together = pairwise_loss(**batch(examples, EOS, extra), kind=kind)
    alone = [pairwise_loss(**batch([pair], hidden=99.0), kind=kind).item() for pair in examples]
    assert together.tolist() == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@given(pair=pairs())
def test_swapping_the_sides_negates_the_margin(kind, pair):
    there, back = (pairwise_loss(**batch([p]), kind=kind).item() for p in (pair, pair[::-1]))
    if kind != "per_sample":  # -log sigmoid(m) and -log sigmoid(-m) differ by m
        assert math.exp(-there) + math.exp(-back) == pytest.approx(1, abs=1e-4)
    assert there + back >= 2 * math.log(2) - 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_identical_sides_cost_log_2(kind):
    assert pairwise_loss(**batch([(PAIR[0], PAIR[0])]), kind=kind).item() == pytest.approx(math.log(2))


def test_the_last_token_counts_where_no_kind_is_said():
    assert torch.equal(pairwise_loss(**batch([PAIR])), pairwise_loss(**batch([PAIR]), kind="last_token"))


@pytest.mark.parametrize("kind", KINDS)
def test_losses_lie_where_their_inputs_do(kind):
    elsewhere = {name: tensor.to("meta") for name, tensor in batch([PAIR]).items()}
    assert pairwise_loss(**elsewhere, kind=kind).device.type == "meta"


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_real_tokens_only(kind):
    tensors = batch([PAIR], extra=2)
    for side in ("chosen", "rejected"):
        tensors[f"{side}_scores"].requires_grad_()
    pairwise_loss(**tensors, kind=kind).sum().backward()
    chosen, rejected = tensors["chosen_scores"].grad[0], tensors["rejected_scores"].grad[0]
    assert chosen.isfinite().all()
    assert rejected.isfinite().all()
    reached = {"last_token": [3], "average": [2, 3], "per_sample": [2, 3]}[kind]
    assert chosen.nonzero().flatten().tolist() == reached
    assert rejected.nonzero().flatten().tolist() == [2]
    assert (chosen[reached] < 0).all()
    assert rejected[2] > 0
    assert (chosen.sum() + rejected.sum()).item() == pytest.approx(0, abs=1e-6)


def test_an_unknown_kind_is_none_of_the_known_ones():
    ids, mask, scores = torch.zeros(1, 2).long(), torch.ones(1, 2).bool(), torch.zeros(1, 2)
    with pytest.raises(ValueError, match="kind 'last_tokn' is none of last_token, average and per_sample"):
        pairwise_loss(scores, scores, ids, ids, mask, mask, "last_tokn")


def test_a_hinge_by_hand():
    # The leads are those of the first test above: what each lacks of 1; with a margin of 0.5 that much more.
    pairs = [PAIR, PAIR[::-1]]
    expected = {
        "last_token": [1 - (2.0 - 1.0), 1 - (1.0 - 2.0)],
        "average": [1 - (1.45 - 1.0), 1 - (1.0 - 1.45)],
        "per_sample": [((1 - -0.1) + (1 - 1.0)) / 2, ((1 - 0.1) + (1 - -1.0)) / 2],
    }
    for kind, losses in expected.items():
        found = pairwise_loss(**batch(pairs, extra=1), kind=kind, objective="hinge")
        assert found.tolist() == pytest.approx(losses, abs=1e-6)
        asked = pairwise_loss(**batch(pairs), kind=kind, objective="hinge", margins=torch.tensor([0.5, 0.5]))
        assert asked.tolist() == pytest.approx([loss + 0.5 for loss in losses], abs=1e-6)


def test_a_hinge_has_no_gradient_where_the_lead_is_1():
    lead = torch.tensor([0.9, 1.5], requires_grad=True)
    lead_loss(lead, "hinge").sum().backward()
    assert lead.grad.tolist() == [-1.0, 0.0]


def test_smoothed_labels_by_hand():
    # With e = 0.2 each lead costs 0.8 of what it does, and 0.2 of what it would the other way round.
    def smoothed(lead):
        return 0.8 * log_loss(lead) + 0.2 * log_loss(-lead)

    expected = {
        "last_token": smoothed(1.0),
        "average": smoothed(1.45 - 1.0),
        "per_sample": (smoothed(-0.1) + smoothed(1.0)) / 2,
    }
    for kind, loss in expected.items():
        found = pairwise_loss(**batch([PAIR], extra=1), kind=kind, label_smoothing=0.2)
        assert found.tolist() == pytest.approx([loss], abs=1e-6)
    asked = pairwise_loss(**batch([PAIR]), label_smoothing=0.2, margins=torch.tensor([0.5]))
    assert asked.tolist() == pytest.approx([smoothed(0.5)], abs=1e-6)


def test_smoothed_labels_want_a_lead_that_is_not_too_large():
    lead = torch.tensor([math.log(0.9 / 0.1)], requires_grad=True)
    lead_loss(lead, label_smoothing=0.1).sum().backward()
    assert lead.grad.item() == pytest.approx(0, abs=1e-7)


def test_no_smoothing_is_the_plain_loss_to_the_last_bit():
    lead = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(lead_loss(lead), -torch.nn.functional.logsigmoid(lead))
    assert torch.equal(lead_loss(lead, "logistic", 0.0), lead_loss(lead))


def test_the_centre_by_hand():
    scores = torch.tensor([[2.0, -2.0], [1.5, 0.5], [-3.0, 1.0]], requires_grad=True)
    losses = center_loss(*scores.unbind(dim=1))
    assert losses.tolist() == [0.0, 4.0, 4.0]
    losses.sum().backward()
    assert scores.grad.tolist() == [[0.0, 0.0], [4.0, 4.0], [-4.0, -4.0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "hinge", "label_smoothing": 0.1}, "label_smoothing .0.1. is for logistic, and the objective is"),
        ({"objective": "square"}, "objective 'square' is none of logistic and hinge"),
    ],
)
def test_what_a_lead_cannot_cost(options, message):
    with pytest.raises(ValueError, match=message):
        lead_loss(torch.zeros(1), **options)
