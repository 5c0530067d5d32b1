from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.chat.plain import parse_dialogue
from rlhf_lightning.data.rows import BadRowError, check_text, prompt_key, split_of

ASKED = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant:"
THREE = {"a": 0.5, "b": 0.3, "c": 0.2}


@pytest.mark.parametrize("text", ["a", " a\n", "\u00e9\U0001f600", "\x01", "x" * 1_000_000])
def test_sound_text_is_given_back(text):
    assert check_text(text, "prompt") is text


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "prompt is null"),
        (3, "prompt is not text but int"),
        (["a"], "prompt is not text but list"),
        ("", "prompt is empty"),
        (" \n\t\u2003", "prompt is empty"),
        ("a\0b", "prompt holds a NUL byte"),
        ("a\ud83d", "prompt holds a lone surrogate"),
        ("\ude00", "prompt holds a lone surrogate"),
        ("x" * 5_000_000, "prompt is longer than 1,000,000 characters"),
    ],
)
def test_text_that_cannot_be_tokenised_is_named(value, reason):
    with pytest.raises(BadRowError) as error:
        check_text(value, "prompt")
    assert str(error.value) == reason


def plain_key(prompt):
    """The key by its definition, in the slow way."""
    messages = parse_dialogue(prompt)
    text = prompt if messages is None else "\n".join(f"{m['role']}: {m['content']}" for m in messages)
    return " ".join(text.split()).casefold()


SPACED = st.text(st.sampled_from("aB\u00df\u0130\u00c9 \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u2003.:"))
PARTS = st.lists(st.sampled_from(["\n\nHuman:", "\n\nAssistant:", " a", "B  c", "\n", "\u00c9", "Human: "]))


@given(st.one_of(st.text(), SPACED, PARTS.map("".join)))
def test_the_key_is_the_turns_without_case_and_white_space(prompt):
    assert prompt_key(prompt) == plain_key(prompt)


@given(st.one_of(st.text(), SPACED))
def test_case_and_space_do_not_change_the_key(prompt):
    assert prompt_key(f"  {prompt}\n") == prompt_key(prompt)
    assert prompt_key(prompt_key(prompt)) == prompt_key(prompt)


def test_a_dialogue_counts_as_the_same_prompt_in_either_form():
    turns = [("user", "Hi"), ("assistant", "hello"), ("user", "bye")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert prompt_key(messages) == prompt_key(ASKED) == "user: hi assistant: hello user: bye"


@given(st.lists(st.text(), unique_by=prompt_key), st.randoms())
def test_a_prompt_falls_on_one_side_in_any_company(prompts, random):
    sides = {prompt: split_of(prompt_key(prompt), THREE) for prompt in prompts}
    random.shuffle(prompts)
    assert {prompt: split_of(prompt_key(prompt), THREE) for prompt in prompts[::2]}.items() <= sides.items()


def test_shares_are_kept_and_no_share_gets_nothing():
    sides = Counter(split_of(f"prompt {i}", THREE) for i in range(10000))
    assert {name: round(count / 10000, 1) for name, count in sides.items()} == THREE
    assert {split_of(f"prompt {i}", {"train": 1.0, "validation": 0.0}) for i in range(1000)} == {"train"}


def test_the_sides_of_a_prompt_never_change():
    """Prompts of earlier runs must not move, or what was held out would be trained on."""
    sides = [split_of(f"prompt {i}", THREE) for i in range(12)]
    assert "".join(sides) == "aaabbbaabacc"
    assert "".join(split_of(f"prompt {i}", THREE, salt="stage:") for i in range(12)) == "ccabbaaaabba"


def test_splits_of_different_salts_are_independent():
    halves = {"left": 0.5, "right": 0.5}
    both = Counter((split_of(f"p{i}", halves), split_of(f"p{i}", halves, salt="s")) for i in range(10000))
    assert len(both) == 4
    assert all(abs(count - 2500) < 200 for count in both.values())
