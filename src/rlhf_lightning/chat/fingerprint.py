"""What decides which ids a tokenizer makes of a text, as a hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from rlhf_lightning.chat.control_tokens import RESERVED

_ADDED = '"added_tokens":'  # stands in a tokenizer's file before everything that is long


def hash_of_tokenizer(tokenizer: PreTrainedTokenizerBase, prefix: Sequence[int]) -> str:
    """Hash of vocabulary and rules; padding, truncation, and a pad token added behind all others do not count.

    Args:
        tokenizer: its name does not count.
        prefix: ids it puts before a text.
    """
    if not tokenizer.is_fast:
        vocabulary, rules = sorted(tokenizer.get_vocab().items()), ""
    else:
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        whole = backend.to_str()
        # The long rest is hashed as it stands: to parse it would take ten times as long.
        added, end = json.JSONDecoder().raw_decode(whole, whole.index(_ADDED) + len(_ADDED))
        size, pad_token = backend.get_vocab_size(with_added_tokens=False), tokenizer.pad_token
        # What was added to serve as padding comes last; the EOS, or a token kept for such use, may serve too.
        last = max((token["id"] for token in added if token["id"] >= size), default=None)
        names = {*RESERVED, pad_token} - {tokenizer.eos_token}
        vocabulary = [token for token in added if token["id"] != last or token["content"] not in names]
        rules = whole[end:]
    return hash_of(json.dumps([tokenizer.eos_token_id, list(prefix), vocabulary]) + rules)


def hash_of_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of a chat template and of the special tokens that it may write by name; the pad token is none that it would.

    Args:
        tokenizer: carries the template.
    """
    named = tokenizer.special_tokens_map.items()
    tokens = {name: str(token) for name, token in sorted(named) if isinstance(token, str) and name != "pad_token"}
    return hash_of(str(tokenizer.chat_template) + json.dumps(tokens))


def hash_of(text: str) -> str:
    """A hash of 16 bytes, as 32 letters."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
