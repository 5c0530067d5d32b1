"""Which tokenizers and templates make the same ids, and which do not."""

import pickle

from helpers.tokenizers import BOS_CHAT_TEMPLATE, CHAT_TEMPLATE, Slow, tiny_tokenizer
from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.chat.plain import PlainFormat


def test_a_fingerprint_stands_for_what_makes_the_ids(tmp_path):
    tokenizer = tiny_tokenizer(pad="none", chat_template=True)
    tokenizer.save_pretrained(tmp_path)
    same = type(tokenizer).from_pretrained(tmp_path)
    same.add_special_tokens({"pad_token": "<|new|>"})
    same(["a", "bcd"], padding=True, truncation=True, max_length=4)
    mine = ChatEncoder(tokenizer).fingerprint()
    assert ChatEncoder(same).fingerprint() == pickle.loads(pickle.dumps(ChatEncoder(same))).fingerprint() == mine

    for pad in ("own", "eos"):
        assert ChatEncoder(tiny_tokenizer(pad=pad, chat_template=True)).fingerprint() == mine

    for reserved in ("<pad>", "<|end_of_turn|>"):  # the second serves as EOS and as padding
        ours = tiny_tokenizer(pad="none")
        ours.add_special_tokens({"extra_special_tokens": [reserved]})
        ours.eos_token = reserved if reserved != "<pad>" else "<|end|>"
        ours.pad_token = None if reserved == "<pad>" else reserved
        before = ChatEncoder(ours).fingerprint()
        if reserved != "<pad>":
            ours.add_special_tokens({"pad_token": "<|new|>"})
        ours.pad_token = "<pad>" if reserved == "<pad>" else "<|new|>"
        assert ChatEncoder(ours).fingerprint() == before

    other_bos = tiny_tokenizer()
    other_bos.bos_token = "<|start|>"
    another_bos = tiny_tokenizer()
    another_bos.bos_token = "<|bos|>"
    other_eos = tiny_tokenizer(chat_template=True)
    other_eos.eos_token = "<|pad|>"
    more_words = tiny_tokenizer(chat_template=True)
    more_words.add_tokens(["bread"])
    others = [
        ChatEncoder(tiny_tokenizer(bos=True, chat_template=True)),
        ChatEncoder(other_eos),
        ChatEncoder(more_words),
        ChatEncoder(tiny_tokenizer(), chat_template=BOS_CHAT_TEMPLATE),
        ChatEncoder(other_bos, chat_template=CHAT_TEMPLATE),  # which a template may write, if no post-processor does
        ChatEncoder(another_bos, chat_template=CHAT_TEMPLATE),
        ChatEncoder(tiny_tokenizer()),
        ChatEncoder(tiny_tokenizer(), plain_format=PlainFormat("<user> ")),
        ChatEncoder(tiny_tokenizer(), "plain"),
    ]
    assert len({mine, *(encoder.fingerprint() for encoder in others)}) == 1 + len(others)
    assert ChatEncoder(Slow()).fingerprint() != mine


def test_what_made_the_ids_is_described(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    tokenizer = type(tiny_tokenizer()).from_pretrained(tmp_path)
    plain = ChatEncoder(tokenizer).describe()
    assert (plain["tokenizer"], plain["dialogue_format"], plain["template_hash"]) == (str(tmp_path), "auto", None)
    assert plain["plain_format"]["assistant"] == "\n\nAssistant:"
    assert isinstance(plain["rendering"], int)
    templated = ChatEncoder(tokenizer, chat_template=CHAT_TEMPLATE).describe()
    assert templated["tokenizer_hash"] == plain["tokenizer_hash"]
    assert len(templated["template_hash"]) == 32
    assert templated["plain_format"] is None
