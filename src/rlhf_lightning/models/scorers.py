"""What scores responses: reward models, each in its own way of reading, and functions.

Notation: B responses, P padded prompt length, R padded response length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.chat.messages import RefusedTurnsError
from rlhf_lightning.chat.spacing import NO_SPACING, Spacing
from rlhf_lightning.chat.written import WrittenPrompt
from rlhf_lightning.errors import UserError
from rlhf_lightning.forward.capacity import context_length
from rlhf_lightning.forward.hidden import ResponseRows, hidden_states
from rlhf_lightning.host import on_host, to_device
from rlhf_lightning.models.classifiers import Classifier, PairReader
from rlhf_lightning.models.reward_endpoints import LoggedEndpoint, RewardEndpoint
from rlhf_lightning.models.reward_functions import ScoringFunction
from rlhf_lightning.models.scalar_lm import ScalarLM
from rlhf_lightning.models.token_rewards import TokenRewards
from rlhf_lightning.models.tokenizer import filler_id


class Responses(NamedTuple):
    """Responses to be scored, as ids and as text.

    Attributes:
        sequences: prompts (padded on the left) and responses (padded on the right), `[B, P + R]`, int64.
        sequence_mask: True for real tokens, `[B, P + R]`, bool.
        ended: True where the response ended by itself, `[B]`, bool.
        prompts: text of each prompt as the policy read it, without special tokens.
        responses: text of each response, without special tokens.
        row_ids: number of each prompt's row in its source, `[B]`, int64; named in error messages.
        written: each prompt as its row wrote it; None where that is not known.
        shared: the sequences, as they are to go through a model that reads them; None for each by itself.
    """

    sequences: Tensor
    sequence_mask: Tensor
    ended: Tensor
    prompts: list[str]
    responses: list[str]
    row_ids: Tensor | None = None
    written: list[WrittenPrompt] | None = None
    shared: ResponseRows | None = None

    @property
    def prompts_as_written(self) -> list[WrittenPrompt]:
        """The prompts as they were written, or else what is left of them in the policy's text."""
        return self.written or [WrittenPrompt(prompt) for prompt in self.prompts]

    @property
    def rows(self) -> list[int]:
        """Number of each prompt's row, or else of its place."""
        return list(range(len(self.prompts))) if self.row_ids is None else self.row_ids.tolist()


class Scorer(Protocol):
    """Anything that scores responses."""

    def __call__(self, batch: Responses) -> Tensor:
        """Return one score per response, `[B]`, float32."""


class ModelScorer(nn.Module):
    """A frozen reward model that reads the policy's ids.

    Args:
        model: the reward model.

    Attributes:
        along: how its scores become rewards of tokens; None where they stand at the ends.
    """

    def __init__(self, model: ScalarLM) -> None:
        super().__init__()
        self.model = model
        self.along: TokenRewards | None = None

    def forward(self, batch: Responses) -> Tensor:
        """Calibrated score at the last real token, `[B]`."""
        return self.model.scores(batch.sequences, batch.sequence_mask, batch.shared)

    def token_scores(self, batch: Responses, response_mask: Tensor) -> Tensor:
        """Rewards of tokens, `[B, R]`; calibrated scores, or differences of such.

        Args:
            batch: the responses; each is read by itself.
            response_mask: True for response tokens, `[B, R]`, bool.
        """
        assert self.along is not None
        length = response_mask.shape[1]
        hidden = hidden_states(self.model.model, batch.sequences, batch.sequence_mask)[:, -length:]  # [B, R, D]
        scores = self.model.calibrate(self.model.combined(hidden)).float()
        return self.along.of(scores, batch.sequences[:, -length:], response_mask)


class Reading(NamedTuple):
    """A dialogue as a reward model reads it.

    Attributes:
        ids: all of it.
        start: number of tokens before the response, or before what else the second text of a pair begins with.
    """

    ids: list[int]
    start: int


class TextScorer(nn.Module):
    """A frozen reward model that reads other ids than the policy: dialogues are handed over as they were written.

    It reads whole prompts, also where the policy's were cut, and loses their beginning only where prompt and response
    exceed its own context.

    Args:
        model: the reward model, or a classifier that is run as it is.
        chat: writes dialogues as in its training.
        spacing: what the policy's format writes around responses.
        same_ids: the policy's tokens mean the same to it, and only dialogues are written otherwise.
    """

    def __init__(
        self,
        model: ScalarLM | Classifier,
        chat: ChatEncoder | PairReader,
        spacing: Spacing = NO_SPACING,
        same_ids: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.chat, self.spacing, self.same_ids = model, chat, spacing, same_ids
        self.tokenizer = chat.tokenizer
        self._context = model.context if isinstance(model, Classifier) else context_length(model.model.config)
        self._warned: set[str] = set()

    def read(self, written: WrittenPrompt, response: str, ended: bool) -> Reading:
        """A dialogue as in reward training, the end of the turn only where the response ended by itself.

        Args:
            written: the prompt.
            response: as the policy said it.
            ended: whether it ended by itself.
        """
        said = self.spacing.content(written, response)
        prompt, answer = self.chat.encode_dialogue(written.prompt, said, written.tools, ended)
        ids: list[int] = [*prompt.tolist(), *answer.tolist()]
        if self._context is None or len(ids) <= self._context:
            return Reading(ids, len(prompt))
        self._warn_once(
            f"prompts and responses of more than {self._context} tokens are too long for the reward model: such "
            "prompts lose their beginning, and so do responses that are too long by themselves"
        )
        kept = self.chat.prefix
        if isinstance(self.chat, PairReader) and len(kept) + len(self.chat.between) + len(answer) > self._context:
            kept = [*kept, *self.chat.between]  # what is left is still the second text
        ids = [*kept, *ids[len(ids) - self._context + len(kept) :]]
        return Reading(ids, max(len(kept), len(ids) - len(answer)))

    def encode(self, written: WrittenPrompt, response: str, ended: bool) -> list[int]:
        """The ids of `read`; arguments as there."""
        return self.read(written, response, ended).ids

    def scores_of(self, readings: Sequence[Reading], device: torch.device) -> Tensor:
        """Calibrated scores of dialogues, at the last real token of each, `[B]`.

        Args:
            readings: B of them.
            device: where the model runs.
        """
        lengths, starts = (torch.tensor(each) for each in zip(*((len(r.ids), r.start) for r in readings), strict=True))
        ids = nn.utils.rnn.pad_sequence(
            [torch.tensor(reading.ids) for reading in readings],
            batch_first=True,
            padding_value=filler_id(self.tokenizer),
        )
        mask = torch.arange(ids.shape[1]) < lengths.unsqueeze(1)
        ids, mask = to_device(ids, device), to_device(mask, device)
        if isinstance(self.model, Classifier):
            return self.model.scores(ids, mask, to_device(starts, device))
        return self.model.scores(ids, mask)

    def forward(self, batch: Responses) -> Tensor:
        """Calibrated score at the last real token, `[B]`.

        Raises:
            UserError: a dialogue that the reward model's template refuses.
        """
        if batch.written is None:
            self._warn_once(
                "the batches do not say how their prompts were written (PromptBatch.written), so the reward model, "
                "which reads other ids than the policy, is given what is left of them without special tokens"
            )
        readings = []
        for i, (written, ended) in enumerate(zip(batch.prompts_as_written, batch.ended.tolist(), strict=True)):
            try:
                readings.append(self.read(written, batch.responses[i], ended))
            except RefusedTurnsError as error:
                raise UserError(f"row {batch.rows[i]}: the reward model cannot read the prompt: {error}") from error
        return self.scores_of(readings, batch.sequences.device)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            rank_zero_warn(message)
            self._warned.add(message)


class FunctionScorer:
    """A Python function of prompt and response texts, or a service that is sent them.

    Args:
        function: `(prompts, responses) -> scores`.
        spacing: what the policy's format writes around responses.
    """

    def __init__(
        self, function: ScoringFunction | RewardEndpoint | LoggedEndpoint, spacing: Spacing = NO_SPACING
    ) -> None:
        self.function, self.spacing = function, spacing

    def __call__(self, batch: Responses) -> Tensor:
        """Scores of the function, `[B]`, float32.

        Raises:
            UserError: the function did not return one number per response.
        """
        scores = self.function(*self._asked(batch), batch.rows)
        return torch.tensor(scores, dtype=torch.float32, device=batch.sequences.device)

    def token_scores(self, batch: Responses, response_mask: Tensor) -> Tensor:
        """Rewards of tokens, `[B, R]`, float32, 0 after the last one.

        Args:
            batch: the responses.
            response_mask: True for response tokens, `[B, R]`, bool.

        Raises:
            UserError: the function did not return one number per token.
        """
        ids, mask = on_host(batch.sequences[:, -response_mask.shape[1] :], response_mask)
        said = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
        assert isinstance(self.function, ScoringFunction)
        scores = self.function.of_tokens(*self._asked(batch), batch.rows, said)
        found = torch.zeros(mask.shape, dtype=torch.float32)
        found[mask] = torch.tensor([score for row in scores for score in row], dtype=torch.float32)
        return to_device(found, batch.sequences.device)

    def _asked(self, batch: Responses) -> tuple[list[str], list[str], list[Any]]:
        """Prompts and responses as text, and the prompts as messages."""
        prompts, responses = batch.prompts, batch.responses
        if batch.written is not None:
            prompts = [written.text for written in batch.written]
            answers = zip(batch.written, responses, strict=True)
            responses = [self.spacing.content(*answer) for answer in answers]
        return prompts, responses, [written.messages for written in batch.prompts_as_written]


def scores_tokens(scorer: Any) -> bool:
    """Whether what scores responses does so token by token.

    Args:
        scorer: any.
    """
    if isinstance(scorer, FunctionScorer):
        return scorer.function.takes_token_ids
    return isinstance(scorer, ModelScorer) and scorer.along is not None


def token_scores(scorer: Any, batch: Responses, response_mask: Tensor) -> Tensor:
    """What something that `scores_tokens` says of them, `[B, R]`; 0 after the last token.

    Args:
        scorer: it.
        batch: the responses.
        response_mask: True for response tokens, `[B, R]`, bool.
    """
    assert isinstance(scorer, ModelScorer | FunctionScorer)
    return scorer.token_scores(batch, response_mask)


def give_along(scorer: Scorer, along: TokenRewards, name: str) -> None:
    """Let a reward model score tokens.

    Args:
        scorer: what scores by it.
        along: how.
        name: of the reward, for the message.

    Raises:
        UserError: it reads other ids than the policy's.
    """
    if not isinstance(scorer, ModelScorer):
        raise UserError(
            f"per_token of reward '{name}' needs a reward model that reads the policy's ids, and this one has a "
            "tokenizer or a way of writing dialogues of its own, whose tokens stand elsewhere; train one from the same "
            "model, or leave per_token out"
        )
    scorer.along = along


def warn_without_steps(scorers: Mapping[str, Any], sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
    """Say in one line where the ends of steps that rewards are to stand at are in no response so far, of any rank.

    Args:
        scorers: any, by name, the same on every rank.
        sum_over_ranks: adds up a number of every rank.
    """
    for name, scorer in scorers.items():
        along = getattr(scorer, "along", None)
        if not isinstance(along, TokenRewards) or along.step_end is None:
            continue
        if not sum_over_ranks(torch.tensor(float(along.found))).item():
            rank_zero_warn(
                f"no answer of the first rollout holds the step_end {along.step_end!r} of reward '{name}', so all that "
                "it gives stands at their last tokens: look at how the policy ends its steps"
            )
