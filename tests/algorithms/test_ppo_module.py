"""What one PPO iteration and a run of them do; the checks that refuse a bad run are in `test_ppo_checks`."""

import math
import statistics
from itertools import pairwise

import pytest
import torch
from pytorch_lightning.callbacks import LambdaCallback
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from helpers.compiling import count_compiling
from helpers.stages import (
    adamw,
    assert_close_weights,
    clock,
    disturb_random_numbers,
    fit,
    prompt_rows,
    same_weights,
    save_gpt2,
    save_llama,
    save_reward_model,
    sgd,
    share_of_letters,
    trainer,
    weights,
)
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning import KLPenalty, Objective, PPOModule, PromptDataModule, Sampling, ScoreShaping

ROLLOUT = {"score", "score_std", "reward", "kl", "kl_k3", "kl_coef", "entropy", "response_length", "eos_rate"}
UPDATE = {"policy_loss", "value_loss", "ratio", "approx_kl", "clip_fraction", "value_clip_fraction"}
NORMS = {"grad_norm", "grad_norm_policy", "grad_norm_value"}
COURSE = {"lr", "value_lr", "explained_variance", "memory_gib"}
COURSE |= {"seconds_generating", "seconds_scoring", "seconds_updating"}
CONSTANT = {"lr_schedule": "constant", "warmup_steps": 0}
ENDS_ON_VOWELS = Sampling(max_new_tokens=8, stop_strings=list("aeiou"))  # about half of the responses end
PLAIN = {"score": ScoreShaping(scaling=False, clip=None)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def reward_folder(folder, tmp_path_factory):
    return save_reward_model(tmp_path_factory.mktemp("reward"), folder)


class RecordingPPO(PPOModule):
    """Keeps every rollout."""

    def rollout(self, prompts):
        experience, metrics = super().rollout(prompts)
        if not hasattr(self, "rollouts"):
            self.rollouts = []
        self.rollouts.append((prompts, experience))
        return experience, metrics


def data_module(folder, count, rollout_batch_size=8, **settings):
    settings = {"validation_split": 0.0, "max_prompt_length": 40} | settings
    return PromptDataModule(folder, prompt_rows(count), rollout_batch_size=rollout_batch_size, **settings)


def ppo(folder, reward, **settings):
    """Eight prompts, one optimizer step per iteration."""
    sizes = {"rollout_batch_size": 8, "minibatch_size": 8, "ppo_epochs": 1}
    return RecordingPPO(folder, reward, **sizes | {"sampling": ENDS_ON_VOWELS, **CONSTANT, **settings})


def run(module, iterations=1, **settings):
    disturb_random_numbers(0)
    return fit(module, data_module(module.model_name_or_path, 8 * iterations), **settings)


def responses_by_row(prompts, experience):
    """Ids of prompt and response of each row, without padding."""
    fields = (prompts.prompt_ids, prompts.prompt_mask, experience.response_ids, experience.response_mask)
    for prompt_ids, prompt_mask, response_ids, response_mask in zip(*fields, strict=True):
        yield prompt_ids[prompt_mask].tolist(), response_ids[response_mask].tolist()


def test_raises_the_score_of_a_function_reward(folder):
    disturb_random_numbers(0)
    module = PPOModule(
        folder,
        share_of_letters,
        sampling=Sampling(max_new_tokens=6),
        rollout_batch_size=32,
        minibatch_size=16,
        micro_batch_size=8,
        optimizer=adamw(3e-2),
        kl=KLPenalty(0.01),
        **CONSTANT,
    )
    scores = fit(module, data_module(folder, 32, 32), max_epochs=10).series("train/score")
    assert scores[0] < 0.4
    assert statistics.mean(scores[-3:]) > 0.8


def test_logs_every_number_and_all_are_finite(folder, reward_folder):
    module = ppo(folder, reward_folder, minibatch_size=4, ppo_epochs=2)
    data = data_module(folder, 24, validation_data=prompt_rows(5), eval_batch_size=2)
    log = fit(module, data, val_check_interval=1)

    assert log.names("train") == ROLLOUT | UPDATE | NORMS | COURSE | {"raw_score"}
    assert log.names("val") == {"score", "raw_score", "kl", "eos_rate", "response_length"}
    for name in log.names("train"):
        assert torch.tensor(log.series(f"train/{name}")).isfinite().all(), name
        assert len(log.series(f"train/{name}")) == 3, name
    assert module.trainer.global_step == 3 * 4
    assert module.iteration == 3


def test_rollout_numbers_by_hand(folder):
    module = ppo(folder, share_of_letters)
    log = run(module)
    ((prompts, experience),) = module.rollouts
    texts = [module.tokenizer.decode(response) for _, response in responses_by_row(prompts, experience)]
    scores = share_of_letters([], texts)
    lengths = [len(response) for _, response in responses_by_row(prompts, experience)]

    expected = {
        "score": statistics.mean(scores),
        "score_std": statistics.pstdev(scores),
        "response_length": statistics.mean(lengths),
        "eos_rate": statistics.mean(bool(set(text) & set("aeiou")) for text in texts),
    }
    assert {name: log.series(f"train/{name}")[0] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert 0 < expected["eos_rate"] < 1


def test_before_the_first_update_policy_reference_and_sampler_are_one(folder, reward_folder):
    for sampling in (ENDS_ON_VOWELS, Sampling(temperature=0.7, max_new_tokens=8)):
        log = run(ppo(folder, reward_folder, sampling=sampling))
        assert log.series("train/ratio") == pytest.approx([1], abs=1e-6)
        assert log.series("train/kl") == pytest.approx([0], abs=1e-5)
        assert log.series("train/kl_k3") == pytest.approx([0], abs=1e-6)
        assert log.series("train/clip_fraction") == log.series("train/value_clip_fraction") == [0]
        assert log.series("train/approx_kl") == pytest.approx([0], abs=1e-6)


def test_dropout_is_off_whatever_the_config_asks_for(tmp_path):
    folder = save_gpt2(tmp_path / "gpt2", dropout=0.5)
    log = run(ppo(folder, save_reward_model(tmp_path / "reward", folder)))
    assert log.series("train/ratio") == pytest.approx([1], abs=1e-6)
    assert log.series("train/value_clip_fraction") == [0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_those_of_the_sampled_distribution(folder, temperature):
    module = ppo(folder, share_of_letters, sampling=Sampling(temperature=temperature, max_new_tokens=8))
    run(module)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ((prompts, experience),) = module.rollouts
    for row, (prompt, response) in enumerate(responses_by_row(prompts, experience)):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0] / temperature
        logprobs = logits.log_softmax(dim=-1)[len(prompt) - 1 : -1]
        expected = [logprobs[r, token].item() for r, token in enumerate(response)]
        assert experience.logprobs[row, : len(response)].tolist() == pytest.approx(expected, abs=1e-5)
        assert experience.ref_logprobs[row, : len(response)].tolist() == pytest.approx(expected, abs=1e-5)


def test_values_start_as_the_calibrated_scores_of_the_reward_model(folder, reward_folder):
    module = ppo(folder, reward_folder)
    run(module)
    model = AutoModelForSequenceClassification.from_pretrained(reward_folder)
    ((prompts, experience),) = module.rollouts
    for row, (prompt, response) in enumerate(responses_by_row(prompts, experience)):
        with torch.no_grad():
            raw = model.score(model.model(torch.tensor([prompt + response])).last_hidden_state)[0, :, 0]
        calibrated = ((raw - 0.5) / 2).tolist()
        values = experience.values[row, : len(response)].tolist()
        assert values == pytest.approx(calibrated[len(prompt) - 1 : -1], abs=1e-5)
        assert experience.scores[row].item() == pytest.approx(calibrated[-1], abs=1e-5)


def test_values_start_at_0_beside_a_function_and_anywhere_else_if_named(folder, reward_folder):
    module = ppo(folder, share_of_letters)
    run(module)
    assert not module.rollouts[0][1].values.any()

    module = ppo(folder, share_of_letters, value_name_or_path=reward_folder)
    run(module)
    assert module.rollouts[0][1].values.any()


def test_missing_eos_penalty_and_clip_reach_the_rewards(folder):
    def reward(prompts, responses):
        return [4.0 if int(prompt.split(":")[0]) % 2 else -1.0 for prompt in prompts]

    module = ppo(folder, reward, score=ScoreShaping(scaling=False, clip=3.0, missing_eos_penalty=1.5))
    log = run(module)
    ((_, experience),) = module.rollouts
    assert len(set(experience.ended.tolist())) == 2
    assert set(experience.scores.tolist()) == {4.0, -1.0}  # raw, as logged
    for row in range(8):
        length = int(experience.response_mask[row].sum())
        expected = [0.0] * length
        expected[-1] = min(experience.scores[row].item(), 3.0) - (0.0 if experience.ended[row] else 1.5)
        assert experience.rewards[row, :length].tolist() == pytest.approx(expected, abs=1e-5)
        assert not experience.rewards[row, length:].any()
    assert log.series("train/reward") == [pytest.approx(experience.rewards.sum().item() / 8, abs=1e-6)]


def test_scores_are_scaled_by_all_scores_so_far(folder):
    module = ppo(folder, share_of_letters, optimizer=sgd(0.0), kl=KLPenalty(0.0), score=ScoreShaping(clip=None))
    run(module, iterations=3)
    seen = []
    for _, experience in module.rollouts:
        seen += experience.scores.tolist()
        mean, std = statistics.mean(seen), statistics.pstdev(seen)
        expected = [(score - mean) / std for score in experience.scores.tolist()]
        assert experience.rewards.sum(dim=1).tolist() == pytest.approx(expected, abs=1e-4)


def test_kl_coefficient_follows_its_formula(folder):
    module = ppo(folder, share_of_letters, optimizer=adamw(3e-3), kl=KLPenalty(0.3, target=0.2, horizon=100))
    log = run(module, iterations=6)
    coefficient, expected = 0.3, []
    for kl in log.series("train/kl"):
        expected.append(coefficient)
        coefficient *= 1 + max(-0.2, min(0.2, kl / 0.2 - 1)) * 8 / 100
    assert log.series("train/kl_coef") == pytest.approx(expected, rel=1e-5)
    assert expected[1] == pytest.approx(0.3 * (1 - 0.2 * 0.08))  # the KL starts at 0
    assert any(later > earlier for earlier, later in pairwise(expected))  # and passes the target on the way


def test_kl_penalty_is_taken_from_every_token(folder):
    module = ppo(folder, share_of_letters, optimizer=adamw(3e-3), kl=KLPenalty(0.3), **PLAIN)
    log = run(module, iterations=3)
    _, experience = module.rollouts[-1]
    mask = experience.response_mask
    penalty = 0.3 * (experience.logprobs - experience.ref_logprobs)
    assert penalty[mask].abs().max() > 0.01
    last = mask & (mask.cumsum(dim=1) == mask.sum(dim=1, keepdim=True))
    expected = torch.where(last, experience.scores.unsqueeze(1), 0.0) - penalty
    torch.testing.assert_close(experience.rewards[mask], expected[mask])
    reward, score, kl = (log.series(f"train/{name}")[-1] for name in ("reward", "score", "kl"))
    assert reward == pytest.approx(score - 0.3 * kl, abs=1e-5)


def test_advantages_are_whitened_over_all_tokens_of_the_rollout(folder, reward_folder):
    module = ppo(folder, reward_folder, **PLAIN)
    run(module)
    ((_, experience),) = module.rollouts
    valid = experience.advantages[experience.response_mask]
    assert valid.mean().item() == pytest.approx(0, abs=1e-5)
    assert valid.std(correction=0).item() == pytest.approx(1, abs=1e-3)

    module = ppo(folder, reward_folder, objective=Objective(gae_lambda=1.0, whiten_advantages=False), **PLAIN)
    run(module)
    ((_, experience),) = module.rollouts
    mask = experience.response_mask
    scores = experience.scores.unsqueeze(1).expand_as(experience.returns)
    torch.testing.assert_close(experience.returns[mask], scores[mask], atol=1e-5, rtol=0)  # all that is to come
    torch.testing.assert_close(experience.advantages[mask], (scores - experience.values)[mask], atol=1e-5, rtol=0)


def test_micro_batches_change_nothing(folder, reward_folder):
    trained, lengths = [], set()
    for size in (None, 4, 2, 1):
        # One token is certain in each state, so the responses cannot depend on rounding.
        sampling = Sampling(top_k=1, max_new_tokens=10, stop_strings=list("aeiou"))
        module = ppo(
            folder, reward_folder, micro_batch_size=size, optimizer=sgd(0.1), sampling=sampling, gradient_clip_val=None
        )
        run(module, iterations=2)
        trained.append({**weights(module.policy), **weights(module.value)})
        lengths |= {int(length) for _, experience in module.rollouts for length in experience.response_mask.sum(dim=1)}
    assert len(lengths) > 2
    for other in trained[1:]:
        assert_close_weights(trained[0], other)


def test_prompts_answered_in_parts_give_responses_of_one_shape(folder, reward_folder):
    log = run(ppo(folder, reward_folder, generation_batch_size=2), iterations=2)
    assert log.series("train/ratio")[0] == pytest.approx(1, abs=1e-6)


@pytest.mark.long
def test_compiled_decoding_changes_nothing_and_is_compiled_once(folder, reward_folder, monkeypatch):
    counter = count_compiling(monkeypatch)
    trained, scores = [], []
    for compiled in (False, True):
        module = ppo(folder, reward_folder, compile_decoding=compiled)
        data = data_module(folder, 24, validation_data=prompt_rows(5), eval_batch_size=2)
        disturb_random_numbers(0)
        log = fit(module, data, val_check_interval=1, num_sanity_val_steps=2)
        trained.append({**weights(module.policy), **weights(module.value)})
        scores.append(log.series("val/score"))
    assert_close_weights(*trained)
    assert scores[1] == pytest.approx(scores[0])
    assert counter.frame_count == 1


def test_a_checkpoint_holds_the_sizes_that_decoding_is_compiled_for(folder, reward_folder, monkeypatch):
    count_compiling(monkeypatch)
    first, second = (ppo(folder, reward_folder, compile_decoding=True) for _ in range(2))
    run(first, iterations=1)
    state = first.run_state()
    rows, columns = state["compiled_step"]
    second.load_run_state({**state, "compiled_step": [rows + 1, columns + 64]})  # of a run that has seen larger batches
    assert second.run_state()["compiled_step"] == [rows + 1, columns + 64]  # where it is stopped before it has answered
    run(second, iterations=1)
    assert second.run_state()["compiled_step"] == [rows + 1, columns + 64]
    second.load_run_state(
        {**state, "compiled_step": [rows + 2, columns + 64]}
    )  # where it has answered before it resumes
    run(second, iterations=1)
    assert second.run_state()["compiled_step"] == [rows + 2, columns + 64]
    assert second.rollout_engine is None  # nothing of a run stays in memory


def test_policy_and_value_model_have_their_own_learning_rates(folder, reward_folder):
    log = run(ppo(folder, reward_folder, optimizer=sgd(0.1), value_lr=0.3, lr_schedule="linear"), iterations=4)
    assert log.series("train/lr") == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert log.series("train/value_lr") == pytest.approx([0.3, 0.225, 0.15, 0.075])

    for policy_lr, value_lr in [(0.1, 0.0), (0.0, 0.1)]:
        module = ppo(folder, reward_folder, optimizer=sgd(policy_lr), value_lr=value_lr)
        module.configure_model()
        policy, value = weights(module.policy), weights(module.value)
        run(module)
        assert same_weights(policy, weights(module.policy)) is (policy_lr == 0)
        assert same_weights(value, weights(module.value)) is (value_lr == 0)


def test_reference_and_reward_never_change_and_stay_out_of_checkpoints(folder, reward_folder, tmp_path):
    module = ppo(folder, reward_folder, optimizer=adamw(1e-2))
    module.configure_model()
    frozen = module.reference_model, module.scorer
    before = [weights(part) for part in frozen]
    run(module, iterations=3)
    assert all(same_weights(a, weights(b)) for a, b in zip(before, frozen, strict=True))
    assert not same_weights(before[0], weights(module.policy))

    module.trainer.save_checkpoint(tmp_path / "ppo.ckpt")
    saved = torch.load(tmp_path / "ppo.ckpt", weights_only=True)["state_dict"]
    assert {name.split(".")[0] for name in saved} == {"policy", "value"}


def other_tokenizer():
    """Reads characters; no id means what it means to the policy's."""
    vocab = {token: i for i, token in enumerate(["<end>", "<pad>", "<unk>", *map(chr, range(32, 127))])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"eos_token": "<end>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def test_a_reward_model_may_read_another_tokenizer(folder, tmp_path):
    tokenizer = other_tokenizer()
    base = save_llama(tmp_path / "base", tokenizer, hidden_size=16)
    reward = save_reward_model(tmp_path / "reward", base, tokenizer)
    module = ppo(folder, reward, sampling=Sampling(max_new_tokens=4, stop_strings=list("aeiou")))
    run(module)

    model = AutoModelForSequenceClassification.from_pretrained(reward)
    ((prompts, experience),) = module.rollouts
    rows = zip(prompts.prompts, responses_by_row(prompts, experience), experience.ended.tolist(), strict=True)
    for row, (prompt, (_, response), ended) in enumerate(rows):
        text = prompt + module.tokenizer.decode(response)
        ids = [tokenizer.convert_tokens_to_ids(character) for character in text] + [tokenizer.eos_token_id] * ended
        with torch.no_grad():
            raw = model.score(model.model(torch.tensor([ids])).last_hidden_state)[0, -1, 0].item()
        assert experience.scores[row].item() == pytest.approx((raw - 0.5) / 2, abs=1e-5)
    assert not experience.values.any()  # the reward model cannot read the policy's ids


def test_a_reward_function_may_be_named_by_its_import_path(folder):
    logs = [run(ppo(folder, reward)) for reward in (share_of_letters, "helpers.stages.share_of_letters")]
    assert logs[0].series("train/score") == logs[1].series("train/score")
    assert logs[0].series("train/score")[0] > 0


def test_answers_and_scores_prompts(folder):
    data = data_module(folder, 16, predict_data=prompt_rows(5), eval_batch_size=2)
    answers = [row for batch in trainer().predict(ppo(folder, share_of_letters), data) for row in batch]
    expected = [(i, row["prompt"]) for i, row in enumerate(prompt_rows(5))]
    assert [(row["row"], row["prompt"]) for row in answers] == expected
    assert all(0 <= row["score"] <= 1 and 1 <= row["tokens"] <= 8 for row in answers)
    ended = [row for row in answers if row["ended"]]
    assert 0 < len(ended) < 5
    assert all(row["score"] > 0 for row in ended)  # they end on a vowel


def test_validations_draw_the_same_responses_from_the_same_weights(folder):
    module = ppo(folder, share_of_letters, optimizer=sgd(0.0))
    data = data_module(folder, 24, validation_data=prompt_rows(5), eval_batch_size=2)
    log = fit(module, data, val_check_interval=1)
    assert len(log.series("val/score")) == 3
    assert len(set(log.series("val/score"))) == 1
    assert len(set(log.series("train/score"))) > 1


@pytest.mark.parametrize("trunk", ["own", "policy"])
def test_update_numbers_by_hand(folder, trunk):
    """One step of gradient descent without clipping: the gradient is what the weights moved by."""
    objective = Objective(whiten_advantages=False, value_coef=0.5, value_clip_range=None)
    module = ppo(
        folder, share_of_letters, optimizer=sgd(0.1), gradient_clip_val=None, objective=objective, value_trunk=trunk
    )
    module.configure_model()
    before = weights(module.policy), weights(module.value)
    log = run(module)
    ((_, experience),) = module.rollouts
    mask, after = experience.response_mask, (weights(module.policy), weights(module.value))
    moved = [
        torch.stack([(new[name] - old[name]).norm() for name in old]).norm().item() / 0.1
        for old, new in zip(before, after, strict=True)
    ]
    expected = {
        "policy_loss": -experience.advantages[mask].mean().item(),
        "value_loss": 0.5 * ((experience.values - experience.returns)[mask] ** 2).mean().item(),
        "ratio": 1.0,
        "grad_norm_policy": moved[0],
        "grad_norm_value": moved[1],
        "grad_norm": math.hypot(*moved),
    }
    assert {name: log.series(f"train/{name}")[0] for name in expected} == pytest.approx(expected, rel=1e-3)
    assert min(moved) > 1e-3


def test_raw_and_calibrated_scores_are_told_apart(folder, reward_folder):
    module = ppo(folder, reward_folder)
    data = data_module(folder, 8, validation_data=prompt_rows(5), eval_batch_size=2)
    log = fit(module, data, val_check_interval=1)
    for stage in ("train", "val"):
        score, raw = (log.series(f"{stage}/{name}")[0] for name in ("score", "raw_score"))
        assert raw == pytest.approx(score * 2 + 0.5, abs=1e-5)  # as the folder was calibrated


def test_the_bar_shows_score_kl_and_length(folder):
    shown = set()
    look = LambdaCallback(on_train_batch_end=lambda trainer, *_: shown.update(trainer.progress_bar_metrics))
    run(ppo(folder, share_of_letters), callbacks=[look])
    assert shown == {"train/score", "train/kl", "train/response_length"}


def test_seconds_are_those_of_the_parts(folder, monkeypatch):
    clock(monkeypatch)
    log = run(ppo(folder, share_of_letters))
    assert [log.series(f"train/seconds_{part}") for part in ("generating", "scoring", "updating")] == [[2.0]] * 3


@pytest.mark.parametrize("of_a_model", [True, False])
def test_validation_numbers_are_means_over_responses(folder, reward_folder, tmp_path, of_a_model):
    """Against what `predict` says of each response; the batches are uneven."""
    other = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        other.lm_head.weight.mul_(0.8)
    other.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    certain = Sampling(top_k=1, max_new_tokens=8, stop_strings=list("aeiou"))  # no random number matters
    reward = reward_folder if of_a_model else share_of_letters
    rows = prompt_rows(5)
    held_out = {"validation_data": rows, "test_data": rows, "predict_data": rows, "eval_batch_size": 2}
    data = data_module(folder, 8, **held_out)
    module = ppo(folder, reward, sampling=certain, reference=str(tmp_path))
    answers = [row for batch in trainer().predict(module, data) for row in batch]
    columns = {"score": "score", "kl": "kl", "eos_rate": "ended", "response_length": "tokens"}
    expected = {name: statistics.mean(float(row[column]) for row in answers) for name, column in columns.items()}
    assert abs(expected["kl"]) > 1e-3
    if of_a_model:
        expected["raw_score"] = expected["score"] * 2 + 0.5
    (validated,), (tested,) = (getattr(trainer(), task)(module, data, verbose=False) for task in ("validate", "test"))
    assert validated == pytest.approx({f"val/{name}": value for name, value in expected.items()}, abs=1e-5)
    assert tested == pytest.approx({f"test/{name}": value for name, value in expected.items()}, abs=1e-5)
