"""The guard acts where the judge falls while the score rises, and nowhere else."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from pytorch_lightning.callbacks import ModelCheckpoint

from helpers.stages import adamw, fit, prompt_rows, same_weights, save_llama, share_of_letters, weights
from rlhf_lightning import (
    Evaluate,
    HFExport,
    OverOptimisation,
    PPOModule,
    PromptDataModule,
    Sampling,
    UserError,
    load_causal_lm,
)
from rlhf_lightning.callbacks.evaluate import Judged
from rlhf_lightning.cli.main import main


class Schedule:
    factor = 1.0

    def scale(self, factor: float) -> None:
        self.factor *= factor


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Folders that were written, by name."""
    folders: list[str] = []
    monkeypatch.setattr(HFExport, "export", lambda self, trainer, module, folder: folders.append(Path(folder).name))
    return folders


def watch(guard: OverOptimisation, judge: list[float], score: list[float], std: float = 0.0) -> tuple[int | None, Any]:
    """The place of a curve at which the run would have stopped, and the schedule after it."""
    trainer: Any = SimpleNamespace(should_stop=False, fast_dev_run=False, default_root_dir="run")
    schedule = Schedule()
    module: Any = SimpleNamespace(lr_schedulers=lambda: schedule)
    for place, (held_out, proxy) in enumerate(zip(judge, score, strict=True)):
        guard.on_judged(trainer, module, Judged(place, held_out, std, proxy, 1.0, 1.0, 9.0, 64))
        if trainer.should_stop:
            return place, schedule
    return None, schedule


RISING = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_it_stops_where_the_judge_falls_while_the_score_rises(exported):
    guard = OverOptimisation(patience=3)
    with pytest.warns(
        UserWarning, match=r"from judge 1\.5, score 2 \(iteration 2\) to judge -1, .*; the run ends here"
    ):
        stopped, _ = watch(guard, [0.0, 1.0, 1.5, 1.0, 0.0, -1.0, -2.0], RISING)
    assert stopped == 5
    assert guard.best is not None
    assert guard.best.iteration == 2
    assert exported == ["best_by_judge"] * 2  # not for where it all began


@pytest.mark.parametrize(
    ("judge", "score"),
    [
        (RISING, RISING),  # both rise
        ([0.0, 1.0, 0.5, 0.4, 0.3, 0.2, 0.1], [0.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5]),  # both fall
        ([0.0, 1.0, 0.9, 0.9, 1.1, 1.0, 1.0], RISING),  # a new best in between
        ([0.0, 1.0, 0.9, 0.9, 1.0, 0.9, 0.9], RISING),  # back at the best in between
    ],
)
def test_it_lets_other_runs_go_on(exported, judge, score):
    assert watch(OverOptimisation(patience=3), judge, score)[0] is None


def test_a_fall_that_chance_explains_counts_for_nothing(exported):
    judge = [0.0, 1.0, 0.6, 0.6, 0.6, 0.6, 0.6]
    # Two means of 64 scores of standard deviation 2 differ by chance by 2 * sqrt(2) / 8 = 0.354; the fall is 0.4.
    assert watch(OverOptimisation(tolerance=1.2), judge, RISING, std=2.0)[0] is None
    with pytest.warns(UserWarning, match="over-optimisation"):
        assert watch(OverOptimisation(tolerance=1.1), judge, RISING, std=2.0)[0] == 4


def test_it_can_slow_down_instead_and_again(exported):
    guard = OverOptimisation(patience=2, action="lower_lr", factor=0.1)
    with pytest.warns(UserWarning, match=r"learning rates are now 0\.1 of those of the settings"):
        stopped, schedule = watch(guard, [2.0, 1.0, 0.5, 0.4, 0.3, 0.2, 0.1], RISING)
    assert stopped is None
    assert guard.lr_factor == schedule.factor == pytest.approx(1e-3)


def test_what_it_knows_survives_a_checkpoint(exported):
    judge = [0.0, 1.0, 0.5, 0.4, 0.3, 0.2, 0.1]
    for cut in range(5):
        first, second = OverOptimisation(patience=3), OverOptimisation(patience=3)
        assert watch(first, judge[:cut], RISING[:cut])[0] is None
        second.load_state_dict(first.state_dict())
        assert second.state_dict() == first.state_dict()
        with pytest.warns(UserWarning, match="over-optimisation"):
            assert watch(second, judge[cut:], RISING[cut:])[0] == 4 - cut


def test_without_a_judge_it_is_refused(folder):
    with pytest.raises(UserError, match="add the callback rlhf_lightning"):
        fit(*ppo(folder), callbacks=[OverOptimisation()])


# In a run.


def fewer_letters(prompts: list[str], responses: list[str]) -> list[float]:
    """The opposite of what is trained on."""
    return [-score for score in share_of_letters(prompts, responses)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"))


def ppo(folder: str) -> tuple[PPOModule, PromptDataModule]:
    """Up to eight iterations of two optimizer steps, in which the score rises."""
    sizes: dict[str, Any] = {"rollout_batch_size": 8, "minibatch_size": 8, "ppo_epochs": 2}
    options: dict[str, Any] = {"lr_schedule": "linear", "warmup_steps": 2, "optimizer": adamw(1e-2)}
    module = PPOModule(folder, share_of_letters, **sizes, **options, sampling=Sampling(max_new_tokens=6))
    rows = prompt_rows(64)
    return module, PromptDataModule(folder, rows, validation_data=rows[:16], rollout_batch_size=8, max_prompt_length=40)


def run(folder: str, root: Path, judge: Any, ckpt_path: Path | None = None, **options: Any) -> tuple[Any, Any, Any]:
    torch.manual_seed(3)
    module, data = ppo(folder)
    guard = OverOptimisation(patience=1, tolerance=0.0, **options)
    saver = ModelCheckpoint(root / "checkpoints", "{step}", every_n_train_steps=2, save_top_k=-1)
    callbacks = [guard, Evaluate(judge, every_n_iterations=1), saver]
    settings = {"default_root_dir": root, "enable_checkpointing": True, "ckpt_path": ckpt_path}
    return guard, module, fit(module, data, callbacks=callbacks, **settings)


def test_a_run_stops_and_the_best_policy_is_where_it_says(folder, tmp_path, caplog):
    with pytest.warns(UserWarning, match="over-optimisation"), caplog.at_level("INFO", "pytorch_lightning"):
        guard, module, _ = run(folder, tmp_path, fewer_letters)
    assert 0 < module.iteration < 8
    place = f"'{tmp_path / 'best_by_judge'}'" if guard.best.iteration else "what training started from"
    assert f"the judge liked best {place}: judge {guard.best.score:.3g}" in caplog.text

    newest = tmp_path / "checkpoints" / f"step={2 * module.iteration}.ckpt"
    with caplog.at_level("INFO", "pytorch_lightning"):
        _, again, log = run(folder, tmp_path, fewer_letters, newest)  # as if it had been killed before its end
    assert same_weights(weights(again), weights(module))
    assert len(log.series("train/lr")) == 1  # what the killed process had yet to log
    assert "OverOptimisation has ended this run before" in caplog.text


def test_the_best_policy_is_the_one_that_was_judged(folder, tmp_path):
    seen: dict[int, Any] = {}

    def once(prompts: list[str], responses: list[str]) -> list[float]:
        """Likes the third policy best."""
        seen[len(seen)] = None
        return [1.0 if len(seen) == 3 else 0.0] * len(responses)

    with pytest.warns(UserWarning, match="over-optimisation"):
        guard, _, _ = run(folder, tmp_path, once)
    assert guard.best.iteration == 2
    best = load_causal_lm(tmp_path / "best_by_judge")
    checkpoint = torch.load(tmp_path / "checkpoints" / "step=4.ckpt", weights_only=True)["state_dict"]
    for name, weight in best.state_dict().items():
        assert torch.equal(weight, checkpoint[f"policy.{name}"]), name


def test_lowered_learning_rates_are_gone_on_with(folder, tmp_path):
    with pytest.warns(UserWarning, match="over-optimisation"):
        guard, module, log = run(folder, tmp_path, fewer_letters, action="lower_lr", factor=0.5)
    plain = fit(*ppo(folder)).series("train/lr")
    factors = [lr / full for lr, full in zip(log.series("train/lr"), plain, strict=True)]
    assert factors[0] == 1
    assert any(factors[-1] == pytest.approx(guard.lr_factor * later) for later in (1, 2))  # lowered after the last?
    lowered = next(i for i, factor in enumerate(factors) if factor < 0.9)
    assert lowered < 7

    checkpoint = tmp_path / "checkpoints" / f"step={2 * (lowered + 1)}.ckpt"
    with pytest.warns(UserWarning, match="over-optimisation"):
        again, resumed, resumed_log = run(folder, tmp_path, fewer_letters, checkpoint, action="lower_lr", factor=0.5)
    assert resumed_log.series("train/lr") == log.series("train/lr")[lowered:]  # of the step of the checkpoint on
    assert same_weights(weights(module), weights(resumed))
    assert again.state_dict() == guard.state_dict()


def test_the_config_of_the_page_adds_both_callbacks_to_those_of_the_recipe(tmp_path, capsys, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(# judged.yaml.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "judged.yaml").write_text(block)
    monkeypatch.setattr("sys.argv", ["rlhf"])
    with pytest.raises(SystemExit):
        main(["fit", "--config", "ppo.yaml", "--config", str(tmp_path / "judged.yaml"), "--print_config"])
    callbacks = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    assert [callback["class_path"].rpartition(".")[2] for callback in callbacks] == [
        *("ModelCheckpoint", "HFExport", "PredictionWriter", "SampleTexts"),
        *("Evaluate", "OverOptimisation"),
    ]
    assert callbacks[-2]["init_args"]["judge"] == "runs/other_reward/export"


def test_a_folder_of_somebody_else_is_not_replaced(folder, tmp_path):
    (tmp_path / "best_by_judge").mkdir()
    (tmp_path / "best_by_judge" / "diary.txt").write_text("mine")
    with pytest.raises(UserError, match="is not an export of this package"):
        run(folder, tmp_path, fewer_letters)
