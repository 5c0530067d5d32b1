"""A held-out judge sees what the policy says, and training does not see the judge."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from helpers.distributed import run_in_processes
from helpers.judge_runs import run
from helpers.stages import (
    MemoryLogger,
    adamw,
    fit,
    instruction_rows,
    prompt_rows,
    same_weights,
    save_llama,
    save_reward_model,
    share_of_letters,
    trainer,
    weights,
)
from rlhf_lightning import (
    Evaluate,
    InstructionDataModule,
    NonFiniteError,
    PPOModule,
    PromptDataModule,
    RLOOModule,
    Sampling,
    SFTModule,
    UserError,
    load_reward_model,
)

NAMES = {"score", "score_std", "proxy_score", "kl", "eos_rate", "response_length"}


def lengths(prompts: list[str], responses: list[str]) -> list[float]:
    """A judge: the length of each response. It draws random numbers, which is nobody's business."""
    torch.rand(3)
    return [float(len(response)) for response in responses]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"), layers=1)


@pytest.fixture(scope="module")
def reward_folder(folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_reward_model(tmp_path_factory.mktemp("reward"), folder)


def ppo(folder: str, kind: Any = PPOModule, held_out: int = 6, **options: Any) -> tuple[Any, PromptDataModule]:
    """Four iterations of two optimizer steps."""
    sizes: dict[str, Any] = {"rollout_batch_size": 4, "minibatch_size": 4, "ppo_epochs": 2}
    module = kind(
        folder, share_of_letters, **sizes, sampling=Sampling(max_new_tokens=6), optimizer=adamw(1e-2), **options
    )
    rows = prompt_rows(16)
    data = PromptDataModule(
        folder,
        rows,
        validation_data=rows[:held_out] or None,
        validation_split=0.0,
        rollout_batch_size=4,
        max_prompt_length=40,
    )
    return module, data


@pytest.mark.parametrize("kind", [PPOModule, RLOOModule])
def test_training_is_the_same_with_and_without_a_judge(folder, kind):
    ends, logs = [], []
    options = {} if kind is PPOModule else {"samples_per_prompt": 2}
    for callbacks in ([], [Evaluate(lengths, every_n_iterations=1, num_prompts=4)]):
        torch.manual_seed(3)
        module, data = ppo(folder, kind, **options)
        logs.append(fit(module, data, callbacks=callbacks))
        ends.append((weights(module), torch.get_rng_state()))
    assert same_weights(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])
    for name in ("score", "kl", "policy_loss", "entropy"):
        assert logs[0].series(f"train/{name}") == logs[1].series(f"train/{name}")
    assert logs[1].names("judge") == NAMES
    assert logs[0].names("judge") == set()


def test_the_judge_is_asked_at_the_start_every_few_iterations_and_at_the_end(folder):
    evaluate = Evaluate(lengths, every_n_iterations=3)
    steps: list[int] = []

    class Steps(MemoryLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            super().log_metrics(metrics, step)
            if "judge/score" in metrics:
                steps.append(step or 0)

    logger = Steps()
    trainer(logger=logger, callbacks=[evaluate]).fit(*ppo(folder))
    assert steps == [point.iteration for point in evaluate.points] == [0, 3, 4]
    assert logger.series("judge/score") == [point.score for point in evaluate.points]
    assert evaluate.points[0].kl == pytest.approx(0, abs=1e-4)
    assert evaluate.points[-1].kl != evaluate.points[0].kl


def test_numbers_are_those_of_the_answers(folder):
    seen: list[tuple[list[str], list[str], list[float]]] = []

    def judge(prompts: list[str], responses: list[str]) -> list[float]:
        seen.append((prompts, responses, lengths(prompts, responses)))
        return seen[-1][2]

    evaluate = Evaluate(judge, every_n_iterations=4)
    fit(*ppo(folder), callbacks=[evaluate])
    for point, (prompts, responses, scores) in zip(evaluate.points, seen, strict=True):
        assert prompts == [row["prompt"] for row in prompt_rows(6)]
        mean = sum(scores) / 6
        assert point.score == pytest.approx(mean)
        assert point.score_std == pytest.approx((sum((s - mean) ** 2 for s in scores) / 6) ** 0.5)
        assert point.proxy_score == pytest.approx(sum(share_of_letters(prompts, responses)) / 6)
        assert point.answers == 6


def test_prompts_come_from_all_over_what_is_held_out(folder):
    seen: list[list[str]] = []

    def judge(prompts: list[str], responses: list[str]) -> list[float]:
        seen.append(prompts)
        return lengths(prompts, responses)

    fit(*ppo(folder), callbacks=[Evaluate(judge, num_prompts=3)])
    assert seen[0] == [prompt_rows(6)[i]["prompt"] for i in (0, 2, 4)]


def test_prompts_may_be_given(folder):
    seen: list[list[str]] = []

    def judge(prompts: list[str], responses: list[str]) -> list[float]:
        seen.append(prompts)
        return lengths(prompts, responses)

    evaluate = Evaluate(judge, prompts=["\n\nHuman: bake bread\n\nAssistant:", "the chain"])
    fit(*ppo(folder, held_out=0), callbacks=[evaluate])
    assert seen == [["bake bread", "the chain"]] * 2
    assert evaluate.points[0].answers == 2


def test_a_checkpoint_can_be_kept_by_what_the_judge_says(folder, tmp_path):
    evaluate = Evaluate(lengths, every_n_iterations=2)
    saver = ModelCheckpoint(tmp_path, "{step}", monitor="judge/score", mode="max", every_n_train_steps=4)
    fit(*ppo(folder), callbacks=[saver, evaluate], enable_checkpointing=True)
    assert float(saver.best_model_score) == max(point.score for point in evaluate.points[1:])


def test_a_resumed_run_goes_on_with_what_was_found(folder, tmp_path):
    def run_it(ckpt_path: Path | None = None, max_steps: int = -1) -> tuple[Evaluate, Any]:
        torch.manual_seed(3)
        module, data = ppo(folder)
        evaluate = Evaluate(lengths, every_n_iterations=1)
        saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
        options = {"enable_checkpointing": True, "max_steps": max_steps, "ckpt_path": ckpt_path}
        fit(module, data, callbacks=[evaluate, saver], **options)
        return evaluate, weights(module)

    whole, end = run_it()
    resumed, resumed_end = run_it(tmp_path / "step=4.ckpt")
    assert resumed.points == whole.points
    assert [point.iteration for point in whole.points] == [0, 1, 2, 3, 4]
    assert same_weights(end, resumed_end)


@pytest.mark.matrix
def test_two_processes_find_what_one_finds(folder, reward_folder, tmp_path):
    judge = str(tmp_path / "judge")
    shutil.copytree(reward_folder, judge)
    other = load_reward_model(judge).model
    with torch.no_grad():
        other.score.weight.copy_(other.score.weight.roll(5))  # another opinion
    other.save_pretrained(judge)
    models = {"folder": folder, "reward": reward_folder, "judge": judge}
    one = run("auto", **models, best=str(tmp_path / "one"))
    names = ["ddp", "zero3"]
    runs = [{"name": name, **models, "best": str(tmp_path / name)} for name in names]
    results = run_in_processes("helpers.judge_runs:run_all", runs=runs)
    assert [point["answers"] for point in one["points"]] == [5, 5]
    assert one["points"][0]["score"] != one["points"][1]["score"]
    for first, second in zip(*results, strict=True):
        assert first == second
        for found, expected in zip(first["points"], one["points"], strict=True):
            assert found == pytest.approx(expected, abs=1e-4, rel=1e-4)
        assert first["guard"]["best"]["iteration"] == one["guard"]["best"]["iteration"] == 1
    assert all((tmp_path / name / "model.safetensors").is_file() for name in ("one", *names))


def test_what_cannot_be_judged_is_refused(folder):
    sft = SFTModule(folder), InstructionDataModule(folder, instruction_rows(8), max_length=48)
    with pytest.raises(UserError, match="SFTModule answers no prompts"):
        fit(*sft, callbacks=[Evaluate(lengths)])
    with pytest.raises(UserError, match="is the reward that training uses"):
        fit(*ppo(folder), callbacks=[Evaluate(share_of_letters)])
    with pytest.raises(UserError, match="hold no prompts out for the judge"):
        fit(*ppo(folder, held_out=0), callbacks=[Evaluate(lengths)])
    with pytest.raises(NonFiniteError, match=r"a score is not finite \(rows 0, 1, 2"):
        fit(*ppo(folder), callbacks=[Evaluate(lambda prompts, responses: [float("nan")] * len(prompts))])
    with pytest.raises(UserError, match="prompts is empty"):
        Evaluate(lengths, prompts=[])
    with pytest.raises(UserError, match="every_n_iterations"):
        Evaluate(lengths, every_n_iterations=0)
