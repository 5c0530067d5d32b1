"""PPO beside text that the policy goes on learning (PPO-ptx)."""

import math

import pytest
import torch
from pytorch_lightning.demos.boring_classes import BoringDataModule

from helpers.stages import (
    assert_close_weights,
    disturb_random_numbers,
    fit,
    instruction_rows,
    preference_rows,
    prompt_rows,
    same_weights,
    save_llama,
    sgd,
    share_of_letters,
    weights,
)
from rlhf_lightning import InstructionDataModule, PPOModule, PreferenceDataModule, PromptDataModule, Sampling, UserError
from rlhf_lightning.algorithms.online.pretraining import PretrainingData
from rlhf_lightning.models.causal_lm import load_causal_lm

EXAMPLES, BATCH = 10, 4  # an epoch is two batches and a half one


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


def text(folder, rows=None, **settings):
    given = {"validation_split": 0.0, "batch_size": BATCH, "max_length": 48, "loss_on": "all"} | settings
    return InstructionDataModule(folder, rows or instruction_rows(EXAMPLES), **given)


def make(folder, pretraining=None, **settings):
    given = {"rollout_batch_size": 4, "minibatch_size": 4, "ppo_epochs": 1, "sampling": Sampling(max_new_tokens=6)}
    given |= {"optimizer": sgd(0.1), "lr_schedule": "constant", "gradient_clip_val": None}
    return PPOModule(folder, share_of_letters, pretraining=pretraining, **given | settings)


def run(module, iterations=1, **settings):
    disturb_random_numbers(0)
    rows = prompt_rows(4 * iterations)
    data = PromptDataModule(
        module.model_name_or_path, rows, validation_split=0.0, max_prompt_length=40, rollout_batch_size=4
    )
    return fit(module, data, **settings)


def test_the_step_is_that_of_ppo_and_that_of_the_text(folder):
    """theta - lr * (gradient of PPO + coef * gradient of the mean negative log-likelihood)."""
    plain, both = make(folder), make(folder, text(folder), pretraining_coef=0.5)
    run(plain)
    log = run(both)

    data = text(folder)
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    model = load_causal_lm(folder)
    before = weights(model)
    logits = model(batch.input_ids, attention_mask=batch.attention_mask.long()).logits[:, :-1].log_softmax(-1)
    picked = logits.gather(2, batch.input_ids[:, 1:, None]).squeeze(2)[batch.loss_mask[:, 1:]]
    loss = -picked.mean()
    loss.backward()
    assert log.series("train/ptx_loss") == pytest.approx([loss.item()], rel=1e-5)
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    after_ppo = weights(plain.policy)
    expected = {
        name: after_ppo[name] - 0.1 * 0.5 * gradients[name] if gradients.get(name) is not None else after_ppo[name]
        for name in before
    }
    assert_close_weights(weights(both.policy), expected)
    assert not same_weights(weights(both.policy), after_ppo)
    assert same_weights(weights(both.value), weights(plain.value))


@pytest.mark.parametrize("trunk", ["own", "policy"])
def test_micro_batches_change_nothing(folder, trunk):
    whole, pieces = (
        make(folder, text(folder), pretraining_coef=0.5, value_trunk=trunk, **limit)
        for limit in ({"max_tokens_per_batch": None}, {"micro_batch_size": 1})
    )
    logs = [run(module, 2) for module in (whole, pieces)]
    assert_close_weights(weights(pieces.policy), weights(whole.policy))
    assert logs[0].series("train/ptx_loss") == pytest.approx(logs[1].series("train/ptx_loss"), rel=1e-5)


def drawn(data, batches, state=None):
    """Rows of each batch, and the places after each."""
    stream = PretrainingData(data)
    if state is not None:
        stream.load(state)
    stream.begin(make_tokenized(data))
    rows, states = [], []
    for _ in range(batches):
        rows.append([row for row in stream.next().row_ids.tolist() if row >= 0])
        states.append(stream.state())
    return rows, states


class make_tokenized:
    """Something with the data's tokenizer."""

    def __init__(self, data):
        self.data = data

    @property
    def tokenizer(self):
        return self.data.tokenizer


def test_every_epoch_has_each_example_once_and_any_place_can_be_gone_on_from(folder):
    rows, states = drawn(text(folder), 7)
    for epoch in range(2):
        assert sorted(row for batch in rows[3 * epoch : 3 * epoch + 3] for row in batch) == list(range(EXAMPLES))
    assert rows[:3] != rows[3:6]
    assert [tuple(state["place"]) for state in states] == [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]
    for number, state in enumerate(states[:-1]):
        assert drawn(text(folder), 6 - number, state)[0] == rows[number + 1 :]


@pytest.mark.parametrize("iterations", [2, 3])  # within an epoch of the text, and at its end
def test_a_resumed_run_goes_on_in_its_text(folder, tmp_path, iterations):
    def fresh():
        return make(folder, text(folder), pretraining_coef=0.5)

    whole, half, resumed = fresh(), fresh(), fresh()
    log = run(whole, 5)
    run(half, 5, max_steps=iterations)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest = run(resumed, 5, ckpt_path=str(tmp_path / "half.ckpt"))
    assert same_weights(weights(resumed.policy), weights(whole.policy))
    assert rest.series("train/ptx_loss") == log.series("train/ptx_loss")[iterations:]
    other = make(folder, text(folder, batch_size=2))
    if iterations == 2:
        with pytest.raises(UserError, match=r"^pretraining: batch_size was 4 in the checkpoint"):
            run(other, 5, ckpt_path=str(tmp_path / "half.ckpt"))
    else:
        run(other, 5, ckpt_path=str(tmp_path / "half.ckpt"))


def test_the_policy_learns_the_text(folder):
    module = make(folder, text(folder), pretraining_coef=1.0, optimizer=sgd(0.5))
    losses = run(module, 12).series("train/ptx_loss")
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert math.isfinite(losses[-1])


def test_a_value_model_that_warms_up_draws_nothing(folder):
    module = make(folder, text(folder), value_warmup_iterations=2)
    log = run(module, 3)
    assert len(log.series("train/ptx_loss")) == 1
    assert module.pretraining.place == (0, 1)


def test_without_text_a_run_is_what_it_was(folder):
    module = make(folder)
    log = run(module)
    assert "ptx_loss" not in log.names("train")
    assert "pretraining" not in module.run_state()


@pytest.mark.parametrize("kind", ["foreign", "pairs"])
def test_other_data_are_refused(folder, kind):
    pairs = PreferenceDataModule(folder, preference_rows(8), validation_split=0.0, batch_size=4, max_length=48)
    module = make(folder, BoringDataModule() if kind == "foreign" else pairs)
    with pytest.raises(UserError, match="InstructionDataModule"):
        run(module)


def test_packed_rows_are_refused(folder):
    """Whose examples some models would let see each other."""
    with pytest.raises(UserError, match="pretraining takes no packed rows"):
        run(make(folder, text(folder, packing=True)))


def test_a_checkpoint_that_knows_its_text_by_name_only_asks_for_it(folder):
    with pytest.raises(UserError, match="pass pretraining to load_from_checkpoint"):
        make(folder, "rlhf_lightning.data.instruction.InstructionDataModule.<instance>")


def test_tensors_of_a_batch_are_the_process_s_share(folder):
    stream = PretrainingData(text(folder))
    stream.begin(make_tokenized(stream.data))
    batch = stream.next()
    assert batch.input_ids.shape[0] == BATCH
    assert isinstance(batch.loss_mask, torch.Tensor)
