"""Who is better, from comparisons of two at a time.

Notation: M models, B comparisons.
"""

from __future__ import annotations

import torch
from torch import Tensor

_STEPS, _PRECISION = 10_000, 1e-10


def bradley_terry(wins: Tensor, prior: float = 1.0) -> Tensor:
    """Strength of each model: i wins over j with probability `sigmoid(strength[i] - strength[j])`.

    The strengths are those of maximum likelihood (Bradley and Terry 1952), found by minorising and maximising (Hunter
    2004, section 2). There are none where some models never lost to any of the others (Ford 1957); then, and only
    then, each model is also given a draw, of weight `prior`, against an imagined one of average strength.

    Args:
        wins: how often the row's model won over the column's, `[..., M, M]`; a tie counts half for either.
        prior: weight of that draw, in comparisons, above 0.

    Returns:
        `[..., M]`, float64, nats, mean 0.

    Example:
        >>> strength = bradley_terry(torch.tensor([[0.0, 3.0], [1.0, 0.0]]))
        >>> round(float(torch.sigmoid(strength[0] - strength[1])), 6)
        0.75
    """
    wins = wins.double() * (1 - torch.eye(wins.shape[-1], dtype=torch.float64))
    draw = torch.where(_connected(wins), 0.0, prior).double().unsqueeze(-1)  # [..., 1]
    won, met = wins.sum(dim=-1) + draw / 2, wins + wins.mT
    strength = torch.ones_like(won)
    for _ in range(_STEPS):
        faced = (met / (strength.unsqueeze(-1) + strength.unsqueeze(-2))).sum(dim=-1) + draw / (strength + 1)
        new = won / faced
        # Where there is an imagined model, it fixes the scale.
        new = torch.where(draw > 0, new, new / new.log().mean(dim=-1, keepdim=True).exp())
        moved, strength = float((new / strength).log().abs().max()), new
        if moved < _PRECISION:
            break
    logs = strength.log()
    return logs - logs.mean(dim=-1, keepdim=True)


def _connected(wins: Tensor) -> Tensor:
    """Whether each model has beaten each other one, or one that has, and so on, `[...]`, bool."""
    reached = (wins > 0) | torch.eye(wins.shape[-1], dtype=torch.bool)
    for _ in range(wins.shape[-1].bit_length()):
        reached = (reached.double() @ reached.double()) > 0
    return reached.all(dim=-1).all(dim=-1)


def length_controlled_win_rate(wins: Tensor, lengths: Tensor, other_lengths: Tensor, ridge: float = 0.01) -> float:
    """The win rate that would be if the answers of both sides were equally long (Dubois et al. 2024).

    A logistic regression of the outcomes on a constant and on `tanh(d / std(d))`, d being the difference of lengths,
    predicted at d = 0. The term for how hard each prompt is, which needs many models on the same prompts, is left out,
    and with it the weighting by prompt; the constant is all there is to a pair of models.

    Args:
        wins: 1 where the first side wins, 0 where it loses, 0.5 for a tie, `[B]`.
        lengths: of its answers, in one unit for both sides, `[B]`.
        other_lengths: of the other side's, `[B]`.
        ridge: weight of the squared coefficients, halved, against the summed log-likelihood; it keeps them finite where
            one side always wins.

    Returns:
        From 0 to 1. Where the difference of lengths never varies, nothing can be told from it, and this is the plain
        win rate.

    Example:
        >>> wins = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0])  # the longer answer wins, mostly
        >>> mine, theirs = torch.tensor([9.0, 9, 9, 9, 9, 9, 1, 1]), torch.tensor([1.0, 1, 1, 1, 9, 9, 9, 9])
        >>> float(wins.mean()), round(length_controlled_win_rate(wins, mine, theirs), 2)
        (0.5, 0.36)
    """
    difference, wins = lengths.double() - other_lengths.double(), wins.double()
    spread = difference.std(correction=0)
    if spread <= 1e-12 * (1 + difference.abs().max()):
        return float(wins.mean())
    terms = torch.stack([torch.ones_like(wins), torch.tanh(difference / spread)], dim=1)  # [B, 2]
    coefficients = torch.zeros(2, dtype=torch.float64)
    for _ in range(100):  # Newton's steps, shortened where a whole one would overshoot
        predicted = torch.sigmoid(terms @ coefficients)
        gradient = terms.T @ (predicted - wins) + ridge * coefficients
        curvature = terms.T @ (terms * (predicted * (1 - predicted)).unsqueeze(1)) + ridge * torch.eye(2).double()
        step = torch.linalg.solve(curvature, gradient)
        coefficients = coefficients - step / max(1.0, float(step.norm()))
        if float(step.norm()) < _PRECISION:
            break
    return float(torch.sigmoid(coefficients[0]))
