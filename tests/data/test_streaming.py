"""Data that are read as they arrive."""

import json
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import pytest
from pytorch_lightning.callbacks import ModelCheckpoint

from data.test_resume import Cut, Recorder, checkpoint_every, trainer
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.data import (
    Blend,
    Filters,
    InstructionDataModule,
    PreferenceDataModule,
    PromptDataModule,
    Table,
)
from rlhf_lightning.data.limits import TokenLimits
from rlhf_lightning.data.preparing.preparation import Preparation
from rlhf_lightning.data.streaming import StreamedExamples
from rlhf_lightning.errors import UserError

ROWS = [{"prompt": f"question {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(23)]
ALL = [InstructionDataModule, PreferenceDataModule, PromptDataModule]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def data_module(kind, path, **changes):
    size = "rollout_batch_size" if kind is PromptDataModule else "batch_size"
    settings = {"data": Table(path, streaming=True), "validation_split": 0, size: 4, "seed": 7} | changes
    return kind(tiny_tokenizer(), **settings)


def rows_of(batches):
    return [row for batch in batches for row in batch.row_ids.tolist()]


def uninterrupted(folder, kind, path, **changes):
    module = Recorder()
    trainer(folder, enable_checkpointing=False).fit(module, data_module(kind, path, **changes))
    return module.seen


@pytest.mark.parametrize("kind", ALL)
def test_an_epoch_sees_every_row_once_and_the_next_in_another_order(tmp_path, path, kind):
    seen = uninterrupted(tmp_path, kind, path)

    epochs = [[row for epoch, _, rows, _ in seen for row in rows if epoch == number] for number in range(3)]
    size = 20 if kind is PromptDataModule else 23  # prompts come in full batches only
    assert [len(set(rows)) for rows in epochs] == [len(rows) for rows in epochs] == [size] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert [last for *_, last in seen] == [
        number % (size // 4 + (size % 4 > 0)) == size // 4 - (size % 4 == 0) for number in range(len(seen))
    ]
    assert seen == uninterrupted(tmp_path, kind, path)


def test_what_is_streamed_is_what_would_be_prepared(path):
    for kind in ALL:
        streamed, prepared = data_module(kind, path), data_module(kind, path, data=path)
        by_row = []
        for data in (streamed, prepared):
            data.setup("fit")
            loader = data.train_dataloader()
            fields = [batch._asdict() for batch in loader]
            by_row.append(
                {n: str(f) for fs in fields for n, f in zip(fs["row_ids"].tolist(), _examples(fs), strict=True)}
            )
        common = by_row[0].keys() & by_row[1].keys()
        assert len(common) > 15
        assert all(by_row[0][row] == by_row[1][row] for row in common)


def _examples(fields):
    masks = [name for name in fields if name.endswith("mask") and name != "loss_mask"]
    ids = [name for name in fields if name.endswith("_ids") and name not in ("row_ids", "position_ids")]
    count = len(fields["row_ids"])
    return [[fields[i][b][fields[m][b]].tolist() for i, m in zip(ids, masks, strict=True)] for b in range(count)]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("asks_for_length", [False, True])
@pytest.mark.parametrize("step", [2, 6, 8])
def test_resumes_after_any_batch(tmp_path, path, workers, asks_for_length, step):
    kind = InstructionDataModule
    whole = uninterrupted(tmp_path, kind, path)
    with pytest.raises(Cut):
        trainer(tmp_path, [checkpoint_every(tmp_path, 2)]).fit(Recorder(cut_after=step + 1), data_module(kind, path))

    rest = Recorder(asks_for_length=asks_for_length)
    run = trainer(tmp_path, enable_checkpointing=False, max_steps=100)
    run.fit(rest, data_module(kind, path, num_workers=workers), ckpt_path=tmp_path / f"step={step}.ckpt")

    assert [(epoch, rows, last) for epoch, _, rows, last in rest.seen] == [
        (e, rows, last) for e, _, rows, last in whole[step:]
    ]


@pytest.mark.parametrize("cuts", [(3, 4), (5, 2)])  # five batches an epoch
def test_resumes_twice_across_the_end_of_an_epoch(tmp_path, path, cuts):
    kind = PromptDataModule
    whole = uninterrupted(tmp_path, kind, path)
    start = None
    for folder, cut in zip("ab", cuts, strict=True):
        part = Recorder(cut_after=cut)
        run = trainer(tmp_path / folder, [checkpoint_every(tmp_path / folder, 1)])
        with pytest.raises(Cut):
            run.fit(part, data_module(kind, path), ckpt_path=start)
        start = tmp_path / folder / f"step={run.global_step}.ckpt"

    rest = Recorder()
    trainer(tmp_path, enable_checkpointing=False).fit(rest, data_module(kind, path), ckpt_path=start)
    assert [rows for _, _, rows, _ in rest.seen] == [rows for _, _, rows, _ in whole[7:]]


@pytest.mark.parametrize("when", ["on_train_epoch_end", "on_validation_end"])
def test_resumes_from_the_end_of_an_epoch(tmp_path, path, when):
    kind, held_out = PreferenceDataModule, {"validation_data": ROWS[:3]}
    whole = uninterrupted(tmp_path, kind, path, **held_out)
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=when == "on_train_epoch_end")
    trainer(tmp_path, [saver], max_epochs=2).fit(Recorder(), data_module(kind, path, **held_out))

    for epoch in (0, 1):
        module = Recorder()
        run = trainer(tmp_path, enable_checkpointing=False)
        run.fit(module, data_module(kind, path, **held_out), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert module.seen == whole[6 * (epoch + 1) :]


@pytest.mark.parametrize(("drop_last", "each", "blanks"), [(False, 8, 1), (True, 4, 0)])
def test_processes_share_out_every_round_and_make_as_many_batches(path, drop_last, each, blanks):
    chat, limits = ChatEncoder(tiny_tokenizer()), TokenLimits(64, None, None, "cut")
    preparation = Preparation(Table(path, streaming=True), chat, limits, kinds=("finetune",))
    shares = []
    for rank in range(3):
        examples = StreamedExamples(preparation, "finetune", 12, 3, rank, 0, drop_last)
        shares.append([example.row_id for example in examples])
        examples.resume(0, 4)
        assert [example.row_id for example in examples] == shares[rank][4:]
    assert [len(share) for share in shares] == [each] * 3
    seen = list(chain(*shares))
    assert seen.count(-1) == blanks
    assert len(set(seen) - {-1}) == 3 * each - blanks


def test_filters_and_stages_hold_for_streams_too(path):
    rows = [*ROWS, ROWS[3], {"prompt": None, "chosen": "a", "rejected": "b"}]
    with open(path, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    split = {"sft": 0.5, "ppo": 0.5}
    streamed = data_module(InstructionDataModule, path, filters=Filters(duplicates="exact"), stage_split=split)
    prepared = data_module(InstructionDataModule, path, data=path, stage_split=split, on_bad_row="skip")
    for data in (streamed, prepared):
        data.setup("fit")
    seen = rows_of(streamed.train_dataloader())
    assert sorted(seen) == sorted(set(rows_of(prepared.train_dataloader())) - {23})
    assert 5 < len(seen) < 18


def test_bad_rows_of_a_stream_stop_it_above_one_in_a_hundred(path):
    def train(bad, **settings):
        with open(path, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in [*ROWS, *[{"prompt": None}] * bad])
        data = data_module(PromptDataModule, path, **settings)
        data.setup("fit")
        return len(rows_of(data.train_dataloader()))

    assert train(10) == 20
    with pytest.raises(
        UserError, match=r"rows.jsonl line 24: prompt is null; 11 of the 34 rows .* more than 1% of 1000"
    ):
        train(11)
    assert train(11, on_bad_row="skip") == 20
    with pytest.raises(UserError, match=r"rows.jsonl line 24: prompt is null; fix the row or pass"):
        train(1, on_bad_row="error")


@pytest.mark.parametrize(
    ("row", "limit", "reason"),
    [
        ({"chosen": "a" * 40, "rejected": "a" * 41}, 16, "chosen and rejected are the same after cutting"),
        ({"responses": ["yes", "no"], "ranks": [1, 1]}, 64, "no response ranks above another"),
    ],
)
def test_a_stream_of_which_no_pair_is_left_is_refused_as_other_data_are(path, row, limit, reason):
    with open(path, "w") as file:
        file.writelines(json.dumps({"prompt": f"question {i}"} | row) + "\n" for i in range(20))

    def train(source):
        data = data_module(PreferenceDataModule, path, data=source, max_length=limit)
        data.setup("fit")
        rows_of(data.train_dataloader())

    for source in (Table(path, streaming=True), path):
        with pytest.raises(UserError, match=rf"{reason} 20\b"):
            train(source)


def test_a_streamed_blend_goes_round_its_sources(path):
    blend = Blend([Table(path, streaming=True), Table(path, streaming=True)], [1, 0.5])
    data = data_module(InstructionDataModule, path, data=blend)
    data.setup("fit")
    seen = rows_of(data.train_dataloader())
    assert set(seen) == set(range(23))
    assert 25 < len(seen) < 44


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"validation_split": 0.1}, r"validation_split \(give validation_data, or set it to 0\)"),
        ({"test_split": 0.1}, r"test_split \(give test_data\)"),
        ({"filters": Filters(shuffle=True)}, "filters.shuffle"),
        ({"filters": Filters(remove_evaluation_prompts=True)}, "filters.remove_evaluation_prompts"),
        ({"packing": True}, "packing"),
        ({"length_grouped": True}, "length_grouped"),
        ({"num_workers": 2}, "num_workers above 1"),
    ],
)
def test_what_needs_the_whole_data_is_refused(path, changes, what):
    data = data_module(InstructionDataModule, path, **changes)
    with pytest.raises(UserError, match=rf"rows.jsonl is streamed, which does not go with {what}"):
        data.setup("fit")


def test_other_data_or_a_late_checkpoint_are_refused(tmp_path, path):
    kind = InstructionDataModule
    with pytest.raises(Cut):
        trainer(tmp_path, [checkpoint_every(tmp_path, 1)]).fit(Recorder(cut_after=3), data_module(kind, path))
    with open(path, "a") as file:
        file.write(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(UserError, match="in the middle of an epoch with streamed data"):
        trainer(tmp_path).fit(Recorder(), data_module(kind, path), ckpt_path=tmp_path / "step=2.ckpt")

    data = data_module(kind, path)
    data.setup("fit")
    next(iter(data.train_dataloader()))
    with pytest.raises(UserError, match="cannot be resumed under a strategy that reads its checkpoint late"):
        data._sampler.resume(1, 0)


@pytest.mark.parametrize(
    ("kind", "filters"), [(PromptDataModule, {}), (InstructionDataModule, {"duplicates": "exact"})]
)
def test_weights_that_would_have_no_effect_are_refused(path, kind, filters):
    data = data_module(kind, path, filters=Filters(**filters))
    data.data = Blend([Table(path, streaming=True)], weights=[2])
    with pytest.raises(UserError, match="does not go with weights above 1, as what comes again is left out"):
        data.setup("fit")


def cut_off(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:8]))


def one_more(path):
    path.write_text(path.read_text() + json.dumps(ROWS[0]) + "\n")


def touched(path):
    path.write_text(path.read_text())


@pytest.mark.parametrize(("change", "refused"), [(cut_off, True), (one_more, True), (touched, False)])
@pytest.mark.parametrize("when", ["between epochs", "within one"])
def test_a_file_that_is_no_longer_what_it_was_ends_the_run(path, when, change, refused):
    data = data_module(InstructionDataModule, path)
    data.setup("fit")
    loader = data.train_dataloader()
    whole = rows_of(loader)
    batches = iter(loader)
    if when == "within one":
        next(batches)
    change(Path(path))
    with pytest.raises(UserError, match="has changed since the run began to stream it") if refused else nullcontext():
        assert len(rows_of(batches)) == len(whole) - 4 * (when == "within one")  # which waited in the window
        assert len(rows_of(loader)) == len(whole)
