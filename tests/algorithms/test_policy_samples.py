"""A reward model calibrated over answers of the policy that it starts from (Ziegler et al. 2019)."""

import json

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from helpers.distributed import run_in_processes
from helpers.policy_sample_runs import CONSTANT, run
from helpers.rankings import ranking_rows
from helpers.stages import (
    disturb_random_numbers,
    fit,
    preference_rows,
    same_weights,
    save_gpt2,
    save_llama,
    save_reward_model,
    sgd,
    trainer,
    weights,
)
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning import (
    FineTune,
    HFExport,
    PreferenceDataModule,
    RewardModule,
    Sampling,
    UserError,
    load_reward_model,
)
from rlhf_lightning.models.calibration import Calibration

ANSWERS = 5
LENGTH = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def reward_folder(folder, tmp_path_factory):
    return save_reward_model(tmp_path_factory.mktemp("reward"), folder)


def data_of(folder, held_out=None, **settings):
    held_out = preference_rows(9) if held_out is None else held_out
    options = {"data": preference_rows(12), "validation_data": held_out, "batch_size": 4, "max_length": 48}
    return PreferenceDataModule(folder, **options | settings)


def module_of(folder, **settings):
    given = {"calibration_samples": ANSWERS, "sampling": Sampling(max_new_tokens=LENGTH)}
    return RewardModule(folder, optimizer=sgd(0.2), **CONSTANT, **given | settings)


def prompts_of(data):
    """Ids of the prompt of each held-out pair, by position in the data, by the batches of the loader."""
    batches = [*data.val_dataloader()]
    rows = [row for batch in batches for row in zip(batch.chosen_ids, batch.prompt_lengths, strict=True)]
    return [ids[:length].tolist() for ids, length in rows]


def plain_scores(folder, sequences):
    """Raw score of each sequence alone, by transformers' own class."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        return torch.cat([model(ids.unsqueeze(0)).logits[0] for ids in sequences])


@pytest.mark.parametrize("kept", [{}, {"check_val_every_n_epoch": 9}], ids=["validated", "at the end"])
def test_an_export_has_the_mean_and_deviation_of_plain_scores_of_the_answers(folder, tmp_path, kept):
    module, data = module_of(folder), data_of(folder)
    log = fit(module, data, max_epochs=2, callbacks=[HFExport(str(tmp_path))], **kept)

    sequences = module._samples.sequences
    scores = plain_scores(tmp_path, sequences)
    recorded = json.loads((tmp_path / "config.json").read_text())["reward_calibration"]
    assert recorded["over"] == "samples"
    assert recorded["mean"] == pytest.approx(scores.mean().item(), abs=1e-5)
    assert recorded["std"] == pytest.approx(scores.std(correction=0).item(), abs=1e-5)
    assert recorded["std"] > 0.01
    loaded = load_reward_model(tmp_path)
    assert loaded.calibration == module.scalar.calibration
    assert loaded.probe_error() < 1e-4
    means, deviations = log.series("val/policy_score"), log.series("val/policy_score_std")
    assert len(means) == len(deviations) == (1 if kept else 3)
    if not kept:
        assert means[-1] == pytest.approx(recorded["mean"], abs=1e-6)
        assert deviations[-1] == pytest.approx(recorded["std"], abs=1e-6)


def test_answers_follow_prompts_from_all_over_the_validation_data(folder):
    module, data = module_of(folder), data_of(folder)
    fit(module, data, max_steps=1)
    prompts = prompts_of(data)
    wanted = [prompts[i * 9 // ANSWERS] for i in range(ANSWERS)]
    for prompt, ids in zip(wanted, module._samples.sequences, strict=True):
        assert ids[: len(prompt)].tolist() == prompt
        assert 0 < len(ids) - len(prompt) <= LENGTH
    assert module._samples._model is None


def test_greedy_answers_are_those_of_plain_transformers(folder, tmp_path):
    policy = save_llama(tmp_path / "policy", layers=1)
    module, data = (
        module_of(folder, calibration_policy=policy, sampling=Sampling(0.0, max_new_tokens=4)),
        data_of(folder),
    )
    fit(module, data, max_steps=1)
    plain, eos = AutoModelForCausalLM.from_pretrained(policy), module.tokenizer.eos_token_id
    prompts = prompts_of(data)
    for i, ids in enumerate(module._samples.sequences):
        expected = prompts[i * 9 // ANSWERS]
        while len(expected) < len(prompts[i * 9 // ANSWERS]) + 4 and expected[-1] != eos:
            with torch.no_grad():
                expected = [*expected, int(plain(torch.tensor([expected])).logits[0, -1].argmax())]
        assert ids.tolist() == expected


def test_the_first_numbers_are_those_of_the_head_before_training(folder, tmp_path):
    module = module_of(folder)
    data = data_of(folder)
    log = fit(module, data, max_epochs=1, callbacks=[HFExport(str(tmp_path))], check_val_every_n_epoch=9)
    trained = plain_scores(tmp_path, module._samples.sequences)
    still = module_of(folder, gradient_clip_val=1e-30)  # stands still
    other = fit(still, data, max_epochs=1, callbacks=[HFExport(str(tmp_path / "still"))], check_val_every_n_epoch=9)
    first = plain_scores(tmp_path / "still", module._samples.sequences)
    assert log.series("val/policy_score") == other.series("val/policy_score")
    assert log.series("val/policy_score") == pytest.approx([first.mean().item()], abs=1e-5)
    assert log.series("val/policy_score_std") == pytest.approx([first.std(correction=0).item()], abs=1e-5)
    assert trained.mean().item() != pytest.approx(first.mean().item(), abs=1e-3)


def test_training_is_bit_for_bit_what_it_is_without(folder):
    ends = []
    for count in (0, ANSWERS):
        disturb_random_numbers(3)
        module = module_of(folder, calibration_samples=count)
        log = fit(module, data_of(folder), max_epochs=2)
        ends.append((weights(module.scalar), log.series("train/loss"), log.series("val/loss"), log.names("val")))
        assert module.scalar.calibration.over == ("samples" if count else "chosen")
    assert same_weights(ends[0][0], ends[1][0])
    assert ends[0][1:3] == ends[1][1:3]
    assert ends[1][3] - ends[0][3] == {"policy_score", "policy_score_std"}


def test_whole_rankings_have_each_prompt_once(folder):
    rows = ranking_rows([3, 2, 4])
    modules = []
    for whole in (True, False):
        modules.append(module_of(folder, calibration_samples=256))
        fit(modules[-1], data_of(folder, rows, whole_rankings=whole), max_steps=1)
    told = [[ids.tolist() for ids in module._samples.sequences] for module in modules]
    assert len(told[0]) == len({tuple(ids) for ids in told[0]}) == 3
    assert told[0] == told[1]


def test_a_generation_prompt_that_says_more_than_the_prompts_is_named(tmp_path):
    tokenizer = tiny_tokenizer()
    turns = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}assistant: <think>{% endif %}"
    folder = save_llama(tmp_path, tokenizer)
    rows = [
        {"prompt": [{"role": "user", "content": f"{i} bread"}], "chosen": "happy", "rejected": "salt"} for i in range(8)
    ]
    module, data = module_of(folder, calibration_samples=2), data_of(folder, rows[4:], data=rows[:4])
    with pytest.warns(UserWarning, match="calibration_samples follow the prompts of the pairs, without what the chat"):
        fit(module, data, max_steps=1)


def test_a_resumed_run_is_calibrated_as_one_that_was_not_stopped(tmp_path):
    folder = save_gpt2(tmp_path / "gpt2", dropout=0.2, layers=1)
    settings = {"max_epochs": 2, "check_val_every_n_epoch": 2}

    disturb_random_numbers(1234)
    whole = module_of(folder, dropout=True)
    log = fit(whole, data_of(folder), **settings)

    disturb_random_numbers(1234)
    stopped = module_of(folder, dropout=True)
    fit(stopped, data_of(folder), max_epochs=1)
    stopped.trainer.save_checkpoint(tmp_path / "one epoch.ckpt")
    disturb_random_numbers(99)
    resumed = module_of(folder, dropout=True)
    more = fit(resumed, data_of(folder), **settings, ckpt_path=tmp_path / "one epoch.ckpt")

    assert same_weights(weights(whole.scalar), weights(resumed.scalar))
    said = [[ids.tolist() for ids in module._samples.sequences] for module in (whole, resumed)]
    assert said[0] == said[1]
    assert resumed.scalar.calibration == whole.scalar.calibration
    assert whole.scalar.calibration.over == "samples"
    assert more.series("val/policy_score") == log.series("val/policy_score")[1:]  # the first is of before training
    disturb_random_numbers(99)
    other = module_of(folder)
    fit(other, data_of(folder), max_steps=1)
    assert [ids.tolist() for ids in other._samples.sequences] != said[0]  # the seed counts


def test_two_processes_are_calibrated_as_one(folder):
    expected = run(folder, "auto")
    names = ["ddp", "zero3", "fsdp2"]
    for rank in run_in_processes("helpers.policy_sample_runs:run_each", folder=folder, names=names):
        for name, found in zip(names, rank, strict=True):
            assert found["samples"] == expected["samples"], name
            assert found["calibration"] == pytest.approx(expected["calibration"], abs=1e-5), name
            assert found["over"] == "samples"
            if found["logged"]:  # on the first process
                assert found["logged"] == pytest.approx(expected["logged"], abs=1e-5), name


def test_prompts_that_leave_no_room_are_left_out(folder):
    module, data = module_of(folder, calibration_samples=256), data_of(folder)
    data.setup("fit")
    lengths = sorted(len(ids) for ids in prompts_of(data))
    context = AutoModelForCausalLM.from_pretrained(folder).config.max_position_embeddings
    module = module_of(folder, calibration_samples=256, sampling=Sampling(max_new_tokens=context - lengths[2]))
    fit(module, data, max_steps=1)
    assert len(module._samples.sequences) == sum(length <= lengths[2] for length in lengths) < len(lengths)
    module = module_of(folder, sampling=Sampling(max_new_tokens=context))
    with pytest.raises(UserError, match=r"no held-out prompt leaves room for \d+ tokens .*; lower sampling.max_new"):
        fit(module, data, max_steps=1)


def test_what_cannot_be_sampled_is_refused_in_one_line(folder, reward_folder):
    with pytest.raises(UserError, match="calibration_policy answers calibration_samples prompts: set that too"):
        RewardModule(folder, calibration_policy=folder)
    with pytest.raises(UserError, match="is a reward model: name the language model as calibration_policy"):
        fit(module_of(reward_folder), data_of(folder))
    with pytest.raises(UserError, match=r"is a reward model .*; a language model is needed here"):
        fit(module_of(folder, calibration_policy=reward_folder), data_of(folder))
    with pytest.raises(UserError, match=r"there is no validation data: set --data\.validation_split"):
        fit(module_of(folder), PreferenceDataModule(folder, preference_rows(8), validation_split=0.0, max_length=48))
    with pytest.raises(UserError, match="there is no validation data"):
        fit(module_of(folder), data_of(folder), limit_val_batches=0)
    data = data_of(folder)
    data.setup("fit")
    (batch, *_) = data.val_dataloader()
    blind = DataLoader([batch._replace(prompt_lengths=None)], batch_size=None)
    with pytest.raises(UserError, match=r"how long their prompts are: set PreferenceBatch\.prompt_lengths"):
        trainer().fit(module_of(folder), DataLoader([batch], batch_size=None), blind)


def test_a_reward_model_goes_on_by_the_answers_of_a_policy_that_is_named(folder, reward_folder):
    module = module_of(reward_folder, calibration_policy=folder)
    fit(module, data_of(folder), max_steps=1)
    assert module.scalar.calibration.over == "samples"
    assert module.parents == {"model": reward_folder, "policy": folder}


def test_a_record_without_a_word_is_of_chosen_responses(folder, tmp_path):
    """As earlier versions wrote them, and as they are still written without samples."""
    for count, known in ((0, set()), (ANSWERS, {"over"})):
        module = module_of(folder, calibration_samples=count)
        fit(module, data_of(folder), max_steps=1, callbacks=[HFExport(str(tmp_path / str(count)))])
        record = json.loads((tmp_path / str(count) / "config.json").read_text())["reward_calibration"]
        assert record.keys() == {"mean", "std", "probe_ids", "probe_score"} | known
        assert module.run_state()["calibration"] == record
        calibration = load_reward_model(tmp_path / str(count)).calibration
        assert calibration == module.scalar.calibration == Calibration(**record)
        assert calibration.over == ("samples" if count else "chosen")


def test_an_adapter_keeps_what_it_is_calibrated_over(folder, tmp_path):
    module = module_of(folder, finetune=FineTune("lora"))
    fit(module, data_of(folder), max_steps=1, callbacks=[HFExport(str(tmp_path))])
    assert load_reward_model(tmp_path).calibration == module.scalar.calibration
    assert module.scalar.calibration.over == "samples"
