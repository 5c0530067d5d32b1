import json
import pickle
import re
import shutil
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.forked import run_forked
from helpers.preparing import build
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.chat.written import WrittenPrompt
from rlhf_lightning.data.collate import EncodedExample, EncodedPair, EncodedPrompt
from rlhf_lightning.data.preparing import manifest
from rlhf_lightning.data.preparing.manifest import is_prepared
from rlhf_lightning.data.preparing.prepared import PreparedFolder, TableWriter, TokenTable
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


def write_and_read_prompts():
    prompts = [WrittenPrompt("wie geht's, größer?", ()), None, WrittenPrompt("", ({"name": "{}"},))]
    writer = TableWriter("prompts.arrow", "prompts")
    for i, written in enumerate(prompts):
        writer.add(EncodedPrompt(np.full(i, i, np.int32), "", i, written), i)
    writer.close()
    table = TokenTable("prompts.arrow", "prompts")
    assert [prompt.written for prompt in table] == prompts
    print([prompt.ids.tolist() for prompt in table], table.sources.tolist(), "pandas" in sys.modules)


@pytest.mark.launched
def test_reading_and_writing_do_without_pandas_which_takes_long_to_import(tmp_path):
    """Nor do prompts lose their texts, or that they have none."""
    finished = run_forked(["--version"], tmp_path, before=write_and_read_prompts)

    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("[[], [1], [2, 2]] [0, 1, 2] False\n")


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
        "prompt_hashes.npz",
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


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return build(tmp_path_factory.mktemp("whole") / "data", ROWS)


@settings(max_examples=120)
@given(st.data())
def test_every_flipped_bit_is_noticed(whole, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("flipped") / "data"
    shutil.copytree(whole.path, folder)
    assert PreparedFolder.open(folder).manifest == whole.manifest
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    flip(path, data.draw(st.integers(0, 8 * path.stat().st_size - 1)))
    try:
        opened = PreparedFolder.open(folder)
    except UserError:
        return
    # What is still the same: white space, or the e of 1e-05.
    assert (path.name, opened.manifest) == ("manifest.json", whole.manifest)


def test_a_folder_is_read_once_by_a_process_and_again_when_it_changes(whole, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(manifest, "crc32", lambda path, crc32=manifest.crc32: (read.append(path.name), crc32(path))[1])
    shutil.copytree(whole.path, tmp_path / "data")
    for _ in range(2):
        PreparedFolder.open(tmp_path / "data")
    assert sorted(read) == sorted(path.name for path in whole.path.iterdir() if path.name != "manifest.json")
    (tmp_path / "data" / "args.json").touch()
    PreparedFolder.open(tmp_path / "data")
    assert read[-1] == "args.json"
    assert len(read) == len({*read}) + 1


def without_checksums(folder):
    """As earlier versions wrote it."""
    said = json.loads((folder / "manifest.json").read_text())
    del said["crc32"], said["others"]
    for part in said["parts"].values():
        del part["crc32"]
    (folder / "manifest.json").write_text(json.dumps(said))


def test_a_folder_of_an_earlier_version_opens_and_damage_that_shows_is_refused(whole, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(whole.path, folder)
    without_checksums(folder)
    opened = PreparedFolder.open(folder)
    opened.check_tokenizer(ChatEncoder(tiny_tokenizer()))
    assert opened.part("finetune", "train")[3].ids.tolist() == whole.part("finetune", "train")[3].ids.tolist()

    path = folder / "finetune_train.arrow"
    content, ids = path.read_bytes(), opened.part("finetune", "train").ids(0)[0]
    place = content.index(ids.tobytes())
    path.write_bytes(content[:place] + np.int32(-7).tobytes() + content[place + 4 :])
    with pytest.raises(UserError, match=r"finetune_train.arrow is damaged: it holds ids that are none"):
        PreparedFolder.open(folder).check_tokenizer(ChatEncoder(tiny_tokenizer()))
    starts = opened.part("finetune", "train")._lists["prompt"][0][0]
    place = content.index(starts.tobytes())
    path.write_bytes(content[:place] + np.int32(1 << 30).tobytes() + content[place + 4 :])
    with pytest.raises(UserError, match=r"finetune_train.arrow cannot be read"):
        PreparedFolder.open(folder).part("finetune", "train")
    shutil.copyfile(folder / "prompts_train.arrow", path)
    with pytest.raises(UserError, match=r"finetune_train.arrow does not hold the columns of finetune"):
        TokenTable(path, "finetune")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda said: said.pop("chat"), "manifest.json lacks 'chat'"),
        (lambda said: said.pop("sources"), "lacks 'sources'"),
        (lambda said: said.pop("parts"), "lacks 'parts'"),
        (lambda said: said["sources"].pop("data"), "lacks 'sources.data'"),
        (lambda said: said["chat"].update(fingerprint=3), "has int in the place of 'chat.fingerprint'"),
        (lambda said: said.update(sources=[]), "has list in the place of 'sources'"),
        (
            lambda said: said["sources"]["data"].update(source_weights=["x"]),
            "list in the place of 'sources.data.source",
        ),
        (lambda said: said["parts"].update({"../other": {"rows": 1, "bytes": 1}}), "names ../other in one of"),
        (lambda said: said.update(kinds=["pictures"]), "names the kind 'pictures'"),
        (lambda said: said["parts"]["finetune_test.arrow"].pop("bytes"), "lacks 'parts.finetune_test.arrow.bytes'"),
        (lambda said: said.update(others={"../../x": 1}), "has int in the place of 'others.../../x'"),
        (lambda said: said.update(crc32=1), "does not fit its own checksum"),
        (lambda said: said["parts"]["finetune_test.arrow"].update(crc32=1), "lacks its own checksum"),
    ],
)
def test_a_manifest_of_which_something_is_missing_or_wrong_is_one_line(whole, tmp_path, change, said):
    shutil.copytree(whole.path, tmp_path / "data")
    without_checksums(tmp_path / "data")
    path = tmp_path / "data" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=re.escape(said)):
        PreparedFolder.open(tmp_path / "data")


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "3", '"x"', "", '{"format": 2}', '{"format": {}}'])
def test_a_manifest_that_is_none_is_one_line(whole, tmp_path, content):
    shutil.copytree(whole.path, tmp_path / "data")
    (tmp_path / "data" / "manifest.json").write_text(content)
    is_prepared(tmp_path / "data")
    with pytest.raises(UserError, match=r"not a prepared folder|has layout|lacks"):
        PreparedFolder.open(tmp_path / "data")
