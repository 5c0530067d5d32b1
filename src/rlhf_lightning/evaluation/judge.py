"""A reward that is asked about texts: a reward model, which writes dialogues as in its own training, or a function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_lightning.batches import length_sorted_pieces
from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.chat.text_so_far import decode_response, text_by
from rlhf_lightning.chat.written import WrittenPrompt
from rlhf_lightning.evaluation.policy import Dtype, dtype_on, find_device
from rlhf_lightning.models.causal_lm import freeze
from rlhf_lightning.models.reward_endpoints import RewardEndpoint
from rlhf_lightning.models.reward_functions import RewardFunction, ScoringFunction
from rlhf_lightning.models.rewarding import find_reward, load_reader
from rlhf_lightning.models.scalar_lm import ScalarLM
from rlhf_lightning.models.scorers import TextScorer


class TokenScore(NamedTuple):
    """A token of a response.

    Attributes:
        text: what it adds; of a character in several tokens, the last one adds it.
        score: calibrated, of the response that ends with it.
    """

    text: str
    score: float


class Judge:
    """Scores what any model said, from the texts alone.

    Args:
        scores_by: a reward model that reads texts, a checked function, or a service.
        name: as results name it.
    """

    def __init__(self, scores_by: TextScorer | ScoringFunction | RewardEndpoint, name: str) -> None:
        self.scores_by, self.name = scores_by, name

    @classmethod
    def load(
        cls,
        reward: str | RewardEndpoint | RewardFunction,
        *,
        dtype: Dtype = "auto",
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
        timeout: float | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> Judge:
        """Load a judge.

        Args:
            reward: folder or hub id of a reward model, import path of a function, the function itself, or an endpoint.
            dtype: of a reward model's weights; see `Policy.load`.
            device: where a reward model runs; see `Policy.load`.
            trust_remote_code: allow the folder to run Python code of its own.
            timeout: seconds that one call of a function may take; None for no limit.
            weights: what the labels of a reward model count; None where it has one.

        Raises:
            UserError: it names neither, or there is no such device.
        """
        found = find_reward(reward, timeout, weights)
        if not isinstance(found, str):
            return cls(found, found.name)
        place, before = find_device(device), torch.get_default_dtype()
        torch.set_default_dtype(dtype_on(place, dtype))
        try:
            model, chat = load_reader(found, trust_remote_code, weights=weights)
        finally:
            torch.set_default_dtype(before)
        freeze(model)
        return cls(TextScorer(model.to(place), chat), found)

    @property
    def chat(self) -> ChatEncoder | None:
        """What writes dialogues as a reward model reads them; None for functions and pairs of texts."""
        chat = getattr(self.scores_by, "chat", None)
        return chat if isinstance(chat, ChatEncoder) else None

    @torch.no_grad()
    def scores(
        self,
        prompts: list[WrittenPrompt],
        responses: list[str],
        ended: list[bool] | None = None,
        rows: list[int] | None = None,
        max_tokens: int = 8192,
    ) -> Tensor:
        """Scores of responses, `[B]`, float32, on the CPU; calibrated ones of a reward model.

        Args:
            prompts: B of them, as they were written.
            responses: what was said.
            ended: whether each response ended by itself; None for all.
            rows: number of each row, for messages; None to count them.
            max_tokens: read at once by a reward model, padding included.

        Raises:
            UserError: a prompt that the reward model's template refuses, or a function that fails.
        """
        numbers = [*range(len(prompts))] if rows is None else rows
        if not isinstance(self.scores_by, TextScorer):
            texts, messages = [written.text for written in prompts], [written.messages for written in prompts]
            return torch.tensor(self.scores_by(texts, responses, messages, numbers), dtype=torch.float32)
        ends = [True] * len(prompts) if ended is None else ended
        read = [self.scores_by.read(*row) for row in zip(prompts, responses, ends, strict=True)]
        scores, device = torch.zeros(len(read)), next(self.scores_by.model.parameters()).device
        for piece in length_sorted_pieces(torch.tensor([len(one.ids) for one in read]), None, max_tokens):
            scores[piece] = self.scores_by.scores_of([read[i] for i in piece.tolist()], device).float().cpu()
        return scores

    @torch.no_grad()
    def token_scores(self, prompt: WrittenPrompt, response: str, ended: bool = True) -> list[TokenScore]:
        """The score of a response up to each of its tokens; none by what reads whole ones: functions, encoders.

        Args:
            prompt: as it was written.
            response: what was said.
            ended: whether it ended by itself; then the last token is the end of its turn, without text.

        Raises:
            UserError: a prompt that the reward model's template refuses.
        """
        if not isinstance(self.scores_by, TextScorer) or not isinstance(self.scores_by.model, ScalarLM):
            return []
        model, tokenizer = self.scores_by.model, self.scores_by.tokenizer
        ids = self.scores_by.encode(prompt, response, ended)
        _, answer = self.scores_by.chat.encode_dialogue(prompt.prompt, response, prompt.tools, ended)
        said = ids[max(0, len(ids) - len(answer)) :]
        sequence = torch.tensor([ids], device=next(model.parameters()).device)
        scores = model(sequence, torch.ones_like(sequence, dtype=torch.bool))[0, len(ids) - len(said) :].tolist()
        whole, before, found = decode_response(tokenizer, said), "", []
        for n, score in enumerate(scores, 1):
            # Bytes that begin a character may undo what was there before it.
            text = max(before, whole if n == len(said) else text_by(tokenizer, said[:n], whole), key=len)
            found.append(TokenScore(text[len(before) :], score))
            before = text
        return found
