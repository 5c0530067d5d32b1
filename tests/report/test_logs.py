"""What Lightning's loggers wrote is read again, resumed runs and broken files too."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_lightning.report.logs import find_logs, read_logs
from rlhf_lightning.runs.event_files import read_event_file


def log(folder, start, stop, every=2, name="train/loss"):
    """Losses of steps as a stage logs them, with a validation every few steps, in a file of its own."""
    logger = TensorBoardLogger(folder, name="", version="", default_hp_metric=False)
    for step in range(start, stop):
        logger.log_metrics({name: 10.0 * start + step, "epoch": 0}, step)
        if step % every == every - 1:
            logger.log_metrics({"val/loss": 100.0 + step}, step)
    logger.experiment.add_text("samples", f"from {start}", start)
    logger.finalize("success")
    # The files of one second are told apart by the number of the process and a counter.
    return sorted(folder.glob("events.out.tfevents.*"), key=lambda path: int(path.name.rpartition(".")[2]))[-1]


def test_scalars_and_texts_are_those_that_tensorboard_reads(tmp_path):
    read = read_event_file(log(tmp_path, 0, 5))
    theirs = EventAccumulator(str(tmp_path)).Reload()
    assert {*read.scalars} == {*theirs.Tags()["scalars"]} >= {"train/loss", "val/loss"}
    for name, points in read.scalars.items():
        assert points == [(event.step, event.value, event.wall_time) for event in theirs.Scalars(name)]
    assert read.texts == {"samples": [(0, "from 0")]}
    assert read.problem == ""


def test_a_training_step_is_before_its_update_and_a_validation_after_it(tmp_path):
    curves = read_logs([log(tmp_path, 0, 4)]).curves
    assert {*curves} == {"train/loss", "val/loss"}
    assert curves["train/loss"].steps.tolist() == [0, 1, 2, 3]
    assert curves["val/loss"].steps.tolist() == [2, 4]


def test_a_judge_counts_finished_iterations(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="", default_hp_metric=False)
    logger.log_metrics({"judge/score": 1.0}, 0)
    logger.log_metrics({"train/score": 1.0}, 0)
    logger.log_metrics({"judge/score": 2.0}, 1)
    logger.finalize("success")
    assert read_logs(find_logs(tmp_path)).curves["judge/score"].steps.tolist() == [0, 1]


def test_a_resumed_run_takes_back_what_came_after_its_checkpoint(tmp_path):
    files = [log(tmp_path, 0, 7), log(tmp_path, 4, 6)]
    logs = read_logs(files)
    assert logs.curves["train/loss"].values.tolist() == [0, 1, 2, 3, 44, 45]
    assert logs.curves["val/loss"].steps.tolist() == [2, 4, 6]
    assert logs.problems == []


def test_an_evaluation_afterwards_is_not_part_of_the_curves(tmp_path):
    files = [log(tmp_path, 0, 4), log(tmp_path, 0, 1, every=1, name="test/loss")]
    logs = read_logs(files)
    assert logs.curves["val/loss"].values.tolist() == [101, 103]
    assert logs.measured == {"test/loss": 0.0, "val/loss": 100.0}


@pytest.mark.parametrize("where", [0.1, 0.5, 0.95])
def test_of_a_file_that_was_cut_off_all_before_is_read_and_the_rest_said(tmp_path, where):
    path = log(tmp_path, 0, 20)
    whole = read_event_file(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * where)])
    read = read_event_file(path)
    assert f"'{path}' ends in the middle of a record" in read.problem
    losses = read.scalars.get("train/loss", [])
    assert losses == whole.scalars["train/loss"][: len(losses)]
    assert len(losses) >= int(20 * where) - 2
    assert read_logs([path]).problems == [read.problem]


def test_of_a_file_that_was_overwritten_all_before_is_read_and_the_rest_said(tmp_path):
    path = log(tmp_path, 0, 20)
    content = bytearray(path.read_bytes())
    half = len(content) // 2
    content[half : half + 64] = bytes(range(64))
    path.write_bytes(content)
    read = read_event_file(path)
    assert f"'{path}' is broken from byte" in read.problem
    assert 5 < len(read.scalars["train/loss"]) < 15


@given(st.binary(max_size=200))
def test_no_bytes_raise(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "events.out.tfevents.1"
    path.write_bytes(content)
    read = read_event_file(path)
    assert read.scalars == {}
    assert bool(read.problem) == bool(content)


def test_a_record_that_is_no_event_is_a_problem(tmp_path):
    path = log(tmp_path, 0, 2)
    content = bytearray(path.read_bytes())
    length = struct.unpack("<Q", content[:8])[0]
    content[12 : 12 + length] = b"\xff" * length
    path.write_bytes(content)
    assert read_event_file(path).problem == f"'{path}' is broken from byte 0 on"


def test_what_a_csv_logger_wrote_is_read_alike(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    for step in range(4):
        logger.log_metrics({"train/loss": float(step)}, step)
    logger.log_metrics({"val/loss": 7.0, "train/bad": float("nan")}, 3)
    logger.save()
    logs = read_logs(find_logs(tmp_path))
    assert logs.curves["train/loss"].values.tolist() == [0, 1, 2, 3]
    assert logs.curves["val/loss"].steps.tolist() == [4]
    assert np.isnan(logs.curves["train/bad"].values).all()
    assert logs.seconds is None


def test_a_column_without_a_number_is_no_curve(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train/loss\n1,x\n2,\x00\n")
    logs = read_logs(find_logs(tmp_path))
    assert (logs.curves, logs.measured) == ({}, {})
    assert logs.problems == [f"'{tmp_path / 'metrics.csv'}': 2 values are no numbers and are left out"]


def test_values_in_a_csv_that_are_no_numbers_are_counted(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,step,train/loss\n0,0,1.5\n0,one,2\n0,2,lost\n")
    logs = read_logs(find_logs(tmp_path))
    assert logs.curves["train/loss"].values.tolist() == [1.5]
    assert logs.problems == [f"'{tmp_path / 'metrics.csv'}': 2 values are no numbers and are left out"]


def test_logs_are_found_where_lightning_puts_them(tmp_path):
    assert find_logs(tmp_path) == []
    for version in (2, 10):
        logger = CSVLogger(tmp_path)
        logger._version = version
        logger.log_metrics({"train/loss": 1.0}, 0)
        logger.save()
    assert find_logs(tmp_path) == [tmp_path / "lightning_logs/version_10/metrics.csv"]
    path = log(tmp_path, 0, 1)
    assert find_logs(tmp_path) == [path]
