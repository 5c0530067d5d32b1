"""What fine-tuning a part of the weights hands over: plain folders, adapter folders, and what they are loaded into."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from helpers.stages import (
    adamw,
    fit,
    instruction_rows,
    preference_rows,
    same_weights,
    save_gpt2,
    save_llama,
    save_reward_model,
    weights,
)
from rlhf_lightning import (
    FineTune,
    HFExport,
    InstructionDataModule,
    PreferenceDataModule,
    RewardModule,
    SFTModule,
    UserError,
    load_causal_lm,
    load_reward_model,
)
from rlhf_lightning.models.causal_lm import freeze
from rlhf_lightning.models.finetune import choose_trained
from rlhf_lightning.models.scalar_lm import attach_reward_adapter, new_scalar_lm, reward_adapter_base
from rlhf_lightning.models.sharing import scalar_beside

LORA, ADAPTER = FineTune("lora", rank=4), FineTune("lora", rank=4, export="adapter")
CONSTANT = {"lr_schedule": "constant", "warmup_steps": 0}
IDS = torch.tensor([[5, 6, 7, 8, 9]])
MASK = torch.ones_like(IDS).bool()


def teach(base: Path | str, out: Path, finetune: FineTune, **settings: Any) -> SFTModule:
    """Two steps of supervised fine-tuning, exported to `out`."""
    torch.manual_seed(1)
    module = SFTModule(str(base), optimizer=adamw(3e-2), **CONSTANT, finetune=finetune)
    rows = instruction_rows(8)
    data = InstructionDataModule(str(base), rows, validation_data=rows[:2], batch_size=4, max_length=48)
    fit(module, data, callbacks=[HFExport(str(out))], **settings)
    return module


def judge(base: Path | str, out: Path, finetune: FineTune) -> RewardModule:
    """Two steps of reward training, exported to `out`."""
    torch.manual_seed(2)
    module = RewardModule(str(base), optimizer=adamw(3e-2), **CONSTANT, finetune=finetune)
    rows = preference_rows(8)
    data = PreferenceDataModule(str(base), rows, validation_data=rows[:4], batch_size=4, max_length=48)
    fit(module, data, callbacks=[HFExport(str(out))])
    return module


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The base, and for each export its folder and the module it was made from; not to be changed."""
    root = tmp_path_factory.mktemp("runs")
    base = save_llama(root / "base")
    made: dict[str, Any] = {"root": root, "base": base}
    for name, finetune in [("merged", LORA), ("adapter", ADAPTER)]:
        made[name] = root / f"sft-{name}"
        made[f"{name} sft"] = teach(base, made[name], finetune)
        made[f"reward-{name}"] = root / f"reward-{name}"
        made[f"{name} reward"] = judge(made["merged"], made[f"reward-{name}"], finetune)
    return made


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def differs(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() > 1e-2)


@torch.no_grad()
def test_a_merged_export_is_a_plain_model_that_computes_the_same(folders):
    trained = folders["merged sft"].export_model.eval()
    plain, info = AutoModelForCausalLM.from_pretrained(folders["merged"], output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    close(plain(IDS).logits, trained(IDS).logits)
    assert differs(plain(IDS).logits, load_causal_lm(folders["base"])(IDS).logits)
    assert {path.name for path in folders["merged"].iterdir()} >= {"config.json", "generation_config.json"}
    assert not (folders["merged"] / "adapter_config.json").exists()


@torch.no_grad()
@pytest.mark.parametrize("variant", [{"use_dora": True}, {"use_rslora": True}])
def test_dora_and_rslora_on_transposed_weights(tmp_path, variant):
    base = save_gpt2(tmp_path / "gpt2", dropout=0.0)
    trained = teach(base, tmp_path / "out", FineTune("lora", rank=4, **variant)).export_model.eval()
    close(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits, trained(IDS).logits)
    trained = teach(base, tmp_path / "peft", FineTune("lora", rank=4, export="adapter", **variant)).export_model.eval()
    close(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft")(IDS).logits, trained(IDS).logits)
    close(load_causal_lm(tmp_path / "peft")(IDS).logits, trained(IDS).logits)


@torch.no_grad()
def test_an_adapter_export_is_what_peft_loads(folders):
    folder, trained = folders["adapter"], folders["adapter sft"].export_model.eval()
    names = {path.name for path in folder.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"}
    assert not names & {"model.safetensors", "config.json"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == folders["base"]
    assert config["target_modules"] == sorted(config["target_modules"])
    assert (config["task_type"], config["inference_mode"]) == ("CAUSAL_LM", True)
    close(AutoPeftModelForCausalLM.from_pretrained(folder)(IDS).logits, trained(IDS).logits)
    assert same_weights(weights(load_causal_lm(folder)), weights(load_causal_lm(folder)))
    close(load_causal_lm(folder)(IDS).logits, trained(IDS).logits)
    _, head, _ = (folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "peft"


@torch.no_grad()
@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_a_reward_export_scores_as_the_model_did(folders, kind):
    trained, loaded = folders[f"{kind} reward"].scalar.eval(), load_reward_model(folders[f"reward-{kind}"])
    close(loaded(IDS, MASK), trained(IDS, MASK))
    assert loaded.calibration == trained.calibration
    assert loaded.calibration.std != 1
    assert loaded.probe_error() < 1e-4
    assert type(loaded.model.score) is torch.nn.Linear
    assert all(p.requires_grad for p in loaded.parameters())
    assert differs(loaded.raw(IDS, MASK), new_scalar_lm(folders["merged"]).raw(IDS, MASK))


@torch.no_grad()
def test_a_reward_adapter_loads_in_plain_peft(folders):
    base = AutoModelForSequenceClassification.from_pretrained(folders["merged"], num_labels=1)
    base.config.pad_token_id = AutoTokenizer.from_pretrained(folders["reward-adapter"]).pad_token_id
    model = PeftModel.from_pretrained(base, folders["reward-adapter"]).eval()
    trained = folders["adapter reward"].scalar.eval()
    close(model(IDS).logits[:, 0], trained.raw(IDS, MASK)[:, -1])
    assert json.loads((folders["reward-adapter"] / "adapter_config.json").read_text())["modules_to_save"] == ["score"]


@torch.no_grad()
@pytest.mark.parametrize("trainable", [False, True])
def test_a_reward_adapter_stands_beside_a_model_of_the_same_base_without_weights_of_its_own(folders, trainable):
    assert reward_adapter_base(folders["reward-adapter"]) == str(folders["merged"])
    assert [reward_adapter_base(folders[name]) for name in ("adapter", "reward-merged", "base")] == [None] * 3
    assert reward_adapter_base("nobody/nothing") is None

    policy = load_causal_lm(folders["merged"])
    before = weights(policy)
    choose_trained(policy, LORA)
    scalar = attach_reward_adapter(scalar_beside(policy).model, folders["reward-adapter"], trainable)

    trained = folders["adapter reward"].scalar.eval()
    close(scalar(IDS, MASK), trained(IDS, MASK))
    assert scalar.calibration == trained.calibration
    own = {name for name, p in scalar.named_parameters() if all(p is not q for q in policy.parameters())}
    assert own == {name for name, _ in scalar.named_parameters() if "lora" in name or "score" in name}
    assert {name for name, p in scalar.named_parameters() if p.requires_grad} == (own if trainable else set())
    assert same_weights(weights(policy), before)
    freeze(scalar)


@torch.no_grad()
def test_every_stage_stands_on_the_one_before(folders, tmp_path):
    """LoRA of the SFT model, then LoRA of the reward model on it: what SFT taught is in both exports."""
    for start in (folders["merged"], folders["adapter"]):
        sft = load_causal_lm(start).eval()
        module = judge(start, tmp_path / start.name, LORA)
        expected = sft.model(IDS).last_hidden_state
        scalar = new_scalar_lm(start)
        close(scalar.model.model(IDS).last_hidden_state, expected)
        frozen = {name: t for name, t in weights(module.export_model).items() if "base_layer" in name}
        original = weights(sft)
        assert frozen
        for name, tensor in frozen.items():
            close(tensor, original[name.replace("base_layer.", "")])
        close(load_reward_model(tmp_path / start.name)(IDS, MASK), module.scalar.eval()(IDS, MASK))


def test_an_adapter_on_an_adapter_is_refused_before_training(folders, tmp_path):
    with pytest.raises(UserError, match="is an adapter itself, and one cannot stand on another"):
        teach(folders["adapter"], tmp_path / "out", ADAPTER)
    assert not (tmp_path / "out").exists()
    teach(folders["adapter"], tmp_path / "out", LORA)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_exports_beside_checkpoints_do_not_touch_training(folders, tmp_path):
    class EveryStep(HFExport):
        def on_train_batch_start(self, trainer, pl_module, *_: Any) -> None:
            before = weights(pl_module.export_model)
            self.export(trainer, pl_module, tmp_path / f"step{trainer.global_step}")
            assert same_weights(weights(pl_module.export_model), before)

    torch.manual_seed(1)
    module = SFTModule(folders["base"], optimizer=adamw(3e-2), **CONSTANT, finetune=LORA)
    rows = instruction_rows(8)
    data = InstructionDataModule(folders["base"], rows, validation_data=rows[:2], batch_size=4, max_length=48)
    fit(module, data, callbacks=[EveryStep(str(tmp_path / "end"))])
    assert same_weights(weights(module.export_model), weights(folders["merged sft"].export_model))
    assert same_weights(weights(load_causal_lm(tmp_path / "step0")), weights(load_causal_lm(folders["base"])))


def test_a_head_tied_to_the_embeddings_stays_tied_and_as_it_was(tmp_path):
    base = save_gpt2(tmp_path / "gpt2", dropout=0.0)
    before = weights(load_causal_lm(base))
    for mode in ("last_layer", "lora"):
        teach(base, tmp_path / mode, FineTune(mode))
        stored = load_file(tmp_path / mode / "model.safetensors")
        assert "lm_head.weight" not in stored
        after = weights(load_causal_lm(tmp_path / mode))
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert not {name for name in changed if "wte" in name or "wpe" in name or "lm_head" in name}
        assert all((".h.1." in name or "ln_f" in name) is True for name in changed) or mode == "lora"
        assert changed


def test_a_new_pad_token_comes_with_the_adapter(tmp_path):
    from helpers.tokenizers import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    base = save_llama(tmp_path / "base", tokenizer)
    module = judge(base, tmp_path / "reward", ADAPTER)
    loaded = load_reward_model(tmp_path / "reward")
    assert loaded.model.config.pad_token_id == module.export_model.config.pad_token_id != tokenizer.eos_token_id
    assert loaded.model.get_input_embeddings().num_embeddings > loaded.model.config.pad_token_id
    with torch.no_grad():
        close(loaded(IDS, MASK), module.scalar.eval()(IDS, MASK))


def refusal(load: Any, *args: Any) -> str:
    with pytest.raises(UserError) as error:
        load(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def edited(folder: Path, copy: Path, **changes: Any) -> Path:
    shutil.copytree(folder, copy)
    path = copy / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return copy


@torch.no_grad()
def test_a_relative_base_is_looked_for_here_and_then_beside_the_adapter(folders, tmp_path, monkeypatch):
    expected = load_causal_lm(folders["adapter"])(IDS).logits
    shutil.copytree(folders["base"], tmp_path / "models" / "base")
    here = edited(folders["adapter"], tmp_path / "here", base_model_name_or_path="models/base")
    beside = edited(folders["adapter"], tmp_path / "beside", base_model_name_or_path="../models/base")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(load_causal_lm(here)(IDS).logits, expected)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.move(tmp_path / "models", tmp_path / "here" / "models")
    assert torch.equal(load_causal_lm(here)(IDS).logits, expected)
    shutil.move(tmp_path / "here" / "models", tmp_path / "models")
    assert torch.equal(load_causal_lm(beside)(IDS).logits, expected)


def test_adapter_folders_that_cannot_be_loaded(folders, tmp_path):
    gone = edited(folders["adapter"], tmp_path / "gone", base_model_name_or_path="./gone/base")
    assert "there is no folder './gone/base' here or in the adapter's folder" in refusal(load_causal_lm, gone)
    nameless = edited(folders["adapter"], tmp_path / "nameless", base_model_name_or_path=None)
    assert "has no base_model_name_or_path" in refusal(load_causal_lm, nameless)
    stacked = edited(folders["adapter"], tmp_path / "stacked", base_model_name_or_path=str(folders["adapter"]))
    assert "is an adapter itself" in refusal(load_causal_lm, stacked)
    assert "is the adapter of a reward model" in refusal(load_causal_lm, folders["reward-adapter"])
    other = edited(folders["adapter"], tmp_path / "other", base_model_name_or_path=save_gpt2(tmp_path / "gpt2", 0.0))
    assert f"no language model could be loaded from '{other}'" in refusal(load_causal_lm, other)
    broken = shutil.copytree(folders["adapter"], tmp_path / "broken")
    (broken / "adapter_config.json").write_text("{")
    assert "is not valid JSON" in refusal(load_causal_lm, broken)


def test_an_adapter_that_lacks_weights_is_refused(folders, tmp_path):
    for name, load in [("adapter", load_causal_lm), ("reward-adapter", load_reward_model)]:
        for lacking in ("model.layers.1.mlp.up_proj.lora_A.weight", "score.weight"):
            copy = shutil.copytree(folders[name], tmp_path / f"{name} {lacking}")
            stored = load_file(copy / "adapter_model.safetensors")
            if stored.pop(f"base_model.model.{lacking}", None) is None:
                continue
            save_file(stored, copy / "adapter_model.safetensors")
            assert f"could be loaded from '{copy}'" in refusal(load, copy)
            if name == "reward-adapter":
                policy = load_causal_lm(folders["merged"]).requires_grad_(False)
                assert "does not fit its base" in refusal(attach_reward_adapter, scalar_beside(policy).model, copy)


def test_a_broken_calibration_is_refused(folders, tmp_path):
    copy = shutil.copytree(folders["reward-adapter"], tmp_path / "copy")
    (copy / "reward_calibration.json").write_text('{"mean": 1, "sd": 2}')
    assert "does not hold a calibration" in refusal(load_reward_model, copy)
    (copy / "reward_calibration.json").unlink()
    assert load_reward_model(copy).calibration.std == 1


@torch.no_grad()
def test_a_reward_model_may_be_the_base_of_another(folders, tmp_path):
    start = save_reward_model(tmp_path / "reward", folders["base"])
    module = judge(start, tmp_path / "more", ADAPTER)
    loaded = load_reward_model(tmp_path / "more")
    close(loaded(IDS, MASK), module.scalar.eval()(IDS, MASK))
    assert loaded.calibration == module.scalar.calibration != load_reward_model(start).calibration
