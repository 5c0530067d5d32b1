import json

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.batches import InstructionBatch, PreferenceBatch, PromptBatch, ScoringBatch
from rlhf_lightning.data import (
    Blend,
    Filters,
    InstructionDataModule,
    PlainFormat,
    PreferenceDataModule,
    PromptDataModule,
)
from rlhf_lightning.data.preparing.filters import Splits
from rlhf_lightning.errors import UserError

ALL = [InstructionDataModule, PreferenceDataModule, PromptDataModule]


def hh(question, answer):
    return f"\n\nHuman: {question}\n\nAssistant: {answer}"


HH_ROWS = [
    {"chosen": hh(f"may i borrow {i} cups?", "Of course."), "rejected": hh(f"may i borrow {i} cups?", "No way!")}
    for i in range(40)
]
ODD_ROWS = [
    {"chosen": hh("same?", "Yes."), "rejected": hh("same?", "Yes.")},
    {"chosen": hh("one?", "Yes."), "rejected": hh("two?", "No.")},
    {"chosen": hh("silent?", ""), "rejected": hh("silent?", "No.")},
]


def texts(data, ids, mask):
    return [data.tokenizer.decode(row[keep]) for row, keep in zip(ids, mask, strict=True)]


def ready(kind, *stages, tokenizer=None, **settings):
    data = kind(tokenizer or tiny_tokenizer(), **settings)
    for stage in stages or ("fit", "predict"):
        data.setup(stage)
    return data


def test_the_three_data_modules_share_one_list_of_options_and_explain_each():
    options = {}
    for kind in ALL:
        parser = ArgumentParser()
        parser.add_class_arguments(kind)
        help_of = {action.dest: action.help for action in parser._actions if action.option_strings}
        options[kind] = {name: text for name, text in help_of.items() if not name.endswith("help")}
    shared = set.intersection(*map(set, options.values())) - {"max_prompt_length"}
    own = {kind: sorted(name for name in options[kind].keys() - shared if "." not in name) for kind in ALL}
    limits = ["batch_size", "length_grouped", "max_length", "max_prompt_length", "minimum_response_length"]
    assert own == {
        InstructionDataModule: sorted([*limits, "response_room", "loss_on", "packing"]),
        PreferenceDataModule: sorted([*limits, "response_room", "whole_rankings", "rating_margins"]),
        PromptDataModule: ["max_prompt_length", "rollout_batch_size"],
    }
    assert {"tokenizer", "data", "stage_split", "filters.shuffle", "plain_format.user", "on_bad_row"} <= shared
    for name in shared:
        assert len({texts[name] for texts in options.values()}) == 1
    for texts in options.values():
        assert all(text and not text.startswith("(") for text in texts.values()), texts  # the words before the type
    assert all(texts["tokenizer"].startswith("folder or hub id") for texts in options.values())


@pytest.mark.parametrize("pad", ["own", "eos", "none"])
def test_instructions_from_dialogues(pad):
    data = ready(InstructionDataModule, data=HH_ROWS, tokenizer=tiny_tokenizer(pad=pad))
    seen = []
    for batch in data.train_dataloader():
        assert isinstance(batch, InstructionBatch)
        for row, sequence, taught in zip(
            batch.row_ids.tolist(),
            texts(data, batch.input_ids, batch.attention_mask),
            texts(data, batch.input_ids, batch.loss_mask),
            strict=True,
        ):
            assert (sequence, taught) == (HH_ROWS[row]["chosen"] + "<|end|>", " Of course.<|end|>")
            seen.append(row)

    held_out = [row for batch in data.val_dataloader() for row in batch.row_ids.tolist()]
    assert sorted(seen + held_out) == list(range(40))
    predicted = [batch for batch in data.predict_dataloader() if isinstance(batch, PromptBatch)]
    assert [row for batch in predicted for row in batch.row_ids.tolist()] == held_out
    assert predicted[0].prompts[0] == f"\n\nHuman: may i borrow {held_out[0]} cups?\n\nAssistant:"


def test_loss_on_all_tokens_but_the_first():
    data = ready(InstructionDataModule, "fit", data=[{"prompt": "how", "response": "so"}], loss_on="all")
    batch = next(iter(data.train_dataloader()))
    assert batch.loss_mask.tolist() == [[False] + [True] * (batch.input_ids.shape[1] - 1)]


def test_messages_are_taught_from_the_last_turn_on():
    messages = [
        {"role": role, "content": text}
        for role, text in [("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "farewell")]
    ]
    data = ready(
        InstructionDataModule,
        "fit",
        tokenizer=tiny_tokenizer(chat_template=True, bos=True),
        data=[{"messages": messages}],
    )
    batch = next(iter(data.train_dataloader()))
    assert texts(data, batch.input_ids, batch.attention_mask) == [
        "<|bos|><|start|>user\nhi<|end|>\n<|start|>assistant\nhello<|end|>\n"
        "<|start|>user\nbye<|end|>\n<|start|>assistant\nfarewell<|end|>"
    ]
    assert texts(data, batch.input_ids, batch.loss_mask) == ["farewell<|end|>"]


@settings(max_examples=30)
@given(
    rows=st.lists(st.tuples(st.text("ab \n", min_size=1), *[st.text("ab \n.")] * 2), min_size=1, max_size=4),
    wrap=st.sampled_from(["{}", "\n\nHuman: {}\n\nAssistant:"]),
    tokens=st.fixed_dictionaries({"bos": st.booleans(), "chat_template": st.booleans()}),
)
def test_both_sides_of_a_pair_begin_with_the_prompt(tmp_path_factory, rows, wrap, tokens):
    pairs = [
        {"prompt": wrap.format(f"q{prompt}"), "chosen": f"{chosen}!", "rejected": f"{rejected}?"}
        for prompt, chosen, rejected in rows
    ]
    cache = tmp_path_factory.mktemp("cache")
    data = ready(
        PreferenceDataModule,
        "fit",
        tokenizer=tiny_tokenizer(**tokens),
        data=pairs,
        validation_split=0,
        max_length=400,
        cache_dir=cache,
    )
    (batch,) = data.train_dataloader()
    sides = (batch.chosen_ids, batch.chosen_mask), (batch.rejected_ids, batch.rejected_mask)
    assert batch.prompt_lengths.dtype == torch.int64
    assert sorted(batch.row_ids.tolist()) == list(range(len(pairs)))
    for i, (row, length) in enumerate(zip(batch.row_ids.tolist(), batch.prompt_lengths.tolist(), strict=True)):
        _, prompt = data.chat.encode_prompt(pairs[row]["prompt"])
        assert batch.chosen_ids[i, :length].tolist() == batch.rejected_ids[i, :length].tolist() == prompt.tolist()
        for (ids, mask), response in zip(sides, ("chosen", "rejected"), strict=True):
            assert pairs[row][response].strip() in data.tokenizer.decode(ids[i, length:][mask[i, length:]])


def test_a_prompt_that_is_cut_is_as_long_as_what_is_left_of_it():
    rows = [{"prompt": "a" * 30 + f"{i}", "chosen": "yes", "rejected": "no"} for i in range(4)]
    data = ready(PreferenceDataModule, "fit", data=rows, validation_split=0, max_length=24, max_prompt_length=10)
    (batch,) = data.train_dataloader()
    assert data.counts["cut: prompt"] == 4
    assert batch.prompt_lengths.tolist() == [10] * 4
    ends = [data.tokenizer.decode(ids[:10]) for ids in batch.chosen_ids]
    assert ends == [rows[row]["prompt"][-10:] for row in batch.row_ids.tolist()]


def test_preferences_from_dialogues():
    data = ready(PreferenceDataModule, data=HH_ROWS + ODD_ROWS)
    seen = []
    for batch in data.train_dataloader():
        assert isinstance(batch, PreferenceBatch)
        assert batch.chosen_ids.shape == batch.rejected_ids.shape
        seen += batch.row_ids.tolist()
        for row, chosen, rejected in zip(
            batch.row_ids.tolist(),
            texts(data, batch.chosen_ids, batch.chosen_mask),
            texts(data, batch.rejected_ids, batch.rejected_mask),
            strict=True,
        ):
            assert (chosen, rejected) == (HH_ROWS[row]["chosen"] + "<|end|>", HH_ROWS[row]["rejected"] + "<|end|>")

    assert data.counts == {
        "rows": 43,
        "kept": 40,
        "dropped: chosen and rejected are the same": 1,
        "dropped: prompts of chosen and rejected differ": 1,
        "dropped: response in chosen is empty": 1,
        "train": len(seen),
        "validation": 40 - len(seen),
    }
    scored = list(data.predict_dataloader())
    assert all(isinstance(batch, ScoringBatch) for batch in scored)
    assert [role for batch in scored for role in batch.roles] == ["chosen", "rejected"] * (40 - len(seen))
    assert scored[0].responses[:2] == [" Of course.", " No way!"]
    assert scored[0].prompts[0].startswith("\n\nHuman: may i borrow ")
    assert texts(data, scored[0].input_ids, scored[0].attention_mask)[1].endswith("cups?\n\nAssistant: No way!<|end|>")


@pytest.mark.parametrize(
    ("rows", "roles", "responses"),
    [
        ([{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}], ["response"] * 2, ["b", "d"]),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], ["chosen", "rejected"], ["b", "c"]),
    ],
)
def test_scoring_data_of_its_own(rows, roles, responses):
    data = ready(PreferenceDataModule, "predict", predict_data=rows, eval_batch_size=1)
    batches = list(data.predict_dataloader())
    assert [role for batch in batches for role in batch.roles] == roles
    assert [text for batch in batches for text in batch.responses] == responses
    assert data.counts == {"predict rows": len(rows), "predict kept": len(rows)}


def test_prompts_are_full_batches_without_duplicates():
    rows = [{"prompt": f"question {i % 21}"} for i in range(30)]
    data = ready(PromptDataModule, data=rows, validation_split=0, predict_data=rows, rollout_batch_size=8)

    batches = list(data.train_dataloader())
    assert [batch.prompt_ids.shape[0] for batch in batches] == [8, 8]
    assert data.val_dataloader() == []
    assert (data.counts["kept"], data.counts["dropped: prompt is a duplicate"]) == (21, 9)
    answered = [text for batch in data.predict_dataloader() for text in batch.prompts]
    assert answered == [row["prompt"] for row in rows]
    for text, ids, mask in zip(batches[0].prompts, batches[0].prompt_ids, batches[0].prompt_mask, strict=True):
        assert data.tokenizer.decode(ids[mask]) == text
        assert mask[-1]


def test_a_prompt_that_is_cut_is_shown_as_it_was_cut():
    rows = [{"prompt": "one two three four"}]
    tokenizer = tiny_tokenizer(bos=True)
    data = ready(PromptDataModule, "predict", tokenizer=tokenizer, predict_data=rows, max_prompt_length=4)
    batch = next(iter(data.predict_dataloader()))
    assert batch.prompt_ids.shape == (1, 4)
    assert batch.prompt_ids[0, 0] == tokenizer.bos_token_id
    assert batch.prompts == [tokenizer.decode(batch.prompt_ids[0, 1:])]
    assert "one two three four".endswith(batch.prompts[0])


@pytest.mark.parametrize("kind", ALL)
def test_types_are_those_of_the_contract(kind):
    size = {"rollout_batch_size": 4} if kind is PromptDataModule else {"batch_size": 4}
    data = ready(kind, data=HH_ROWS, test_data=HH_ROWS, **size)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        batch = next(iter(loader))
        for name, value in batch._asdict().items():
            if isinstance(value, torch.Tensor):
                others = {"margins": torch.float32, "weights": torch.float32}
                assert value.dtype == others.get(name, torch.bool if name.endswith("mask") else torch.int64), name


@pytest.mark.parametrize("kind", ALL)
def test_the_validation_part_is_never_taken_for_the_test_part(kind):
    size = {"rollout_batch_size": 4} if kind is PromptDataModule else {"batch_size": 4}
    data = ready(kind, "validate", data=HH_ROWS, validation_split=0.3, **size)
    assert len(data.val_dataloader()) > 0
    for ask in (data.test_dataloader, lambda: data.setup("test")):
        with pytest.raises(UserError, match=r"nothing to test on; pass `test_data`, or hold .* out with `test_split`"):
            ask()


@pytest.mark.parametrize("kind", ALL)
def test_no_prompt_stands_on_two_sides(kind):
    rows = [{"prompt": f"Question {i % 60}", "chosen": f"yes {i}", "rejected": "no"} for i in range(120)]
    size = {"rollout_batch_size": 1} if kind is PromptDataModule else {"batch_size": 1}

    def sides(rows, **settings):
        data = ready(kind, "fit", data=rows, validation_split=0.3, **size, **settings)
        loaders = data.train_dataloader(), data.val_dataloader()
        return [{rows[batch.row_ids.item()]["prompt"] for batch in loader} for loader in loaders]

    train, held_out = sides(rows)
    assert not train & held_out
    assert len(train | held_out) == 60
    assert 8 <= len(held_out) <= 28
    fewer_train, fewer_held_out = sides(rows[::-1][:90], seed=5)
    assert fewer_train <= train
    assert fewer_held_out <= held_out


@pytest.mark.parametrize("kind", ALL)
def test_nothing_is_read_before_setup_and_once_in_it(kind, tmp_path, logged):
    path = tmp_path / "rows.jsonl"
    data = kind(tiny_tokenizer(), data=str(path), validation_data=str(path), test_data=str(path))
    with pytest.raises(UserError, match=r"rows.jsonl does not exist"):
        data.setup("fit")

    path.write_text("".join(json.dumps(row) + "\n" for row in HH_ROWS))
    data.prepare_data()
    data.setup("fit")
    counts = dict(data.counts)
    path.unlink()
    data.setup("validate")
    data.setup("test")
    data.setup("predict")

    assert data.counts == counts
    assert (counts["rows"], counts["train"], counts["validation"], counts["validation kept"]) == (40, 40, 40, 40)
    assert [kind.__name__ in line and "rows 40" in line for line in logged()] == [True]


def test_a_number_of_samples_and_columns_of_another_name():
    rows = [{"q": f"q{i}", "a": "yes"} for i in range(9)] + [{"q": None, "a": None}]
    data = ready(
        InstructionDataModule,
        "fit",
        data=rows,
        num_samples=5,
        validation_split=0,
        columns={"prompt": "q", "response": "a"},
    )
    assert (data.counts["rows"], data.counts["train"]) == (5, 5)


def test_rows_are_counted_whatever_happens_to_them():
    prompt = "\n\nHuman: hi\n\nHuman: are you there?\n\nAssistant:"
    rows = [
        {"prompt": "short", "response": "fine"},
        {"prompt": "long " * 50, "response": "fine"},
        {"prompt": None, "response": "fine"},
        {"prompt": [{"role": "tool", "content": "42"}], "response": "fine"},
        {"prompt": prompt, "response": "fine"},
    ]
    settings = {"max_length": 50, "long_prompts": "drop", "dialogue_format": "plain", "validation_split": 0}
    data = ready(InstructionDataModule, "fit", data=rows, on_bad_row="skip", **settings)

    dropped = {name: count for name, count in data.counts.items() if name.startswith("dropped: ")}
    assert dropped == {
        "dropped: prompt is too long": 1,
        "dropped: prompt is null": 1,
        "dropped: the dialogue format refuses the turns: role 'tool'": 1,
    }
    assert data.counts["rows"] == 5 == data.counts["kept"] + sum(dropped.values())
    with pytest.raises(UserError, match="the list of rows row 3: role 'tool' has no place"):
        ready(InstructionDataModule, "fit", data=[*rows[:2], rows[0], rows[3]], **settings)


def test_messages_without_a_template_name_the_row():
    rows = [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}]}]
    with pytest.raises(UserError, match=r"row 1: tokenizer .* has no chat template; pass"):
        ready(PromptDataModule, "fit", data=rows, on_bad_row="skip")


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (InstructionDataModule, {"batch_size": 0}, r"batch_size \(0\) must be at least 1"),
        (PreferenceDataModule, {"eval_batch_size": -1}, r"eval_batch_size \(-1\) must be at least 1"),
        (PromptDataModule, {"rollout_batch_size": 0}, r"rollout_batch_size \(0\) must be at least 1"),
        (PromptDataModule, {"max_prompt_length": 0}, r"max_prompt_length \(0\) must be at least 1"),
        (PromptDataModule, {"num_samples": 0}, r"num_samples \(0\) must be at least 1"),
        (InstructionDataModule, {"validation_split": 1.0}, r"validation_split \(1.0\) must be at least 0 and below 1"),
        (
            PreferenceDataModule,
            {"max_prompt_length": 512},
            r"max_prompt_length \(512\) must be below max_length \(512\)",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(kind, settings, message):
    with pytest.raises(UserError, match=message):
        kind("no-such-tokenizer", **settings)


@pytest.mark.parametrize(
    ("kind", "stage", "settings", "message"),
    [
        (
            PromptDataModule,
            "fit",
            {"data": [{"prompt": "a"}, {"prompt": "b"}]},
            r"there are \d training prompts, fewer "
            r"than rollout_batch_size \(16\); lower it",
        ),
        (PromptDataModule, "fit", {}, "there is no data to train on; pass `data`"),
        (
            InstructionDataModule,
            "fit",
            {"data": ODD_ROWS[2:]},
            r"leaves nothing to train on \(rows 1, dropped: response",
        ),
        (InstructionDataModule, "predict", {"data": HH_ROWS, "validation_split": 0}, "nothing to predict on"),
        (PreferenceDataModule, "fit", {"data": [{"prompt": "a"}]}, "has columns prompt; needed: prompt, chosen"),
    ],
)
def test_data_that_cannot_serve_is_refused_in_setup(kind, stage, settings, message):
    with pytest.raises(UserError, match=message):
        ready(kind, stage, **settings)


@pytest.mark.parametrize(
    ("kind", "name"), [(InstructionDataModule, "max_length"), (PromptDataModule, "max_prompt_length")]
)
def test_a_limit_beyond_the_model_is_refused(tmp_path, kind, name):
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 64}))
    with pytest.raises(UserError, match=rf"{name} \(65\) is beyond the 64 positions"):
        ready(kind, "fit", tokenizer=str(tmp_path), data=HH_ROWS, **{name: 65})


@pytest.mark.parametrize("kind", ALL)
def test_every_argument_is_typed_and_explained_on_the_command_line(kind, tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "data")
    tiny_tokenizer().save_pretrained(tmp_path)
    settings = ["--data=" + kind.__name__, f"--data.tokenizer={tmp_path}", '--data.columns={"prompt": "q"}']
    settings += ["--data.data=rows.jsonl", "--data.validation_split=0.2", "--data.stage_split={sft: 0.5, ppo: 0.5}"]
    settings += ["--data.filters.remove_same_inputs=true", "--data.filters.duplicates=exact", "--data.on_bad_row=skip"]
    built = parser.instantiate(parser.parse_args([*settings, "--data.plain_format.user=Q: "])).data

    assert type(built) is kind
    assert (built.data, built.columns, built.on_bad_row) == ("rows.jsonl", {"prompt": "q"}, "skip")
    assert built.splits == Splits(0.2, stages={"sft": 0.5, "ppo": 0.5})
    assert built.filters == Filters(remove_same_inputs=True, duplicates="exact")
    assert built.plain_format == PlainFormat(user="Q: ")
    explained = ArgumentParser()
    explained.add_class_arguments(kind, "data")
    assert all(action.help for action in explained._actions)


BLEND = """
class_path: rlhf_lightning.data.Blend
init_args:
  weights: [1, 0.5]
  sources:
    - class_path: rlhf_lightning.data.HelpfulHarmless
      init_args: {path: hh.jsonl}
    - class_path: rlhf_lightning.data.Table
      init_args: {path: own.csv, columns: {prompt: q}}
"""


@pytest.mark.parametrize("kind", ALL)
def test_a_source_is_chosen_by_its_class(kind, tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "data")
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "blend.yaml").write_text(BLEND)
    source = json.dumps(yaml.safe_load(BLEND))
    built = parser.instantiate(
        parser.parse_args(["--data=" + kind.__name__, f"--data.tokenizer={tmp_path}", f"--data.data={source}"])
    ).data
    assert isinstance(built.data, Blend)
