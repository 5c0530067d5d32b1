import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.tokenizers import BOS_CHAT_TEMPLATE, CHAT_TEMPLATE, tiny_tokenizer
from rlhf_lightning.data.chat import ChatEncoder, RefusedTurnsError, default_prefix, parse_dialogue, render_plain
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


def test_dialogues_and_messages_are_two_forms_of_the_same():
    assert parse_dialogue(PLAIN) == MESSAGES
    assert render_plain(MESSAGES) == PLAIN
    assert render_plain([SYSTEM, {**SYSTEM, "content": "Be kind."}, *MESSAGES]) == "Be brief.\nBe kind." + PLAIN


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
    ("kind", "response", "text"),
    [("verbatim", "  a ", "  a "), ("plain", "a", " a"), ("plain", " \n a", " a"), ("template", " a\n", "a")],
)
def test_responses_are_spaced_as_their_prompt_asks(kind, response, text):
    assert ChatEncoder(tiny_tokenizer()).response_text(response, kind) == text


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
def test_exactly_one_bos(template, prompt):
    encoder = ChatEncoder(tiny_tokenizer(bos=True), chat_template=template)
    text, ids = encoder.encode_prompt(prompt)

    bos = encoder.tokenizer.bos_token_id
    assert (ids[0], ids.count(bos)) == (bos, 1)
    assert encoder.tokenizer.decode(ids[1:]) == text.removeprefix("<|bos|>")


@pytest.mark.parametrize("response", ["Bake it.", "Bake it.<|end|>", "<|end|>", "Bake it.<|end|><|end|>"])
@pytest.mark.parametrize("pad", ["own", "eos", "none"])
def test_exactly_one_eos_at_the_end(response, pad):
    encoder = ChatEncoder(tiny_tokenizer(pad=pad))
    ids = encoder.encode_response("how?", response)

    eos = encoder.tokenizer.eos_token_id
    assert (ids[-1], ids.count(eos)) == (eos, 1)
    assert encoder.decode([ids]) == [response.replace("<|end|>", "")]


def test_without_eos_no_response_can_be_taught():
    tokenizer = tiny_tokenizer(pad="none")
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="has no EOS token"):
        ChatEncoder(tokenizer).encode_response("a", "b")


@given(st.text(min_size=1), st.text(min_size=1))
def test_the_ids_of_a_prompt_do_not_depend_on_the_response(prompt, response):
    encoder = ENCODER
    text, prompt_ids = encoder.encode_prompt(prompt)
    ids = prompt_ids + encoder.encode_response(prompt, response)

    assert ids[: len(prompt_ids)] == encoder.encode_prompts([text])[0]
    # Byte-level, so the joined ids say the joined text, whatever it is.
    kind = encoder.render(prompt).kind
    assert encoder.tokenizer.decode(ids[1:-1]) == text + encoder.response_text(response, kind)


def test_no_token_spans_the_border():
    encoder = ChatEncoder(tiny_tokenizer())
    whole = encoder.tokenizer("Assistant", add_special_tokens=False).input_ids
    apart = encoder.encode_prompt("Assis")[1] + encoder.encode_response("Assis", "tant")[:-1]
    assert len(whole) == 1 < len(apart)
    assert encoder.tokenizer.decode(apart) == encoder.tokenizer.decode(whole) == "Assistant"


ENCODER = ChatEncoder(tiny_tokenizer(bos=True))
