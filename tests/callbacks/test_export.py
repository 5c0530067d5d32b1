"""The exported folder, and the texts that are written on the way."""

from __future__ import annotations

import json
import re
import resource
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from datasets import Dataset
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from safetensors import SafetensorError
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from helpers.cli_runs import QUESTIONS, dialogue, save_model
from helpers.stages import share_of_letters
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning import (
    Blend,
    HelpfulHarmless,
    HFExport,
    InstructionDataModule,
    PPOModule,
    RewardModule,
    SampleTexts,
    Sampling,
    SFTModule,
    Table,
    UserError,
)
from rlhf_lightning.callbacks.hf_export import model_card
from rlhf_lightning.callbacks.model_card import card_text
from rlhf_lightning.callbacks.samples import sample_section
from rlhf_lightning.data.sources import Source
from rlhf_lightning.generation.engine import TransformersEngine

PROMPTS = ["\n\nHuman: how do i bake bread?\n\nAssistant:", "Once upon"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "lm", chat_template=True)


def fit(
    model: Path, root: Path, *callbacks: pl.Callback, steps: int = 4, ckpt_path: str | None = None, **options: Any
) -> SFTModule:
    """Train on eight dialogues, a checkpoint and a validation every second step."""
    pl.seed_everything(1)
    rows = [
        {"chosen": dialogue(i, "Happy to help!"), "rejected": dialogue(i, "No.")} for i in range(len(QUESTIONS) + 2)
    ]
    data = InstructionDataModule(str(model), rows, rows[:2], max_length=64, batch_size=2)
    module = SFTModule(
        str(model),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
        lr_schedule="constant",
        sampling=Sampling(max_new_tokens=4),
    )
    keep = ModelCheckpoint(root / "checkpoints", "step={step}", "step", mode="max", every_n_train_steps=2, save_top_k=1)
    keep.save_last = True
    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=root,
        max_steps=steps,
        val_check_interval=2,
        logger=TensorBoardLogger(root, name="", version=""),
        callbacks=[keep, *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module


def test_the_folder_is_complete_and_plain_transformers_generates_from_it(model, tmp_path):
    module = fit(model, tmp_path, HFExport())
    folder = tmp_path / "export"
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "lineage.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "trained_on.npy",
    }
    assert sorted(path.name for path in tmp_path.glob("export*")) == ["export"]
    tokenizer, loaded = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(model).chat_template
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == loaded.config.rope_parameters["rope_theta"]  # for older tools: models/portable.py
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    for name, tensor in module.export_model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == tokenizer.eos_token_id
    assert generation.pad_token_id == tokenizer.pad_token_id
    ids = tokenizer(PROMPTS[0], return_tensors="pt")
    assert loaded.generate(**ids, max_new_tokens=2, do_sample=False).shape[1] <= ids["input_ids"].shape[1] + 2


class AnyStage:
    """Keeps what it is given, as somebody's own stage may."""

    def __init__(self, engine, share, sampling, paths, optimizer):
        self.engine, self.share, self.sampling, self.paths, self.optimizer = engine, share, sampling, paths, optimizer
        self.model_name_or_path = "lm"


def test_no_setting_can_keep_a_model_card_from_being_written():
    """It is written when all training is done."""
    trainer = SimpleNamespace(callback_metrics={}, precision="32-true", world_size=1, global_step=3)
    options = Sampling(stop_strings=["a"]), [Path("x"), ("y", None)], torch.optim.SGD
    card = card_text(model_card(trainer, AnyStage(object(), np.float64(0.5), *options)))
    settings = yaml.safe_load(card.split("```yaml\n")[1].partition("```")[0])["module"]
    assert (settings["engine"], settings["share"], settings["paths"]) == ("object", 0.5, ["x", ["y", None]])
    assert settings["sampling"]["stop_strings"] == ["a"]


@pytest.mark.parametrize("has_template", [True, False])
def test_the_card_of_a_reward_model_says_where_its_score_is_read(has_template):
    trainer = SimpleNamespace(callback_metrics={}, precision="32-true", world_size=1, global_step=3)
    module = RewardModule("lm")
    module.tokenizer = tiny_tokenizer(chat_template=has_template)
    assert ("the score is read one token late" in card_text(model_card(trainer, module))) == has_template


def test_the_model_card_names_base_model_data_and_settings(model, tmp_path):
    fit(model, tmp_path, HFExport())
    card = (tmp_path / "export" / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["base_model"] == str(model)
    settings, metrics = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", body, flags=re.DOTALL))
    assert settings["module"]["optimizer"]["class"] == "AdamW"
    assert settings["module"]["optimizer"]["lr"] == 0.01
    assert settings["module"]["sampling"]["max_new_tokens"] == 4
    assert settings["data"]["max_length"] == 64
    assert len(settings["data"]["data"]) == 8
    assert settings["trainer"] == {"precision": "32-true", "world_size": 1}
    assert set(metrics) >= {"train/loss", "val/loss"}
    assert "after 4 optimizer" in body
    assert "0x" not in card


class Own(Source):
    """Data of a class of somebody's own."""

    name = "mine"

    def open(self) -> Any: ...


class Given:
    """A data module that keeps what it was given."""

    def __init__(self, data: Any) -> None:
        self.data = data


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (HelpfulHarmless("hh.jsonl"), "HelpfulHarmless hh.jsonl"),
        (Blend([Table("a.jsonl"), Own()], [1.0, 0.5]), "Blend a.jsonl + mine"),
        ([Path("a.jsonl"), Path("b.jsonl")], ["a.jsonl", "b.jsonl"]),
        ({"prompt": ["x"]}, {"prompt": ["x"]}),
        (Dataset.from_dict({"prompt": ["x"]}), "Dataset"),
    ],
)
def test_the_model_card_names_settings_that_are_objects(model, data, said):
    module = PPOModule(str(model), share_of_letters, engine=partial(TransformersEngine, compiled=False))
    module.engine = TransformersEngine(module, None)  # as a rollout leaves it
    trainer = SimpleNamespace(
        datamodule=Given(data),
        precision="32-true",
        world_size=1,
        callback_metrics={},
        global_step=0,
    )
    settings = yaml.safe_load(card_text(model_card(trainer, module)).split("```")[1].removeprefix("yaml"))
    assert settings["data"]["data"] == said
    assert settings["module"]["engine"] == "TransformersEngine"
    assert settings["module"]["reward"] == "share_of_letters"


def test_bfloat16_is_what_is_written_and_tied_weights_stay_tied(model, tmp_path):
    module = fit(model, tmp_path, HFExport(dtype="bfloat16"))
    weights = load_file(tmp_path / "export" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in weights
    trained = module.export_model.state_dict()
    assert trained["model.norm.weight"].dtype == torch.float32
    assert torch.equal(weights["model.norm.weight"], trained["model.norm.weight"].bfloat16())


def test_a_large_model_is_written_in_several_files(model, tmp_path):
    module = fit(model, tmp_path, HFExport(max_shard_size="10KB"))
    folder = tmp_path / "export"
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert {path.name for path in folder.glob("*.safetensors")} == {*index.values()}
    assert len({*index.values()}) > 1
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in module.export_model.state_dict().items())


def test_a_size_of_files_that_is_none_is_refused():
    with pytest.raises(UserError, match="HFExport: max_shard_size is '5 GiB'; give bytes, or a number with KB, MB"):
        HFExport(max_shard_size="5 GiB")


def test_folders_beside_checkpoints_hold_the_weights_of_that_step_and_go_with_them(model, tmp_path):
    fit(model, tmp_path, HFExport(with_checkpoints=True), steps=5)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    checkpoints = {name for name in names if name.endswith(".ckpt")}
    assert checkpoints == {"step=step=4.ckpt", "last.ckpt"}
    assert names - checkpoints == {name.replace(".ckpt", "-hf") for name in checkpoints}
    for name in checkpoints:
        saved = torch.load(tmp_path / "checkpoints" / name, weights_only=True)["state_dict"]
        beside = load_file(tmp_path / "checkpoints" / name.replace(".ckpt", "-hf") / "model.safetensors")
        assert all(torch.equal(saved[f"model.{key}"], tensor) for key, tensor in beside.items())


def test_a_checkpoint_of_an_earlier_run_gets_no_folder(model, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "earlier.ckpt").write_bytes(b"")
    fit(model, tmp_path, HFExport(with_checkpoints=True), steps=3)
    assert (tmp_path / "checkpoints" / "last-hf").is_dir()
    assert not (tmp_path / "checkpoints" / "earlier-hf").exists()


def test_a_copy_beside_the_checkpoints_is_kept_and_a_folder_goes_with_its_checkpoint(model, tmp_path):
    fit(model, tmp_path, HFExport(with_checkpoints=True), steps=2)
    shutil.copytree(tmp_path / "checkpoints" / "last-hf", tmp_path / "checkpoints" / "mine-hf")
    fit(model, tmp_path, HFExport(with_checkpoints=True), steps=4, ckpt_path="last")
    assert {path.name for path in (tmp_path / "checkpoints").glob("*-hf")} == {"step=step=4-hf", "last-hf", "mine-hf"}


def test_somebody_elses_folder_is_refused_before_training_and_left_alone(model, tmp_path):
    thesis = tmp_path / "export" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("three years of work")
    with pytest.raises(UserError, match="exists and is not an export of this package"):
        fit(model, tmp_path, HFExport())
    assert [path.name for path in thesis.parent.iterdir()] == ["thesis.txt"]
    assert not (tmp_path / "checkpoints").exists()


class SmallFiles(pl.Callback):
    """From the end of training on no file may become as large as the model's weights."""

    def __init__(self, size: int) -> None:
        self.size = size

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_an_export_that_fails_leaves_the_earlier_one_whole(model, tmp_path):
    fit(model, tmp_path, HFExport())
    before = {path.name: path.read_bytes() for path in (tmp_path / "export").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises((OSError, SafetensorError), match="File too large"):
            fit(model, tmp_path, SmallFiles(len(before["model.safetensors"]) - 1), HFExport())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in (tmp_path / "export").iterdir()} == before
    assert sorted(path.name for path in tmp_path.glob("export*")) == ["export"]


def test_a_fast_dev_run_exports_nothing(model, tmp_path):
    fit(model, tmp_path, HFExport(), fast_dev_run=1)
    assert not (tmp_path / "export").exists()


def test_an_unknown_dtype_is_refused():
    with pytest.raises(UserError, match="dtype 'bf17' is unknown; use auto, float32, bfloat16 or float16"):
        HFExport(dtype="bf17")


def test_samples_are_written_at_the_start_and_at_each_validation(model, tmp_path):
    fit(model, tmp_path, SampleTexts(PROMPTS))
    text = (tmp_path / "samples.md").read_text()
    assert re.findall(r"^## Step (\d+)$", text, flags=re.MULTILINE) == ["0", "2", "4"]
    assert text.count("> Human: how do i bake bread?\n>\n> Assistant:\n\n```text\n") == 3
    assert text.count("> Once upon\n\n```text\n") == 3
    assert text.count("```") == 2 * 2 * 3
    events = EventAccumulator(str(tmp_path)).Reload()
    logged = events.Tensors("samples/text_summary")
    assert [event.step for event in logged] == [0, 2, 4]
    assert logged[0].tensor_proto.string_val[0].decode() in text


@pytest.mark.parametrize(("steps", "taken"), [(3, ["0", "2", "3"]), (1, ["0", "1"])])
def test_the_last_state_is_sampled_where_no_validation_comes_last(model, tmp_path, steps, taken):
    fit(model, tmp_path, SampleTexts(PROMPTS), steps=steps)
    assert re.findall(r"^## Step (\d+)$", (tmp_path / "samples.md").read_text(), flags=re.MULTILINE) == taken


def test_a_resumed_run_samples_its_last_state_and_none_twice(model, tmp_path):
    for steps, ckpt_path in ((2, None), (2, "last"), (3, "last"), (3, "last")):
        fit(model, tmp_path, SampleTexts(PROMPTS), steps=steps, ckpt_path=ckpt_path)
    assert re.findall(r"^## Step (\d+)$", (tmp_path / "samples.md").read_text(), flags=re.MULTILINE) == ["0", "2", "3"]


def test_samples_differ_only_by_what_was_learnt(model, tmp_path):
    frozen = [SampleTexts(PROMPTS, path=str(tmp_path / name)) for name in ("one.md", "two.md")]
    fit(model, tmp_path, *frozen)
    assert (tmp_path / "one.md").read_text() == (tmp_path / "two.md").read_text()


def test_training_is_the_same_with_and_without_samples(model, tmp_path):
    watched = fit(model, tmp_path / "watched", SampleTexts(PROMPTS), HFExport())
    alone = fit(model, tmp_path / "alone")
    for name, tensor in alone.state_dict().items():
        assert torch.equal(watched.state_dict()[name], tensor), name


def test_an_answer_cannot_break_out_of_its_fence():
    section = sample_section("so?\n\n# Step 8", "## Step 9\n````\n")
    assert section == "> so?\n>\n> # Step 8\n\n`````text\n## Step 9\n````\n`````"


def test_sample_texts_without_prompts_are_refused():
    with pytest.raises(UserError, match="prompts is empty"):
        SampleTexts([])
