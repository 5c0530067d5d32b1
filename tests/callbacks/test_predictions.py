import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rlhf_lightning import PredictionWriter


def rank(folder: Path, number: int, world_size: int) -> Any:
    """What the writer reads of a trainer in process `number`."""
    strategy = SimpleNamespace(barrier=lambda: None)
    return SimpleNamespace(
        default_root_dir=str(folder),
        global_rank=number,
        world_size=world_size,
        is_global_zero=number == 0,
        strategy=strategy,
    )


def rows(*numbers: int, **more: Any) -> list[dict[str, Any]]:
    return [{"row": number, "response": f"ünï {number}\u2028x", **more} for number in numbers]


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_predictions_are_in_the_order_of_the_source_each_row_once(tmp_path):
    writer, trainer = PredictionWriter(), rank(tmp_path, 0, 1)
    writer.on_predict_start(trainer, None)
    for batch in (
        rows(0, 2),
        rows(1, 3),
        rows(4),
        rows(0),
    ):  # a sampler of the user's may fill up with rows from the front
        writer.write_on_batch_end(trainer, None, batch)
    writer.on_predict_end(trainer, None)
    assert written(tmp_path / "predictions.jsonl") == rows(0, 1, 2, 3, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]


def test_both_sides_of_a_pair_are_kept(tmp_path):
    writer, trainer = PredictionWriter(str(tmp_path / "deep" / "scores.jsonl")), rank(tmp_path, 0, 1)
    writer.on_predict_start(trainer, None)
    writer.write_on_batch_end(trainer, None, rows(1, role="chosen") + rows(1, role="rejected") + rows(0, role="chosen"))
    writer.on_predict_end(trainer, None)
    keys = [(row["row"], row["role"]) for row in written(tmp_path / "deep" / "scores.jsonl")]
    assert keys == [(0, "chosen"), (1, "chosen"), (1, "rejected")]


def test_a_new_run_replaces_the_file_and_forgets_what_a_killed_one_left(tmp_path):
    writer, trainer = PredictionWriter(), rank(tmp_path, 0, 1)
    (tmp_path / "predictions.jsonl").write_text("old")
    (tmp_path / "predictions.jsonl.rank0").write_text("half a li")
    writer.on_predict_start(trainer, None)
    writer.write_on_batch_end(trainer, None, rows(0))
    assert (tmp_path / "predictions.jsonl").read_text() == "old"
    writer.on_predict_end(trainer, None)
    assert written(tmp_path / "predictions.jsonl") == rows(0)


def test_an_exception_leaves_no_part(tmp_path):
    writer, trainer = PredictionWriter(), rank(tmp_path, 0, 1)
    writer.on_predict_start(trainer, None)
    writer.write_on_batch_end(trainer, None, rows(0))
    writer.on_exception(trainer, None, KeyboardInterrupt())
    assert list(tmp_path.iterdir()) == []
