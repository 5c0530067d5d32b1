"""What is asked of a plan: a stage's settings as its config has them, and the machines.

Batch sizes of a config are global, over all processes; `micro_batch_size`, `max_tokens_per_batch` and
`generation_batch_size` are those of one process.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rlhf_lightning.algorithms.online.answering import AnsweringStage
from rlhf_lightning.algorithms.online.checks import computes_exactly
from rlhf_lightning.algorithms.online.stage import OnlineStage
from rlhf_lightning.algorithms.pairs import PairStage
from rlhf_lightning.algorithms.stage import Stage
from rlhf_lightning.arguments import per_process
from rlhf_lightning.generation.sampling import Sampling
from rlhf_lightning.planning.passes import Load
from rlhf_lightning.training.sheets import Sheet, sheet_of
from rlhf_lightning.training.token_budget import token_budget

USUAL_GPU = 80.0
"""GiB of a GPU that nothing is known of, by which batches and logits are cut."""

_SAMPLING = Sampling()


@dataclass(frozen=True)
class Request:
    """A run to be planned.

    Args:
        stage: class of the module.
        model: its arguments, as a config has them.
        data: those of the data module.
        trainer: those of the trainer.
        gpus: of all machines together; processes, where they are none.
        nodes: machines.
        gpu_memory: of each, GiB; None where it is not known.
        on_gpu: the processes run on GPUs.
    """

    stage: type[Stage]
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    trainer: Mapping[str, Any] = field(default_factory=dict)
    gpus: int = 1
    nodes: int = 1
    gpu_memory: float | None = None
    on_gpu: bool = True

    @property
    def sheet(self) -> Sheet:
        """Of the strategy.

        Raises:
            UserError: it is not supported, or not known.
        """
        whole = self.model.get("micro_batch_size") is None and self.model.get("max_tokens_per_batch", "auto") is None
        precision = self.trainer.get("precision") or "32-true"
        return sheet_of(self.trainer.get("strategy"), precision, self.gpus, accumulates=not whole)

    @property
    def prompt_length(self) -> int:
        """Most tokens of a prompt to be answered."""
        return int(self.data.get("max_prompt_length") or 256)

    @property
    def response_length(self) -> int:
        """Most tokens of an answer."""
        sampling = self.model.get("sampling") or {}
        given = sampling.get("max_new_tokens") if isinstance(sampling, Mapping) else sampling.max_new_tokens
        return int(given or _SAMPLING.max_new_tokens)

    @property
    def answers(self) -> bool:
        """Whether the stage answers prompts."""
        return issubclass(self.stage, AnsweringStage)

    @property
    def has_pairs(self) -> bool:
        """Whether an example is a pair."""
        return issubclass(self.stage, PairStage)

    @property
    def length(self) -> int:
        """Most tokens of a row."""
        return self.prompt_length + self.response_length if self.answers else int(self.data.get("max_length") or 512)

    @property
    def tokens_per_example(self) -> int:
        """What `max_tokens_per_batch` counts for a row as long as it may be."""
        return self.length * (2 if self.has_pairs else 1)

    @property
    def text(self) -> tuple[int, int] | None:
        """Most tokens of a row of text that a policy goes on learning, and rows of a step; None for none."""
        given: Any = self.model.get("pretraining")
        if given is None:
            return None
        if isinstance(given, Mapping):
            said = given.get("init_args") or {}
            return int(said.get("max_length") or 512), int(said.get("batch_size") or 8)
        return given.limits.max_length, given.batch_size

    def sizes(self, stage: Stage) -> dict[str, int]:
        """Examples of an optimizer step, of a micro-batch and so on, on one process.

        Args:
            stage: made from the arguments.
        """
        if self.answers:
            online: Any = stage
            step = per_process("minibatch_size", online.minibatch_size, self.gpus)
            responses = (
                per_process("rollout_batch_size", online.rollout_batch_size, self.gpus) * online.samples_per_prompt
            )
            given = self.model.get("generation_batch_size")
            rollout = {"responses": responses, "answered": min(responses, int(given or responses))}
        else:
            step, rollout = per_process("batch_size", int(self.data.get("batch_size") or 8), self.gpus), {}
        at_once = stage.micro_batch_size or step
        if (budget := self._token_budget(stage)) is not None:
            at_once = max(1, budget // self.tokens_per_example)
        at_once = min(at_once, step)
        return {"step": step, "micro_batch": at_once, "micro_batches": -(-step // at_once), **rollout}

    def _texts(self, stage: Stage, sizes: Mapping[str, int]) -> dict[str, int]:
        """Of text beside the responses: what `Load` says of it."""
        if self.text is None:
            return {}
        length, of_step = self.text
        rows = per_process("pretraining batch_size", of_step, self.gpus)
        at_once = stage.micro_batch_size or sizes["step"]
        if (budget := self._token_budget(stage)) is not None:
            at_once = max(1, budget // length)
        at_once = min(at_once, rows)
        texts = -(-rows // at_once)
        return {"text_rows": at_once, "text_length": length, "texts": -(-texts // sizes["micro_batches"])}

    def _token_budget(self, stage: Stage) -> int | None:
        if stage.micro_batch_size is not None:
            return None
        if stage.max_tokens_per_batch != "auto":
            return stage.max_tokens_per_batch
        kind, memory = ("cuda", (self.gpu_memory or USUAL_GPU) * 2**30) if self.on_gpu else ("cpu", 0)
        return token_budget(
            stage,
            kind,
            int(memory),
            sequences=stage.sequences_per_example,
            share=self.sheet.weight_share,
            checkpointing=stage.gradient_checkpointing,
        )

    def load(self, stage: Stage) -> Load:
        """What goes through the models at once.

        Args:
            stage: made from the arguments.
        """
        sizes, sheet = self.sizes(stage), self.sheet
        return Load(
            rows=sizes["micro_batch"],
            length=self.length,
            response=self.response_length if self.answers else 0,
            answered=sizes.get("answered", 0),
            is_cast=sheet.is_cast,
            one_by_one=sheet.takes_losses_one_by_one,
            on_gpu=self.on_gpu,
            gpu_memory=int((self.gpu_memory or USUAL_GPU) * 2**30) if self.on_gpu else 0,
            takes_sampler_logprobs=self._takes_sampler_logprobs(stage),
            **self._texts(stage, sizes),
        )

    def _takes_sampler_logprobs(self, stage: Stage) -> bool:
        if not isinstance(stage, OnlineStage):
            return False
        precision = self.trainer.get("precision") or "32-true"
        exact = computes_exactly(precision, stage.frozen_dtype, "cuda" if self.on_gpu else "cpu")
        return stage.takes_sampler_logprobs(exact)

    def changed(self, part: str, **values: Any) -> Request:
        """The same with other settings.

        Args:
            part: `model`, `data` or `trainer`.
            **values: by name; a mapping is merged into the one that is there.
        """
        settings = copy.deepcopy(dict(getattr(self, part)))
        for name, value in values.items():
            old = settings.get(name)
            settings[name] = {**old, **value} if isinstance(old, Mapping) and isinstance(value, Mapping) else value
        changed: dict[str, Any] = {part: settings}
        return replace(self, **changed)
