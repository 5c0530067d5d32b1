"""Dialogues as texts, against texts written out by hand."""

import pytest

from helpers.tokenizers import CHAT_TEMPLATE, tiny_tokenizer
from rlhf_lightning.chat.control_tokens import MARK
from rlhf_lightning.chat.messages import RefusedTurnsError
from rlhf_lightning.chat.plain import HUMAN_ASSISTANT, PlainFormat
from rlhf_lightning.chat.writer import ACTING, HIDDEN, LEFT_OUT, NO_END, NO_TURNS, REWRITES, Dialogue, DialogueWriter

CALL = {"function": {"name": "find", "arguments": {}}}
TOOL = {"function": {"name": "find"}}
TOOLS = "{% for tool in tools or [] %}{{ tool.function.name + ' ' }}{% endfor %}"
THINKS = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|start|>' + m.content }}"
    "{% else %}{{ '<|bos|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|bos|>..' }}{% endif %}"
)
"""Begins an answer that is asked for otherwise than one that is given."""


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


MESSAGES = [user("hi"), assistant("hello"), user("bye")]


def writer(template=None, dialogue_format="auto", plain_format=HUMAN_ASSISTANT, bos=False):
    tokenizer = tiny_tokenizer(bos=bos)
    tokenizer.chat_template = template
    return DialogueWriter(tokenizer, dialogue_format, plain_format)


def said(written):
    """The texts of the earlier turns."""
    return [written.prompt[start:end] for start, end in written.spans]


def test_text_is_taken_as_it_stands():
    one = writer(bos=True)
    expected = ("verbatim", "Once", [" a", "b"], [False, False], 4, [], (), "")
    assert one.write(Dialogue("Once", (" a<|end|>", "b"))) == expected
    assert one.write(Dialogue("<|bos|>Once", ("a",))).notes == ()  # its BOS alone means nothing more
    expected = ("verbatim", "a<|end|>b", ["c<|end|>", "d"], [True, False], 9, [], (ACTING,), "")
    assert one.write(Dialogue("a<|end|>b", ("c<|end|>", "d"))) == expected
    assert one.write(Dialogue("Once", ("a<|start|>b",))).answers == [f"a<{MARK}|start|>b"]
    assert one.write(Dialogue("", ("a<|start|>b",))).notes == (ACTING,)  # a whole text


def test_text_may_be_a_turn_of_the_user():
    assert writer(CHAT_TEMPLATE, "chat_template").form("Once") == ("template", [user("Once")])
    assert writer(CHAT_TEMPLATE, "chat_template").form("") == ("verbatim", [])


def test_a_plain_dialogue():
    one = writer(dialogue_format="plain")
    text = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant:"
    expected = ("plain", text, [" so long"], [False], len(text), [(23, 29)], (), "")
    for response in (" so long<|end|>", assistant("so long")):
        assert one.write(Dialogue(MESSAGES, (response,)), need_turns=True) == expected
    assert one.write(Dialogue(MESSAGES)).spans == []
    assert one.write(Dialogue(MESSAGES, untaught=(1,)), need_turns=True).spans == []
    assert one.write(Dialogue([user("a<|end|>b")])).notes == (HIDDEN,)


def test_a_plain_turn_is_taught_to_its_last_eos():
    one = writer(dialogue_format="plain", plain_format=PlainFormat(turn_end="<|end|>-<|end|>\n-"))
    assert said(one.write(Dialogue(MESSAGES), need_turns=True)) == [" hello<|end|>-<|end|>"]


def test_all_that_a_plain_dialogue_has_no_place_for_is_named():
    with pytest.raises(RefusedTurnsError) as error:
        writer(dialogue_format="plain").write(Dialogue([user("hi")], (assistant("", tool_calls=[CALL]),), (TOOL,)))
    assert error.value.reason == "tool_calls and tools"


def test_an_answer_that_opens_otherwise_than_it_was_asked_for():
    prompt = "find <|start|>hi<|bos|>hello<|end|><|start|>bye<|bos|>"
    dialogue = Dialogue(MESSAGES, ("so long", ".. so"), (TOOL,))
    assert writer(TOOLS + THINKS).write(dialogue, need_turns=True) == (
        *("template", prompt + "..", [prompt + "so long<|end|>", prompt + ".. so<|end|>"], [True, True]),
        *(len(prompt), [(23, 35)], (REWRITES,), prompt + ".."),
    )


def test_turns_that_are_written_anew_for_the_answer():
    anew = "{{ '!' if not add_generation_prompt }}"
    before = TOOLS + "<|start|>" + anew + CHAT_TEMPLATE
    written = writer(before).write(Dialogue(MESSAGES, ("so long",), (TOOL,)), need_turns=True)
    head = "find <|start|>!<|start|>user\nhi<|end|>\n<|start|>assistant\nhello<|end|>\n<|start|>user\nbye<|end|>\n"
    assert written.answers == [head + "<|start|>assistant\nso long<|end|>"]
    assert written.prompt[: written.common] == head + "<|start|>assistant\n"
    assert (written.spans, written.notes) == (None, (REWRITES, NO_TURNS))
    without = writer(before).write(Dialogue(MESSAGES, ("so long",), (TOOL,)))
    assert (without.spans, without.notes) == ([], (REWRITES,))
    assert written.asked.startswith("find <|start|><|start|>user\n")
    nothing = "{% if not add_generation_prompt %}{{ messages[-1].content }}{% endif %}{{ messages[0].content }}"
    with pytest.raises(RefusedTurnsError, match=r"^the chat template writes nothing of the prompt before the answer$"):
        writer(nothing).write(Dialogue([user("hi")], ("hello",)))


def test_a_call_whose_turn_has_no_end_is_kept_whole():
    called = CHAT_TEMPLATE.replace(
        "+ message['content'] | trim + '<|end|>\n' }}",
        "+ (message.tool_calls[0].function.name if message.tool_calls else message.content + '<|end|>\n') }}",
    )
    written = writer(called).write(Dialogue([user("hi")], (assistant("", tool_calls=[CALL]),)))
    assert (written.answers, written.ended) == (["<|start|>user\nhi<|end|>\n<|start|>assistant\nfind"], [False])
    assert written.notes == (NO_END,)
    twice = called.replace("function.name if", "function.name + '<|end|>x<|end|>y' if")
    written = writer(twice).write(Dialogue([user("hi")], (assistant("", tool_calls=[CALL]),)))
    assert written.answers == ["<|start|>user\nhi<|end|>\n<|start|>assistant\nfind<|end|>x<|end|>"]
    assert written.ended == [True]


def test_thoughts_that_are_special_tokens_may_be_the_assistants_alone():
    tokenizer = tiny_tokenizer(chat_template=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "user"]})
    one = DialogueWriter(tokenizer, "auto", HUMAN_ASSISTANT)
    words = "<think>so</think>"
    written = one.write(Dialogue([user(words), assistant(words), user("a user")], (words,)))
    hidden, named = f"<{MARK}think>so<{MARK}/think>", one.tokens.control.hide("a user")
    assert written.prompt == (  # the role stays what it is
        f"<|start|>user\n{hidden}<|end|>\n<|start|>assistant\n{words}<|end|>\n"
        f"<|start|>user\n{named}<|end|>\n<|start|>assistant\n"
    )
    assert written.answers == [written.prompt + words + "<|end|>"]


def test_a_turn_of_nothing_is_its_end_alone():
    blank = [user("hi"), assistant(""), user("bye"), assistant("well"), user("?")]
    assert said(writer(CHAT_TEMPLATE).write(Dialogue(blank), need_turns=True)) == ["<|end|>", "well<|end|>"]
    no_end = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    no_end += "{{ 'assistant: ' if add_generation_prompt }}"
    assert writer(no_end).write(Dialogue(blank), need_turns=True).spans is None
    assert said(writer(no_end).write(Dialogue([*MESSAGES, *blank[3:]]), need_turns=True)) == ["hello", "well"]


def test_where_only_the_assistant_is_written_its_turn_may_come_first():
    alone = "{% for m in messages if m.role == 'assistant' %}{{ m.content + '\n' }}{% endfor %}"
    written = writer(alone).write(Dialogue(MESSAGES), need_turns=True)
    assert (written.spans, written.notes) == ([(0, 5)], (LEFT_OUT,))


def test_a_call_that_is_left_out_hides_no_later_turn():
    messages = [user("hi"), assistant("", tool_calls=[CALL]), user("so?"), assistant("well"), user("bye")]
    written = writer(CHAT_TEMPLATE).write(Dialogue(messages), need_turns=True)
    assert (said(written), written.notes) == (["well<|end|>"], (LEFT_OUT,))


def test_a_call_that_is_left_out_is_no_answer():
    with pytest.raises(RefusedTurnsError, match=r"^the chat template leaves the answer out$"):
        writer(CHAT_TEMPLATE).write(Dialogue([user("hi")], (assistant("", tool_calls=[CALL]),)))
    # Silence that was meant is one.
    written = writer(CHAT_TEMPLATE).write(Dialogue([user("hi")], ("",)))
    assert (written.answers, written.ended) == ([written.prompt + "<|end|>"], [True])


def test_turns_are_looked_for_on_demand():
    written = writer(CHAT_TEMPLATE).write(Dialogue(MESSAGES, ("so long",)))
    assert (written.spans, written.notes, written.asked) == ([], (), "")


def test_turns_are_found_behind_tools():
    written = writer(TOOLS + CHAT_TEMPLATE).write(Dialogue(MESSAGES, (), (TOOL,)), need_turns=True)
    assert said(written) == ["hello<|end|>"]


def test_a_turn_is_taught_from_where_the_generation_prompt_ends_as_the_last_one_is():
    named = THINKS.replace("'<|bos|>' + m.content", "'<|bos|>A: ' + m.content")
    written = writer(named).write(Dialogue(MESSAGES, ("ciao",)), need_turns=True)
    assert said(written) == ["A: hello<|end|>"]
    assert written.answers[0][written.common :] == "A: ciao<|end|>"


def test_turns_behind_what_later_turns_change_are_not_found():
    counted = "{{ messages | length }}" + CHAT_TEMPLATE
    assert writer(counted).write(Dialogue(MESSAGES), need_turns=True).spans is None


def test_what_is_left_out_of_an_answer_is_named():
    one = writer(CHAT_TEMPLATE)
    assert one.write(Dialogue([user("hi")], (assistant("ho", reasoning_content="hm"),))).notes == (LEFT_OUT,)
    assert one.write(Dialogue([user("hi")], ("ho",), ({"function": {"parameters": {}}},))).notes == ()  # no name
    assert one.write(Dialogue([user("hi")], (assistant("ho", tool_calls=[CALL]),))).notes == (LEFT_OUT,)
    assert one.write(Dialogue([user("hi")], ("ho",), (TOOL,))).notes == (LEFT_OUT,)
    marks = "message['content'].replace('<think>', '(').replace('</think>', ')')"
    thought = Dialogue([user("hi")], ("<think>one</think>ho",))
    assert writer(CHAT_TEMPLATE.replace("message['content']", marks)).write(thought).notes == ()
    spoken = CHAT_TEMPLATE.replace("message['content']", "message['content'].split('</think>')[-1]")
    earlier = [user("hi"), assistant("<think>a</think>hello"), user("bye")]
    assert writer(spoken).write(Dialogue(earlier, ("ho",))).notes == ()  # thoughts before earlier answers by design
    assert writer(spoken).write(Dialogue(MESSAGES, ("<think>one</think>ho",))).notes == (LEFT_OUT,)
    # As the families do that take the first thought and what follows the last.
    outer = "message['content'].split('</think>')[0] + '</think>' + message['content'].split('</think>')[-1]"
    twice = Dialogue([user("hi")], ("<think>one</think>two</think>three",))
    assert writer(CHAT_TEMPLATE.replace("message['content']", outer)).write(twice).notes == (LEFT_OUT,)
    last = CHAT_TEMPLATE.replace("message['content']", "message['content'].split('<think>')[-1]")
    assert writer(last).write(Dialogue([user("hi")], ("<think>one<think>two</think>three",))).notes == (LEFT_OUT,)
    assert writer(last).write(Dialogue([user("hi")], ("one<think>two",))).notes == (LEFT_OUT,)  # never ended


def test_an_earlier_answer_that_is_left_out_is_named():
    silent = CHAT_TEMPLATE.replace("message['content']", "('' if message.tool_calls else message['content'])")
    earlier = [user("hi"), assistant("let me look", tool_calls=[CALL]), user("so?")]
    assert writer(TOOLS + silent).write(Dialogue(earlier, ("ho",), (TOOL,))).notes == (LEFT_OUT,)


def test_tokens_that_only_the_template_writes_are_hidden_in_what_is_said():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<turn>", "<over>"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<turn>' + m.content + '<over>' }}{% endfor %}"
        "{% if add_generation_prompt %}<turn>{% endif %}"
    )
    one = DialogueWriter(tokenizer, "auto", HUMAN_ASSISTANT)
    written = one.write(Dialogue([user("a <turn>")], ("b<over><|end|>",)))
    prompt = f"<turn>a <{MARK}turn><over><turn>"
    assert (written.prompt, written.answers) == (prompt, [f"{prompt}b<over>"])  # its own end is the turn's
    assert one.write(Dialogue("Once", ("b<over>",))).answers == ["b"]
    assert one.write(Dialogue("Once", ("b<turn>c",))).answers == [f"b<{MARK}turn>c"]
