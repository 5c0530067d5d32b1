"""Rows to ids against ids written out by hand: each letter is one token, a is 10, b 11 and so on; 1 is BOS, 2 EOS."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast

from helpers.tokenizers import CHAT_TEMPLATE, tiny_tokenizer
from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.chat.plain import PlainFormat
from rlhf_lightning.data.encode import encode_rows, scored_sequence
from rlhf_lightning.data.limits import TokenLimits
from rlhf_lightning.data.rows import Row
from rlhf_lightning.errors import UserError

WIDE = TokenLimits(100, None, 50, "cut")
LETTERS = {letter: 10 + i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
VOCABULARY = {"<pad>": 0, "<s>": 1, "</s>": 2, "\n": 3, " ": 4, ":": 5, "?": 6, "<u>": 7, "<a>": 8, **LETTERS}
TEMPLATE = (
    "{% for m in messages %}{{ ('<u>' if m['role'] == 'user' else '<a>') + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)


def letters(*, pad="<pad>", bos=False, eos="</s>"):
    backend = Tokenizer(models.BPE(VOCABULARY, merges=[]))
    backend.decoder = decoders.Fuse()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"pad_token": pad, "eos_token": eos, "bos_token": "<s>" if bos else None}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        additional_special_tokens=["<u>", "<a>"],
        **{name: token for name, token in special.items() if token},
    )


def encoded(row, limits=WIDE, chat=None, need_turns=False):
    """Prompt, turns, responses and notes of one row, or the reason it is dropped for."""
    (result,) = encode_rows([row], chat or ChatEncoder(letters()), limits, need_turns)
    if isinstance(result, str):
        return result
    assert {array.dtype for array in (result.prompt, result.turns, *result.responses)} == {np.dtype(np.int32)}
    return (
        result.prompt.tolist(),
        result.turns.tolist(),
        [response.tolist() for response in result.responses],
        (*(f"cut: {what}" for what in result.cut), *result.notes),
    )


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize("pad", ["<pad>", "</s>", None])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    ("responses", "ids"),
    [
        ((), []),
        (("cd",), [[12, 13, 2]]),
        (("cd</s>",), [[12, 13, 2]]),  # an EOS of its own
        (("</s>",), [[2]]),
        (("cd", "e", "f</s></s>"), [[12, 13, 2], [14, 2], [15, 2]]),
    ],
)
def test_one_beginning_and_one_end(pad, bos, responses, ids):
    chat = ChatEncoder(letters(pad=pad, bos=bos))
    start = [1] if bos else []
    assert encoded(Row("ab", responses), chat=chat) == ([*start, 10, 11], [], ids, ())
    assert encoded(Row("a", responses), chat=chat) == ([*start, 10], [], ids, ())
    if bos:
        assert encoded(Row("<s>ab", responses), chat=chat) == ([1, 10, 11], [], ids, ())


@pytest.mark.parametrize(
    ("limits", "prompt", "response", "notes"),
    [
        (TokenLimits(9, None, 1, "cut"), [1, 10, 11, 12, 13], [20, 21, 22, 2], ()),  # just fits
        (TokenLimits(8, None, 1, "cut"), [1, 10, 11, 12, 13], [20, 21, 22], ("cut: response",)),  # no EOS
        (TokenLimits(8, None, 4, "cut"), [1, 11, 12, 13], [20, 21, 22, 2], ("cut: prompt",)),
        (TokenLimits(8, None, 7, "cut"), [1, 11, 12, 13], [20, 21, 22, 2], ("cut: prompt",)),  # 4 is all it needs
        (TokenLimits(8, 2, 1, "cut"), [1, 13], [20, 21, 22, 2], ("cut: prompt",)),
        (TokenLimits(8, 1, 1, "cut"), [1], [20, 21, 22, 2], ("cut: prompt",)),
        (TokenLimits(5, 3, 1, "cut"), [1, 12, 13], [20, 21], ("cut: prompt", "cut: response")),
        (TokenLimits(9, None, 1, "drop"), [1, 10, 11, 12, 13], [20, 21, 22, 2], ()),
    ],
)
def test_cutting_by_hand(limits, prompt, response, notes):
    chat = ChatEncoder(letters(bos=True))
    assert encoded(Row("abcd", ("klm",)), limits, chat) == (prompt, [], [response], notes)


def test_one_prompt_before_all_responses():
    ids = ([11, 12, 13], [], [[20, 2], [20, 21, 22, 2], [20, 21, 22, 23]], ("cut: prompt", "cut: response"))
    assert encoded(Row("abcd", ("k", "klm", "klmn")), TokenLimits(7, None, 4, "cut")) == ids


def test_a_prompt_alone_leaves_room_for_its_response():
    assert encoded(Row("abcd"), TokenLimits(7, None, 4, "cut")) == ([11, 12, 13], [], [], ("cut: prompt",))
    assert encoded(Row("abcd"), TokenLimits(5, 4, 1, "drop")) == ([10, 11, 12, 13], [], [], ())
    assert encoded(Row("abcd"), TokenLimits(4, 3, 1, "drop")) == "prompt is too long"


@pytest.mark.parametrize(
    ("row", "outcome"),
    [
        (Row("abcd", ("klm",)), "prompt is too long"),
        (Row("abcd", ("k",)), "prompt is too long"),  # the first of two reasons
        (Row("abc", ("kl",)), ([10, 11, 12], [], [[20, 21, 2]], ())),
        (Row("abc", ("k",)), "response is too short"),  # the EOS does not count
        (Row("abc", ("k</s>",)), "response is too short"),
        (Row("abc", ("kl", "k")), "response is too short"),
        (Row("abc"), ([10, 11, 12], [], [], ())),
    ],
)
def test_what_is_dropped(row, outcome):
    assert encoded(row, TokenLimits(20, 3, 4, "drop", minimum_response_length=2)) == outcome


def test_a_response_is_measured_before_it_is_cut():
    limits = TokenLimits(5, None, 1, "cut", minimum_response_length=3)
    assert encoded(Row("abcd", ("klm",)), limits) == ([10, 11, 12, 13], [], [[20]], ("cut: response",))


def test_refused_turns_are_a_reason_and_leave_the_other_rows_alone():
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
    rows = [Row([assistant("b")], ("c",)), Row([user("a")], ("d",)), Row([assistant("b")]), Row([user("b")], ("e",))]
    results = encode_rows(rows, ChatEncoder(letters(), chat_template=strict), WIDE)
    assert [results[0], results[2]] == ["the dialogue format refuses the turns: no"] * 2
    assert [results[1].responses[0].tolist(), results[3].responses[0].tolist()] == [[13, 2], [14, 2]]


def test_what_is_wrong_with_all_rows_is_an_error():
    with pytest.raises(UserError, match="has no chat template"):
        encode_rows([Row([user("a")], ("b",))], ChatEncoder(letters()), WIDE)
    without_eos = ChatEncoder(letters(eos=None))
    with pytest.raises(UserError, match="has no EOS token"):
        encode_rows([Row("a", ("b",))], without_eos, WIDE)
    assert encoded(Row("a"), chat=without_eos) == ([10], [], [], ())


MULTI_TURN = [user("a"), assistant("bc"), user("d"), assistant("e"), user("f")]
IN_TEMPLATE = [7, 10, 2, 3, 8, 11, 12, 2, 3, 7, 13, 2, 3, 8, 14, 2, 3, 7, 15, 2, 3, 8]
IN_PLAIN = [20, 6, 10, 3, 11, 12, 20, 6, 13, 3, 14, 20, 6, 15, 3]


@pytest.mark.parametrize("pad", ["<pad>", "</s>"])
def test_turns_in_a_template_have_their_eos(pad):
    chat = ChatEncoder(letters(pad=pad), chat_template=TEMPLATE)
    row = Row(MULTI_TURN, ("g",))
    assert encoded(row, chat=chat, need_turns=True) == (IN_TEMPLATE, [5, 8, 14, 16], [[16, 2]], ())
    assert encoded(row, chat=chat) == (IN_TEMPLATE, [], [[16, 2]], ())


def test_turns_in_a_plain_format_are_text_alone():
    plain = PlainFormat(user="k?", assistant="\n", response="")
    chat = ChatEncoder(letters(), "plain", plain_format=plain)
    row = Row(MULTI_TURN, ("g",))
    assert encoded(row, chat=chat, need_turns=True) == (IN_PLAIN, [4, 6, 10, 11], [[16, 2]], ())


def test_turns_behind_a_bos_and_cut_from_the_left():
    chat = ChatEncoder(letters(bos=True), chat_template="{{ bos_token }}" + TEMPLATE)
    row = Row(MULTI_TURN, ("g",))
    assert encoded(row, chat=chat, need_turns=True)[:2] == ([1, *IN_TEMPLATE], [6, 9, 15, 17])
    limits = TokenLimits(50, 18, 10, "cut")
    assert encoded(row, limits, chat, True)[:2] == ([1, *IN_TEMPLATE[5:]], [1, 4, 10, 12])
    limits = TokenLimits(50, 16, 10, "cut")
    assert encoded(row, limits, chat, True)[:2] == ([1, *IN_TEMPLATE[7:]], [1, 2, 8, 10])  # bc are gone, their EOS not


def test_turns_that_cannot_be_found_are_noted():
    # Of every turn but the last the first letter is left, so the turns before an answer are written anew for it.
    rewriting = "{% for m in messages %}{{ m['content'] if loop.last else m['content'][:1] }}{% endfor %}"
    chat = ChatEncoder(letters(), chat_template=rewriting)
    row = Row([user("ab"), assistant("bc"), user("cd")], ("ef",))
    notes = (
        "template does not continue its prompt",
        "template leaves something out",
        "template writes no end of turn",
    )
    assert encoded(row, chat=chat, need_turns=True) == ([10, 11, 12], [], [[14, 15, 2]], (*notes, "turns not found"))
    assert encoded(row, chat=chat) == ([10, 11, 12], [], [[14, 15, 2]], notes)
    assert encoded(row._replace(prompt="a"), chat=chat, need_turns=True) == (
        [10],
        [],
        [[14, 15, 2]],
        ("chat template not applied",),
    )


def test_silence_is_not_taught_in_place_of_a_call_that_the_template_leaves_out():
    chat = ChatEncoder(letters(), chat_template=TEMPLATE)
    call = {**assistant(""), "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    refused = "the dialogue format refuses the turns: the chat template leaves the answer out"
    assert encoded(Row([user("a")], (call,)), chat=chat) == refused
    _, turns, _, notes = encoded(Row([user("a"), call, user("b")], ("c",)), chat=chat, need_turns=True)
    assert (turns, notes) == ([], ("template leaves something out",))
    _, turns, _, _ = encoded(Row([user("a"), {**call, "content": "d"}, user("b")], ("c",)), chat=chat, need_turns=True)
    assert len(turns) == 2


SUFFIX = "\n\ntl:dr:"


@pytest.mark.parametrize(
    ("room", "kept"),
    [
        (100, "one two\nthree four\n\nfive six"),
        (36, "one two\nthree four\n\nfive six"),
        (35, "one two\nthree four"),
        (26, "one two\nthree four"),
        (25, "one two"),
        (15, "one two"),
        (14, "one"),  # no paragraph fits
        (11, "one"),
    ],
)
def test_a_post_is_cut_at_a_paragraph_end_before_its_suffix(room, kept):
    chat = ChatEncoder(letters())
    row = Row("one two\nthree four\n\nfive six", (" it",), suffix=SUFFIX)
    prompt, _, responses, notes = encoded(row, TokenLimits(200, room, 10, "cut"))
    assert chat.decode([prompt]) == [kept + SUFFIX]
    assert responses == [[4, 18, 29, 2]]
    assert notes == (() if room >= 36 else ("cut: prompt",))


def test_a_post_of_which_no_word_fits_is_dropped():
    row = Row("one two", ("it",), suffix=SUFFIX)
    assert encoded(row, TokenLimits(200, 10, 10, "cut")) == "prompt is too long"
    assert encoded(row, TokenLimits(200, 2, 10, "cut")) == "prompt is too long"
    assert encoded(row, TokenLimits(200, 14, 10, "drop")) == "prompt is too long"
    assert encoded(row, TokenLimits(200, 15, 10, "drop"))[3] == ()


def test_a_post_of_one_paragraph_is_not_lost_whole():
    chat = ChatEncoder(tiny_tokenizer(bos=True))
    row = Row("SUBREDDIT: r/x\nTITLE: y\nPOST: " + "the old bicycle " * 50, ("Ride.",), suffix="\n\nTL;DR:")
    (result,) = encode_rows([row], chat, TokenLimits(200, 100, 50, "cut"))
    assert 90 <= len(result.prompt) <= 100
    assert result.prompt[0] == chat.tokenizer.bos_token_id
    kept = chat.decode([result.prompt])[0].removesuffix("\n\nTL;DR:")
    assert row.prompt.startswith(kept + " ")
    assert kept.startswith("SUBREDDIT: r/x\nTITLE: y\nPOST: the old")


def test_a_post_in_a_chat_template_keeps_the_template_whole():
    chat = ChatEncoder(tiny_tokenizer(), "chat_template", CHAT_TEMPLATE)
    row = Row("Mix it.\nBake it. " + "Wait. " * 60, ("Bake.",), suffix="\n\nTL;DR:")
    (result,) = encode_rows([row], chat, TokenLimits(200, 60, 50, "cut"))
    text = "<|start|>user\nMix it.\n\nTL;DR:<|end|>\n<|start|>assistant\n"
    assert chat.tokenizer.decode(result.prompt.tolist()) == text
    assert result.prompt.tolist() == chat.encode_text(text, "template").tolist()


WORDS = st.text("ab é:", min_size=1, max_size=12).filter(str.strip)


@given(st.lists(WORDS, min_size=1, max_size=12), st.integers(1, 60), st.booleans())
def test_posts_are_never_cut_in_mid_word(paragraphs, room, bos):
    chat = TINY_BOS if bos else TINY
    post, suffix = "\n".join(paragraphs), "\n\nTL;DR:"
    (result,) = encode_rows([Row(post, suffix=suffix)], chat, TokenLimits(100, room, 1, "cut"))
    breaks = [i for i, mark in enumerate(post) if mark in " \n" and post[:i].strip()]
    fit = [i for i in breaks if len(chat.encode_text(post[:i].rstrip() + suffix, "verbatim")) <= room]
    if isinstance(result, str):
        assert not fit
        return
    assert len(result.prompt) <= room
    text = chat.decode([result.prompt])[0]
    if result.cut:
        kept = text.removesuffix(suffix)
        assert kept + suffix == text
        ends = [i for i in fit if post[i] == "\n"] or fit
        assert kept == post[: max(ends)].rstrip()
        assert result.prompt.tolist() == chat.encode_text(text, "verbatim").tolist()
    else:
        assert text == post + suffix


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30)
ROWS = st.lists(st.tuples(TEXT, st.lists(TEXT, max_size=3).map(tuple)).map(lambda row: Row(*row)), max_size=6)
LIMITS = st.builds(
    lambda length, most, room, long, least: TokenLimits(
        length, min(most, length - 1), min(room, length - 1), long, min(least, length - 1)
    ),
    st.integers(4, 60),
    st.integers(2, 40),
    st.integers(1, 30),
    st.sampled_from(["cut", "drop"]),
    st.integers(0, 5),
)


@given(ROWS, LIMITS, st.booleans(), st.booleans())
def test_whatever_comes_out_is_what_generation_sees_within_the_limits(rows, limits, bos, need_turns):
    chat = TINY_BOS if bos else TINY
    results = encode_rows(rows, chat, limits, need_turns)
    for row, result in zip(rows, results, strict=True):
        prompt = chat.encode_prompt(row.prompt)[1].tolist()
        responses = [chat.encode_dialogue(row.prompt, response)[1].tolist() for response in row.responses]
        if isinstance(result, str):
            room = limits.prompt_room([len(response) for response in responses])
            too_long = limits.long_prompts == "drop" and len(prompt) > room
            short = any(len(response) - 1 < limits.minimum_response_length for response in responses)
            assert result == ("prompt is too long" if too_long else "response is too short")
            assert too_long or short
            continue
        check_cut(result, prompt, responses, limits, chat.prefix)


def check_cut(result, prompt, responses, limits, prefix):
    kept, n = result.prompt.tolist(), len(prefix)
    assert len(kept) <= limits.max_prompt_length
    assert kept[:n] == prefix[: len(kept)]
    assert prompt[n:][len(prompt) - len(kept) :] == kept[n:]
    assert result.cut.count("prompt") == (kept != prompt)
    assert len(result.responses) == len(responses)
    for cut, whole in zip(result.responses, responses, strict=True):
        assert cut.tolist() == whole[: limits.max_length - len(kept)]
        assert len(cut) == len(whole) or len(cut) >= limits.response_room
    shorter = [len(cut) < len(whole) for cut, whole in zip(result.responses, responses, strict=True)]
    assert result.cut.count("response") == sum(shorter)


@given(ROWS, LIMITS)
def test_rows_do_not_depend_on_their_company_or_process(rows, limits):
    together = encode_rows(rows, TINY, limits, need_turns=True)
    chat = pickle.loads(pickle.dumps(TINY))
    for row, result in zip(rows, together, strict=True):
        (alone,) = encode_rows([row], chat, limits, need_turns=True)
        assert said(alone) == said(result)


def said(result):
    return result if isinstance(result, str) else [part.tolist() for part in (*result[:2], *result.responses)]


@pytest.mark.parametrize(
    ("text", "bos", "prompt", "response"),
    [
        ("abc", False, [10], [11, 12, 2]),
        ("abc", True, [1], [10, 11, 12, 2]),
        ("<s>abc</s>", True, [1], [10, 11, 12, 2]),  # written by a template already
        ("a", False, [10], [2]),
        ("\n\n", False, [3], [3, 2]),
    ],
)
@pytest.mark.parametrize("dialogue_format", ["auto", "chat_template"])
def test_a_whole_text_is_taught_from_its_first_token_that_can_be(text, bos, prompt, response, dialogue_format):
    tokenizer = letters(bos=bos)
    tokenizer.chat_template = TEMPLATE
    chat = ChatEncoder(tokenizer, dialogue_format)
    for need_turns in (False, True):
        assert encoded(Row("", (text,)), chat=chat, need_turns=need_turns) == (prompt, [], [response], ())


def test_a_whole_text_that_is_too_long_loses_its_end_and_its_eos():
    assert encoded(Row("", ("abcd",)), TokenLimits(3, None, 1, "cut")) == ([10], [], [[11, 12]], ("cut: response",))


def test_a_whole_text_of_an_eos_alone_teaches_nothing():
    assert encoded(Row("", ("</s>",))) == "response is too short"


def test_no_rows():
    assert encode_rows([], TINY, WIDE) == encode_rows([], TINY, WIDE, need_turns=True) == []


def test_a_sequence_to_score():
    chat = ChatEncoder(letters(bos=True))
    (row,) = encode_rows([Row("ab", ("c", "d"))], chat, WIDE)
    sequence = scored_sequence(row.prompt, row.responses[1], "rejected", 5, chat)
    assert sequence.ids.tolist() == [1, 10, 11, 13, 2]
    assert sequence[1:] == ("ab", "d", "rejected", 5)


TINY = ChatEncoder(tiny_tokenizer())
TINY_BOS = ChatEncoder(tiny_tokenizer(bos=True))
