"""Guards: a step that is not finite is left out as if its batch were not there, and a metric that runs away is seen."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.demos.boring_classes import BoringModel

from helpers.guard_runs import loader, stage
from helpers.stages import fit, same_weights, save_llama, trainer, weights
from rlhf_lightning import DeepSpeedStrategy, MetricGuard, NonFiniteError, SkipNonFinite, UserError
from rlhf_lightning.callbacks.guards import keep_best_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"))


def state(module: Any) -> dict[str, Any]:
    """Weights, and what the optimizer remembers."""
    moments = module.optimizers().optimizer.state_dict()["state"]
    remembered = {f"{i} {name}": value for i, each in moments.items() for name, value in each.items()}
    return {**weights(module), **remembered}


# Steps that are not finite


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("name", ["sft", "reward", "dpo"])
def test_a_skipped_step_leaves_no_trace(folder, tmp_path, name, what):
    """A run over three batches of which the second is bad ends as one over the other two: bit for bit."""
    torch.manual_seed(0)
    module, (first, bad, last) = stage(name, folder)
    module.bad_rows, module.what = (5,), what
    skip = SkipNonFinite()
    with pytest.warns(UserWarning, match="a step is skipped, number 1 of at most 3: the .* not"):
        fit(module, loader([first, bad, last]), callbacks=[skip], default_root_dir=tmp_path)
    torch.manual_seed(0)
    without, _ = stage(name, folder)
    fit(without, loader([first, last]))
    assert skip.skips == 1
    assert module.trainer.global_step == without.trainer.global_step == 2
    assert same_weights(state(module), state(without))
    assert "training_step" not in vars(module)


def test_a_bad_score_leaves_no_trace_of_its_iteration(folder, tmp_path):
    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        return [
            math.nan if prompt.startswith("5:") else len(text) / 10
            for prompt, text in zip(prompts, responses, strict=True)
        ]

    module, (first, bad, last) = stage("ppo", folder, reward)
    with pytest.warns(UserWarning, match=r"a score is not finite \(rows 5\)"):
        fit(module, loader([first, bad, last]), callbacks=[SkipNonFinite()], default_root_dir=tmp_path)
    without, _ = stage("ppo", folder, reward)
    fit(without, loader([first, last]))
    assert module.iteration == without.iteration == 2
    assert module.run_state() == without.run_state()
    assert same_weights(state(module), state(without))
    saved = torch.load(tmp_path / "non_finite" / "1_rank0.pt", weights_only=True)
    assert saved["examples"]["scores"].isnan().tolist() == [False, True, False, False]
    assert len(saved["examples"]["responses"]) == 4


def test_of_an_iteration_the_rest_is_left_out(folder, tmp_path):
    module, batches = stage("ppo", folder)
    module.bad_rows = (1,)
    with pytest.warns(UserWarning, match="a step is skipped"):
        log = fit(module, loader(batches), callbacks=[SkipNonFinite()], default_root_dir=tmp_path)
    assert module.iteration == 3
    assert 8 <= module.trainer.global_step <= 11
    assert len(log.series("train/score")) == 2
    saved = torch.load(tmp_path / "non_finite" / "1_rank0.pt", weights_only=True)
    assert {"response_ids", "advantages", "row_ids"} <= saved["examples"][0].keys()
    assert "\nexamples[0].response_ids[0]: " in (tmp_path / "non_finite" / "1_rank0.txt").read_text()


def test_what_was_skipped_can_be_looked_at(folder, tmp_path):
    module, batches = stage("sft", folder)
    module.bad_rows = (6,)
    with pytest.warns(UserWarning, match=f"is in '{tmp_path}/non_finite/1_rank0.pt'"):
        fit(module, loader(batches), callbacks=[SkipNonFinite()], default_root_dir=tmp_path)
    assert sorted(path.name for path in (tmp_path / "non_finite").iterdir()) == ["1_rank0.pt", "1_rank0.txt"]
    saved = torch.load(tmp_path / "non_finite" / "1_rank0.pt", weights_only=True)
    assert saved["message"].startswith("the loss is nan after 1 optimizer steps, in rows 4, 5, 6, 7")
    for name, tensor in batches[1]._asdict().items():
        assert tensor is None or torch.equal(saved["batch"][name], tensor)
    texts = (tmp_path / "non_finite" / "1_rank0.txt").read_text().splitlines()
    assert texts[0] == saved["message"]
    assert any(line.startswith("batch.input_ids[2]: 6:") for line in texts)


def test_more_than_may_be_skipped_ends_the_run_also_a_resumed_one(folder, tmp_path):
    module, batches = stage("sft", folder)
    module.bad_rows = (5,)
    settings: dict[str, Any] = {"default_root_dir": tmp_path}
    with pytest.warns(UserWarning, match="number 1 of at most 1"):
        fit(module, loader(batches), callbacks=[SkipNonFinite(1)], **settings)
    saved = tmp_path / "run.ckpt"
    module.trainer.save_checkpoint(saved)
    again, _ = stage("sft", folder)
    again.bad_rows = (9,)
    with pytest.raises(NonFiniteError, match=r"in rows 8, 9, .*; 1 steps were skipped before, the most that may be"):
        fit(again, loader(batches), callbacks=[SkipNonFinite(1)], ckpt_path=saved, max_epochs=2, **settings)
    assert again.trainer.global_step == 4
    assert "training_step" not in vars(again)


def test_where_no_step_can_be_skipped_it_says_so(folder):
    with pytest.raises(UserError, match="SkipNonFinite goes with the modules of this package"):
        trainer(callbacks=[SkipNonFinite()]).fit(BoringModel())
    run = SimpleNamespace(strategy=DeepSpeedStrategy(stage=2))
    module = SimpleNamespace(automatic_optimization=False)
    with pytest.raises(UserError, match="steps cannot be skipped on DeepSpeed"):
        SkipNonFinite().on_fit_start(run, module)  # type: ignore[arg-type]


# Metrics that run away


class Schedule:
    factor = 1.0

    def scale(self, factor: float) -> None:
        self.factor *= factor


def watch(guard: MetricGuard, values: list[float]) -> tuple[int | None, float]:
    """After how many values the run would have stopped, and what learning rates were multiplied by."""
    schedule = Schedule()
    strategy = SimpleNamespace(broadcast=lambda value: value)
    run: Any = SimpleNamespace(strategy=strategy, callbacks=[guard], checkpoint_callbacks=[], should_stop=False)
    module: Any = SimpleNamespace(lr_schedulers=lambda: schedule)
    for place, value in enumerate(values):
        run.callback_metrics = {guard.metric: torch.tensor(value)}
        guard.on_train_batch_end(run, module)
        if run.should_stop:
            return place + 1, schedule.factor
    return None, schedule.factor


@pytest.mark.parametrize(
    ("limits", "values", "stopped"),
    [
        ({"above": 2.0}, [0, 1, 3, 3, 3, 3], 4),  # (1 + 3 + 3) / 3 is above 2
        ({"above": 2.0}, [0, 5, 0, 0, 5, 0], None),  # one peak is none
        ({"above": 2.0}, [2, 2, 2, 2], None),  # the limit itself is allowed
        ({"below": 1.0}, [2, 1, 0.9, 0.5], 4),
        ({"below": -1.0}, [-2, -2, -2], 3),
        ({"below": 1.0, "above": 2.0}, [1, 2, 1.5, 1], None),
        ({"below": 1.0, "above": 2.0}, [1, 2, 9], 3),
        ({"above": 2.0}, [1, math.nan, 1, 1], 3),
        ({"above": 2.0}, [1, -math.inf, 1, 1], 3),
        ({"above": 2.0}, [9, 9], None),  # the window is not full
    ],
)
def test_it_stops_where_the_mean_leaves_the_limits(limits, values, stopped):
    guard = MetricGuard("train/kl", window=3, **limits)
    if stopped is None:
        assert watch(guard, values)[0] is None
        return
    with pytest.warns(UserWarning, match=r"train/kl is .* over the last 3 values, .*; the run ends here"):
        assert watch(guard, values)[0] == stopped


def test_it_lowers_learning_rates_once_for_each_window():
    guard = MetricGuard("train/kl", above=1, window=2, action="lower_lr", factor=0.1)
    with pytest.warns(UserWarning, match="above 1; learning rates are now 0.1 of those of the settings"):
        stopped, factor = watch(guard, [2.0] * 5)
    assert stopped is None
    assert guard.lr_factor == factor == pytest.approx(0.01)


def test_it_may_only_warn():
    with pytest.warns(UserWarning, match="below 1; the run goes on") as said:
        assert watch(MetricGuard("train/entropy", below=1, window=2, action="warn"), [0.5] * 4) == (None, 1.0)
    assert len(said) == 2


def test_what_it_knows_survives_a_checkpoint():
    values = [0.0, 0.0, 9.0, 9.0]
    for cut in range(4):
        first, second = (MetricGuard("train/kl", above=5, window=3) for _ in range(2))
        assert watch(first, values[:cut])[0] is None
        second.load_state_dict(first.state_dict())
        with pytest.warns(UserWarning, match="train/kl is 6 over"):
            assert watch(second, values[cut:])[0] == 4 - cut


@pytest.mark.parametrize(("action", "known"), [("stop", True), ("warn", False)])
def test_that_it_has_ended_the_run_is_known_as_long_as_it_may(action, known):
    guard, again = MetricGuard("train/kl", above=1, window=1), MetricGuard("train/kl", above=1, action=action)
    with pytest.warns(UserWarning, match="the run ends here"):
        watch(guard, [2.0])
    again.load_state_dict(guard.state_dict())
    assert again.has_stopped == known


@pytest.mark.parametrize(
    ("limits", "message"),
    [({}, "give above or below, the limits of train/kl"), ({"above": 1, "below": 1.0}, "must be less than above")],
)
def test_limits_that_make_no_sense_are_refused(limits, message):
    with pytest.raises(UserError, match=message):
        MetricGuard("train/kl", **limits)


def run_guarded(folder: str, root: Path, *guards: Any, **settings: Any) -> Any:
    module, batches = stage("sft", folder)
    module.bad_rows = settings.pop("bad_rows", ())
    saver = ModelCheckpoint(root / "checkpoints", "{step}", **settings.pop("saver", {"every_n_train_steps": 1}))
    fit(
        module,
        loader(batches),
        callbacks=[*guards, saver],
        enable_checkpointing=True,
        default_root_dir=root,
        **settings,
    )
    return module


def test_a_run_stops_and_the_newest_checkpoint_from_before_is_kept(folder, tmp_path):
    """Keeping one checkpoint only, it would be replaced by that of the step at which the guard acts."""
    kept = tmp_path / "kept" / "step=1.ckpt"
    with pytest.warns(UserWarning, match=f"train/loss is .* above 0; the run ends here, and the best .* '{kept}'"):
        module = run_guarded(folder, tmp_path, MetricGuard("train/loss", above=0, window=2), max_epochs=3)
    assert module.trainer.global_step == 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step=2.ckpt"]
    assert torch.load(kept, weights_only=True)["global_step"] == 1


def test_the_checkpoint_that_a_monitor_likes_best_is_kept_by_it(folder, tmp_path):
    saver = {"monitor": "train/loss", "mode": "max", "every_n_train_steps": 1}
    with pytest.warns(UserWarning, match="the best checkpoint is '") as said:
        run_guarded(folder, tmp_path, MetricGuard("train/loss", above=0, window=3), saver=saver)
    message = next(str(w.message) for w in said if "train/loss" in str(w.message))
    assert Path(message.rpartition("is '")[2][:-1]).is_file()
    assert not (tmp_path / "kept").exists()


def test_a_checkpoint_that_is_a_folder_is_kept_whole(tmp_path):
    saver = ModelCheckpoint(tmp_path)
    saver.best_model_path = str(tmp_path / "step=1.ckpt")
    (tmp_path / "step=1.ckpt" / "checkpoint").mkdir(parents=True)
    (tmp_path / "step=1.ckpt" / "checkpoint" / "a").write_text("1")
    run: Any = SimpleNamespace(checkpoint_callbacks=[saver], default_root_dir=tmp_path / "run", is_global_zero=True)
    kept = keep_best_checkpoint(run)
    assert kept is not None
    assert (Path(kept) / "checkpoint" / "a").read_text() == "1"
    saver.best_model_path = ""
    assert keep_best_checkpoint(run) is None


def test_lowered_learning_rates_are_gone_on_with(folder, tmp_path):
    guard = MetricGuard("train/loss", above=0, window=2, action="lower_lr")
    with pytest.warns(UserWarning, match="learning rates are now 0.5"):
        module = run_guarded(folder, tmp_path, guard)
    assert module.learning_rates()[0] == pytest.approx(0.5e-2)
    (saved,) = (tmp_path / "checkpoints").iterdir()
    again = run_guarded(
        folder, tmp_path, MetricGuard("train/loss", above=0, window=9, action="lower_lr"), ckpt_path=saved
    )
    assert again.learning_rates()[0] == pytest.approx(0.5e-2)


def test_a_skipped_step_has_no_metrics_to_look_at(folder, tmp_path):
    guard = MetricGuard("train/loss", above=0, window=2, action="warn")
    with pytest.warns(UserWarning, match="a step is skipped"):
        run_guarded(folder, tmp_path, SkipNonFinite(), guard, bad_rows=(1,))
    assert guard.state_dict() == {"values": [], "lr_factor": 1.0, "has_stopped": False}  # it acted on the other two


def test_a_metric_of_validation_is_looked_at_after_validation(folder, tmp_path):
    module, batches = stage("sft", folder)
    guard = MetricGuard("val/loss", above=0, window=2)
    run = trainer(callbacks=[guard], max_epochs=3, num_sanity_val_steps=1, default_root_dir=tmp_path)
    with pytest.warns(UserWarning, match=r"val/loss is .* over the last 2 values"):
        run.fit(module, loader(batches), loader(batches))
    assert run.global_step == 6


def test_a_metric_that_is_not_logged_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"MetricGuard: train/lost is not logged; there are .*train/loss"):
        run_guarded(folder, tmp_path, MetricGuard("train/lost", above=0))


def test_several_guards_keep_their_states_apart():
    keys = {MetricGuard("train/kl", above=5, action=action).state_key for action in ("warn", "stop")}
    keys |= {MetricGuard(metric, below=1).state_key for metric in ("train/entropy", "train/eos_rate")}
    assert len(keys) == 4


def test_learning_rates_of_others_cannot_be_lowered(tmp_path):
    guard = MetricGuard("train_loss", above=0, action="lower_lr")
    with pytest.raises(UserError, match="action lower_lr needs a module of this package"):
        trainer(callbacks=[guard], default_root_dir=tmp_path).fit(BoringModel())
