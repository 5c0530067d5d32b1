from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.data.rows import RowReader, prompt_key, split_of
from rlhf_lightning.errors import UserError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def dialogue(*turns):
    return "".join(f"\n\n{name}: {text}" for name, text in zip(["Human", "Assistant"] * 9, turns, strict=False))


def reader(*rows, columns=None, on_bad_row="error", limit=None):
    return RowReader(list(rows), columns, on_bad_row, Counter(), limit)


ASKED = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant:"


def test_whole_dialogues_are_split_before_the_last_answer():
    row = {"chosen": dialogue("hi", "hello", "bye", "farewell"), "rejected": dialogue("hi", "hello", "bye", "no")}

    assert reader(row).pairs() == [(ASKED, " farewell", " no", 0)]
    assert reader(row).examples() == [(ASKED, " farewell", 0)]
    assert reader(row).prompts() == [(ASKED, 0)]


def test_whole_dialogues_that_are_no_pair_are_dropped_and_counted_by_reason():
    good = {"chosen": dialogue("hi", "good"), "rejected": dialogue("hi", "bad")}
    rows = [
        {"chosen": dialogue("hi", "same"), "rejected": dialogue("hi", "same  ")},
        good,
        {"chosen": dialogue("hi", "good"), "rejected": dialogue("ho", "bad")},
        {"chosen": dialogue("hi", "good"), "rejected": dialogue("hi", "  ")},
        good,
    ]
    pairs = reader(*rows)

    assert [pair.row_id for pair in pairs.pairs()] == [1, 4]
    assert pairs.counts == {
        "rows": 5,
        "dropped: chosen and rejected are the same": 1,
        "dropped: prompts of chosen and rejected differ": 1,
        "dropped: response in rejected is empty": 1,
    }


def test_an_empty_answer_does_not_cost_the_prompt():
    assert reader({"chosen": dialogue("hi", ""), "rejected": dialogue("hi", "x")}).prompts() == [
        ("\n\nHuman: hi\n\nAssistant:", 0)
    ]


@pytest.mark.parametrize(
    ("row", "prompt", "response"),
    [
        ({"prompt": "p", "response": "r"}, "p", "r"),
        ({"prompt": "p", "chosen": "r", "rejected": "x"}, "p", "r"),
        ({"prompt": "p", "response": [assistant("r")]}, "p", "r"),
        ({"prompt": [user("p")], "chosen": "r", "rejected": "x"}, [user("p")], "r"),
        ({"prompt": [user("p")], "chosen": [assistant("r")], "rejected": [assistant("x")]}, [user("p")], "r"),
        ({"chosen": [user("p"), assistant("r")], "rejected": [user("p"), assistant("x")]}, [user("p")], "r"),
        ({"prompt": "p", "chosen": [user("p"), assistant("r")]}, [user("p")], "r"),
        (
            {"messages": [user("a"), assistant("b"), user("c"), assistant("r")]},
            [user("a"), assistant("b"), user("c")],
            "r",
        ),
        ({"messages": [user("p"), assistant("r"), user("thanks")]}, [user("p")], "r"),
    ],
)
def test_every_form_of_row_gives_its_prompt_and_response(row, prompt, response):
    assert reader(row).examples() == [(prompt, response, 0)]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "p"}, "p"),
        ({"prompt": [user("p")]}, [user("p")]),
        ({"messages": [user("p")]}, [user("p")]),
        ({"messages": [user("p"), assistant("r")]}, [user("p")]),
        ({"messages": [user("p"), assistant("r"), user("q")]}, [user("p"), assistant("r"), user("q")]),
    ],
)
def test_prompts_come_from_any_form(row, prompt):
    assert reader(row).prompts() == [(prompt, 0)]


def test_pairs_of_messages():
    row = {"prompt": [user("p")], "chosen": [assistant("r")], "rejected": [assistant("x")]}
    assert reader(row).pairs() == [([user("p")], "r", "x", 0)]


def test_columns_may_have_other_names():
    row = {"question": "p", "completion": "r"}
    assert reader(row, columns={"prompt": "question", "response": "completion"}).examples() == [("p", "r", 0)]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "query"}, r"the list of rows has no column 'query'; it has question"),
        ({"query": "question"}, r"columns: 'query' is not one of prompt, response, chosen, rejected, messages"),
    ],
)
def test_wrong_names_of_columns_are_said(columns, message):
    with pytest.raises(UserError, match=message):
        reader({"question": "p"}, columns=columns)


@pytest.mark.parametrize(
    ("what", "needed"),
    [
        ("examples", "prompt and response, or messages, or chosen"),
        ("pairs", "prompt, chosen and rejected"),
        ("prompts", "prompt"),
    ],
)
def test_missing_columns_are_said(what, needed):
    with pytest.raises(UserError, match=f"the list of rows has columns a, b; needed: {needed}"):
        getattr(reader({"a": "x", "b": "y"}), what)()


BAD = [
    ({"prompt": None, "response": "r"}, "prompt is null"),
    ({"response": "r"}, "prompt is null"),
    ({"prompt": "p", "response": " \n"}, "response is empty"),
    ({"prompt": "p", "response": 3}, "response is not text but int"),
    ({"prompt": [], "response": "r"}, "prompt is empty"),
    ({"prompt": ["hi"], "response": "r"}, 'prompt holds something else than {"role": ..., "content": ...}'),
    ({"prompt": [{"role": "user"}], "response": "r"}, "content in prompt is null"),
    ({"prompt": "p", "response": [user("r")]}, "response does not end with an assistant message"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_bad_field_stops_with_its_row_or_is_skipped_and_counted(row, reason):
    good = {"prompt": "p", "response": "r"}

    with pytest.raises(UserError) as error:
        reader(good, row).examples()
    assert str(error.value) == f"the list of rows row 1: {reason}; mend the row or pass `on_bad_row: skip`"

    skipping = reader(good, row, good, on_bad_row="skip")
    assert [example.row_id for example in skipping.examples()] == [0, 2]
    assert skipping.counts == {"rows": 3, f"dropped: {reason}": 1}


@pytest.mark.parametrize(
    ("row", "what", "reason"),
    [
        ({"messages": [user("p")]}, "examples", "messages has no assistant message"),
        ({"messages": [assistant("r")]}, "examples", "messages has no message before the assistant's"),
        ({"messages": [assistant("r")]}, "prompts", "messages has no message before the assistant's"),
        ({"messages": "text"}, "examples", "messages is not a list of messages but str"),
        ({"messages": None}, "examples", "messages is null"),
        ({"chosen": [assistant("r")], "rejected": [assistant("x")]}, "pairs", "chosen has no message before"),
        ({"chosen": "no dialogue", "rejected": "none"}, "pairs", "chosen is no dialogue: it has no 'Assistant:' turn"),
    ],
)
def test_other_bad_rows_are_named(row, what, reason):
    with pytest.raises(UserError, match=f"row 0: {reason}"):
        getattr(reader(row), what)()


def test_a_limit_reads_the_first_rows_only():
    limited = reader(*[{"prompt": f"p{i}"} for i in range(5)], limit=2)
    assert [prompt.prompt for prompt in limited.prompts()] == ["p0", "p1"]
    assert limited.counts == {"rows": 2}


FIELDS = st.sampled_from(["\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: c", "x", "", None, 3])


@given(st.lists(st.fixed_dictionaries({"chosen": FIELDS, "rejected": FIELDS}), min_size=1))
def test_rows_in_are_rows_out_and_rows_dropped(rows):
    pairs = reader(*rows, on_bad_row="skip")
    kept = pairs.pairs()
    dropped = sum(count for name, count in pairs.counts.items() if name.startswith("dropped: "))
    assert pairs.counts["rows"] == len(rows) == len(kept) + dropped


THREE = {"a": 0.5, "b": 0.3, "c": 0.2}


@given(st.lists(st.text(), unique_by=prompt_key), st.randoms())
def test_a_prompt_falls_on_one_side_in_any_company(prompts, random):
    sides = {prompt: split_of(prompt_key(prompt), THREE) for prompt in prompts}
    random.shuffle(prompts)
    assert {prompt: split_of(prompt_key(prompt), THREE) for prompt in prompts[::2]}.items() <= sides.items()


@given(st.text())
def test_case_and_space_do_not_change_the_side(prompt):
    assert prompt_key(f"  {prompt}\n") == prompt_key(prompt)
    assert prompt_key(prompt_key(prompt)) == prompt_key(prompt)


def test_a_dialogue_counts_as_the_same_prompt_in_either_form():
    messages = [user("Hi"), assistant("hello"), user("bye")]
    assert prompt_key(messages) == prompt_key(ASKED) == "user: hi assistant: hello user: bye"


def test_shares_are_kept_and_no_share_gets_nothing():
    sides = Counter(split_of(f"prompt {i}", THREE) for i in range(10000))
    assert {name: round(count / 10000, 1) for name, count in sides.items()} == THREE
    assert {split_of(f"prompt {i}", {"train": 1.0, "validation": 0.0}) for i in range(1000)} == {"train"}
