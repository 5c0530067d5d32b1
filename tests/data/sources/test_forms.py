import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.data.rows import BadRowError, DroppedRow, Row
from rlhf_lightning.data.sources import Table
from rlhf_lightning.data.sources.row_forms import RowForm
from rlhf_lightning.errors import UserError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def said(speaker, text):
    return {"from": speaker, "value": text}


def dialogue(*turns):
    return "".join(f"\n\n{name}: {text}" for name, text in zip(["Human", "Assistant"] * 9, turns, strict=False))


def read(row, need="finetune", columns=None, like=None):
    """A row by the form of its own columns, or of those of the row `like`."""
    form = RowForm(list(like or row), columns, "the data")
    form.check(need)
    return form.read(row, need)


def bad(row, need="finetune", like=None):
    with pytest.raises(BadRowError) as error:
        read(row, need, like=like)
    return str(error.value)


def dropped(row, need="preference"):
    with pytest.raises(DroppedRow) as error:
        read(row, need)
    return str(error.value)


ASKED = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant:"
PROMPT = [user("p")]
DEMONSTRATIONS = [
    ({"prompt": "p", "response": "r"}, "p"),
    ({"prompt": "p", "completion": "r"}, "p"),
    ({"prompt": "p", "chosen": "r", "rejected": "x"}, "p"),
    ({"prompt": "p", "response": [assistant("r")]}, PROMPT),
    ({"prompt": PROMPT, "response": "r"}, PROMPT),
    ({"prompt": PROMPT, "chosen": "r", "rejected": "x"}, PROMPT),
    ({"prompt": PROMPT, "chosen": [assistant("r")], "rejected": [assistant("x")]}, PROMPT),
    ({"prompt": PROMPT, "chosen": assistant("r"), "rejected": assistant("x")}, PROMPT),
    ({"chosen": [user("p"), assistant("r")], "rejected": [user("p"), assistant("x")]}, PROMPT),
    ({"prompt": "p", "chosen": [user("p"), assistant("r")], "rejected": [user("p"), assistant("x")]}, PROMPT),
    ({"messages": [user("a"), assistant("b"), user("c"), assistant("r")]}, [user("a"), assistant("b"), user("c")]),
    ({"messages": [said("human", "p"), said("gpt", "r")]}, PROMPT),
    ({"conversations": [said("human", "p"), said("gpt", "r")]}, PROMPT),
    ({"conversations": [said("system", "s"), said("user", "p"), said("assistant", "r")]}, None),
    ({"conversations": [said("human", "p")], "chosen": said("gpt", "r"), "rejected": said("gpt", "x")}, PROMPT),
    ({"conversations": [said("human", "p")], "chosen": assistant("r"), "rejected": assistant("x")}, PROMPT),
    ({"conversations": [said("human", "p")], "chosen": "r", "rejected": "x"}, PROMPT),
    ({"instruction": "p", "output": "r"}, PROMPT),
    ({"instruction": "p", "input": "", "output": "r"}, PROMPT),
    ({"instruction": "p", "input": None, "output": "r"}, PROMPT),
    ({"instruction": "a", "input": "b", "output": "r"}, [user("a\n\nb")]),
    ({"instruction": "p", "input": " ", "chosen": "r", "rejected": "x"}, PROMPT),
    ({"prompt": "p", "completion": "r", "label": True}, "p"),
    ({"prompt": "p", "responses": ["x", "r", "y"], "ranks": [2, 1, 3]}, "p"),
    ({"prompt": "p", "responses": [assistant("x"), assistant("r")], "scores": [0.1, 0.2]}, PROMPT),
]
PAIRS = [(row, prompt) for row, prompt in DEMONSTRATIONS if "chosen" in row]


@pytest.mark.parametrize(("row", "prompt"), DEMONSTRATIONS)
def test_every_form_gives_its_prompt_and_response(row, prompt):
    prompt = prompt or [{"role": "system", "content": "s"}, *PROMPT]
    assert read(row) == Row(prompt, ("r",))
    assert read(row, "prompts").prompt == prompt


@pytest.mark.parametrize(("row", "prompt"), PAIRS)
def test_every_form_of_pair_gives_both_responses(row, prompt):
    assert read(row, "preference") == Row(prompt, ("r", "x"))


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "p"}, "p"),
        ({"prompt": PROMPT}, PROMPT),
        ({"instruction": "a", "input": "b"}, [user("a\n\nb")]),
        ({"messages": PROMPT}, PROMPT),
        ({"messages": [user("p"), assistant("r"), user("q")]}, [user("p"), assistant("r"), user("q")]),
        ({"conversations": [said("human", "p"), said("gpt", "r")]}, PROMPT),
        ({"chosen": dialogue("hi", "hello", "bye", "x")}, ASKED),
    ],
)
def test_prompts_come_from_any_form(row, prompt):
    assert read(row, "prompts") == Row(prompt)


# Whole dialogues


def test_whole_dialogues_are_split_before_the_last_answer():
    row = {"chosen": dialogue("hi", "hello", "bye", "farewell"), "rejected": dialogue("hi", "hello", "bye", "no")}

    assert read(row, "preference") == Row(ASKED, (" farewell", " no"))
    assert read(row, "finetune") == Row(ASKED, (" farewell",))
    assert read(row, "prompts") == Row(ASKED)


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (dialogue("hi", "same"), dialogue("hi", "same  "), "chosen and rejected are the same"),
        (dialogue("hi", "good"), dialogue("ho", "bad"), "prompts of chosen and rejected differ"),
        (dialogue("hi", "good"), dialogue("hi", "  "), "response in rejected is empty"),
        ("\n\nAssistant: x", dialogue("hi", "y"), "prompt in chosen is empty"),
        ([user("p"), assistant("r")], [user("q"), assistant("x")], "prompts of chosen and rejected differ"),
        ([user("p"), assistant("r")], [user("p"), assistant("r ")], "chosen and rejected are the same"),
    ],
)
def test_dialogues_that_are_no_pair_are_dropped_by_reason(chosen, rejected, reason):
    assert dropped({"chosen": chosen, "rejected": rejected}) == reason


def test_an_empty_answer_does_not_cost_the_prompt():
    row = {"chosen": dialogue("hi", ""), "rejected": dialogue("hi", "x")}
    assert read(row, "prompts") == Row("\n\nHuman: hi\n\nAssistant:")


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": dialogue("hi", "hello", "bye"), "rejected": dialogue("hi", "x")},
        {"chosen": [user("p"), assistant("r"), user("q")], "rejected": [user("p"), assistant("x")]},
        {"prompt": "p", "chosen": user("r"), "rejected": assistant("x")},
    ],
)
def test_a_dialogue_that_does_not_end_with_the_assistant_is_a_bad_row(row):
    assert bad(row, "preference") == "chosen does not end with the assistant"


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])).map(lambda t: t.replace("\0", "")), min_size=2))
def test_prompt_and_response_joined_are_the_dialogue(turns):
    turns = [turn.replace("\n", " ") or "x" for turn in turns][: len(turns) // 2 * 2]
    text = dialogue(*turns)
    if turns[-1].strip():
        row = read({"chosen": text, "rejected": text})
        assert row.prompt + row.responses[0] == text
        assert row.prompt.endswith("\n\nAssistant:")


# Rankings


def test_a_ranking_is_sorted_with_its_ties():
    row = {"prompt": "p", "responses": ["c", "a", "b", "also b"], "ranks": [3, 1, 2, 2]}
    assert read(row, "preference") == Row("p", ("a", "b", "also b", "c"), (1.0, 2.0, 2.0, 3.0))


def test_scores_rank_the_other_way_round():
    row = {"prompt": "p", "responses": ["c", "a", "b"], "scores": [-1, 2.5, 0]}
    assert read(row, "preference") == Row("p", ("a", "b", "c"), (-2.5, 0.0, 1.0))


def test_of_responses_that_say_the_same_the_best_ranked_stays():
    row = {"prompt": "p", "responses": ["x", "a", "x ", "b"], "ranks": [4, 1, 2, 3]}
    assert read(row, "preference") == Row("p", ("a", "x ", "b"), (1.0, 2.0, 3.0))


@given(st.lists(st.tuples(st.integers(), st.integers(-5, 5)), min_size=2, unique_by=lambda pair: pair[0]))
def test_a_ranking_keeps_each_response_at_its_rank(ranked):
    responses, ranks = [str(text) for text, _ in ranked], [rank for _, rank in ranked]
    row = read({"prompt": "p", "responses": responses, "ranks": ranks}, "preference")
    assert sorted(zip(row.responses, row.ranks, strict=True)) == sorted(zip(responses, ranks, strict=True))
    assert list(row.ranks) == sorted(ranks)


@pytest.mark.parametrize(
    ("responses", "ranks", "reason"),
    [
        (["a", "b"], [1], "responses and ranks differ in length"),
        (["a", None], [1, 2], "an item of responses is null"),
        (["a", user("b")], [1, 2], "an item of responses is not the assistant's"),
        (["a", "b"], [1, "x"], "ranks is not a number"),
        (["a", "b"], [1, math.nan], "ranks is not a number"),
        (["a", "b"], [1, True], "ranks is not a number"),
        (["a", "b"], [], "ranks is empty"),
        ("ab", [1, 2], "responses is not a list of values but str"),
    ],
)
def test_bad_rankings_are_named(responses, ranks, reason):
    assert bad({"prompt": "p", "responses": responses, "ranks": ranks}, "preference") == reason


def test_rankings_without_a_choice_are_dropped():
    assert dropped({"prompt": "p", "responses": ["a"], "ranks": [1]}) == "there is only one response"
    same = {"prompt": "p", "responses": ["a", " a"], "ranks": [1, 2]}
    assert dropped(same) == "chosen and rejected are the same"


# Labels, numbers, names


def test_a_labelled_row_is_a_demonstration_where_the_label_is_good():
    row = {"prompt": "p", "response": "r", "label": False}
    assert dropped(row, "finetune") == "response is labelled as bad"
    assert RowForm(list(row)).label(row) == (Row("p", ("r",)), False)
    assert RowForm(list(row)).has("preference")


def test_a_labelled_dialogue_is_a_demonstration_where_the_label_is_good():
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "go away"}]
    row = {"conversations": turns, "label": False}
    asked = [{"role": "user", "content": "hi"}]
    assert dropped(row, "finetune") == "response is labelled as bad"
    assert RowForm(list(row)).label(row) == (Row(asked, ("go away",)), False)
    assert RowForm(list(row)).read({**row, "label": True}, "finetune") == Row(asked, ("go away",))
    assert RowForm(list(row)).read(row, "prompts") == Row(asked)
    opened = Table([row, {"conversations": [turns[0], {"from": "gpt", "value": "hello"}], "label": True}]).open()
    assert opened.parse(1, "preference") == Row(asked, ("hello", "go away"), row_id=1)


@pytest.mark.parametrize(("label", "good"), [(True, True), (1, True), ("TRUE", True), (0, False), ("false ", False)])
def test_labels_may_be_words_or_numbers(label, good):
    row = {"prompt": "p", "response": "r", "label": label}
    assert RowForm(list(row)).label(row)[1] is good


@pytest.mark.parametrize(("label", "reason"), [(None, "label is null"), ("good", "label is neither true nor false")])
def test_other_labels_are_bad_rows(label, reason):
    assert bad({"prompt": "p", "response": "r", "label": label}) == reason


def test_margin_and_weight_are_read_where_they_are_given():
    row = {"prompt": "p", "chosen": "r", "rejected": "x", "margin": 2, "weight": "0.5"}
    assert read(row, "preference") == Row("p", ("r", "x"), margin=2.0, weight=0.5)
    assert read(row | {"margin": None, "weight": None}, "preference") == Row("p", ("r", "x"))
    named = {"prompt": "p", "chosen": "r", "rejected": "x", "gap": 3}
    assert read(named, "preference", {"margin": "gap"}).margin == 3


def test_ties_have_a_margin_where_a_ranking_gives_one():
    row = {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 1], "tie_margin": "0.5"}
    assert read(row, "preference") == Row("p", ("a", "b"), (1, 1), tie_margin=0.5)
    assert read(row | {"tie_margin": 0}, "preference").tie_margin == 0
    assert read(row | {"tie_margin": None}, "preference").tie_margin is None
    assert bad(row | {"tie_margin": "much"}, "preference") == "tie_margin is not a number"
    pair = {"prompt": "p", "chosen": "r", "rejected": "x", "tie_margin": 2}
    assert read(pair, "preference").unused == ("column 'tie_margin'",)  # it has no ties


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ({"margin": "much"}, "margin is not a number"),
        ({"weight": 0}, "weight is not above 0"),
        ({"weight": math.inf}, "weight is not a number"),
    ],
)
def test_numbers_that_cannot_be_are_named(numbers, reason):
    assert bad({"prompt": "p", "response": "r", **numbers}) == reason


def test_columns_may_have_other_names():
    row = {"question": "p", "good": "r", "bad": "x", "prompt": "another"}
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert read(row, "preference", columns) == Row("p", ("r", "x"), unused=("column 'prompt'",))


def test_a_column_named_for_one_thing_is_not_read_as_another():
    row = {"prompt": "p", "label": "a summary"}
    assert read(row, columns={"response": "label"}) == Row("p", ("a summary",))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "query"}, r"the data has no column 'query'; it has question"),
        ({"query": "question"}, r"columns: 'query' is not one of prompt, response, chosen, rejected, messages"),
    ],
)
def test_wrong_names_of_columns_are_said(columns, message):
    with pytest.raises(UserError, match=message):
        RowForm(["question"], columns)


@pytest.mark.parametrize(
    ("need", "needed"),
    [
        ("finetune", "prompt and response, or messages, or chosen"),
        ("preference", "prompt, chosen and rejected"),
        ("prompts", "prompt"),
    ],
)
def test_missing_columns_are_said(need, needed):
    form = RowForm(["a", "b"])
    assert not form.has(need)
    with pytest.raises(UserError, match=f"the data has columns a, b; needed: {needed}"):
        form.check(need)


# Bad fields


BOTH = {"prompt": "p", "response": "r"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": None, "response": "r"}, "prompt is null"),
        ({"response": "r"}, "prompt is missing"),
        ({"query": "p", "response": "r"}, "prompt is missing; unknown column 'query'"),
        ({"prompt": "p", "response": " \n"}, "response is empty"),
        ({"prompt": "p", "response": 3}, "response is not text but int"),
        ({"prompt": "p\0", "response": "r"}, "prompt holds a NUL byte"),
        ({"prompt": "p", "response": "\ud800"}, "response holds a lone surrogate"),
        ({"prompt": "p" * 5_000_000, "response": "r"}, "prompt is longer than 1,000,000 characters"),
        ({"prompt": [user("x" * 600_000)] * 2, "response": "r"}, "prompt is longer than 1,000,000 characters"),
        ({"prompt": [], "response": "r"}, "prompt is empty"),
        ({"prompt": ["hi"], "response": "r"}, 'prompt holds something else than {"role": ..., "content": ...}'),
        ({"prompt": [{"role": "user"}], "response": "r"}, "content in prompt is null"),
        ({"prompt": [said("human", None)], "response": "r"}, "value in prompt is null"),
        ({"prompt": "p", "response": [user("r")]}, "response does not end with the assistant"),
    ],
)
def test_a_field_that_cannot_be_used_is_named(row, reason):
    assert bad(row, like=BOTH) == reason


@pytest.mark.parametrize(
    ("row", "need", "reason"),
    [
        ({"messages": [user("p")]}, "finetune", "messages does not end with the assistant"),
        ({"messages": [user("p"), assistant("r"), user("q")]}, "finetune", "messages does not end with the assistant"),
        ({"messages": [assistant("r")]}, "finetune", "messages has no message before the assistant's"),
        ({"messages": [assistant("r")]}, "prompts", "messages has no message before the assistant's"),
        ({"messages": "text"}, "finetune", "messages is not a list of messages but str"),
        ({"messages": None}, "finetune", "messages is null"),
        (
            {"conversations": [said("human", "p"), said("gpt", "a")], "chosen": "r", "rejected": "x"},
            "preference",
            "conversations ends with the assistant, and so does the answer to it",
        ),
        (
            {"chosen": [assistant("r")], "rejected": [assistant("x")]},
            "preference",
            "nothing says what is answered: there is no message before the assistant's",
        ),
        (
            {"chosen": "no dialogue", "rejected": "none"},
            "preference",
            "chosen is not a dialogue: it has no 'Assistant:' turn and no column says its prompt",
        ),
        ({"instruction": "a", "input": 3, "output": "r"}, "finetune", "input is not text but int"),
    ],
)
def test_other_bad_rows_are_named(row, need, reason):
    assert bad(row, need) == reason


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.sampled_from(["", "\0", "\ud800"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), inner),
    max_leaves=6,
)


@given(
    st.dictionaries(
        st.sampled_from(["prompt", "response", "chosen", "rejected", "messages", "label", "margin"]), VALUES
    ),
    st.sampled_from([row for row, _ in DEMONSTRATIONS]),
    st.sampled_from(["finetune", "preference", "prompts"]),
)
def test_any_row_at_all_is_read_or_refused_with_a_reason(row, like, need):
    form = RowForm(list(like))
    if not form.has(need) or (need == "preference" and form.labelled):
        return
    try:
        parsed = form.read(row, need)
    except (BadRowError, DroppedRow) as error:
        reason, parsed = str(error), None
    if parsed is None:
        assert reason.splitlines() == [reason]
    else:
        assert parsed.prompt
        assert all(isinstance(text, str) and text.strip() for text in parsed.responses)
        assert len(parsed.responses) == {"prompts": 0, "finetune": 1}.get(need, len(parsed.responses))
