import csv
import gzip
import io
import json
import os
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.preparing import open_rows
from rlhf_lightning.data.rows import BadRowError
from rlhf_lightning.data.sources import files
from rlhf_lightning.data.sources.files import file_fingerprint, is_local, open_parts
from rlhf_lightning.errors import UserError

ROWS = [{"prompt": f"p{i}", "response": f"r{i} \u00e9,\"'\n"} for i in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
HTML = b"\n<!DOCTYPE html>\n<html><body>\n\nNot found\n</body></html>\n"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_LIGHTNING_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def said(logged, recwarn):
    """What was said so far."""
    return lambda: "\n".join([*logged(), *(str(warning.message) for warning in recwarn.list)])


def write_json(folder):
    path = folder / "rows.json"
    path.write_text("  \n" + json.dumps(ROWS, indent=1))
    return path


def write_jsonl(folder):
    path = folder / "rows.jsonl"
    path.write_text("\n" + LINES.replace("\n", "\n \r\n"))  # blank lines do not count as rows
    return path


def write_lines_without_last_end(folder):
    path = folder / "rows.json"
    path.write_bytes(b"\xef\xbb\xbf" + LINES.rstrip().encode())
    return path


def write_csv(folder):
    path = folder / "rows.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["prompt", "response"])
        writer.writeheader()
        writer.writerow(ROWS[0])
        file.write("\r\n")
        writer.writerows(ROWS[1:])
    return path


def write_parquet(folder):
    path = folder / "rows.parquet"
    datasets.Dataset.from_list(ROWS).to_parquet(path, batch_size=2)
    return path


def write_columns(folder):
    path = folder / "rows.json"
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    path.write_text(json.dumps(columns), encoding="utf-8-sig")
    return path


def write_object(folder):
    path = folder / "rows.json"
    path.write_text(json.dumps({"data": ROWS}, indent=2))
    return path


def write_list_as_lines(folder):
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(ROWS))
    return path


def write_tsv(folder):
    path = folder / "rows.TSV"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "response"], delimiter="\t")
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def write_semicolons(folder):
    path = folder / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write("prompt; response\r\n")
        csv.DictWriter(file, ["prompt", "response"], delimiter=";").writerows(ROWS)
    return path


def packed(write):
    def write_packed(folder):
        plain = write(folder)
        path = plain.with_name(plain.name + ".gz")
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
        return path

    return write_packed


def write_saved(folder):
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved", num_shards=2)
    return folder / "saved"


def write_saved_splits(folder):
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(folder / "splits")
    return folder / "splits"


def write_parts(folder):
    """Files of several kinds, which are read in order of name."""
    (folder / "parts").mkdir()
    (folder / "parts" / "c.jsonl").write_text(json.dumps(ROWS[2]))
    (folder / "parts" / "a.json").write_text(json.dumps(ROWS[:1]))
    datasets.Dataset.from_list(ROWS[1:2]).to_parquet(folder / "parts" / "b.parquet")
    (folder / "parts" / "README.md").write_text("no data")
    return folder / "parts"


PLAIN = [write_json, write_jsonl, write_lines_without_last_end, write_csv, write_parquet]
PLAIN += [write_columns, write_object, write_list_as_lines, write_tsv, write_semicolons]
WRITERS = [*PLAIN, *map(packed, PLAIN), write_saved, write_saved_splits, write_parts, lambda folder: ROWS]


@pytest.mark.parametrize("write", WRITERS)
def test_every_format_gives_the_same_rows_in_either_way(tmp_path, write):
    data = write(tmp_path)
    rows = open_rows(data if isinstance(data, list) else str(data))

    assert rows.columns == ["prompt", "response"]
    assert [dict(row) for _, row in rows.stream()] == ROWS
    assert [dict(rows[i]) for i in (2, 0, 1)] == [ROWS[2], ROWS[0], ROWS[1]]
    assert len(rows) == 3
    assert [place for place, _ in rows.stream()] == [rows.place(i) for i in range(3)]


@pytest.mark.parametrize("write", [packed(write_jsonl), packed(write_parquet), write_parquet])
def test_what_is_unpacked_on_the_way_leaves_no_file(tmp_path, write):
    rows = open_rows(write(tmp_path))
    assert len(list(rows.stream())) == len([rows[i] for i in range(len(rows))]) == 3
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_streaming_unpacks_nothing_to_disk(tmp_path):
    rows = open_rows(packed(write_jsonl)(tmp_path), streaming=True)
    assert len(list(rows.stream())) == 3
    assert not (tmp_path / "cache").exists()


def test_places_are_lines_of_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"a": 1}\n\n\n{"a": 2}\n')
    (tmp_path / "b.csv").write_text('a\n"x\ny"\n\nz\n')
    (tmp_path / "c.json").write_text('[{"a": 1},\n{"a": 2}]')
    rows = open_rows(tmp_path)

    places = [rows.place(i).removeprefix(f"{tmp_path}/") for i in range(len(rows))]
    assert places == [
        "a.jsonl line 2",
        "a.jsonl line 5",
        "b.csv line 2",
        "b.csv line 5",
        "c.json item 0",
        "c.json item 1",
    ]
    assert [row["a"] for _, row in rows.stream()] == [1, 2, "x\ny", "z", 1, 2]


@given(st.lists(st.sampled_from(['{"a": 1}', "", "  ", "\t", "{", '{"b": "\u00e9"}']), max_size=12), st.booleans())
def test_every_line_that_is_not_blank_is_one_row(tmp_path_factory, lines, ends):
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    path.write_text("\n".join(lines) + "\n" * ends, encoding="utf-8")
    rows = open_rows(path)

    expected = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    assert [place for place, _ in rows.stream()] == [f"{path} line {number}" for number, _ in expected]
    assert [rows.place(i) for i in range(len(rows))] == [f"{path} line {number}" for number, _ in expected]
    for i, (_, line) in enumerate(expected):
        if line == "{":
            with pytest.raises(BadRowError, match="broken JSON"):
                rows[i]
        else:
            assert rows[i] == json.loads(line)


# Bad rows and bad files


def outcomes(path, content):
    path.write_bytes(content)
    rows = open_rows(path)
    return [str(row) if isinstance(row, BadRowError) else dict(row) for _, row in rows.stream()]


GOOD = {"prompt": "a"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": ', "broken JSON (Expecting value)"),
        (b"{'prompt': 1}", "broken JSON (Expecting property name enclosed in double quotes)"),
        (b"[1]", 'expected an object such as {"prompt": ...}, found list'),
        (b'"text"', 'expected an object such as {"prompt": ...}, found str'),
        (b'{"prompt": "\xff"}', "not UTF-8 text"),
        (b"[" * 100_000, "broken JSON (beyond what can be parsed)"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "broken JSON (beyond what can be parsed)"),
    ],
)
def test_a_broken_line_costs_itself_only(tmp_path, line, reason):
    content = b'{"prompt": "a"}\n' + line + b'\n{"prompt": "a"}\n'
    assert outcomes(tmp_path / "x.jsonl", content) == [GOOD, reason, GOOD]
    with pytest.raises(BadRowError) as error:
        open_rows(tmp_path / "x.jsonl")[1]
    assert str(error.value) == reason


def test_an_item_of_a_list_that_is_no_object_costs_itself_only(tmp_path):
    reason = 'expected an object such as {"prompt": ...}, found int'
    assert outcomes(tmp_path / "x.json", b'[{"prompt": "a"}, 3, {"prompt": "a"}]') == [GOOD, reason, GOOD]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"a,b", "2 fields where the header has 1"),
        (b"\xff", "not UTF-8 text"),
        (b'"a"b', "broken CSV (',' expected after '\"')"),
    ],
)
def test_a_broken_record_of_a_csv_costs_itself_only(tmp_path, line, reason):
    assert outcomes(tmp_path / "x.csv", b"prompt\na\n" + line + b"\na\n") == [GOOD, reason, GOOD]


TEXT = pyarrow.array([b"a", b"\xff", b"a"]).cast(pyarrow.binary()).view(pyarrow.string())
DATES = pyarrow.array([0, 2**62, 0]).view(pyarrow.timestamp("us"))


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"prompt": TEXT}, "column prompt is not UTF-8 text"),
        ({"prompt": ["a"] * 3, "when": DATES}, "column when cannot be read (date value out of range)"),
    ],
)
def test_a_value_of_a_parquet_file_that_is_none_costs_its_row_only(tmp_path, columns, reason):
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    rows = open_rows(tmp_path / "x.parquet")
    with pytest.raises(BadRowError) as error:
        rows[1]
    first, second, third = (row for _, row in rows.stream())
    assert str(error.value) == str(second) == reason
    assert first == rows[0] == third == rows[2]


def test_a_quote_that_is_never_closed_is_a_bad_row_and_not_a_long_text(tmp_path):
    assert outcomes(tmp_path / "x.csv", b'prompt\na\n"b\na\na\n') == [
        GOOD,
        "broken CSV (unexpected end of data), which cost 3 lines",
    ]


def test_a_long_field_of_a_csv_is_read(tmp_path):
    assert outcomes(tmp_path / "x.csv", b"prompt\n" + b"x" * 5_000_000 + b"\n") == [{"prompt": "x" * 5_000_000}]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.jsonl.gz", "x.csv", "x.csv.gz", "x.parquet"])
def test_every_line_of_a_web_page_is_a_bad_row(tmp_path, name):
    reason = "broken JSON (this looks like an HTML page)"
    assert outcomes(tmp_path / name, HTML) == [reason] * 4
    if name.endswith("jsonl.gz"):
        assert outcomes(tmp_path / name, gzip.compress(HTML)) == [reason] * 4


def number_and_columns(path):
    rows = open_rows(path)
    return len(rows), rows.columns


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", b'[{"prompt": "a"},\n{"prompt" "b"}]', r"x.json line 2: broken JSON"),
        ("x.json", b'[{"prompt": "\xff"}]', r"x.json is not UTF-8"),
        ("x.jsonl.gz", b"plain", r"x.jsonl.gz is not a complete gzip file"),
        ("x.jsonl.gz", gzip.compress(os.urandom(5000).hex().encode())[:200], r"x.jsonl.gz is not a complete gzip file"),
        ("x.csv.gz", gzip.compress(os.urandom(5000).hex().encode())[:200], r"x.csv.gz is not a complete gzip file"),
        ("x.json.gz", gzip.compress(b"[" + os.urandom(5000).hex().encode())[:200], r"x.json.gz is not a complete gzip"),
        (
            "x.jsonl",
            gzip.compress(b"{}", mtime=0),
            r"x.jsonl is compressed by gzip, which its name does not say; unpack it",
        ),
        (
            "x.csv.gz",
            gzip.compress(gzip.compress(b"{}", mtime=0), mtime=0),
            r"x.csv.gz is compressed by gzip, which its name",
        ),
        ("x.jsonl", b"\x28\xb5\x2f\xfd rest", r"x.jsonl is compressed by zstd"),
        ("x.jsonl.zst", b"\x28\xb5\x2f\xfd rest", r"x.jsonl.zst is of an unknown kind; expected .json"),
        ("x.tsv", "prompt\tresponse\n".encode("utf-16"), r"x.tsv is UTF-16 text; save it as UTF-8"),
        ("x.csv", b"prompt,a,prompt\n1,2,3\n", r"x.csv line 1: column prompt stands there twice; fix the header"),
        ("x.json", b'{"prompt": ["a", "b"], "response": ["c"]}', r"differ in length \(prompt 2, response 1\)"),
        (
            "x.json",
            b'{"train": [{"prompt": "a"}], "test": [{"prompt": "a"}]}',
            r"x.json is one object with several lists",
        ),
        ("x.json", b"[" * 100_000, r"x.json: broken JSON \(beyond what can be parsed\); fix the file"),
        ("x.json", b'[{"prompt": ' + b"9" * 9000 + b"}]", r"x.json: broken JSON \(beyond what can be parsed\)"),
        ("x.parquet", b"plain", r"x.parquet is not a Parquet file"),
        ("x.txt", b"hello", r"x.txt is of an unknown kind; expected .json"),
    ],
)
def test_files_that_cannot_be_read_at_all_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        number_and_columns(tmp_path / name)


def parquet_with(change):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS * 40), buffer)
    return change(buffer.getvalue())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content[:-20], "is not a Parquet file: .*; fetch it again$"),
        (
            lambda content: content[:-8] + bytes([16, 0, 0, 0]) + content[-4:],
            "is not a Parquet file: Couldn't deserialize thrift",
        ),
        (lambda content: content[:20] + b"\xff" * 40 + content[60:], "is not a whole Parquet file: "),
    ],
)
def test_a_damaged_parquet_file_is_one_line(tmp_path, change, said):
    (tmp_path / "x.parquet").write_bytes(parquet_with(change))
    with pytest.raises(UserError, match=said):
        [*open_rows(tmp_path / "x.parquet")]


def cut(path):
    path.write_bytes(path.read_bytes()[:200])


def damage_text(path):
    content = bytearray(path.read_bytes())
    place = content.index(b"\xc3\xa9")
    content[place] = 0xFF
    path.write_bytes(content)


def name_another_file(path):
    (path.parents[1] / "other.arrow").write_bytes(path.read_bytes())
    state = path.parent / "state.json"
    said = json.loads(state.read_text())
    said["_data_files"][0]["filename"] = "../other.arrow"
    state.write_text(json.dumps(said))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, "saved is not a whole data set as `save_to_disk` writes it .*; save it again"),
        (Path.unlink, "saved is not a whole data set as `save_to_disk` writes it"),
        (lambda path: (path.parent / "state.json").write_text("[" * 9999), "saved is not a whole data set"),
        (lambda path: (path.parent / "dataset_info.json").write_text("3"), "saved is not a whole data set"),
        (damage_text, "saved.* is damaged: .*UTF8"),
        (name_another_file, "saved names a file outside of itself .*other.arrow.*; it is not read"),
    ],
)
def test_a_damaged_saved_data_set_is_one_line(tmp_path, damage, said):
    path = write_saved(tmp_path)
    damage(path / "data-00000-of-00002.arrow")
    with pytest.raises(UserError, match=said):
        [*open_rows(path)]


@pytest.mark.parametrize("content", ["[1, 2]", "{", "[" * 9999, "3"])
def test_a_damaged_memory_of_hashes_is_forgotten(tmp_path, monkeypatch, content):
    monkeypatch.setattr(files, "_BYTES_REMEMBERED", 0)
    path = write_jsonl(tmp_path)
    os.utime(path, (0, 0))
    expected = open_rows(path).fingerprint()
    memory = tmp_path / "cache" / "fingerprints.json"
    known = json.loads(memory.read_text())
    for text in (content, *(json.dumps(dict.fromkeys(known, entry)) for entry in (3, (1, None)))):
        memory.write_text(text)
        assert open_rows(path).fingerprint() == expected


# What is named


def test_a_glob_names_files(tmp_path):
    folder = write_parts(tmp_path)
    assert [dict(row) for _, row in open_rows(f"{folder}/*.json*").stream()] == [ROWS[0], ROWS[2]]
    assert [dict(row) for _, row in open_rows(f"{tmp_path}/**/c*").stream()] == ROWS[2:]


def test_a_row_is_not_taken_for_a_table(tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    for row in (
        {"messages": turns},
        {"prompt": turns[:1], "chosen": turns[1:], "rejected": turns[1:]},
        {"prompt": "a"},
    ):
        for indent in (None, 1):
            (tmp_path / "x.json").write_text(json.dumps(row, indent=indent))
            rows = open_rows(tmp_path / "x.json")
            assert [rows[i] for i in range(len(rows))] == [row]


def test_a_list_of_paths_is_read_in_its_order(tmp_path):
    folder = write_parts(tmp_path)
    rows = open_rows([folder / "c.jsonl", str(folder / "a.json")])
    assert [dict(row) for _, row in rows.stream()] == [ROWS[2], ROWS[0]]
    with pytest.raises(UserError, match="Hello does not exist; check the path"):
        open_rows(["Hello"])


def places(parts):
    return {part: [os.path.relpath(rows.place(i)) for i in range(len(rows))] for part, rows in parts.items()}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["test.jsonl", "train.jsonl", "valid.jsonl"], {"train": [1], "validation": [2], "test": [0]}),
        (["data/test-00000-of-00001.jsonl", "data/train-00000.jsonl"], {"train": [1], "test": [0]}),
        (["dev/0.jsonl", "train/0.jsonl", "train/1.jsonl"], {"train": [1, 2], "validation": [0]}),
        (["a.jsonl", "b.jsonl", "eval.jsonl"], {"train": [0, 1], "test": [2]}),
        (["latest.jsonl", "training_and_test.jsonl"], {"train": [0, 1]}),
        (["test_a.jsonl", "test_b.jsonl"], {"train": [0, 1]}),
    ],
)
def test_files_of_a_folder_are_used_for_the_parts_they_name(tmp_path, monkeypatch, names, expected):
    monkeypatch.chdir(tmp_path)
    for name in names:
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_text(LINES[: LINES.index("\n") + 1])
    wanted = {part: [f"folder/{names[i]} line 1" for i in numbers] for part, numbers in expected.items()}
    assert places(open_parts("folder")) == wanted
    if "/" not in names[0]:
        assert places(open_parts("folder/*.jsonl")) == wanted
    if "test" in wanted:
        assert places(open_parts("folder", split="test")) == {"train": wanted["test"]}
        with pytest.raises(UserError, match=r"folder has no split 'extra'; it has train, "):
            open_parts("folder", split="extra")


def test_what_of_a_folder_is_not_read_is_said(tmp_path, said):
    folder = write_parts(tmp_path)
    for name, text in (
        ("notes.txt", "x"),
        ("empty.jsonl", " \n"),
        ("head.csv", "prompt,response\n"),
        ("none.json", "[ ]"),
    ):
        (folder / name).write_text(text)
    (folder / "inner").mkdir()
    (folder / "inner" / "more.jsonl").write_text(LINES)
    assert len(open_rows(folder)) == 3
    assert "parts: 6 files are read, but not notes.txt, inner/more.jsonl\n" in said() + "\n"
    empty = ", ".join(str(folder / name) for name in ("empty.jsonl", "head.csv", "none.json"))
    assert f"no rows come from {empty}: there is nothing inside" in said()
    (folder / "d.jsonl.zst").write_bytes(b"x")
    with pytest.raises(UserError, match=r"d.jsonl.zst is compressed in a way that is not read here; unpack it"):
        open_rows(folder)


def test_another_mark_between_fields_is_said(tmp_path, said):
    assert open_rows(write_semicolons(tmp_path)).columns == ["prompt", "response"]
    assert "rows.csv: fields are taken to be parted by ';', as the header is" in said()


def test_names_a_split_that_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"no split 'dev'; it has train, test"):
        open_rows(write_saved_splits(tmp_path), split="dev")
    assert len(open_rows(tmp_path / "splits", split="test")) == 1


@pytest.mark.parametrize(
    "name", ["missing.jsonl", "./missing", "/missing/folder", "a/b/c", "missing/*.json", "~/missing.csv", "data/x.txt"]
)
def test_what_looks_local_is_never_sought_on_the_hub(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("went to the hub"))

    with pytest.raises(UserError, match=r"(missing.*|a/b/c|data/x.txt) (does not exist|holds no data files)"):
        open_rows(name)


def test_a_folder_that_exists_is_local(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert not is_local("owner/name")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert is_local("owner/name")
    with pytest.raises(UserError, match=r"owner/name holds no data files; expected .json"):
        open_rows("owner/name")


@pytest.fixture
def hub(monkeypatch):
    """A hub that has one data set, and remembers what it was asked."""
    asked = []

    def load_dataset(repo, **options):
        asked.append((repo, options))
        rows = datasets.Dataset.from_list(ROWS)
        rows = rows.to_iterable_dataset() if options.get("streaming") else rows
        return rows if "split" in options else {"train": rows, "test": rows, "extra": rows}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_hub_ids_may_name_their_split(hub):
    parts = open_parts("o/n-v1.5:test")
    assert list(parts) == ["train"]
    assert [parts["train"][i] for i in range(3)] == ROWS
    assert parts["train"].place(2) == "o/n-v1.5 test row 2"
    assert hub == [("o/n-v1.5", {"split": "test"})]


def test_hub_data_bring_their_splits(hub, said):
    parts = open_parts("o/n")
    assert {part: rows.place(2) for part, rows in parts.items()} == {
        "train": "o/n train row 2",
        "test": "o/n test row 2",
    }
    assert hub == [("o/n", {})]
    assert "o/n: split extra is not read; name it in `split` to read it" in said()


def test_hub_data_may_be_streamed(hub):
    rows = open_parts("o/n", streaming=True, subset="part")["train"]
    assert hub == [("o/n", {"streaming": True, "data_dir": "part"})]
    assert rows.columns == ["prompt", "response"]
    assert [row for _, row in rows.stream()] == [row for _, row in rows.stream()] == ROWS
    with pytest.raises(UserError, match="o/n part train is streamed"):
        len(rows)


def test_a_hub_that_gives_nothing_is_one_clear_line(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no way\nthere")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"^owner/name is not a file or folder here.*\(no way\)[^\n]*$"):
        open_rows("owner/name")


# Fingerprints


@pytest.mark.parametrize("write", WRITERS[:-1])
def test_the_same_data_has_the_same_fingerprint(tmp_path, write):
    path = write(tmp_path)
    assert open_rows(path).fingerprint() == open_rows(path).fingerprint()


def test_another_content_has_another_fingerprint(tmp_path):
    path = write_jsonl(tmp_path)
    before = open_rows(path).fingerprint()
    state = path.stat()
    path.write_text(path.read_text().replace("p1", "q1"))  # same size, and made to have the same time
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert open_rows(path).fingerprint() != before

    copy = [dict(row) for row in ROWS]
    assert open_rows(copy).fingerprint() == open_rows(ROWS).fingerprint()
    copy[2]["prompt"] = "q"
    assert open_rows(copy).fingerprint() != open_rows(ROWS).fingerprint()


def test_the_order_of_files_is_part_of_the_fingerprint(tmp_path):
    folder = write_parts(tmp_path)
    before = open_rows(folder).fingerprint()
    (folder / "a.json").rename(folder / "z.json")
    assert open_rows(folder).fingerprint() != before


def test_the_hash_of_a_large_file_at_rest_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_BYTES_REMEMBERED", 10)
    path = tmp_path / "big.jsonl"
    path.write_text("x" * 20)
    fresh = file_fingerprint(path)
    assert not (tmp_path / "cache").exists()  # written too lately to trust its time

    os.utime(path, (1e9, 1e9))
    assert file_fingerprint(path) == fresh
    memory = tmp_path / "cache" / "fingerprints.json"
    memory.write_text(memory.read_text().replace(fresh, "what it says"))
    assert file_fingerprint(path) == "what it says"  # not read again
    path.write_text("y" * 20)
    os.utime(path, (1e9, 1e9))  # as a copy that keeps the time of its original
    other = file_fingerprint(path)
    assert other not in (fresh, "what it says")

    memory.write_text("{")
    assert file_fingerprint(path) == other
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["fingerprints.json"]


def test_a_cache_that_cannot_be_written_stops_only_what_must_be_unpacked(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RLHF_LIGHTNING_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(files, "_BYTES_REMEMBERED", 10)
    path = write_jsonl(tmp_path)
    os.utime(path, (1e9, 1e9))
    assert open_rows(path).fingerprint() == open_rows(path).fingerprint()

    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(UserError, match=r"the cache .*file/cache cannot be written .*in \$RLHF_LIGHTNING_CACHE"):
        len(open_rows(packed))


def test_a_list_is_read_when_its_rows_are_asked_for(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("[{},\n oops]")
    rows = open_rows(path)
    assert len(rows.fingerprint()) == 32
    with pytest.raises(UserError, match=r"rows.json line 2: broken JSON"):
        len(rows)


def test_a_saved_file_that_is_replaced_is_noticed(tmp_path):
    for name, answer in (("data", "yes"), ("other", "no")):
        datasets.Dataset.from_list([{"prompt": "a", "response": answer}]).save_to_disk(tmp_path / name)
    before = open_rows(tmp_path / "data").fingerprint()
    file = next((tmp_path / "data").glob("*.arrow"))
    file.write_bytes(next((tmp_path / "other").glob("*.arrow")).read_bytes())
    assert open_rows(tmp_path / "data").fingerprint() != before
