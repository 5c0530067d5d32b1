"""PPO against a reward, with a KL penalty to the SFT model.

One batch of the loader is one iteration: answer the prompts (rollout), turn scores and the KL penalty into advantages,
then improve policy and value on minibatches of that experience. Equations and their sources: docs/ppo.md.

Left out, on purpose: an entropy bonus (Zheng et al. 2023 advise against it), a pretraining loss on the side.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.algorithms.common import (
    SIZES,
    check_batch_sizes,
    check_token_budget,
    configure_optimizer,
    drop_frozen_weights,
    equally_many,
    load_run_state,
    log_metrics,
    name_rows,
    policy_chat,
    response_rows,
    run_seed,
    save_run_state,
    stage_tokenizer,
)
from rlhf_lightning.algorithms.hyperparameters import as_config, from_config, optimizer_from_config
from rlhf_lightning.algorithms.ppo import checks as ppo_checks
from rlhf_lightning.algorithms.ppo.answers import answer, measure_answers
from rlhf_lightning.algorithms.ppo.controllers import KLController, RunningMoments
from rlhf_lightning.algorithms.ppo.experience import Experience
from rlhf_lightning.algorithms.ppo.losses import ppo_losses, tallied
from rlhf_lightning.algorithms.ppo.models import ActorCriticSource, FrozenDtype, TrunkValue, ValueTrunk
from rlhf_lightning.algorithms.ppo.rollout import build_experience, experience_metrics, raw_score, shape_scores
from rlhf_lightning.algorithms.ppo.settings import KLPenalty, Objective, ScoreShaping
from rlhf_lightning.algorithms.stage import Stage
from rlhf_lightning.arguments import POSITIVE, check_arguments
from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.generation.engine import TransformersEngine
from rlhf_lightning.generation.sampling import Sampling
from rlhf_lightning.models.dtypes import keep_dtype
from rlhf_lightning.models.finetune import FineTune, enable_gradient_checkpointing
from rlhf_lightning.models.reward_functions import RewardFunction
from rlhf_lightning.models.rewarding import FunctionScorer, ModelScorer, TextScorer
from rlhf_lightning.models.scalar_lm import ScalarLM
from rlhf_lightning.rng import generator
from rlhf_lightning.training import GradientAccumulation, sum_over_ranks, world_size
from rlhf_lightning.training.optim import PPO_ADAMW, Schedule, learning_rates, parameter_groups
from rlhf_lightning.training.reporting import log_text, report_progress

_EVALUATED = ("score", "raw_score", "kl", "eos_rate", "response_length")


class PPOModule(Stage):
    """Improves a policy by PPO.

    Expects batches like `PromptBatch`, one per iteration. `docs/metrics.md` lists what is logged under `train/`, `val/`
    and `test/`. All batch sizes count prompts per process.

    Args:
        model_name_or_path: Hugging Face folder or hub id of the SFT model, which the policy starts from.
        reward: folder or hub id of a reward model (its tokenizer and chat template may differ from the policy's), or
            the import path of a function `(prompts: list[str], responses: list[str]) -> list[float]`, looked for in
            the working folder too; from Python also the function.
        value_name_or_path: what the value model starts from. None takes the reward model, or, where that is a function
            or reads other tokens, the policy's folder with a head that says 0.
        sampling: how responses are drawn.
        rollout_batch_size: prompts answered per iteration.
        generation_batch_size: prompts answered at once; None for the whole rollout.
        minibatch_size: responses per optimizer step.
        micro_batch_size: responses per forward and backward pass; None for the whole minibatch.
        max_tokens_per_batch: tokens per forward and backward pass, padding included, instead of `micro_batch_size`.
        ppo_epochs: passes over each rollout.
        optimizer: the optimizer of policy and value model; its learning rate is the policy's.
        value_lr: learning rate of the value model; None for the policy's.
        lr_schedule: course of the learning rates after the warm-up, in optimizer steps.
        warmup_steps: optimizer steps of linear warm-up; a number below 1 is a share of all steps.
        gradient_clip_val: norm the gradient is clipped to; None for no clipping.
        kl: the penalty that holds the policy near the reference.
        score: what happens to scores before they become rewards.
        objective: clipping, discount and weights of the losses.
        finetune: which weights of policy and value model are trained. With `lora` all models on one base share it.
        value_trunk: `own` for a value model of its own, `policy` for a second head on the policy's hidden states, which
            halves what is trained.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        compile_decoding: compile the step that answers are generated by, which takes minutes once; on CUDA as a graph.
        frozen_dtype: what frozen weights are held in; `auto` for that of the policy, `nf4` for four bits (LoRA only;
            needs bitsandbytes).
        trust_remote_code: allow the model folders to run Python code of their own.
        reward_timeout: seconds that a reward function may take over one rollout; None for no limit. One that takes
            longer ends the run with one line; a checkpoint goes on from where it was written.
        reference: folder or hub id of the frozen model that the KL is taken to; None for `model_name_or_path`. Name the
            SFT model here to evaluate a policy that PPO made.
    """

    def __init__(
        self,
        model_name_or_path: str,
        reward: str | RewardFunction,
        value_name_or_path: str | None = None,
        sampling: Sampling = Sampling(),
        rollout_batch_size: int = 64,
        generation_batch_size: int | None = None,
        minibatch_size: int = 32,
        micro_batch_size: int | None = None,
        max_tokens_per_batch: int | None = None,
        ppo_epochs: int = 2,
        optimizer: OptimizerCallable = PPO_ADAMW,
        value_lr: float | None = None,
        lr_schedule: Schedule = "linear",
        warmup_steps: float = 0,
        gradient_clip_val: float | None = 1.0,
        kl: KLPenalty = KLPenalty(),
        score: ScoreShaping = ScoreShaping(),
        objective: Objective = Objective(),
        finetune: FineTune = FineTune(),
        value_trunk: ValueTrunk = "own",
        gradient_checkpointing: bool = False,
        compile_decoding: bool = False,
        frozen_dtype: FrozenDtype = "auto",
        trust_remote_code: bool = False,
        reward_timeout: float | None = None,
        reference: str | None = None,
    ) -> None:
        super().__init__()
        sampling, kl = from_config(Sampling, sampling), from_config(KLPenalty, kl)
        score, objective = from_config(ScoreShaping, score), from_config(Objective, objective)
        finetune = from_config(FineTune, finetune)
        check_arguments(PPOModule, locals(), {**SIZES, "reward_timeout": POSITIVE})
        groups = {"sampling": sampling, "kl": kl, "score": score, "objective": objective, "finetune": finetune}
        plain = as_config(optimizer=optimizer, reward=reward, **groups)
        self.save_hyperparameters(ignore=[*plain])
        self.save_hyperparameters(plain)
        sizes = {"minibatch_size": minibatch_size, "micro_batch_size": micro_batch_size}
        check_batch_sizes(rollout_batch_size=rollout_batch_size, **sizes)
        check_batch_sizes(rollout_batch_size=rollout_batch_size, generation_batch_size=generation_batch_size)
        check_token_budget(micro_batch_size, max_tokens_per_batch)
        ppo_checks.check_temperature(sampling)
        self.strict_loading = False  # frozen weights are not in the checkpoint; load_run_state sees to the rest
        self.model_name_or_path = model_name_or_path
        self.reward = reward
        self.value_name_or_path = value_name_or_path
        self.sampling = sampling
        self.rollout_batch_size = rollout_batch_size
        self.generation_batch_size = generation_batch_size or rollout_batch_size
        self.minibatch_size = minibatch_size
        self.micro_batch_size = micro_batch_size
        self.max_tokens_per_batch = max_tokens_per_batch
        self.ppo_epochs = ppo_epochs
        self.optimizer = optimizer_from_config(optimizer)
        self.value_lr = value_lr
        self.lr_schedule: Schedule = lr_schedule
        self.warmup_steps = warmup_steps
        self.gradient_clip_val = gradient_clip_val
        self.kl = kl
        self.score = score
        self.objective = objective
        self.finetune = finetune
        self.value_trunk: ValueTrunk = value_trunk
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_decoding = compile_decoding
        self.frozen_dtype: FrozenDtype = frozen_dtype
        self.trust_remote_code = trust_remote_code
        self.reward_timeout = reward_timeout
        self.reference = reference
        self._source = ActorCriticSource(
            policy=model_name_or_path,
            reward=reward,
            value=value_name_or_path,
            finetune=finetune,
            value_trunk=value_trunk,
            frozen_dtype=frozen_dtype,
            trust_remote_code=trust_remote_code,
            reward_timeout=reward_timeout,
            reference=reference,
        )
        self._source.check()
        # One update on the whole rollout: the policy that is updated is the one that answered.
        self._on_policy = ppo_epochs == 1 and minibatch_size == rollout_batch_size
        self.kl_controller = KLController(kl.coef, kl.target, kl.horizon)
        self.score_moments = RunningMoments()
        self.iteration = 0
        self.policy: PreTrainedModel | None = None
        self.value: ScalarLM | TrunkValue | None = None
        self.reference_model: PreTrainedModel | None = None
        self.scorer: ModelScorer | TextScorer | FunctionScorer | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.engine: TransformersEngine | None = None
        self.eval_means = nn.ModuleDict({name: keep_dtype(MeanMetric()) for name in _EVALUATED})

    def setup(self, stage: str) -> None:
        """Say where an evaluation would compare a policy with itself."""
        if stage != "fit" and self.reference is None and not self.trainer.ckpt_path:
            ppo_checks.warn_own_reference(self.model_name_or_path)

    def configure_model(self) -> None:
        """Load the four models, once: policy and value to be trained, reference and reward frozen."""
        if self.policy is not None:
            return
        tokenizer = stage_tokenizer(self)
        models = self._source.load(policy_chat(self, tokenizer))
        self.reference_model, self.scorer, self.value = models.reference, models.scorer, models.value
        if self.gradient_checkpointing:
            for model in (models.policy, *([models.value.model] if isinstance(models.value, ScalarLM) else [])):
                enable_gradient_checkpointing(model)
        self.tokenizer = tokenizer
        self.policy = models.policy

    @property
    def export_model(self) -> PreTrainedModel:
        """The policy."""
        assert self.policy is not None
        return self.policy

    def configure_optimizers(self) -> Any:
        """One optimizer for policy and value model, each with its learning rate; DeepSpeed allows one only."""
        assert self.value is not None
        value_options = {} if self.value_lr is None else {"lr": self.value_lr}
        groups = parameter_groups(self.export_model) + parameter_groups(self.value, **value_options)
        steps_per_rollout = self.ppo_epochs * self.rollout_batch_size // self.minibatch_size
        return configure_optimizer(self, self.optimizer(groups), steps_per_rollout)

    def on_fit_start(self) -> None:
        """Check that the longest sequence fits the model."""
        assert self.value is not None
        assert self.reference_model is not None
        ppo_checks.check_frozen_dtype(self.trainer.precision, self.frozen_dtype)
        self.export_model.train()
        self.value.train()
        prompt_limit = getattr(getattr(self.trainer, "datamodule", None), "max_prompt_length", None)
        for part in (self.export_model, self.reference_model, self.value, self.scorer):
            ppo_checks.check_context(part, prompt_limit, self.sampling.max_new_tokens)

    def training_step(self, prompts: PromptBatch, batch_idx: int) -> Tensor:
        """One PPO iteration; returns the mean loss of its updates, detached, for callbacks."""
        self.check_batch(prompts, PromptBatch, "PromptDataModule")
        ppo_checks.check_rollout_size(len(prompts.prompts), self.rollout_batch_size)
        experience, metrics = self.rollout(prompts)
        started = time.perf_counter()
        lr = learning_rates(self.optimizers())
        order = generator("cpu", run_seed(self), "minibatches", self.iteration, self.global_rank)
        updates: list[dict[str, Tensor]] = []
        total = self.ppo_epochs * self.rollout_batch_size // self.minibatch_size
        for minibatch in experience.minibatches(self.ppo_epochs, self.minibatch_size, order):
            updates.append(self.update(minibatch, is_first=self.iteration == 0 and not updates))
            report_progress(self, "updating", len(updates), total)
        loss = torch.stack([update.pop("loss") for update in updates]).mean()
        metrics |= {name: torch.stack([update[name] for update in updates]).mean() for name in updates[0]}
        metrics |= {"lr": lr[0], "value_lr": lr[-1], "seconds_updating": time.perf_counter() - started}
        shown = {f"train/{name}": value for name, value in metrics.items()}
        log_metrics(self, shown, shown="train/score", batch_size=self.rollout_batch_size)
        self.iteration += 1
        return loss

    @torch.no_grad()
    def rollout(self, prompts: PromptBatch) -> tuple[Experience, dict[str, Any]]:
        """Answer prompts and measure the answers.

        Args:
            prompts: this rank's share of the iteration.

        Returns:
            The experience, and what is logged of it, over all ranks.

        Raises:
            NonFiniteError: on every rank, if a score of any rank is NaN or infinite.
        """
        started = time.perf_counter()
        random = generator(self.device, run_seed(self), "rollout", self.iteration, self.global_rank)
        generation, texts = answer(self, prompts, random, with_logprobs=self._on_policy)
        generated = time.perf_counter()
        measured = measure_answers(self, prompts, generation, texts, with_values=True)
        self.score_moments.update(measured.scores, self._reduce)
        scores = shape_scores(measured.scores, generation.ended, self.score_moments, self.score)
        kl_coef = self.kl_controller.coef
        experience = build_experience(
            prompts, generation, measured, scores, self.kl, kl_coef, self.objective, self._reduce
        )
        metrics: dict[str, Any] = dict(experience_metrics(experience, self._reduce, self.objective.gamma))
        metrics |= raw_score(self.scorer, metrics["score"])
        if self.iteration == 0:
            ppo_checks.warn_equal_scores(self.score_moments, measured.scores)
            ppo_checks.check_probe(self.scorer, self.frozen_dtype == "nf4")
            if self._source.starts_at_reference:
                ppo_checks.check_fresh_policy(metrics, self._exact)
        self.kl_controller.update(float(metrics["kl"]), self.rollout_batch_size * world_size(self))
        metrics |= {
            "kl_coef": kl_coef,
            "seconds_generating": generated - started,
            "seconds_scoring": time.perf_counter() - generated,
        }
        sample = f"{prompts.prompts[0]}**{texts[0].strip()}**\n\nscore {float(measured.scores[0]):.3f}"
        log_text(self, "train/sample", sample, self.trainer.global_step)
        return experience, metrics

    @property
    def piece_size(self) -> int | None:
        """Responses that go through a model at once; None where tokens are counted instead."""
        return self.micro_batch_size or (None if self.max_tokens_per_batch else self.minibatch_size)

    def _reduce(self, tensor: Tensor) -> Tensor:
        return sum_over_ranks(self, tensor)

    @property
    def _exact(self) -> bool:
        return ppo_checks.computes_exactly(self.trainer.precision, self.frozen_dtype, self.device.type)

    def update(self, minibatch: Experience, is_first: bool = False) -> dict[str, Tensor]:
        """One optimizer step.

        Args:
            minibatch: its responses.
            is_first: check that old and new log-probabilities agree, as they must before the first step.

        Returns:
            What is logged of it, and `loss`, scalars over all ranks.
        """
        num_tokens = sum_over_ranks(self, minibatch.response_mask.sum())
        limits = self.piece_size, self.max_tokens_per_batch
        micro_batches = equally_many(self, lambda count: minibatch.micro_batches(*limits, count))
        assert self.value is not None
        parts = {"policy": self.export_model, "value": self.value}
        accumulation = GradientAccumulation(self, len(micro_batches), parts)
        sums: dict[str, Tensor] = {}
        fixed = self.objective, self.sampling.temperature, self._on_policy
        for micro_batch in micro_batches:
            losses = ppo_losses(self.export_model, self.value, micro_batch, *fixed)
            accumulation.backward(loss / num_tokens for loss in tallied(losses, sums))
        means = sum_over_ranks(self, torch.stack(list(sums.values()))) / num_tokens
        result = dict(zip(sums, means, strict=True))
        if is_first:
            ppo_checks.check_first_ratio(result["ratio"], self._exact)
        result["grad_norm"] = accumulation.step(context=name_rows(minibatch.row_ids))
        result |= {f"grad_norm_{part}": norm for part, norm in accumulation.part_norms.items()}
        result["loss"] = accumulation.loss
        if is_first:
            ppo_checks.check_first_gradient(self, result["grad_norm"], minibatch, self.objective.value_coef)
        return result

    def _evaluate(self, prompts: PromptBatch, batch_idx: int, stage: str) -> dict[str, Any]:
        self.check_batch(prompts, PromptBatch, "PromptDataModule")
        random = generator(self.device, run_seed(self), stage, batch_idx, self.global_rank)
        generation, texts = answer(self, prompts, random)
        measured = measure_answers(self, prompts, generation, texts)
        values = {
            "score": measured.scores,
            **raw_score(self.scorer, measured.scores),
            "kl": measured.kl,
            "eos_rate": generation.ended.float(),
            "response_length": generation.response_mask.sum(dim=1).float(),
        }
        for name, value in values.items():
            metric: Any = self.eval_means[name]
            metric.update(value)
            self.log(f"{stage}/{name}", metric, prog_bar=name == "score", batch_size=len(texts))
        return {"prompts": prompts.prompts, "responses": texts, "scores": measured.scores}

    def validation_step(self, prompts: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Answer held-out prompts; the random numbers are those of every validation, so curves compare."""
        return self._evaluate(prompts, batch_idx, "val")

    def test_step(self, prompts: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Answer test prompts."""
        return self._evaluate(prompts, batch_idx, "test")

    def predict_step(self, prompts: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Answer prompts and score the answers.

        Returns:
            For each prompt `row`, `prompt`, `response`, `ended`, `tokens`, `score` and `kl`, the k1 estimate of the KL
            to the reference in nats.
        """
        self.check_batch(prompts, PromptBatch, "PromptDataModule")
        random = generator(self.device, run_seed(self), "predict", batch_idx, self.global_rank)
        generation, texts = answer(self, prompts, random)
        measured = measure_answers(self, prompts, generation, texts)
        columns = response_rows(prompts, generation, texts), measured.scores.tolist(), measured.kl.tolist()
        return [{**row, "score": score, "kl": kl} for row, score, kl in zip(*columns, strict=True)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out frozen weights; keep the KL coefficient, the score moments and the place in the random numbers."""
        drop_frozen_weights(self, checkpoint)
        controllers = {"kl_coef": self.kl_controller.coef, "score_moments": {**vars(self.score_moments)}}
        save_run_state(self, checkpoint, iteration=self.iteration, **controllers)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on where the run that wrote the checkpoint was."""
        self.configure_model()
        self._run_state = state = load_run_state(self, checkpoint)
        self.iteration = state["iteration"]
        self.kl_controller.coef = state["kl_coef"]
        self.score_moments = RunningMoments(**state["score_moments"])
