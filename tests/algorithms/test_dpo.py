"""DPO and its kin, against another implementation's numbers and against sums written by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from helpers.closed_form import EOS, gradient_of_one_step, save_closed_form_lm
from helpers.models import save_folder, tiny_causal_lm
from helpers.stage_runs import CONSTANT
from helpers.stages import MemoryLogger, adamw, fit, preference_rows, same_weights, save_llama, sgd, trainer, weights
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning import DPOModule, FineTune, HFExport, PreferenceDataModule, Table, UserError
from rlhf_lightning.algorithms.pairs import Pairs
from rlhf_lightning.batches import PreferenceBatch

PAIRS = [
    ([3, 4], [5, 6, 7, EOS], [8, EOS]),
    ([9, 10, 11], [12, 13, EOS], [12, 13, 14, 15, EOS]),
    ([2, 16, 6, 3], [EOS], [10, 4, EOS]),
]
NAMES = ("norm", "embed_tokens", "q_proj", "down_proj", "lm_head[12]")
TRL = [
    (
        {},
        *(0.7713520893, 0.3133902977, -0.01073869699, -0.002837678109, -0.08577293527, -0.003430116637),
    ),
    (
        {"beta": 0.5},
        *(1.162038108, 1.991430149, -0.03459622094, -0.0202296861, -0.4931932086, -0.01895224358),
    ),
    (
        {"label_smoothing": 0.1},
        0.7565694422,
        0.2555378056,
        -0.008309299748,
        -0.002343855304,
        -0.06929119864,
        -0.002761310644,
    ),
    (
        {"loss": "robust", "label_smoothing": 0.1},
        0.7898303981,
        0.3857491247,
        -0.01377540679,
        -0.003454952993,
        -0.1063751131,
        -0.004266124127,
    ),
    (
        {"loss": "hinge"},
        *(1.147826471, 0.5795482302, -0.02429385681, -0.004938212723, -0.164817391, -0.006688059925),
    ),
    (
        {"loss": "hinge", "beta": 0.5},
        1.739132355,
        2.897741182,
        -0.1214692515,
        -0.02469105437,
        -0.8240868131,
        -0.03344029963,
    ),
    (
        {"loss": "ipo", "length_normalized": True},
        31.76429921,
        24.29939832,
        -1.622366171,
        -0.3208608348,
        -9.998317386,
        -0.9959867856,
    ),
    (
        {"length_normalized": True, "beta": 2.0},
        1.559736404,
        3.441573499,
        -0.1794847185,
        -0.04284181109,
        -1.327973349,
        -0.1257634532,
    ),
    (
        {"reference_free": True},
        0.7331666071,
        0.3216960773,
        -0.02902228107,
        -0.003971108939,
        -0.09919043139,
        -0.00275531497,
    ),
    (
        {"reference_free": True, "length_normalized": True, "beta": 2.0},
        1.630214465,
        3.417919939,
        -0.2445795542,
        -0.04570934045,
        -1.419367641,
        -0.1372939638,
    ),
    (
        {"reference_free": True, "loss": "ipo", "length_normalized": True},
        32.52022823,
        23.8611506,
        -1.777941748,
        -0.322247553,
        -10.06551062,
        -1.025258367,
    ),
    (
        {"sft_coef": 0.5},
        *(2.563367376, 1.321135232, -0.1608151285, -0.04064991961, -0.5046782423, -0.1144047524),
    ),
    (
        {"loss": "ipo", "length_normalized": True, "sft_coef": 0.5},
        33.5563145,
        25.068489,
        -1.772442273,
        -0.358673008,
        -10.41722269,
        -1.106961421,
    ),
]
"""Settings, then the loss and sums of its gradient (see `gradient_of_one_step`) that TRL 1.16's `DPOTrainer` computed
in float64 for `PAIRS`, the policy being `closed_form_lm(0.0)` and the reference `closed_form_lm(0.7)`. Its `ipo` and
`sigmoid_norm` are normalised by length; label smoothing is that of its `aot` on single pairs; without a reference it
was given reference log-probabilities of 0; the SFT term is its loss type `sft` with weight 0.5. Its output layer, which
computes in float32, was made to compute in float64."""


def batch_of(pairs):
    def padded(rows):
        width = max(len(prompt) + max(len(a), len(b)) for prompt, a, b in pairs)
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        return ids, torch.arange(width) < torch.tensor([len(row) for row in rows]).unsqueeze(1)

    chosen, rejected = padded([p + a for p, a, _ in pairs]), padded([p + b for p, _, b in pairs])
    lengths = torch.tensor([len(prompt) for prompt, _, _ in pairs])
    return PreferenceBatch(*chosen, *rejected, torch.arange(len(pairs)), prompt_lengths=lengths)


@pytest.fixture
def folders(tmp_path):
    return save_closed_form_lm(tmp_path / "policy", 0.0), save_closed_form_lm(tmp_path / "reference", 0.7)


def one_step(folders, batch, **settings):
    policy, reference = folders
    module = DPOModule(
        policy,
        reference=None if settings.get("reference_free") else reference,
        optimizer=sgd(1.0),
        gradient_clip_val=None,
        lr_schedule="constant",
        warmup_steps=0,
        **settings,
    )
    module.configure_model()
    before = weights(module.policy)
    log = fit(module, DataLoader([batch], batch_size=None), precision="64-true")
    return log, gradient_of_one_step(before, module)


PARTS = [{"micro_batch_size": 1}, {"prefix_sharing": False, "max_tokens_per_batch": 20}]


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize(
    ("options", "settings", "loss", "norm", "embed_tokens", "q_proj", "down_proj", "lm_head"),
    # Each whole, and in parts of one kind or the other by turns.
    [({}, *case) for case in TRL] + [(PARTS[i % 2], *case) for i, case in enumerate(TRL)],
)
def test_loss_and_gradient_are_those_of_trl(
    folders, options, settings, loss, norm, embed_tokens, q_proj, down_proj, lm_head
):
    log, gradient = one_step(folders, batch_of(PAIRS), **settings, **options)
    name = "train/objective" if settings.get("sft_coef") else "train/loss"
    assert log.series(name) == pytest.approx([loss], rel=1e-5)
    expected = dict(zip(NAMES, (norm, embed_tokens, q_proj, down_proj, lm_head), strict=True))
    assert gradient == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.usefixtures("double_precision")
def test_what_is_logged_is_what_trl_logs(folders):
    log, _ = one_step(folders, batch_of(PAIRS))
    logged = {name: log.series(f"train/{name}")[0] for name in DPOModule.LOGGED}
    chosen, reference = [-14.49234025, -10.55784426, -3.622060082], [-13.70823103, -8.558473475, -3.2312908]
    assert logged == pytest.approx(
        {
            "accuracy": 0.0,
            "chosen_reward": -0.1058083095,
            "rejected_reward": 0.04201816139,
            "margin": -0.1478264709,
            "chosen_logprob": -9.557414864,
            "rejected_logprob": -9.657624102,
            "nll": -(chosen[0] / 4 + chosen[1] / 3 + chosen[2]) / 3,
        },
        rel=1e-5,
    )
    assert logged["chosen_reward"] == pytest.approx(0.1 * (sum(chosen) - sum(reference)) / 3, rel=1e-5)


@pytest.mark.usefixtures("double_precision")
def test_a_pair_of_weight_2_counts_as_two_pairs(folders):
    twice = batch_of([PAIRS[0], PAIRS[1], PAIRS[1]])
    weighted = batch_of(PAIRS[:2])._replace(weights=torch.tensor([1.0, 2.0]))
    for settings in ({}, {"sft_coef": 0.3}):
        (log, gradient), (other, same) = (one_step(folders, batch, **settings) for batch in (twice, weighted))
        assert gradient == pytest.approx(same, rel=1e-6)
        for name in ("loss", *DPOModule.LOGGED):
            assert log.series(f"train/{name}") == pytest.approx(other.series(f"train/{name}"), rel=1e-6)


@pytest.fixture
def llama(tmp_path):
    return save_llama(tmp_path / "llama")


def test_at_first_the_policy_is_its_reference(llama):
    rows = preference_rows(8)
    log = fit(
        DPOModule(llama, optimizer=sgd(0.0), **CONSTANT), PreferenceDataModule(llama, rows, batch_size=8, max_length=60)
    )
    assert log.series("train/loss") == pytest.approx([math.log(2)], rel=1e-6)
    assert log.series("train/margin") == [0.0]


@pytest.mark.parametrize(
    "finetune", [FineTune(), FineTune("lora", rank=4), FineTune("last_layer")], ids=lambda f: f.mode
)
def test_learns_to_prefer_and_leaves_the_reference_alone(llama, finetune):
    rows = preference_rows(8)
    data = PreferenceDataModule(llama, rows, validation_data=rows, batch_size=8, max_length=60)
    module = DPOModule(llama, optimizer=adamw(1e-2), **CONSTANT, beta=0.5, finetune=finetune)
    module.configure_model()
    before = weights(module.reference_model)
    log = fit(module, data, max_epochs=12)
    assert log.series("val/accuracy")[-1] == 1.0
    assert log.series("val/loss")[-1] < 0.5 * log.series("val/loss")[0]
    after = weights(module.reference_model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_batches_that_do_not_say_how_long_prompts_are_are_refused(llama):
    batch = batch_of(PAIRS)._replace(prompt_lengths=None)
    with pytest.raises(UserError, match="do not say how long their prompts are"):
        fit(DPOModule(llama), DataLoader([batch], batch_size=None))


@pytest.mark.parametrize(("settings", "message"), [
    ({"beta": 0.0}, r"beta \(0.0\) must be above 0"),
    ({"label_smoothing": 0.5}, r"label_smoothing \(0.5\) must be at least 0 and below 0.5"),
    ({"loss": "simpo"}, "loss 'simpo' is unknown"),
    ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing is for sigmoid and robust, and loss is ipo"),
    ({"reference_free": True, "reference": "a/b"}, "reference_free needs no reference"),
    ({"reference_free": True, "precompute_reference": True}, "reference_free needs no reference"),
    ({"reference": "./nowhere"}, "model folder './nowhere' does not exist"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        DPOModule("nowhere", **settings)


def trained(llama, checkpoint=None, allow_mismatch=False, **settings):
    rows = preference_rows(12)
    data = PreferenceDataModule(llama, rows, validation_data=rows[:3], batch_size=4, max_length=60)
    module = DPOModule(llama, optimizer=adamw(1e-2), **CONSTANT, **settings)
    module.allow_mismatch = allow_mismatch
    run = trainer(max_epochs=2, logger=(log := MemoryLogger()))
    run.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    return module, log


def test_a_reference_that_is_computed_before_training_says_the_same(llama, tmp_path):
    (plain, log), (module, other) = trained(llama), trained(llama, precompute_reference=True)
    assert module.reference_model.model is None
    for name in ("train/loss", "train/margin", "val/loss"):
        assert other.series(name) == pytest.approx(log.series(name), abs=1e-5)
    for name, tensor in weights(plain.policy).items():
        torch.testing.assert_close(weights(module.policy)[name], tensor, atol=1e-5, rtol=0)


def test_a_resumed_run_goes_on_with_what_the_reference_said(llama, tmp_path):
    module, _ = trained(llama, precompute_reference=True)
    module.trainer.save_checkpoint(tmp_path / "run.ckpt")
    resumed, _ = trained(llama, checkpoint=tmp_path / "run.ckpt", precompute_reference=True)
    assert resumed.reference_model.known() == module.reference_model.known()
    assert len(module.reference_model.known()["keys"]) == 12
    assert module.run_state()["reference"] == module.reference_model.known()
    assert module.step_state() == {}  # which is copied after every batch


def test_a_resumed_run_that_may_have_another_reference_asks_that_one(llama, tmp_path):
    module, _ = trained(llama, precompute_reference=True)
    module.trainer.save_checkpoint(tmp_path / "run.ckpt")
    other = save_llama(tmp_path / "other", hidden_size=16)
    options = {"checkpoint": tmp_path / "run.ckpt", "precompute_reference": True, "reference": other}
    with pytest.raises(UserError, match="the checkpoint was made with the reference"):
        trained(llama, **options)
    with pytest.warns(UserWarning, match="a mismatch is allowed: the checkpoint was made with the reference"):
        resumed, _ = trained(llama, **options, allow_mismatch=True)
    fresh, _ = trained(llama, precompute_reference=True, reference=other)
    assert resumed.reference_model.known() == fresh.reference_model.known() != module.reference_model.known()


def test_pairs_that_were_not_there_are_refused(llama):
    module, _ = trained(llama, precompute_reference=True)
    with pytest.raises(UserError, match="a pair was not there when the reference was computed"):
        module.reference_model(Pairs(batch_of(PAIRS)))


def test_a_stream_cannot_be_read_beforehand(llama):
    data = PreferenceDataModule(
        llama, Table(preference_rows(8), streaming=True), validation_split=0.0, batch_size=4, max_length=60
    )
    with pytest.raises(UserError, match="precompute_reference needs data that do not come as a stream"):
        fit(DPOModule(llama, precompute_reference=True, **CONSTANT), data, max_steps=1)


def test_a_run_with_max_steps_alone_reads_its_pairs_beforehand(llama):
    data = PreferenceDataModule(llama, preference_rows(8), batch_size=4, max_length=60)
    module = DPOModule(llama, precompute_reference=True, **CONSTANT)
    fit(module, data, max_steps=1, max_epochs=-1)
    assert len(module.reference_model.known()["keys"]) == 8


@pytest.mark.parametrize("family", ["gemma2"])
def test_a_reference_that_cannot_share_rows_is_run_apart(tmp_path, family):
    tokenizer = tiny_tokenizer()
    policy, other = (
        save_folder(tmp_path / name, tiny_causal_lm(name, vocab_size=len(tokenizer)), tokenizer)
        for name in ("llama", family)
    )
    rows = preference_rows(6)
    data = PreferenceDataModule(policy, rows, validation_data=rows, batch_size=6, max_length=60)
    losses = []
    for sharing in (True, False):
        module = DPOModule(policy, reference=other, prefix_sharing=sharing)
        (found,) = trainer().validate(module, data, verbose=False)
        losses.append(found["val/loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_pairs_of_weight_0_and_empty_responses_leave_the_loss_a_number(llama):
    batch = batch_of([([3, 4], [5, EOS], [8, EOS]), ([9, 10], [], [12, EOS])])
    for weights_of, settings in [([0.0, 0.0], {}), ([1.0, 1.0], {}), ([1.0, 1.0], {"sft_coef": 0.1})]:
        weighed = batch._replace(weights=torch.tensor(weights_of))
        log = fit(DPOModule(llama, **CONSTANT, **settings), DataLoader([weighed], batch_size=None), max_steps=1)
        assert all(math.isfinite(call[name]) for call in log.calls for name in call)


def test_there_is_nothing_to_predict(llama):
    data = PreferenceDataModule(llama, predict_data=preference_rows(4), max_length=60)
    with pytest.raises(UserError, match=r"DPOModule predicts nothing: rlhf predict --config sft\.yaml"):
        trainer().predict(DPOModule(llama), data)


def test_an_export_that_is_measured_against_itself_is_named(llama, tmp_path):
    rows = preference_rows(8)
    data = PreferenceDataModule(llama, rows, validation_data=rows, batch_size=4, max_length=60)
    fit(DPOModule(llama, **CONSTANT), data, max_steps=1, callbacks=[HFExport(str(tmp_path / "dpo"))])
    with pytest.warns(UserWarning, match=r"was trained from .*: with no other reference its KL is that to itself"):
        trainer().validate(DPOModule(str(tmp_path / "dpo")), data, verbose=False)


class Fixed(DPOModule):
    def __init__(self, model, **options):
        super().__init__(model, beta=0.3, **options)


@pytest.mark.parametrize("kind", [DPOModule, Fixed])
def test_a_module_comes_back_from_its_checkpoint(llama, tmp_path, kind):
    data = PreferenceDataModule(llama, preference_rows(8), batch_size=4, max_length=60)
    module = kind(Path(llama), sft_coef=0.2, **CONSTANT)
    fit(module, data, max_steps=1)
    module.trainer.save_checkpoint(tmp_path / "run.ckpt")
    loaded = kind.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    assert (loaded.beta, loaded.sft_coef) == (module.beta, 0.2)
    assert same_weights(weights(loaded.policy), weights(module.policy))
