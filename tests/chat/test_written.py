"""Prompts as their rows wrote them: kept in a file, read by people, and answers without what a format puts around."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.chat.plain import PlainFormat
from rlhf_lightning.chat.spacing import NO_SPACING, Spacing
from rlhf_lightning.chat.written import WrittenPrompt, from_json, to_json

DIALOGUE = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant:"
TURNS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
]
CALLS = [{"function": {"name": "add", "arguments": {"a": "é"}}}]
SPACED = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + ' ' + m['content'] + ' ' + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": TEXTS}), max_size=3)
TOOLS = st.lists(st.dictionaries(TEXTS, TEXTS, max_size=2), max_size=2).map(tuple)


@given(st.builds(WrittenPrompt, TEXTS | MESSAGES, TOOLS) | st.none())
def test_what_is_kept_in_a_file_is_what_was_written(written):
    line = to_json(written)
    assert from_json(line) == written
    assert line is None or "\n" not in line


@pytest.mark.parametrize(
    ("prompt", "text", "messages"),
    [
        ("Once upon", "Once upon", [{"role": "user", "content": "Once upon"}]),
        ("\n\nHuman: hi\n\nAssistant:", "hi", TURNS[:1]),
        (TURNS[:1], "hi", TURNS[:1]),
        (DIALOGUE, "Human: hi\n\nAssistant: hello\n\nHuman: bye", TURNS),
        (TURNS, "Human: hi\n\nAssistant: hello\n\nHuman: bye", TURNS),
        ([{"role": "system", "content": "Be kind."}, TURNS[0]], "System: Be kind.\n\nHuman: hi", None),
        (
            [
                TURNS[0],
                {"role": "assistant", "content": "", "tool_calls": CALLS},
                {"role": "tool", "content": "2", "name": "add"},
                {"role": "assistant", "content": "again", "tool_calls": CALLS},
            ],
            'Human: hi\n\nAssistant: [{"function": {"name": "add", "arguments": {"a": "é"}}}]\n\nTool: 2\n\n'
            'Assistant: again\n[{"function": {"name": "add", "arguments": {"a": "é"}}}]',
            None,
        ),
    ],
)
def test_people_and_functions_read_the_same_whatever_the_row_was_written_as(prompt, text, messages):
    written = WrittenPrompt(prompt)
    assert written.text == text
    assert written.messages == (prompt if messages is None else messages)


@pytest.mark.parametrize(
    ("template", "options", "said"),
    [
        (None, {}, " word"),
        (None, {"plain_format": PlainFormat(response="\n> ")}, "\n> word"),
        (SPACED, {}, " word "),
        (SPACED, {"dialogue_format": "plain"}, " word"),
    ],
)
def test_what_a_format_writes_around_an_answer_is_taken_off(template, options, said):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    chat = ChatEncoder(tokenizer, **options)
    for prompt in (DIALOGUE, TURNS) if template else (DIALOGUE,):
        _, ids = chat.encode_dialogue(prompt, "word")
        spacing, written = Spacing.of(chat), WrittenPrompt(prompt)
        assert spacing.content(written, chat.decode([ids])[0]) == "word"
        cut = said.rstrip()
        assert spacing.content(written, cut) == "word"
        # What an answer itself begins and ends with stays.
        assert spacing.content(written, said.replace("word", "\tword\n")) == "\tword\n"


def test_nothing_is_taken_off_where_a_format_writes_answers_otherwise():
    chat = ChatEncoder(tiny_tokenizer(), chat_template=SPACED.replace("m['content']", "m['content'] | capitalize"))
    assert Spacing.of(chat) == NO_SPACING


def test_text_that_is_no_dialogue_is_continued_as_it_stands():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = SPACED
    written = WrittenPrompt("Once upon")
    assert Spacing.of(ChatEncoder(tokenizer)).content(written, " a time") == " a time"
    assert Spacing.of(ChatEncoder(tokenizer, "chat_template")).content(written, " a time") == "a time"
