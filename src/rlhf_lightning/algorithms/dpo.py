"""Direct preference optimisation: a policy learns from pairs without a reward model (Rafailov et al. 2023).

The implicit reward of a response is `beta * (log pi(response) - log pi_ref(response))`, and the losses of
`functional.dpo_loss` want that of the chosen response to lead. Log-probabilities are of the response's tokens, its end
included, never of the prompt's. Left out: variants that sample from the policy while training.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from rlhf_lightning.algorithms.hyperparameters import from_config
from rlhf_lightning.algorithms.pairs import Pairs, chosen_tokens, pair_weights, response_logprobs
from rlhf_lightning.algorithms.reference import ReferenceStage
from rlhf_lightning.algorithms.stage import Loss
from rlhf_lightning.arguments import POSITIVE, Range, check_arguments
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional import DPOLoss, dpo_loss
from rlhf_lightning.generation.sampling import Sampling


class DPOModule(ReferenceStage):
    """Trains a language model on pairs by DPO and its kin.

    Expects batches like `PreferenceBatch`, with their prompt lengths. `docs/metrics.md` lists what is logged.

    Args:
        model_name_or_path: Hugging Face folder or hub id of the SFT model, which the policy starts from.
        loss: `sigmoid` (DPO; with `label_smoothing`, conservative DPO), `robust`, `hinge` or `ipo`.
        beta: weight of the KL to the reference, per nat; the tau of `ipo`.
        label_smoothing: share of pairs that may be the wrong way round, for `sigmoid` and `robust`.
        length_normalized: take log-ratios per token, so that length is worth nothing; then `beta` is 2 or more.
        sft_coef: weight of the chosen responses' negative log-likelihood per token, added to the loss.
        sampling: how sample texts are generated.
        **options: those of `ReferenceStage`, `PairStage` and `Stage`. An example is a pair.
    """

    LOGGED = ("accuracy", "chosen_reward", "rejected_reward", "margin", "chosen_logprob", "rejected_logprob", "nll")

    def __init__(
        self,
        model_name_or_path: str,
        *,
        loss: DPOLoss = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        length_normalized: bool = False,
        sft_coef: float = 0.0,
        sampling: Sampling = Sampling(),
        **options: Any,
    ) -> None:
        sampling = from_config(Sampling, sampling)
        check_arguments(DPOModule, locals(), {"beta": POSITIVE, "label_smoothing": Range(at_least=0, below=0.5)})
        super().__init__(model_name_or_path, **options)
        if label_smoothing and loss in ("hinge", "ipo"):
            raise UserError(f"label_smoothing is for sigmoid and robust, and loss is {loss}: set it to 0")
        self.loss: DPOLoss = loss
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.length_normalized = length_normalized
        self.sft_coef = sft_coef
        self.sampling = sampling

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

    def losses(self, pairs: Pairs) -> Iterator[Loss]:
        """As for all pairs, and the likelihood of the chosen responses, a mean over all their tokens in the step."""
        losses, logged = self.pair_metrics(pairs)
        weights = pair_weights(pairs.batch)
        loss, nll = (losses * weights).sum(), (logged["nll"] * chosen_tokens(pairs.batch)).sum()
        sums = {name: (value.detach() * weights).sum() for name, value in logged.items()}
        yield loss + self.sft_coef * nll * self.pairs_per_token, {"loss": loss.detach(), **sums}
