"""Where a score comes from: a reward model with the policy's tokenizer, one with its own, or a Python function."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.scalar_lm import ScalarLM, load_reward_model
from rlhf_lightning.models.tokenizer import filler_id, load_tokenizer, same_tokenizer

RewardFunction = Callable[[list[str], list[str]], Sequence[float]]
"""`(prompts, responses) -> scores`, one float per response."""


class Responses(NamedTuple):
    """Responses to be scored, as ids and as text.

    Attributes:
        sequences: prompts (padded on the left) and responses (padded on the right), `[B, P + R]`, int64.
        sequence_mask: True for real tokens, `[B, P + R]`, bool.
        ended: True where the response ended by itself, `[B]`, bool.
        prompts: text of each prompt, without special tokens.
        responses: text of each response, without special tokens.
    """

    sequences: Tensor
    sequence_mask: Tensor
    ended: Tensor
    prompts: list[str]
    responses: list[str]


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
    """

    def __init__(self, function: RewardFunction, name: str) -> None:
        self.function = function
        self.name = name

    def __call__(self, batch: Responses) -> Tensor:
        """Scores of the function, `[B]`, float32.

        Raises:
            UserError: the function did not return one number per response.
        """
        scores = list(self.function(batch.prompts, batch.responses))
        if len(scores) != len(batch.responses):
            raise UserError(
                f"reward function '{self.name}' returned {len(scores)} scores for {len(batch.responses)} responses"
            )
        return torch.tensor([float(s) for s in scores], dtype=torch.float32, device=batch.sequences.device)


def import_function(path: str) -> RewardFunction | None:
    """Import `package.module.function` or `package.module:function`; None where the string is no such path.

    Args:
        path: an import path.

    Raises:
        UserError: the module exists but has no such function.
    """
    module_name, _, name = path.replace(":", ".").rpartition(".")
    if not module_name or "/" in path or not all(part.isidentifier() for part in [*module_name.split("."), name]):
        return None
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        if e.name is not None and (module_name == e.name or module_name.startswith(e.name + ".")):
            return None
        raise UserError(f"reward function '{path}' cannot be imported: {e}") from e
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"reward function '{path}' not found: module '{module_name}' has no function '{name}'")
    return function


def load_scorer(
    reward: str | RewardFunction,
    policy_tokenizer: PreTrainedTokenizerBase,
    trust_remote_code: bool = False,
    nf4: bool = False,
) -> ModelScorer | TextScorer | FunctionScorer:
    """Make the scorer that `reward` names.

    Args:
        reward: folder or hub id of a reward model, import path of a function, or the function itself.
        policy_tokenizer: decides whether a reward model can read the policy's ids.
        trust_remote_code: allow the folder to run Python code of its own.
        nf4: hold a reward model's linear layers in four bits.

    Raises:
        UserError: it names neither.
    """
    if not isinstance(reward, str):
        return FunctionScorer(reward, getattr(reward, "__name__", repr(reward)))
    if not os.path.isdir(reward) and (function := import_function(reward)) is not None:
        return FunctionScorer(function, reward)
    if not os.path.isdir(reward) and "/" not in reward:
        raise UserError(
            f"reward '{reward}' is neither a reward model folder nor the import path of a function "
            "(a module on PYTHONPATH, like `my_rewards.politeness`)"
        )
    model = load_reward_model(reward, trust_remote_code=trust_remote_code, nf4=nf4)
    tokenizer = load_tokenizer(reward, trust_remote_code)
    return ModelScorer(model) if same_tokenizer(policy_tokenizer, tokenizer) else TextScorer(model, tokenizer)
