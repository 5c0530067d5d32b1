"""A run whose decoding is compiled ends, resumed, where the undisturbed one ends, bit for bit.

What is compiled for is the largest batch so far, and rounding depends on it; so it does on whether it was given up: of
more than eight rows attention is computed in groups where nothing is compiled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from helpers.compiling import count_compiling, use_backend
from helpers.stages import adamw, disturb_random_numbers, fit, prompt_rows, save_llama, share_of_letters, words
from helpers.torture import CLOCK, differences
from rlhf_lightning import PPOModule, PromptDataModule, Sampling
from rlhf_lightning.generation import compiled_step

EPOCHS, BATCHES, WINDOW = 2, 4, 40
CUT_AFTER = 2, 5
"""Steps, before and after the cache has grown."""
LONG = 40
"""The row of the one long prompt."""


@pytest.fixture(params=["traced", pytest.param("generated code", marks=pytest.mark.long), "window", "no compiler"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model. One sees a window, and decodes as it is once a cache is longer; one is never compiled."""
    folder = save_llama(tmp_path / "model", layers=1)
    if request.param == "no compiler":
        use_backend(monkeypatch, broken)
    elif request.param != "generated code":
        count_compiling(monkeypatch)
    if request.param == "window":
        plain = AutoModelForCausalLM.from_pretrained(folder)
        settings = {k: v for k, v in plain.config.to_dict().items() if k not in ("model_type", "architectures")}
        model = MistralForCausalLM(MistralConfig(**settings, sliding_window=WINDOW))
        model.load_state_dict(plain.state_dict())
        model.save_pretrained(folder)
    return folder


def broken(graph: Any, inputs: Any) -> Any:
    raise OSError("no compiler here")


def run(folder: str, checkpoints: Path | None = None, resumed: Path | None = None) -> dict[str, Any]:
    """Fit with fresh objects and other global random numbers; all that it logs and ends with."""
    disturb_random_numbers(1 if resumed is None else 2)
    module = PPOModule(
        folder,
        share_of_letters,
        sampling=Sampling(max_new_tokens=6),
        rollout_batch_size=12,
        minibatch_size=12,
        ppo_epochs=1,
        optimizer=adamw(1e-2),
        compile_decoding=True,
    )
    rows = [{"prompt": f"{row} {words(9 if row == LONG else 1 + row % 2, row)}"} for row in range(12 * BATCHES)]
    data = PromptDataModule(folder, rows, validation_data=prompt_rows(3), rollout_batch_size=12, max_prompt_length=50)
    saver = (
        None if checkpoints is None else ModelCheckpoint(checkpoints, "{step}", every_n_train_steps=1, save_top_k=-1)
    )
    log = fit(
        module,
        data,
        max_epochs=EPOCHS,
        val_check_interval=2,
        callbacks=[] if saver is None else [saver],
        enable_checkpointing=saver is not None,
        ckpt_path=resumed,
    )
    logged = {name: log.series(name) for call in log.calls for name in call if not any(word in name for word in CLOCK)}
    assert module.trainer.global_step == EPOCHS * BATCHES
    return {"logged": logged, "weights": module.state_dict(), "state": module.run_state()}


def test_from_every_checkpoint_it_ends_as_if_it_had_not_been_cut(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_step, "COLUMNS", 4)
    monkeypatch.setattr(compiled_step, "GROWTH", 1.2)
    whole = run(folder, checkpoints=tmp_path)
    saved = [torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["rlhf_lightning"] for step in CUT_AFTER]
    assert saved[0]["not_compiled"] or saved[0]["compiled_step"] < saved[1]["compiled_step"], "nothing to remember"

    for step in CUT_AFTER:
        found = run(folder, resumed=tmp_path / f"step={step}.ckpt")
        assert not differences(found["weights"], whole["weights"])
        assert found["state"] == whole["state"]
        for name, series in whole["logged"].items():
            # The checkpoint was saved before its step was logged and validated.
            assert found["logged"].get(name, []) == series[len(series) - len(found["logged"].get(name, [])) :], name
            if name.startswith("train/"):
                assert found["logged"][name] == series[step - 1 :], name
