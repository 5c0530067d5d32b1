"""What algorithms share that learn from scores of their policy's own answers: PPO, RLOO and GRPO.

One batch of the loader is one iteration: answer the prompts (rollout), turn scores into advantages, then improve the
policy on minibatches of that experience. An algorithm says how scores become advantages (`experience_of`) and what is
minimised (`losses`); everything else stands here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_lightning.algorithms.hyperparameters import from_config
from rlhf_lightning.algorithms.online import checks
from rlhf_lightning.algorithms.online.answering import AnsweringStage
from rlhf_lightning.algorithms.online.controllers import KLController, RunningMoments
from rlhf_lightning.algorithms.online.experience import Experience, Measurements
from rlhf_lightning.algorithms.online.rollout import (
    experience_metrics,
    metrics_by_source,
    raw_score,
    shape_scores,
    weigh_draws,
)
from rlhf_lightning.algorithms.online.settings import KLPenalty, ScoreShaping
from rlhf_lightning.algorithms.stage import Loss
from rlhf_lightning.arguments import AT_LEAST_1, POSITIVE, check_arguments, check_batch_sizes, per_process
from rlhf_lightning.batches import PromptBatch, name_rows, repeat_prompts
from rlhf_lightning.errors import NonFiniteError, UserError
from rlhf_lightning.generation.engine import Generation
from rlhf_lightning.host import on_host
from rlhf_lightning.models.reward_functions import RewardFunction
from rlhf_lightning.models.scalar_lm import ScalarLM
from rlhf_lightning.models.scorers import ModelScorer
from rlhf_lightning.training import sum_over_ranks, world_size
from rlhf_lightning.training.reporting import log_text, report_progress

_SIZES = ("rollout_batch_size", "samples_per_prompt", "generation_batch_size", "minibatch_size", "ppo_epochs")
_BOUNDS = ("importance_cap", "max_approx_kl")


class OnlineStage(AnsweringStage):
    """Improves a policy by scores of its own answers.

    Expects batches like `PromptBatch`, one per iteration.

    Args:
        model_name_or_path: Hugging Face folder or hub id of the SFT model, which the policy starts from.
        reward: a reward model or a function, see `AnsweringStage`.
        rollout_batch_size: prompts answered per iteration, by all processes together.
        samples_per_prompt: responses drawn for each of them.
        generation_batch_size: responses that each process draws at once; None for its whole share.
        minibatch_size: responses per optimizer step, of all processes together.
        ppo_epochs: passes over each rollout.
        prefix_sharing: with several samples per prompt, run a prompt once for all responses to it that are in one
            micro-batch, in scoring and in the update; `max_tokens_per_batch` counts it once. The results are the same
            to rounding; if a model or attention kernel cannot do it, that is said, and each response has a prompt of
            its own.
        reuse_logprobs: take the log-probabilities that the engine has drawn the tokens by as the old ones, and for a
            value head on the policy its hidden states, instead of running the policy once more over the responses.
            `auto` does so where the package's own engine computes in float32, so that both are the same to rounding,
            and where an iteration is one update. Then `entropy` is measured in the updates.
        kl: the penalty that holds the policy near the reference.
        score: what happens to scores before they become rewards.
        max_approx_kl: end the updates of a rollout after one whose `approx_kl` is above this. In nats per token (called
            target KL by CleanRL and Stable-Baselines3); the schedules of the learning rates count the updates that were
            made. None for all of them.
        importance_cap: where the engine draws with kernels and weights of its own (vLLM), each token weighs
            `min(pi / q, importance_cap)` in the policy loss, of its probability under the policy and under the engine
            (truncated importance sampling; 2 in Yao et al. 2025); None for no such weights.
        **options: those of `AnsweringStage` and `Stage`. An example is a response.

    Attributes:
        per_response: a response is one action, with one weight.
    """

    per_response = False

    def __init__(
        self,
        model_name_or_path: str,
        reward: str | RewardFunction,
        *,
        rollout_batch_size: int = 64,
        samples_per_prompt: int = 1,
        generation_batch_size: int | None = None,
        minibatch_size: int = 32,
        ppo_epochs: int = 2,
        prefix_sharing: bool = True,
        reuse_logprobs: bool | Literal["auto"] = "auto",
        kl: KLPenalty = KLPenalty(),
        score: ScoreShaping = ScoreShaping(),
        importance_cap: float | None = 2.0,
        max_approx_kl: float | None = None,
        **options: Any,
    ) -> None:
        kl, score = from_config(KLPenalty, kl), from_config(ScoreShaping, score)
        check_arguments(
            OnlineStage, locals(), {**dict.fromkeys(_SIZES, AT_LEAST_1), **dict.fromkeys(_BOUNDS, POSITIVE)}
        )
        responses = rollout_batch_size * samples_per_prompt
        super().__init__(model_name_or_path, reward, generation_batch_size=generation_batch_size, **options)
        self.responses_per_rollout = responses
        self.rollout_batch_size = rollout_batch_size
        self.samples_per_prompt = samples_per_prompt
        self.minibatch_size = minibatch_size
        self.ppo_epochs = ppo_epochs
        self.prefix_sharing = prefix_sharing
        self.reuse_logprobs: bool | Literal["auto"] = reuse_logprobs
        self.kl = kl
        self.score = score
        self.importance_cap = importance_cap
        self.max_approx_kl = max_approx_kl
        self._check_sizes()
        # One update on the whole rollout: the policy that is updated is the one that answered.
        self.on_policy = ppo_epochs == 1 and minibatch_size == self.responses_per_rollout
        self.kl_controller = KLController(kl.coef, kl.target, kl.horizon)
        self.score_moments = RunningMoments()
        self.iteration = 0

    def _check_sizes(self) -> None:
        rollout = {
            "rollout_batch_size" if self.samples_per_prompt == 1 else "rollout_batch_size * samples_per_prompt": (
                self.responses_per_rollout
            )
        }
        sizes = {"minibatch_size": self.minibatch_size, "micro_batch_size": self.micro_batch_size}
        check_batch_sizes(**rollout, **sizes)
        check_batch_sizes(**rollout, generation_batch_size=self.generation_batch_size)
        buffer, longest = self.score.overlong_buffer, self.sampling.max_new_tokens
        if buffer is not None and buffer > longest:
            raise UserError(f"score.overlong_buffer ({buffer}) must be at most sampling.max_new_tokens ({longest})")

    # What an algorithm says of itself.

    def experience_of(
        self, prompts: PromptBatch, generation: Generation, measured: Measurements, scores: Tensor
    ) -> Experience:
        """Turn scores into advantages.

        Args:
            prompts: this rank's, B of them, each as often as it was answered, next to one another.
            generation: their responses.
            measured: what the models say of them.
            scores: scaled and clipped as `score` asks for, `[B]`.
        """
        raise NotImplementedError

    def losses(self, batch: Experience) -> Iterator[Loss]:
        """The losses of a micro-batch, each a sum over its response tokens, and sums over them to be logged.

        Among what is logged is `ratio`, the probability ratio of each token to the policy that answered.

        Args:
            batch: what `pieces` made.
        """
        raise NotImplementedError

    def pieces(self, minibatch: Experience) -> list[Any]:
        """The micro-batches of an update. More may be added for a loss that joins in, if `losses` knows them.

        Args:
            minibatch: this rank's share.
        """
        size, budget, sharing = self.piece_size, self.token_budget, self._sharing(self.policy, self.value)
        cut = partial(minibatch.micro_batches, size=size, max_tokens=budget, sharing=sharing)
        return self.cut(lambda least: cut(min_pieces=least))

    def loss_total(self, minibatch: Experience, num_tokens: Tensor) -> Tensor:
        """What the losses of an update are divided by, a scalar.

        Args:
            minibatch: this rank's share.
            num_tokens: response tokens of the update, on all ranks.
        """
        return num_tokens

    def to_learn(self, minibatch: Experience) -> Tensor:
        """0 at each token that an update can learn nothing from, `[B, R]`; not negative."""
        return minibatch.advantages.abs()

    @property
    def trained_parts(self) -> dict[str, nn.Module]:
        """The policy, and the value model if there is one."""
        return {"policy": self.policy, **({} if self.value is None else {"value": self.value})}

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps per iteration."""
        return self.ppo_epochs * self.responses_per_rollout // self.minibatch_size

    @property
    def piece_size(self) -> int | None:
        """Responses that go through a model at once; None where tokens are counted instead."""
        if self.token_budget:
            return None
        return self.micro_batch_size or self.minibatch_size // world_size(self)

    @property
    def answers_at_once(self) -> int | None:
        """All of this process's share, unless `generation_batch_size` says less."""
        return self.generation_batch_size or self.responses_per_rollout // world_size(self)

    def takes_sampler_logprobs(self, exact: bool) -> bool:
        """Whether the old log-probabilities are those of the engine.

        Args:
            exact: both differ by no more than float32 rounds (`checks.computes_exactly`).
        """
        if self.reuse_logprobs != "auto":
            return self.reuse_logprobs
        return self.on_policy or (exact and self.engine is None)

    @property
    def decoding_steps(self) -> int:
        """Steps of decoding in a rollout, on this process."""
        responses = self.responses_per_rollout // world_size(self)
        return math.ceil(responses / (self.answers_at_once or responses)) * self.sampling.max_new_tokens

    def on_fit_start(self) -> None:
        """Check that what counts for all processes can be shared out among them."""
        super().on_fit_start()
        for name in ("rollout_batch_size", "minibatch_size"):
            per_process(name, getattr(self, name), world_size(self))

    # An iteration.

    def training_step(self, prompts: PromptBatch, batch_idx: int) -> Tensor:
        """One iteration; returns the mean loss of its updates, detached, for callbacks."""
        self.check_batch(prompts, PromptBatch, "PromptDataModule")
        checks.check_rollout_size(len(prompts.prompts), self.rollout_batch_size, world_size(self))
        experience, metrics = self.rollout(prompts)
        experience = experience.of_all_ranks(self, self.samples_per_prompt)
        started, lr = time.perf_counter(), self.learning_rates()
        order = self.random("minibatches", self.iteration, device="cpu")
        updates: list[dict[str, Tensor]] = []
        try:
            for minibatch in experience.minibatches(self.ppo_epochs, self.minibatch_size, order):
                share = minibatch.select(slice(self.global_rank, None, world_size(self)))
                updates.append(self.update(share, is_first=self.iteration == 0 and not updates))
                report_progress(self, "updating", len(updates), self.steps_per_batch)
                if self.max_approx_kl is not None and float(updates[-1]["approx_kl"]) > self.max_approx_kl:
                    break
        except NonFiniteError:
            self.iteration += 1  # its answers are used up, should the run go on without the rest of it
            raise
        means = {name: torch.stack([update[name] for update in updates]).mean() for name in updates[0]}
        loss = means.pop("loss")
        metrics |= means | {"lr": lr[0], "seconds_updating": time.perf_counter() - started}
        metrics |= {} if self.value is None else {"value_lr": lr[-1]}
        metrics |= {} if self.max_approx_kl is None else {"updates": len(updates)}
        self.log_metrics(metrics, on_bar=("score", "kl", "response_length"), batch_size=self.responses_per_rollout)
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
        self.combination.check(prompts.sources)
        on_host(prompts.row_ids, prompts.prompt_mask)  # at once, for all that asks for them
        samples = self.samples_per_prompt
        random = self.random_by_row(prompts.row_ids, "rollout", self.iteration, samples=samples, together=True)
        prompts = repeat_prompts(prompts, samples)
        generation, texts = self.answer(prompts, random, with_logprobs=self.measures_late)
        generated = time.perf_counter()
        sharing = self._sharing(self.policy, self.reference_model, self.value, self.scorer)
        with self.compiled(self.policy, self.reference_model, self.value, self.scorer):
            measured = self.measure_answers(prompts, generation, texts, with_values=True, sharing=sharing)
        self.combination.update(measured, self.reduce)
        measured = self.combined(measured, prompts.sources)
        measured, mismatch = weigh_draws(measured, generation, self.importance_cap, self.per_response, self.reduce)
        self.score_moments.update(measured.scores, self.reduce)
        if measured.dense is not None and self.score.scaling:
            measured = measured._replace(dense=measured.dense / self.score_moments.std)
        scores = self.shaped_scores(measured.scores, generation.ended, generation.response_mask)
        experience = self.experience_of(prompts, generation, measured, scores)
        metrics: dict[str, Any] = {"kl_coef": self.kl_controller.coef}
        metrics |= self.experience_metrics(experience) | mismatch
        metrics |= {} if self.other_rewards else raw_score(self.scorer, metrics["score"])
        metrics |= self.combination.means(measured, self.reduce)
        if prompts.sources is not None:
            metrics |= metrics_by_source(prompts.sources, measured.scores, measured.kl, self.reduce)
        if self.iteration == 0:
            self._check_first_rollout(measured, metrics)
            checks.warn_mismatch(mismatch, self.sampling)
        kl, measured_scores = on_host(metrics["kl"], measured.scores)
        self.kl_controller.update(float(kl), self.responses_per_rollout)
        metrics |= {"seconds_generating": generated - started, "seconds_scoring": time.perf_counter() - generated}
        sample = f"{prompts.prompts[0]}**{texts[0].strip()}**\n\nscore {float(measured_scores[0]):.3f}"
        log_text(self, "train/sample", sample, self.trainer.global_step)
        return experience, metrics

    def shaped_scores(self, scores: Tensor, ended: Tensor, response_mask: Tensor) -> Tensor:
        """Scores as they enter the rewards, `[B]`.

        Args:
            scores: as the reward gives them, `[B]`; the running moments know them.
            ended: True where the response ended by itself, `[B]`, bool.
            response_mask: `[B, R]`, bool.
        """
        lengths = response_mask.sum(dim=1)
        return shape_scores(scores, ended, lengths, self.score_moments, self.score, self.sampling.max_new_tokens)

    def _sharing(self, *readers: Any) -> list[PreTrainedModel]:
        """The models among what reads responses, if they may share prompts."""
        if self.samples_per_prompt == 1 or not self.prefix_sharing:
            return []
        readers = tuple(reader.model if isinstance(reader, ModelScorer) else reader for reader in readers)
        models = (reader.model if isinstance(reader, ScalarLM) else reader for reader in readers)
        return [model for model in models if isinstance(model, PreTrainedModel)]

    def experience_metrics(self, experience: Experience) -> dict[str, Tensor]:
        """What is logged of a rollout, over all ranks.

        Args:
            experience: this rank's share.
        """
        return experience_metrics(experience, self.reduce)

    def update(self, minibatch: Experience, is_first: bool = False) -> dict[str, Tensor]:
        """One optimizer step.

        Args:
            minibatch: this rank's share of its responses.
            is_first: check that old and new log-probabilities agree, as they must before the first step.

        Returns:
            What is logged of it, and `loss`, scalars over all ranks.
        """
        num_tokens = sum_over_ranks(self, minibatch.response_mask.sum())
        total, context = self.loss_total(minibatch, num_tokens), name_rows(minibatch.row_ids)
        step = self.optimise(self.pieces(minibatch), self.losses, total, context, logged_total=num_tokens)
        if is_first:
            checks.check_first_ratio(step.means["ratio"], self._is_exact)
            checks.check_first_gradient(self, step.grad_norm, self.to_learn(minibatch), minibatch.response_mask)
        part_norms = {f"grad_norm_{part}": norm for part, norm in step.part_norms.items()}
        return {**step.means, "grad_norm": step.grad_norm, **part_norms, "loss": step.loss}

    def reduce(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all ranks."""
        return sum_over_ranks(self, tensor)

    def _check_first_rollout(self, measured: Measurements, metrics: dict[str, Any]) -> None:
        checks.warn_equal_scores(self.score_moments, measured.scores)
        for scorer in (self.scorer, *self.other_scorers.models.values()):
            checks.check_probe(scorer, self.frozen_dtype == "nf4")
        if self.model_source.starts_at_reference:
            checks.check_fresh_policy(metrics, self._is_exact)

    @property
    def measures_late(self) -> bool:
        """Whether the policy first goes through the responses in an update, which then logs the entropy."""
        return self.takes_sampler_logprobs(self._is_exact)

    @property
    def _is_exact(self) -> bool:
        return checks.computes_exactly(self.trainer.precision, self.frozen_dtype, self.device.type)

    def run_state(self) -> dict[str, Any]:
        """The KL coefficient, moments of scores, the place in the random numbers, and what decoding is compiled for."""
        moments = {**vars(self.score_moments)}
        state = {"iteration": self.iteration, "kl_coef": self.kl_controller.coef, "score_moments": moments}
        if self.other_rewards:
            state["part_moments"] = self.combination.state()
        compiled = self._compiled_step
        if (before := self._compiled_before if compiled is None else compiled.said) is None:
            return state
        return {**state, "compiled_step": list(before[0]), "not_compiled": before[1], "drawn_plainly": before[2]}

    def load_run_state(self, state: dict[str, Any]) -> None:
        """Go on with the adapted KL coefficient, the moments and the random numbers of a checkpoint."""
        self.iteration = state["iteration"]
        if self.kl.target is not None:  # a fixed coefficient is what the settings of this run say
            self.kl_controller.coef = state["kl_coef"]
        self.score_moments = RunningMoments(**state["score_moments"])
        self.combination.load(state.get("part_moments", {}))
        if (sizes := state.get("compiled_step")) is not None:
            self._compiled_before = tuple(sizes), state.get("not_compiled", ""), state.get("drawn_plainly", "")
