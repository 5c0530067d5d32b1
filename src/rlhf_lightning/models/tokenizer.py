"""Loading tokenizers, and which id stands in for padding."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf_lightning.chat.control_tokens import RESERVED
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.folders import looks_local, reason_of, say_trusted


def load_tokenizer(
    name_or_path: str | os.PathLike[str] | PreTrainedTokenizerBase, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a tokenizer; one that is loaded already is returned as it is. No pad token is invented.

    Args:
        name_or_path: a Hugging Face folder, a hub id, or a tokenizer.
        trust_remote_code: allow the folder to run Python code of its own.

    Raises:
        UserError: there is no tokenizer at that place.
    """
    if isinstance(name_or_path, PreTrainedTokenizerBase):
        return name_or_path
    name = os.path.expanduser(os.fspath(name_or_path))
    if not name.strip():
        raise UserError("the tokenizer has an empty name; pass a Hugging Face folder or hub id")
    if looks_local(name) and not Path(name).is_dir():
        raise UserError(f"tokenizer folder '{name}' does not exist; pass a Hugging Face folder or hub id")
    if trust_remote_code:
        say_trusted(name)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as e:  # the tokenizers library raises nothing narrower
        reason = reason_of(e)
        if looks_local(name) and not (Path(name) / "tokenizer.json").is_file():
            reason = "it has no tokenizer.json; save the tokenizer beside the model"
        raise UserError(f"no tokenizer could be loaded from '{name}': {reason}") from e
    if not isinstance(tokenizer.model_max_length, int | float):
        raise UserError(
            f"no tokenizer could be loaded from '{name}': model_max_length of its tokenizer_config.json is "
            f"{tokenizer.model_max_length!r}, and must be a number"
        )
    return tokenizer


def filler_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id written where a mask is False: the pad id, else the EOS id, else 0. Its value never matters."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0


def own_pad_token(tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> int:
    """Give the tokenizer a pad token that is not its EOS or BOS, without growing the model where possible.

    `...ForSequenceClassification` reads the score at the last id that is not the pad id; with pad == EOS it would read
    the token before the EOS. Tried in this order: a pad token that is distinct already; a reserved token of the
    vocabulary; the unknown token; a new token on a spare embedding row; a new token (the model must then be resized).

    Args:
        tokenizer: changed in place.
        num_embeddings: rows of the model's embedding matrix.

    Returns:
        The pad id; `num_embeddings` or more if the model must be resized.
    """
    taken = {tokenizer.eos_token_id, tokenizer.bos_token_id, None}
    if tokenizer.pad_token_id not in taken:
        return int(tokenizer.pad_token_id)
    vocab = tokenizer.get_vocab()
    reserved = [*RESERVED, tokenizer.unk_token]
    for token in reserved:
        if token in vocab and vocab[token] not in taken:
            tokenizer.pad_token = token
            return int(vocab[token])
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return int(tokenizer.pad_token_id)


def check_same_words(model: PreTrainedTokenizerBase, data: PreTrainedTokenizerBase) -> None:
    """Refuse data whose ids mean other words to the model; tokens that were added to either may differ.

    Args:
        model: the model's tokenizer.
        data: the one that made the data.

    Raises:
        UserError: names an id.
    """
    if data is model:
        return
    added = model.get_added_vocab().keys() | data.get_added_vocab().keys()
    mine, theirs = (
        {number: token for token, number in tokenizer.get_vocab().items() if token not in added}
        for tokenizer in (model, data)
    )
    for number, token in sorted(theirs.items()):
        if mine.get(number, token) != token:
            raise UserError(
                f"the data are tokenised by '{data.name_or_path}', in which id {number} is {token!r}; to the model of "
                f"'{model.name_or_path}' it is {mine[number]!r}: give the data module the model's tokenizer"
            )


def same_tokenizer(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    """Whether ids of one mean the same in the other; a pad token that only one of them has is no difference."""
    if a.eos_token_id != b.eos_token_id:
        return False
    smaller, larger = sorted((a, b), key=len)
    few, many = smaller.get_vocab(), larger.get_vocab()
    return many.keys() - few.keys() <= {larger.pad_token} and all(many.get(token) == i for token, i in few.items())
