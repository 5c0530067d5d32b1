"""Sequence classifiers of any family: loaded, and run as they are where their head is not linear in hidden states.

Encoders (BERT, RoBERTa, DeBERTa and so on) have a pooler or a dense layer before their last one, and what they make of
a token depends on those that follow. transformers' own forward gives their logits; the score is the weighted sum.

Notation: B batch, T padded length, K labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.chat.messages import Prompt
from rlhf_lightning.chat.written import WrittenPrompt
from rlhf_lightning.compat import has_unmerged_adapter
from rlhf_lightning.errors import UserError
from rlhf_lightning.forward.backbone import HEAD
from rlhf_lightning.forward.capacity import context_length
from rlhf_lightning.forward.numerics import dummy_tokens, self_test, typical_tolerance
from rlhf_lightning.functional import ScoreCombination
from rlhf_lightning.models.adapter_folders import (
    adapter_base,
    fit_tokenizer,
    is_adapter,
    is_reward_adapter,
    merge_adapter,
)
from rlhf_lightning.models.calibration import Calibration, restore_records
from rlhf_lightning.models.causal_lm import disable_dropout, load_causal_lm, train_every_row
from rlhf_lightning.models.dtypes import keep_tables
from rlhf_lightning.models.folders import reason_of, say_trusted
from rlhf_lightning.models.peft_library import load_peft_weights
from rlhf_lightning.models.quantized import nf4_options, settle_nf4
from rlhf_lightning.models.stored import load_pretrained
from rlhf_lightning.models.tokenizer import own_pad_token
from rlhf_lightning.rng import generator
from rlhf_lightning.training.sharded import gathered, is_sharded, widen_now

_SHORT, _LONG = 5, 13
"""Tokens that a classifier is tried with, without padding and with it."""
HEAD_WEIGHT = "base_model.model.score.weight"
"""What an adapter folder calls the weight of the head."""


def _classifier(name: str, trust_remote_code: bool, num_labels: int, **options: Any) -> tuple[Any, set[str]]:
    """A sequence classifier, and which of its weights the folder lacks."""
    options |= {"num_labels": num_labels, "trust_remote_code": trust_remote_code}
    model, missing = load_pretrained(AutoModelForSequenceClassification, name, **options)
    if of_backbone := {key for key in missing if not key.startswith("score.")}:
        raise ValueError(f"its weights lack {min(of_backbone)}, which would be random")
    return model, missing


def _adapted_classifier(name: str, trust_remote_code: bool, num_labels: int) -> tuple[Any, set[str]]:
    """As `_classifier`, from an adapter folder; a language model's adapter leaves the head random."""
    model, missing = _classifier(adapter_base(name), trust_remote_code, num_labels)
    if is_reward_adapter(name):
        model = merge_adapter(model, name, trust_remote_code)
        restore_records(model.config, name)
        return model, set() if HEAD_WEIGHT in load_peft_weights(name, device="cpu") else missing
    merged = load_causal_lm(name, dropout=True, trust_remote_code=trust_remote_code)
    fit_tokenizer(model, name, trust_remote_code)
    model.base_model.load_state_dict(merged.base_model.state_dict(), assign=True)
    return model.requires_grad_(True), {"score.weight"}


def load_classifier(
    name: str, num_labels: int = 1, dropout: bool = False, trust_remote_code: bool = False, nf4: bool = False
) -> tuple[Any, set[str]]:
    """A sequence classifier of any family, ready to be run, and which of its weights the folder lacks: its head's.

    Args:
        name: folder or hub id of a model, or folder of a PEFT adapter.
        num_labels: of its head.
        dropout: keep the dropout that the model's config asks for.
        trust_remote_code: allow the folder to run Python code of its own.
        nf4: hold the linear layers of the backbone in four bits.

    Raises:
        UserError: there is none.
    """
    options = nf4_options(name) if nf4 else {}
    if trust_remote_code:
        say_trusted(name)
    try:
        if is_adapter(name):
            model, missing = _adapted_classifier(name, trust_remote_code, num_labels)
        else:
            model, missing = _classifier(name, trust_remote_code, num_labels, **options)
    except Exception as e:
        raise UserError(f"no model with a scalar head could be loaded from '{name}': {reason_of(e)}") from e
    if has_unmerged_adapter(model):  # its base would stay frozen, its head random
        raise UserError(f"'{name}' is a PEFT adapter; download it and pass the folder")
    settle_nf4(model)
    keep_tables(model)
    train_every_row(model)
    if not dropout:
        disable_dropout(model)
    return model, missing


def check_linear_head(name: str, model: Any) -> None:
    """Refuse a classifier whose head is not linear in its last hidden states.

    Args:
        name: as it was loaded.
        model: the classifier.

    Raises:
        UserError: names both.
    """
    if not isinstance(getattr(model, HEAD, None), nn.Linear):
        raise UserError(
            f"'{name}' ({type(model).__name__}) has no linear head named '{HEAD}'; this family is not supported here"
        )


def give_own_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the pad token be one that is not the EOS: plain transformers reads scores at the last id that is no pad.

    Args:
        model: a classifier, which gets a further embedding where its tokens are all taken.
        tokenizer: changed, too.
    """
    embeddings: Any = model.get_input_embeddings()
    pad_id = own_pad_token(tokenizer, embeddings.num_embeddings)
    if pad_id >= embeddings.num_embeddings:
        widen_now(embeddings)
        model.resize_token_embeddings(pad_id + 1)
    model.config.pad_token_id = pad_id


def draw_head(head: nn.Linear, scale: float = 1.0) -> None:
    """Draw a fresh head with standard deviation 1/sqrt(D + 1), from the seed alone (Stiennon et al. 2020, B.1).

    Args:
        head: its weights are replaced, also where processes hold parts of them.
        scale: of that deviation.
    """
    # From a stream of its own, so that the head depends on the seed and not on what drew random numbers before.
    random, size = generator("cpu", torch.initial_seed(), "head"), (head.out_features, head.in_features)
    # The same numbers in every precision and on every device; Lightning loads models with theirs as the default.
    drawn = torch.randn(size, generator=random, dtype=torch.float32, device="cpu")
    with torch.no_grad(), gathered(head.weight):
        head.weight.copy_(drawn * (scale * (head.in_features + 1) ** -0.5))


def check_hides_padding(name: str, model: PreTrainedModel) -> None:
    """Refuse a classifier whose logits depend on padding: rows of several lengths are read at once.

    Where it cannot be tried, that is said.

    Args:
        name: as it was loaded.
        model: the classifier; every process must test it.

    Raises:
        UserError: they do.
    """
    if model.device.type == "meta":  # only planned with
        return
    sharded = RuntimeError("its weights are spread over processes")
    found = sharded if is_sharded(model) else self_test(model, partial(_hides_padding, model))
    if isinstance(found, Exception):
        reason = " ".join(str(found).split())[:200]
        rank_zero_warn(f"it was not tried whether padding changes what '{name}' says of a text: {reason}")
    if found is False:
        raise UserError(
            f"'{name}' ({type(model).__name__}) gives a text other logits where padding stands behind it, so it cannot "
            "score rows of several lengths at once; score by a function that runs it row by row"
        )


def _hides_padding(model: Any) -> bool:
    short = dummy_tokens(model, _SHORT).unsqueeze(0)  # [1, T]
    padded = torch.full((1, _LONG), model.config.pad_token_id, device=short.device)
    padded[:, :_SHORT] = short
    mask = torch.zeros_like(padded)
    mask[:, :_SHORT] = 1
    alone = model(input_ids=short, attention_mask=torch.ones_like(short)).logits.float()
    beside = model(input_ids=padded, attention_mask=mask).logits.float()
    return not bool((alone - beside).norm() > typical_tolerance(model) * alone.norm())  # NaN is not judged here


class Classifier(nn.Module):
    """A classifier as transformers runs it, and one score of its raw logits: their weighted sum.

    It stands where a `ScalarLM` does that scores whole sequences, and knows no calibration and no scores of tokens.

    Args:
        model: a sequence classifier.
        weights: of its logits, K numbers.
        has_types: whether the second text of a pair has the token type 1.

    Raises:
        UserError: its config names no pad token, so that it cannot read rows of several lengths.
    """

    ensemble = None

    def __init__(self, model: PreTrainedModel, weights: Sequence[float], has_types: bool = False) -> None:
        super().__init__()
        self.model: Any = model
        self.weights = tuple(weights)
        self.has_types = has_types
        self.combination: ScoreCombination = "mean"
        if model.config.pad_token_id is None:
            raise UserError(f"'{model.config.name_or_path}' names no pad_token_id; set it in its config.json")

    @property
    def context(self) -> int | None:
        """Most tokens of a sequence; None for no limit."""
        context = context_length(self.model.config)
        before = getattr(getattr(self.model.base_model, "embeddings", None), "padding_idx", None)
        # RoBERTa and its like count the first token as the place after that of padding.
        return context if context is None or before is None else context - before - 1

    @property
    def calibration(self) -> Calibration:
        """None: mean 0 and standard deviation 1."""
        return Calibration()

    def probe_error(self) -> float:
        """Nothing is known of when it was saved: 0."""
        return 0.0

    def scores(self, input_ids: Tensor, attention_mask: Tensor, starts: Tensor | None = None) -> Tensor:
        """Weighted sum of the raw logits of each sequence, `[B]`, float32.

        Args:
            input_ids: `[B, T]`, int64.
            attention_mask: True for real tokens, `[B, T]`, bool, padded on the right.
            starts: where the second text of each pair begins, `[B]`, int64; None for single texts.
        """
        # Decoders look for the last id that is no pad.
        ids = input_ids.masked_fill(~attention_mask, self.model.config.pad_token_id)
        options = {}
        if self.has_types and starts is not None:
            places = torch.arange(ids.shape[1], device=ids.device)
            options["token_type_ids"] = (places >= starts.unsqueeze(1)).long() * attention_mask
        logits: Tensor = self.model(input_ids=ids, attention_mask=attention_mask.long(), **options).logits.float()
        return logits @ torch.tensor(self.weights, dtype=logits.dtype, device=logits.device)


class PairReader:
    """Writes a prompt and a response as the two texts that an encoder's tokenizer takes, in the place of a template.

    The first text is the prompt as people read it: what a single turn of the user says, several turns with their
    speakers. Nothing marks a response that was cut.

    Args:
        tokenizer: of the classifier.

    Attributes:
        prefix: what every sequence begins with.
        between: what stands between the two texts.
        has_types: see `Classifier`.

    Raises:
        UserError: its tokenizer is a slow one, or gives pairs another form than is known here.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        if not tokenizer.is_fast:
            raise UserError(f"'{tokenizer.name_or_path}' has no tokenizer.json, which pairs of texts need; convert it")
        said = tokenizer(["a"], ["b"])
        ids, numbers = said.input_ids[0], self._texts(said)
        self.prefix: list[int] = ids[: numbers.index(0)]
        second = numbers.index(1)
        self.between: list[int] = ids[numbers.index(0) + numbers.count(0) : second]
        types = [int(kind) for kind in said.get("token_type_ids", [[]])[0]]
        self.has_types = any(types)
        if types and types != [int(self.has_types and place >= second) for place in range(len(types))]:
            raise UserError(f"'{tokenizer.name_or_path}' gives pairs of texts token types of an unknown form")

    def _texts(self, said: Any) -> list[int]:
        """Of each token the number of its text, -1 of what stands around them."""
        return [-1 if number is None else number for number in said.sequence_ids(0)]

    def encode_dialogue(
        self, prompt: Prompt, response: str, tools: Sequence[dict[str, Any]] = (), ended: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids up to the response, and from there on; of one without text, from where the token type is 1.

        Args:
            prompt: text, or messages.
            response: what was said.
            tools: stand in no pair of texts.
            ended: likewise.
        """
        # Given as lists: a single response that is empty would be taken for no second text.
        said = self.tokenizer([WrittenPrompt(prompt).text], [response], verbose=False)
        numbers = self._texts(said)
        start = numbers.index(1) if 1 in numbers else len(numbers)
        if self.has_types:
            start = [*map(int, said["token_type_ids"][0]), 1].index(1)
        ids = np.asarray(said.input_ids[0], dtype=np.int64)
        return ids[:start], ids[start:]
