"""`rlhf quickstart --over_optimise`: what is drawn and said of courses, and which models it takes."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from rich.console import Console

from helpers.stages import save_reward_model
from rlhf_lightning.callbacks.evaluate import Judged
from rlhf_lightning.cli import quickstart
from rlhf_lightning.cli.quickstart import over_optimise as shown
from rlhf_lightning.cli.quickstart.over_optimise import Course, best_of_n_points
from rlhf_lightning.cli.quickstart.stages import gold
from rlhf_lightning.cli.quickstart.toy import build_toy_tokenizer, toy_paths, toy_texts, write_toy_data, write_toy_model
from rlhf_lightning.functional import best_of_n_kl


def rising_and_falling(*place: Any) -> list[Judged]:
    """A run whose score follows d (2 - 0.1 log d) and whose gold follows d (2 - log d), from -1."""
    import math

    def at(d: float, beta: float) -> float:
        return d * (2 - beta * math.log(d)) - 1 if d else -1.0

    return [Judged(i, at(d, 1.0), 1.0, at(d, 0.1), d * d, 1.0, 30.0, 64) for i, d in enumerate((0.0, 1.0, 3.0, 9.0))]


def test_everything_is_drawn_written_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(shown, "train_hard", rising_and_falling)
    monkeypatch.setattr(shown, "best_of_n_points", lambda *_: [(0.0, 0.0, 0.0), (1.0, 1.0, 1.5), (2.0, 1.5, 1.0)])
    console = Console(record=True, width=120)
    courses = shown.show_over_optimisation(tmp_path, tmp_path, quickstart.toy_paths(tmp_path), tmp_path, 1, console)
    said = console.export_text()
    assert [course.name for course in courses] == ["PPO without a KL penalty", "PPO, KL coefficient 0.1", "best-of-n"]
    assert "gold follows d (alpha - beta log d) with alpha 2.00, beta 1.00 (explains 100%)" in said
    assert said.count("gold is best") == 3
    numbers = json.loads((tmp_path / "over_optimisation.json").read_text())
    assert numbers[0]["gold"]["rl"]["beta"] == pytest.approx(1.0)
    assert numbers[0]["score"]["rl"]["beta"] == pytest.approx(0.1)
    assert set(numbers[2]["gold"]) == {"best_of_n", "rl"}
    picture = imread(tmp_path / "over_optimisation.png")
    assert picture.shape[0] > 300
    assert picture.std() > 0.05


def test_the_best_point_is_that_of_gold():
    course = Course("x", "rl", [(0.0, 0.0, 0.0), (1.0, 1.0, 2.0), (4.0, 3.0, -1.0)])
    assert course.best == (1.0, 1.0, 2.0)


def test_best_of_n_is_measured_by_the_reward_model_and_by_gold(tmp_path, monkeypatch):
    monkeypatch.setattr(shown, "BEST_OF", 4)
    monkeypatch.setattr(shown, "BEST_OF_PROMPTS", 3)
    data = write_toy_data(tmp_path / "data", 1, num_sft=200, num_pairs=1, num_prompts=1, num_heldout=3)
    tokenizer = build_toy_tokenizer(toy_texts(data))
    base = write_toy_model(tmp_path / "base", tokenizer)
    reward = Path(save_reward_model(tmp_path / "reward", str(base), tokenizer))
    points = best_of_n_points(base, reward, data, seed=1)
    assert [kl for kl, _, _ in points] == [best_of_n_kl(n) for n in (1, 2, 4)]
    scores, golds = [score for _, score, _ in points], [true for _, _, true in points]
    assert scores == sorted(scores)
    assert scores[0] < scores[-1]
    assert all(-4 <= true <= 3 for true in golds)


def test_gold_reads_prompts_as_judges_are_given_them():
    assert gold(["How do I feed my goat?"], ["Good question! Good question! Good question!"]) == [-3.0]


@pytest.mark.parametrize(("seed", "made"), [(1, True), (2, False)])
def test_models_of_a_finished_quickstart_are_taken(tmp_path, monkeypatch, seed, made):
    calls: list[str] = []
    monkeypatch.setattr(quickstart, "_three_stages", lambda *_: calls.append("stages"))
    monkeypatch.setattr(
        quickstart, "show_over_optimisation", lambda sft, *_: calls.append(str(sft.relative_to(tmp_path)))
    )
    (tmp_path / "data").mkdir()
    for path in toy_paths(tmp_path / "data"):
        path.touch()
    (tmp_path / "results.json").write_text('{"seed": 1}')
    quickstart.main(["--over_optimise", "--out", str(tmp_path), "--seed", str(seed)])
    assert calls == (["sft/export"] if made else ["stages", "sft/export"])


def quick_stages(monkeypatch, stop_at=None):
    """Stages that write their seed in the place of a model."""

    def export(stage):
        def train(*arguments):
            if stage == stop_at:
                raise KeyboardInterrupt
            *_, folder, seed = arguments
            (folder / "export").mkdir(parents=True, exist_ok=True)
            (folder / "export" / "seed").write_text(str(seed))
            return quickstart.StageResult(folder / "export", folder, dict.fromkeys(METRICS, 1.0), 1.0)

        return train

    def write_data(folder, seed):
        folder.mkdir(parents=True, exist_ok=True)
        for path in toy_paths(folder):
            path.write_text(str(seed))
        return toy_paths(folder)

    row = {"prompt": "p", "response": "r", "gold": 1.0, "score": 1.0, "ended": True, "tokens": 3, "kl": 0.1}
    last = export("last")
    monkeypatch.setattr(quickstart, "write_toy_data", write_data)
    for name in ("write_toy_model", "build_toy_tokenizer", "toy_texts", "plot_curves", "read_runs", "save_report"):
        monkeypatch.setattr(quickstart, name, lambda *_: None)
    monkeypatch.setattr(quickstart, "train_sft", export("sft"))
    monkeypatch.setattr(quickstart, "train_reward", export("reward"))
    monkeypatch.setattr(quickstart, "train_last", lambda *a: (last(*a), Course("x", "rl", [])))
    monkeypatch.setattr(quickstart, "answer", lambda *_: [row] * 4)
    monkeypatch.setattr(quickstart, "gold_accuracy", lambda *_: 0.9)


METRICS = ("val/loss", "val/perplexity", "val/accuracy")


@pytest.mark.parametrize(
    ("other", "stop_at"),
    [(["--over_optimise"], None), ([], "sft"), ([], "reward"), ([], "last")],
    ids=["over_optimise", "sft", "reward", "last"],
)
def test_numbers_of_one_seed_say_nothing_of_models_of_another(tmp_path, monkeypatch, other, stop_at):
    used: list[set[str]] = []
    monkeypatch.setattr(
        quickstart,
        "show_over_optimisation",
        lambda sft, reward, data, *_: used.append(
            {(sft / "seed").read_text(), (reward / "seed").read_text(), data.sft.read_text()}
        ),
    )
    words = ["--out", str(tmp_path), "--seed"]
    quick_stages(monkeypatch)
    quickstart.main([*words, "1"])
    quick_stages(monkeypatch, stop_at)
    with contextlib.suppress(KeyboardInterrupt):
        quickstart.main([*words, "2", *other])
    quick_stages(monkeypatch)
    quickstart.main([*words, "1", "--over_optimise"])
    assert used[-1] == {"1"}


@pytest.mark.parametrize("text", ['{"seed": ', "[1]", "\xff"])
def test_numbers_that_cannot_be_read_are_none(tmp_path, text):
    (tmp_path / "results.json").write_text(text, encoding="latin-1")
    assert not quickstart._is_made(tmp_path, 1)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "diary.txt").touch()
    with pytest.raises(quickstart.UserError, match="holds no quickstart"):
        quickstart.main(["--over_optimise", "--out", str(tmp_path)])
