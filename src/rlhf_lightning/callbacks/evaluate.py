"""A second opinion during training: answers to held-out prompts, scored by a judge that training never sees."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from rlhf_lightning.algorithms.online.checks import check_scores
from rlhf_lightning.algorithms.online.stage import OnlineStage
from rlhf_lightning.arguments import AT_LEAST_1, POSITIVE, Range, check_arguments
from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.chat.spacing import Spacing
from rlhf_lightning.chat.written import WrittenPrompt
from rlhf_lightning.data.collate import EncodedPrompt, collate_prompts
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.judge import Judge
from rlhf_lightning.functional import masked_moments
from rlhf_lightning.models.reward_functions import RewardFunction
from rlhf_lightning.models.tokenizer import filler_id
from rlhf_lightning.rng import forked_rng
from rlhf_lightning.training.reporting import report_progress


class Judged(NamedTuple):
    """What a judge found of a policy; over all processes, and the same on each.

    Attributes:
        iteration: how many the policy had been trained for.
        score: mean score of the judge.
        score_std: standard deviation of the judge's scores.
        proxy_score: mean score, of the same answers, by the reward that training uses.
        kl: to the reference, k1 estimate, nats per response.
        eos_rate: share of answers that ended by themselves.
        response_length: tokens, the end of turn included.
        answers: how many there were.
    """

    iteration: int
    score: float
    score_std: float
    proxy_score: float
    kl: float
    eos_rate: float
    response_length: float
    answers: int


@runtime_checkable
class JudgeListener(Protocol):
    """A callback that wants to know what the judge found, as soon as it is known."""

    def on_judged(self, trainer: pl.Trainer, pl_module: pl.LightningModule, judged: Judged) -> None:
        """Receive it; called on every process."""


class Evaluate(Callback):
    """Lets a held-out judge score the policy's answers every few iterations of PPO, RLOO or GRPO.

    Logged under `judge/` before the first iteration, after every `every_n_iterations` and at the end, at the number of
    iterations that the policy had been trained for, where `train/` has what was measured of the same policy. Prompts
    and random numbers are the same each time and not those of training, which is bit for bit the same without it.

    `judge/score` can be the `monitor` of a `ModelCheckpoint`; `OverOptimisation` acts on it.

    Args:
        judge: as the module's `reward`, but another one: folder or hub id of a reward model, or a function or its
            import path.
        every_n_iterations: how often.
        num_prompts: held-out prompts of the data that are answered, over all processes.
        prompts: prompts to answer in place of those, as in the data: plain text, or a dialogue in Human and Assistant
            turns.
        judge_timeout: seconds that one call of a function may take; None for no limit.
        judge_weights: what the raw logit of each label of a reward model counts, by its name or number; needed where it
            has several.

    Attributes:
        points: what was found so far, also before a run was resumed.
    """

    def __init__(
        self,
        judge: str | RewardFunction,
        every_n_iterations: int = 10,
        num_prompts: int = 64,
        prompts: list[str] | None = None,
        judge_timeout: float | None = None,
        judge_weights: dict[str, float] | None = None,
    ) -> None:
        ranges = {"every_n_iterations": AT_LEAST_1, "num_prompts": AT_LEAST_1, "judge_timeout": POSITIVE}
        ranges["judge_weights"] = Range()
        check_arguments(Evaluate, locals(), ranges)
        if prompts is not None and not prompts:
            raise UserError("Evaluate: prompts is empty; give at least one, or leave it out")
        self.judge = judge
        self.every_n_iterations = every_n_iterations
        self.num_prompts = num_prompts
        self.prompts = prompts
        self.judge_timeout = judge_timeout
        self.judge_weights = judge_weights
        self.points: list[Judged] = []
        self._judge: Judge | None = None
        self._asked: tuple[PromptBatch, Tensor] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Load the judge: before the models of training, which a strategy may load in parts.

        Raises:
            UserError: no such judge, the reward of training itself, or a module whose policy answers no prompts.
        """
        if stage != "fit" or self._judge is not None:
            return
        if not isinstance(pl_module, OnlineStage):
            raise UserError(f"Evaluate: {type(pl_module).__name__} answers no prompts; leave the callback out")
        if (self.judge, self.judge_weights) == (pl_module.reward, pl_module.reward_weights):
            raise UserError(
                f"Evaluate: the judge, {self.judge}, is the reward that training uses, whose opinion train/score and "
                "val/score already are; name another one"
            )
        device = trainer.strategy.root_device
        with forked_rng(device, "judge"):  # what is loaded may draw random numbers
            self._judge = Judge.load(
                self.judge,
                device=device,
                trust_remote_code=pl_module.trust_remote_code,
                timeout=self.judge_timeout,
                weights=self.judge_weights,
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge where the policy starts; a resumed run has done so."""
        self._asked = self._share(trainer, pl_module)
        if not self.points:
            self._evaluate(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Judge the policy if it is time; other callbacks find the numbers in `trainer.callback_metrics`."""
        if pl_module.iteration % self.every_n_iterations == 0:
            for name, value in self._evaluate(trainer, pl_module).items():
                pl_module.log(name, value, logger=False, batch_size=self.points[-1].answers)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Judge what training ends with."""
        if self.points[-1].iteration < pl_module.iteration:
            self._evaluate(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """What was found so far."""
        return {"points": [point._asdict() for point in self.points]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what had been found."""
        self.points = [Judged(**point) for point in state_dict["points"]]

    @torch.no_grad()
    def _evaluate(self, trainer: pl.Trainer, pl_module: Any) -> dict[str, float]:
        """Answer and judge; every process must call it. Returns what is logged."""
        assert self._judge is not None
        assert self._asked is not None
        prompts, counted = self._asked
        with trainer.precision_plugin.forward_context():
            generation, texts = pl_module.answer(prompts, pl_module.random_by_row(prompts.row_ids, "judge"))
            measured = pl_module.combined(pl_module.measure_answers(prompts, generation, texts), prompts.sources)
        report_progress(pl_module, "judging", 0, 1)
        written = prompts.written or [WrittenPrompt(prompt) for prompt in prompts.prompts]
        spacing = Spacing.of(chat_of(trainer, pl_module))
        said = [spacing.content(*answer) for answer in zip(written, texts, strict=True)]
        rows = prompts.row_ids.tolist()
        with forked_rng(pl_module.device, "judge"):  # a function may draw random numbers
            scores = self._judge.scores(written, said, generation.ended.tolist(), rows).to(pl_module.device)
        report_progress(pl_module, "judging", 1, 1)
        check_scores(pl_module, scores, prompts.row_ids)
        count, score, variance = masked_moments(scores, counted, pl_module.reduce)
        each = (measured.scores, measured.kl, generation.ended, generation.response_mask.sum(dim=1))
        sums = torch.stack([torch.where(counted, one.float(), 0).sum() for one in each])
        proxy, kl, ended, length = (pl_module.reduce(sums) / count).tolist()
        judged = Judged(
            iteration=pl_module.iteration,
            score=float(score),
            score_std=float(variance.sqrt()),
            proxy_score=proxy,
            kl=kl,
            eos_rate=ended,
            response_length=length,
            answers=int(count),
        )
        return self._tell(trainer, pl_module, judged)

    def _tell(self, trainer: pl.Trainer, pl_module: pl.LightningModule, judged: Judged) -> dict[str, float]:
        self.points.append(judged)
        metrics = {f"judge/{name}": value for name, value in judged._asdict().items() if name not in _NOT_LOGGED}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=judged.iteration)
            logger.save()
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, JudgeListener):
                callback.on_judged(trainer, pl_module, judged)
        return metrics

    def _share(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[PromptBatch, Tensor]:
        """This process's prompts, as many as on each other one, and which of them count, `[B]`, bool."""
        if self.prompts is None:
            dataset, collate = _held_out(trainer)
            count = min(self.num_prompts, len(dataset))
            places = [i * len(dataset) // count for i in range(count)]  # from all over, where sources stand in order
        else:
            chat, filler = chat_of(trainer, pl_module), filler_id(pl_module.tokenizer)  # type: ignore[arg-type]
            encoded = [chat.encode_prompt(prompt) for prompt in self.prompts]
            dataset = [
                EncodedPrompt(ids, text, row, WrittenPrompt(prompt))
                for row, ((text, ids), prompt) in enumerate(zip(encoded, self.prompts, strict=True))
            ]
            places, collate = [*range(len(dataset))], lambda rows: collate_prompts(rows, filler)
        mine = places[trainer.global_rank :: trainer.world_size]
        most = -(-len(places) // trainer.world_size)
        batch = collate([dataset[place] for place in [*mine, *places[: most - len(mine)]]])
        counted = torch.arange(most, device=pl_module.device) < len(mine)
        moved: PromptBatch = trainer.strategy.batch_to_device(batch)
        return moved, counted


_NOT_LOGGED = ("iteration", "answers")


def _held_out(trainer: pl.Trainer) -> tuple[Any, Any]:
    """The examples of the validation loader, and what makes a batch of them."""
    datamodule = getattr(trainer, "datamodule", None)
    loader = datamodule.val_dataloader() if datamodule is not None else None
    if not loader or not hasattr(loader, "dataset"):
        raise UserError(
            "Evaluate: the data hold no prompts out for the judge; set the data's validation_split or validation_data, "
            "or give the callback prompts"
        )
    return loader.dataset, loader.collate_fn


def chat_of(trainer: pl.Trainer, pl_module: Any) -> ChatEncoder:
    """What writes dialogues as the policy reads them.

    Args:
        trainer: whose data module may have it.
        pl_module: has the tokenizer.
    """
    chat = getattr(getattr(trainer, "datamodule", None), "chat", None)
    return chat if isinstance(chat, ChatEncoder) else ChatEncoder(pl_module.tokenizer)
