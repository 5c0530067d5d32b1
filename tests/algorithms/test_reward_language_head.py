"""The output layer that a reward model keeps beside it while it also learns to say what was chosen."""

import pytest
import torch
from pytorch_lightning.callbacks import LambdaCallback
from safetensors import safe_open
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from helpers.models import save_folder, tiny_causal_lm
from helpers.reward_terms import CONSTANT, batches, by_hand, save_language_models, train
from helpers.stages import adamw, disturb_random_numbers, fit, preference_rows, save_reward_model, sgd
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning import FineTune, HFExport, PreferenceDataModule, RewardModule, UserError
from rlhf_lightning.functional import linear_token_logprobs


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    found = save_language_models(root)
    return {**found, "reward": save_reward_model(root / "reward", found["untied"])}


@pytest.fixture(scope="module", params=["untied", "tied"])
def folder(folders, request):
    return folders[request.param]


@pytest.mark.parametrize(
    ("mode", "tied", "trained"),
    [
        ("all", False, True),
        ("all", True, True),
        ("last_layer", False, True),
        ("last_layer", True, False),
        ("lora", False, False),
        ("lora", True, False),
    ],
)
def test_the_output_layer_is_trained_as_that_of_a_language_model(folders, tmp_path, mode, tied, trained):
    folder = folders["tied" if tied else "untied"]
    finetune = FineTune(mode, **({"rank": 2} if mode == "lora" else {}))
    module = RewardModule(folder, optimizer=sgd(0.1), lm_coef=1.0, finetune=finetune, **CONSTANT)
    module.configure_model()
    weight, embeddings = module.language_head.layer.weight, module.export_model.get_input_embeddings().weight
    assert (weight is embeddings) is tied
    before = weight.detach().clone()
    fit(module, DataLoader(batches(folder), batch_size=None), enable_checkpointing=False)
    assert torch.equal(weight, before) is not trained
    grouped = [id(p) for group in module.parameter_groups() for p in group["params"]]
    assert grouped.count(id(weight)) == int(trained)
    module.trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
    assert ("language_head.layer.weight" in saved) is trained


def run(folder, checkpoint=None, stop_after=None, epochs=2, callbacks=(), **options):
    disturb_random_numbers(1234 if checkpoint is None else 99)
    settings = {"lm_coef": 0.7, "center_coef": 0.1, "warmup_steps": 2, "micro_batch_size": 2} | options
    module = RewardModule(folder, optimizer=adamw(1e-2), **settings)
    rows = preference_rows(12)
    data = PreferenceDataModule(folder, rows, validation_data=rows[:3], max_length=48, batch_size=4)
    stop = LambdaCallback(
        on_train_batch_end=lambda trainer, *_: setattr(trainer, "should_stop", trainer.global_step == stop_after)
    )
    log = fit(module, data, max_epochs=epochs, callbacks=[stop, *callbacks], ckpt_path=checkpoint)
    return module, log


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("mode", ["all", "lora"])
def test_a_run_that_is_cut_ends_as_if_it_had_not_been(folder, tmp_path, mode):
    finetune = FineTune(mode, **({"rank": 2} if mode == "lora" else {}))
    whole, log = run(folder, finetune=finetune)
    whole.trainer.save_checkpoint(tmp_path / "whole.ckpt")
    cut, _ = run(folder, stop_after=2, finetune=finetune)
    cut.trainer.save_checkpoint(tmp_path / "cut.ckpt")
    resumed, other = run(folder, tmp_path / "cut.ckpt", finetune=finetune)
    resumed.trainer.save_checkpoint(tmp_path / "resumed.ckpt")

    ends = [torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("whole", "resumed")]
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "rlhf_lightning", "global_step"):
        assert_same(ends[0][key], ends[1][key])
    assert other.series("train/nll") == log.series("train/nll")[2:]
    assert len(log.series("train/nll")) == 6


def test_the_export_is_the_same_folder_as_without(folder, tmp_path):
    names = []
    for coef in (0.0, 1.0):
        place = tmp_path / str(coef)
        run(folder, epochs=1, callbacks=[HFExport(str(place))], lm_coef=coef)
        with safe_open(place / "model.safetensors", "pt") as file:
            names.append((sorted(file.keys()), sorted(path.name for path in place.iterdir())))
        _, info = AutoModelForSequenceClassification.from_pretrained(place, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert names[0] == names[1]


def test_logits_are_computed_for_chosen_responses_only_and_in_chunks(folder, monkeypatch):
    shapes = []
    linear = torch.nn.functional.linear

    def watched(rows, weight, bias=None):
        shapes.append((len(rows), len(weight)))
        return linear(rows, weight, bias)

    monkeypatch.setattr("rlhf_lightning.models.language_head.linear_token_logprobs", chunked)
    (batch,) = batches(folder, 8, 8)
    module = RewardModule(folder, optimizer=sgd(0.1), lm_coef=1.0, **CONSTANT)
    module.configure_model()
    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    fit(module, DataLoader([batch], batch_size=None))
    vocabulary = AutoModelForCausalLM.from_pretrained(folder).config.vocab_size
    counts = [rows for rows, size in shapes if size == vocabulary]
    responses = int((batch.chosen_mask.sum(dim=1) - batch.prompt_lengths).sum())
    assert max(counts) == 5
    assert sum(counts) == 2 * responses  # once forward, once backward


def chunked(*args, **kwargs):
    return linear_token_logprobs(*args, **kwargs, chunk_rows=5)


def test_it_is_learnt_to_say_what_was_chosen(folder):
    rows = preference_rows(8)
    found = {}
    for coef in (0.0, 1.0):
        data = PreferenceDataModule(folder, rows, validation_data=rows, max_length=48, batch_size=8)
        module = RewardModule(folder, optimizer=adamw(1e-2), lm_coef=coef or 1e-9, **CONSTANT)
        log = fit(module, data, max_epochs=12, check_val_every_n_epoch=12)
        assert log.series("val/accuracy")[-1] == 1
        found[coef] = log.series("val/nll")[-1]
    assert found[1.0] < 0.5 * found[0.0]


def test_a_reward_model_has_no_output_layer(folders):
    with pytest.raises(UserError) as error:
        RewardModule(folders["reward"], lm_coef=1.0).configure_model()
    assert str(error.value) == (
        f"lm_coef needs the output layer of a language model, and '{folders['reward']}' is a reward model: start from "
        "the language model, or set lm_coef to 0"
    )


def test_a_checkpoint_without_the_layer_is_refused_by_a_run_that_trains_it(folders, tmp_path):
    module, _ = run(folders["untied"], epochs=1, lm_coef=0.0)
    module.trainer.save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(UserError, match=r"^the checkpoint has no weight 'language_head\.layer\.weight'"):
        run(folders["untied"], tmp_path / "run.ckpt")


def test_a_pad_token_that_the_embeddings_got_is_never_said(folders, monkeypatch):
    monkeypatch.setattr("rlhf_lightning.models.classifiers.own_pad_token", lambda tokenizer, rows: rows)
    folder = folders["tied"]
    (batch,) = batches(folder, 8, 8)
    module, log = train(folder, [batch], lr=0.0, lm_coef=1.0)
    layer = module.language_head.layer
    assert len(layer.weight) == AutoModelForCausalLM.from_pretrained(folder).config.vocab_size + 1
    said = [sum(said) / len(said) for _, _, said in by_hand(folder, module, batch)]
    assert log.series("train/nll") == pytest.approx([-sum(said) / 8], abs=1e-5)
    module.language_head(torch.randn(3, layer.in_features), torch.tensor([5, 6, 7])).sum().backward()
    assert layer.weight.grad[-1].abs().max() == 0


@pytest.mark.parametrize("family", ["gemma2", "phi", "opt-350m-like", "gpt-j", "gpt2"])
def test_the_layer_does_what_the_model_does_to_its_logits(tmp_path, family):
    tokenizer = tiny_tokenizer()
    base = save_folder(tmp_path / family, tiny_causal_lm(family), tokenizer)
    (batch,) = batches(base, 4, 4)
    module, log = train(base, [batch], lr=0.0, lm_coef=1.0)
    said = [sum(said) / len(said) for _, _, said in by_hand(base, module, batch)]
    assert log.series("train/nll") == pytest.approx([-sum(said) / 4], abs=1e-5)
