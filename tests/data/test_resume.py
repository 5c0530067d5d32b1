"""A run that is cut and resumed sees exactly the batches of a run that is not."""

from contextlib import nullcontext
from functools import cache
from itertools import product

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.strategies import SingleDeviceStrategy

from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.data import Blend, InstructionDataModule, PreferenceDataModule, PromptDataModule, Table, resuming
from rlhf_lightning.errors import UserError
from rlhf_lightning.training.optim import schedule_learning_rate

ROWS = [{"prompt": f"question {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(23)]
VALIDATION = [{"prompt": f"held out {i}", "chosen": "yes", "rejected": "no"} for i in range(5)]
SIZES = {PromptDataModule: "rollout_batch_size"}


class Cut(Exception):
    """What ends a run that is cut."""


class Recorder(pl.LightningModule):
    """Steps by hand and writes down which rows it saw, and which batch Lightning said was the last of the epoch."""

    def __init__(self, cut_after: int | None = None, asks_for_length: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.cut_after, self.asks_for_length = cut_after, asks_for_length
        self.seen: list[tuple[int, int, list[int], bool]] = []

    def training_step(self, batch, batch_idx):
        if self.cut_after == len(self.seen):
            raise Cut
        last = self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        self.seen.append((self.current_epoch, batch_idx, batch.row_ids.tolist(), last))
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.weight.sum())
        optimizer.step()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        if self.asks_for_length:  # makes the training loader before the checkpoint's progress is read
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD([self.weight], lr=0.1)


def data_module(kind, workers=0, **changes):
    size = SIZES.get(kind, "batch_size")
    settings = {"data": ROWS, "validation_data": VALIDATION, "num_workers": workers, size: 4, "seed": 7} | changes
    return kind(tiny_tokenizer(), **settings)


def trainer(folder, callbacks=(), **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(default_root_dir=folder, callbacks=list(callbacks), **quiet | {"max_epochs": 3} | settings)


def uninterrupted(kind, **settings):
    module = Recorder()
    trainer(None, enable_checkpointing=False, **settings).fit(module, data_module(kind))
    return module.seen


known = cache(uninterrupted)  # what most tests compare with


def resumed(folder, checkpoint, kind, workers=0, asks_for_length=False, changes=None, **settings):
    module = Recorder(asks_for_length=asks_for_length)
    run = trainer(folder, enable_checkpointing=False, **settings)
    run.fit(module, data_module(kind, workers, **(changes or {})), ckpt_path=checkpoint)
    return module.seen


def checkpoint_every(folder, steps):
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=steps, save_top_k=-1)


@pytest.mark.parametrize("kind", [InstructionDataModule, PreferenceDataModule, PromptDataModule])
def test_an_epoch_sees_every_row_once_and_the_next_in_another_order(tmp_path, kind):
    seen = uninterrupted(kind)

    epochs = [[row for epoch, _, rows, _ in seen for row in rows if epoch == number] for number in range(3)]
    size = 20 if kind is PromptDataModule else 23  # prompts come in full batches only
    assert [len(set(rows)) for rows in epochs] == [len(rows) for rows in epochs] == [size] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert seen == uninterrupted(kind)


# The middle of an epoch, the end of one, the middle of the next; with loader processes in pairs, as they are slow.
@pytest.mark.parametrize(
    ("step", "asks_for_length", "workers"),
    [*product([2, 6, 8], [False, True], [0]), (2, True, 2), (6, False, 2), (6, True, 2), (8, False, 2)],
)
def test_resumes_after_any_batch(tmp_path, workers, asks_for_length, step):
    kind = InstructionDataModule
    whole = known(kind, val_check_interval=3)
    part = Recorder(cut_after=step + 1)
    with pytest.raises(Cut):
        trainer(tmp_path, [checkpoint_every(tmp_path, 2)], val_check_interval=3).fit(part, data_module(kind))
    assert part.seen == whole[: step + 1]

    rest = resumed(tmp_path, tmp_path / f"step={step}.ckpt", kind, workers, asks_for_length, val_check_interval=3)

    assert rest == whole[step:]


class LateStrategy(SingleDeviceStrategy):
    """Reads the checkpoint after the optimizers are made, as DeepSpeed does."""

    restore_checkpoint_after_setup = True


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [2, 6, 8])
def test_resumes_where_the_loader_is_made_before_the_checkpoint_is_read(tmp_path, workers, step):
    kind = PreferenceDataModule
    whole = known(kind)
    with pytest.raises(Cut):
        trainer(tmp_path, [checkpoint_every(tmp_path, 2)]).fit(Recorder(cut_after=9), data_module(kind))

    settings = {"asks_for_length": True, "strategy": LateStrategy(torch.device("cpu"))}
    assert resumed(tmp_path, tmp_path / f"step={step}.ckpt", kind, workers, **settings) == whole[step:]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [PreferenceDataModule, PromptDataModule])
def test_resumes_in_every_data_module(tmp_path, kind, workers):
    whole = known(kind)
    with pytest.raises(Cut):
        trainer(tmp_path, [checkpoint_every(tmp_path, 1)]).fit(Recorder(cut_after=8), data_module(kind))

    assert resumed(tmp_path, tmp_path / "step=7.ckpt", kind, workers) == whole[7:]


BLEND = Blend([Table(ROWS[:12]), Table(ROWS[12:])], [0.5, 1.5])


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (InstructionDataModule, {"packing": True, "max_length": 48, "batch_size": 2}),
        (InstructionDataModule, {"packing": True, "max_length": 48, "batch_size": 2, "data": BLEND}),
        (InstructionDataModule, {"length_grouped": True}),
        (PreferenceDataModule, {"length_grouped": True, "data": BLEND}),
        (PromptDataModule, {"data": BLEND}),
    ],
)
def test_resumes_in_every_order(tmp_path, kind, changes, step):
    whole = Recorder()
    trainer(tmp_path, enable_checkpointing=False).fit(whole, data_module(kind, **changes))
    with pytest.raises(Cut):
        trainer(tmp_path, [checkpoint_every(tmp_path, 1)]).fit(Recorder(cut_after=4), data_module(kind, **changes))

    assert resumed(tmp_path, tmp_path / f"step={step}.ckpt", kind, changes=changes) == whole.seen[step:]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("when", ["on_train_epoch_end", "on_validation_end"])
def test_resumes_from_the_end_of_an_epoch(tmp_path, workers, when):
    kind = InstructionDataModule
    whole = known(kind)
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=when == "on_train_epoch_end")
    trainer(tmp_path, [saver], max_epochs=2).fit(Recorder(), data_module(kind))

    for epoch in (0, 1):
        rest = resumed(tmp_path, tmp_path / f"epoch={epoch}.ckpt", kind, workers)
        assert rest == whole[6 * (epoch + 1) :]


def test_resumes_twice_and_with_fewer_batches_an_epoch(tmp_path):
    kind, short = PromptDataModule, {"limit_train_batches": 3}
    whole = known(kind, **short)
    with pytest.raises(Cut):
        trainer(tmp_path / "a", [checkpoint_every(tmp_path / "a", 1)], **short).fit(
            Recorder(cut_after=2), data_module(kind)
        )
    again = Recorder(cut_after=3)
    with pytest.raises(Cut):
        trainer(tmp_path / "b", [checkpoint_every(tmp_path / "b", 1)], **short).fit(
            again, data_module(kind), ckpt_path=tmp_path / "a" / "step=2.ckpt"
        )

    assert again.seen == whole[2:5]
    assert resumed(tmp_path, tmp_path / "b" / "step=5.ckpt", kind, **short) == whole[5:]


def test_a_batch_that_failed_is_run_again(tmp_path):
    kind = PromptDataModule
    whole = known(kind)
    saver = pl.callbacks.OnExceptionCheckpoint(tmp_path, "failed")
    with pytest.raises(Cut):
        trainer(tmp_path, [saver]).fit(Recorder(cut_after=7), data_module(kind))

    assert resumed(tmp_path, tmp_path / "failed.ckpt", kind) == whole[7:]


def test_lightning_knows_that_the_loader_resumes(tmp_path, recwarn):
    with pytest.raises(Cut):
        trainer(tmp_path, [checkpoint_every(tmp_path, 1)]).fit(Recorder(cut_after=3), data_module(PromptDataModule))
    resumed(tmp_path, tmp_path / "step=2.ckpt", PromptDataModule)

    assert not [warning for warning in recwarn if "not resumable" in str(warning.message)]


def test_a_fresh_fit_with_the_same_objects_begins_at_the_beginning(tmp_path):
    whole = known(PromptDataModule)
    with pytest.raises(Cut):
        trainer(tmp_path, [checkpoint_every(tmp_path, 1)]).fit(Recorder(cut_after=3), data_module(PromptDataModule))
    data = data_module(PromptDataModule)
    trainer(tmp_path, enable_checkpointing=False).fit(Recorder(), data, ckpt_path=tmp_path / "step=2.ckpt")

    module = Recorder()
    trainer(tmp_path, enable_checkpointing=False).fit(module, data)

    assert module.seen == whole


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"rollout_batch_size": 5}, "batch_size 4, now it is 5"),
        ({"seed": 8}, "seed 7, now it is 8"),
        ({"data": ROWS[:20]}, "training examples 23, now it is 20"),
        ({"data": [*ROWS[:22], {**ROWS[22], "prompt": "and now to something longer"}]}, "rows of hash"),
        ({"data": BLEND}, r"epoch with weights None, now it is \[0.5, 1.5\]"),
    ],
)
def test_another_order_is_refused_in_the_middle_of_an_epoch_only(tmp_path, changes, name):
    with pytest.raises(Cut):
        trainer(tmp_path, [checkpoint_every(tmp_path, 1)]).fit(Recorder(cut_after=6), data_module(PromptDataModule))
    other = data_module(PromptDataModule, **changes)

    with pytest.raises(UserError, match=name):
        trainer(tmp_path, enable_checkpointing=False).fit(Recorder(), other, ckpt_path=tmp_path / "step=2.ckpt")

    module = Recorder()
    trainer(tmp_path, enable_checkpointing=False).fit(module, other, ckpt_path=tmp_path / "step=5.ckpt")
    assert module.seen[0][:2] == (1, 0)


def test_an_epoch_that_has_become_shorter_than_what_was_seen_of_it_is_refused(tmp_path):
    with pytest.raises(Cut):
        trainer(tmp_path, [checkpoint_every(tmp_path, 1)]).fit(Recorder(cut_after=4), data_module(PromptDataModule))

    with pytest.raises(UserError, match="after batch 4 of epoch 0, which now has only 3 batches; resume"):
        resumed(tmp_path, tmp_path / "step=4.ckpt", PromptDataModule, limit_train_batches=3)


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    with pytest.raises(Cut):
        trainer(tmp_path, [checkpoint_every(tmp_path, 1)]).fit(Recorder(cut_after=4), data_module(PromptDataModule))

    with pytest.raises(UserError, match="does not say which batches of InstructionDataModule were used"):
        resumed(tmp_path, tmp_path / "step=4.ckpt", InstructionDataModule)


def test_a_trainer_that_goes_on_elsewhere_is_refused(tmp_path, monkeypatch):
    with pytest.raises(Cut):
        trainer(tmp_path, [checkpoint_every(tmp_path, 1)]).fit(Recorder(cut_after=4), data_module(PromptDataModule))
    monkeypatch.setattr(resuming, "_count_from", lambda place, counters, *_: counters.pop("epoch_loop.batch_progress"))

    with pytest.raises(UserError, match=r"goes on at \(epoch, batch\) \(0, 3\), but the trainer at \(0, 0\)"):
        resumed(tmp_path, tmp_path / "step=3.ckpt", PromptDataModule)


# Stops of every kind, at every batch


class Stepper(Recorder):
    """Writes down epoch, batch, rows, steps and learning rate; its weight depends on the order of the batches."""

    def __init__(self, steps_per_batch, cut_after):
        super().__init__(cut_after)
        self.steps_per_batch = steps_per_batch

    def training_step(self, batch, batch_idx):
        if self.cut_after == self.trainer.global_step // self.steps_per_batch:
            raise Cut
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        rates = []
        for _ in range(self.steps_per_batch):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.zero_grad()
            self.manual_backward((self.weight * batch.row_ids.float().mean()).sin().sum())
            optimizer.step()
            schedule.step()
        self.seen.append((self.current_epoch, batch_idx, batch.row_ids.tolist(), self.trainer.global_step, rates))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD([self.weight], lr=0.1, momentum=0.9)
        scheduler = schedule_learning_rate(optimizer, "linear", 2, 20 * self.steps_per_batch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class StopAfter(Callback):
    """Asks the trainer to stop, as `EarlyStopping` and `max_time` do."""

    def __init__(self, batches):
        self.batches = batches

    def on_train_batch_end(self, trainer, pl_module, *_):
        trainer.should_stop = trainer.should_stop or trainer.fit_loop.total_batch_idx + 1 >= self.batches


PACKED = {"packing": True, "max_length": 48, "batch_size": 2}
ORDERS = {
    "shuffled": (InstructionDataModule, {}),
    "packed": (InstructionDataModule, PACKED),
    "grouped": (PreferenceDataModule, {"length_grouped": True}),
    "streamed": (PreferenceDataModule, {"data": Table(ROWS, streaming=True)}),
    "prompts": (PromptDataModule, {"data": BLEND}),
}
EPOCHS = 3


def leg(folder, order, limits, steps_per_batch, val_check_interval, cut_after=None, callbacks=(), keep_all=False):
    """Fit until something ends it, from the last checkpoint if there is one; what was seen, and the module."""
    kind, changes = ORDERS[order]
    module = Stepper(steps_per_batch, cut_after)
    every = steps_per_batch if keep_all else 10**6
    saver = ModelCheckpoint(
        folder, "last", every_n_train_steps=every, save_last=not keep_all, enable_version_counter=False
    )
    run = trainer(folder, [*callbacks, saver], val_check_interval=val_check_interval, **limits)
    last = folder / "last.ckpt"
    try:
        run.fit(module, data_module(kind, **changes), ckpt_path=last if last.exists() else None, weights_only=True)
    except Cut:
        module.cut_after = None
    return module


ENDS = ["max_steps", "max_epochs", "should_stop", "exception"]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.sampled_from(list(ORDERS)),
    stops=st.lists(st.tuples(st.integers(1, 14), st.sampled_from(ENDS)), min_size=1, max_size=3),
    steps_per_batch=st.sampled_from([1, 3]),
    val_check_interval=st.sampled_from([1.0, 2]),
)
def test_stopped_anywhere_in_any_way_it_goes_on_at_the_next_batch(
    tmp_path_factory, order, stops, steps_per_batch, val_check_interval
):
    fixed = steps_per_batch, val_check_interval
    whole = leg(tmp_path_factory.mktemp("whole"), order, {"max_epochs": EPOCHS}, *fixed)
    folder = tmp_path_factory.mktemp("parts")
    seen = []
    for batch, end in sorted(stops):
        limits = {"max_epochs": EPOCHS}
        if end == "max_steps":
            limits = {"max_epochs": -1, "max_steps": batch * steps_per_batch}
        if end == "max_epochs":
            limits = {"max_epochs": whole.seen[min(batch, len(whole.seen)) - 1][0] + 1}
        callbacks = [StopAfter(batch)] if end == "should_stop" else []
        cut_after = batch if end == "exception" else None
        seen += leg(folder, order, limits, *fixed, cut_after, callbacks, keep_all=end == "exception").seen
    last = leg(folder, order, {"max_epochs": EPOCHS}, *fixed)

    assert seen + last.seen == whole.seen
    assert torch.equal(last.weight, whole.weight) or not last.seen
    assert leg(folder, order, {"max_epochs": EPOCHS}, *fixed).seen == []


class Diary(Callback):
    """Writes down, in order, what comes after each batch, with the epoch that Lightning says it is."""

    def __init__(self, cut_in=None):
        self.lines, self.cut_in = [], cut_in

    def _note(self, hook, trainer):
        self.lines.append((hook, trainer.current_epoch, trainer.global_step))
        if self.lines[-1] == self.cut_in:
            raise Cut

    def on_train_batch_start(self, trainer, *_):
        self._note("batch", trainer)

    def on_validation_batch_start(self, trainer, *_):
        if not trainer.sanity_checking:
            self._note("validation batch", trainer)

    def on_validation_end(self, trainer, *_):
        if not trainer.sanity_checking:
            self._note("validated", trainer)

    def on_train_epoch_end(self, trainer, *_):
        self._note("epoch ends", trainer)

    def on_train_end(self, trainer, *_):
        self._note("end", trainer)


class Steps(Logger):
    """Notes the step that Lightning gives to each value."""

    name, version = "steps", 0

    def __init__(self):
        super().__init__()
        self.values = []

    def log_metrics(self, metrics, step):
        self.values += [(name, value, step) for name, value in metrics.items()]

    def log_hyperparams(self, *_):
        pass


class Logs(Recorder):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        self.log("weight", self.weight)

    def validation_step(self, batch, batch_idx):
        self.log("val", self.weight, batch_size=1)


def written(folder, kind=InstructionDataModule, cut_in=None, ckpt_path=None, saver=None, before=(), **settings):
    """What came after each batch, and what was logged at which step."""
    diary, steps = Diary(cut_in), Steps()
    callbacks = [*before, diary, saver or checkpoint_every(folder, 1)]
    run = trainer(folder, callbacks, **{"max_epochs": 2, "log_every_n_steps": 1} | settings | {"logger": steps})
    with pytest.raises(Cut) if cut_in else nullcontext():
        run.fit(Logs(), data_module(kind, batch_size=8), ckpt_path=ckpt_path)
    return diary.lines, steps.values


@pytest.mark.parametrize("limits", [{}, {"check_val_every_n_epoch": None}, {"val_check_interval": 2}, {"max_steps": 6}])
def test_a_validation_that_was_cut_is_run_once_more_and_the_epoch_ends(tmp_path, limits):
    limits = {"val_check_interval": 1} | limits
    lines, values = written(tmp_path / "whole", **limits)
    cuts = {line[2]: line for line in lines if line[0] == "validation batch"}
    for step, line in cuts.items():
        before, logged_before = written(tmp_path / f"cut{step}", cut_in=line, **limits)
        checkpoint = tmp_path / f"cut{step}" / f"step={step}.ckpt"
        after, logged_after = written(tmp_path / f"rest{step}", ckpt_path=checkpoint, **limits)
        assert before[:-1] + after == lines, step
        assert logged_before + logged_after == values, step
    assert [*cuts] == ([2, 5] if limits["val_check_interval"] == 2 else [*range(1, 7)])


class SaveAlways(ModelCheckpoint):
    """Saves wherever a checkpoint may be saved."""

    def __init__(self, folder):
        super().__init__(folder, "last", enable_version_counter=False)

    def _save(self, trainer, *_):
        if not trainer.sanity_checking:
            trainer.save_checkpoint(f"{self.dirpath}/last.ckpt")

    on_train_batch_end = on_validation_end = on_train_epoch_end = on_train_end = _save


class Guard(StopAfter):
    """Knows that it has asked."""

    has_stopped = False

    def on_train_batch_end(self, trainer, *_):
        super().on_train_batch_end(trainer, *_)
        self.has_stopped = trainer.should_stop

    def state_dict(self):
        return {"has_stopped": self.has_stopped}

    def load_state_dict(self, state_dict):
        self.has_stopped = state_dict["has_stopped"]


def stops_at_third_validation():
    return EarlyStopping("val", min_delta=1e9, patience=2, mode="max", check_on_train_epoch_end=False)


STOPPED = {
    "between two epochs": (stops_at_third_validation, {}, 9),
    "within an epoch": (stops_at_third_validation, {"val_check_interval": 2}, 8),
    "as soon as it may": (stops_at_third_validation, {"val_check_interval": 1, "min_epochs": 2}, 6),
    "after a batch": (lambda: Guard(4), {}, 4),
    "after the last batch of an epoch": (lambda: Guard(6), {}, 6),
    "after a batch, not validated": (lambda: Guard(4), {"limit_val_batches": 0}, 4),
}


@pytest.mark.parametrize(("stopper", "limits", "batches"), STOPPED.values(), ids=STOPPED)
def test_what_a_callback_has_ended_stays_ended_where_it_is_killed_before_its_end(tmp_path, stopper, limits, batches):
    def run(folder, **more):
        settings = {"max_epochs": 5, "before": [stopper()], "saver": SaveAlways(folder)}
        return written(folder, **settings | limits | more)

    lines, values = run(tmp_path / "whole")
    made = [place for place, line in enumerate(lines) if line[0] == "batch"]
    assert len(made) == batches
    for place in range(made[-1] + 1, len(lines)):
        folder = tmp_path / str(place)
        before, logged_before = run(folder, cut_in=lines[place])
        after, logged_after = run(folder, ckpt_path=folder / "last.ckpt")
        assert before[: len(lines) - len(after)] + after == lines, lines[place]
        assert logged_before[: len(values) - len(logged_after)] + logged_after == values, lines[place]


def test_what_a_callback_has_ended_trains_on_without_it(tmp_path):
    before, _ = written(tmp_path, before=[Guard(4)], saver=SaveAlways(tmp_path))
    after, _ = written(tmp_path, ckpt_path=tmp_path / "last.ckpt", saver=SaveAlways(tmp_path))
    assert [sum(line[0] == "batch" for line in lines) for lines in (before, after)] == [4, 2]
