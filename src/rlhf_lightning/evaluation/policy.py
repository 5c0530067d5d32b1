"""A language model outside of training: its weights, its tokenizer, and the form in which it reads dialogues.

Notation: B prompts, P padded prompt length, R tokens of a response.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from typing import Literal, NamedTuple

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.batches import PromptBatch, length_sorted_pieces
from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.chat.spacing import Spacing
from rlhf_lightning.chat.text_so_far import TextSoFar
from rlhf_lightning.chat.written import WrittenPrompt
from rlhf_lightning.data.collate import EncodedPrompt, collate_prompts, pad
from rlhf_lightning.data.limits import cut_prompt
from rlhf_lightning.errors import UserError
from rlhf_lightning.forward.capacity import context_length
from rlhf_lightning.forward.hidden import response_logprobs
from rlhf_lightning.generation.engine import Generation, TransformersEngine, decode_responses
from rlhf_lightning.generation.sampling import RandomSource, Sampling
from rlhf_lightning.models.causal_lm import freeze, load_causal_lm
from rlhf_lightning.models.rendering import policy_chat, recorded_chat
from rlhf_lightning.models.tokenizer import filler_id, load_tokenizer
from rlhf_lightning.rng import generator

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Answer(NamedTuple):
    """A response of a policy.

    Attributes:
        text: what was said, without what the format writes around it.
        raw: the same as the policy continued its prompt, special tokens left out.
        prompt_ids: what it was given, `[p]`, int64, on the CPU.
        ids: its tokens, the EOS included, `[r]`, int64, on the CPU.
        ended: whether it ended by itself.
        logprobs: of each token at the sampling temperature, nats, `[r]`, float32, on the CPU; None if not asked for.
    """

    text: str
    raw: str
    prompt_ids: Tensor
    ids: Tensor
    ended: bool
    logprobs: Tensor | None = None


class Policy:
    """A language model that is asked.

    Args:
        model: frozen here, unless it is in training.
        tokenizer: its own.
        name: as results name it.
        chat: writes dialogues as it reads them; None to find out from the model's config and tokenizer.
        batch_size: prompts answered at once.
        in_training: leave the model as it is; it is asked between two steps.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str = "",
        chat: ChatEncoder | None = None,
        batch_size: int = 32,
        in_training: bool = False,
    ) -> None:
        if not in_training:
            freeze(model)
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.chat = chat or policy_chat(model, tokenizer)
        self.spacing = Spacing.of(self.chat)
        self.context = context_length(model.config)
        self.engine = TransformersEngine(model, tokenizer, batch_size)

    @classmethod
    def load(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        dtype: Dtype = "auto",
        device: str | torch.device | None = None,
        batch_size: int = 32,
        trust_remote_code: bool = False,
    ) -> Policy:
        """Load a policy.

        Args:
            name_or_path: a Hugging Face folder, a PEFT adapter folder, or a hub id.
            dtype: of the weights; `auto` for bfloat16 on GPUs and float32 elsewhere.
            device: where it runs; None for the first GPU if there is one, else the CPU.
            batch_size: prompts answered at once.
            trust_remote_code: allow the folder to run Python code of its own.

        Raises:
            UserError: there is no language model at that place, or no such device.
        """
        place = find_device(device)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype_on(place, dtype))
        try:
            model = load_causal_lm(name_or_path, trust_remote_code=trust_remote_code)
        finally:
            torch.set_default_dtype(before)
        tokenizer = load_tokenizer(name_or_path, trust_remote_code)
        model.to(place)  # type: ignore[arg-type]
        return cls(model, tokenizer, os.fspath(name_or_path), batch_size=batch_size)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.model.device

    @property
    def ample_response(self) -> int:
        """Tokens of a response that is not to be cut early: 256, or half of a context that is short."""
        return 256 if self.context is None else max(1, min(256, self.context // 2))

    def asked(self, text: str) -> WrittenPrompt:
        """What somebody's words are to the model.

        They are a prompt as its training read prompts of text, where that is recorded; one turn of the user, where it
        is not and there is a chat template; and text to go on with, where there is neither.

        Args:
            text: the words.
        """
        turns = recorded_chat(self.model.config, self.tokenizer) is None and self.tokenizer.chat_template
        return WrittenPrompt([{"role": "user", "content": text}] if turns else text)

    def fits(self, written: WrittenPrompt, room: int) -> bool:
        """Whether the context holds a whole prompt and `room` tokens after it.

        Args:
            written: the prompt.
            room: tokens that a response may have.
        """
        _, ids = self.chat.encode_prompt(written.prompt, written.tools)
        return self.context is None or len(ids) + room <= self.context

    def read(self, prompts: Sequence[WrittenPrompt], room: int = 1, rows: Iterable[int] | None = None) -> PromptBatch:
        """Prompts as the policy is given them; one that leaves less than `room` for a response loses its beginning.

        Args:
            prompts: B of them.
            room: tokens that a response may have.
            rows: number of each prompt's row; None to count them.

        Raises:
            UserError: turns that the format refuses, or a context without any room for a prompt.
        """
        limit = None if self.context is None else self.context - room
        if limit is not None and limit < 1:
            raise UserError(
                f"{self.name or 'the model'} reads {self.context} tokens, which leave no room for a prompt before "
                f"{room} tokens of a response; lower max_new_tokens"
            )
        numbers = range(len(prompts)) if rows is None else rows
        encoded, cut = [], 0
        for number, written in zip(numbers, prompts, strict=True):
            text, ids = self.chat.encode_prompt(written.prompt, written.tools)
            if limit is not None and len(ids) > limit:
                cut += 1
                ids, _ = cut_prompt(ids, ids[:0], limit, self.chat.beginning(ids))
                (text,) = self.chat.decode([ids])
            encoded.append(EncodedPrompt(ids, text, number, written))
        if cut:
            rank_zero_info(
                f"{cut} of {len(prompts)} prompts leave {self.name or 'the model'} no room for {room} tokens in its "
                f"context of {self.context}, and lost their beginning"
            )
        batch = collate_prompts(encoded, filler_id(self.tokenizer))
        return batch._replace(
            prompt_ids=batch.prompt_ids.to(self.device), prompt_mask=batch.prompt_mask.to(self.device)
        )

    def answer(
        self,
        prompts: Sequence[WrittenPrompt],
        sampling: Sampling,
        random: RandomSource | None = None,
        *,
        with_logprobs: bool = False,
        on_token: Callable[[int], None] | None = None,
        synced: bool = False,
    ) -> list[Answer]:
        """Answer prompts, those of similar length together.

        Args:
            prompts: B of them.
            sampling: how responses are drawn.
            random: see `row_generators`, which lets a response depend on nothing but its own prompt and place.
            with_logprobs: also keep the log-probability of each token.
            on_token: told how many tokens are done, of `max_new_tokens` for each batch.
            synced: every process runs the same number of forwards (ZeRO-3, FSDP2).
        """
        batch = self.read(prompts, sampling.max_new_tokens)
        generation = self.engine.generate(
            batch.prompt_ids,
            batch.prompt_mask,
            sampling,
            generator=random,
            on_token=on_token,
            with_logprobs=with_logprobs,
            synced=synced,
        )
        return self._answers(prompts, batch, generation, decode_responses(self.tokenizer, generation))

    def stream(
        self,
        prompts: Sequence[WrittenPrompt],
        sampling: Sampling,
        random: RandomSource | None = None,
    ) -> Generator[list[Answer]]:
        """Answer prompts token by token: after each one the answers so far, and in the end what `answer` returns.

        Each text is the beginning of the next. Closing the iterator stops it; the model must not be used otherwise
        until it has ended or is closed (see `TransformersEngine.stream`).

        Args:
            prompts: B of them.
            sampling: how responses are drawn.
            random: as for `answer`.
        """
        batch = self.read(prompts, sampling.max_new_tokens)
        texts = [TextSoFar(self.tokenizer) for _ in prompts]
        limit = sampling.max_new_tokens
        steps = self.engine.stream(batch.prompt_ids, batch.prompt_mask, sampling, generator=random)
        with closing(steps):
            for generation in steps:
                lengths = generation.response_mask.sum(dim=1)
                complete = (generation.ended | (lengths == limit)).tolist()
                ids = [row[:n] for row, n in zip(generation.response_ids.tolist(), lengths.tolist(), strict=True)]
                raw = [text.read(*row) for text, *row in zip(texts, ids, complete, strict=True)]
                yield self._answers(prompts, batch, generation, raw, complete)

    def _answers(
        self,
        prompts: Sequence[WrittenPrompt],
        batch: PromptBatch,
        generation: Generation,
        raw: list[str],
        complete: list[bool] | None = None,
    ) -> list[Answer]:
        lengths = generation.response_mask.sum(dim=1).tolist()
        ended, ids = generation.ended.tolist(), generation.response_ids.cpu()
        logprobs = None if generation.logprobs is None else generation.logprobs.cpu()
        asked, asked_mask = batch.prompt_ids.cpu(), batch.prompt_mask.cpu()
        said = [
            (self.spacing.content if complete is None or complete[i] else self.spacing.so_far)(written, raw[i]).strip()
            for i, written in enumerate(prompts)
        ]
        return [
            Answer(
                text=said[i],
                raw=raw[i],
                prompt_ids=asked[i][asked_mask[i]],
                ids=ids[i, : lengths[i]].clone(),
                ended=ended[i],
                logprobs=None if logprobs is None else logprobs[i, : lengths[i]],
            )
            for i in range(len(prompts))
        ]

    def as_taught(self, written: WrittenPrompt, answer: Answer) -> str:
        """An answer as a row writes it, so that training on the row teaches the tokens that were drawn.

        A text that is no dialogue is continued to the letter, so the space between the two belongs to the answer.

        Args:
            written: what was answered.
            answer: to it.
        """
        return answer.raw if written.continues and not self.spacing.always else answer.text

    def row_generators(self, seed: int, places: Iterable[Sequence[int | str]]) -> list[torch.Generator]:
        """A source of random numbers for each prompt, on the policy's device.

        Args:
            seed: of the evaluation.
            places: for each prompt what tells it from the others, such as its row and the number of the sample.
        """
        return [generator(self.device, seed, *place) for place in places]

    @torch.no_grad()
    def logprobs(
        self,
        prompts: Sequence[Tensor],
        responses: Sequence[Tensor],
        temperature: float = 1.0,
        max_tokens: int = 8192,
    ) -> list[Tensor]:
        """What the policy thinks of responses: the log-probability of each token, nats.

        Args:
            prompts: ids of each prompt, `[p]`, at least one.
            responses: ids of each response, `[r]`.
            temperature: the logits are divided by it.
            max_tokens: read at once, padding included.

        Returns:
            One of `[r]` for each response, float32, on the CPU, in the order given.
        """
        lengths = torch.tensor([[len(p), len(r)] for p, r in zip(prompts, responses, strict=True)]).reshape(-1, 2)
        found: list[Tensor] = [torch.zeros(0)] * len(prompts)
        filler = filler_id(self.tokenizer)
        for piece in length_sorted_pieces(lengths, None, max_tokens):
            rows = piece.tolist()
            asked, asked_mask = pad([prompts[i].numpy() for i in rows], filler, "left")
            said, mask = pad([responses[i].numpy() for i in rows], filler, "right")
            ids = torch.cat([asked, said], dim=1).to(self.device)  # [b, p + r]
            kept = torch.cat([asked_mask, mask], dim=1).to(self.device)
            values, _ = response_logprobs(self.model, ids, kept, mask.to(self.device), temperature)
            for row, value, length in zip(rows, values.cpu(), mask.sum(dim=1).tolist(), strict=True):
                found[row] = value[:length]
        return found


def find_device(device: str | torch.device | None) -> torch.device:
    """Where models run.

    Args:
        device: `cpu`, `cuda`, `cuda:1` and so on; None for the first GPU if there is one, else the CPU.

    Raises:
        UserError: there is no such device.

    Example:
        >>> find_device("cpu")
        device(type='cpu')
    """
    if isinstance(device, torch.device):
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is None:
        return torch.device("cuda", 0) if count else torch.device("cpu")
    asked = f"--device {device or repr('')}"
    if not re.fullmatch(r"cpu|mps|cuda(:[0-9]+)?", device):
        raise UserError(f"{asked}: write cpu, cuda or cuda:1")
    kind, _, index = device.partition(":")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"{asked}: this machine has no Metal device; write cpu")
    if kind == "cuda" and not count:
        raise UserError(f"{asked}: this machine has no CUDA device; write cpu")
    if kind == "cuda" and int(index or 0) >= count:
        raise UserError(
            f"{asked}: the last CUDA device of this machine is cuda:{count - 1}; write that, or a lower one"
        )
    return torch.device(device)


def dtype_on(device: torch.device, dtype: Dtype) -> torch.dtype:
    """What `auto` means on a device: bfloat16 on a GPU that has it, else float32.

    Args:
        device: where the weights will lie.
        dtype: as the user says it.
    """
    if dtype != "auto":
        found: torch.dtype = getattr(torch, dtype)
        return found
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
