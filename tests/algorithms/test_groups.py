"""RLOO and GRPO, against another implementation's numbers, and that they learn."""

from __future__ import annotations

import copy
from functools import partial
from typing import ClassVar

import pytest
import torch
from torch.utils.data import DataLoader

from helpers.closed_form import EOS, closed_form_lm, gradient_of_one_step, save_closed_form_lm
from helpers.stages import adamw, fit, prompt_rows, same_weights, save_llama, sgd, share_of_letters, trainer, weights
from rlhf_lightning import GRPOModule, KLPenalty, PromptDataModule, RLOOModule, Sampling, ScoreShaping, UserError
from rlhf_lightning.algorithms.online.experience import Measurements
from rlhf_lightning.batches import PromptBatch, repeat_prompts
from rlhf_lightning.forward.hidden import response_logprobs
from rlhf_lightning.functional import group_advantages
from rlhf_lightning.generation.engine import Generation, TransformersEngine

PROMPTS = [[3, 4], [9, 10, 11], [2, 16, 6, 3]]
RESPONSES = [
    *([5, 6, 7, EOS], [8, EOS], [11, 12, 13, 14, 15]),
    *([12, 13, EOS], [12, 13, 14, 15, EOS], [EOS]),
    *([EOS], [10, 4, EOS], [7, 7, EOS]),
]
REWARDS = [1.0, -0.5, 0.25, 0.0, 2.0, -1.5, 0.5, 0.5, 0.5]
NAMES = ("norm", "embed_tokens", "q_proj", "down_proj", "lm_head[12]")
GRPO = [
    (
        {"loss": "grpo", "coef": 0.0},
        0.0227127299,
        0.7254439112,
        0.03948289754,
        0.0002752319004,
        0.1005811281,
        -0.04481200258,
    ),
    (
        {"loss": "dapo", "coef": 0.0},
        -0.2127288488,
        0.5285334908,
        -0.02446248161,
        -0.02095542201,
        -0.07590741826,
        -0.05446664105,
    ),
    (
        {"loss": "dr_grpo", "coef": 0.0},
        -0.0797733183,
        0.1982000576,
        -0.009173430186,
        -0.007858282944,
        -0.02846528836,
        -0.02042499039,
    ),
    (
        {"loss": "grpo", "coef": 0.04},
        0.04575624062,
        0.6526695036,
        0.008960744201,
        -0.001170662587,
        0.02426742931,
        -0.03987304823,
    ),
    (
        {"loss": "dapo", "coef": 0.04},
        -0.1953053278,
        0.5277493545,
        -0.04454703686,
        -0.0202732793,
        -0.1157254282,
        -0.04911518773,
    ),
    (
        {"loss": "dr_grpo", "coef": 0.04},
        -0.07323949792,
        0.1979060088,
        -0.01670513808,
        -0.007602478512,
        -0.04339703519,
        -0.0184181954,
    ),
    (
        {"loss": "grpo", "coef": 0.0, "scaled": False},
        0.02210513731,
        1.063935811,
        0.1606495534,
        0.007961802343,
        0.4250776628,
        -0.07756789675,
    ),
    (
        {"loss": "dr_grpo", "coef": 0.0, "scaled": False},
        -0.1168024563,
        0.2380070545,
        0.01861829279,
        -0.01012249359,
        0.03494116358,
        -0.03569415542,
    ),
    (
        {"loss": "dapo", "coef": 0.0, "clip_range_high": 0.28},
        -0.2212248354,
        0.5834972579,
        -0.1455865165,
        -0.01672030641,
        -0.1665926453,
        -0.04797342309,
    ),
    (
        {"loss": "dapo", "coef": 0.0, "clip_range": 0.05, "clip_range_high": 0.1},
        -0.1885029601,
        0.465776619,
        0.02680236641,
        -0.01838109576,
        0.04710514707,
        -0.05538960687,
    ),
]
RLOO = [
    (
        {"coef": 0.0},
        *(-0.02857480049, 2.088742398, 0.07854440244, 0.03441913206, 0.4904799334, 0.005493668794),
    ),
    (
        {"coef": 0.05},
        *(-0.03376127686, 2.177155474, 0.05257313586, 0.04427083249, 0.4476443809, 0.01372376746),
    ),
    (
        {"coef": 0.0, "clip_range": 0.05, "clip_range_high": 0.1},
        0.004114319029,
        1.977457864,
        0.0738070058,
        0.02602743478,
        0.4415324027,
        -0.0379652584,
    ),
]
"""Settings, then the loss and sums of its gradient that TRL 1.16's `GRPOTrainer` and `RLOOTrainer` computed in float64:
the policy is `closed_form_lm(0.0)`, the reference `closed_form_lm(0.7)`, and `closed_form_lm(-0.3)` gave the responses;
at most 8 new tokens. The KL in GRPO's loss is without TRL's factor `use_bias_correction_kl`."""


def padded(rows, left):
    width = max(map(len, rows))
    lengths = torch.tensor([len(row) for row in rows]).unsqueeze(1)
    ids = [[0] * (width - len(row)) + row if left else row + [0] * (width - len(row)) for row in rows]
    place = torch.arange(width)
    return torch.tensor(ids), place >= width - lengths if left else place < lengths


def told_rollout(module):
    """A rollout of the module's that is told what was answered, and by which policy."""
    prompts = repeat_prompts(PromptBatch(*padded(PROMPTS, left=True), ["x"] * 3, torch.arange(3)), 3)
    ids, mask = padded(RESPONSES, left=False)
    ended = torch.tensor([row[-1] == EOS for row in RESPONSES])
    sequences = torch.cat([prompts.prompt_ids, ids], dim=1)
    kept = torch.cat([prompts.prompt_mask, mask], dim=1)
    scores = torch.tensor(REWARDS, dtype=torch.float64)

    def rollout(_):
        with torch.no_grad():
            old, ref = (response_logprobs(closed_form_lm(offset), sequences, kept, mask)[0] for offset in (-0.3, 0.7))
        nothing = torch.zeros_like(old)
        measured = Measurements(old, ref, nothing, nothing, scores, importance=torch.ones_like(old))
        return module.experience_of(prompts, Generation(ids, mask, ended), measured, scores), {"score": scores.mean()}

    return rollout


def one_step(kind, tmp_path, coef, **settings):
    folder, reference = save_closed_form_lm(tmp_path / "policy", 0.0), save_closed_form_lm(tmp_path / "reference", 0.7)
    module = kind(
        folder,
        share_of_letters,
        reference=reference,
        rollout_batch_size=3,
        samples_per_prompt=3,
        minibatch_size=9,
        sampling=Sampling(max_new_tokens=8),
        optimizer=sgd(1.0),
        lr_schedule="constant",
        gradient_clip_val=None,
        kl=KLPenalty(coef=coef, estimator="k3" if kind is GRPOModule else "k1"),
        **settings,
    )
    module.configure_model()
    module.rollout = told_rollout(module)
    module.on_policy = False  # the responses are an older policy's
    module.iteration = 1  # so that nobody expects a ratio of 1
    before = weights(module.policy)
    loss = []
    optimise = module.optimise
    module.optimise = lambda *args, **options: (step := optimise(*args, **options), loss.append(float(step.loss)))[0]
    prompts = PromptBatch(*padded(PROMPTS, left=True), ["x"] * 3, torch.arange(3))
    fit(module, DataLoader([prompts], batch_size=None), precision="64-true")
    return loss, gradient_of_one_step(before, module)


CASES = [(GRPOModule, *row) for row in GRPO] + [(RLOOModule, *row) for row in RLOO]


IN_PARTS = [case for case in CASES if case[1].get("coef") or "clip_range" in case[1]]  # each loss, with a KL too


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize(
    ("options", "kind", "settings", "loss", "norm", "embed_tokens", "q_proj", "down_proj", "lm_head"),
    [({}, *case) for case in CASES] + [({"micro_batch_size": 3}, *case) for case in IN_PARTS],
)
def test_loss_and_gradient_are_those_of_trl(
    tmp_path, options, kind, settings, loss, norm, embed_tokens, q_proj, down_proj, lm_head
):
    found, gradient = one_step(kind, tmp_path, **settings, **options)
    assert found == pytest.approx([loss], rel=1e-5, abs=2e-7)  # rotary positions are float32, TRL's start elsewhere
    expected = dict(zip(NAMES, (norm, embed_tokens, q_proj, down_proj, lm_head), strict=True))
    assert gradient == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.fixture
def llama(tmp_path):
    return save_llama(tmp_path / "llama")


def data_module(folder, **settings):
    return PromptDataModule(folder, prompt_rows(8), rollout_batch_size=4, max_prompt_length=40, **settings)


SIZES = {"rollout_batch_size": 4, "samples_per_prompt": 4, "minibatch_size": 16, "sampling": Sampling(max_new_tokens=6)}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(GRPOModule, {}), (RLOOModule, {"ppo_epochs": 2, "minibatch_size": 8, "micro_batch_size": 4})],
)
def test_raises_the_score_of_a_function_reward(llama, kind, settings):
    module = kind(
        llama, share_of_letters, **SIZES | settings, optimizer=adamw(3e-2), lr_schedule="constant", kl=KLPenalty(0.0)
    )
    log = fit(module, data_module(llama), max_epochs=14)
    scores = log.series("train/score")
    assert sum(scores[-5:]) / 5 > sum(scores[:5]) / 5 + 0.15


@pytest.mark.parametrize("kind", [RLOOModule, GRPOModule])
def test_groups_that_teach_nothing_are_counted(llama, kind):
    log = fit(kind(llama, lambda prompts, responses: [1.0] * len(prompts), **SIZES), data_module(llama), max_epochs=1)
    assert log.series("train/no_signal") == [1.0]
    assert not {"explained_variance", "value_loss", "value_lr"} & log.names("train")


def test_a_single_response_has_nobody_to_be_judged_by(llama):
    with pytest.raises(UserError, match=r"samples_per_prompt \(1\) must be at least 2"):
        RLOOModule(llama, share_of_letters, **SIZES | {"samples_per_prompt": 1, "minibatch_size": 4})


def test_equal_scores_teach_nothing_whatever_their_mean_rounds_to():
    assert not group_advantages(torch.full((12,), 100.3), 6, "mean", scaled=True).any()


def test_a_cut_response_teaches_where_scores_are_equal(llama):
    score = ScoreShaping(scaling=False, clip=None, missing_eos_penalty=1.0)
    sampling = Sampling(max_new_tokens=6, stop_strings=["e", "a"])
    module = RLOOModule(
        llama, lambda prompts, responses: [1.0] * len(prompts), **SIZES | {"sampling": sampling}, score=score
    )
    log = fit(module, data_module(llama), max_epochs=1)
    assert 0 < log.series("train/eos_rate")[0] < 1
    assert log.series("train/no_signal")[0] < 1


@pytest.mark.parametrize("kind", [RLOOModule, GRPOModule])
def test_a_penalty_without_a_pull_is_refused(llama, kind):
    with pytest.raises(UserError, match=r"kl_in: loss needs kl\.estimator k2 or k3"):
        kind(llama, share_of_letters, **SIZES, kl_in="loss", kl=KLPenalty(estimator="k1"))


def test_settings_given_in_part_keep_the_defaults_of_the_algorithm(llama):
    module = GRPOModule(llama, share_of_letters, **SIZES, kl={"coef": 0.1}, score={"missing_eos_penalty": 1.0})
    assert (module.kl.coef, module.kl.estimator) == (0.1, "k3")
    assert (module.score.scaling, module.score.clip, module.score.missing_eos_penalty) == (False, None, 1.0)


class Copying(TransformersEngine):
    """Answers with weights of its own."""

    made: ClassVar[list] = []

    def __init__(self, model, tokenizer, batch_size=None):
        super().__init__(copy.deepcopy(model), tokenizer, batch_size)
        self.made.append(self)
        self.source, self.asleep = model, False

    def sync_weights(self):
        self.model.load_state_dict(self.source.state_dict())

    def wake(self):
        self.asleep = False

    def sleep(self):
        self.asleep = True

    def generate(self, *args, **options):
        assert not self.asleep
        assert same_weights(weights(self.model), weights(self.source))
        return super().generate(*args, **options)


def test_an_engine_with_weights_of_its_own_has_those_of_now(llama, tmp_path):
    optimizer = partial(torch.optim.AdamW, lr=1e-2)  # a lambda could not come back
    module = RLOOModule(llama, share_of_letters, **SIZES, optimizer=optimizer, engine=Copying)
    data = data_module(llama, validation_data=prompt_rows(3))
    trainer().validate(module, data, verbose=False)
    fit(module, data, max_epochs=2)
    assert all(engine.asleep for engine in Copying.made)
    assert module.rollout_engine is None
    module.trainer.save_checkpoint(tmp_path / "run.ckpt")
    trainer().validate(module, data, verbose=False)
    loaded = RLOOModule.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True, reward=share_of_letters)
    assert loaded.engine is Copying
    trainer().validate(loaded, data, verbose=False)


def test_an_engine_that_fails_is_put_to_sleep(llama):
    def fails(*args, **options):
        raise RuntimeError("out of order")

    module = RLOOModule(llama, share_of_letters, **SIZES, engine=Copying)
    module.configure_model()
    module.rollout_engine = engine = Copying(module.policy, module.tokenizer)
    engine.generate = fails
    with pytest.raises(RuntimeError, match="out of order"):
        fit(module, data_module(llama), max_epochs=1)
    assert engine.asleep
