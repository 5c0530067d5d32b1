import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.stages import (
    adamw,
    assert_close_weights,
    clock,
    disturb_random_numbers,
    fit,
    instruction_rows,
    same_weights,
    save_gpt2,
    save_llama,
    sgd,
    trainer,
    unpadded,
    weights,
)
from rlhf_lightning import InstructionDataModule, Sampling, SFTModule, Table, UserError
from rlhf_lightning.batches import InstructionBatch

CONSTANT = {"lr_schedule": "constant", "warmup_steps": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


def data_module(folder, rows, **settings):
    return InstructionDataModule(folder, rows, max_length=48, **{"validation_split": 0.0, **settings})


def batches(folder, rows, **settings):
    data = data_module(folder, rows, **settings)
    data.setup("fit")
    return list(data.train_dataloader())


def logprobs_by_hand(folder, batch):
    """Log-probabilities `[targets, V]` and ids of all target tokens, row by row without padding, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows, targets = [], []
    sequences = unpadded(batch.input_ids, batch.attention_mask)
    for ids, loss_mask in zip(sequences, batch.loss_mask, strict=True):
        with torch.no_grad():
            logprobs = model(ids).logits[0].log_softmax(dim=-1)
        for position in loss_mask.nonzero().flatten().tolist():
            rows.append(logprobs[position - 1])
            targets.append(int(ids[0, position]))
    return torch.stack(rows), torch.tensor(targets)


def test_learns_a_batch_by_heart_and_recites_it(folder):
    rows = instruction_rows(4)
    module = SFTModule(folder, optimizer=adamw(2e-2), **CONSTANT, sampling=Sampling(temperature=0, max_new_tokens=40))
    data = data_module(folder, rows, batch_size=4, predict_data=rows)

    losses = fit(module, data, max_epochs=40).series("train/loss")
    assert losses[0] > 3
    assert losses[-1] < 0.05

    answers = [row for batch in trainer().predict(module, data) for row in batch]
    expected = [(i, row["prompt"], row["response"], True) for i, row in enumerate(rows)]
    assert [(a["row"], a["prompt"], a["response"], a["ended"]) for a in answers] == expected


def test_micro_batches_change_nothing(folder):
    trained = []
    for size in (None, 8, 4, 2, 3):
        module = SFTModule(folder, optimizer=sgd(0.5), **CONSTANT, micro_batch_size=size, gradient_clip_val=None)
        fit(module, data_module(folder, instruction_rows(24), batch_size=8))
        trained.append(weights(module.model))
    for other in trained[1:]:
        assert_close_weights(trained[0], other)


def test_more_padding_changes_nothing(folder):
    def widened(batch):
        wide = [torch.nn.functional.pad(field, (0, 9)) for field in batch[:3]]
        return InstructionBatch(*wide, batch.row_ids)

    plain = batches(folder, instruction_rows(16), batch_size=8)
    trained = []
    for loader in (plain, [widened(batch) for batch in plain]):
        module = SFTModule(folder, optimizer=sgd(0.5), **CONSTANT)
        fit(module, torch.utils.data.DataLoader(loader, batch_size=None))
        trained.append(weights(module.model))
    assert_close_weights(*trained)


@pytest.mark.parametrize("loss_on", ["response", "all"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_perplexity_by_hand(folder, loss_on, smoothing):
    rows = instruction_rows(7)
    (batch,) = batches(folder, rows, loss_on=loss_on)
    logprobs, targets = logprobs_by_hand(folder, batch)
    nll = -logprobs.gather(1, targets.unsqueeze(1)).mean()
    loss = (1 - smoothing) * nll - smoothing * logprobs.mean()
    if loss_on == "all":
        assert len(targets) == int(batch.attention_mask.sum()) - 7

    module = SFTModule(folder, optimizer=sgd(0.1), label_smoothing=smoothing, micro_batch_size=3)
    log = fit(module, data_module(folder, rows, loss_on=loss_on), max_steps=1)

    assert log.series("train/loss") == [pytest.approx(nll.item(), abs=1e-5)]  # as validation: never smoothed
    assert log.series("train/objective") == [pytest.approx(loss.item(), abs=1e-5)]
    assert log.series("train/perplexity") == [pytest.approx(nll.exp().item(), rel=1e-5)]


def test_validation_weighs_every_token_alike(folder):
    rows = instruction_rows(7)
    (everything,) = batches(folder, rows)
    logprobs, targets = logprobs_by_hand(folder, everything)
    loss = -logprobs.gather(1, targets.unsqueeze(1)).mean().item()
    data = InstructionDataModule(folder, rows, validation_data=rows, test_data=rows, eval_batch_size=3, max_length=48)

    module = SFTModule(folder)
    (validated,) = trainer().validate(module, data, verbose=False)
    (tested,) = trainer().test(module, data, verbose=False)

    expected = {"loss": pytest.approx(loss, abs=1e-5), "perplexity": pytest.approx(math.exp(loss), rel=1e-5)}
    assert validated == {f"val/{name}": value for name, value in expected.items()}
    assert tested == {f"test/{name}": value for name, value in expected.items()}


def test_the_learning_rate_warms_up_from_above_zero_and_falls_per_optimizer_step(folder):
    module = SFTModule(folder, optimizer=sgd(0.4), lr_schedule="linear", warmup_steps=2, micro_batch_size=1)
    log = fit(module, data_module(folder, instruction_rows(12), batch_size=4), max_epochs=2)
    assert log.series("train/lr") == pytest.approx([0.2, 0.4, 0.4, 0.3, 0.2, 0.1])


def test_the_default_schedule_is_a_cosine_after_a_share_of_warm_up(folder):
    module = SFTModule(folder, optimizer=sgd(1.0))  # 3% of 4 steps is rounded up to one step
    log = fit(module, data_module(folder, instruction_rows(16), batch_size=4))
    cosine = [0.5 * (1 + math.cos(math.pi * step / 3)) for step in range(3)]
    assert log.series("train/lr") == pytest.approx([1.0, *cosine])


def test_dropout_is_off_unless_asked_for(tmp_path):
    folder = save_gpt2(tmp_path / "gpt2", dropout=0.3)
    same = save_gpt2(tmp_path / "without", dropout=0.0)
    rows = instruction_rows(8)
    losses = {}
    for name, model, dropout in [("default", folder, False), ("none", same, False), ("on", folder, True)]:
        module = SFTModule(model, optimizer=sgd(0.1), dropout=dropout)
        losses[name] = fit(module, data_module(model, rows, batch_size=4)).series("train/loss")
    assert losses["default"] == losses["none"]
    assert losses["on"] != losses["default"]


def test_dropout_depends_on_the_seed_and_on_nothing_else(tmp_path):
    folder = save_gpt2(tmp_path, dropout=0.3)
    trained = []
    for seed, drawn_before in [(1, 0), (1, 1000), (2, 0)]:
        disturb_random_numbers(seed)
        torch.rand(drawn_before)
        module = SFTModule(folder, optimizer=sgd(0.1), dropout=True)
        fit(module, data_module(folder, instruction_rows(8), batch_size=4))
        assert torch.initial_seed() == seed
        trained.append(weights(module.model))
    assert same_weights(trained[0], trained[1])
    assert not same_weights(trained[0], trained[2])


def test_a_token_budget_changes_nothing(folder):
    trained = []
    for max_tokens in (None, 120, 50, 1):
        module = SFTModule(
            folder, optimizer=sgd(0.5), **CONSTANT, max_tokens_per_batch=max_tokens, gradient_clip_val=None
        )
        fit(module, data_module(folder, instruction_rows(16), batch_size=8))
        trained.append(weights(module.model))
    for other in trained[1:]:
        assert_close_weights(trained[0], other)


def test_refuses_two_limits_at_once(folder):
    with pytest.raises(UserError, match=r"^micro_batch_size and max_tokens_per_batch both limit a forward pass"):
        SFTModule(folder, micro_batch_size=2, max_tokens_per_batch=100)


def test_refuses_a_micro_batch_of_nothing(folder):
    with pytest.raises(UserError, match=r"^micro_batch_size \(0\) must be at least 1$"):
        SFTModule(folder, micro_batch_size=0)


def test_a_stream_without_end_has_no_schedule_to_follow(folder):
    data = Table(instruction_rows(6), streaming=True)
    with pytest.raises(UserError, match=r"lr_schedule 'cosine' needs a run with an end; set .*trainer.max_steps"):
        fit(SFTModule(folder, optimizer=sgd(0.01), lr_schedule="cosine"), data_module(folder, data))

    endless = SFTModule(folder, optimizer=sgd(0.01), **CONSTANT)
    fit(endless, data_module(folder, data, batch_size=2))
    assert endless.trainer.global_step == 3


def test_speed_norm_and_rate_by_hand(folder, monkeypatch):
    """One step of gradient descent without clipping: the gradient is what the weights moved by."""
    rows = instruction_rows(7)
    (batch,) = batches(folder, rows)
    clock(monkeypatch)
    module = SFTModule(folder, optimizer=sgd(0.1), gradient_clip_val=None, **CONSTANT)
    module.configure_model()
    before = weights(module.model)
    log = fit(module, data_module(folder, rows), max_steps=1)
    moved = torch.stack([(weights(module.model)[name] - old).norm() for name, old in before.items()]).norm().item()
    assert log.series("train/grad_norm") == pytest.approx([moved / 0.1], rel=1e-3)
    assert log.series("train/lr") == pytest.approx([0.1])
    assert log.series("train/tokens_per_second") == pytest.approx([int(batch.attention_mask.sum()) / 2])
