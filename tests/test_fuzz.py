"""Whatever is typed, and whatever a disk, a transfer or an enemy made of a file: one line that says what is wrong.

Never a traceback, never an end that does not come, never memory without bounds, never a success that is none. The suite
draws the same 500 cases every time; `make fuzz CASES=10000` draws as many anew.
"""

from __future__ import annotations

import json
import os
import shutil

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.cli_runs import save_model, save_pairs, save_rows
from helpers.damage import WRONG, bounded, damage, values
from helpers.models import save_folder, tiny_causal_lm, tiny_classifier
from helpers.preparing import build, preparation
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.cli.main import COMMANDS, STAGE_COMMANDS, main
from rlhf_lightning.cli.recipes import RECIPES, read_config, recipe_names
from rlhf_lightning.cli.short_help import short_help
from rlhf_lightning.data.preparing.cache import find_or_build
from rlhf_lightning.data.preparing.given import open_tokens
from rlhf_lightning.data.preparing.prepared import PreparedFolder
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.results import RESULTS, Evaluation
from rlhf_lightning.models.causal_lm import load_causal_lm
from rlhf_lightning.models.scalar_lm import load_reward_model
from rlhf_lightning.models.tokenizer import load_tokenizer
from rlhf_lightning.report.run import read_run
from rlhf_lightning.runs.checkpoint_files import check_whole

CASES = int(os.environ.get("CASES", "500"))
ROWS = [
    {"chosen": f"\n\nHuman: why {i}?\n\nAssistant: so", "rejected": f"\n\nHuman: why {i}?\n\nAssistant: no"}
    for i in range(8)
]


def cases(share: float):
    """So many of all cases."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(max_examples=max(1, round(CASES * share)), suppress_health_check=checks, deadline=None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Files of every kind, as they should be."""
    root = tmp_path_factory.mktemp("whole")
    save_folder(root / "lm", tiny_causal_lm(), tiny_tokenizer())
    save_folder(root / "reward", tiny_classifier(), tiny_tokenizer())
    build(root / "prepared", ROWS)
    find_or_build(preparation(ROWS, kinds=("finetune",)), root / "cache")
    save_rows(root / "rows.jsonl", ROWS)
    (root / "rows.json").write_text(json.dumps(ROWS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), root / "rows.parquet")
    (root / "rows.csv").write_text("prompt,response\n" + "".join(f'"why {i}?","so, ""{i}"""\n' for i in range(8)))
    datasets.Dataset.from_list(ROWS).save_to_disk(root / "saved")
    (root / "legacy").mkdir()
    rows = [{"prompt_len": 3, "input_ids": torch.tensor([30 + i, 31, 32, 33])} for i in range(8)]
    torch.save(rows, root / "legacy" / "finetune_train.pt")
    torch.save({"state_dict": {"w": torch.ones(9)}, "pytorch-lightning_version": "2.6.6", "epoch": 0}, root / "a.ckpt")
    (root / "run").mkdir()
    Evaluation({"seed": 1}).save(root / "run")
    (root / "run" / "config.yaml").write_text((RECIPES / "sft.yaml").read_text())
    (root / "run" / "metrics.csv").write_text("step,train/loss\n1,2.0\n2,1.5\n")
    return root


def spoilt(data, whole, tmp_path_factory, name):
    """A copy of some of these, of which one file is damaged."""
    copy = tmp_path_factory.mktemp("spoilt") / name
    (shutil.copytree if (whole / name).is_dir() else shutil.copyfile)(whole / name, copy)
    files = sorted(path for path in copy.rglob("*") if path.is_file()) if copy.is_dir() else [copy]
    damage(data.draw, data.draw(st.sampled_from(files)))
    return copy


def attempt(call, *args, **kwargs):
    """What a call gives, or None where it says in one line why it does not."""
    try:
        with bounded(seconds=30, gigabytes=6):
            return call(*args, **kwargs)
    except UserError:
        return None


@cases(0.2)
@given(st.data())
def test_data_files(whole, tmp_path_factory, data):
    name = data.draw(st.sampled_from(["rows.jsonl", "rows.json", "rows.parquet", "rows.csv", "saved"]))
    path = spoilt(data, whole, tmp_path_factory, name)
    folder = attempt(
        build, path.parent / "prepared", str(path), on_bad_row=data.draw(st.sampled_from(["auto", "skip"]))
    )
    if folder is not None:
        counts = folder.manifest["sources"]["data"]["counts"]
        dropped = sum(count for reason, count in counts.items() if reason.startswith("dropped: "))
        assert counts["rows"] == counts["kept"] + dropped
        assert counts["kept"] > 0


@cases(0.2)
@given(st.data())
def test_prepared_folders(whole, tmp_path_factory, data):
    path = spoilt(data, whole, tmp_path_factory, "prepared")
    folder = attempt(open_tokens, path, "preference", ChatEncoder(tiny_tokenizer()), 64, False, path.parent / "cache")
    if folder is not None:
        expected = PreparedFolder.open(whole / "prepared")
        assert folder.manifest == expected.manifest
        for name in folder.manifest["parts"]:
            assert (path / name).read_bytes() == (whole / "prepared" / name).read_bytes()


@cases(0.06)
@given(st.data())
def test_folders_of_earlier_versions_whose_manifest_proves_nothing(whole, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("spoilt") / "prepared"
    shutil.copytree(whole / "prepared", path)
    table = path / "preference_train.arrow"
    size = table.stat().st_size
    damage(data.draw, table)
    table.write_bytes(table.read_bytes()[:size].ljust(size, b"\0"))
    said = json.loads((path / "manifest.json").read_text())
    del said["crc32"]
    said["parts"] = {name: {"rows": part["rows"], "bytes": part["bytes"]} for name, part in said["parts"].items()}
    (path / "manifest.json").write_text(json.dumps(said))
    folder = attempt(open_tokens, path, "preference", ChatEncoder(tiny_tokenizer()), 64, False, path.parent / "cache")
    if folder is not None:
        for pair in folder.part("preference", "train"):
            for ids in (pair.chosen_ids, pair.rejected_ids):
                assert np.all((ids >= 0) & (ids < len(tiny_tokenizer())))


@pytest.mark.filterwarnings("ignore:the cache entry is made anew")
@cases(0.1)
@given(st.data())
def test_caches_are_mended(whole, tmp_path_factory, data):
    cache = spoilt(data, whole, tmp_path_factory, "cache")
    folder = attempt(find_or_build, preparation(ROWS, kinds=("finetune",)), cache)
    assert folder is not None
    expected = find_or_build(preparation(ROWS, kinds=("finetune",)), whole / "cache")
    assert [row.ids.tolist() for row in folder.part("finetune", "train")] == [
        row.ids.tolist() for row in expected.part("finetune", "train")
    ]


@cases(0.08)
@given(st.data())
def test_legacy_folders(whole, tmp_path_factory, data):
    path = spoilt(data, whole, tmp_path_factory, "legacy")
    if data.draw(st.booleans()):
        rows = torch.load(whole / "legacy" / "finetune_train.pt")
        rows[data.draw(st.integers(0, 7))][data.draw(st.sampled_from(["prompt_len", "input_ids"]))] = data.draw(WRONG)
        torch.save(rows, path / "finetune_train.pt")
    folder = attempt(open_tokens, path, "finetune", ChatEncoder(tiny_tokenizer()), 64, False, path.parent / "cache")
    if folder is not None:
        table = folder.part("finetune", "train")
        assert all(0 <= row.ids.min(initial=0) <= row.ids.max(initial=0) < len(tiny_tokenizer()) for row in table)


@cases(0.1)
@given(st.data())
def test_checkpoints(whole, tmp_path_factory, data):
    path = spoilt(data, whole, tmp_path_factory, "a.ckpt")
    if attempt(lambda: check_whole(path) or True):
        loaded = torch.load(path, weights_only=True)
        assert torch.equal(loaded["state_dict"]["w"], torch.ones(9))


@cases(0.1)
@given(st.data())
def test_model_folders(whole, tmp_path_factory, data):
    name, load = data.draw(st.sampled_from([("lm", load_causal_lm), ("reward", load_reward_model)]))
    path = spoilt(data, whole, tmp_path_factory, name)
    model, tokenizer = attempt(load, path), attempt(load_tokenizer, path)
    if model is not None and tokenizer is not None:
        attempt(ChatEncoder, tokenizer)


@cases(0.04)
@given(st.data())
def test_folders_of_runs(whole, tmp_path_factory, data):
    path = spoilt(data, whole, tmp_path_factory, "run")
    attempt(read_run, path)
    attempt(Evaluation.read, path / RESULTS)


@cases(0.06)
@given(st.data())
def test_configs(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("config") / "given.yaml"
    config = yaml.safe_load((RECIPES / data.draw(st.sampled_from(["sft.yaml", "ppo.yaml", "data.yaml"]))).read_text())
    if data.draw(st.booleans()):
        path.write_text(json.dumps(config))
        damage(data.draw, path)
    else:
        key = data.draw(st.sampled_from([*config, "other"]))
        config[key] = data.draw(WRONG | values)
        path.write_text(yaml.safe_dump(config))
    if attempt(read_config, str(path)) is not None:
        assert outcome(["fit", "--config", str(path), "--help"]) in (0, 2)


WORDS = st.sampled_from(
    [
        *STAGE_COMMANDS,
        *COMMANDS,
        *recipe_names(),
        "--config",
        "-c",
        "--help",
        "--data.data",
        "--model",
        "--data",
        "--trainer",
    ]
)
OPTIONS = st.sampled_from(
    [
        "--model.optimizer.lr",
        "--model.micro_batch_size",
        "--model.finetune.mode",
        "--model.sampling.top_p",
        "--data.data",
        "--data.max_length",
        "--data.num_workers",
        "--data.columns",
        "--trainer.callbacks",
        "--trainer.devices",
        "--trainer.max_steps",
        "--trainer.precision",
        "--ckpt_path",
        "--seed_everything",
        "--overwrite",
    ]
)
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
VALUES = (
    TEXTS
    | st.integers().map(str)
    | st.floats().map(str)
    | values.map(repr)
    | st.sampled_from(["[" * 9999, "x" * 5000, "null"])
)


def outcome(words):
    """The exit code of the command line."""
    try:
        with bounded(seconds=60, gigabytes=6):
            main(words)
    except SystemExit as end:
        return end.code if end.code is not None else 0
    return 0


@pytest.fixture
def _nothing_runs(monkeypatch, tmp_path):
    """The command line up to where it begins to work."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLHF_DEBUG", "")
    monkeypatch.setattr("rlhf_lightning.cli.stages.run_stage", lambda command, options: short_help(command, options))
    monkeypatch.setattr("rlhf_lightning.cli.main.COMMANDS", {})


@pytest.mark.usefixtures("_nothing_runs")
@cases(0.04)
@given(words=st.lists(WORDS | TEXTS | st.tuples(OPTIONS, VALUES).map("=".join), max_size=6))
def test_words(capsys, words):
    capsys.readouterr()
    code = outcome(["fit", *words] if len(words) % 2 else words)
    said = capsys.readouterr().err
    assert code in (0, 2), said
    assert "Traceback" not in said
    assert code == 0 or said.splitlines()[-1].startswith("error: ")


@pytest.fixture
def _in_a_folder(monkeypatch, tmp_path):
    save_model(tmp_path / "lm")
    save_pairs(tmp_path / "pairs.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["rlhf"])
    monkeypatch.setenv("RLHF_DEBUG", "")


@pytest.mark.usefixtures("_in_a_folder")
@cases(0.02)
@given(option=OPTIONS, value=VALUES)
def test_options(capsys, option, value):
    capsys.readouterr()
    words = ["--model.model_name_or_path=lm", "--data.data=pairs.jsonl", f"{option}={value}", "--print_config"]
    code = outcome(["fit", "--config=sft.yaml", *words])
    said = capsys.readouterr().err
    assert code in (0, 2), said
    assert "Traceback" not in said
    assert code == 0 or said.splitlines()[-1].startswith("error: ")
