"""What is taught and read is what the template writes, over a shelf of templates and tokenizers."""

from hypothesis import given
from hypothesis import strategies as st

from helpers.templates import SHELF, shelf_tokenizer
from rlhf_lightning.chat.encoder import APART, ChatEncoder
from rlhf_lightning.chat.templates import turn_ends
from rlhf_lightning.chat.writer import NO_END, REWRITES, Dialogue

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
