"""Where a score comes from: a reward model with the policy's tokenizer, one with its own, or a Python function."""

from __future__ import annotations

import os
import re
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.reward_functions import RewardFunction, ScoringFunction, import_function, names_function
from rlhf_lightning.models.scalar_lm import ScalarLM, check_reward_model, load_reward_model
from rlhf_lightning.models.tokenizer import filler_id, load_tokenizer, same_tokenizer


class Responses(NamedTuple):
    """Responses to be scored, as ids and as text.

    Attributes:
        sequences: prompts (padded on the left) and responses (padded on the right), `[B, P + R]`, int64.
        sequence_mask: True for real tokens, `[B, P + R]`, bool.
        ended: True where the response ended by itself, `[B]`, bool.
        prompts: text of each prompt, without special tokens.
        responses: text of each response, without special tokens.
        row_ids: number of each prompt's row in its source, `[B]`, int64; named in error messages.
    """

    sequences: Tensor
    sequence_mask: Tensor
    ended: Tensor
    prompts: list[str]
    responses: list[str]
    row_ids: Tensor | None = None


class Scorer(Protocol):
    """Anything that scores responses."""

    def __call__(self, batch: Responses) -> Tensor:
        """Return one score per response, `[B]`, float32."""


class ModelScorer(nn.Module):
    """A frozen reward model that reads the policy's ids.

    Args:
        model: the reward model.
    """

    def __init__(self, model: ScalarLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Responses) -> Tensor:
        """Calibrated score at the last real token, `[B]`."""
        return self.model.scores(batch.sequences, batch.sequence_mask)


class TextScorer(nn.Module):
    """A frozen reward model with a tokenizer of its own: responses are handed over as text.

    Args:
        model: the reward model.
        tokenizer: the reward model's tokenizer.
    """

    def __init__(self, model: ScalarLM, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer

    def encode(self, prompt: str, response: str, ended: bool) -> list[int]:
        """Ids as in reward training: prompt, then response, EOS only where the response ended by itself."""
        ids: list[int] = self.tokenizer(prompt).input_ids
        if ids and ids[-1] == self.tokenizer.eos_token_id:  # some tokenizers close every text they are given
            ids = ids[:-1]
        ids = ids + self.tokenizer(response, add_special_tokens=False).input_ids
        return [*ids, self.tokenizer.eos_token_id] if ended else ids

    def forward(self, batch: Responses) -> Tensor:
        """Calibrated score at the last real token, `[B]`."""
        device = batch.sequences.device
        texts = zip(batch.prompts, batch.responses, batch.ended.tolist(), strict=True)
        rows = [self.encode(prompt, response, ended) for prompt, response, ended in texts]
        lengths = torch.tensor([len(row) for row in rows], device=device)
        ids = nn.utils.rnn.pad_sequence(
            [torch.tensor(row, device=device) for row in rows],
            batch_first=True,
            padding_value=filler_id(self.tokenizer),
        )
        return self.model.scores(ids, torch.arange(ids.shape[1], device=device) < lengths.unsqueeze(1))


class FunctionScorer:
    """A Python function of prompt and response texts.

    Args:
        function: `(prompts, responses) -> scores`.
        name: how error messages call it.
        timeout: seconds that one call may take; None for no limit.
    """

    def __init__(self, function: RewardFunction, name: str, timeout: float | None = None) -> None:
        self.function = ScoringFunction(function, name, timeout)

    def __call__(self, batch: Responses) -> Tensor:
        """Scores of the function, `[B]`, float32.

        Raises:
            UserError: the function did not return one number per response.
        """
        rows = range(len(batch.responses)) if batch.row_ids is None else batch.row_ids.tolist()
        messages = [[{"role": "user", "content": prompt}] for prompt in batch.prompts]
        scores = self.function(batch.prompts, batch.responses, messages, rows)
        return torch.tensor(scores, dtype=torch.float32, device=batch.sequences.device)


def find_reward(reward: str | RewardFunction, timeout: float | None = None) -> FunctionScorer | str:
    """The function that `reward` names, or the folder or hub id of a reward model; quick, no weights are read.

    Args:
        reward: folder or hub id of a reward model, import path of a function, or the function itself.
        timeout: seconds that one call of a function may take; None for no limit.

    Raises:
        UserError: it names neither, or not what could be a reward.
    """
    if timeout is not None and timeout <= 0:
        raise UserError(f"reward_timeout ({timeout:g}) must be above 0, in seconds")
    if not isinstance(reward, str):
        return FunctionScorer(reward, getattr(reward, "__name__", type(reward).__name__), timeout)
    if names_function(reward) and ".py" not in reward:
        return FunctionScorer(import_function(reward), reward, timeout)
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
    return check_reward_model(reward)


def load_scorer(
    reward: str | RewardFunction,
    policy_tokenizer: PreTrainedTokenizerBase,
    trust_remote_code: bool = False,
    nf4: bool = False,
    timeout: float | None = None,
) -> ModelScorer | TextScorer | FunctionScorer:
    """Make the scorer that `reward` names.

    Args:
        reward: folder or hub id of a reward model, import path of a function, or the function itself.
        policy_tokenizer: decides whether a reward model can read the policy's ids.
        trust_remote_code: allow the folder to run Python code of its own.
        nf4: hold a reward model's linear layers in four bits.
        timeout: seconds that one call of a function may take; None for no limit.

    Raises:
        UserError: it names neither.
    """
    found = find_reward(reward, timeout)
    if isinstance(found, FunctionScorer):
        return found
    model = load_reward_model(found, trust_remote_code=trust_remote_code, nf4=nf4)
    tokenizer = load_tokenizer(found, trust_remote_code)
    return ModelScorer(model) if same_tokenizer(policy_tokenizer, tokenizer) else TextScorer(model, tokenizer)
