"""Score and KL by the source that prompts come from, where the data are a blend."""

import json

import pytest
import torch

from helpers.stages import adamw, disturb_random_numbers, fit, prompt_rows, save_llama, share_of_letters
from rlhf_lightning import Blend, GRPOModule, PPOModule, PromptDataModule, Sampling, Table
from rlhf_lightning.algorithms.online.rollout import metrics_by_source
from rlhf_lightning.batches import Sources, log_names, repeat_prompts

NAMES = ["hh", "tldr", "none"]
SOURCES = Sources(NAMES, torch.tensor([0, 1, 0]))
SCORES, KL = torch.tensor([1.0, 5.0, 2.0]), torch.tensor([0.5, 0.25, 1.5])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two files of prompts, the second of which have fewer letters."""
    root = tmp_path_factory.mktemp("data")
    for name, rows in (("one.jsonl", prompt_rows(12)), ("two.jsonl", [{"prompt": f"{i} {i * i}"} for i in range(12)])):
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [Table(str(root / name)) for name in ("one.jsonl", "two.jsonl")]


def test_means_by_hand():
    found = metrics_by_source(SOURCES, SCORES, KL)
    assert {name: value.item() for name, value in found.items()} == {
        **{"score_from_hh": 1.5, "kl_from_hh": 1.0},
        **{"score_from_tldr": 5.0, "kl_from_tldr": 0.25},
    }


def test_two_processes_are_summed():
    theirs = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.75, 0.0]], dtype=torch.float64)
    found = metrics_by_source(SOURCES, SCORES, KL, reduce=lambda ours: ours + theirs)
    assert found["score_from_tldr"].item() == 3.0
    assert found["kl_from_tldr"].item() == 0.5
    assert found["score_from_hh"].item() == 1.5
    nobody = metrics_by_source(Sources(NAMES, torch.tensor([2, 2, 2])), SCORES, KL)
    assert nobody.keys() == {"score_from_none", "kl_from_none"}


def module_of(kind, folder, **settings):
    given = {"rollout_batch_size": 8, "minibatch_size": 8, "ppo_epochs": 1, "sampling": Sampling(max_new_tokens=6)}
    given |= {"samples_per_prompt": 2, "minibatch_size": 16} if kind is GRPOModule else {}
    return kind(folder, share_of_letters, optimizer=adamw(1e-3), **given | settings)


def run(module, data):
    disturb_random_numbers(0)
    data = PromptDataModule(
        module.model_name_or_path, data, validation_split=0.0, max_prompt_length=40, rollout_batch_size=8
    )
    return fit(module, data)


@pytest.mark.parametrize("kind", [PPOModule, GRPOModule])
def test_a_rollout_is_told_apart_by_the_sources_of_its_prompts(folder, files, kind):
    module = module_of(kind, folder)
    seen = []
    measure = module.combined

    def listening(measured, sources):
        seen.append(measured)
        return measure(measured, sources)

    batches = []
    rollout = module.rollout

    def watching(prompts):
        batches.append(repeat_prompts(prompts, module.samples_per_prompt))
        return rollout(prompts)

    module.combined, module.rollout = listening, watching
    log = run(module, Blend(files))
    assert len(batches) == len(seen) == 3
    names = log_names(batches[0].sources.names)
    assert len(set(names)) == 2
    logged = {name: (log.series(f"train/score_from_{name}"), log.series(f"train/kl_from_{name}")) for name in names}
    counts = dict.fromkeys(names, 0)
    for batch, measured in zip(batches, seen, strict=True):
        letters = torch.tensor([any(map(str.isalpha, prompt)) for prompt in batch.prompts])
        for name, rows in zip(names, (letters, ~letters), strict=True):
            counts[name] += int(rows.sum())
            if rows.any():
                score, kl = (series.pop(0) for series in logged[name])
                assert score == pytest.approx(measured.scores[rows].mean().item())
                assert kl == pytest.approx(measured.kl[rows].mean().item(), abs=1e-6)
    assert counts == dict.fromkeys(names, 12 * module.samples_per_prompt)
    assert not any(series for both in logged.values() for series in both)


def test_of_one_source_nothing_is_told_apart(folder, files):
    log = run(module_of(PPOModule, folder), files[0])
    assert not [name for name in log.names("train") if "from" in name]
