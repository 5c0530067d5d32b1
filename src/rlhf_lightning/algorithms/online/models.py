"""Policy, reference, reward and, in PPO, value model, in as little memory as the settings allow.

What is frozen is held once. In full fine-tuning the reference is a copy of the policy, and the value model one of the
reward model. With LoRA, policy and reference share all weights but the policy's adapter, and so do value model and
reward model; a reward model that is itself an adapter on the policy's base shares the policy's weights, so one base
carries all four. A value head on the policy's own hidden states (`value_trunk: policy`) needs no model at all.

Notation: B batch, P padded prompt length, R padded response length, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_lightning.arguments import Range, check_arguments
from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.errors import UserError
from rlhf_lightning.forward.hidden import ResponseRows, response_hidden
from rlhf_lightning.forward.output_layer import logprobs_from_hidden
from rlhf_lightning.functional import PerToken, ScoreCombination
from rlhf_lightning.models.causal_lm import freeze, load_causal_lm
from rlhf_lightning.models.finetune import choose_trained
from rlhf_lightning.models.finetune_settings import FineTune
from rlhf_lightning.models.folders import check_model_folder, same_model
from rlhf_lightning.models.heads import has_heads, linear_in_float32
from rlhf_lightning.models.labels import labels_of
from rlhf_lightning.models.lora import add_adapter
from rlhf_lightning.models.other_rewards import MAIN, OtherReward, OtherScorers
from rlhf_lightning.models.reward_endpoints import LoggedEndpoint, RewardEndpoint
from rlhf_lightning.models.reward_functions import RewardFunction
from rlhf_lightning.models.rewarding import (
    find_reward,
    is_function,
    load_scorer,
    model_scorer,
    reward_chat,
    shared_scalar,
)
from rlhf_lightning.models.scalar_lm import (
    ScalarLM,
    attach_reward_adapter,
    check_reward_model,
    has_reward_head,
    load_reward_model,
    new_scalar_lm,
    response_values,
    reward_adapter_base,
)
from rlhf_lightning.models.scorers import FunctionScorer, ModelScorer, TextScorer, give_along
from rlhf_lightning.models.sharing import copied_or_shared, load_reference, scalar_beside, zero_head
from rlhf_lightning.models.token_rewards import TokenRewards
from rlhf_lightning.models.tokenizer import load_tokenizer
from rlhf_lightning.training.sharded import is_sharded, never_widen

ValueTrunk = Literal["own", "policy"]
FrozenDtype = Literal["auto", "float32", "bfloat16", "float16", "nf4"]


class TrunkValue(nn.Module):
    """A value head on the policy's hidden states; says 0 at first.

    Args:
        hidden_size: D.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.score = zero_head(hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """Values from hidden states: `[..., D]` to `[...]`, float32."""
        return linear_in_float32(self.score, hidden).squeeze(-1)


class OnlineModels(NamedTuple):
    """Everything that an online algorithm computes with.

    Attributes:
        policy: is trained.
        reference: the policy as it was at first, or the model that was named, frozen.
        value: is trained; None where an algorithm has none.
        scorer: gives responses their scores; frozen, if it is a model.
        others: give them further scores; frozen likewise.
    """

    policy: PreTrainedModel
    reference: PreTrainedModel
    value: ScalarLM | TrunkValue | None
    scorer: ModelScorer | TextScorer | FunctionScorer
    others: OtherScorers


@dataclass(frozen=True)
class ModelSource:
    """Where the models come from.

    Args:
        policy: folder or hub id of the language model.
        reward: folder or hub id of a reward model, import path of a function, or the function itself.
        value: folder or hub id of the reward model that the value model starts from; None for that of `reward`, or a
            fresh head that says 0 where there is none.
        finetune: which weights are trained.
        value_trunk: `own` for a value model of its own, `policy` for a head on the policy's hidden states, None for no
            value model.
        frozen_dtype: type that frozen weights are held in; `auto` for that of the policy, `nf4` for four bits.
        trust_remote_code: allow the folders to run Python code of their own.
        reward_timeout: seconds that one call of a reward function may take; None for no limit.
        reference: folder or hub id of the reference; None for the policy as it is at first.
        others: rewards beside the main one, by name.
        reward_combination: what becomes of the scores of a reward model with several heads.
        reward_weights: what the labels of the reward model count; None where it has one.
        per_token: give those of the main one along the responses; None for their ends.
        step_end: text at whose ends they are given; None for every token.
    """

    policy: str
    reward: str | RewardEndpoint | RewardFunction
    value: str | None = None
    finetune: FineTune = FineTune()
    value_trunk: ValueTrunk | None = "own"
    frozen_dtype: FrozenDtype = "auto"
    trust_remote_code: bool = False
    reward_timeout: float | None = None
    reference: str | None = None
    others: Mapping[str, OtherReward] = field(default_factory=dict)
    reward_combination: ScoreCombination = "mean"
    reward_weights: Mapping[str, float] | None = None
    per_token: PerToken | None = None
    step_end: str | None = None

    def __post_init__(self) -> None:
        check_arguments(ModelSource, vars(self), {"reward_weights": Range()})
        if self.value_trunk == "policy" and self.value is not None:
            raise UserError("value_trunk: policy has no weights of its own, so value_name_or_path must be null")
        if self.finetune.mode == "lora" and self.finetune.dropout:
            raise UserError("finetune.dropout must be 0 here: old and new log-probabilities would not compare")
        if self.frozen_dtype == "nf4" and self.finetune.mode != "lora":
            raise UserError(
                f"frozen_dtype nf4 needs finetune.mode lora, not {self.finetune.mode}: a reference in four bits would "
                "not be the model that the policy starts from"
            )
        if self.frozen_dtype == "nf4" and self.finetune.export != "adapter":
            raise UserError("frozen_dtype nf4 needs finetune.export adapter: nothing can be merged into four bits")

    def check(self) -> None:
        """See that everything named is there, before minutes go into data; quick, no weights are read.

        Raises:
            UserError: a folder, module or function is missing or cannot serve.
        """
        for name in (self.policy, self.reference or self.policy):
            check_model_folder(name)
        if self.value is not None:
            self._check_value(self.value)
        models = self.reward_models  # looks for all of them
        if functions := [name for name in self.along if name not in models]:
            raise UserError(
                f"per_token of reward '{functions[0]}' is for reward models: a function that scores tokens has a "
                "parameter named token_ids instead"
            )
        found = models.get(MAIN)
        if self.reward_combination != "mean" and not (found and has_heads(found)):
            what = f"'{found}' has one" if found else "reward is a function"
            raise UserError(
                f"reward_combination {self.reward_combination} is for a reward model with several heads, and {what}: "
                "set it to mean, or train one with num_heads"
            )

    def _weights_of(self, value: str) -> Mapping[str, float] | None:
        """What the labels count of what the value model starts from: as where the same model is the reward."""
        return self.reward_weights if isinstance(self.reward, str) and same_model(value, self.reward) else None

    def _check_value(self, value: str) -> None:
        weights = self._weights_of(value)
        if weights is None and has_reward_head(value) and (count := len(labels_of(check_model_folder(value)))) > 1:
            raise UserError(
                f"value_name_or_path '{value}' is a classifier with {count} labels, and a value model has one: name "
                "one of one label, or the model that reward names too, whose labels reward_weights weighs"
            )
        check_reward_model(value, weights)

    @property
    def along(self) -> dict[str, tuple[PerToken, str | None]]:
        """Kind and ends of steps of the models whose scores are given along the responses, by name."""
        asked: dict[str, tuple[PerToken | None, str | None]] = {MAIN: (self.per_token, self.step_end)}
        asked |= {name: (other.per_token, other.step_end) for name, other in self.others.items()}
        return {name: (kind, end) for name, (kind, end) in asked.items() if kind is not None}

    @property
    def rewards(self) -> dict[str, str | RewardEndpoint | RewardFunction]:
        """All that give scores, by name, the main one first."""
        return {MAIN: self.reward, **{name: other.reward for name, other in self.others.items()}}

    @property
    def reward_models(self) -> dict[str, str]:
        """Folder or hub id of those that are models, by name."""
        found = {
            name: find_reward(reward, self._timeout(reward), self._weights(name))
            for name, reward in self.rewards.items()
        }
        return {name: reward for name, reward in found.items() if isinstance(reward, str)}

    def _weights(self, name: str) -> Mapping[str, float] | None:
        return self.reward_weights if name == MAIN else self.others[name].reward_weights

    def _timeout(self, reward: str | RewardEndpoint | RewardFunction) -> float | None:
        """The time limit of a reward; models have none, and where all are models it is refused."""
        all_models = not any(map(is_function, self.rewards.values()))
        return self.reward_timeout if is_function(reward) or all_models else None

    def load(self, chat: ChatEncoder) -> OnlineModels:
        """Load all models.

        Args:
            chat: writes dialogues as the policy reads them, with the policy's tokenizer.

        Raises:
            UserError: a model is missing or does not fit.
        """
        trust = self.trust_remote_code
        policy = load_causal_lm(self.policy, trust_remote_code=trust, nf4=self._nf4)
        choose_trained(policy, self.finetune)
        reference = load_reference(policy, self.policy, self.reference, chat.tokenizer, trust, self._nf4)
        value, scorer = self._value_and_scorer(policy, chat)
        others = OtherScorers({name: self._other(name, chat) for name in self.others})
        for name, (kind, step_end) in self.along.items():
            reader = scorer if name == MAIN else others.by_name()[name]
            give_along(reader, TokenRewards(kind, step_end, chat.tokenizer), name)
        if isinstance(value, ScalarLM):
            value.ensemble = None  # it goes on from their mean
        if not isinstance(scorer, FunctionScorer):
            scorer.model.combination = self.reward_combination
        frozen = [model for model in (reference, scorer, *others.models.values()) if isinstance(model, nn.Module)]
        for model in frozen:
            freeze(model)
        if self.frozen_dtype not in ("auto", "nf4"):
            dtype = getattr(torch, self.frozen_dtype)
            for model in frozen:
                never_widen(model.to(dtype))
            for weight in policy.parameters():  # those that no reference shares
                if not weight.requires_grad:
                    weight.data = weight.data.to(dtype)
                    never_widen(weight)
        add_adapter(policy, self.finetune)
        return OnlineModels(policy, reference, value, scorer, others)

    def _scorer(self, name: str, chat: ChatEncoder) -> ModelScorer | TextScorer | FunctionScorer:
        reward = self.rewards[name]
        timeout, weights = self._timeout(reward), self._weights(name)
        return load_scorer(reward, chat, self.trust_remote_code, self._nf4, timeout, weights)

    def _other(self, name: str, chat: ChatEncoder) -> ModelScorer | TextScorer | FunctionScorer:
        scorer, other = self._scorer(name, chat), self.others[name]
        if other.may_lack and isinstance(scorer, FunctionScorer) and isinstance(scorer.function, RewardEndpoint):
            scorer.function = LoggedEndpoint(scorer.function)
        return scorer

    @property
    def starts_at_reference(self) -> bool:
        """Whether the policy is at first what it is held near."""
        return self.reference is None or same_model(self.reference, self.policy)

    def _value_and_scorer(
        self, policy: PreTrainedModel, chat: ChatEncoder
    ) -> tuple[ScalarLM | TrunkValue | None, ModelScorer | TextScorer | FunctionScorer]:
        trust, beside = self.trust_remote_code, self._is_adapter_of(policy)
        if beside:
            frozen = self._beside(policy)
            own = load_tokenizer(str(self.reward), trust)
            scorer: ModelScorer | TextScorer | FunctionScorer = model_scorer(frozen, reward_chat(frozen, own), chat)
        else:
            scorer = self._scorer(MAIN, chat)
        if self.value_trunk is None:
            return None, scorer
        if self.value_trunk == "policy":
            return TrunkValue(policy.get_output_embeddings().in_features), scorer
        if self.value is None and beside:
            return self._beside(policy, trainable=True), scorer
        if self.value is not None:
            value = load_reward_model(
                self.value, trust_remote_code=trust, nf4=self._nf4, weights=self._weights_of(self.value)
            )
        elif (shared := shared_scalar(scorer)) is not None:
            value = shared
        elif self.finetune.mode == "lora":
            value = scalar_beside(policy)
        else:
            value = new_scalar_lm(self.policy, head="zero", trust_remote_code=trust)
        choose_trained(value.model, self.finetune)
        if not isinstance(scorer, FunctionScorer) and value is scorer.model:
            ensemble, value.ensemble = value.ensemble, None
            scorer.model = copied_or_shared(value) or load_reward_model(
                str(self.reward), trust_remote_code=trust, weights=self.reward_weights
            )
            scorer.model.ensemble = ensemble
        add_adapter(value.model, self.finetune, "value")
        return value, scorer

    def _beside(self, policy: PreTrainedModel, trainable: bool = False) -> ScalarLM:
        """The reward model's adapter on the policy's weights."""
        model = scalar_beside(policy).model
        return attach_reward_adapter(model, str(self.reward), trainable, weights=self.reward_weights)

    @property
    def _nf4(self) -> bool:
        return self.frozen_dtype == "nf4"

    def _is_adapter_of(self, policy: PreTrainedModel) -> bool:
        """Whether the reward model is an adapter on the weights that the policy's adapter stands beside."""
        if self.finetune.mode != "lora" or not isinstance(self.reward, str) or is_sharded(policy):
            return False
        base = reward_adapter_base(self.reward)
        return base is not None and same_model(base, self.policy)


def logprobs_and_values(
    policy: PreTrainedModel,
    value: ScalarLM | TrunkValue | None,
    sequences: Tensor,
    sequence_mask: Tensor,
    response_mask: Tensor,
    temperature: float = 1.0,
    with_entropy: bool = False,
    rows: ResponseRows | None = None,
    policy_rests: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """What policy and value model say of responses; one pass for both where they share the trunk.

    Args:
        policy: the policy.
        value: the value model, or a head on the policy's hidden states; None for values of 0.
        sequences: prompts padded on the left, then responses padded on the right, `[B, P + R]`, int64.
        sequence_mask: True for real tokens, `[B, P + R]`, bool.
        response_mask: True for response tokens, `[B, R]`, bool.
        temperature: the sampling temperature.
        with_entropy: also compute the entropy of each prediction.
        rows: the same sequences, as they are to go through the models; None for each by itself.
        policy_rests: leave the policy without a gradient.

    Returns:
        Log-probabilities, entropies (0 unless asked for) and values, each `[B, R]`, float32, 0 after the last token.
    """
    with torch.no_grad() if policy_rests else nullcontext():
        hidden = response_hidden(policy, sequences, sequence_mask, response_mask.shape[1], rows)
        logprobs, entropies = logprobs_from_hidden(policy, hidden, sequences, response_mask, temperature, with_entropy)
    if isinstance(value, TrunkValue):
        return logprobs, entropies, torch.where(response_mask, value(hidden), 0)
    return logprobs, entropies, values_alone(policy, value, sequences, sequence_mask, response_mask, rows)


def values_alone(
    policy: PreTrainedModel,
    value: ScalarLM | TrunkValue | None,
    sequences: Tensor,
    sequence_mask: Tensor,
    response_mask: Tensor,
    rows: ResponseRows | None = None,
) -> Tensor:
    """The values of `logprobs_and_values`, `[B, R]`; arguments as there."""
    if value is None:
        return torch.zeros(response_mask.shape, dtype=torch.float32, device=sequences.device)
    if isinstance(value, TrunkValue):
        hidden = response_hidden(policy, sequences, sequence_mask, response_mask.shape[1], rows)
        return torch.where(response_mask, value(hidden), 0)
    return response_values(value, sequences, sequence_mask, response_mask, rows)
