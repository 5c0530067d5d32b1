"""What is measured of a reward model over a whole validation or test set, on all processes."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from rlhf_lightning.functional import correlation, expected_calibration_error, reliability


class CalibrationError(Metric):
    """Expected calibration error of pairs, over all batches and ranks.

    Args:
        num_bins: of confidences from 0.5 to 1.
    """

    totals: Tensor

    def __init__(self, num_bins: int = 10) -> None:
        super().__init__()
        self.num_bins = num_bins
        self.add_state("totals", torch.zeros(num_bins, 3), dist_reduce_fx="sum")

    def update(self, margins: Tensor, weights: Tensor) -> None:
        """Add pairs.

        Args:
            margins: raw chosen score less raw rejected score, `[B]`, float32.
            weights: how much each pair counts, `[B]`, float32.
        """
        self.totals = self.totals + (reliability(margins, self.num_bins).sums * weights.view(-1, 1, 1)).sum(dim=0)

    def compute(self) -> Tensor:
        """The error so far, a scalar."""
        return expected_calibration_error(self.totals)


class Correlations(Metric):
    """Pearson correlation of predicted scores with those that were given, by attribute, over all batches and ranks."""

    predicted: list[Tensor]
    given: list[Tensor]
    said: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("predicted", "given", "said"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, predicted: Tensor, given: Tensor, said: Tensor) -> None:
        """Add scores.

        Args:
            predicted: by the model, `[B, K]`.
            given: by whoever rated, `[B, K]`.
            said: True where that is known, `[B, K]`, bool.
        """
        self.predicted.append(predicted)
        self.given.append(given)
        self.said.append(said)

    def compute(self) -> Tensor:
        """Of each attribute, `[K]`, float32; 0 where either side does not vary."""
        columns = (dim_zero_cat(each).cpu().unbind(dim=1) for each in (self.predicted, self.given, self.said))
        return torch.tensor([correlation(x[said], y[said]) for x, y, said in zip(*columns, strict=True)])


class HeldOutScores(Metric):
    """Scores of all batches and ranks.

    Blanks are kept until the end: ranks tell one another only what is of one length.
    """

    scores: list[Tensor]
    counted: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("scores", "counted"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, scores: Tensor, counted: Tensor) -> None:
        """Add scores.

        Args:
            scores: `[B]`.
            counted: False where they are of blanks, `[B]`, bool.
        """
        self.scores.append(scores)
        self.counted.append(counted)

    def compute(self) -> Tensor:
        """Those that count, `[N]`."""
        return dim_zero_cat(self.scores)[dim_zero_cat(self.counted)]


def moments(scores: Tensor) -> tuple[float, float]:
    """Mean and standard deviation, which is 0 of one score.

    Args:
        scores: `[N]`; one alone may come without a dimension.
    """
    scores = scores.double().reshape(-1)
    return float(scores.mean()), float(scores.std(correction=0)) if len(scores) > 1 else 0.0
