import errno
import json
import multiprocessing
import signal
import warnings
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from helpers.forked import forked_process
from helpers.preparing import build, preparation
from helpers.tokenizers import CHAT_TEMPLATE, tiny_tokenizer
from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.data.limits import TokenLimits
from rlhf_lightning.data.preparing.cache import find_or_build
from rlhf_lightning.data.preparing.filters import Filters, Splits
from rlhf_lightning.data.preparing.preparation import Preparation
from rlhf_lightning.data.preparing.prepared import PreparedFolder
from rlhf_lightning.errors import UserError

ROWS = [{"prompt": f"question {i}", "response": f"answer {i}"} for i in range(20)]


class Slow(Preparation):
    """Stops in the middle until it is told to go on."""

    said: Connection

    def build(self, folder: Path) -> None:
        (folder / "finetune_train.arrow").write_bytes(b"half of it")
        self.said.send("building")
        self.said.recv()
        super().build(folder)


def build_slowly(rows: Path, cache: Path, said: Connection) -> None:
    prepared = preparation(rows, kinds=("finetune",))
    prepared.__class__ = Slow
    prepared.said = said
    said.send(find_or_build(prepared, cache).path.name)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def start(rows, cache):
    """A process that builds, and the way to hear it."""
    ours, theirs = multiprocessing.Pipe()
    process = forked_process(build_slowly, rows, cache, theirs)
    process.start()
    theirs.close()
    return process, ours


def finetune(rows, **settings):
    return preparation(rows, kinds=("finetune",), **settings)


def entries(cache):
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


def test_two_that_start_at_once_build_once(rows, cache):
    first, of_first = start(rows, cache)
    assert of_first.recv() == "building"
    second, of_second = start(rows, cache)
    assert not of_second.poll(0.5)  # it waits
    of_first.send("go on")

    key = finetune(rows).key()
    assert of_first.recv() == key
    assert of_second.recv() == key  # and no "building"
    for process in (first, second):
        process.join()
        assert process.exitcode == 0
    assert entries(cache) == [key]


def test_a_build_that_is_killed_leaves_nothing_that_is_read(rows, cache):
    killed, said = start(rows, cache)
    assert said.recv() == "building"
    killed.kill()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    key = finetune(rows).key()
    assert [name.startswith(f".{key}.") for name in entries(cache)] == [True]

    folder = find_or_build(finetune(rows), cache)

    assert folder.part("finetune", "train").row_ids.tolist() == list(range(20))
    assert entries(cache) == [key]


def test_an_entry_is_built_once_and_again_if_it_is_damaged(rows, cache, monkeypatch):
    built = []
    whole = type(finetune(rows)).build
    monkeypatch.setattr(
        "rlhf_lightning.data.preparing.preparation.Preparation.build",
        lambda self, to: (built.append(to), whole(self, to)),
    )
    folder = find_or_build(finetune(rows), cache)
    assert find_or_build(finetune(rows), cache).path == folder.path
    assert len(built) == 1

    table = folder.path / "finetune_train.arrow"
    table.write_bytes(table.read_bytes()[:100])
    assert len(find_or_build(finetune(rows), cache).part("finetune", "train")) == 20
    (folder.path / "manifest.json").unlink()
    assert len(find_or_build(finetune(rows), cache).part("finetune", "train")) == 20
    assert len(built) == 3


def test_damage_that_keeps_the_size_is_mended_in_one_line_and_stops_no_later_run(rows, cache):
    table = find_or_build(finetune(rows), cache).path / "finetune_train.arrow"
    content = table.read_bytes()
    table.write_bytes(content[:-300] + bytes([content[-300] ^ 1]) + content[-299:])
    said = "the cache entry is made anew, as it cannot be used: .*finetune_train.arrow does not fit its checksum$"
    with pytest.warns(UserWarning, match=said) as caught:
        find_or_build(finetune(rows), cache)
    assert len([warning for warning in caught if "cache" in str(warning.message)]) == 1, [str(w) for w in caught]
    assert table.read_bytes() == content
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_or_build(finetune(rows), cache)


def test_an_entry_of_something_else_is_not_read(rows, cache):
    folder = find_or_build(finetune(ROWS[:5]), cache)
    folder.path.rename(cache / finetune(rows).key())
    with pytest.warns(UserWarning, match="was made from something else"):
        assert len(find_or_build(finetune(rows), cache).part("finetune", "train")) == 20


def test_a_full_disk_is_one_line_that_names_the_cache(rows, cache, monkeypatch):
    def full(self, batch):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pyarrow.ipc.RecordBatchFileWriter.write_batch", full)
    with pytest.raises(UserError, match=r"the cache .*cache cannot be written .*No space left.*set another"):
        find_or_build(finetune(rows), cache)
    assert entries(cache) == []


def test_a_build_that_fails_leaves_nothing(tmp_path, cache):
    with pytest.raises(UserError, match="leaves nothing to train on"):
        find_or_build(finetune([{"chosen": "\n\nHuman: hi\n\nAssistant:", "rejected": "no"}]), cache)
    assert entries(cache) == []


def test_the_same_is_found_under_another_name(rows, cache, tmp_path):
    other = tmp_path / "elsewhere" / "rows.jsonl"
    other.parent.mkdir()
    other.write_bytes(rows.read_bytes())
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = type(tokenizer).from_pretrained(tmp_path / "tokenizer")
    assert finetune(rows).key() == finetune(other, tokenizer=loaded, num_proc=2).key()


def test_a_change_of_anything_makes_another_entry(rows, tmp_path):
    chat = {"fresh": ChatEncoder(tiny_tokenizer(bos=True))}
    chat["template"] = ChatEncoder(tiny_tokenizer(), chat_template=CHAT_TEMPLATE)
    chat["other template"] = ChatEncoder(tiny_tokenizer(), chat_template=CHAT_TEMPLATE + " ")
    chat["format"] = ChatEncoder(tiny_tokenizer(), "plain")
    limits = [TokenLimits(*values) for values in [(32, None, None, "cut"), (64, 20, None, "cut")]]
    limits += [TokenLimits(64, None, 7, "cut"), TokenLimits(64, None, None, "drop")]
    limits += [TokenLimits(64, None, None, "cut", 2)]
    kept = Filters(), Filters(shuffle=True), Filters(shuffle=True, seed=1), Filters(duplicates="exact")
    kept += (Filters(duplicates="normalised"), Filters(remove_same_inputs=True))
    kept += (Filters(remove_same_responses=False), Filters(remove_evaluation_prompts=True))
    splits = Splits(), Splits(0.1), Splits(0.0, 0.1), Splits(0.1, 0.1), Splits(0.1, by="prompt")
    splits += (Splits(stages={"sft": 0.5, "ppo": 0.5}),)

    keys = [finetune(rows).key(), preparation(rows, kinds=("finetune", "prompts")).key()]
    for tokens in chat.values():
        changed = finetune(rows)
        changed.chat = tokens
        keys.append(changed.key())
    for allowed in limits:
        changed = finetune(rows)
        changed.limits = allowed
        keys.append(changed.key())
    keys += [finetune(rows, filters=filters).key() for filters in kept[1:]]
    keys += [finetune(rows, splits=split).key() for split in splits[1:]]
    keys += [finetune(rows, num_samples=5).key(), finetune(rows, find_turns=True).key()]
    keys += [finetune(rows, on_bad_row=how).key() for how in ("skip", "error")]
    keys += [finetune(rows, validation_data=ROWS[:3]).key(), finetune(rows, test_data=ROWS[:3]).key()]
    rows.write_text(rows.read_text().replace("answer 7", "answer 8"))
    keys.append(finetune(rows).key())
    assert len(set(keys)) == len(keys)


def test_data_that_change_while_they_are_read_are_not_kept(rows, cache, monkeypatch):
    prepared = finetune(rows)
    prepared.key()
    rows.write_text(rows.read_text().replace("answer 7", "answer 8"))
    with pytest.raises(UserError, match="the data changed while they were read; run again"):
        find_or_build(prepared, cache)
    assert entries(cache) == []


def test_a_cache_that_cannot_be_written_is_named(rows, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"the cache .*file/cache cannot be written .*set another `cache_dir`"):
        find_or_build(finetune(rows), tmp_path / "file" / "cache")


def test_of_two_hosts_that_do_not_see_each_others_lock_the_first_to_end_stands(rows, cache):
    ours, theirs = finetune(rows), finetune(rows)
    key = ours.key()
    (cache / f".{key}.otherhost.1").mkdir(parents=True)
    built: list[PreparedFolder] = []

    class Slow:
        def key(self):
            return key

        def build(self, folder):
            ours.build(folder)
            other = cache / f".{key}.otherhost.2"
            other.mkdir()
            theirs.build(other)
            other.rename(cache / key)
            built.append(PreparedFolder.open(cache / key))

    assert find_or_build(Slow(), cache).manifest == built[0].manifest
    assert entries(cache) == [f".{key}.otherhost.1", key]


def test_evaluation_data_of_which_nothing_is_left_are_refused(rows, tmp_path):
    bad = [{"prompt": "w" * 300, "response": "yes"}]
    with pytest.raises(UserError, match=r"the list of rows leaves nothing to validate on \(rows 1, dropped: prompt"):
        build(tmp_path / "data", str(rows), kinds=("finetune",), validation_data=bad, long_prompts="drop")
