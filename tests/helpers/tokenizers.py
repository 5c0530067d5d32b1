"""A tiny real tokenizer, trained in memory, and one in Python."""

from __future__ import annotations

from functools import cache
from typing import Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, PythonBackend

SENTENCES = [
    "\n\nHuman: how do i bake bread?\n\nAssistant: Mix flour, water, salt and yeast, then wait and bake it.",
    "\n\nHuman: can you help me repair my old bicycle?\n\nAssistant: Happy to help! Start with the chain.",
    "Once upon a time there was a small model that learned to speak politely.",
]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|start|>' + message['role'] + '\n' + message['content'] | trim + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
"""Ends each turn with the tokenizer's EOS; writes no BOS."""

BOS_CHAT_TEMPLATE = "{{ bos_token }}" + CHAT_TEMPLATE
"""The same, with the BOS in front."""


def tiny_tokenizer(
    *, pad: Literal["own", "eos", "none"] = "own", bos: bool = False, chat_template: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 300 tokens.

    Args:
        pad: a pad token of its own, the EOS in its place, or none.
        bos: put a BOS before every text, by post-processor, as Llama does.
        chat_template: carry `CHAT_TEMPLATE`, or with `bos` the one that writes the BOS itself.
    """
    # A fresh copy each time: tests change their tokenizers.
    backend = Tokenizer.from_str(_trained())
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", backend.token_to_id("<|bos|>"))]
        )
    special = {"eos_token": "<|end|>"}
    if bos:
        special["bos_token"] = "<|bos|>"
    if pad != "none":
        special["pad_token"] = "<|pad|>" if pad == "own" else "<|end|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    if chat_template:
        tokenizer.chat_template = BOS_CHAT_TEMPLATE if bos else CHAT_TEMPLATE
    return tokenizer


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|pad|>", "<|bos|>", "<|end|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    return tokenizer.to_str()


class Slow(PythonBackend):
    """A tokenizer in Python: one id for each of three letters."""

    def __init__(self):
        super().__init__(eos_token="c")

    vocab_size = 3

    def get_vocab(self):
        return {"a": 0, "b": 1, "c": 2}

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.get_vocab().get(token, 0)

    def _convert_id_to_token(self, index):
        return "abc"[index]
