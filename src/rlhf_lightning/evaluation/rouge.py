"""How much of a reference answer a model's own answer has in common with it (Lin 2004)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from rlhf_lightning.arguments import check_arguments
from rlhf_lightning.data.rows import Need
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.answers import answer, prompt_pieces, prompt_was_cut, say_cut
from rlhf_lightning.evaluation.results import Curve, Lines, Result
from rlhf_lightning.evaluation.rows import TextRow
from rlhf_lightning.evaluation.statistics import results_by_group, sources
from rlhf_lightning.evaluation.task import Bench, Progress, Task

KINDS = {"rouge1": "rouge_1", "rouge2": "rouge_2", "rougeL": "rouge_l"}
"""What the rouge-score package calls what our results call otherwise."""


@dataclass(frozen=True)
class Rouge(Task):
    """ROUGE 1, 2 and L, F-measures, of a model's answers against each row's best response.

    Args:
        temperature: that answers are drawn at; 0 takes the most likely token.
        stemming: words count as equal that have the same stem.
    """

    name: ClassVar[str] = "rouge"
    need: ClassVar[Need] = "finetune"
    temperature: float = 0.0
    stemming: bool = True

    def __post_init__(self) -> None:
        check_arguments(Rouge, vars(self), prefix="rouge.")

    def check(self, bench: Bench) -> None:
        """Refuse to begin without models, or the package."""
        bench.check_policies(self.name)
        rouge_scorer(self.stemming)

    def run(self, rows: list[TextRow], bench: Bench, lines: Lines) -> tuple[list[Result], list[Curve]]:
        """Measure each model, see `Task`."""
        results: list[Result] = []
        for model in bench.policies:
            found = self._lines(model, rows, bench, lines)
            for kind in KINDS.values():
                sums = [(line[kind], 1) for line in found]
                results += results_by_group(kind, model, sums, sources(rows), bench.seed)
        return results, []

    def _lines(self, model: str, rows: list[TextRow], bench: Bench, lines: Lines) -> list[dict[str, Any]]:
        policy, sampling = bench.policy(model), replace(bench.sampling, temperature=self.temperature)
        scorer = rouge_scorer(self.stemming)

        def ask(places: list[int], told: Progress) -> list[dict[str, Any]]:
            asked = [rows[place] for place in places]
            return [
                {
                    "prompt": row.written.text,
                    "response": one.text,
                    "reference": row.responses[0].strip(),
                    "ended": one.ended,
                    "cut": prompt_was_cut(policy, row, one, sampling),
                    **rouge_scores(scorer, row.responses[0], one.text),
                }
                for row, one in zip(asked, answer(policy, asked, sampling, bench, told), strict=True)
            ]

        key = self.key(model, sampling, bench.seed, bench.dtype)
        found = self.each_row(model, key, rows, prompt_pieces(rows, bench), ask, bench, lines)
        say_cut(model, found)
        return found


def rouge_scores(scorer: Any, reference: str, text: str) -> dict[str, float]:
    """F-measures of a text by the names of our results.

    Args:
        scorer: see `rouge_scorer`.
        reference: the text it is measured against.
        text: what is measured.
    """
    return {KINDS[kind]: score.fmeasure for kind, score in scorer.score(reference.strip(), text).items()}


def rouge_scorer(stemming: bool) -> Any:
    """What compares two texts.

    Args:
        stemming: words count as equal that have the same stem.

    Raises:
        UserError: the rouge-score package is missing.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UserError("rouge needs the rouge-score package: pip install rlhf-lightning[evaluation]") from error
    return RougeScorer([*KINDS], use_stemmer=stemming)
