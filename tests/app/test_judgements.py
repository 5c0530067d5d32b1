"""Judgements are there, once each, whatever happens to the process that took them."""

from __future__ import annotations

import json
import multiprocessing
import sqlite3
from functools import partial
from types import SimpleNamespace

import pytest

from helpers.stages import save_llama
from rlhf_lightning.app import judgements as store
from rlhf_lightning.app.judgements import Judgement, Judgements, Pair
from rlhf_lightning.chat.written import WrittenPrompt
from rlhf_lightning.data import PreferenceDataModule
from rlhf_lightning.errors import UserError

FORK = multiprocessing.get_context("fork")


def take(path, name, count, told):
    """A client that judges again and again, and tells what has been kept."""
    judgements = Judgements(path)
    for number in range(count):
        for _ in range(2):  # as a double click does
            judgements.add(Judgement(pair(f"{name} {number}"), f"annotator {name}", "first", True))
        told.send(number)


def client(path, name, count):
    heard, told = FORK.Pipe(duplex=False)
    process = FORK.Process(target=take, args=(path, name, count, told))
    process.start()
    told.close()
    return process, heard


def pair(number=0, first="good", second="bad", prompt=None):
    return Pair(WrittenPrompt(prompt or f"prompt {number}"), "runs/a", "runs/b", first, second, {"temperature": 0.7})


@pytest.fixture
def judgements(tmp_path):
    opened = Judgements(tmp_path / "new" / "judgements.sqlite")
    yield opened
    opened.close()


def test_four_clients_lose_nothing_when_they_are_killed(tmp_path):
    path, kept = tmp_path / "judgements.sqlite", 0
    for process, heard in [client(path, name, 250) for name in range(4)]:
        told = [heard.recv() for _ in range(40)]
        process.kill()
        process.join()
        kept += len(told)
    judgements = Judgements(path)
    assert len(judgements.all()) >= kept == 160
    for process, heard in [client(path, name, 250) for name in range(4)]:
        assert [heard.recv() for _ in range(250)] == list(range(250))
        process.join()
        assert process.exitcode == 0
    found = [(judgement.annotator, judgement.pair.written.prompt) for judgement in judgements.all()]
    assert len(found) == len(set(found)) == 1000


def test_the_first_judgement_of_a_pair_stands(judgements):
    assert judgements.add(Judgement(pair(), "Ann", "first", True, " why "))
    assert not judgements.add(Judgement(pair(), " Ann ", "second", False))
    assert judgements.add(Judgement(pair(), "Ben", "second", False))
    first, second = judgements.all()
    assert (first.annotator, first.choice, first.first_stood_left, first.comment) == ("Ann", "first", True, "why")
    assert (second.annotator, second.choice, second.first_stood_left) == ("Ben", "second", False)
    assert first.pair == pair()
    assert first.made.endswith("+00:00")


def test_what_cannot_be_a_judgement_is_refused(judgements):
    with pytest.raises(UserError, match="'left' is none of first, second, tie, both bad"):
        judgements.add(Judgement(pair(), "Ann", "left", True))
    with pytest.raises(UserError, match="name of its annotator"):
        judgements.add(Judgement(pair(), " ", "first", True))
    assert judgements.all() == []


def test_sides_are_shuffled_by_seed_pair_and_annotator():
    sides = [pair(number).first_is_left(1, "Ann") for number in range(200)]
    assert sides == [pair(number).first_is_left(1, "Ann") for number in range(200)]
    assert 70 < sum(sides) < 130
    assert sides != [pair(number).first_is_left(1, "Ben") for number in range(200)]
    assert sides != [pair(number).first_is_left(2, "Ann") for number in range(200)]


def test_agreement_is_of_the_pairs_that_both_judged(judgements):
    for number, (ann, ben) in enumerate(["ff", "fs", "ss", "ss", "f-", "-t"]):
        for name, said in (("Ann", ann), ("Ben", ben)):
            choice = {"f": "first", "s": "second", "t": "tie"}.get(said)
            if choice:
                judgements.add(Judgement(pair(number), name, choice, True))
    judgements.add(Judgement(pair(99), "Cay", "tie", True))
    (agreement,) = judgements.agreement()
    assert agreement[:3] == ("Ann", "Ben", 4)
    assert agreement.kappa == pytest.approx(0.5)


def test_preferences_are_what_the_data_module_reads(judgements, tmp_path):
    dialogue = [{"role": "user", "content": "how do i bake <b>bread</b>?\n🍞"}]
    for number in range(8):
        judgements.add(Judgement(pair(number), "Ann", "second" if number % 2 else "first", True))
    judgements.add(Judgement(pair(8), "Ann", "tie", True))
    judgements.add(Judgement(pair(9), "Ann", "both bad", True))
    judgements.add(Judgement(pair(10)._replace(written=WrittenPrompt(dialogue)), "Ann", "first", True))
    path = tmp_path / "preferences.jsonl"
    assert judgements.export(path) == 9
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows[0] == {"prompt": "prompt 0", "chosen": "good", "rejected": "bad"}
    assert rows[1] == {"prompt": "prompt 1", "chosen": "bad", "rejected": "good"}
    assert rows[-1]["prompt"] == dialogue
    base = save_llama(tmp_path / "base")
    module = PreferenceDataModule(base, path, batch_size=2, max_length=60, dialogue_format="plain", validation_split=0)
    module.setup("fit")
    assert sum(len(batch.row_ids) for batch in module.train_dataloader()) == 9


def test_two_servers_may_write_one_file(judgements):
    other = Judgements(judgements.path)
    assert judgements.add(Judgement(pair(0), "Ann", "first", True))
    assert not other.add(Judgement(pair(0), "Ann", "first", True))
    assert other.add(Judgement(pair(1), "Ann", "tie", True))
    assert len(judgements.all()) == len(other.all()) == 2
    other.close()


def test_a_file_that_is_held_by_another_is_refused_in_one_line(judgements, monkeypatch):
    monkeypatch.setattr(store, "_PATIENCE", 0.05)
    waiting = Judgements(judgements.path)
    holder = sqlite3.connect(judgements.path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    for blocked in (lambda: waiting.add(Judgement(pair(), "Ann", "first", True)), lambda: Judgements(judgements.path)):
        with pytest.raises(UserError, match="another process holds it; end that one, or try again") as caught:
            blocked()
        assert "\n" not in str(caught.value)
    holder.execute("ROLLBACK")
    assert waiting.add(Judgement(pair(), "Ann", "first", True)), "nothing was lost"
    waiting.close()


def test_other_files_are_refused(tmp_path):
    text, other, newer = (tmp_path / name for name in ("text", "other", "newer"))
    text.write_text("no database at all " * 100)
    with sqlite3.connect(other) as file:
        file.execute("CREATE TABLE songs (name TEXT)")
    before = other.read_bytes()
    Judgements(newer).close()
    with sqlite3.connect(newer) as file:
        file.execute("PRAGMA user_version = 7")
    for path, said in ((text, "not a database"), (other, "version 0, expected 1"), (newer, "version 7, expected 1")):
        with pytest.raises(UserError, match=said):
            Judgements(path)
    assert other.read_bytes() == before, "not even another journal mode"
    with pytest.raises(UserError, match="cannot be opened"):
        Judgements(tmp_path)
    with pytest.raises(UserError, match="cannot be opened"):
        Judgements(text / "below")


def test_a_new_file_may_be_opened_by_two_at_once(tmp_path, monkeypatch):
    path, connect, happened = tmp_path / "new.sqlite", sqlite3.connect, []

    class Interrupted(sqlite3.Connection):
        def execute(self, statement, *values):
            if "journal_mode" in statement and "refused" not in happened:
                happened.append("refused")
                raise sqlite3.OperationalError("database is locked")
            found = super().execute(statement, *values)
            if "SELECT" not in statement or "opened" in happened:
                return found
            happened.append("opened")
            rows = found.fetchall()
            monkeypatch.setattr(sqlite3, "connect", connect)
            Judgements(path).close()  # another is faster
            return SimpleNamespace(fetchone=lambda: rows[0])

    monkeypatch.setattr(sqlite3, "connect", partial(connect, factory=Interrupted))
    assert Judgements(path).add(Judgement(pair(), "Ann", "first", True))
    assert happened == ["opened", "refused"]
