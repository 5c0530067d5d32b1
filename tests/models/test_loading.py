"""What loads, and what is refused in one line."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from helpers.models import save_folder, tiny_causal_lm, tiny_classifier
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.causal_lm import load_causal_lm
from rlhf_lightning.models.folders import check_model_folder, looks_local
from rlhf_lightning.models.scalar_lm import load_reward_model, new_scalar_lm
from rlhf_lightning.models.tokenizer import load_tokenizer

IDS = torch.tensor([[40, 41, 42, 43]])
LOADERS = [load_causal_lm, load_reward_model, new_scalar_lm]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A language model, a reward model, a classifier of three labels and an adapter; not to be changed."""
    root = tmp_path_factory.mktemp("folders")
    save_folder(root / "lm", tiny_causal_lm(), tiny_tokenizer())
    save_folder(root / "reward", tiny_classifier(), tiny_tokenizer())
    save_folder(root / "labels", tiny_classifier(num_labels=3), tiny_tokenizer())
    adapted(root / "lm").save_pretrained(root / "adapter")
    return root


def adapted(folder):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        lora = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        return get_peft_model(load_causal_lm(folder), lora).eval()


def refusal(load, folder):
    """The message with which `load` refuses a folder."""
    with pytest.raises(UserError) as error:
        load(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@torch.no_grad()
def test_a_language_model_comes_back_as_it_was(folders):
    loaded = load_causal_lm(folders / "lm")
    assert torch.equal(loaded(IDS).logits, tiny_causal_lm()(IDS).logits)
    assert loaded.dtype == torch.get_default_dtype()
    assert all(p.requires_grad for p in loaded.parameters())


@torch.no_grad()
def test_weights_are_loaded_in_the_default_dtype(tmp_path):
    half = save_folder(tmp_path, tiny_causal_lm().to(torch.bfloat16), tiny_tokenizer())
    assert load_causal_lm(half).dtype == torch.float32
    half = save_folder(tmp_path, tiny_classifier().to(torch.bfloat16), tiny_tokenizer())
    assert load_reward_model(half).model.dtype == torch.float32


@torch.no_grad()
def test_an_adapter_is_merged_into_its_base(folders):
    loaded = load_causal_lm(folders / "adapter")
    expected = adapted(folders / "lm")(IDS).logits
    torch.testing.assert_close(loaded(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    assert (loaded(IDS).logits - tiny_causal_lm()(IDS).logits).abs().max() > 0.01
    assert not [name for name, _ in loaded.named_parameters() if "lora" in name]
    assert all(p.requires_grad for p in loaded.parameters())


def test_dropout_is_off_unless_asked_for(tmp_path):
    folder = save_folder(tmp_path, tiny_causal_lm("gpt2", resid_pdrop=0.5), tiny_tokenizer())
    for dropout in (False, True):
        model = load_causal_lm(folder, dropout=dropout).train()
        with torch.random.fork_rng([]):
            assert torch.equal(model(IDS).logits, model(IDS).logits) is not dropout


@pytest.mark.parametrize("load", LOADERS)
def test_folders_without_a_model(load, tmp_path):
    assert "does not exist" in refusal(load, tmp_path / "nothing")
    assert "no config.json" in refusal(load, tmp_path)
    (tmp_path / "last.ckpt").touch()
    assert "Lightning checkpoints, the model is in its export folder" in refusal(load, tmp_path)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_attention_heads": 0}, "could be loaded from"),
        ({"hidden_size": "big"}, "expected int, got str"),
        ({"num_hidden_layers": None}, "could be loaded from"),
        ({"model_type": "nothing"}, "`nothing`"),
        ({"model_type": ["llama"]}, "could be loaded from"),
        ({"rope_parameters": 3}, "could be loaded from"),
    ],
)
def test_a_config_that_cannot_be_is_one_line(load, folders, tmp_path, change, said):
    shutil.copytree(folders / "reward" if load is load_reward_model else folders / "lm", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert said in refusal(load, tmp_path / "model")
    path.write_text("[" * 9999)
    assert str(tmp_path / "model") in refusal(load, tmp_path / "model")


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 9999, b"3", b'{"model": {"type": "BPE"}}', bytes(99)])
def test_a_tokenizer_that_cannot_be_is_one_line(folders, tmp_path, content):
    shutil.copytree(folders / "lm", tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes(content)
    assert "no tokenizer could be loaded from" in refusal(load_tokenizer, tmp_path / "model")


def test_code_of_others_and_the_base_of_an_adapter_are_said_once(folders, tmp_path, logged):
    shutil.copytree(folders / "adapter", tmp_path / "adapter")
    for _ in range(2):
        load_causal_lm(tmp_path / "adapter", trust_remote_code=True)
    lines = [line for line in logged() if "adapter" in line]
    assert lines == [
        f"'{tmp_path / 'adapter'}' may run Python code of its own, as trust_remote_code allows",
        f"the adapter '{tmp_path / 'adapter'}' stands on '{folders / 'lm'}', as its config says",
    ]


def test_code_of_others_is_not_run_unasked(folders, tmp_path, capsys):
    shutil.copytree(folders / "lm", tmp_path / "model")
    (tmp_path / "model" / "own.py").write_text("print('code from a folder was run')")
    path = tmp_path / "model" / "config.json"
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    for load in (load_causal_lm, new_scalar_lm):
        assert "trust_remote_code" in refusal(load, tmp_path / "model")
    assert capsys.readouterr().out == ""


class Trap:
    """Runs code where it is unpickled."""

    def __reduce__(self):
        return print, ("code from a file was run",)


def test_pickled_weights_of_others_run_no_code(folders, tmp_path, capsys):
    for name, weights in (("lm", "pytorch_model.bin"), ("adapter", "adapter_model.bin")):
        shutil.copytree(folders / name, tmp_path / name)
        for path in (tmp_path / name).glob("*.safetensors"):
            path.unlink()
        torch.save({"model.norm.weight": Trap()}, tmp_path / name / weights)
        assert "could be loaded from" in refusal(load_causal_lm, tmp_path / name)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("load", LOADERS)
def test_a_hub_id_that_cannot_be_found(load):
    assert "'nobody/nothing'" in refusal(load, "nobody/nothing")


def test_a_language_model_has_no_reward_head(folders):
    message = refusal(load_reward_model, folders / "lm")
    assert "no trained reward head (it is a LlamaForCausalLM)" in message
    assert "rlhf fit --config reward.yaml" in message


@pytest.mark.parametrize("architectures", [["LlamaModel"], None])
def test_nor_has_a_folder_that_does_not_say_what_it_is(tmp_path, folders, architectures):
    folder = shutil.copytree(folders / "lm", tmp_path / "lm")
    config = json.loads((folder / "config.json").read_text()) | {"architectures": architectures}
    (folder / "config.json").write_text(json.dumps(config))
    assert "no trained reward head" in refusal(load_reward_model, folder)


def test_a_classifier_of_several_labels_is_no_reward_model(folders):
    assert "3 labels (LABEL_0, LABEL_1, LABEL_2), and a reward is one score" in refusal(
        load_reward_model, folders / "labels"
    )


def test_a_reward_model_is_no_policy(folders):
    message = refusal(load_causal_lm, folders / "reward")
    assert "is a reward model (LlamaForSequenceClassification); a language model is needed here" in message


def test_a_backbone_alone_is_no_policy(tmp_path):
    AutoModel.from_config(tiny_causal_lm().config).save_pretrained(tmp_path)
    assert "its weights lack lm_head.weight, which would be random" in refusal(load_causal_lm, tmp_path)


def test_an_adapter_of_a_language_model_is_no_reward_model(folders):
    assert "no trained reward head (it is a language model's adapter)" in refusal(
        load_reward_model, folders / "adapter"
    )


@torch.no_grad()
def test_a_fresh_head_on_an_adapter_stands_on_the_merged_model(folders):
    scalar = new_scalar_lm(folders / "adapter")
    expected = load_causal_lm(folders / "adapter").model(IDS).last_hidden_state
    torch.testing.assert_close(scalar.model.model(IDS).last_hidden_state, expected, atol=1e-6, rtol=0)
    assert torch.equal(scalar.model.score.weight, new_scalar_lm(folders / "lm").model.score.weight)
    assert all(p.requires_grad for p in scalar.parameters())


def test_a_family_without_a_classifier(tmp_path):
    folder = save_folder(tmp_path, tiny_causal_lm("cohere"), tiny_tokenizer())
    assert "no model with a scalar head could be loaded" in refusal(new_scalar_lm, folder)


@pytest.mark.parametrize("load", LOADERS)
def test_damaged_folders(load, tmp_path, folders):
    folder = shutil.copytree(folders / ("reward" if load is load_reward_model else "lm"), tmp_path / "copy")
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert f"could be loaded from '{folder}'" in refusal(load, folder)
    weights.unlink()
    assert f"could be loaded from '{folder}'" in refusal(load, folder)
    weights.write_bytes(whole)
    original = config.read_text()
    config.write_text(json.dumps(json.loads(original) | {"hidden_size": 32}))
    assert f"could be loaded from '{folder}'" in refusal(load, folder)
    config.write_text(original[: len(original) // 2])
    assert "valid JSON" in refusal(load, folder)


@pytest.mark.parametrize("load", LOADERS)
def test_weights_that_are_missing_are_never_random(load, tmp_path, folders):
    folder = shutil.copytree(folders / ("reward" if load is load_reward_model else "lm"), tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "its weights lack model.layers.1.mlp.up_proj.weight" in refusal(load, folder)


def test_which_names_are_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert [looks_local(n) for n in ("runs", "runs/sft", "./x", "~/x", "/x", "a/b/c")] == [True] * 6
    assert [looks_local(n) for n in ("gpt2", "facebook/opt-350m")] == [False] * 2


def test_a_run_is_told_from_its_model(tmp_path):
    (tmp_path / "run" / "export").mkdir(parents=True)
    (tmp_path / "run" / "export" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no config.json; the model of this run is in '.*run/export'"):
        check_model_folder(tmp_path / "run")
