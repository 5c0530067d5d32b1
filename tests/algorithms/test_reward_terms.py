"""What reward modelling can learn besides leads, and what it learns them by: each switch by hand, and off as before."""

import math

import pytest
import torch
from torch.utils.data import DataLoader

from helpers.reward_terms import all_weights, batches, by_hand, save_language_models, train
from helpers.stages import assert_close_weights, save_reward_model, trainer, weights
from rlhf_lightning import RewardModule, UserError
from rlhf_lightning.algorithms.pairs import PairStage, both_sides
from rlhf_lightning.batches import PreferenceBatch
from rlhf_lightning.functional import pair_correct, pairwise_loss, scores_at_end
from rlhf_lightning.host import alike

LOSSES = ["last_token", "average", "per_sample"]
TERMS = {
    "hinge": {"objective": "hinge"},
    "smoothed": {"label_smoothing": 0.1},
    "centre": {"center_coef": 0.05},
    "lm": {"lm_coef": 0.7},
    "all": {"label_smoothing": 0.2, "center_coef": 0.05, "lm_coef": 0.7},
}
each_term = pytest.mark.parametrize(
    ("kind", "term"), [*(("untied", term) for term in TERMS), ("tied", "lm"), ("tied", "all")]
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    found = save_language_models(root)
    return {**found, "reward": save_reward_model(root / "reward", found["untied"])}


@pytest.fixture(scope="module", params=["untied", "tied"])
def folder(folders, request):
    return folders[request.param]


# By hand.


def log_loss(lead):
    return math.log1p(math.exp(-lead))


def test_every_number_by_hand(folder):
    (batch,) = batches(folder, 7, 7)
    pair_weights = [1.0, 0.5, 2.0, 0.0, 1.0, 3.0, 1.0]
    batch = batch._replace(weights=torch.tensor(pair_weights))
    module, log = train(folder, [batch], lr=0.0, micro_batch_size=3, **TERMS["all"])

    total, sums, tokens = sum(pair_weights), {"loss": 0.0, "center_loss": 0.0, "nll": 0.0}, [0.0, 0.0]
    asked = zip(by_hand(folder, module, batch), batch.margins.tolist(), pair_weights, strict=True)
    for (chosen, rejected, said), margin, weight in asked:
        lead = chosen - rejected - margin
        sums["loss"] += weight * (0.8 * log_loss(lead) + 0.2 * log_loss(-lead))
        sums["center_loss"] += weight * (chosen + rejected) ** 2
        sums["nll"] -= weight * sum(said) / len(said)
        tokens[0] -= weight * sum(said)
        tokens[1] += weight * len(said)
    means = {name: value / total for name, value in sums.items()}
    means["objective"] = means["loss"] + 0.05 * means["center_loss"] + 0.7 * tokens[0] / tokens[1]
    assert {name: log.series(f"train/{name}")[0] for name in means} == pytest.approx(means, abs=1e-5)

    (validated,) = trainer().validate(module, DataLoader([batch], batch_size=None), verbose=False)
    del means["objective"]
    assert {name: validated[f"val/{name}"] for name in means} == pytest.approx(means, abs=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_hinge_asks_for_the_lead_of_each_loss(folders, loss):
    (batch,) = batches(folders["reward"], 8, 8)
    module, log = train(folders["reward"], [batch], lr=0.0, loss=loss, objective="hinge")
    with torch.no_grad():
        sides = [module.scalar.raw(ids, mask) for ids, mask in (batch[:2], batch[2:4])]
        masks = batch.chosen_ids, batch.rejected_ids, batch.chosen_mask, batch.rejected_mask
        expected = pairwise_loss(*sides, *masks, loss, batch.margins, "hinge").mean().item()
    assert log.series("train/loss") == pytest.approx([expected], abs=1e-5)
    assert "objective" not in log.names("train")  # it is the loss


# However a step is cut, and its rows are laid out.


@each_term
@pytest.mark.parametrize("sharing", [True, False])
def test_micro_batches_change_nothing(folders, kind, term, sharing):
    folder = folders[kind]
    data = batches(folder)
    whole, log = train(folder, data, lr=0.02, prefix_sharing=sharing, **TERMS[term])
    cut, other = train(folder, data, lr=0.02, prefix_sharing=sharing, micro_batch_size=3, **TERMS[term])
    assert_close_weights(all_weights(whole), all_weights(cut))
    for name in log.names("train") - {"tokens_per_second", "padding_share", "memory_gib"}:
        assert other.series(f"train/{name}") == pytest.approx(log.series(f"train/{name}"), rel=1e-4, abs=1e-4)


@each_term
def test_prefix_sharing_changes_nothing(folders, kind, term):
    folder = folders[kind]
    data = batches(folder)
    (shared, log), (apart, other) = (
        train(folder, data, lr=0.02, prefix_sharing=yes, **TERMS[term]) for yes in (True, False)
    )
    assert_close_weights(all_weights(shared), all_weights(apart))
    for name in ("loss", "objective", "center_loss", "nll", "grad_norm"):
        assert log.series(f"train/{name}") == pytest.approx(other.series(f"train/{name}"), rel=1e-4, abs=1e-4)
    assert log.series("train/padding_share") != other.series("train/padding_share")


@each_term
def test_a_pair_of_weight_2_is_the_pair_twice(folders, kind, term):
    folder = folders[kind]
    (batch,) = batches(folder, 4, 4)
    index = torch.tensor([0, 1, 1, 3, 3, 3])
    twice = PreferenceBatch(*(field if field is None else field[index] for field in batch))
    weighted = batch._replace(weights=torch.tensor([1.0, 2.0, 0.0, 3.0]))
    (expected, log), (found, other) = (train(folder, [each], **TERMS[term]) for each in (twice, weighted))
    assert_close_weights(all_weights(found), all_weights(expected))
    assert other.series("train/loss") == pytest.approx(log.series("train/loss"), abs=1e-5)


def test_each_term_changes_what_is_learnt(folders):
    data = batches(folders["untied"])
    trained = {term: weights(train(folders["untied"], data, **options)[0].scalar) for term, options in TERMS.items()}
    trained["none"] = weights(train(folders["untied"], data)[0].scalar)
    heads = [found["model.score.weight"] for found in trained.values()]
    assert all(not torch.allclose(a, b, atol=1e-4) for i, a in enumerate(heads) for b in heads[:i])


# Off, all is as before.


class Before(RewardModule):
    """As it was without these terms."""

    losses = PairStage.losses

    def pair_metrics(self, pairs):
        batch = pairs.batch
        if pairs.rows is None:
            ids, mask = both_sides(batch)
            flat = alike(lambda mask: mask.flatten(0, 1), mask)
            scores = self.scalar.raw(ids.flatten(0, 1), flat).unflatten(0, ids.shape[:2])
        else:
            scores = pairs.rows.spread(self.scalar.head(pairs.rows.hidden_states(self.export_model)))
        chosen, rejected = scores.unbind(dim=1)
        masks = batch.chosen_ids, batch.rejected_ids, batch.chosen_mask, batch.rejected_mask
        losses = pairwise_loss(chosen, rejected, *masks, self.loss, batch.margins)
        ends = scores_at_end(chosen.detach(), batch.chosen_mask), scores_at_end(rejected.detach(), batch.rejected_mask)
        margin = ends[0] - ends[1]
        return losses, dict(zip(self.LOGGED, (pair_correct(margin), *ends, margin), strict=True))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("sharing", [True, False])
def test_without_any_of_them_all_is_as_before_bit_for_bit(folders, loss, sharing):
    folder = folders["untied"]
    data, options = batches(folder), {"loss": loss, "prefix_sharing": sharing, "micro_batch_size": 3}
    (found, log), (expected, before) = (train(folder, data, kind=k, **options) for k in (RewardModule, Before))
    assert_close_weights(weights(found.scalar), weights(expected.scalar), 0)
    assert log.names("train") == before.names("train")
    for name in log.names("train") - {"tokens_per_second", "memory_gib"}:
        assert log.series(f"train/{name}") == before.series(f"train/{name}")
    assert found.state_dict().keys() == expected.state_dict().keys()
    assert not [name for name in found.state_dict() if "language_head" in name]


def test_scores_are_drawn_towards_0(folders):
    sums = {}
    for coef in (0.0, 0.1):
        _, log = train(folders["untied"], batches(folders["untied"]) * 4, lr=0.02, center_coef=coef)
        sums[coef] = abs(log.series("train/chosen_score")[-1] + log.series("train/rejected_score")[-1])
    assert sums[0.1] < 0.5 * sums[0.0]


# What makes no sense.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "square"}, "objective 'square' is unknown; use logistic or hinge"),
        (
            {"objective": "hinge", "label_smoothing": 0.1},
            "label_smoothing is for logistic, and objective is hinge: set it to 0",
        ),
        ({"label_smoothing": 0.5}, "label_smoothing (0.5) must be at least 0 and below 0.5"),
        ({"center_coef": -0.1}, "center_coef (-0.1) must be at least 0"),
        ({"lm_coef": float("nan")}, "lm_coef (nan) must be at least 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(UserError) as error:
        RewardModule("nowhere", **settings)
    assert str(error.value) == message


def test_batches_that_do_not_say_how_long_prompts_are_have_no_responses(folders):
    (batch,) = batches(folders["untied"], 4, 4)
    with pytest.raises(UserError, match="do not say how long their prompts are"):
        train(folders["untied"], [batch._replace(prompt_lengths=None)], lm_coef=1.0)
    train(folders["untied"], [batch._replace(prompt_lengths=None)], center_coef=1.0)


def test_empty_responses_and_pairs_without_weight_leave_the_loss_a_number(folder):
    (batch,) = batches(folder, 4, 4)
    empty = batch._replace(prompt_lengths=batch.chosen_mask.sum(dim=1))
    for each in (empty, batch._replace(weights=torch.zeros(4))):
        _, log = train(folder, [each], **TERMS["all"])
        assert all(math.isfinite(value) for call in log.calls for value in call.values())
