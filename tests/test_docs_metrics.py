"""docs/metrics.md names what is logged: all of it, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from helpers.stages import (
    MemoryLogger,
    instruction_rows,
    preference_rows,
    prompt_rows,
    save_llama,
    save_reward_model,
    share_of_letters,
    trainer,
)
from rlhf_lightning import (
    Blend,
    DPOModule,
    Evaluate,
    GRPOModule,
    InstructionDataModule,
    OtherReward,
    PPOModule,
    PreferenceDataModule,
    PromptDataModule,
    RatingDataModule,
    RewardModule,
    RLOOModule,
    Sampling,
    ScoreRegressionModule,
    SFTModule,
    Table,
)
from rlhf_lightning.generation.engine import Generation, TransformersEngine

PAGE = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
RAW = {"train/raw_score", "val/raw_score", "test/raw_score"}
"""What only a reward model has."""
APART = {"train/mismatch_kl", "train/importance", "train/importance_capped"}
"""What only an engine that draws from a distribution of its own has."""
OPTIONAL = {"train/updates"} | {
    f"{task}/score_{name}" for task in ("train", "val", "test") for name in ("main", "NAME")
}
OPTIONAL |= {"train/score_from_NAME", "train/kl_from_NAME", "train/ptx_loss"}
"""What a limit of the updates, several sources and other rewards add, these in the place of `RAW`."""
SWITCHES = {"center_coef": (0.1, "center_loss"), "lm_coef": (0.1, "nll"), "num_heads": (2, "head_std")}
"""Of a reward model: what turns them on, and what is logged of each."""
SAMPLES = {"val/policy_score", "val/policy_score_std"}
"""What `calibration_samples` adds to them."""
SPLITS = ("train", "val", "test")
STAGES = ("SFT", "Reward model", "Model of scores", "DPO", "PPO", "RLOO and GRPO")


class Apart(TransformersEngine):
    """Says that what it draws from is not the policy's distribution."""

    has_logprobs = False

    def generate(self, *prompts: Any, **options: Any) -> Generation:
        found = super().generate(*prompts, **options | {"with_logprobs": True})
        return found._replace(logprobs=None, sampler_logprobs=found.logprobs)


def documented(section: str) -> set[str]:
    """Names in the first column of a section's table."""
    cells = re.findall(r"^\| (`[^|]*) \|", SECTIONS[section], re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`((?:train|val|test|judge)/\w+)`", cell)}


def logged(module: Any, data: Any) -> set[str]:
    """Names that a run of two steps with a validation, and a test, log."""
    logger = MemoryLogger()
    running = trainer(logger=logger, max_steps=2)
    running.fit(module, data)
    running.test(module, data, verbose=False)
    return {name for call in logger.calls for name in call} - {"epoch"}


def prompts(folder: str, rollout_batch_size: int) -> PromptDataModule:
    rows = prompt_rows(8)
    return PromptDataModule(
        folder,
        rows,
        validation_data=rows,
        test_data=rows,
        rollout_batch_size=rollout_batch_size,
        max_prompt_length=40,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def reward_folder(folder, tmp_path_factory):
    return save_reward_model(tmp_path_factory.mktemp("reward"), folder)


def test_the_page_has_a_section_for_each_stage():
    assert {*STAGES, "Held-out judge", "Texts"} == set(SECTIONS)
    assert all(len(documented(stage)) > 9 for stage in STAGES)


def test_sft_logs_what_the_page_says(folder):
    rows = instruction_rows(8)
    data = InstructionDataModule(folder, rows, validation_data=rows, test_data=rows, batch_size=4, max_length=48)
    assert logged(SFTModule(folder), data) == documented("SFT")


@pytest.mark.parametrize("on", [(), ("center_coef",), ("lm_coef",), ("num_heads",), tuple(SWITCHES)], ids=str)
def test_reward_training_logs_what_the_page_says(folder, on):
    rows = preference_rows(8)
    data = PreferenceDataModule(folder, rows, validation_data=rows, test_data=rows, batch_size=4, max_length=48)
    off = {f"{split}/{SWITCHES[each][1]}" for each in SWITCHES.keys() - {*on} for split in SPLITS}
    off |= set() if {"center_coef", "lm_coef"} & {*on} else {"train/objective"}
    samples = {"calibration_samples": 2, "sampling": Sampling(max_new_tokens=4)} if on else {}
    module = RewardModule(folder, **samples, **{each: SWITCHES[each][0] for each in on})
    assert logged(module, data) == documented("Reward model") - off - (set() if on else SAMPLES)


def test_regression_logs_what_the_page_says(folder):
    rows = [row | {"NAME": i % 3} for i, row in enumerate(instruction_rows(8))]
    options = {"attributes": ["NAME"], "batch_size": 4, "max_length": 48}
    data = RatingDataModule(folder, rows, validation_data=rows, test_data=rows, **options)
    module = ScoreRegressionModule(folder, attributes=["NAME"])
    assert logged(module, data) == documented("Model of scores")


@pytest.mark.parametrize("sft_coef", [0.0, 0.5])
def test_dpo_logs_what_the_page_says(folder, sft_coef):
    rows = preference_rows(8)
    data = PreferenceDataModule(folder, rows, validation_data=rows, test_data=rows, batch_size=4, max_length=48)
    assert logged(DPOModule(folder, sft_coef=sft_coef), data) == documented("DPO")


@pytest.mark.parametrize(
    ("kind", "settings"), [(RLOOModule, {}), (GRPOModule, {}), (GRPOModule, {"kl_in": "reward", "ppo_epochs": 1})]
)
@pytest.mark.parametrize("of_a_model", [True, False])
def test_rloo_and_grpo_log_what_the_page_says(folder, reward_folder, kind, settings, of_a_model):
    sizes = {"rollout_batch_size": 8, "samples_per_prompt": 2, "minibatch_size": 16, "ppo_epochs": 2}
    reward = reward_folder if of_a_model else share_of_letters
    module = kind(folder, reward, **sizes | settings, sampling=Sampling(max_new_tokens=4))
    assert logged(module, prompts(folder, 8)) == documented("RLOO and GRPO") - APART - OPTIONAL - (
        set() if of_a_model else RAW
    )


@pytest.mark.parametrize("of_a_model", [True, False])
def test_ppo_logs_what_the_page_says(folder, reward_folder, of_a_model):
    sizes = {"rollout_batch_size": 4, "minibatch_size": 4, "ppo_epochs": 1, "sampling": Sampling(max_new_tokens=4)}
    module = PPOModule(folder, reward_folder if of_a_model else share_of_letters, **sizes)
    assert logged(module, prompts(folder, 4)) == documented("PPO") - APART - OPTIONAL - (set() if of_a_model else RAW)


@pytest.mark.parametrize(("kind", "section"), [(PPOModule, "PPO"), (RLOOModule, "RLOO and GRPO")])
def test_an_engine_that_draws_apart_logs_what_the_page_says(folder, reward_folder, kind, section):
    sizes = {"rollout_batch_size": 4, "minibatch_size": 8, "samples_per_prompt": 2, "ppo_epochs": 1}
    module = kind(folder, reward_folder, engine=Apart, **sizes, sampling=Sampling(max_new_tokens=4))
    assert logged(module, prompts(folder, 4)) == documented(section) - OPTIONAL


@pytest.mark.parametrize(("kind", "section"), [(PPOModule, "PPO"), (RLOOModule, "RLOO and GRPO")])
def test_other_rewards_sources_and_a_limit_of_the_updates_log_what_the_page_says(folder, reward_folder, kind, section):
    sizes = {"rollout_batch_size": 4, "minibatch_size": 8, "samples_per_prompt": 2, "ppo_epochs": 1}
    data = prompts(folder, 4)
    data.data = Blend([Table(prompt_rows(4), name="NAME"), Table([{"prompt": str(i)} for i in range(4)], name="other")])
    options = {"max_approx_kl": 1.0, "other_rewards": {"NAME": OtherReward(share_of_letters)}}
    module = kind(folder, reward_folder, **options, **sizes, sampling=Sampling(max_new_tokens=4))
    found = {name.replace("from_other", "from_NAME") for name in logged(module, data)}
    assert found == documented(section) - APART - RAW - {"train/ptx_loss"}


def test_ppo_beside_text_logs_what_the_page_says(folder):
    sizes = {"rollout_batch_size": 4, "minibatch_size": 4, "ppo_epochs": 1, "sampling": Sampling(max_new_tokens=4)}
    text = InstructionDataModule(folder, instruction_rows(8), validation_split=0.0, batch_size=4, max_length=48)
    module = PPOModule(folder, share_of_letters, pretraining=text, **sizes)
    assert logged(module, prompts(folder, 4)) == documented("PPO") - APART - RAW - OPTIONAL | {"train/ptx_loss"}


def test_a_held_out_judge_logs_what_the_page_says(folder, reward_folder):
    sizes = {"rollout_batch_size": 4, "minibatch_size": 4, "ppo_epochs": 1, "sampling": Sampling(max_new_tokens=4)}
    logger = MemoryLogger()
    running = trainer(logger=logger, max_steps=1, callbacks=[Evaluate(share_of_letters)])
    running.fit(PPOModule(folder, reward_folder, **sizes), prompts(folder, 4))
    assert {f"judge/{name}" for name in logger.names("judge")} == documented("Held-out judge")
