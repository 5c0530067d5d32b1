"""Several heads on one backbone: each learns by itself, their mean is what everybody sees, and PPO may be careful."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

from helpers.reward_terms import batches, save_language_models, train
from helpers.stages import (
    adamw,
    assert_close_weights,
    disturb_random_numbers,
    fit,
    preference_rows,
    prompt_rows,
    save_reward_model,
    share_of_letters,
    trainer,
    unpadded,
    weights,
)
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning import (
    FineTune,
    HFExport,
    PPOModule,
    PreferenceDataModule,
    PromptDataModule,
    RewardModule,
    RLOOModule,
    Sampling,
    UserError,
    load_reward_model,
)
from rlhf_lightning.algorithms.online.models import ModelSource
from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.functional import combine_scores, disagreement
from rlhf_lightning.models.heads import HEADS_FILE

K = 3
LORA = FineTune("lora", rank=2, export="adapter")
ALL = FineTune()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_language_models(tmp_path_factory.mktemp("models"))["untied"]


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory):
    return save_reward_model(tmp_path_factory.mktemp("plain"), folder)


def run(folder, checkpoint=None, stop_after=None, target=None, finetune=ALL, **settings):
    """A run of six steps, or one that ends before; exported, if `target` is given."""
    disturb_random_numbers(1234 if checkpoint is None else 99)
    settings = {"num_heads": K, "micro_batch_size": 2, "warmup_steps": 2} | settings
    module = RewardModule(folder, optimizer=adamw(1e-2), finetune=finetune, **settings)
    rows = preference_rows(12)
    data = PreferenceDataModule(folder, rows, validation_data=rows[:3], max_length=48, batch_size=4)
    callbacks = [] if target is None else [HFExport(str(target))]
    log = fit(module, data, max_epochs=2, max_steps=stop_after or -1, callbacks=callbacks, ckpt_path=checkpoint)
    return module, log


@pytest.fixture(scope="module", params=["merged", "adapter"])
def exported(folder, tmp_path_factory, request):
    """A trained module, and its export as a model or as an adapter."""
    target = tmp_path_factory.mktemp("exported") / request.param
    module, _ = run(folder, target=target, finetune=LORA if request.param == "adapter" else ALL)
    return module, target


def heads_of(module):
    """Weights of the heads, `[K, D]`, by their definition."""
    apart = module.scalar.ensemble.layer.weight.detach()
    return module.export_model.score.weight.detach() + apart - apart.mean(dim=0)


def scores_of(heads, scalar, ids, mask):
    """Score of each head at the last token of each sequence, `[B, K]`; each sequence run alone by transformers."""
    model = scalar.model.eval()
    with torch.no_grad():
        return torch.cat([model.base_model(row).last_hidden_state[:, -1] @ heads.T for row in unpadded(ids, mask)])


# Training.


def test_the_loss_is_the_mean_of_those_of_the_heads(folder):
    (batch,) = batches(folder, 7, 7)
    batch = batch._replace(weights=torch.tensor([1.0, 2.0, 0.0, 1.0, 0.5, 1.0, 3.0]))
    module, log = train(folder, [batch], lr=0.0, num_heads=K, micro_batch_size=3)
    chosen, rejected = (scores_of(heads_of(module), module.scalar, *side) for side in (batch[:2], batch[2:4]))
    total = batch.weights.sum().item()
    sums = {"loss": 0.0, "head_std": 0.0, "chosen_score": 0.0, "rejected_score": 0.0}
    asked = zip(chosen.tolist(), rejected.tolist(), batch.margins.tolist(), batch.weights.tolist(), strict=True)
    for ours, theirs, margin, weight in asked:
        losses = [math.log1p(math.exp(r + margin - c)) for c, r in zip(ours, theirs, strict=True)]
        mean = sum(ours) / K
        sums["loss"] += weight * sum(losses) / K
        sums["head_std"] += weight * math.sqrt(sum((c - mean) ** 2 for c in ours) / K)
        sums["chosen_score"] += weight * mean
        sums["rejected_score"] += weight * sum(theirs) / K
    expected = {name: pytest.approx(value / total, abs=1e-5) for name, value in sums.items()}
    assert {name: log.series(f"train/{name}")[0] for name in sums} == expected
    (validated,) = trainer().validate(module, DataLoader([batch], batch_size=None), verbose=False)
    assert {name: validated[f"val/{name}"] for name in sums} == expected
    assert sums["head_std"] > 0.1 * total


@pytest.mark.parametrize("loss", ["last_token", "average", "per_sample"])
def test_neither_micro_batches_nor_shared_prefixes_change_anything(folder, loss):
    data, terms = batches(folder), {"num_heads": K, "center_coef": 0.1, "lm_coef": 0.2, "loss": loss}
    whole, log = train(folder, data, **terms)
    for settings in ({"micro_batch_size": 3}, {"prefix_sharing": False}):
        other, others = train(folder, data, **terms, **settings)
        assert_close_weights(weights(whole.scalar), weights(other.scalar))
        for name in ("loss", "objective", "head_std", "margin", "grad_norm"):
            assert others.series(f"train/{name}") == pytest.approx(log.series(f"train/{name}"), abs=1e-4)


def test_each_head_learns_by_itself(folder):
    (batch,) = batches(folder, 8, 8)
    before, _ = train(folder, [batch], lr=0.0, num_heads=K)
    after, _ = train(folder, [batch] * 40, num_heads=K)
    moved = heads_of(after) - heads_of(before)
    assert torch.linalg.matrix_rank(moved) == K
    sides = (scores_of(heads_of(after), after.scalar, *side) for side in (batch[:2], batch[2:4]))
    chosen, rejected = sides
    assert (chosen > rejected).all()


def test_the_heads_start_around_the_one_that_there_would_be(folder):
    disturb_random_numbers(3)
    one, several = RewardModule(folder), RewardModule(folder, num_heads=50)
    one.configure_model()
    several.configure_model()
    assert torch.equal(one.export_model.score.weight, several.export_model.score.weight)
    assert one.scalar.ensemble is None
    apart = several.scalar.ensemble.layer.weight
    assert apart.std().item() == pytest.approx((apart.shape[1] + 1) ** -0.5, rel=0.1)
    assert not torch.equal(apart[0], apart[1])


@pytest.mark.parametrize("finetune", [FineTune(), LORA], ids=lambda finetune: finetune.mode)
def test_a_run_that_is_cut_ends_as_if_it_had_not_been(folder, tmp_path, finetune):
    whole, log = run(folder, finetune=finetune, lr_schedule="constant")
    cut, _ = run(folder, stop_after=2, finetune=finetune, lr_schedule="constant")
    cut.trainer.save_checkpoint(tmp_path / "cut.ckpt")
    resumed, other = run(folder, tmp_path / "cut.ckpt", finetune=finetune, lr_schedule="constant")
    assert_close_weights(weights(whole.scalar), weights(resumed.scalar), 0)
    assert other.series("train/head_std") == log.series("train/head_std")[2:]
    assert whole.run_state() == resumed.run_state()
    with pytest.raises(UserError, match="made with another model or stage"):
        run(folder, tmp_path / "cut.ckpt", num_heads=K + 1, finetune=finetune)


# The folder.


def test_plain_transformers_sees_the_mean_and_this_package_all_heads(exported, folder):
    module, target = exported
    (batch, *_) = batches(folder, 8, 8)
    loaded, heads = load_reward_model(target), heads_of(module)
    expected = scores_of(heads, load_reward_model(target), *batch[:2])
    hidden = [loaded.model.base_model(row).last_hidden_state[:, -1] for row in unpadded(*batch[:2])]
    torch.testing.assert_close(loaded.heads(torch.cat(hidden)), expected, atol=1e-5, rtol=0)
    calibrated = loaded.scores(*batch[:2])
    torch.testing.assert_close(calibrated, loaded.calibrate(expected.mean(dim=1)), atol=1e-5, rtol=0)
    assert loaded.probe_error() < 1e-5
    assert load_file(target / HEADS_FILE)["apart"].sum(dim=0).abs().max() < 1e-6
    if target.name == "merged":
        plain, info = AutoModelForSequenceClassification.from_pretrained(target, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        raw = [plain(row).logits.item() for row in unpadded(*batch[:2])]
        assert raw == pytest.approx(expected.mean(dim=1).tolist(), abs=1e-5)


def test_one_head_leaves_no_file(folder, tmp_path):
    run(folder, target=tmp_path / "one", num_heads=1)
    assert not (tmp_path / "one" / HEADS_FILE).exists()
    assert load_reward_model(tmp_path / "one").ensemble is None


def test_training_goes_on_with_the_heads_of_a_folder_or_with_their_mean(exported):
    module, target = exported
    disturb_random_numbers(5)
    again = RewardModule(str(target), num_heads=K)
    again.configure_model()
    torch.testing.assert_close(heads_of(again), heads_of(module), atol=1e-6, rtol=0)
    assert again.scalar.ensemble.layer.weight.requires_grad
    mean = RewardModule(str(target))
    mean.configure_model()
    assert mean.scalar.ensemble is None
    with pytest.raises(UserError) as error:
        RewardModule(str(target), num_heads=K + 1).configure_model()
    assert str(error.value) == f"num_heads is 4, and '{target}' has 3: go on with as many, or with 1, their mean"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"apart": torch.zeros(2, 7)}, "holds heads of the shape .2, 7. for hidden states of 32: it is of another"),
        ({"other": torch.zeros(2, 7)}, "does not hold the heads of a reward model"),
        (b"nothing", "does not hold the heads of a reward model"),
    ],
)
def test_a_file_of_something_else_is_refused(folder, tmp_path, content, message):
    target = save_reward_model(tmp_path, folder)
    path = tmp_path / HEADS_FILE
    path.write_bytes(content) if isinstance(content, bytes) else save_file(content, path)
    with pytest.raises(UserError, match=message) as error:
        load_reward_model(target)
    assert "\n" not in str(error.value)


# What a response is worth.


def test_combinations_by_hand():
    scores = torch.tensor([[1.0, 2.0, 6.0], [0.5, 0.5, 0.5]])
    std = math.sqrt((4 + 1 + 9) / 3)
    assert disagreement(scores).tolist() == pytest.approx([std, 0.0])
    assert combine_scores(scores).tolist() == pytest.approx([3.0, 0.5])
    assert combine_scores(scores, "min").tolist() == [1.0, 0.5]
    assert combine_scores(scores, "mean_minus_std").tolist() == pytest.approx([3.0 - std, 0.5])
    with pytest.raises(ValueError, match="'max' is none of mean, min and mean_minus_std"):
        combine_scores(scores, "max")


@pytest.mark.parametrize("mode", ["all", "lora"])
@pytest.mark.parametrize("how", ["mean", "min", "mean_minus_std"])
def test_ppo_is_given_the_scores_as_they_are_to_be_combined(exported, folder, how, mode):
    _, target = exported
    finetune = FineTune(mode, **({"rank": 2} if mode == "lora" else {}))
    source = ModelSource(folder, str(target), finetune=finetune, reward_combination=how)
    source.check()
    models = source.load(ChatEncoder(tiny_tokenizer()))
    assert models.value.ensemble is None  # the value model goes on from the mean
    (batch,) = batches(folder, 8, 8)
    alone = load_reward_model(target)
    apart = alone.ensemble.layer.weight
    heads = (alone.model.score.weight + apart - apart.mean(dim=0)).detach()
    expected = alone.calibrate(combine_scores(scores_of(heads, alone, *batch[:2]), how))
    scores = models.scorer.model.scores(*batch[:2])
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("kind", "samples"), [(PPOModule, 1), (RLOOModule, 2)])
def test_a_run_sees_lower_scores_where_it_is_careful(exported, folder, kind, samples):
    """Also where responses share their prompt."""
    _, target = exported
    found = {}
    for how in ("mean", "mean_minus_std", "min"):
        disturb_random_numbers(1)
        sizes = {"rollout_batch_size": 4, "minibatch_size": 4 * samples, "samples_per_prompt": samples}
        module = kind(
            folder, str(target), **sizes, ppo_epochs=1, sampling=Sampling(max_new_tokens=4), reward_combination=how
        )
        data = PromptDataModule(
            folder, prompt_rows(4), validation_split=0.0, rollout_batch_size=4, max_prompt_length=40
        )
        log = fit(module, data, max_steps=1)
        found[how] = log.series("train/score")[0]
        assert module.scorer.model.combination == how
    assert found["min"] < found["mean_minus_std"] < found["mean"]


@pytest.mark.parametrize("kind", [PPOModule, RLOOModule])
def test_what_has_no_heads_to_be_combined_is_refused(folder, plain, kind):
    for reward, what in [(plain, f"'{plain}' has one"), (share_of_letters, "reward is a function")]:
        with pytest.raises(UserError) as error:
            kind(folder, reward, reward_combination="min")
        assert str(error.value) == (
            f"reward_combination min is for a reward model with several heads, and {what}: set it to mean, or train "
            "one with num_heads"
        )
