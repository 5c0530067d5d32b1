import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.preparing import build
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.data.collate import EncodedExample, EncodedPair
from rlhf_lightning.data.preparing.prepared import PreparedFolder, TableWriter, TokenTable, is_prepared
from rlhf_lightning.errors import UserError

ROWS = [{"prompt": f"question {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(6)]
IDS = st.lists(st.integers(0, 2**31 - 1), max_size=5)


@settings(max_examples=40)
@given(st.lists(st.tuples(IDS, IDS, IDS, st.integers(0, 2**40), st.integers(0, 99)), max_size=8))
def test_what_is_written_is_read(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("table") / "rows.arrow"
    writer = TableWriter(path, "finetune")
    for prompt, turns, response, row_id, source in rows:
        ids = np.array(prompt + response, np.int32)
        writer.add(EncodedExample(ids, len(prompt), row_id, np.array(turns, np.int32)), source)
    writer.close()
    table = TokenTable(path, "finetune")

    assert writer.rows == len(table) == len(rows)
    assert writer.tokens == sum(len(prompt) + len(response) for prompt, _, response, *_ in rows)
    assert table.sources.tolist() == [row[4] for row in rows]
    assert table.lengths("prompt").tolist() == [len(row[0]) for row in rows]
    assert table.total_lengths.tolist() == [len(row[0]) + len(row[2]) for row in rows]
    for example, (prompt, turns, response, row_id, _) in zip(table, rows, strict=True):
        assert (example.ids.tolist(), example.prompt_length) == (prompt + response, len(prompt))
        assert (example.turns.tolist(), example.row_id) == (turns, row_id)


def test_pairs_are_found_in_every_record_batch_and_by_a_copy_in_another_process(tmp_path):
    writer = TableWriter(tmp_path / "pairs.arrow", "preference")
    for i in range(2500):
        prompt, *sides = (np.full(1 + i % length, i, np.int32) for length in (3, 4, 5))
        chosen, rejected = (np.concatenate([prompt, side]) for side in sides)
        writer.add(EncodedPair(chosen, rejected, len(prompt), i, 0.5, i / 2500), i % 2)
    writer.close()
    table = pickle.loads(pickle.dumps(TokenTable(tmp_path / "pairs.arrow", "preference")))

    for i in (0, 999, 1000, 1999, 2000, 2499, -1):
        pair, number = table[i], i % 2500
        assert pair.row_id == number
        assert pair.prompt_length == 1 + number % 3
        assert pair.chosen_ids.tolist() == [number] * (2 + number % 3 + number % 4)
        assert pair.rejected_ids.tolist() == [number] * (2 + number % 3 + number % 5)
        assert (pair.margin, pair.weight) == (0.5, pytest.approx(number / 2500))
    assert [pair.row_id for pair in table[998:1002]] == [998, 999, 1000, 1001]
    assert table.total_lengths[14] == table.lengths("prompt")[14] + table.lengths("rejected")[14]
    with pytest.raises(IndexError):
        table[2500]


def test_ids_are_copies_that_may_be_changed(tmp_path):
    folder = build(tmp_path / "data", ROWS)
    for need, field in (("finetune", "ids"), ("preference", "chosen_ids"), ("prompts", "ids")):
        table = folder.part(need, "train")
        before = getattr(table[0], field).tolist()
        getattr(table[0], field)[:] = 0
        assert getattr(table[0], field).tolist() == before


def test_a_folder_holds_what_is_said_of_it(tmp_path):
    folder = build(tmp_path / "data", ROWS)

    tables = [
        f"{need}_{part}" for need in ("finetune", "preference", "prompts") for part in ("train", "validation", "test")
    ]
    assert {path.name for path in folder.path.iterdir()} == {f"{name}.arrow" for name in tables} | {
        "args.json",
        "example_prompt.json",
        "manifest.json",
    }
    assert is_prepared(str(folder.path))
    assert not is_prepared(str(tmp_path))
    assert not is_prepared(ROWS)
    for said in ("[]", '{"name": "some app"}'):  # of another program
        (tmp_path / "manifest.json").write_text(said)
        assert not is_prepared(tmp_path)
    assert folder.manifest["kinds"] == ["finetune", "preference", "prompts"]
    assert folder.manifest["parts"]["preference_train.arrow"]["rows"] == 6
    args = json.loads((folder.path / "args.json").read_text())
    assert (args["limits"]["max_length"], args["filters"]["shuffle"], args["splits"]["test"]) == (64, False, 0.0)
    example = json.loads((folder.path / "example_prompt.json").read_text())
    tokenizer = tiny_tokenizer()
    assert example["input_ids"] == tokenizer(example["prompt"], add_special_tokens=False).input_ids
    assert example["attention_mask"] == [1] * len(example["input_ids"])


def test_what_is_no_whole_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"data is not a prepared folder .*make one with `rlhf prepare`"):
        PreparedFolder.open(tmp_path / "data")
    folder = build(tmp_path / "data", ROWS, kinds=("finetune",))
    with pytest.raises(UserError, match=r"data holds no prompts_train.arrow, only finetune; prepare it with prompts"):
        folder.part("prompts", "train")

    table = tmp_path / "data" / "finetune_train.arrow"
    content = table.read_bytes()
    table.write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"finetune_train.arrow has {len(content) - 1} bytes, not {len(content)}; run"):
        PreparedFolder.open(tmp_path / "data")
    table.unlink()
    with pytest.raises(UserError, match=r"finetune_train.arrow has 0 bytes"):
        PreparedFolder.open(tmp_path / "data")

    manifest = tmp_path / "data" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 0}))
    with pytest.raises(UserError, match="has layout 0, this version reads 2"):
        PreparedFolder.open(tmp_path / "data")
    manifest.write_text("{")
    with pytest.raises(UserError, match="is not a prepared folder"):
        PreparedFolder.open(tmp_path / "data")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (ChatEncoder(tiny_tokenizer(bos=True)), "tokenizer hash"),
        (ChatEncoder(tiny_tokenizer(chat_template=True)), "template hash"),
        (ChatEncoder(tiny_tokenizer(), "plain"), "dialogue format plain"),
    ],
)
def test_another_tokenizer_or_template_is_refused_and_both_are_named(tmp_path, other, said):
    tokenizer = tiny_tokenizer()
    tokenizer.name_or_path, other.tokenizer.name_or_path = "base/model", "other/model"
    folder = build(tmp_path / "data", ROWS, tokenizer=tokenizer)

    folder.check_tokenizer(ChatEncoder(tiny_tokenizer(pad="eos")))
    with pytest.raises(UserError, match=rf"prepared with tokenizer base/model \(.*now it is .*other/model \(.*{said}"):
        folder.check_tokenizer(other)
