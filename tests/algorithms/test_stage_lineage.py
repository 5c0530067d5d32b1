"""What a stage begins with fits together, or the run stops in one line with both hashes; whatever is right goes on."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from helpers.stages import (
    fit,
    instruction_rows,
    preference_rows,
    prompt_rows,
    save_llama,
    share_of_letters,
    trainer,
)
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning import (
    DPOModule,
    FineTune,
    HFExport,
    InstructionDataModule,
    PPOModule,
    PreferenceDataModule,
    PromptDataModule,
    RewardModule,
    Sampling,
    SFTModule,
    UserError,
)
from rlhf_lightning.algorithms.lineage import _tokenizer_hash
from rlhf_lightning.chat.fingerprint import hash_of_template
from rlhf_lightning.models.adapter_folders import ADAPTER_CONFIG
from rlhf_lightning.models.portable import save_tokenizer
from rlhf_lightning.models.tokenizer import own_pad_token
from rlhf_lightning.runs.lineage import hash_of_record, hash_of_weights, read_record, read_trained_on, short

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
ADAMW: Any = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}
SPLIT: dict[str, Any] = {"validation_split": 0.25}
FULL, LORA = FineTune(), FineTune(mode="lora", rank=2, alpha=4)
CONSTANT: dict[str, Any] = {"lr_schedule": "constant", "warmup_steps": 0}


def messages(count: int) -> list[dict[str, Any]]:
    """Dialogues with the prompts that `instruction_rows` has."""
    return [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["response"]}]}
        for r in instruction_rows(count)
    ]


def sft(folder: str, rows: Any = None, finetune: FineTune = FULL, **data: Any) -> tuple[Any, Any]:
    module = SFTModule(folder, optimizer=ADAMW, finetune=finetune, **CONSTANT)
    options = {"max_length": 56, "batch_size": 4} | SPLIT | data
    return module, InstructionDataModule(folder, messages(16) if rows is None else rows, **options)


def reward(folder: str, rows: Any = None, **data: Any) -> tuple[Any, Any]:
    module = RewardModule(folder, optimizer=ADAMW, **CONSTANT)
    options = {"max_length": 56, "batch_size": 8} | SPLIT | data
    return module, PreferenceDataModule(folder, rows or preference_rows(16), **options)


def ppo(folder: str, reward: Any, rows: Any = None, data: Any = None, **options: Any) -> tuple[Any, Any]:
    """One iteration of one step."""
    sizes = {"rollout_batch_size": 2, "minibatch_size": 2, "ppo_epochs": 1, "sampling": Sampling(max_new_tokens=3)}
    module = PPOModule(folder, reward, optimizer=ADAMW, **CONSTANT, **sizes, **options)
    prompts = {"rollout_batch_size": 2, "max_prompt_length": 40} | SPLIT | (data or {})
    return module, PromptDataModule(folder, prompt_rows(16) if rows is None else rows, **prompts)


def exported(module: Any, data: Any, root: Path) -> str:
    fit(module, data, callbacks=[HFExport()], default_root_dir=root, max_steps=1)
    return str(root / "export")


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base whose tokenizer has a template, and the exports of SFT and reward stages on it, splits alike."""
    root = tmp_path_factory.mktemp("stages")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    base = save_llama(root / "base", tokenizer)
    first = exported(*sft(base), root / "sft")
    return {"base": base, "sft": first, "reward": exported(*reward(first), root / "reward")}


def start(module: Any, data: Any, checkpoint: Path | None = None) -> None:
    """All that happens before the first batch."""
    fit(module, data, ckpt_path=checkpoint, limit_train_batches=0)


def refused(module: Any, data: Any, checkpoint: Path | None = None) -> str:
    with pytest.raises(UserError) as error:
        start(module, data, checkpoint)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("; --allow_mismatch true (module.allow_mismatch = True) goes on all the same")
    return str(error.value)


def copied(folder: str, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


# The record


def test_an_export_says_what_it_came_from(stages):
    record = read_record(Path(stages["reward"]))
    assert record is not None
    first = read_record(Path(stages["sft"]))
    assert first is not None
    assert record["stage"] == "RewardModule"
    assert record["models"] == {
        "model": {
            "name": stages["sft"],
            "weights": hash_of_weights(Path(stages["sft"])),
            "made_by_stage": hash_of_record(first),
        }
    }
    assert record["stages"].keys() == {hash_of_record(first)}
    assert first["models"]["model"]["weights"] == hash_of_weights(Path(stages["base"]))
    assert first["tokenizer"] == record["tokenizer"]  # although a pad token was added
    assert first["template"] == record["template"] is not None
    assert first["data"]["splits"]["validation"] == 0.25
    assert set(first["data"]["sources"]["data"]) == {"name", "hash"}


def test_two_runs_of_the_same_have_the_same_files(stages, tmp_path):
    again = Path(exported(*sft(stages["base"]), tmp_path / "again"))
    for name in ("lineage.json", "trained_on.npy"):
        assert (again / name).read_bytes() == (Path(stages["sft"]) / name).read_bytes()


def test_an_export_knows_the_prompts_of_all_stages_before(stages):
    first, second = (read_trained_on(Path(stages[name])) for name in ("sft", "reward"))
    assert 0 < len(first) < 16
    assert set(first.tolist()) < set(second.tolist())
    _, data = reward(stages["sft"])
    data.setup("fit")
    assert set(second.tolist()) == set(first.tolist()) | set(data.prompt_hashes("train").tolist())


def test_a_checkpoint_holds_the_record(stages, tmp_path):
    module, data = ppo(stages["sft"], stages["reward"])
    run = trainer(max_steps=1)
    run.fit(module, data)
    run.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["rlhf_lightning"]["lineage"]
    assert saved == module.lineage
    assert set(saved["models"]) == {"model", "reference", "reward"}
    assert len(saved["stages"]) == 2


def test_a_reward_function_is_recorded_by_its_name(stages):
    module, data = ppo(stages["sft"], share_of_letters)
    start(module, data)
    assert module.lineage["reward_function"] == "helpers.stages.share_of_letters"


# The start of a stage: what is right goes on


def test_stages_with_the_same_splits_fit_one_another(stages, recwarn):
    start(*ppo(stages["sft"], stages["reward"]))
    unseen = {"validation_data": [{"prompt": "nobody has seen this"}]}
    start(*ppo(stages["sft"], stages["reward"], data=unseen))
    assert not [w for w in recwarn if "mismatch" in str(w.message)]


def test_a_stage_may_hold_nothing_out_or_validate_on_what_it_trains_on(stages):
    start(*ppo(stages["sft"], stages["reward"], data={"validation_split": 0.0}))
    rows = prompt_rows(16)
    start(*ppo(stages["sft"], stages["reward"], rows, {"validation_data": rows[:4]}))
    module, data = ppo(stages["sft"], stages["reward"], data={"validation_split": 0.75})
    fit(module, data, limit_train_batches=0, limit_val_batches=0)


def test_a_reward_model_with_another_tokenizer_and_template_is_right_as_it_is(stages, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<other>"])
    other = exported(*reward(save_llama(tmp_path / "other", tokenizer)), tmp_path / "reward")
    start(*ppo(stages["sft"], other))


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("pad", ["own", "eos", "none"])
def test_an_exported_tokenizer_has_the_hashes_of_its_training(tmp_path, pad, bos):
    """Also a reward model's, which was given a pad token of its own."""
    tokenizer = tiny_tokenizer(pad=pad, bos=bos, chat_template=True)
    hashes = _tokenizer_hash(tokenizer), hash_of_template(tokenizer)
    own_pad_token(tokenizer, len(tokenizer))
    save_tokenizer(tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (_tokenizer_hash(loaded), hash_of_template(loaded)) == hashes


def test_folders_without_a_record_are_taken_as_they_are(stages, tmp_path):
    folders = [copied(stages[name], tmp_path / name) for name in ("sft", "reward")]
    for folder in folders:
        (folder / "lineage.json").unlink()
        (folder / "trained_on.npy").unlink()
    start(*ppo(*map(str, folders), data={"validation_split": 0.75, "dialogue_format": "plain"}))


def test_a_few_prompts_in_common_are_only_said(stages, caplog):
    seen = [row["prompt"] for row in instruction_rows(16)]
    rows = [{"prompt": f"never seen {i}"} for i in range(400)] + [{"prompt": prompt} for prompt in seen]
    # Half of the 16 prompts are trained on here, too, so that at most 2% of the others are known.
    module, data = ppo(stages["sft"], share_of_letters, prompt_rows(8), {"validation_data": rows})
    with caplog.at_level("INFO", "pytorch_lightning"):
        start(module, data)
    assert re.search(r"\d of 408 held-out prompts \([12]%\) were training prompts of", caplog.text)


# The start of a stage: what is surely wrong stops


def test_held_out_prompts_that_a_stage_before_was_trained_on(stages):
    module, data = ppo(stages["sft"], stages["reward"], data={"validation_split": 0.75})
    message = refused(module, data)
    held_out, seen = data.prompt_hashes("validation"), read_trained_on(Path(stages["sft"]))
    count = len(set(held_out.tolist()) & set(seen.tolist()))
    assert count > 3
    share = f"{count} of {len(held_out)} held-out prompts ({count / len(held_out):.0%})"
    record = read_record(Path(stages["sft"]))
    assert record is not None
    assert message.startswith(
        f"{share} were training prompts of '{stages['sft']}' (data {short(record['data']['key'])})"
    )
    assert f"(data {short(data.lineage()['key'])})" in message


def test_a_policy_that_was_taught_with_another_template(stages):
    message = refused(*ppo(stages["sft"], share_of_letters, data={"chat_template": "{{ messages[0].content }}"}))
    record = read_record(Path(stages["sft"]))
    assert record is not None
    assert f"'{stages['sft']}' was trained on dialogues written by chat template {short(record['template'])}" in message
    module = DPOModule(stages["sft"], optimizer=ADAMW, **CONSTANT)
    data = PreferenceDataModule(stages["sft"], preference_rows(16), dialogue_format="plain", max_length=56, **SPLIT)
    assert "the data are written by the plain format {" in refused(module, data)
    start(*sft(stages["sft"], dialogue_format="plain"))  # which teaches it


def test_a_reward_model_whose_tokenizer_files_were_replaced(stages, tmp_path):
    for name, change in (("template", "chat_template"), ("tokenizer", "tokens")):
        folder = copied(stages["reward"], tmp_path / name)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        if change == "tokens":
            tokenizer.add_tokens(["<a>", "<b>"])
        else:
            tokenizer.chat_template += " "
        tokenizer.save_pretrained(folder)
        message = refused(*ppo(stages["sft"], str(folder)))
        assert f"reward '{folder}' was trained with {name} " in message


def test_a_value_model_that_reads_other_tokens(stages, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<other>"])
    other = exported(*reward(save_llama(tmp_path / "other", tokenizer)), tmp_path / "reward")
    message = refused(*ppo(stages["sft"], stages["reward"], value_name_or_path=other))
    assert f"value_name_or_path '{other}' reads other tokens (tokenizer " in message


def test_an_adapter_on_another_base_than_it_was_trained_on(stages, tmp_path):
    base = str(copied(stages["base"], tmp_path / "base"))
    lora = FineTune(mode="lora", rank=2, export="adapter")
    adapter = exported(*sft(base, finetune=lora), tmp_path / "lora")
    start(*reward(adapter))
    config = json.loads((Path(adapter) / ADAPTER_CONFIG).read_text())
    (Path(adapter) / ADAPTER_CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": stages["sft"]}))
    then, now = (short(hash_of_weights(Path(folder))) for folder in (base, stages["sft"]))
    message = refused(*reward(adapter))
    assert f"the adapter '{adapter}' was trained on base weights {then} ('{base}')" in message
    assert f"those of '{stages['sft']}' are {now}" in message


def test_a_mismatch_may_be_allowed(stages):
    module, data = ppo(stages["sft"], stages["reward"], data={"validation_split": 0.75})
    module.allow_mismatch = True
    with pytest.warns(UserWarning, match=r"a mismatch is allowed: \d+ of \d+ held-out prompts"):
        start(module, data)
    assert "allow_mismatch" not in module.hparams


# A checkpoint


def checkpoint(module: Any, data: Any, path: Path) -> Path:
    run = trainer(max_steps=1)
    run.fit(module, data)
    run.save_checkpoint(path)
    return path


@pytest.mark.parametrize("mode", ["lora", "last_layer"])
def test_adapters_go_on_with_their_base_only(stages, tmp_path, mode):
    finetune = FineTune(mode=mode, rank=2)
    saved = checkpoint(*sft(stages["base"], finetune=finetune), tmp_path / "run.ckpt")
    start(*sft(stages["base"], finetune=finetune), saved)
    moved = str(copied(stages["base"], tmp_path / "moved"))
    start(*sft(moved, finetune=finetune), saved)
    message = refused(*sft(stages["sft"], finetune=finetune), saved)
    for folder in ("base", "sft"):
        assert f"'{stages[folder]}' (weights {short(hash_of_weights(Path(stages[folder])))})" in message
    module, data = sft(stages["sft"], finetune=finetune)
    with pytest.raises(UserError, match="trained on"):
        trainer().validate(module, data, ckpt_path=saved, weights_only=True, verbose=False)
    with pytest.raises(UserError, match="trained on"):
        SFTModule.load_from_checkpoint(saved, model_name_or_path=stages["sft"], weights_only=True)


def test_adapters_go_on_with_their_scale_only(stages, tmp_path):
    saved = checkpoint(*sft(stages["base"], finetune=LORA), tmp_path / "run.ckpt")
    other = FineTune(mode="lora", rank=2, alpha=8)
    assert "finetune.alpha 4, now it is 8" in refused(*sft(stages["base"], finetune=other), saved)


def test_a_full_model_may_go_on_from_anywhere(stages, tmp_path):
    saved = checkpoint(*sft(stages["base"]), tmp_path / "run.ckpt")
    start(*sft(stages["sft"]), saved)


@pytest.fixture(scope="module")
def online(stages: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(*ppo(stages["sft"], stages["reward"]), tmp_path_factory.mktemp("online") / "run.ckpt")


def test_ppo_goes_on_with_its_reward_model_and_reference(stages, online, tmp_path):
    start(*ppo(stages["sft"], stages["reward"]), online)
    other = exported(*reward(stages["sft"], preference_rows(12)), tmp_path / "reward")
    message = refused(*ppo(stages["sft"], other), online)
    assert f"the checkpoint was made with the reward '{stages['reward']}' (weights " in message
    assert f"now it is '{other}' (weights {short(hash_of_weights(Path(other)))})" in message
    message = refused(*ppo(stages["sft"], share_of_letters), online)
    assert "now it is none: resume with the same reward" in message
    message = refused(*ppo(stages["sft"], stages["reward"], reference=stages["base"]), online)
    assert "the checkpoint was made with the reference" in message


def test_a_checkpoint_is_evaluated_against_any_reward(stages, online):
    module, data = ppo(stages["sft"], share_of_letters)
    trainer(limit_val_batches=1).validate(module, data, ckpt_path=online, weights_only=True, verbose=False)


def test_a_checkpoint_without_a_record_is_gone_on_with(stages, online, tmp_path):
    content = torch.load(online, weights_only=True)
    del content["rlhf_lightning"]["lineage"]
    torch.save(content, tmp_path / "older.ckpt")
    start(*ppo(stages["sft"], stages["reward"], reference=stages["base"]), tmp_path / "older.ckpt")


def test_data_of_others_have_no_prompts_to_compare(stages):
    module, data = ppo(stages["sft"], stages["reward"], data={"validation_split": 0.75})
    data.setup("fit")
    loader = data.train_dataloader()
    trainer(limit_train_batches=0).fit(module, loader, data.val_dataloader())
    assert module.lineage["data"] is None
    assert module.lineage["template"] is None


def test_hashes_of_prompts_do_not_depend_on_the_tokenizer_or_the_kind_of_row(stages, tmp_path):
    other = save_llama(tmp_path / "other", tiny_tokenizer())
    rows = [{"prompt": f"Salt {i}", "response": "bread"} for i in range(16)]
    turns = [[{"role": "user", "content": f"salt  {i}"}, {"role": "assistant", "content": "a"}] for i in range(16)]
    loud = [{"prompt": row["prompt"].upper()} for row in rows]
    modules = [
        InstructionDataModule(stages["base"], [{"messages": each} for each in turns], max_length=64, **SPLIT),
        InstructionDataModule(other, rows, max_length=32, **SPLIT),
        PromptDataModule(other, loud, max_prompt_length=6, rollout_batch_size=2, **SPLIT),
    ]
    for module in modules:
        module.setup("fit")
    for part in ("train", "validation"):
        hashes = [module.prompt_hashes(part) for module in modules]
        assert len(hashes[0]) > 0
        for each in hashes[1:]:
            np.testing.assert_array_equal(hashes[0], each)
