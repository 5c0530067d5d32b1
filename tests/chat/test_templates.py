"""What is taught and read is what the template writes, over a shelf of templates and tokenizers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from helpers.templates import CONTROL, SHELF, shelf_tokenizer
from helpers.tokenizers import CHAT_TEMPLATE, tiny_tokenizer
from rlhf_lightning.chat.encoder import APART, ChatEncoder
from rlhf_lightning.chat.messages import RefusedTurnsError
from rlhf_lightning.chat.templates import ChatTemplate, turn_ends
from rlhf_lightning.chat.writer import ACTING, HIDDEN, LEFT_OUT, NO_END, NO_TURNS, NOT_APPLIED, REWRITES, Dialogue

NAMES = list(SHELF)
ENCODERS = {
    (name, spelling, bos): ChatEncoder(shelf_tokenizer(name, spelling, bos))
    for name in NAMES
    for spelling in ("bytes", "metaspace")
    for bos in (False, True)
}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


def whole_of(encoder, messages, end):
    """Text and ids of a dialogue as the template writes it, up to and with the end of its last turn."""
    text = encoder.tokenizer.apply_chat_template(messages, tokenize=False)
    text = text[: text.rindex(end) + len(end)] if end else text
    return text, encoder.tokenizer(text, add_special_tokens=False).input_ids


# Words, spaces and line breaks as answers have them: indents, blank ends, more than one script.
SAID = st.text(st.sampled_from("ab c\n\t.é漢 "), min_size=1, max_size=14).filter(str.strip)
FORM = st.tuples(st.sampled_from(NAMES), st.sampled_from(["bytes", "metaspace"]), st.booleans())


@given(FORM, st.lists(st.tuples(SAID, SAID), max_size=2), SAID, SAID, st.booleans())
def test_joined_ids_are_those_of_the_whole_dialogue(form, earlier, question, answer, with_system):
    encoder, shelved = ENCODERS[form], SHELF[form[0]]
    messages = [system("Be brief.")] if with_system and shelved.system else []
    messages += [turn for asked, said in earlier for turn in (user(asked), assistant(said))]
    messages.append(user(question))
    (result,) = encoder.encode_dialogues([Dialogue(messages, (answer,))])
    text, ids = whole_of(encoder, [*messages, assistant(answer)], shelved.end)

    prompt, response = result.prompt.tolist(), result.responses[0].tolist()
    if not shelved.end:  # the tokenizer's EOS ends the turn
        assert result.notes.count(NO_END) == 1
        assert response.pop() == encoder.tokenizer.eos_token_id
        text = text.removesuffix("\n\n") if form[0] == "alpaca" else text
        ids = encoder.tokenizer(text, add_special_tokens=False).input_ids
    else:
        ends = set(turn_ends(encoder.tokenizer))
        assert response[-1] in ends
        assert not ends & set(response[:-1])
    asked = encoder.encode_prompt(messages)[1].tolist()
    if APART in result.notes:
        assert [*prompt, *response] != ids
        assert "".join(encoder.tokenizer.decode([*prompt, *response]).split()) == "".join(text.split())
        assert prompt == asked
    else:
        assert [*prompt, *response] == ids
        assert (prompt == asked) == shelved.continues
    assert (REWRITES in result.notes) == (not shelved.continues)
    assert [*prompt, *response].count(encoder.tokenizer.bos_token_id) == text.count("<s>")
    apart = encoder.encode_dialogue(messages, answer)
    assert [part.tolist() for part in apart] == [result.prompt.tolist(), result.responses[0].tolist()]
    cut = encoder.encode_dialogue(messages, answer, ended=False)
    assert cut[1].tolist() == result.responses[0].tolist()[:-1]


def taught(encoder, messages, answer, untaught=()):
    """The texts of the earlier turns and of the response, each with its control tokens."""
    (result,) = encoder.encode_dialogues([Dialogue(messages, (answer,), (), untaught)], need_turns=True)
    ids = [result.prompt[a:b] for a, b in result.turns.reshape(-1, 2)] + [result.responses[0]]
    return [encoder.tokenizer.decode(part.tolist()) for part in ids], result.notes


@pytest.mark.parametrize("spelling", ["bytes", "metaspace"])
@pytest.mark.parametrize(
    ("name", "earlier", "last"),
    [
        ("chatml", "hello<|im_end|>", "ciao<|im_end|>"),
        ("llama2", "hello </s>", "ciao </s>"),
        ("llama3", "hello<|eot_id|>", "ciao<|eot_id|>"),
        ("gemma", "hello<end_of_turn>", "ciao<end_of_turn>"),
        ("mistral", "hello</s>", "ciao</s>"),
        ("qwen3", "hello<|im_end|>", "<think>\n\n</think>\n\nciao<|im_end|>"),
        ("deepseek", "hello</s>", "ciao</s>"),
        ("opened thought", "hello<|im_end|>", "\n</think>\n\nciao<|im_end|>"),
        ("phi", "hello<|end|>", "ciao<|end|>"),
        ("zephyr", "hello</s>", "ciao</s>"),
        ("command", "hello<|END_OF_TURN_TOKEN|>", "ciao<|END_OF_TURN_TOKEN|>"),
        ("command, closed", "hello<|end|><|END_OF_TURN_TOKEN|>", "ciao<|end|><|END_OF_TURN_TOKEN|>"),
        # Its earlier turns end by a token that also stands between thought and answer, where nobody stops.
        ("harmony", "<|channel|>final<|message|>hello", "<|channel|>final<|message|>ciao<|return|>"),
        ("glm", "hello", "ciao</s>"),
        ("alpaca", "hello", "ciao</s>"),
    ],
)
def test_each_turn_is_taught_to_its_own_end(name, earlier, last, spelling):
    encoder = ENCODERS[name, spelling, False]
    messages = [user("hi"), assistant("hello"), user("bye")]
    turns, notes = taught(encoder, messages, "ciao")
    assert [turn.strip() for turn in turns] == [earlier.strip(), last.strip()]
    assert NO_TURNS not in notes
    assert [turn.strip() for turn in taught(encoder, messages, "ciao", untaught=(1,))[0]] == [last.strip()]


@pytest.mark.parametrize("name", NAMES)
def test_what_ends_a_turn_is_found_by_letting_the_template_write(name):
    tokenizer = shelf_tokenizer(name)
    ends = [tokenizer.convert_ids_to_tokens(end) for end in turn_ends(tokenizer)]
    assert ends == ([SHELF[name].end] if SHELF[name].end else [])
    tokenizer.chat_template = SHELF["gemma"].text  # not remembered for another template
    assert tokenizer.convert_ids_to_tokens(turn_ends(tokenizer)) == ["<end_of_turn>"]
    tokenizer.chat_template = None
    assert turn_ends(tokenizer) == []


def test_a_template_that_leaves_answers_out_ends_none_and_is_refused():
    """As those do that read a message's content as a list of parts."""
    template = SHELF["chatml"].text.replace("m['content']", "(m['content'] if m['role'] == 'user' else '')")
    encoder = ChatEncoder(shelf_tokenizer("chatml"), chat_template=template)
    assert turn_ends(encoder.tokenizer) == []
    (result,) = encoder.encode_dialogues([Dialogue([user("hi")], ("hello",))])
    assert "leaves the answer out" in str(result)


def test_a_call_of_a_tool_may_end_otherwise():
    template = (
        "{% for m in messages %}{{ '<|start|>' + m['role'] + '<|message|>' }}"
        "{% if m.tool_calls %}{{ m.tool_calls[0].function.name + '<|end|>' }}"
        "{% else %}{{ m['content'] + '<|eot_id|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant<|message|>' }}{% endif %}"
    )
    encoder = ChatEncoder(shelf_tokenizer("chatml"), chat_template=template)
    tokenizer = encoder.tokenizer
    assert tokenizer.convert_ids_to_tokens(turn_ends(tokenizer)) == ["<|eot_id|>", "<|end|>"]
    call = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    _, response = encoder.encode_dialogue([user("Rain?")], assistant("", tool_calls=[call]))
    assert tokenizer.decode(response.tolist()) == "weather<|end|>"


def template_of(text):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = text
    return ChatTemplate(tokenizer)


def test_what_is_found_out_about_a_template():
    found = template_of(CHAT_TEMPLATE)
    assert found.last == ("<|end|>\n", "<|end|>", len("<|end|>"))
    assert (found.middle_end, found.ends, found.anchor) == ("<|end|>", ["<|end|>"], "<|start|>")
    assert (found.written, found.leaves_answers_out) == ({"<|start|>", "<|end|>"}, False)


def test_a_template_may_write_no_control_token():
    found = template_of("{% for m in messages %}{{ m.content + ' STOP\n' }}{% endfor %}")
    assert found.last == (" STOP\n", "", len(" STOP"))
    assert (found.middle_end, found.ends, found.anchor, found.written) == ("", [], "", set())


def test_tokens_that_only_the_beginning_of_an_answer_has_are_written_too():
    found = template_of("{% for m in messages %}{{ m.content }}{% endfor %}{{ '<|start|>' if add_generation_prompt }}")
    assert (found.written, found.anchor, found.last.end) == ({"<|start|>"}, "<|start|>", "")


def test_a_template_that_asks_for_a_system_message_is_found_out_with_one():
    demanding = "{% if messages[0].role != 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    found, plain = template_of(demanding + CHAT_TEMPLATE), template_of(CHAT_TEMPLATE)
    assert (found.last, found.middle_end, found.anchor) == (plain.last, plain.middle_end, plain.anchor)


def test_nothing_is_found_out_about_a_template_that_refuses_all():
    found = template_of("{{ raise_exception('never') }}")
    assert (found.last, found.ends, found.anchor) == (("", "", 0), [], "")
    assert (found.leaves_answers_out, found.written) == (False, set())
    with pytest.raises(RefusedTurnsError, match=r"refuses the turns user, assistant: never$") as error:
        found.write([user("hi"), assistant("ho")])
    assert error.value.reason == "never"


def test_what_is_found_out_does_not_depend_on_words_written_twice():
    found = template_of("{% for m in messages %}{{ m.content + '<|bos|>' + m.content + '<|end|>' }}{% endfor %}")
    assert found.last == ("<|end|>", "<|end|>", len("<|end|>"))
    apart = template_of(
        "{% for m in messages %}{{ m.content + '<|bos|>' + m.content }}"
        "{{ '<|start|>' if not loop.last else '<|end|>' }}{% endfor %}"
    )
    assert (apart.last.end, apart.middle_end) == ("<|end|>", "<|start|>")


def test_turns_may_end_by_a_token_only_where_the_dialogue_ends():
    found = template_of(
        "{{ '<|bos|>' if not add_generation_prompt }}{% for m in messages %}{{ '\\n' + m.content }}{% endfor %}"
        "{{ '<|start|>' if add_generation_prompt else eos_token }}"
    )
    assert (found.last.end, found.middle_end, found.ends) == ("<|end|>", "", ["<|end|>"])
    assert found.written == {"<|bos|>", "<|start|>", "<|end|>"}
    twice = template_of(
        "{% for m in messages %}{{ m.content + ('<|start|>' + m.content if m.role == 'user' else '') }}{% endfor %}"
        "{{ eos_token if not add_generation_prompt }}"
    )
    assert (twice.last.end, twice.middle_end) == ("<|end|>", "")


def test_a_template_may_demand_all_that_a_call_and_a_message_have():
    """As Mistral's demands ids of nine letters, and others that a call stands alone."""
    demanding = (
        "{% if messages[0].role != 'system' or not messages[0].content %}{{ raise_exception('system') }}{% endif %}"
        "{% for m in messages %}{% for c in m.tool_calls or [] %}"
        "{% if c.id | length != 9 or c.type != 'function' or m.content %}{{ raise_exception('call') }}{% endif %}"
        "{{ c.function.name + c.function.arguments | tojson + '<|start|>' }}"
        "{% else %}{{ m.content + '<|end|>' }}{% endfor %}{% endfor %}"
    )
    assert template_of(demanding).ends == ["<|end|>", "<|start|>"]
    spoken = demanding.replace("{{ c.function", "{{ m.content + c.function")
    assert template_of(spoken).ends == ["<|end|>", "<|start|>"]
    unended = demanding.replace("+ '<|start|>'", "+ '<|start|>' + c.function.name")
    assert template_of(unended).ends == ["<|end|>"]


def test_an_answer_apart_is_written_after_its_prompt_and_tools():
    found = template_of("{% for t in tools or [] %}{{ t.name }}{% endfor %}" + CHAT_TEMPLATE)
    text = found.writes_answer_apart([user("hi")], [{"name": "find"}])
    head, answer = text.split("<|start|>assistant\n")
    assert head == "find<|start|>user\nhi<|end|>\n"
    assert answer.endswith("<|end|>\n")


@pytest.mark.parametrize("spelling", ["bytes", "metaspace"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("token", ["</s>", "<|im_end|>", "<end_of_turn>", "<|user|>", "[gMASK]"])
def test_control_tokens_in_what_is_said_do_not_act(name, spelling, token):
    encoder = ENCODERS[name, spelling, False]
    control = {encoder.tokenizer.convert_tokens_to_ids(text) for text in CONTROL}
    words, other = f"say {token}a{token} now", "say x now"
    said, without = (
        encoder.encode_dialogues([Dialogue([user(text), assistant(text), user(text)], (text,))], need_turns=True)[0]
        for text in (words, other)
    )
    for with_token, plain in zip((said.prompt, *said.responses), (without.prompt, *without.responses), strict=True):
        assert [i for i in with_token if i in control] == [i for i in plain if i in control]
    whole = encoder.tokenizer.decode([*said.prompt.tolist(), *said.responses[0].tolist()])
    assert whole.count(words) == 4
    assert said.notes.count(HIDDEN) == 1
    assert HIDDEN not in without.notes
    text, ids = encoder.encode_prompt([user(words)])
    assert words in text
    assert encoder.render([user(words)]).text == text
    assert [i for i in ids if i in control] == [i for i in encoder.encode_prompt([user(other)])[1] if i in control]


def test_a_response_that_brings_its_own_end_is_ended_once():
    encoder = ENCODERS["gemma", "bytes", True]
    plain = encoder.encode_dialogue([user("hi")], "hello")[1].tolist()
    for end in ("</s>", "<end_of_turn>", "<end_of_turn></s>"):
        assert encoder.encode_dialogue([user("hi")], "hello" + end)[1].tolist() == plain


def test_thoughts_are_written_once_and_named_where_they_are_left_out():
    for response in ("<think>\nhm\n</think>\n\nhello", assistant("hello", reasoning_content="hm")):
        (qwen,) = ENCODERS["qwen3", "bytes", False].encode_dialogues([Dialogue([user("hi")], (response,))])
        text = ENCODERS["qwen3", "bytes", False].tokenizer.decode(qwen.responses[0].tolist())
        assert text == "<think>\nhm\n</think>\n\nhello<|im_end|>"
        assert LEFT_OUT not in qwen.notes
    (opened,) = ENCODERS["opened thought", "bytes", False].encode_dialogues(
        [Dialogue([user("hi")], ("<think>\nhm\n</think>\n\nhello",))]
    )
    assert opened.notes.count(LEFT_OUT) == 1
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    (unread,) = ENCODERS["chatml", "bytes", False].encode_dialogues([Dialogue([user("hi")], ("hello",), (tool,))])
    assert unread.notes == (LEFT_OUT,)


def test_tools_reach_the_template():
    template = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + SHELF["chatml"].text
    encoder = ChatEncoder(shelf_tokenizer("chatml"), chat_template=template)
    tool = {"type": "function", "function": {"name": "weather</s>", "parameters": {}}}
    (result,) = encoder.encode_dialogues([Dialogue([user("hi")], ("hello",), (tool,))])
    assert encoder.tokenizer.decode(result.prompt.tolist()).startswith("weather</s><|im_start|>user\nhi")
    assert encoder.tokenizer.eos_token_id not in result.prompt
    assert result.notes == (HIDDEN,)


def test_text_written_with_control_tokens_is_kept_as_written():
    encoder = ENCODERS["chatml", "bytes", True]
    tokenizer = encoder.tokenizer
    by_hand = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    (result,) = encoder.encode_dialogues([Dialogue(by_hand, ("hello<|im_end|>", "hello", "hello</s></s>"))])
    expected = ["hello<|im_end|>", "hello</s>", "hello</s>"]
    assert tokenizer.decode(result.prompt.tolist()) == "<s>" + by_hand
    assert result.prompt.tolist().count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1
    assert [ids.tolist() for ids in result.responses] == [
        tokenizer(text, add_special_tokens=False).input_ids for text in expected
    ]
    assert result.notes == (ACTING,)


def test_plain_text_before_an_instruct_tokenizer_is_named():
    tokenizer = shelf_tokenizer("chatml")
    (result,) = ChatEncoder(tokenizer).encode_dialogues([Dialogue("Once upon", (" a </s> time",))])
    assert result.notes == (NOT_APPLIED, HIDDEN)
    assert tokenizer.decode(result.responses[0].tolist()) == " a </s> time</s>"
    assert result.responses[0].tolist().count(tokenizer.eos_token_id) == 1
    for form in ("chat_template", "plain"):
        (result,) = ChatEncoder(tokenizer, form).encode_dialogues([Dialogue("Once upon", (" a time",))])
        assert result.notes == ()


def test_responses_to_one_prompt_share_it_whatever_the_template_does():
    encoder = ENCODERS["deepseek", "bytes", False]
    responses = ("hello", "<think>\nhm\n</think>\n\nhi", "hey")
    (result,) = encoder.encode_dialogues([Dialogue([user("hi")], responses)])
    assert encoder.tokenizer.decode(result.prompt.tolist()) == "<s><|User|>hi<|Assistant|>"
    said = [encoder.tokenizer.decode(ids.tolist()) for ids in result.responses]
    assert said == ["hello</s>", "\n\nhi</s>", "hey</s>"]
    assert result.notes == (REWRITES, LEFT_OUT)


def test_a_plain_dialogue_has_no_place_for_calls_thoughts_and_tools():
    encoder = ChatEncoder(shelf_tokenizer("chatml"), "plain")
    for dialogue in (
        Dialogue([user("hi")], (assistant("", tool_calls=[{"function": {"name": "f"}}]),)),
        Dialogue([user("hi"), assistant("hello", reasoning_content="hm"), user("so?")]),
        Dialogue([user("hi")], ("hello",), ({"name": "f"},)),
    ):
        (result,) = encoder.encode_dialogues([dialogue])
        assert "has no place for" in str(result)


def test_slow_paths_agree_with_fast_ones():
    """Where the tokenizer cannot be relied on to divide at control tokens, whole texts are tokenised."""
    messages = [user("hi"), assistant("hello"), user("bye")]
    for name in NAMES:
        encoder = ChatEncoder(shelf_tokenizer(name, bos=True))
        encoder._tokens.__dict__["splitting"] = frozenset()
        (whole,) = encoder.encode_dialogues([Dialogue(messages, ("ciao", " x\n"))], need_turns=True)
        (cut,) = ENCODERS[name, "bytes", True].encode_dialogues([Dialogue(messages, ("ciao", " x\n"))], need_turns=True)
        assert whole.notes == cut.notes
        for a, b in zip(
            (whole.prompt, whole.turns, *whole.responses), (cut.prompt, cut.turns, *cut.responses), strict=True
        ):
            np.testing.assert_array_equal(a, b)


def test_white_space_that_a_vocabulary_holds_as_a_token_ends_no_turn():
    """As Gemma's vocabulary holds runs of line breaks, at which no answer of several paragraphs may stop."""
    tokenizer = shelf_tokenizer("alpaca")
    tokenizer.add_tokens(["\n\n", "  "])
    encoder = ChatEncoder(tokenizer)
    assert turn_ends(tokenizer) == []
    (result,) = encoder.encode_dialogues([Dialogue([user("a\n\nb")], ("c\n\nd",))])
    assert result.notes == (NO_END,)
    (paragraphs,) = tokenizer("\n\n", add_special_tokens=False).input_ids
    assert result.responses[0].tolist().count(paragraphs) == 1
    assert result.responses[0][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("turns", [[system("Be brief."), user("hi")], [user("hi"), {"role": "tool", "content": "4"}]])
def test_turns_that_a_template_leaves_out_are_named(turns):
    template = SHELF["chatml"].text.replace("in messages %}", "in messages if m['role'] in ('user', 'assistant') %}")
    encoder = ChatEncoder(shelf_tokenizer("chatml"), chat_template=template)
    for responses in ((), ("hello",)):
        (result,) = encoder.encode_dialogues([Dialogue(turns, responses)])
        assert result.notes == (LEFT_OUT,)
    as_json = SHELF["chatml"].text.replace("+ m['content']", "+ (m['content'] | tojson)")
    (result,) = ChatEncoder(shelf_tokenizer("chatml"), chat_template=as_json).encode_dialogues(
        [Dialogue([user('say "é\nb"')])]
    )
    assert result.notes == ()


def test_a_template_that_fails_refuses_the_turns():
    template = SHELF["chatml"].text + "{% set _ = messages[0]['content'].index('hi') %}"
    encoder = ChatEncoder(shelf_tokenizer("chatml"), chat_template=template)
    (refused,) = encoder.encode_dialogues([Dialogue([user("bye")])])
    assert "the chat template refuses the turns user" in str(refused)


def test_where_an_answer_opens_by_another_token_than_it_was_asked_for_with():
    template = (
        "{% for m in messages %}{{ ('<|user|>' if m.role == 'user' else 'bot<|system|>') + m.content + '</s>\n' }}"
        "{% endfor %}{{ 'model<|assistant|>' if add_generation_prompt }}"
    )
    encoder = ChatEncoder(shelf_tokenizer("chatml"), chat_template=template)
    (result,) = encoder.encode_dialogues([Dialogue([user("hi")], ("hello", "hey"))])
    ids = [part.tolist() for part in (result.asked, result.prompt, *result.responses)]
    begun = "<|user|>hi</s>\n"
    texts = [begun + "model<|assistant|>", begun, "bot<|system|>hello</s>", "bot<|system|>hey</s>"]
    assert ids == [encoder.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    assert result.notes == (REWRITES,)


def test_an_opening_token_that_takes_the_space_before_it_is_no_place_to_cut():
    tokenizer = shelf_tokenizer("chatml")
    tokenizer.add_tokens([AddedToken("<bot>", lstrip=True, normalized=False)])
    encoder = ChatEncoder(tokenizer, chat_template=SHELF["alpaca"].text.replace("### assistant:", " <bot>"))
    _, ids = encoder.encode_prompt([user("hi")])
    assert ids.tolist() == tokenizer("### user:\nhi\n\n <bot>\n", add_special_tokens=False).input_ids
