"""`rlhf export --part value`: PPO's value model as a folder that a reward model is loaded from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.export_runs import run
from helpers.stages import save_llama, save_reward_model, share_of_letters
from rlhf_lightning import UserError, load_reward_model
from rlhf_lightning.cli.export import export

LORA = {"mode": "lora", "rank": 2}
ADAPTER = {**LORA, "export": "adapter"}
REWARD, FUNCTION = "reward", share_of_letters
RUNS: dict[str, dict[str, Any]] = {
    "all": {"reward": REWARD},
    "adapter": {"reward": REWARD, **ADAPTER},
    "lora, a function": {"reward": FUNCTION, **LORA},
    "all, a function": {"reward": FUNCTION},
    "lora, an adapter on the policy": {"reward": "reward-adapter", **LORA},
    "adapter, an adapter on the policy": {"reward": "reward-adapter", **ADAPTER},
    "all, an adapter": {"reward": "reward-adapter"},
    "frozen in bfloat16": {"reward": REWARD, "options": {"frozen_dtype": "bfloat16"}, **LORA},
    "named": {"reward": FUNCTION, "options": {"value_name_or_path": REWARD}},
    "trunk": {"reward": REWARD, "options": {"value_trunk": "policy"}},
}
REFUSED = ("trunk",)
UNCALIBRATED = ("lora, a function", "all, a function")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, a reward model, one that is an adapter, and what is run on them."""
    root = tmp_path_factory.mktemp("shelf")
    save_reward_model(root / "reward", save_llama(root / "lm"))
    run("auto", str(root / "lm"), str(root / "of the adapter"), "reward", **ADAPTER)
    (root / "of the adapter" / "export").rename(root / "reward-adapter")
    return root


def trained(shelf: Path, name: str) -> Path:
    root = shelf / name
    if not root.exists():
        given = dict(RUNS[name])
        reward, options = given.pop("reward"), dict(given.pop("options", {}))
        if "value_name_or_path" in options:
            options["value_name_or_path"] = str(shelf / options["value_name_or_path"])
        reward = str(shelf / reward) if isinstance(reward, str) else reward
        run("auto", str(shelf / "lm"), str(root), "ppo", reward=reward, options=options, **given)
    return root


def last(root: Path) -> str:
    return str(root / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize("name", [name for name in RUNS if name not in REFUSED])
def test_it_is_the_value_model_of_the_run(shelf, tmp_path, name):
    root = trained(shelf, name)
    export(last(root), str(tmp_path / "out"), part="value")
    (found,), (expected,) = ((folder.glob("*.safetensors")) for folder in (tmp_path / "out", root / "value"))
    assert found.name == expected.name
    assert found.read_bytes() == expected.read_bytes()
    value = load_reward_model(tmp_path / "out")
    assert value.calibration.std == (1 if name in UNCALIBRATED else value.calibration.std)
    assert value.calibration.probe_ids == []
    assert value.model.config.pad_token_id not in (None, value.model.config.eos_token_id)
    before = load_reward_model(shelf / "reward") if "reward" in str(RUNS[name]["reward"]) else None
    if before is not None and "adapter" not in name:
        assert value.calibration.std == before.calibration.std == 2
        assert not torch.equal(value.model.score.weight, before.model.score.weight)


def test_the_card_says_which_model_it_is(shelf, tmp_path):
    export(last(trained(shelf, "all")), str(tmp_path / "out"), part="value")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "stage `PPOWithExportedValue value model`" in card
    assert f"started from `{shelf / 'reward'}`" in card


def test_a_value_model_that_was_moved_is_found_by_base(shelf, tmp_path):
    root = trained(shelf, "all")
    with pytest.raises(UserError, match="name a folder that is there"):
        export(last(root), str(tmp_path / "out"), base=str(tmp_path / "gone"), part="value")
    (tmp_path / "moved").symlink_to(shelf / "reward")
    export(last(root), str(tmp_path / "out"), base=str(tmp_path / "moved"), part="value")
    assert load_file(tmp_path / "out" / "model.safetensors")


def test_what_has_no_value_model_of_its_own_is_refused(shelf, tmp_path):
    with pytest.raises(UserError, match=r"a value head on the policy's own hidden states \(value_trunk: policy\)"):
        export(last(trained(shelf, "trunk")), str(tmp_path / "out"), part="value")
    with pytest.raises(UserError, match="holds no value model: only PPO trains one; leave out --part value"):
        export(last(shelf / "of the adapter"), str(tmp_path / "out"), part="value")
    content = torch.load(last(trained(shelf, "all")), weights_only=True)
    del content["rlhf_lightning"]["export"]["value"]
    torch.save(content, tmp_path / "older.ckpt")
    with pytest.raises(UserError, match="did not say what its value model began as"):
        export(str(tmp_path / "older.ckpt"), str(tmp_path / "out"), part="value")
    assert not (tmp_path / "out").exists()
