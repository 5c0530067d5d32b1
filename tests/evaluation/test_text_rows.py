"""Rows as texts are the rows of training: the same ones, on the same side of each split, and none lost in silence."""

from __future__ import annotations

import json

import numpy as np
import pytest

from helpers.stages import instruction_rows, preference_rows, prompt_rows, save_llama
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning import InstructionDataModule, PreferenceDataModule, PromptDataModule
from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.data.preparing.filters import Splits
from rlhf_lightning.data.sources import TLDR, Blend, Table
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.rows import read_rows

CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


KINDS = [
    (InstructionDataModule, "finetune", instruction_rows, {"max_length": 60}),
    (PreferenceDataModule, "preference", preference_rows, {"max_length": 60}),
    (PromptDataModule, "prompts", prompt_rows, {"rollout_batch_size": 1, "max_prompt_length": 40}),
]


@pytest.mark.parametrize(("kind", "need", "rows", "options"), KINDS)
@pytest.mark.parametrize("stages", [None, {"sft": 0.4, "reward": 0.3, "ppo": 0.3}])
def test_parts_are_those_of_training(folder, kind, need, rows, options, stages):
    data, splits = rows(90), Splits(0.2, 0.1, stages)
    module = kind(folder, data, validation_split=0.2, test_split=0.1, stage_split=stages, **options)
    module.setup()
    parts = module._parts
    for part in ("train", "validation", "test"):
        found = read_rows(data, need, part=part, splits=splits)
        assert [row.row for row in found] == parts[part].row_ids.tolist()
        assert found[0].written.prompt == data[found[0].row]["prompt"]


def test_a_split_that_the_data_bring_is_taken_whole(tmp_path):
    for split, count in (("train", 20), ("validation", 7)):
        lines = [json.dumps(row) for row in preference_rows(count)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    splits = Splits(0.5)
    assert len(read_rows(str(tmp_path), "preference", part="validation", splits=splits)) == 7
    assert len(read_rows(str(tmp_path), "preference", part="train", splits=splits)) == 20


def test_a_sample_is_spread_over_all_sources_and_the_same_each_time():
    blend = Blend([Table(preference_rows(200), name="a"), Table(preference_rows(200), name="b")])
    sample = read_rows(blend, "preference", num_samples=40)
    assert sample == read_rows(blend, "preference", num_samples=40)
    assert len({row.row for row in sample}) == 40
    assert [row.row for row in sample] == sorted(row.row for row in sample)
    counts = np.unique([row.source for row in sample], return_counts=True)
    assert counts[0].tolist() == ["a", "b"]
    assert min(counts[1]) > 10


@pytest.fixture
def lines(monkeypatch):
    """What is said in lines."""
    said = []
    monkeypatch.setattr("rlhf_lightning.evaluation.rows.rank_zero_info", said.append)
    return said


def test_what_is_left_out_is_said(lines):
    calls = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    rows = [
        {"prompt": CHAT, "chosen": [{"role": "assistant", "content": "yes"}], "rejected": "no"},
        {"prompt": CHAT, "chosen": [calls], "rejected": "no"},
    ]
    (row,) = read_rows(rows, "preference", on_bad_row="skip")
    assert (row.responses, row.written.prompt) == (("yes", "no"), CHAT)
    assert "rows 2, kept 1, dropped: response is more than text 1" in lines[0]


def test_a_prompt_is_asked_once(lines):
    assert len(read_rows({"prompt": ["hi", "ho", "hi"]}, "prompts")) == 2
    assert "prompt is a duplicate 1" in lines[0]


def test_the_space_before_a_summary_is_none_in_a_turn_of_its_own(tmp_path):
    file = tmp_path / "posts.jsonl"
    file.write_text(json.dumps({"prompt": "POST: long TL;DR:", "chosen": "short", "rejected": "other"}))
    (row,) = read_rows(TLDR(file), "preference")
    assert row.responses == (" short", " other")
    assert row.written.prompt == "POST: long\n\nTL;DR:"
    tokenizer = tiny_tokenizer()
    assert row.said(ChatEncoder(tokenizer, "plain")) == [" short", " other"]
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    assert row.said(ChatEncoder(tokenizer, "chat_template", template)) == ["short", "other"]


@pytest.mark.parametrize(
    ("data", "options", "said"),
    [
        ([], {}, "no rows"),
        (preference_rows(9), {"part": "validation"}, "no validation split, and validation_split is 0; hold a share"),
        ([{"prompt": "a", "chosen": "b", "rejected": "b"}], {"on_bad_row": "skip"}, "leaves no row of part 'all'"),
        (prompt_rows(3), {}, "rejected"),
    ],
)
def test_bad_data_are_named_in_one_line(data, options, said):
    with pytest.raises(UserError) as error:
        read_rows(data, "preference", **options)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_of_ids_is_refused(folder, tmp_path):
    from rlhf_lightning.cli.prepare import prepare

    prepare(tmp_path / "out", folder, preference_rows(9), max_length=60, validation_split=0)
    with pytest.raises(UserError, match="holds the token ids of one tokenizer"):
        read_rows(str(tmp_path / "out"), "preference")
