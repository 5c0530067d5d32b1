import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.templates import shelf_tokenizer
from helpers.tokenizers import BOS_CHAT_TEMPLATE, CHAT_TEMPLATE, Slow, tiny_tokenizer
from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.chat.messages import RefusedTurnsError, exact_text
from rlhf_lightning.chat.plain import PlainFormat, parse_dialogue, render_plain
from rlhf_lightning.chat.tokenization import TextTokens, default_prefix, token_spans
from rlhf_lightning.chat.writer import NO_TURNS, Dialogue
from rlhf_lightning.errors import UserError

PLAIN = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant:"
MESSAGES = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
]
SYSTEM = {"role": "system", "content": "Be brief."}
TEMPLATED = (
    "<|start|>user\nhi<|end|>\n<|start|>assistant\nhello<|end|>\n<|start|>user\nbye<|end|>\n<|start|>assistant\n"
)
STRICT_TEMPLATE = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}{{ message['content'] }}{% endfor %}"
)


UNTRIMMED = CHAT_TEMPLATE.replace(" | trim", "")
OWN_FORMAT = PlainFormat("<user> ", "<bot>\n", "<rules> ", "", "<|end|>\n")


def spoken(encoder, prompt):
    """The texts of the assistant's earlier turns, by characters and by tokens; None where they cannot be found."""
    (result,) = encoder.encode_dialogues([Dialogue(prompt)], need_turns=True)
    assert result.prompt.tolist() == encoder.encode_prompt(prompt)[1].tolist()
    assert (NO_TURNS in result.notes) == (result.written.spans is None)
    if result.written.spans is None:
        return None
    by_tokens = [encoder.tokenizer.decode(result.prompt[a:b].tolist()) for a, b in result.turns.reshape(-1, 2)]
    return [result.written.prompt[a:b] for a, b in result.written.spans], by_tokens


def response_ids(encoder, prompt, response):
    return encoder.encode_dialogue(prompt, response)[1]


def test_dialogues_and_messages_are_two_forms_of_the_same():
    assert parse_dialogue(PLAIN) == MESSAGES
    assert render_plain(MESSAGES) == (PLAIN, [(23, 29)])
    assert PLAIN[23:29] == " hello"
    assert render_plain([SYSTEM, {**SYSTEM, "content": "Be kind."}, *MESSAGES])[0] == "Be brief.\nBe kind." + PLAIN


def test_a_plain_format_of_ones_own():
    encoder = ChatEncoder(tiny_tokenizer(), "plain", plain_format=OWN_FORMAT)
    text = "<rules> Be brief.<user> hi<bot>\nhello<|end|>\n<user> bye<bot>\n"
    assert encoder.render([SYSTEM, *MESSAGES]) == (text, "plain")
    assert encoder.render(PLAIN).text == text.removeprefix("<rules> Be brief.")
    assert encoder.decode([response_ids(encoder, MESSAGES, " so long")]) == ["so long"]
    assert spoken(encoder, MESSAGES) == (["hello<|end|>"], ["hello<|end|>"])


@pytest.mark.parametrize(
    "text",
    [
        "Once upon a time",
        "\n\nHuman: hi",
        "\n\nHuman: hi\n\nAssistant: I think",  # an answer that has begun is not a question
        "\n\nAssistant:",
        "Preface\n\nHuman: hi\n\nAssistant:",
        "",
    ],
)
def test_other_text_is_no_dialogue(text):
    assert parse_dialogue(text) is None


@pytest.mark.parametrize(
    ("template", "dialogue_format", "prompt", "text", "kind"),
    [
        (False, "auto", "Once upon", "Once upon", "verbatim"),
        (False, "auto", PLAIN, PLAIN, "plain"),
        (False, "auto", PLAIN.strip() + " ", PLAIN, "plain"),
        (False, "plain", MESSAGES, PLAIN, "plain"),
        (True, "auto", "Once upon", "Once upon", "verbatim"),
        (True, "auto", PLAIN, TEMPLATED, "template"),
        (True, "auto", MESSAGES, TEMPLATED, "template"),
        (True, "plain", PLAIN, PLAIN, "plain"),
        (True, "plain", MESSAGES, PLAIN, "plain"),
        (True, "plain", "Once upon", "Once upon", "verbatim"),
        (True, "chat_template", PLAIN, TEMPLATED, "template"),
        (True, "chat_template", "Once", "<|start|>user\nOnce<|end|>\n<|start|>assistant\n", "template"),
    ],
)
def test_what_each_format_makes_of_each_prompt(template, dialogue_format, prompt, text, kind):
    encoder = ChatEncoder(tiny_tokenizer(chat_template=template), dialogue_format)
    assert encoder.render(prompt) == (text, kind)


@pytest.mark.parametrize(
    ("template", "prompt", "response", "text"),
    [
        (None, "Once upon", "  a ", "  a "),
        (None, PLAIN, "a", " a"),
        (None, PLAIN, " \n a", " a"),
        (UNTRIMMED, PLAIN, " a\n", "a"),  # the space belongs to the turns of that text
        (UNTRIMMED, MESSAGES, "  a\n", "  a\n"),
        (CHAT_TEMPLATE, MESSAGES, "  a\n", "a"),  # the template's own doing
    ],
)
def test_responses_are_spaced_as_their_prompt_asks(template, prompt, response, text):
    encoder = ChatEncoder(tiny_tokenizer(), chat_template=template)
    assert encoder.decode([response_ids(encoder, prompt, response)]) == [text]


def test_neighbouring_turns_of_one_speaker_are_joined_for_the_template_only():
    twice = "\n\nHuman: hi\n\nHuman: are you there?\n\nAssistant:"
    assert ChatEncoder(tiny_tokenizer()).render(twice).text == twice
    assert ChatEncoder(tiny_tokenizer(), chat_template=STRICT_TEMPLATE).render(twice).text == "hi\n\nare you there?"


@pytest.mark.parametrize("dialogue_format", ["auto", "chat_template"])
def test_messages_need_a_template(dialogue_format):
    message = "has no chat template; pass `chat_template: path/to/template.jinja` or `dialogue_format: plain`"
    with pytest.raises(UserError, match=message):
        ChatEncoder(tiny_tokenizer(), dialogue_format).render(MESSAGES)


def test_turns_that_a_format_refuses_are_told_apart_from_other_errors():
    with pytest.raises(RefusedTurnsError, match="refuses the turns user, user: turns must alternate"):
        ChatEncoder(tiny_tokenizer(), chat_template=STRICT_TEMPLATE).render([MESSAGES[0], MESSAGES[2]])
    with pytest.raises(RefusedTurnsError, match="role 'tool' has no place"):
        ChatEncoder(tiny_tokenizer(), "plain").render([{"role": "tool", "content": "42"}])


def test_a_template_may_be_a_file_and_travels_with_the_tokenizer(tmp_path):
    (tmp_path / "mine.jinja").write_text(CHAT_TEMPLATE)
    encoder = ChatEncoder(tiny_tokenizer(), chat_template=str(tmp_path / "mine.jinja"))

    assert encoder.render(MESSAGES).text == TEMPLATED
    encoder.tokenizer.save_pretrained(tmp_path / "saved")
    assert type(encoder.tokenizer).from_pretrained(tmp_path / "saved").chat_template == CHAT_TEMPLATE
    with pytest.raises(UserError, match=r"chat_template: nowhere.jinja does not exist"):
        ChatEncoder(tiny_tokenizer(), chat_template="nowhere.jinja")


@pytest.mark.parametrize("bos", [False, True])
def test_the_prefix_is_what_the_tokenizer_adds_unasked(bos):
    tokenizer = tiny_tokenizer(bos=bos)
    assert default_prefix(tokenizer) == ([tokenizer.bos_token_id] if bos else [])


@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE, BOS_CHAT_TEMPLATE])
@pytest.mark.parametrize("prompt", ["Once upon", PLAIN, "<|bos|>written out", "x"])
def test_exactly_one_bos_but_for_templates_that_write_none(template, prompt):
    encoder = ChatEncoder(tiny_tokenizer(bos=True), chat_template=template)
    text, ids = encoder.encode_prompt(prompt)

    bos = encoder.tokenizer.bos_token_id
    if prompt == PLAIN and template == CHAT_TEMPLATE:
        assert bos not in ids
        assert encoder.tokenizer.decode(ids.tolist()) == text
        return
    assert (ids[0], np.count_nonzero(ids == bos)) == (bos, 1)
    assert encoder.tokenizer.decode(ids[1:].tolist()) == text.removeprefix("<|bos|>")


@pytest.mark.parametrize("response", ["Bake it.", "Bake it.<|end|>", "<|end|>", "Bake it.<|end|><|end|>"])
@pytest.mark.parametrize("pad", ["own", "eos", "none"])
def test_exactly_one_eos_at_the_end(response, pad):
    encoder = ChatEncoder(tiny_tokenizer(pad=pad))
    ids = response_ids(encoder, "how?", response)

    eos = encoder.tokenizer.eos_token_id
    assert (ids[-1], np.count_nonzero(ids == eos)) == (eos, 1)
    assert encoder.decode([ids]) == [response.replace("<|end|>", "")]


def test_without_eos_no_response_can_be_taught():
    tokenizer = tiny_tokenizer(pad="none")
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="has no EOS token"):
        ChatEncoder(tokenizer).encode_dialogue("a", "b")


@given(st.text(min_size=1), st.text(min_size=1))
def test_the_ids_of_a_prompt_do_not_depend_on_the_response(prompt, response):
    encoder = ENCODER
    text, prompt_ids = encoder.encode_prompt(prompt)
    prompt_of_dialogue, answer = encoder.encode_dialogue(prompt, response)

    assert prompt_of_dialogue.tolist() == prompt_ids.tolist()
    # Byte-level, so the joined ids say the joined text, whatever it is.
    ids = [*prompt_ids.tolist(), *answer.tolist()]
    spaced = " " + response.lstrip() if encoder.render(prompt).kind == "plain" else response
    assert encoder.tokenizer.decode(ids[1:-1]) == text + spaced


@given(st.lists(st.text(), min_size=1, max_size=4))
def test_ids_are_those_of_the_tokenizer_itself(texts):
    tokenizer = ENCODER.tokenizer
    expected = tokenizer(texts)["input_ids"]
    # Settings that an earlier call has left behind neither cut nor fill.
    tokenizer(texts, padding=True, truncation=True, max_length=2)
    for text, whole in zip(texts, expected, strict=True):
        ids = ENCODER.encode_text(text, "verbatim")
        assert ids.tolist() == whole
        assert ids.dtype == np.int32


def test_each_way_in_hands_the_tools_on():
    template = "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}" + CHAT_TEMPLATE
    encoder = ChatEncoder(tiny_tokenizer(), chat_template=template)
    tools = [{"type": "function", "function": {"name": "find"}}]
    text, ids = encoder.encode_prompt(MESSAGES, tools)
    assert text == encoder.render(MESSAGES, tools).text == "find" + TEMPLATED
    assert ids.tolist() == encoder.encode_dialogue(MESSAGES, "so long", tools)[0].tolist()


def test_what_a_prompt_is_written_as_is_known_without_writing_it():
    assert [TEMPLATE_ENCODER.kind(prompt) for prompt in ("hi", PLAIN, MESSAGES)] == ["verbatim", "template", "template"]
    assert [PLAIN_ENCODER.kind(prompt) for prompt in ("hi", PLAIN, MESSAGES)] == ["verbatim", "plain", "plain"]


def test_a_response_that_was_cut_has_no_end():
    for encoder in (PLAIN_ENCODER, TEMPLATE_ENCODER):
        whole, cut = (encoder.encode_dialogue(PLAIN, "so long", ended=ended)[1].tolist() for ended in (True, False))
        assert cut == whole[:-1]
        assert whole[-1] == encoder.tokenizer.eos_token_id


def test_the_beginning_of_a_prompt_is_its_bos_wherever_it_comes_from():
    adds_none = tiny_tokenizer()
    adds_none.bos_token = "<|bos|>"  # as a template may write it
    bos = adds_none.bos_token_id
    for encoder in (ENCODER, ChatEncoder(adds_none)):
        assert [encoder.beginning(np.array(ids)) for ids in ([bos, 9], [9, bos], [])] == [[bos], [], []]
    assert PLAIN_ENCODER.beginning(np.array([bos, 9])) == []
    alone, *begun = (ENCODER.encode_text("hi", kind).tolist() for kind in ("template", "verbatim", "plain"))
    assert begun == [[bos, *alone]] * 2


def test_what_the_first_tokens_of_a_text_say_control_tokens_included():
    assert [ENCODER.text_of_first("a<|end|>b", tokens) for tokens in (1, 2, 9)] == ["a", "a<|end|>", "a<|end|>b"]


def test_decoding_leaves_spaces_alone():
    tokenizer = tiny_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True  # as others do unasked
    assert tokenizer.decode(tokenizer("so , it").input_ids) == "so, it"
    encoder = ChatEncoder(tokenizer)
    assert encoder.decode([encoder.encode_text("so , it is n't .", "verbatim"), []]) == ["so , it is n't .", ""]


def test_what_a_plain_dialogue_has_no_place_for_is_the_reason():
    with pytest.raises(RefusedTurnsError) as error:
        render_plain([{"role": "tool", "content": "12"}])
    assert error.value.reason == "role 'tool'"


def test_prompts_are_equal_where_they_say_exactly_the_same():
    assert exact_text("hi") == "hi"
    assert exact_text(MESSAGES) == exact_text([dict(m) for m in MESSAGES]) != exact_text(MESSAGES[:1])
    assert len({exact_text(MESSAGES), exact_text(MESSAGES[:1])}) == 2


def test_a_reason_is_short_and_on_one_line():
    assert RefusedTurnsError("first\n second").reason == "first second"
    assert RefusedTurnsError("long", "x" * 200).reason == "x" * 100


def test_no_token_spans_the_border():
    encoder = ChatEncoder(tiny_tokenizer())
    whole = encoder.tokenizer("Assistant", add_special_tokens=False).input_ids
    apart = [*encoder.encode_prompt("Assis")[1].tolist(), *response_ids(encoder, "Assis", "tant")[:-1].tolist()]
    assert len(whole) == 1 < len(apart)
    assert encoder.tokenizer.decode(apart) == encoder.tokenizer.decode(whole) == "Assistant"


def test_where_the_assistant_spoke():
    assert spoken(ChatEncoder(tiny_tokenizer()), PLAIN) == ([" hello"], [" hello"])
    for bos in (False, True):
        encoder = ChatEncoder(tiny_tokenizer(bos=bos, chat_template=True))
        assert spoken(encoder, PLAIN) == (["hello<|end|>"], ["hello<|end|>"])
    assert spoken(ChatEncoder(tiny_tokenizer()), "Once upon a time") == ([], [])
    assert spoken(ChatEncoder(tiny_tokenizer()), "\n\nHuman: hi\n\nAssistant:") == ([], [])


def test_a_turn_without_a_written_eos_ends_with_its_text():
    template = CHAT_TEMPLATE.replace("<|end|>", "<|im_end|>")
    assert spoken(ChatEncoder(tiny_tokenizer(), chat_template=template), PLAIN)[0] == ["hello<|im_end|>"]
    template = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    assert spoken(ChatEncoder(tiny_tokenizer(), chat_template=template), PLAIN)[0] == ["hello"]


@pytest.mark.parametrize(
    "template",
    [
        # What was said before the last question is left out, is refused where it comes last, is written otherwise.
        "{{ messages[-1]['content'] }}",
        "{% if messages[-1]['role'] != 'user' %}{{ raise_exception('no') }}{% endif %}{{ messages[0]['content'] }}",
        "{% for m in messages %}{{ m['content'] if loop.last else m['content'][:2] }}{% endfor %}",
    ],
)
def test_turns_that_a_template_rewrites_cannot_be_found(template):
    encoder = ChatEncoder(tiny_tokenizer(), chat_template=template)
    assert spoken(encoder, PLAIN) is None
    assert spoken(encoder, MESSAGES[:1]) == ([], [])


def test_a_blank_turn_teaches_nothing():
    blank = [MESSAGES[0], {"role": "assistant", "content": " "}, MESSAGES[2]]
    assert spoken(ChatEncoder(tiny_tokenizer(), "plain"), blank) == ([""], [])


def test_an_opening_turn_has_no_header_to_find_it_by():
    assert spoken(ChatEncoder(tiny_tokenizer(chat_template=True)), [MESSAGES[1], MESSAGES[0]]) is None


def test_a_token_across_the_border_of_a_turn_is_not_the_assistants():
    ((ids, offsets),) = TextTokens(tiny_tokenizer()).placed(["Assistant"])
    assert (len(ids), token_spans(offsets, [(3, 9)], 0)) == (1, [])


TURN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)


@given(st.lists(st.tuples(TURN, TURN), max_size=3), st.sampled_from(["plain", "template", "bos"]))
def test_turns_decode_to_what_was_said(exchanges, form):
    encoder = {"plain": PLAIN_ENCODER, "template": TEMPLATE_ENCODER, "bos": BOS_ENCODER}[form]
    messages = [{"role": role, "content": text} for pair in exchanges for role, text in zip(ROLES, pair, strict=True)]
    messages.append({"role": "user", "content": "and now?"})
    said = [f" {answer.strip()}" if form == "plain" else f"{answer.strip()}<|end|>" for _, answer in exchanges]
    assert spoken(encoder, messages) == (said, said)


def test_slow_tokenizers_cannot_find_turns():
    encoder = ChatEncoder(Slow())
    assert encoder.encode_prompt("cab")[1].tolist() == [2, 0, 1]
    with pytest.raises(UserError, match=r"tokenizer Slow cannot say where its tokens stand .* use one with"):
        encoder.encode_dialogues([Dialogue("cab")], need_turns=True)


ROLES = ("user", "assistant")
PLAIN_ENCODER = ChatEncoder(tiny_tokenizer(), "plain")
TEMPLATE_ENCODER = ChatEncoder(tiny_tokenizer(chat_template=True))
BOS_ENCODER = ChatEncoder(tiny_tokenizer(bos=True, chat_template=True))
ENCODER = ChatEncoder(tiny_tokenizer(bos=True))


def test_an_earlier_turn_that_begins_like_the_generation_prompt_is_taught_whole():
    chat = ChatEncoder(shelf_tokenizer("deepseek"))  # asks with an opened thought, and writes earlier turns without
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "<b>hello</b>"},
        {"role": "user", "content": "bye"},
    ]
    (encoded,) = chat.encode_dialogues([Dialogue(turns, ("ciao",))], need_turns=True)
    start, end = encoded.turns.tolist()
    assert chat.tokenizer.decode(encoded.prompt[start:end].tolist()) == "<b>hello</b></s>"
