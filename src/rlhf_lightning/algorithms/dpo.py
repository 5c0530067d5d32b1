"""Direct preference optimisation: a policy learns from pairs without a reward model (Rafailov et al. 2023).

The implicit reward of a response is `beta * (log pi(response) - log pi_ref(response))`, and the losses of
`functional.dpo_loss` want that of the chosen response to lead. Log-probabilities are of the response's tokens, its end
included, never of the prompt's. Left out: variants that sample from the policy while training.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lightning.algorithms.hyperparameters import from_config
from rlhf_lightning.algorithms.pairs import Pairs, PairStage, chosen_tokens, pair_weights, response_logprobs
from rlhf_lightning.algorithms.reference import Reference
from rlhf_lightning.algorithms.stage import Loss
from rlhf_lightning.arguments import POSITIVE, Range, check_arguments
from rlhf_lightning.functional import DPOLoss, dpo_loss
from rlhf_lightning.generation.sampling import Sampling
from rlhf_lightning.models.causal_lm import load_causal_lm
from rlhf_lightning.models.finetune import add_adapter, choose_trained, enable_gradient_checkpointing
from rlhf_lightning.models.sharing import load_reference


class DPOModule(PairStage):
    """Trains a language model on pairs by DPO and its kin.

    Expects batches like `PreferenceBatch`, with their prompt lengths. `docs/metrics.md` lists what is logged.

    Args:
        model_name_or_path: Hugging Face folder or hub id of the SFT model, which the policy starts from.
        loss: `sigmoid` (DPO; with `label_smoothing`, conservative DPO), `robust`, `hinge` or `ipo`.
        beta: weight of the KL to the reference, per nat; the tau of `ipo`.
        label_smoothing: share of pairs that may be the wrong way round, for `sigmoid` and `robust`.
        length_normalized: take log-ratios per token, so that length is worth nothing; then `beta` is 2 or more.
        sft_coef: weight of the chosen responses' negative log-likelihood per token, added to the loss.
        reference: folder or hub id of the frozen reference; None for `model_name_or_path`, which is free with LoRA.
        precompute_reference: let the reference read all pairs once, before training, and keep its log-probabilities in
            its place: one model in memory instead of two, and a quarter less work, for the time of one pass.
        reference_free: compare log-probabilities themselves, as if the reference found everything equally likely.
        sampling: how sample texts are generated.
        **options: those of `PairStage` and `Stage`. An example is a pair.
    """

    LOGGED = ("accuracy", "chosen_reward", "rejected_reward", "margin", "chosen_logprob", "rejected_logprob", "nll")
    policy: PreTrainedModel
    reference_model: Reference

    def __init__(
        self,
        model_name_or_path: str,
        *,
        loss: DPOLoss = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        length_normalized: bool = False,
        sft_coef: float = 0.0,
        reference: str | None = None,
        precompute_reference: bool = False,
        reference_free: bool = False,
        sampling: Sampling = Sampling(),
        **options: Any,
    ) -> None:
        sampling = from_config(Sampling, sampling)
        check_arguments(DPOModule, locals(), {"beta": POSITIVE, "label_smoothing": Range(at_least=0, below=0.5)})
        super().__init__(model_name_or_path, **options)
        self.strict_loading = False  # the reference is not in the checkpoint
        self.loss: DPOLoss = loss
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.length_normalized = length_normalized
        self.sft_coef = sft_coef
        self.reference = reference
        self.precompute_reference = precompute_reference
        self.reference_free = reference_free
        self.sampling = sampling

    def load_models(self) -> None:
        """Load the policy, to be trained, and the reference, frozen."""
        name, trust = self.model_name_or_path, self.trust_remote_code
        policy = load_causal_lm(name, self.dropout, trust)
        choose_trained(policy, self.finetune)
        known = None if self.reference_free else load_reference(policy, name, self.reference, self.tokenizer, trust)
        self.reference_model = Reference(known)
        add_adapter(policy, self.finetune)
        if self.gradient_checkpointing:
            enable_gradient_checkpointing(policy)
        self.policy = policy

    @property
    def export_model(self) -> PreTrainedModel:
        """The policy."""
        return self.policy

    def pair_metrics(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each pair, and what is logged of it; rewards are those that the policy implies."""
        logprobs, lengths = response_logprobs(self.policy, pairs)  # [B, 2]
        ratios = logprobs - self.reference_model(pairs)
        compared = ratios / lengths if self.length_normalized else ratios
        losses = dpo_loss(compared[:, 0], compared[:, 1], self.loss, self.beta, self.label_smoothing)
        chosen, rejected = (self.beta * ratios.detach()).unbind(dim=1)
        nll = -logprobs[:, 0] / lengths[:, 0]
        values = (chosen > rejected).float(), chosen, rejected, chosen - rejected, *logprobs.detach().unbind(dim=1), nll
        return losses, dict(zip(self.LOGGED, values, strict=True))

    def on_fit_start(self) -> None:
        """Let the reference read all pairs, if it is to do so once."""
        super().on_fit_start()
        if self.precompute_reference:
            self.reference_model.precompute(self)

    def run_state(self) -> dict[str, Any]:
        """What the reference said, if it is not asked again."""
        return {"reference": self.reference_model.known()}

    def load_run_state(self, state: dict[str, Any]) -> None:
        """Go on with what the reference said."""
        self.reference_model.load_known(state["reference"])

    def losses(self, pairs: Pairs) -> Iterator[Loss]:
        """As for all pairs, and the likelihood of the chosen responses, a mean over all their tokens in the step."""
        losses, logged = self.pair_metrics(pairs)
        weights = pair_weights(pairs.batch)
        loss, nll = (losses * weights).sum(), (logged["nll"] * chosen_tokens(pairs.batch)).sum()
        sums = {name: (value.detach() * weights).sum() for name, value in logged.items()}
        yield loss + self.sft_coef * nll * self.step_weight / self.step_tokens, {"loss": loss.detach(), **sums}
