"""Packed rows teach exactly what their examples teach apart, on families that can; the others are refused."""

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.models import (
    FAMILIES,
    VOCAB_SIZE,
    closeness,
    mixing_causal_lm,
    precise,
    spread_weights,
    tiny_causal_lm,
)
from helpers.stages import assert_close_weights, fit, instruction_rows, save_llama, sgd, trainer, weights
from rlhf_lightning import InstructionDataModule, SFTModule, UserError
from rlhf_lightning.batches import InstructionBatch, name_rows
from rlhf_lightning.data.collate import pad
from rlhf_lightning.forward.packed import check_packing

_GATED = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCAB_SIZE,
}
MORE_FAMILIES = {
    "qwen2": _GATED,
    "mistral": _GATED | {"sliding_window": 4},
    "gemma3_text": _GATED | {"head_dim": 8, "sliding_window": 4},
    "mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "vocab_size": VOCAB_SIZE},
}
KEEP_APART = ["llama", "gpt-neox", "gpt2", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi"]
MIX_UP = ["mixing", "bloom", "mamba"]
PERHAPS = ["opt", "opt-350m-like", "falcon", "falcon-alibi"]  # versions of transformers differ

# Row id, tokens, tokens of the prompt. Some are longer than the sliding windows of 4, one is only a prompt and an EOS.
EXAMPLES = [
    (3, [31, 32, 33, 34, 35, 36, 37, 38, 2], 4),
    (5, [40, 41, 42, 43, 44, 2], 2),
    (8, [50, 2], 1),
    (9, [60, 61, 62, 63, 64, 65, 66, 67], 3),
]
PACKED = [[0, 1], [3, 2]]


def tiny_model(family):
    if family == "mixing":
        return mixing_causal_lm().double()
    if family in FAMILIES:
        return precise(tiny_causal_lm(family))
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **MORE_FAMILIES[family], bos_token_id=1, eos_token_id=2)
        model = AutoModelForCausalLM.from_config(config).eval()
        spread_weights(model)
    return model.double()


def targets(length, prompt_length):
    return [False] * prompt_length + [True] * (length - prompt_length)


def apart_batch(numbers=range(4)):
    rows, ids, prompts = zip(*(EXAMPLES[number] for number in numbers), strict=True)
    loss_mask, _ = pad([targets(len(i), p) for i, p in zip(ids, prompts, strict=True)], 0, "right")
    return InstructionBatch(*pad(ids, 0, "right"), loss_mask.bool(), torch.tensor(rows))


def packed_batch(rows=PACKED):
    packed = [[EXAMPLES[number] for number in row] for row in rows]
    ids, mask = pad([[token for _, ids, _ in row for token in ids] for row in packed], 0, "right")
    loss_mask, _ = pad([[t for _, ids, p in row for t in targets(len(ids), p)] for row in packed], 0, "right")
    places, _ = pad([[place for _, ids, _ in row for place in range(len(ids))] for row in packed], 0, "right")
    row_ids = torch.full((len(rows), 2), -1)
    for number, row in enumerate(packed):
        row_ids[number, : len(row)] = torch.tensor([row_id for row_id, _, _ in row])
    return InstructionBatch(ids, mask, loss_mask.bool(), row_ids, places)


def module_of(model):
    module = SFTModule("")
    module.model = model
    return module


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss_sum, _ = module_of(model).loss_sums(batch)
    loss = loss_sum / batch.loss_mask.sum()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", KEEP_APART)
def test_packed_and_unpacked_losses_and_gradients_agree(family):
    model = tiny_model(family)
    apart_loss, apart = loss_and_gradients(model, apart_batch())
    packed_loss, packed = loss_and_gradients(model, packed_batch())

    assert packed_loss == pytest.approx(apart_loss, abs=closeness(model)["atol"])
    assert_close_weights(packed, apart, closeness(model)["atol"])
    assert max(gradient.abs().max() for gradient in apart.values()) > 0.01

    model.set_attn_implementation("eager")
    eager_loss, eager = loss_and_gradients(model, packed_batch())
    assert eager_loss == pytest.approx(apart_loss, abs=closeness(model)["atol"])
    assert_close_weights(eager, apart, closeness(model)["atol"])


def test_company_and_order_in_a_row_change_nothing():
    model = tiny_model("gemma2")
    loss, gradients = loss_and_gradients(model, packed_batch([[2, 1], [0], [3]]))
    expected, apart = loss_and_gradients(model, apart_batch())
    assert loss == pytest.approx(expected, abs=closeness(model)["atol"])
    assert_close_weights(gradients, apart, closeness(model)["atol"])


@pytest.mark.parametrize("family", MIX_UP)
def test_a_family_that_mixes_examples_up_is_refused(family):
    module = module_of(tiny_model(family))
    module.loss_sums(apart_batch())
    told = r"^\w+ForCausalLM \(attention '\w+'\) does not keep examples in a packed row apart; set packing: false$"
    with pytest.raises(UserError, match=told):
        module.loss_sums(packed_batch())


@pytest.mark.parametrize("family", PERHAPS)
def test_other_families_are_refused_or_right(family):
    model = tiny_model(family)
    apart_loss, apart = loss_and_gradients(model, apart_batch())
    try:
        packed_loss, packed = loss_and_gradients(model, packed_batch())
    except UserError:
        return
    assert packed_loss == pytest.approx(apart_loss, abs=closeness(model)["atol"])
    assert_close_weights(packed, apart, closeness(model)["atol"])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("family", "refused"), [("llama", False), ("mixing", True)])
def test_the_proof_holds_in_low_precision_and_leaves_no_trace(family, refused, training):
    model = tiny_model(family).to(torch.bfloat16).train(training)
    random = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        if refused:
            with pytest.raises(UserError, match="does not keep examples in a packed row apart"):
                check_packing(model, torch.arange(30, 46))
        else:
            check_packing(model, torch.arange(30, 46))
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())


def test_the_proof_is_given_once(monkeypatch):
    proofs = []
    monkeypatch.setattr(
        "rlhf_lightning.algorithms.sft.check_packing", lambda model, tokens: proofs.append(tokens.tolist())
    )
    module = module_of(tiny_model("llama"))
    for batch in (apart_batch(), packed_batch(), packed_batch()):
        module.loss_sums(batch)
    assert proofs == [(EXAMPLES[0][1] + EXAMPLES[1][1] + EXAMPLES[3][1])[:16]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


def train(folder, batches, **settings):
    module = SFTModule(folder, optimizer=sgd(0.5), lr_schedule="constant", warmup_steps=0, **settings)
    log = fit(module, DataLoader(batches, batch_size=None), max_epochs=2, precision="64-true")
    return weights(module.model), log


@pytest.mark.parametrize("micro_batch_size", [None, 1, 2])
def test_training_on_packed_rows_is_training_on_their_examples(folder, micro_batch_size):
    apart, apart_log = train(folder, [apart_batch()])
    packed, packed_log = train(folder, [packed_batch()], micro_batch_size=micro_batch_size)

    assert_close_weights(packed, apart)
    assert packed_log.series("train/loss") == pytest.approx(apart_log.series("train/loss"), abs=1e-5)


def test_validation_may_be_packed(folder):
    double = trainer(precision="64-true")
    (apart,) = double.validate(SFTModule(folder), DataLoader([apart_batch()], batch_size=None), verbose=False)
    (packed,) = double.validate(SFTModule(folder), DataLoader([packed_batch()], batch_size=None), verbose=False)
    assert packed == {name: pytest.approx(value, abs=1e-5) for name, value in apart.items()}


def test_padding_share_by_hand(folder):
    # Lengths 9, 6, 2, 8 are shown in a rectangle of 4 x 9; packed as 15 and 10 in 2 x 15, or each as wide as it is.
    for batch, size, expected in [
        (apart_batch(), None, 1 - 25 / 36),
        (apart_batch(), 2, 1 - 25 / (2 * 9 + 2 * 6)),
        (packed_batch(), None, 1 - 25 / 30),
        (packed_batch(), 1, 0),
    ]:
        _, log = train(folder, [batch], micro_batch_size=size)
        assert log.series("train/padding_share") == pytest.approx([expected] * 2, abs=1e-6)


def test_rows_are_named_by_the_examples_in_them():
    assert name_rows(packed_batch([[0, 1], [3]]).row_ids) == "rows 3, 5, 9"


def test_a_data_module_that_packs_teaches_the_same(folder):
    rows = instruction_rows(12)
    losses, shares = [], []
    for packing in (False, True):
        data = InstructionDataModule(folder, rows, max_length=64, validation_split=0.0, packing=packing, batch_size=12)
        module = SFTModule(folder, optimizer=sgd(0.5), lr_schedule="constant", warmup_steps=0)
        log = fit(module, data, max_epochs=2, precision="64-true")
        losses += log.series("train/loss")
        shares += log.series("train/padding_share")
    assert len(losses) == 4
    assert losses[2:] == pytest.approx(losses[:2], abs=1e-5)
    assert max(shares[2:]) < min(shares[:2])
