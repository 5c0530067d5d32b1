"""The Python of the README runs as it stands there, and its exports say the same in plain transformers and here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from transformers import AutoTokenizer

from helpers.cli_runs import save_model, save_pairs
from rlhf_lightning import HFExport, PreferenceDataModule, PromptDataModule, RewardModule

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
TRAIN, GENERATE, SCORE, CALIBRATED, FUNCTION = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
QUIET |= {"enable_progress_bar": False, "enable_model_summary": False}


def run(code: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run a block; what the tiny model cannot take is given shorter limits."""
    names = {} if names is None else names
    code = code.replace('"dialogues.jsonl")', '"dialogues.jsonl", max_length=96)')
    code = code.replace("rollout_batch_size=16)", "rollout_batch_size=16, max_prompt_length=32)")
    exec(compile(code, "README.md", "exec"), names)
    return names


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with `MODEL`, files of rows, and what each stage exports."""
    folder = tmp_path_factory.mktemp("readme")
    save_model(folder / "MODEL")
    save_pairs(folder / "dialogues.jsonl")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{i}: bake"}) + "\n" for i in range(20)))
    return folder


@pytest.fixture(autouse=True)
def _in_the_folder(exports: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(exports)
    fresh = pl.Trainer
    monkeypatch.setattr(pl, "Trainer", lambda **settings: fresh(**QUIET | settings))


def test_the_five_lines_train_and_export_and_plain_transformers_answers(exports, capsys):
    assert len([line for line in TRAIN.splitlines() if line]) <= 5
    run(TRAIN)
    names = run(GENERATE.replace("runs/ppo/export", "runs/sft/export"))
    assert capsys.readouterr().out == names["tokenizer"].decode(names["answer"], skip_special_tokens=True) + "\n"
    assert 0 < len(names["answer"]) <= 64


def test_a_chat_template_is_asked_as_the_data_modules_ask_it(tmp_path):
    folder = save_model(tmp_path / "chat", chat_template=True)
    (asked,) = re.findall(r"`(tokenizer\.apply_chat_template\([^`]*add_generation_prompt[^`]*)`", README)
    messages = [{"role": "user", "content": "how do i bake bread?"}]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = eval(asked, {"tokenizer": tokenizer, "messages": messages})
    data = PromptDataModule(
        str(folder), [{"prompt": messages}], rollout_batch_size=1, max_prompt_length=64, validation_split=0.0
    )
    data.prepare_data()
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert torch.equal(prompt["input_ids"], batch.prompt_ids)


def test_scores_in_plain_transformers_and_here_differ_by_the_calibration(exports, capsys):
    data = PreferenceDataModule("MODEL", "dialogues.jsonl", max_length=96, validation_split=0.25)
    pl.Trainer(max_steps=2, callbacks=[HFExport("runs/reward/export")]).fit(RewardModule("MODEL"), data)
    names = run(SCORE)
    (raw,) = names["model"](**names["batch"]).logits[:, 0].tolist()
    (calibrated,) = run(CALIBRATED, names)["scores"].tolist()
    kept = names["model"].config.reward_calibration
    assert kept["std"] != 1.0
    assert calibrated == pytest.approx((raw - kept["mean"]) / kept["std"], abs=1e-3)
    assert torch.isfinite(torch.tensor(raw))


def test_the_function_reward_trains_a_policy(exports):
    run(FUNCTION.replace("runs/sft/export", "MODEL"))
    assert (exports / "runs" / "polite" / "config.json").exists()
