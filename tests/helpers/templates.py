"""A shelf of chat templates in the manner of the public families, and tokenizers that carry them.

None is a copy: each does in a few lines what sets its family apart.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Literal, NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from helpers.tokenizers import SENTENCES


class Shelved(NamedTuple):
    """A template.

    Attributes:
        text: Jinja.
        end: the token that ends a dialogue's last turn; "" where none is written.
        system: whether it takes a system turn.
        continues: whether the dialogue continues the prompt with which the answer was asked for.
    """

    text: str
    end: str
    system: bool = True
    continues: bool = True


def _answer(header: str) -> str:
    return "{% if add_generation_prompt %}{{ " + header + " }}{% endif %}"


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    + _answer("'<|im_start|>assistant\n'")
)
LLAMA2 = (
    "{% set first = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages if m['role'] != 'system' %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + ('<<SYS>>' + first + '<</SYS>>' if first and loop.first else '') "
    "+ m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    + _answer("'<|start_header_id|>assistant<|end_header_id|>\n\n'")
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' "
    "+ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}" + _answer("'<start_of_turn>model\n'")
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST]' + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
QWEN3 = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set c = m['content'] %}{% if m['role'] == 'assistant' %}{% set thought = '' %}"
    "{% if m['reasoning_content'] %}{% set thought = m['reasoning_content'] %}"
    "{% elif '</think>' in c %}{% set thought = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last %}{% set c = '<think>\n' + thought + '\n</think>\n\n' + c %}{% endif %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + c + '<|im_end|>\n' }}{% endfor %}" + _answer("'<|im_start|>assistant\n'")
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}"
    "{% else %}{{ '<|Assistant|>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    + _answer("'<|Assistant|><think>\n'")
)
OPENED_THOUGHT = (
    "{% for m in messages %}{% set c = m['content'].split('</think>')[-1] %}"
    "{% if m['role'] == 'assistant' and loop.last %}{% set c = '<think>\n\n</think>\n\n' + c %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + c + '<|im_end|>\n' }}{% endfor %}"
    + _answer("'<|im_start|>assistant\n<think>\n'")
)
PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    + _answer("'<|assistant|>\n'")
)
COMMAND = (
    "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|><|' + m['role'] | upper + '_TOKEN|>' "
    "+ m['content'].strip() + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    + _answer("'<|START_OF_TURN_TOKEN|><|ASSISTANT_TOKEN|>'")
)
HARMONY = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% if m['reasoning_content'] and loop.last %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m['reasoning_content'] + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m['content'] "
    "+ ('<|return|>' if loop.last and not add_generation_prompt else '<|end|>') }}"
    "{% else %}{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    + _answer("'<|start|>assistant'")
)
GLM = "{{ '[gMASK]<sop>' }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}{% endfor %}" + _answer(
    "'<|assistant|>\n'"
)
ALPACA = "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n\n' }}{% endfor %}" + _answer(
    "'### assistant:\n'"
)

COMMAND_CLOSED = COMMAND.replace(
    "m['content'].strip() + '<|END", "(m['content'] + '<|end|>' if m['role'] == 'assistant' else m['content']) + '<|END"
)
"""Closes the answer by a token of its own before the turn."""

SHELF = {
    "chatml": Shelved(CHATML, "<|im_end|>"),
    "llama2": Shelved(LLAMA2, "</s>"),
    "llama3": Shelved(LLAMA3, "<|eot_id|>"),
    "gemma": Shelved(GEMMA, "<end_of_turn>", system=False),
    "mistral": Shelved(MISTRAL, "</s>", system=False),
    "qwen3": Shelved(QWEN3, "<|im_end|>"),
    "deepseek": Shelved(DEEPSEEK, "</s>", continues=False),
    "opened thought": Shelved(OPENED_THOUGHT, "<|im_end|>"),
    "phi": Shelved(PHI, "<|end|>"),
    "zephyr": Shelved(ZEPHYR, "</s>"),
    "command": Shelved(COMMAND, "<|END_OF_TURN_TOKEN|>"),
    "command, closed": Shelved(COMMAND_CLOSED, "<|END_OF_TURN_TOKEN|>"),
    "harmony": Shelved(HARMONY, "<|return|>"),
    "glm": Shelved(GLM, ""),
    "alpaca": Shelved(ALPACA, ""),
}

CONTROL = [
    *("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|User|>", "<|Assistant|>", "<|user|>", "<|assistant|>", "<|system|>"),
    *("<|end|>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|ASSISTANT_TOKEN|>"),
    *("<|SYSTEM_TOKEN|>", "<|start|>", "<|channel|>", "<|message|>", "<|return|>", "[gMASK]", "<sop>"),
]
"""Special tokens of the tokenizers below, whatever template they carry; `</s>` is the EOS."""
THOUGHTS = ["<think>", "</think>"]
"""Added tokens that are not special."""
Spelling = Literal["bytes", "metaspace"]


def shelf_tokenizer(name: str, spelling: Spelling = "bytes", bos: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer with a template of the shelf.

    Args:
        name: of the template.
        spelling: byte-level, as GPT-2's, or with a mark for spaces and bytes for what is unknown, as Llama 2's.
        bos: put a BOS before every text unasked.
    """
    backend = Tokenizer.from_str(_trained(spelling))
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )
    tokenizer.chat_template = SHELF[name].text
    return tokenizer


def single_bytes() -> PreTrainedTokenizerFast:
    """As Llama 2's, whose single bytes are ordinary tokens."""
    whole = shelf_tokenizer("chatml", "metaspace")
    said = json.loads(whole.backend_tokenizer.to_str())
    said["added_tokens"] = [token for token in said["added_tokens"] if not token["content"].startswith("<0x")]
    backend = Tokenizer.from_str(json.dumps(said))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")


@cache
def _trained(spelling: Spelling) -> str:
    special = [*CONTROL]
    if spelling == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        special = [*special, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        alphabet = []
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    tokenizer.add_tokens(THOUGHTS)
    return tokenizer.to_str()
