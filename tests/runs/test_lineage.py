"""Records of where a model comes from: what they hold, what their hashes see, and how they are read again."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rlhf_lightning import UserError
from rlhf_lightning.runs import lineage
from rlhf_lightning.runs.lineage import (
    FILE,
    TRAINED_ON,
    all_trained_on,
    folder_of,
    git_revision,
    hash_of_record,
    hash_of_weights,
    is_ours,
    model_of,
    new_record,
    read_record,
    read_trained_on,
    write_record,
)

LARGE = (5, 2**21)  # float32: 40 MiB, which hold three of the blocks that are looked at


def tensors() -> dict[str, torch.Tensor]:
    return {"a": torch.zeros(LARGE), "small": torch.zeros(8), "z": torch.zeros(8)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    save_file(tensors(), folder / "model.safetensors")
    return folder


def test_the_hash_is_of_the_weights_and_neither_of_the_place_nor_of_what_lies_beside(weights, tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert hash_of_weights(tmp_path) == hash_of_weights(weights)


@pytest.mark.parametrize(("name", "place"), [("small", 3), ("z", 0), ("a", (0, 0)), ("a", (2, 16))])
def test_the_hash_sees_a_change_in_any_tensor(weights, tmp_path, name, place):
    changed = tensors()
    changed[name][place] = 1.0
    save_file(changed, tmp_path / "model.safetensors")
    assert hash_of_weights(tmp_path) != hash_of_weights(weights)


@pytest.mark.parametrize("other", [{"b": torch.zeros(8)}, {"a": torch.zeros(4, 2)}, {"a": torch.zeros(8).half()}])
def test_the_hash_sees_names_shapes_and_types(tmp_path, other):
    for folder, content in (("first", {"a": torch.zeros(8)}), ("second", other)):
        (tmp_path / folder).mkdir()
        save_file(content, tmp_path / folder / "model.safetensors")
    assert hash_of_weights(tmp_path / "first") != hash_of_weights(tmp_path / "second")


def test_a_file_of_another_kind_is_read_at_fixed_places(tmp_path):
    for name, place in (("first", None), ("second", 3), ("third", lineage._STRIDE + 1), ("unseen", 10_000)):
        (tmp_path / name).mkdir()
        with (tmp_path / name / "pytorch_model.bin").open("wb") as file:
            file.truncate(2 * lineage._STRIDE)
            if place is not None:
                file.seek(place)
                file.write(b"x")
    first, second, third, unseen = (hash_of_weights(tmp_path / n) for n in ("first", "second", "third", "unseen"))
    assert len({first, second, third}) == 3
    assert unseen == first  # as its documentation says


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]", b'\x09\0\0\0\0\0\0\0{"a": 1} ']
)
def test_a_broken_file_has_a_hash_too(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert hash_of_weights(tmp_path) is not None


def test_a_folder_without_weights_has_none(tmp_path):
    assert hash_of_weights(tmp_path) is None
    assert folder_of("/nowhere/at/all") is None
    assert folder_of("owner/that-nobody-has") is None
    assert model_of(str(tmp_path)) == {"name": str(tmp_path), "weights": None}


def test_a_model_of_the_hub_is_found_in_its_cache(weights, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "a1b2"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a1b2")
    (snapshot / "config.json").write_text("{}")
    os.link(weights / "model.safetensors", snapshot / "model.safetensors")
    monkeypatch.setattr(
        lineage, "try_to_load_from_cache", lambda name, file: lineage_cache(name, file, cache_dir=tmp_path)
    )
    assert model_of("owner/name") == {"name": "owner/name", "weights": hash_of_weights(weights)}


lineage_cache = lineage.try_to_load_from_cache


def test_a_record_is_the_same_each_time_and_comes_back_as_it_was(tmp_path):
    record = new_record(
        "SFTModule", {"model": {"name": "a", "weights": "1"}}, data={"splits": {"sft": 0.5}, "n": (1, 2)}
    )
    again = new_record(
        "SFTModule", {"model": {"name": "a", "weights": "1"}}, data={"splits": {"sft": 0.5}, "n": (1, 2)}
    )
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record == again
    assert record["versions"].keys() == {"rlhf_lightning", "torch", "transformers", "pytorch_lightning", "python"}
    assert all(type(version) is str for version in record["versions"].values())  # a checkpoint holds plain data only
    assert is_ours(tmp_path)


def test_the_stages_before_are_kept_each_once_under_their_hash(tmp_path):
    sft = new_record("SFTModule", {})
    reward = new_record("RewardModule", {"model": {"name": "sft", "weights": "1", "lineage": sft}})
    models = {"model": {"name": "sft", "weights": "1", "lineage": sft}}
    ppo = new_record("PPOModule", {**models, "reward": {"name": "reward", "weights": "2", "lineage": reward}})
    assert ppo["models"]["model"] == {"name": "sft", "weights": "1", "made_by_stage": hash_of_record(sft)}
    assert {key: stage["stage"] for key, stage in ppo["stages"].items()} == {
        hash_of_record(sft): "SFTModule",
        hash_of_record(reward): "RewardModule",
    }
    assert all("stages" not in stage for stage in ppo["stages"].values())


def test_files_of_others_are_no_records(tmp_path):
    assert read_record(tmp_path) is None
    for text in ("{}", "[]", '{"made_by": "somebody"}'):
        (tmp_path / FILE).write_text(text)
        assert read_record(tmp_path) is None
        assert not is_ours(tmp_path)


@pytest.mark.parametrize("text", ["", "{", '{"made_by": "rlhf_lightning"}', "[" * 100_000, "\0"])
def test_a_damaged_record_is_one_line(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UserError, match=r"lineage\.json' .*export the model again, or remove the file") as error:
        read_record(tmp_path)
    assert "\n" not in str(error.value)
    assert not is_ours(tmp_path)


def test_prompts_of_all_stages_are_joined(tmp_path):
    for name, hashes in (("sft", [1, 5]), ("reward", [2, 5])):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / TRAINED_ON, np.array(hashes, np.uint64))
    names = [str(tmp_path / "sft"), str(tmp_path / "reward"), "owner/foreign"]
    joined = all_trained_on(iter(names), np.array([2**64 - 1, 2], np.uint64))
    assert joined.tolist() == [1, 2, 5, 2**64 - 1]
    assert joined.dtype == np.uint64


@pytest.mark.parametrize("content", [b"", b"x", np.array([1.5]), np.array([[1]], np.uint64), np.array([{}], object)])
def test_damaged_prompt_hashes_are_one_line(tmp_path, content):
    if isinstance(content, bytes):
        (tmp_path / TRAINED_ON).write_bytes(content)
    else:
        np.save(tmp_path / TRAINED_ON, content, allow_pickle=True)
    with pytest.raises(UserError, match=r"trained_on\.npy' .*export the model again, or remove the file"):
        read_trained_on(tmp_path)


def test_the_revision_is_that_of_the_working_folder(tmp_path):
    assert git_revision(str(tmp_path)) is None
    assert git_revision(str(tmp_path / "nowhere")) is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "a").write_text("1")
    for words in (["init", "-q"], ["add", "a"], ["commit", "-q", "-m", "a"], ["tag", "v1"]):
        subprocess.run([*git, *words], cwd=tmp_path / "repo", check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], cwd=tmp_path / "repo", capture_output=True, text=True).stdout
    (tmp_path / "repo" / "not-tracked").write_text("")  # as a run's own folder may be
    assert git_revision(str(tmp_path / "repo")) == head.strip()
    (tmp_path / "repo" / "a").write_text("2")
    git_revision.cache_clear()
    assert git_revision(str(tmp_path / "repo")) == f"{head.strip()}-dirty"


def test_a_record_is_readable_by_people(tmp_path):
    write_record(tmp_path, new_record("SFTModule", {}))
    text = (tmp_path / FILE).read_text()
    assert text.startswith('{\n  "git"')
    assert json.loads(text)["made_by"] == "rlhf_lightning"
