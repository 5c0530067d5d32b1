import csv
import gzip
import json

import datasets
import pytest

from rlhf_lightning.data.sources import column_names, is_local, read_rows
from rlhf_lightning.errors import UserError

ROWS = [{"prompt": f"p{i}", "response": f"r{i}"} for i in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def write_json(folder):
    path = folder / "rows.json"
    path.write_text("  \n" + json.dumps(ROWS, indent=1))
    return path


def write_jsonl(folder):
    path = folder / "rows.jsonl"
    path.write_text(LINES.replace("\n", "\n\n"))  # blank lines are no rows
    return path


def write_lines_as_json(folder):
    path = folder / "rows.json"
    path.write_text(LINES)
    return path


def write_gzip(folder):
    path = folder / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(LINES.encode()))
    return path


def write_csv(folder):
    path = folder / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "response"])
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def write_parquet(folder):
    path = folder / "rows.parquet"
    datasets.Dataset.from_list(ROWS).to_parquet(path)
    return path


def write_saved(folder):
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return folder / "saved"


def write_saved_splits(folder):
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(folder / "splits")
    return folder / "splits"


def write_parts(folder):
    """Two files, which are read in order of name."""
    (folder / "parts").mkdir()
    (folder / "parts" / "b.jsonl").write_text(json.dumps(ROWS[2]))
    (folder / "parts" / "a.json").write_text(json.dumps(ROWS[:2]))
    (folder / "parts" / "README.md").write_text("no data")
    return folder / "parts"


WRITERS = [
    write_json,
    write_jsonl,
    write_lines_as_json,
    write_gzip,
    write_csv,
    write_parquet,
    write_saved,
    write_saved_splits,
    write_parts,
]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_every_kind_of_source_gives_the_same_rows(tmp_path, write, kind):
    rows = read_rows(kind(write(tmp_path)))

    assert [dict(row) for row in rows] == ROWS
    assert (len(rows), dict(rows[1]), column_names(rows)) == (3, ROWS[1], ["prompt", "response"])


def test_a_list_is_its_own_source_and_a_glob_names_files(tmp_path):
    folder = write_parts(tmp_path)

    assert read_rows(ROWS) is ROWS
    assert list(read_rows(f"{folder}/*.json*")) == ROWS
    assert list(read_rows(f"{folder}/b*")) == ROWS[2:]


def test_names_a_split_that_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"no split 'dev'; it has train, test"):
        read_rows(write_saved_splits(tmp_path), split="dev")


@pytest.mark.parametrize(
    "name", ["missing.jsonl", "./missing", "/missing/folder", "a/b/c", "missing/*.json", "~/missing.csv", "data/x.txt"]
)
def test_what_looks_local_is_never_sought_on_the_hub(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("went to the hub"))

    with pytest.raises(UserError, match=r"(missing.*|a/b/c|data/x.txt) (does not exist|holds no data files)"):
        read_rows(name)


def test_a_folder_that_exists_is_local(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert not is_local("owner/name")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert is_local("owner/name")
    with pytest.raises(UserError, match=r"owner/name holds no data files; expected .json"):
        read_rows("owner/name")


@pytest.mark.parametrize(("name", "repo", "split"), [("o/n", "o/n", "train"), ("o/n-v1.5:test", "o/n-v1.5", "test")])
def test_hub_ids_may_name_their_split(monkeypatch, name, repo, split):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    assert list(read_rows(name)) == ROWS
    assert asked == [((repo,), {"split": split})]


def test_a_hub_that_gives_nothing_is_one_clear_line(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no way\nthere")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"^owner/name is no file or folder here.*\(no way\)[^\n]*$"):
        read_rows("owner/name")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"prompt": "a"}\n{"prompt": \n', r"x.jsonl line 2: broken JSON"),
        ("x.json", b'[{"prompt": "a"},\n{"prompt" "b"}]', r"x.json line 2: broken JSON"),
        ("x.jsonl", b'{"prompt": "a"}\n\n[1]\n', r"x.jsonl line 3: expected an object .* found list"),
        ("x.json", b'[{"prompt": "a"}, "b"]', r"x.json item 1: expected an object .* found str"),
        ("x.jsonl", b'{"prompt": "\xff"}', r"x.jsonl is not UTF-8"),
        ("x.jsonl.gz", b"plain", r"x.jsonl.gz is not a whole gzip file"),
        ("x.parquet", b"plain", r"x.parquet is not a Parquet file"),
        ("x.txt", b"hello", r"x.txt is of an unknown kind; expected .json"),
        ("x.jsonl", b"\n \n", r"x.jsonl has no rows"),
        ("x.csv", b"prompt,response\n", r"x.csv has no rows"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_rows(tmp_path / name)


def test_a_gzip_file_that_breaks_off_is_named(tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(LINES.encode() * 100)[:40])
    with pytest.raises(UserError, match=r"x.jsonl.gz is not a whole gzip file"):
        read_rows(tmp_path / "x.jsonl.gz")
