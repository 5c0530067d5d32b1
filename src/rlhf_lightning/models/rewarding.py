"""Where a score comes from: a reward model with the policy's tokenizer, one with its own, or a Python function."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.chat.encoder import ChatEncoder, DialogueFormat
from rlhf_lightning.chat.spacing import Spacing
from rlhf_lightning.errors import UserError
from rlhf_lightning.forward.backbone import HEAD
from rlhf_lightning.models.classifiers import Classifier, PairReader, check_hides_padding
from rlhf_lightning.models.rendering import recorded_chat
from rlhf_lightning.models.reward_endpoints import RewardEndpoint
from rlhf_lightning.models.reward_functions import RewardFunction, ScoringFunction, import_function, names_function
from rlhf_lightning.models.scalar_lm import CALIBRATION, ScalarLM, as_scalar, check_reward_model, load_weighed
from rlhf_lightning.models.scorers import (
    FunctionScorer,
    ModelScorer,
    Scorer,
    TextScorer,
)
from rlhf_lightning.models.tokenizer import load_tokenizer, same_tokenizer


def find_reward(
    reward: str | RewardEndpoint | RewardFunction,
    timeout: float | None = None,
    weights: Mapping[str, float] | None = None,
) -> ScoringFunction | RewardEndpoint | str:
    """The function that `reward` names, or the folder or hub id of a reward model; quick, no weights are read.

    Args:
        reward: folder or hub id of a reward model, import path of a function, the function itself, or an endpoint.
        timeout: seconds that one call of a function may take; None for no limit.
        weights: what the labels of a reward model count; None where it has one.

    Raises:
        UserError: it names neither, or not what could be a reward.
    """
    if not isinstance(reward, str) and not callable(reward):
        raise UserError(
            f"reward is a {type(reward).__name__}: give the folder or hub id of a reward model, the import path of a "
            "function, a function, or a RewardEndpoint"
        )
    if weights is not None and not (isinstance(reward, str) and not is_function(reward)):
        what = "an endpoint" if isinstance(reward, RewardEndpoint) else "a function"
        raise UserError(f"reward_weights are for the labels of a reward model, and '{_named(reward)}' is {what}")
    if isinstance(reward, RewardEndpoint):
        if timeout is not None:
            raise UserError(f"reward_timeout is a limit for functions; {reward.name} has a timeout of its own")
        return reward
    if not isinstance(reward, str):
        return ScoringFunction(reward, _named(reward), timeout)
    if is_function(reward):
        return ScoringFunction(import_function(reward), reward, timeout)
    if "<" in reward:  # what a checkpoint holds of it
        raise UserError(f"reward was '{reward}', which cannot be imported: pass reward to load_from_checkpoint")
    if not os.path.isdir(reward) and re.search(r"\.py\b", reward):
        raise UserError(
            f"reward '{reward}' names a file: name the function in it, like `my_rewards.politeness` for my_rewards.py "
            "in the working folder or on PYTHONPATH"
        )
    if not os.path.isdir(reward) and "/" not in reward:
        raise UserError(
            f"reward '{reward}' is neither a reward model folder nor the import path of a function "
            "(a module in the working folder or on PYTHONPATH, like `my_rewards.politeness`)"
        )
    if timeout is not None:
        raise UserError(f"reward_timeout is a limit for functions, and '{reward}' is a reward model; leave it out")
    return check_reward_model(reward, weights)


def is_function(reward: str | RewardEndpoint | RewardFunction) -> bool:
    """Whether a reward is, or could name, a function rather than a model.

    Args:
        reward: as for `find_reward`.
    """
    if isinstance(reward, str):
        return names_function(reward) and ".py" not in reward
    return not isinstance(reward, RewardEndpoint)


def _named(reward: str | RewardEndpoint | RewardFunction) -> str:
    if isinstance(reward, RewardEndpoint):
        return reward.url
    return reward if isinstance(reward, str) else getattr(reward, "__name__", type(reward).__name__)


def load_scorer(
    reward: str | RewardEndpoint | RewardFunction,
    policy_chat: ChatEncoder,
    trust_remote_code: bool = False,
    nf4: bool = False,
    timeout: float | None = None,
    weights: Mapping[str, float] | None = None,
) -> ModelScorer | TextScorer | FunctionScorer:
    """Make the scorer that `reward` names.

    Args:
        reward: folder or hub id of a reward model, import path of a function, the function itself, or an endpoint.
        policy_chat: writes dialogues as the policy reads them; decides whether a reward model can read the same ids.
        trust_remote_code: allow the folder to run Python code of its own.
        nf4: hold a reward model's linear layers in four bits.
        timeout: seconds that one call of a function may take; None for no limit.
        weights: as for `find_reward`.

    Raises:
        UserError: it names neither.
    """
    found = find_reward(reward, timeout, weights)
    if not isinstance(found, str):
        return FunctionScorer(found, Spacing.of(policy_chat))
    model, chat = load_reader(found, trust_remote_code, nf4, weights)
    if isinstance(model, Classifier):
        return TextScorer(model, chat, Spacing.of(policy_chat))
    assert isinstance(chat, ChatEncoder)
    return model_scorer(model, chat, policy_chat)


def load_reader(
    name: str,
    trust_remote_code: bool = False,
    nf4: bool = False,
    weights: Mapping[str, float] | None = None,
) -> tuple[ScalarLM | Classifier, ChatEncoder | PairReader]:
    """A reward model of any family, and what writes dialogues for it.

    Args:
        name: folder or hub id.
        trust_remote_code: allow the folder to run Python code of its own.
        nf4: hold its linear layers in four bits.
        weights: as for `find_reward`.

    Raises:
        UserError: as for `load_reward_model`.
    """
    found, model, logits = load_weighed(name, trust_remote_code=trust_remote_code, nf4=nf4, weights=weights)
    tokenizer = load_tokenizer(found, trust_remote_code)
    if isinstance(getattr(model, HEAD, None), nn.Linear):
        scalar = as_scalar(found, model, logits)
        return scalar, reward_chat(scalar, tokenizer)
    logits = logits or [1.0]
    classifier = Classifier(model, logits)
    check_hides_padding(found, model)
    if tokenizer.chat_template:
        return classifier, reward_chat(classifier, tokenizer)
    rank_zero_info(f"'{found}' ({type(model).__name__}) reads a prompt and a response as a pair of texts")
    pairs = PairReader(tokenizer)
    classifier.has_types = pairs.has_types
    return classifier, pairs


def model_scorer(model: ScalarLM, chat: ChatEncoder, policy_chat: ChatEncoder) -> ModelScorer | TextScorer:
    """What scores by a reward model: the policy's ids if they are those of its training, otherwise the texts anew.

    Args:
        model: the reward model.
        chat: writes dialogues as it reads them, from `reward_chat`.
        policy_chat: writes dialogues as the policy reads them.
    """
    same_ids = same_tokenizer(policy_chat.tokenizer, chat.tokenizer)
    if same_ids and _writing(chat) == _writing(policy_chat):
        return ModelScorer(model)
    return TextScorer(model, chat, Spacing.of(policy_chat), same_ids)


def shared_scalar(scorer: Scorer) -> ScalarLM | None:
    """The reward model that reads the policy's tokens, so that a value model can begin as it; None for no such.

    Args:
        scorer: any.
    """
    if isinstance(scorer, TextScorer):
        return scorer.model if scorer.same_ids and isinstance(scorer.model, ScalarLM) else None
    return scorer.model if isinstance(scorer, ModelScorer) else None


def _writing(chat: ChatEncoder) -> dict[str, Any]:
    """All that decides which text a dialogue becomes, and how it begins."""
    said = {name: value for name, value in chat.describe().items() if not name.startswith("tokenizer")}
    if said["template_hash"] is None:
        said["dialogue_format"] = "plain"  # as is all that is not refused, where there is no template
    return said | {"prefix": chat.prefix}


def reward_chat(model: ScalarLM | Classifier, tokenizer: PreTrainedTokenizerBase) -> ChatEncoder:
    """What writes dialogues as in a reward model's training.

    Args:
        model: its config may record how; if not, that is said in one line and guessed. One of this package without the
            record is older than it, and was trained with the default of the data modules; one of others reads every
            prompt through its template, or plain dialogues if there is none.
        tokenizer: its own.

    Raises:
        UserError: a record that says nothing sound.
    """
    if recorded := recorded_chat(model.model.config, tokenizer):
        return recorded
    name = model.model.config.name_or_path
    ours = getattr(model.model.config, CALIBRATION, None) is not None
    guess: DialogueFormat = "plain" if not tokenizer.chat_template else "auto" if ours else "chat_template"
    how = "in the plain Human and Assistant format" if guess == "plain" else "by its tokenizer's chat template"
    rank_zero_info(f"reward model '{name}' does not record how its dialogues were written; they are written {how}")
    return ChatEncoder(tokenizer, guess)
