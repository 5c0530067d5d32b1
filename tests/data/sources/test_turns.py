import pytest

from rlhf_lightning.data.rows import BadRowError
from rlhf_lightning.data.sources.turns import (
    Turn,
    join_turns,
    put_first,
    read_history,
    read_turn,
    read_turns,
    unused_keys,
)

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}


def turn(role, content, **more):
    return Turn({"role": role, "content": content, **more})


def user(text):
    return turn("user", text)


def assistant(text):
    return turn("assistant", text)


def bad(function, *args):
    with pytest.raises(BadRowError) as error:
        function(*args)
    return str(error.value)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"role": "Human", "content": "hi"}, {"role": "user", "content": "hi"}),
        ({"from": "gpt", "value": "hi"}, {"role": "assistant", "content": "hi"}),
        ({"from": "gpt", "value": "hi", "role": None, "content": None}, {"role": "assistant", "content": "hi"}),
        ({"role": "system", "content": ""}, {"role": "system", "content": ""}),
        ({"role": "assistant", "content": ""}, {"role": "assistant", "content": ""}),
        ({"role": "developer", "content": "be brief"}, {"role": "developer", "content": "be brief"}),
        ({"from": "observation", "value": "21 C"}, {"role": "tool", "content": "21 C"}),
        (
            {"role": "function", "name": "weather", "content": "21 C"},
            {"role": "tool", "content": "21 C", "name": "weather"},
        ),
        (
            {"role": "tool", "tool_call_id": "c1", "content": "21 C"},
            {"role": "tool", "content": "21 C", "tool_call_id": "c1"},
        ),
        (
            {"role": "assistant", "content": "21", "thinking": "It says so."},
            {"role": "assistant", "content": "21", "reasoning_content": "It says so."},
        ),
        (
            {"role": "assistant", "content": "21", "reasoning": "Yes.", "reasoning_content": "Yes.", "name": None},
            {"role": "assistant", "content": "21", "reasoning_content": "Yes."},
        ),
        (
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
        ),
        ({"role": "assistant", "content": "hi", "tool_calls": []}, {"role": "assistant", "content": "hi"}),
        (
            {
                "role": "assistant",
                "content": None,
                "function_call": {"name": "weather", "arguments": '{"city": "Rome"}'},
            },
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
        ),
        (
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}, "!"]},
            {"role": "user", "content": "Hello!"},
        ),
        ({"role": "user", "content": [{"text": "hi", "image": None}]}, {"role": "user", "content": "hi"}),
    ],
)
def test_a_turn_becomes_the_message_that_templates_read(written, message):
    assert read_turn(written, "messages") == Turn(message)
    assert unused_keys([written]) == set()


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ({"role": "user", "content": None}, "content in messages is null"),
        ({"role": "assistant", "content": None}, "content in messages is null"),
        ({"content": "hi"}, "role in messages is null"),
        ({"role": "user", "content": {"text": "hi"}}, "content in messages is not text but dict"),
        (
            {"role": "user", "content": [{"type": "text", "text": "See:"}, {"type": "image_url", "image_url": "x"}]},
            "content in messages holds image_url; only text can be read",
        ),
        (
            {"role": "user", "content": [{"type": "image", "text": None}]},
            "content in messages holds image; only text can be read",
        ),
        ({"role": "user", "content": [3]}, "content in messages holds int; only text can be read"),
        (
            {"role": "assistant", "content": "a", "reasoning": "b", "thinking": "c"},
            "thinking in messages differs from the turn's other reasoning",
        ),
        ({"role": "assistant", "content": "a", "thinking": ["b"]}, "thinking in messages is not text but list"),
        (
            {"role": "assistant", "content": "a", "tool_calls": [{"function": {"arguments": "{}"}}]},
            "tool_calls in messages holds a call without the name of its function",
        ),
        (
            {"from": "function_call", "value": "call the weather"},
            "value in messages is not a list of objects, nor JSON of one",
        ),
        (
            {"role": "assistant", "content": "a", "weight": 0.5},
            "weight in messages is neither 1 nor 0: a turn is taught, or it is not",
        ),
    ],
)
def test_a_turn_that_cannot_be_used_is_named(written, reason):
    assert bad(read_turn, written, "messages") == reason


@pytest.mark.parametrize(
    ("flags", "taught"),
    [
        ({}, True),
        ({"weight": 1}, True),
        ({"weight": 0}, False),
        ({"weight": 0.0}, False),
        ({"train": False}, False),
        ({"train": "true", "weight": None}, True),
        ({"loss": False, "weight": 1}, False),
    ],
)
def test_the_data_may_say_which_turns_are_taught(flags, taught):
    written = {"role": "assistant", "content": "a", **flags}
    assert read_turn(written, "messages") == Turn({"role": "assistant", "content": "a"}, taught)


@pytest.mark.parametrize(
    ("written", "keys"),
    [
        ({"role": "user", "content": "hi", "id": 7, "lang": "en"}, {"id", "lang"}),
        ({"role": "user", "content": "hi", "id": None, "tags": []}, set()),
        ({"role": "user", "content": "hi", "from": "gpt", "value": "x"}, {"from", "value"}),
        ({"role": "user", "content": "hi", "weight": 1}, {"weight"}),
        ({"role": "user", "content": "hi", "weight": 0, "train": False}, set()),
    ],
)
def test_keys_that_are_not_read_are_named(written, keys):
    assert unused_keys([written, {"role": "assistant", "content": "a"}]) == keys
    assert unused_keys(written) == keys


def test_history_is_pairs_or_turns():
    turns = [user("a"), assistant("b")]
    assert read_history([["a", "b"]], "history") == turns
    assert read_history([{"role": "user", "content": "a"}, {"from": "gpt", "value": "b"}], "history") == turns
    assert read_history([], "history") == read_history(None, "history") == []
    assert bad(read_history, [["a"]], "history") == "history is not a list of [user, assistant] pairs"
    assert bad(read_history, "a", "history") == "history is not a list of [user, assistant] pairs but str"
    assert bad(read_history, [["a", 2]], "history") == "an item of history is not text but int"


SYSTEM, OTHER = turn("system", "Be brief."), turn("system", "Be long.")
A, B, C = user("a"), assistant("b"), user("c")


@pytest.mark.parametrize(
    ("asked", "own", "joined"),
    [
        ([A], [A], [A]),
        ([SYSTEM, A], [A], [SYSTEM, A]),
        ([A], [SYSTEM, A], [SYSTEM, A]),
        ([SYSTEM, A], [SYSTEM, A], [SYSTEM, A]),
        ([SYSTEM, A], [A, B, C], [SYSTEM, A, B, C]),
        ([C], [A, B, C], [A, B, C]),
        ([A, B, C], [C], [A, B, C]),
        ([A], [B, C], [A, B, C]),
        ([A], [SYSTEM], [SYSTEM, A]),
        ([SYSTEM], [A], [SYSTEM, A]),
        ([user("a ")], [user(" a")], [user(" a")]),
    ],
)
def test_turns_of_prompt_and_answer_are_joined_each_once(asked, own, joined):
    assert join_turns(asked, own, "prompt and chosen") == joined


@pytest.mark.parametrize(
    ("asked", "own", "reason"),
    [
        ([A], [C], "prompt and chosen contradict each other: their turns before the answer differ"),
        ([A, B, C], [A], "prompt and chosen contradict each other: their turns before the answer differ"),
        ([A, B], [B, C], "prompt and chosen contradict each other: their turns before the answer differ"),
        ([SYSTEM, A], [OTHER, A], "prompt and chosen have different system turns"),
    ],
)
def test_turns_that_contradict_each_other_are_refused(asked, own, reason):
    assert bad(join_turns, asked, own, "prompt and chosen") == reason


def test_a_system_turn_and_history_come_first():
    assert put_first([SYSTEM], [A]) == put_first([SYSTEM], [SYSTEM, A]) == put_first([], [SYSTEM, A]) == [SYSTEM, A]
    assert put_first([SYSTEM], [turn("system", " "), A]) == [SYSTEM, A]
    assert put_first([SYSTEM], [C], [A, B]) == put_first([], [SYSTEM, C], [A, B]) == [SYSTEM, A, B, C]
    assert bad(put_first, [OTHER], [SYSTEM, A]) == "the system column and the system turn differ"


def test_a_dialogue_of_any_number_of_turns_is_held_to_the_limit_of_a_text():
    turns = [{"role": "user", "content": "x" * 600_000}] * 2
    assert bad(read_turns, turns, "messages") == "messages is longer than 1,000,000 characters"
