"""How far policies have gone from the reference: the KL divergence on prompts that they were not trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from rlhf_lightning.data.rows import Need
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.answers import answer, prompt_pieces, prompt_was_cut, say_cut
from rlhf_lightning.evaluation.policy import Policy
from rlhf_lightning.evaluation.results import Curve, Lines, Result
from rlhf_lightning.evaluation.rows import TextRow
from rlhf_lightning.evaluation.statistics import result
from rlhf_lightning.evaluation.task import Bench, Progress, Task
from rlhf_lightning.functional import kl_estimate
from rlhf_lightning.models.tokenizer import same_tokenizer

_ESTIMATORS = ("k1", "k3")


@dataclass(frozen=True)
class KL(Task):
    """KL divergence of each model from the reference, in nats, from answers that the model itself draws.

    Both see the ids of the model's own prompt and answer, their logits divided by the sampling temperature, as in PPO.
    """

    name: ClassVar[str] = "kl"
    need: ClassVar[Need] = "prompts"

    def by_default(self, bench: Bench) -> bool:
        """Wherever there are models and a reference."""
        return bool(bench.policies and bench.reference)

    def check(self, bench: Bench) -> None:
        """Refuse to begin without models, a reference, or randomness."""
        bench.check_policies(self.name)
        if bench.reference is None:
            raise UserError("kl compares models with another; name it with --reference, such as the SFT stage's export")
        if bench.sampling.temperature == 0:
            raise UserError("kl is measured on answers that are drawn; set sampling.temperature above 0")

    def run(self, rows: list[TextRow], bench: Bench, lines: Lines) -> tuple[list[Result], list[Curve]]:
        """Measure each model, see `Task`."""
        assert bench.reference is not None
        models, reference = bench.policies, bench.reference
        results: list[Result | None] = []
        for model in models:
            found, group = self._lines(model, reference, rows, bench, lines), f"against={reference}"
            for estimator in _ESTIMATORS:
                sums = [(line[estimator], 1) for line in found]
                results.append(result(f"kl_{estimator}", model, sums, bench.seed, group=group))
                sums = [(line[estimator], line["tokens"]) for line in found]
                results.append(result(f"kl_{estimator}_per_token", model, sums, bench.seed, group=group))
            results.append(result("response_length", model, [(line["tokens"], 1) for line in found], bench.seed))
            results.append(result("eos_rate", model, [(line["ended"], 1) for line in found], bench.seed))
        return [each for each in results if each is not None], []

    def _lines(
        self, model: str, reference: str, rows: list[TextRow], bench: Bench, lines: Lines
    ) -> list[dict[str, Any]]:
        policy, other = bench.policy(model), bench.policy(reference)
        if not same_tokenizer(policy.tokenizer, other.tokenizer):
            raise UserError(
                f"{model} and {reference} have different tokenizers, so there is no KL between them; name the model "
                "that training began with as the reference"
            )

        def ask(places: list[int], told: Progress) -> list[dict[str, Any]]:
            asked = [rows[place] for place in places]
            answers = answer(policy, asked, bench.sampling, bench, told)
            prompts, said = [one.prompt_ids for one in answers], [one.ids for one in answers]
            own, others = (self._logprobs(each, prompts, said, bench) for each in (policy, other))
            return [
                {
                    "prompt": row.written.text,
                    "response": one.text,
                    "ended": one.ended,
                    "cut": prompt_was_cut(policy, row, one, bench.sampling),
                    "tokens": len(one.ids),
                    **kl_of_response(mine, theirs),
                }
                for row, one, mine, theirs in zip(asked, answers, own, others, strict=True)
            ]

        key = self.key(model, reference, bench.sampling, bench.seed, bench.dtype)
        found = self.each_row(model, key, rows, prompt_pieces(rows, bench), ask, bench, lines)
        say_cut(model, found)
        return found

    @staticmethod
    def _logprobs(policy: Policy, prompts: list[Tensor], said: list[Tensor], bench: Bench) -> list[Tensor]:
        return policy.logprobs(prompts, said, bench.sampling.temperature, bench.max_tokens)


def kl_of_response(logprobs: Tensor, ref_logprobs: Tensor) -> dict[str, float]:
    """Estimates of the KL of one response, summed over its tokens, in nats.

    Args:
        logprobs: under the policy that drew it, `[R]`.
        ref_logprobs: under the reference, `[R]`.
    """
    own, theirs = logprobs.double(), ref_logprobs.double()
    return {estimator: float(kl_estimate(own, theirs, estimator).sum()) for estimator in _ESTIMATORS}  # type: ignore[arg-type]
