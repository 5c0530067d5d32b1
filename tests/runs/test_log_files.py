"""Logs are cut where a checkpoint found them, whatever was written after it, and go on from there."""

import csv

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from helpers.stages import MemoryLogger
from rlhf_lightning.runs.event_files import PATTERN, find_event_files, read_event_file
from rlhf_lightning.runs.log_files import CSV, LogPlaces, go_back, is_of_a_fit, open_csv


def tensorboard(folder):
    return TensorBoardLogger(folder, name="", version="", default_hp_metric=False)


def csv_logger(folder):
    return CSVLogger(folder, name="", version="")


def log(logger, steps, **more):
    for step in steps:
        logger.log_metrics({"train/loss": step / 2, **more}, step=step)
    logger.save()


def events(folder):
    """Everything that a reader finds in the event files, one after the other."""
    files = [read_event_file(path) for path in find_event_files(folder)]
    assert not [file.problem for file in files if file.problem]
    return [(name, *point[:2]) for file in files for name, points in file.scalars.items() for point in points]


def test_event_files_are_cut_at_the_place_and_others_stay(tmp_path):
    log(validation := tensorboard(tmp_path), [])
    validation.log_metrics({"val/loss": 7.0}, step=0)
    validation.finalize("success")
    first = tensorboard(tmp_path)
    log(first, range(3))
    (place,) = LogPlaces()([first])
    log(first, range(3, 6))
    first.experiment.add_text("train/sample", "said", 6)
    first.finalize("success")
    log(lost := tensorboard(tmp_path), range(3, 5))  # resumed, and killed before it saved anything
    lost.finalize("success")
    (tmp_path / "events.out.tfevents.0.tests").write_bytes(b"half a record")

    again = tensorboard(tmp_path)
    again.experiment.add_text("hyperparameters", "as before", 0)
    go_back([again], [place])
    log(again, range(3, 6))

    points = events_but(tmp_path, "events.out.tfevents.0.tests")
    assert [point for point in points if point[0] == "val/loss"] == [("val/loss", 0, 7.0)]
    assert [point[1:] for point in points if point[0] == "train/loss"] == [(step, step / 2) for step in range(6)]


def events_but(folder, name):
    (folder / name).unlink()
    return events(folder)


def test_event_files_come_in_the_order_in_which_they_were_begun(tmp_path):
    names = [f"events.out.tfevents.1790000000.host1.{rest}" for rest in ("9.2", "9.9", "9.10", "10.0", "10.0.v2")]
    for name in ["events.out.tfevents.999999999.host1.9.11", *names][::-1]:
        (tmp_path / name).touch()

    assert [path.name for path in find_event_files(tmp_path)][1:] == names


def test_only_files_with_something_of_training_are_of_a_fit(tmp_path):
    for number, (tag, expected) in enumerate([("train/loss", True), ("judge/score", True), ("val/loss", False)]):
        logger = tensorboard(tmp_path / str(number))
        logger.log_metrics({tag: 1.0}, step=0)
        logger.finalize("success")
        (path,) = (tmp_path / str(number)).glob(PATTERN)
        assert is_of_a_fit(path) == expected


def rows(folder):
    with (folder / CSV).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("killed_while_opening", [False, True])
def test_rows_are_cut_at_their_number_and_new_columns_stay(tmp_path, killed_while_opening, recwarn):
    first = csv_logger(tmp_path)
    log(first, range(3))
    (place,) = LogPlaces()([first])
    log(first, range(3, 6), **{"val/loss": 1.0})  # a new column writes the file anew
    with (tmp_path / CSV).open("a") as file:
        file.write("7,")  # killed in the middle of a row
    if killed_while_opening:
        (tmp_path / CSV).rename(tmp_path / (CSV + ".kept"))

    again = csv_logger(tmp_path)
    open_csv(again)
    go_back([again], [place])
    log(again, range(3, 6), **{"val/loss": 2.0})

    assert [(row["step"], row["train/loss"], row["val/loss"]) for row in rows(tmp_path)] == [
        (str(step), str(step / 2), "" if step < 3 else "2.0") for step in range(6)
    ]
    assert not [warning for warning in recwarn if "will be deleted" in str(warning.message)]


def test_a_run_that_starts_anew_begins_a_new_table(tmp_path):
    log(csv_logger(tmp_path), range(3), **{"val/loss": 1.0})

    again = csv_logger(tmp_path)
    open_csv(again)
    go_back([again], [{"rows": 0}])
    log(again, range(2))

    assert [[*row] for row in rows(tmp_path)] == [["step", "train/loss"]] * 2


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=6))
def test_rows_are_counted_as_they_come(tmp_path_factory, written):
    folder = tmp_path_factory.mktemp("rows")
    logger, places, count = csv_logger(folder), LogPlaces(), 0
    for number, (more, new_column) in enumerate(written):
        log(logger, range(count, count + more), **({f"val/{number}": 1.0} if new_column else {}))
        count += more
        assert places([logger]) == [{"rows": count}]


def test_other_loggers_keep_what_they_were_given():
    logger = MemoryLogger()
    log(logger, range(3))
    go_back([logger], LogPlaces()([logger]))
    assert len(logger.calls) == 3
