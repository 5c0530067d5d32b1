import json
import multiprocessing
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.forked import forked_process
from helpers.preparing import build, preparation, row_ids
from helpers.templates import shelf_tokenizer
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.data import Blend, Table
from rlhf_lightning.data.encode import Encoder
from rlhf_lightning.data.limits import TokenLimits
from rlhf_lightning.data.preparing import workers
from rlhf_lightning.data.preparing.filters import Filters, Splits
from rlhf_lightning.data.preparing.lengths import say_cuts
from rlhf_lightning.data.preparing.manifest import PARTS
from rlhf_lightning.data.preparing.preparation import read_all
from rlhf_lightning.data.sources import as_source
from rlhf_lightning.errors import UserError
from rlhf_lightning.training.reporting import Patience

KINDS = ("finetune", "preference", "prompts")
PAIRS = [{"prompt": f"question {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(300)]

PROMPTS = st.one_of(
    st.sampled_from(["hi", "Hi ", "how?", "long " * 40, "", None, 7, "a\0b", "\ud800"]),
    st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "tool"]), "content": st.just("hi")}), max_size=2),
)
ANSWERS = st.sampled_from(["yes", "Yes", "no", "never " * 40, " ", None, ["list"]])
ANY_ROW = st.one_of(
    st.fixed_dictionaries({"prompt": PROMPTS, "chosen": ANSWERS, "rejected": ANSWERS}),
    st.sampled_from([{}, {"prompt": "hi"}, {"other": 1}, ["no object"], None]),
)
FILTERS = st.builds(
    Filters,
    shuffle=st.booleans(),
    remove_same_inputs=st.booleans(),
    remove_same_responses=st.booleans(),
    duplicates=st.sampled_from(["keep", "exact", "normalised"]),
    remove_evaluation_prompts=st.booleans(),
)


def counts(folder, role="data"):
    return folder.manifest["sources"][role]["counts"]


def dropped(folder, role="data"):
    return {name: n for name, n in counts(folder, role).items() if name.startswith("dropped: ")}


@settings(max_examples=60)
@given(
    rows=st.lists(ANY_ROW, max_size=12),
    filters=FILTERS,
    kinds=st.sampled_from([KINDS, KINDS[:1], KINDS[1:2], KINDS[2:]]),
    stages=st.sampled_from([None, {"sft": 0.5, "reward": 0.5}, {"sft": 0.2, "reward": 0.4, "ppo": 0.4}]),
    long_prompts=st.sampled_from(["cut", "drop"]),
)
def test_every_row_is_accounted_for(tmp_path_factory, rows, filters, kinds, stages, long_prompts):
    # Enough sound rows that something of every kind and stage is left to train on.
    rows = rows + PAIRS[:40]
    folder = build(
        tmp_path_factory.mktemp("data"),
        rows,
        validation_data=PAIRS[5:8] + rows[:3],
        filters=filters,
        splits=Splits(test=0.2, stages=stages),
        kinds=kinds,
        max_length=40,
        minimum_response_length=2,
        long_prompts=long_prompts,
        dialogue_format="plain",
        on_bad_row="skip",
    )

    kept = set()
    for role, data, parts in (
        ("data", rows, ("train", "test")),
        ("validation_data", rows[:3] + PAIRS[5:8], ("validation",)),
    ):
        said = counts(folder, role)
        written = {need: [i for part in parts for i in row_ids(folder, need)[part]] for need in kinds}
        assert said["rows"] == len(data)
        assert said["rows"] == said["kept"] + sum(dropped(folder, role).values()) + said.get("other stages", 0)
        assert all(len(numbers) == len(set(numbers)) for numbers in written.values())
        kept = set().union(*written.values())
        if "finetune" in kinds or kinds == ("preference",) or stages is None:
            assert len(kept) <= said["kept"]
        if stages is None or role != "data":
            again = said.get("prompt is a duplicate", 0)
            lacking = sum(count for name, count in said.items() if name.startswith("lacking: "))
            fewer = {"prompts": again, "preference": lacking}  # a row that lacks a pair may lack a response too
            for need, numbers in written.items():
                most = said["kept"] - fewer.get(need, 0)
                assert most - (lacking if need == "finetune" else 0) <= len(numbers) <= most
        bad = folder.manifest["sources"][role]["bad_rows"]
        assert bad["count"] == len(bad["first"]) <= sum(dropped(folder, role).values())


def test_each_reason_is_counted_and_only_sound_rows_are_written(tmp_path):
    rows = [
        {"prompt": "hi", "chosen": "yes", "rejected": "no"},
        {"prompt": "hi", "chosen": "yes", "rejected": "never"},
        {"prompt": "hi", "chosen": "yes", "rejected": "yes "},
        {"prompt": "two", "chosen": None, "rejected": "no"},
        {"prompt": "two", "chosen": 3, "rejected": "no"},
        {"prompt": "two", "rejected": "no"},
        {"prompt": "a b " * 30, "chosen": "yes", "rejected": "no"},
        {"prompt": "three", "chosen": "y", "rejected": "no"},
        {"prompt": "four", "chosen": "same start, long: yes", "rejected": "same start, long: no"},
        {"prompt": "HI", "chosen": "Yes", "rejected": " no"},
        {"prompt": "five", "chosen": "long " * 30, "rejected": "no"},
    ]
    options = {"long_prompts": "drop", "max_length": 24, "max_prompt_length": 12, "minimum_response_length": 2}
    filters = Filters(remove_same_inputs=True, duplicates="normalised")
    folder = build(tmp_path / "data", rows, kinds=("preference",), filters=filters, on_bad_row="skip", **options)

    assert row_ids(folder, "preference") == {"train": [0, 8, 10], "validation": [], "test": []}
    assert counts(folder) == {
        "rows": 11,
        "kept": 3,
        "cut: response": 1,
        "dropped: chosen and rejected are the same": 1,
        "dropped: chosen is missing": 1,
        "dropped: chosen is not text but int": 1,
        "dropped: chosen is null": 1,
        "dropped: prompt and best response came before": 1,
        "dropped: prompt is too long": 1,
        "dropped: response is too short": 1,
        "dropped: row is a duplicate": 1,
        "preference train": 3,
    }
    assert folder.manifest["sources"]["data"]["bad_rows"] == {
        "count": 3,
        "first": [
            ["the list of rows row 3", "chosen is null"],
            ["the list of rows row 4", "chosen is not text but int"],
            ["the list of rows row 5", "chosen is missing"],
        ],
    }


def test_a_pair_that_the_limits_make_equal_is_dropped_if_asked(tmp_path):
    rows = [{"prompt": "one", "chosen": "x x x x x x x x x yes", "rejected": "x x x x x x x x x no"}, PAIRS[0]]
    limits = {"kinds": ("preference",), "max_length": 9, "max_prompt_length": 4}
    folder = build(tmp_path / "dropped", rows, **limits)
    assert dropped(folder) == {"dropped: chosen and rejected are the same after cutting": 1}
    assert counts(folder)["cut: response"] == 1  # of the pair that stays
    kept = build(tmp_path / "kept", rows, filters=Filters(remove_same_responses=False), **limits)
    assert row_ids(kept, "preference")["train"] == [0, 1]


@pytest.mark.parametrize(("duplicates", "kept"), [("keep", [0, 1, 2, 3]), ("exact", [0, 1, 3]), ("normalised", [0, 3])])
def test_duplicates_are_the_rows_that_come_later(tmp_path, duplicates, kept):
    rows = [{"prompt": prompt, "response": "Yes"} for prompt in ("hi  you", "Hi you", "hi  you", "you")]
    folder = build(tmp_path / "data", rows, kinds=("finetune",), filters=Filters(duplicates=duplicates))
    assert row_ids(folder, "finetune")["train"] == kept


def test_the_same_input_is_the_same_prompt_with_the_same_best_response(tmp_path):
    answers = [("yes", "no"), ("yes", "never"), ("no", "yes"), ("no", "never")]
    rows = [{"prompt": "hi", "chosen": chosen, "rejected": rejected} for chosen, rejected in answers]
    folder = build(tmp_path / "data", rows, kinds=("preference",), filters=Filters(remove_same_inputs=True))
    assert row_ids(folder, "preference")["train"] == [0, 2]


def test_prompts_of_the_evaluation_data_leave_the_training_data(tmp_path):
    data = [{"prompt": f"question {i}", "response": "yes"} for i in range(5)]
    evaluation = {"validation_data": [{"prompt": "QUESTION 1", "response": "x"}]}
    evaluation["test_data"] = [{"prompt": "question  3", "response": "x"}, {"prompt": None, "response": "x"}]
    for wanted, kept in ((True, [0, 2, 4]), (False, [0, 1, 2, 3, 4])):
        filters = Filters(remove_evaluation_prompts=wanted)
        options = {"kinds": ("finetune",), "filters": filters, "on_bad_row": "skip", **evaluation}
        folder = build(tmp_path / str(wanted), data, **options)
        assert row_ids(folder, "finetune") == {"train": kept, "validation": [0], "test": [0]}
    assert counts(folder, "test_data")["dropped: prompt is null"] == 1


def test_samples_are_the_first_or_drawn_by_the_seed(tmp_path):
    def drawn(name, **how):
        folder = build(tmp_path / name, PAIRS, kinds=("prompts",), num_samples=50, filters=Filters(**how))
        assert counts(folder)["rows"] == 50
        return row_ids(folder, "prompts")["train"]

    assert drawn("first") == list(range(50))
    shuffled = drawn("a", shuffle=True)
    assert len(set(shuffled)) == 50
    assert shuffled not in (sorted(shuffled), list(range(50)))
    assert drawn("again", shuffle=True) == shuffled != drawn("b", shuffle=True, seed=1)


# Kinds of example


def test_kinds_made_together_are_those_made_apart(tmp_path):
    # Short enough that nothing is cut: the room a prompt has depends on the responses that are wanted.
    settings = {"splits": Splits(0.2, 0.1, {"sft": 0.2, "reward": 0.4, "ppo": 0.4}), "filters": Filters(shuffle=True)}
    together = build(tmp_path / "together", PAIRS, **settings)
    for need in KINDS:
        apart = build(tmp_path / need, PAIRS, kinds=(need,), **settings)
        for part in PARTS:
            name = f"{need}_{part}.arrow"
            assert (apart.path / name).read_bytes() == (together.path / name).read_bytes()


ODD_PAIRS = [
    *PAIRS[:3],
    {"prompt": "same?", "chosen": "yes", "rejected": "yes"},
    {"prompt": PAIRS[0]["prompt"], "chosen": "again", "rejected": "again"},
]
ODD_DIALOGUES = [
    {"chosen": f"\n\nHuman: {one}?\n\nAssistant:{good}", "rejected": f"\n\nHuman: {other}?\n\nAssistant: no"}
    for one, other, good in [("a", "a", " yes"), ("b", "c", " yes"), ("d", "d", ""), ("e", "e", " no")]
]
LABELLED = [
    {"prompt": prompt, "completion": f"{prompt} {i}", "label": label}
    for i, (prompt, label) in enumerate([("a", True), ("a", False), ("b", True), ("c", False), ("a", True)])
]


@pytest.mark.parametrize("rows", [ODD_PAIRS, ODD_DIALOGUES, LABELLED])
def test_a_row_that_makes_no_pair_serves_the_other_kinds(tmp_path, rows):
    together = build(tmp_path / "together", rows)
    assert len(together.part("preference", "train")) < len(together.part("finetune", "train"))
    assert together.manifest["sources"]["data"]["counts"]["rows"] == len(rows)
    for need in KINDS:
        apart = build(tmp_path / need, rows, kinds=(need,))
        name = f"{need}_train.arrow"
        assert (apart.path / name).read_bytes() == (together.path / name).read_bytes()


def test_why_a_kept_row_serves_less_is_counted(tmp_path):
    counts = build(tmp_path / "together", ODD_PAIRS).manifest["sources"]["data"]["counts"]
    assert counts["kept"] == 5
    assert counts["lacking: chosen and rejected are the same"] == 2
    alone = build(tmp_path / "alone", ODD_PAIRS, kinds=("preference",)).manifest["sources"]["data"]["counts"]
    assert (alone["kept"], alone["dropped: chosen and rejected are the same"]) == (3, 2)


def test_kinds_are_those_that_the_columns_allow(tmp_path):
    folder = build(tmp_path / "data", [{"prompt": "hi", "response": "yes"}])
    assert folder.manifest["kinds"] == ["finetune", "prompts"]
    with pytest.raises(UserError, match="has columns prompt, response; needed: prompt, chosen and rejected"):
        build(tmp_path / "other", [{"prompt": "hi", "response": "yes"}], kinds=("preference",))
    with pytest.raises(UserError, match="has columns words; needed: prompt"):
        build(tmp_path / "third", [{"words": "hi"}])
    with pytest.raises(UserError, match="leaves nothing to train on"):
        build(tmp_path / "fourth", PAIRS[:3], splits=Splits(stages={"sft": 0.0, "reward": 1.0}), kinds=("finetune",))


def test_a_ranking_becomes_pairs_that_weigh_as_one_row(tmp_path):
    rows = [
        {"prompt": "three", "responses": ["bad", "good", "fair"], "ranks": [3, 1, 2], "weight": 2},
        {"prompt": "tie", "responses": ["a", "b", "c"], "scores": None, "ranks": [1, 2, 2], "margin": 0.5},
        {"prompt": "all tie", "responses": ["a", "b"], "ranks": [1, 1]},
        {"prompt": "two", "responses": ["a", "b"], "ranks": [2, 1]},
    ]
    folder = build(tmp_path / "data", rows)
    tokenizer, table = tiny_tokenizer(), folder.part("preference", "train")

    def said(ids, pair):
        return tokenizer.decode(ids[pair.prompt_length :]).removesuffix("<|end|>")

    pairs = [(p.row_id, said(p.chosen_ids, p), said(p.rejected_ids, p), p.weight, p.margin) for p in table]
    assert pairs == [
        (0, "good", "fair", pytest.approx(2 / 3), 0.0),
        (0, "good", "bad", pytest.approx(2 / 3), 0.0),
        (0, "fair", "bad", pytest.approx(2 / 3), 0.0),
        (1, "a", "b", 0.5, 0.5),
        (1, "a", "c", 0.5, 0.5),
        (3, "b", "a", 1.0, 0.0),
    ]
    assert counts(folder)["further pairs of rankings"] == 3
    assert not dropped(folder)
    assert counts(folder)["lacking: no response ranks above another"] == 1
    responses = [tokenizer.decode(e.ids[e.prompt_length :]) for e in folder.part("finetune", "train")]
    assert responses == ["good<|end|>", "a<|end|>", "a<|end|>", "b<|end|>"]


def test_prompts_that_come_twice_are_written_once(tmp_path):
    rows = [{"prompt": prompt, "response": str(i)} for i, prompt in enumerate(["a", "b", "a", "a"])]
    both = build(tmp_path / "both", rows)
    assert row_ids(both, "prompts")["train"] == [0, 1]
    assert (counts(both)["kept"], counts(both)["prompt is a duplicate"], dropped(both)) == (4, 2, {})
    alone = build(tmp_path / "alone", rows, kinds=("prompts",))
    assert counts(alone) == {"rows": 4, "kept": 2, "dropped: prompt is a duplicate": 2, "prompts train": 2}


def test_a_long_preparation_says_how_far_it_is(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="pytorch_lightning.utilities.rank_zero")
    rows = [{"prompt": str(i), "response": "a"} for i in range(3)]
    build(tmp_path / "short", rows)
    assert not [message for message in caplog.messages if "rows read" in message]
    monkeypatch.setattr(Patience, "is_over", lambda self: True)
    build(tmp_path / "long", rows)
    assert [message for message in caplog.messages if "rows read" in message][-1].endswith(": 3 of 3 rows read")


def test_a_blend_keeps_the_number_of_each_source(tmp_path):
    other = [{"question": f"other {i}", "chosen": "yes", "rejected": "no"} for i in range(3)]
    blend = Blend([Table(PAIRS[:4], name="a"), Table(other, {"prompt": "question"}, name="b")], [1, 0.5])
    folder = build(tmp_path / "data", blend, kinds=("preference",))
    table = folder.part("preference", "train")
    assert (table.sources.tolist(), table.row_ids.tolist()) == ([0] * 4 + [1] * 3, list(range(7)))
    said = folder.manifest["sources"]["data"]
    assert (said["source_names"], said["source_weights"]) == (["a", "b"], [1.0, 0.5])


# Bad rows


def broken(folder, rows, number):
    path = folder / "rows.jsonl"
    lines = [json.dumps(row) for row in rows]
    lines[number] = "{"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_bad_row_stops_the_run_or_is_skipped_with_its_place(tmp_path):
    rows = [*PAIRS[:199], {"prompt": "hi", "chosen": None, "rejected": "no"}]
    path = broken(tmp_path, rows, 120)
    with pytest.raises(UserError, match=r"rows.jsonl line 121: broken JSON .*; fix the row or pass `on_bad_row: skip`"):
        build(tmp_path / "error", path, on_bad_row="error")

    for how in ("auto", "skip"):
        folder = build(tmp_path / how, path, on_bad_row=how)
        bad = folder.manifest["sources"]["data"]["bad_rows"]
        assert bad["count"] == 2
        assert [place.removeprefix(str(tmp_path)) for place, _ in bad["first"]] == [
            "/rows.jsonl line 121",
            "/rows.jsonl line 200",
        ]
        assert bad["first"][1][1] == "chosen is null"
        assert counts(folder)["kept"] == 198


def test_more_bad_rows_than_one_in_a_hundred_stop_the_run(tmp_path):
    path = broken(tmp_path, [{"prompt": "hi", "chosen": None, "rejected": "no"}] * 2 + PAIRS[:197], 50)
    with pytest.raises(
        UserError,
        match=r"rows.jsonl line 1: chosen is null; 2 of the 2 rows read so far are bad, more than 1% of 199; fix",
    ):
        build(tmp_path / "auto", path)
    assert counts(build(tmp_path / "skip", path, on_bad_row="skip"))["kept"] == 196


def test_turns_that_the_format_refuses_make_a_bad_row(tmp_path):
    rows = [*PAIRS[:3], PAIRS[3] | {"prompt": [{"role": "tool", "content": "42"}]}]
    with pytest.raises(UserError, match=r"the list of rows row 3: role 'tool' has no place in a plain dialogue"):
        build(tmp_path / "auto", rows, dialogue_format="plain")
    folder = build(tmp_path / "skip", rows, dialogue_format="plain", on_bad_row="skip")
    assert dropped(folder) == {"dropped: the dialogue format refuses the turns: role 'tool'": 1}
    [(place, reason)] = folder.manifest["sources"]["data"]["bad_rows"]["first"]
    assert (place, reason[:27]) == ("the list of rows row 3", "role 'tool' has no place in")


def test_what_is_wrong_with_all_rows_names_the_first(tmp_path):
    rows = [*PAIRS[:3], PAIRS[3] | {"prompt": [{"role": "user", "content": "hi"}]}]
    with pytest.raises(UserError, match=r"the list of rows row 3: tokenizer .* has no chat template; pass"):
        build(tmp_path / "data", rows, on_bad_row="skip")


def test_rows_read_for_prediction_are_neither_filtered_nor_split():
    rows = [PAIRS[0], PAIRS[0], {"prompt": None, "chosen": "a", "rejected": "b"}]
    encoder = Encoder(ChatEncoder(tiny_tokenizer()), TokenLimits(64, None, None, "cut"))
    kept, said = read_all(as_source(rows), "preference", encoder, "skip")
    assert [row.row_id for row, _ in kept] == [0, 1]
    assert said == Counter({"rows": 3, "kept": 2, "dropped: prompt is null": 1})


# Processes


@pytest.mark.long
def test_the_tokens_do_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
    pairs = [{**pair, "prompt": f"{pair['prompt']}, {i}"} for i in range(7) for pair in PAIRS]  # chunks hold 1,000
    rows = [*pairs, {"prompt": None, "chosen": "a", "rejected": "b"}, *pairs[:10]]
    settings = {"filters": Filters(shuffle=True, duplicates="exact"), "splits": Splits(0.2, 0.1), "max_length": 16}
    alone = build(tmp_path / "one", rows, **settings)
    monkeypatch.setattr(workers, "WORTH_WORKERS", 1)
    forked_process(print)  # starts the server; test_workers.py has a fresh process
    forking = multiprocessing.get_context("forkserver")
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: forking)
    together = build(tmp_path / "two", rows, num_proc=2, **settings)

    names = sorted(path.name for path in alone.path.iterdir())
    assert names == sorted(path.name for path in together.path.iterdir())
    for name in names:
        assert (alone.path / name).read_bytes() == (together.path / name).read_bytes(), name


def unpaired(count):
    """Labelled rows of which the first two make the only pair."""
    rows = [{"prompt": f"question {i}", "completion": f"yes {i}", "label": i % 2 == 0} for i in range(count)]
    return [rows[0], {**rows[1], "prompt": rows[0]["prompt"]}, *rows[2:]]


def test_data_of_which_hardly_anything_serves_stop_the_run(tmp_path):
    reason = r"\(no response with the other label answers the same prompt 298\)"
    for kinds, hint in ((("preference",), ""), (None, ", or leave it out of `kinds`")):
        with pytest.raises(
            UserError,
            match=rf"^only 1 of 299 rows of the list of rows serve preference {reason}; fix "
            rf"the data or `columns`{hint}, or pass `on_bad_row: skip` to go on",
        ):
            build(tmp_path / str(kinds), unpaired(300), kinds=kinds)
    folder = build(tmp_path / "skipped", unpaired(300), on_bad_row="skip")
    assert len(folder.part("preference", "train")) == 1
    paired = [{**row, "prompt": f"question {i // 2}"} for i, row in enumerate(unpaired(40))]
    assert len(build(tmp_path / "paired", paired).part("preference", "train")) == 20


def test_what_the_user_left_out_does_not_stop_the_run(tmp_path):
    same = [{"prompt": "hi", "response": f"yes {i}"} for i in range(50)]
    build(tmp_path / "a", [*same, *same], filters=Filters(remove_same_inputs=True), num_samples=51)
    build(tmp_path / "b", same, kinds=("prompts",))
    build(
        tmp_path / "c",
        [*PAIRS[:1], *({"prompt": "p", "chosen": "a b c", "rejected": "b"},) * 30],
        minimum_response_length=2,
        kinds=("preference",),
    )
    bad = [{"prompt": f"q{i}", "completion": "no", "label": False} for i in range(50)]
    build(tmp_path / "d", [*bad, {"prompt": "q", "completion": "yes", "label": True}], kinds=("finetune",))


def test_a_stream_of_which_hardly_anything_serves_stops_early():
    rows = [{"prompt": "p", "chosen": "same", "rejected": "same"}] * 5000
    _, stream = preparation(Table(rows, streaming=True), kinds=("preference",)).stream(0)
    with pytest.raises(UserError, match=r"only 0 of 1000 rows of the list of rows serve preference"):
        next(stream)


def test_many_cut_responses_are_warned_of(tmp_path):
    rows = [{"prompt": "p", "response": " k" * (80 if i < 2 else 3)} for i in range(20)]
    for number, warned in ((19, True), (20, False)):
        folder = build(tmp_path / str(number), rows[:number], kinds=("finetune",))
        assert bool(say_cuts(folder.manifest)) == warned


@pytest.mark.parametrize("name", ["chatml", "deepseek", "opened thought"])
def test_prompts_are_what_generation_is_given_whatever_else_the_rows_are_read_for(tmp_path, name):
    tokenizer = shelf_tokenizer(name)
    rows = [[{"role": "user", "content": f"question {i}"}] for i in range(20)]
    data = [{"prompt": row, "chosen": f"yes {i}", "rejected": f"no {i}"} for i, row in enumerate(rows)]
    expected = [ChatEncoder(tokenizer).encode_prompt(row)[1].tolist() for row in rows]
    for kinds in (("prompts",), KINDS):
        folder = build(tmp_path / str(len(kinds)), data, tokenizer=tokenizer, kinds=kinds)
        prompts = folder.part("prompts", "train")
        assert [prompts[i].ids.tolist() for i in range(len(prompts))] == expected
    cut = build(tmp_path / "cut", data, tokenizer=tokenizer, kinds=KINDS, max_prompt_length=12).part("prompts", "train")
    assert [cut[i].ids.tolist()[-6:] for i in range(20)] == [ids[-6:] for ids in expected]
    assert max(len(cut[i].ids) for i in range(20)) <= 12
