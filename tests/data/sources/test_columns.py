"""Columns beside prompt and answers, and that nothing a row holds disappears without a word."""

import itertools

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.data.encode import Encoder
from rlhf_lightning.data.limits import TokenLimits
from rlhf_lightning.data.preparing.preparation import read_all
from rlhf_lightning.data.rows import KINDS, BadRowError, DroppedRow, Row
from rlhf_lightning.data.sources import Table
from rlhf_lightning.data.sources.row_forms import RowForm

UNRATED = tuple(need for need in KINDS if need != "rated")
"""Kinds of example that ask for no scores."""


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def read(row, need="finetune", columns=None):
    form = RowForm(list(row), columns, "the data")
    form.check(need)
    return form.read(row, need)


def refused(row, need="finetune", error=BadRowError):
    with pytest.raises(error) as raised:
        read(row, need)
    return str(raised.value)


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {}}}

# Columns beside


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"conversations": [user("p"), assistant("r")], "system": "s"}, [system("s"), user("p")]),
        ({"messages": [system("s"), user("p"), assistant("r")], "system": "s"}, [system("s"), user("p")]),
        ({"prompt": "p", "response": "r", "system_prompt": "s"}, [system("s"), user("p")]),
        ({"prompt": "p", "response": "r", "system": ""}, [user("p")]),
        ({"prompt": "p", "response": "r", "system": None}, [user("p")]),
        ({"prompt": [user("p")], "chosen": "r", "rejected": "x", "system": "s"}, [system("s"), user("p")]),
        (
            {"instruction": "p", "output": "r", "system": "s", "history": [["a", "b"]]},
            [system("s"), user("a"), assistant("b"), user("p")],
        ),
        (
            {"messages": [system("s"), user("p"), assistant("r")], "history": [["a", "b"]]},
            [system("s"), user("a"), assistant("b"), user("p")],
        ),
        (
            {"chosen": "\n\nHuman: p\n\nAssistant: r", "rejected": "\n\nHuman: p\n\nAssistant: x", "system": "s"},
            [system("s"), user("p")],
        ),
        (
            {"prompt": "\n\nHuman: p\n\nAssistant:", "response": " r", "system": "s"},
            [system("s"), user("p")],
        ),
        ({"instruction": "", "input": "p", "output": "r"}, [user("p")]),
        ({"messages": [system(""), user("p"), assistant("r")]}, [system(""), user("p")]),
    ],
)
def test_system_and_history_columns_become_turns(row, prompt):
    assert read(row) == Row(prompt, ("r",))
    assert read(row, "prompts") == Row(prompt)


def test_tools_go_beside_the_messages():
    row = {"prompt": "p", "response": "r"}
    for tools in ([TOOL], [TOOL["function"]], '[{"name": "weather", "parameters": {"type": "object"}}]', TOOL):
        assert read({**row, "tools": tools}) == Row([user("p")], ("r",), tools=(TOOL,))
    assert read({**row, "functions": [TOOL["function"]]}).tools == (TOOL,)
    assert read({**row, "tools": []}) == read({**row, "tools": None}) == Row([user("p")], ("r",))
    assert refused({**row, "tools": "search"}) == "tools is not a list of objects, nor JSON of one"
    assert refused({**row, "tools": [lambda: 1]}) == "tools is not a list of objects, nor JSON of one"
    assert refused({**row, "tools": [{"name": {1, 2}}]}) == "tools holds something that JSON cannot"


def test_labelled_rows_that_differ_in_their_tools_are_no_pair():
    good = {"prompt": "p", "response": "r", "label": True, "tools": [TOOL]}
    bad = {"prompt": "p", "response": "x", "label": False, "tools": [TOOL]}
    assert Table([good, bad]).open().parse(0, "preference").responses == ("r", "x")
    with pytest.raises(DroppedRow, match="no response with the other label"):
        Table([good, bad | {"tools": []}]).open().parse(0, "preference")


def test_calls_and_reasoning_stay_in_their_messages():
    asked = [
        user("p"),
        assistant(None, tool_calls=[{"function": {"name": "weather"}}]),
        {"role": "tool", "content": "4"},
    ]
    row = {"messages": [*asked, assistant("r", reasoning_content="it says so")], "tools": [TOOL]}
    called = [user("p"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": "4"}]
    assert read(row) == Row(called, (assistant("r", reasoning_content="it says so"),), tools=(TOOL,))
    last = {"messages": asked[:2], "tools": [TOOL]}
    assert read(last) == Row([user("p")], (assistant("", tool_calls=[CALL]),), tools=(TOOL,))


def test_columns_beside_may_come_late_or_mean_another_thing():
    form = RowForm(["prompt", "response"])
    assert form.read({"prompt": "p", "response": "r", "system": "s"}, "finetune").prompt == [system("s"), user("p")]
    named = {"history": "p", "good": "r", "bad": "x"}
    columns = {"prompt": "history", "chosen": "good", "rejected": "bad"}
    assert read(named, "preference", columns) == Row("p", ("r", "x"))


# Prompts and the turns that answers bring along


@pytest.mark.parametrize(
    ("prompt", "before", "joined"),
    [
        ([system("s"), user("p")], [user("p")], [system("s"), user("p")]),
        ("p", [user("p")], [user("p")]),
        ("p", [system("s"), user("p")], [system("s"), user("p")]),
        ("p", [user("p"), assistant("a"), user("b")], [user("p"), assistant("a"), user("b")]),
        ("b", [user("p"), assistant("a"), user("b")], [user("p"), assistant("a"), user("b")]),
        ("p", [system("s")], [system("s"), user("p")]),
        ("p", [], [user("p")]),
    ],
)
def test_a_prompt_and_answers_that_bring_turns_make_one_dialogue(prompt, before, joined):
    row = {"prompt": prompt, "chosen": [*before, assistant("r")], "rejected": [*before, assistant("x")]}
    assert read(row, "preference") == Row(joined, ("r", "x"))
    assert read(row, "finetune") == Row(joined, ("r",))
    assert read(row, "prompts") == Row(joined)
    seen = {**row, "messages": row["chosen"], "score_chosen": 7.5}
    assert read(seen) == Row(joined, ("r",), unused=("column 'messages'", "column 'score_chosen'"))


def test_a_prompt_that_answers_contradict_is_refused():
    row = {"prompt": "q", "chosen": [user("p"), assistant("r")], "rejected": [user("p"), assistant("x")]}
    for need in UNRATED:
        reason = "prompt and chosen contradict each other: their turns before the answer differ"
        assert refused(row, need) == reason


# What is taught


def test_turns_that_are_not_to_be_taught_are_not():
    turns = [user("a"), assistant("bad", weight=0), user("c"), assistant(""), user("d"), assistant("r", weight=1)]
    assert read({"messages": turns}) == Row(
        [user("a"), assistant("bad"), user("c"), assistant(""), user("d")], ("r",), untaught=(1, 3)
    )
    assert read({"messages": turns, "system": "s"}).untaught == (2, 4)


def test_a_dialogue_ends_with_the_last_turn_that_is_taught():
    turns = [user("a"), assistant("r"), user("c"), assistant("bad", train=False)]
    assert read({"messages": turns}) == Row([user("a")], ("r",))
    assert read({"messages": turns}, "prompts") == Row([user("a"), assistant("r"), user("c")])
    assert refused({"messages": turns[2:]}, error=DroppedRow) == "no turn of the assistant is to be taught"
    row = {"prompt": "p", "response": assistant("r", weight=0)}
    assert refused(row, error=DroppedRow) == "no turn of the assistant is to be taught"


# Other forms


@pytest.mark.parametrize(
    ("preference", "responses", "ranks"),
    [
        (1, ("r", "x"), (1, 2)),
        ("2", ("x", "r"), (1, 2)),
        (1.25, ("r", "x"), (1.25, 1.75)),
        (1.5, ("r", "x"), (1.5, 1.5)),
    ],
)
def test_two_outputs_and_which_is_preferred(preference, responses, ranks):
    row = {"instruction": "p", "input": "", "output_1": "r", "output_2": "x", "preference": preference}
    assert read(row, "preference") == Row([user("p")], responses, ranks)
    assert read(row, "finetune") == Row([user("p")], responses[:1])
    assert read(row, "prompts") == Row([user("p")])


def test_a_preference_for_neither_output_is_refused():
    row = {"prompt": "p", "output_1": "r", "output_2": "x", "preference": 0}
    assert refused(row, "preference") == "preference is 0, which is neither 1 nor 2"


def test_whole_texts_are_for_fine_tuning():
    form = RowForm(["text", "url"])
    assert [form.has(need) for need in KINDS] == [True, False, False, False]
    assert form.read({"text": "Once.", "url": "x"}, "finetune") == Row("", ("Once.",), unused=("column 'url'",))
    assert refused({"text": " "}) == "text is empty"
    alpaca = {"instruction": "p", "output": "r", "text": "p r"}
    assert read(alpaca) == Row([user("p")], ("r",), unused=("column 'text'",))


def test_what_the_text_is_about_and_cannot_be_read_is_refused():
    row = {"prompt": "What is this?", "response": "A cat."}
    assert refused({**row, "image": "cat.png"}) == "image holds something; only text can be read"
    assert read({**row, "images": []}) == Row("What is this?", ("A cat.",))


def test_a_dialogue_that_other_columns_answer_is_read_where_they_rank():
    row = {"conversations": [user("p")], "responses": ["x", "r"], "ranks": [2, 1]}
    assert read(row) == Row([user("p")], ("r",))
    assert read(row, "preference").responses == ("r", "x")


# The schemas of public sets


TURNS = [user("p"), assistant("r")]
PUBLIC = {
    "UltraChat": ({"prompt": "p", "prompt_id": "7f", "messages": TURNS}, [user("p")], ["prompt", "prompt_id"]),
    "UltraFeedback": (
        {
            **{"prompt": "p", "prompt_id": "7f", "chosen": TURNS, "rejected": [user("p"), assistant("x")]},
            **{"messages": TURNS, "score_chosen": 8.0, "score_rejected": 3.0},
        },
        [user("p")],
        ["prompt_id", "messages", "score_chosen", "score_rejected"],
    ),
    "Tulu": ({"id": "a", "messages": TURNS, "source": "flan"}, [user("p")], ["id", "source"]),
    "Magpie": (
        {"uuid": "a", "instruction": "p", "response": "r", "conversations": TURNS, "gen_input_configs": {"top_p": 1.0}},
        [user("p")],
        ["uuid", "conversations", "gen_input_configs"],
    ),
    "Orca": (
        {"id": "a", "system_prompt": "s", "question": "p", "response": "r"},
        [system("s"), user("p")],
        ["id"],
    ),
    "orca pairs": (
        {"system": "", "question": "p", "chosen": "r", "rejected": "x"},
        [user("p")],
        [],
    ),
    "ShareGPT": (
        {
            "id": "a_0",
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "p"},
                {"from": "gpt", "value": "r"},
            ],
        },
        [system("s"), user("p")],
        ["id"],
    ),
    "Alpaca": ({"instruction": "p", "input": "", "output": "r", "text": "Below is ..."}, [user("p")], ["text"]),
    "HelpSteer": (
        {"prompt": "p", "response": "r", "helpfulness": 4, "verbosity": 2},
        "p",
        ["helpfulness", "verbosity"],
    ),
    "KTO": ({"prompt": [user("p")], "completion": [assistant("r")], "label": True}, [user("p")], []),
    "AlpacaFarm": (
        {"instruction": "p", "input": "", "output_1": "x", "output_2": "r", "preference": 2, "raw_preference": 3},
        [user("p")],
        ["raw_preference"],
    ),
    "thinking": (
        {"reasoning_language": "French", "messages": [system("s"), *TURNS]},
        [system("s"), user("p")],
        ["reasoning_language"],
    ),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_rows_of_public_sets_are_read_whole(name):
    row, prompt, unused = PUBLIC[name]
    columns = {"prompt": "question"} if "question" in row else None
    named = tuple(f"column {column!r}" for column in unused)
    assert read(row, "finetune", columns) == Row(prompt, ("r",), unused=named)
    assert read(row, "prompts", columns) == Row(prompt, unused=named)


def test_rows_from_arrow_hold_what_was_written(tmp_path):
    """Arrow gives every struct the fields of all others, as nulls."""
    calls = [[{"function": {"name": "weather", "arguments": {place: "Rome"}}}] for place in ("city", "town")]
    tools = [
        [{"name": "weather", "parameters": {"properties": {place: {"type": "string"}}}}] for place in ("city", "town")
    ]
    written = [
        {
            "messages": [
                user("p"),
                assistant("", tool_calls=call),
                {"role": "tool", "content": "4", "id": 1},
                assistant("r"),
            ]
        }
        | {"tools": tool}
        for call, tool in zip(calls, tools, strict=True)
    ]
    datasets.Dataset.from_list(written).to_parquet(tmp_path / "rows.parquet")
    plain = Table(written).open()
    for rows in (Table(tmp_path / "rows.parquet").open(), Table(datasets.Dataset.from_list(written)).open()):
        for i in range(2):
            assert rows.parse(i, "finetune") == plain.parse(i, "finetune")
        assert [row for _, row in rows.stream("finetune")] == [row for _, row in plain.stream("finetune")]


# All forms


class Writer:
    """Writes rows whose texts are all different words, so that each can be looked for."""

    def __init__(self, draw):
        self.draw, self.count = draw, itertools.count()

    def word(self):
        return f"w{next(self.count)}w"

    def maybe(self):
        return self.draw(st.booleans())

    def turn(self, role, word=None):
        names = {"user": "human", "assistant": "gpt"} if self.maybe() else {}
        keys = ("from", "value") if names else ("role", "content")
        turn = dict(zip(keys, (names.get(role, role), word or self.word()), strict=True))
        if self.maybe():
            turn["mood"] = self.word()
        if role == "assistant" and self.maybe():
            turn["reasoning"] = self.word()
            turn["tool_calls"] = [{"name": self.word(), "arguments": {"a": self.word()}}]
        return turn

    def turns(self):
        """Turns that an answer may follow."""
        first = [self.turn("system")] if self.maybe() else []
        rounds = [self.turn(role) for _ in range(self.draw(st.integers(0, 2))) for role in ("user", "assistant")]
        for turn in rounds[1::2]:
            turn |= self.draw(st.sampled_from([{}, {"weight": 0}, {"train": True}]))
        return [*first, *rounds, self.turn("user")]

    def answer(self, before=None):
        kinds = ["text", "turn", "list", "whole"] if before else ["text", "turn", "list"]
        kind = self.draw(st.sampled_from(kinds))
        if kind == "text":
            return self.word()
        turn = self.turn("assistant")
        return turn if kind == "turn" else [*(before if kind == "whole" else []), turn]

    def asked(self):
        return self.draw(
            st.sampled_from(
                [
                    {"prompt": self.word()},
                    {"prompt": self.turns()},
                    {"instruction": self.word(), "input": self.draw(st.sampled_from(["", self.word()]))},
                    {"conversations": self.turns()},
                ]
            )
        )

    def row(self, form):
        if form == "turns":
            row = {"messages": [*self.turns(), self.turn("assistant")]}
        elif form == "text":
            row = {"text": self.word()}
        else:
            row = self.asked()
            before = row.get("prompt", row.get("conversations"))
            before = before if isinstance(before, list) else None
            if form == "response" and "conversations" not in row:
                row |= {"response": self.answer(before)}
            elif form == "labelled" and "conversations" not in row:
                row |= {"completion": self.answer(before), "label": True}
            elif form == "ranked":
                row |= {"responses": [self.word(), self.turn("assistant")], "scores": [1, 2]}
            elif form == "choice":
                row |= {"output_1": self.word(), "output_2": self.turn("assistant"), "preference": 2}
            else:
                row |= {"chosen": self.answer(before)}
                row |= {"rejected": self.answer(before)}
        if self.maybe():
            row |= {"system": self.word()}
        if self.maybe():
            row |= {"history": [[self.word(), self.word()]], "tools": [{"name": self.word()}]}
        if self.maybe():
            row |= {"source": self.word(), "output": self.word()}
        return row


@st.composite
def rows(draw):
    return Writer(draw).row(
        draw(st.sampled_from(["turns", "text", "response", "labelled", "ranked", "choice", "pair"]))
    )


def words(value):
    """The words in a value, each with the column and the last key it stands under."""
    inner = (
        value.items() if isinstance(value, dict) else [("", item) for item in value] if isinstance(value, list) else []
    )
    if isinstance(value, str):
        yield value, ""
    for key, item in inner:
        for word, below in words(item):
            yield word, below or key


@given(rows())
@settings(max_examples=300)
def test_every_word_of_a_row_is_read_or_named_or_the_row_is_refused(row):
    form = RowForm(list(row))
    found, unused = [], set()
    for need in UNRATED:
        if form.has(need) and not (need == "preference" and form.labelled):
            try:
                parsed = form.read(row, need)
            except (BadRowError, DroppedRow):
                return
            found.append(repr((parsed.prompt, parsed.responses, parsed.tools)))
            unused |= set(parsed.unused)
    for column, value in row.items():
        for word, key in words(value):
            said = any(word in text for text in found) or f"column {column!r}" in unused
            assert said or f"key {key!r} of a turn" in unused or word in ("user", "human", "assistant", "gpt", "system")


@given(st.lists(rows() | st.just({"messages": 3}) | st.just({}), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_rows_in_are_rows_kept_and_rows_with_a_reason(given_rows):
    encoder = Encoder(ChatEncoder(tiny_tokenizer(), "plain"), TokenLimits(64, None, None, "cut"))
    table = Table(given_rows)
    for need in UNRATED:
        if any(given_rows) and table.open().has(need):
            kept, counts = read_all(table, need, encoder, "skip")
            dropped = sum(count for name, count in counts.items() if name.startswith("dropped: "))
            assert counts["rows"] == len(given_rows) == len(kept) + dropped
