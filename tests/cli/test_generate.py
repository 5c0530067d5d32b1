"""`rlhf generate` and `rlhf score`: what one writes the other reads, and so do the stages."""

from __future__ import annotations

import json

import pytest
import torch

from helpers.stages import preference_rows, prompt_rows, save_llama, save_reward_model
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.cli.main import main
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation import Judge, Policy, policy
from rlhf_lightning.evaluation.rows import read_rows
from rlhf_lightning.generation.sampling import Sampling


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base = save_llama(folder / "base")
    return base, save_reward_model(folder / "reward", base)


@pytest.fixture
def prompts(tmp_path):
    return write(tmp_path / "prompts.jsonl", prompt_rows(5))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def refused(capsys, *words):
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    assert left.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_one_prompt_is_answered_on_the_terminal_as_the_engine_answers_it(models, capsys):
    main(["generate", models[0], "--prompt", "the cat", "--max_new_tokens", "8", "--seed", "3"])
    policy = Policy.load(models[0])
    sampling = Sampling(temperature=0.7, max_new_tokens=8)
    (answer,) = policy.answer([policy.asked("the cat")], sampling, policy.row_generators(3, [(0,)]))
    assert capsys.readouterr().out == answer.text + "\n"


def test_a_row_gets_the_same_answer_whatever_the_others(models, prompts, tmp_path, capsys):
    main(["generate", models[0], "--file", prompts, "--max_new_tokens", "6", "--batch_size", "2"])
    whole = lines(capsys.readouterr().out)
    assert [row["prompt"] for row in whole] == [row["prompt"] for row in prompt_rows(5)]
    out = tmp_path / "new" / "some.jsonl"
    main(["generate", models[0], "--file", prompts, "--max_new_tokens", "6", "--num_samples", "2", "--out", str(out)])
    some = lines(out.read_text())
    assert len(some) == 2
    assert all(row in whole for row in some)


def test_what_was_generated_is_scored(models, prompts, tmp_path, capsys):
    out, scores = tmp_path / "answers.jsonl", tmp_path / "scores.jsonl"
    main(["generate", models[0], "--file", prompts, "--max_new_tokens", "6", "--out", str(out)])
    main(["score", models[1], "--file", str(out), "--out", str(scores)])
    found, rows = lines(scores.read_text()), read_rows(out, "finetune")
    expected = Judge.load(models[1]).scores([row.written for row in rows], [row.responses[0] for row in rows])
    assert [row["score"] for row in found] == pytest.approx(expected.tolist(), abs=1e-5)
    mean = sum(row["score"] for row in found) / len(found)
    assert f"mean score {mean:.4f} of {len(found)} responses" in capsys.readouterr().err


def test_pairs_are_scored_on_both_sides(models, tmp_path, capsys):
    pairs = write(tmp_path / "pairs.jsonl", preference_rows(6))
    main(["score", "helpers.stages.share_of_letters", "--file", pairs])
    output = capsys.readouterr()
    found = lines(output.out)
    right = sum(row["chosen_score"] > row["rejected_score"] for row in found) / 6
    assert [row["chosen"] for row in found] == [row["chosen"] for row in preference_rows(6)]
    assert f"of 6 chosen responses; {right:.1%} above all that were ranked lower" in output.err


def test_a_ranking_stays_a_ranking_by_score(tmp_path, capsys):
    row = {"prompt": "a", "responses": ["1", "ab", "a1"], "ranks": [3, 1, 2]}
    main(["score", "helpers.stages.share_of_letters", "--file", write(tmp_path / "ranked.jsonl", [row])])
    output = capsys.readouterr()
    (found,) = lines(output.out)
    assert found["responses"] == ["ab", "a1", "1"]
    assert found["scores"] == sorted(found["scores"], reverse=True)
    assert "100.0% above all" in output.err


def test_bad_input_is_one_line(models, prompts, tmp_path, capsys):
    assert "does not exist" in refused(capsys, "generate", tmp_path / "none", "--prompt", "hi")
    assert "--prompt is empty" in refused(capsys, "generate", models[0], "--prompt", " \n")
    assert "either --prompt or --file" in refused(capsys, "generate", models[0])
    assert "lower max_new_tokens" in refused(capsys, "generate", models[0], "--prompt", "hi", "--max_new_tokens", 64)
    assert "pass --file" in refused(capsys, "score", models[1])
    assert "needed: prompt and response" in refused(capsys, "score", models[1], "--file", prompts)
    pairs = write(tmp_path / "pairs.jsonl", preference_rows(2))
    assert "has no trained reward head" in refused(capsys, "score", models[0], "--file", pairs)
    assert "is there already" in refused(capsys, "generate", models[0], "--prompt", "hi", "--out", prompts)
    assert "unknown key" in refused(capsys, "generate", models[0], "--promt", "hi")


@pytest.mark.parametrize("command", ["generate", "score"])
@pytest.mark.parametrize(
    ("device", "said"),
    [
        *((name, "write cpu, cuda or cuda:1") for name in ("gpu", "cud", "", "cuda:", "meta", "cpu:1")),
        *((name, "this machine has no CUDA device; write cpu") for name in ("cuda", "cuda:999")),
    ],
)
def test_a_device_that_is_not_there_is_said_before_anything_is_read(monkeypatch, capsys, command, device, said):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    line = refused(capsys, command, "no/model", "--file", "none.jsonl", "--device", device)
    shown = device or "''"
    assert line.splitlines()[-1] == f"error: --device {shown}: {said}"


def test_a_cuda_device_beyond_the_last_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert policy.find_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match=r"--device cuda:2: the last CUDA device of this machine is cuda:1; write that"):
        policy.find_device("cuda:2")


def test_a_file_is_made_only_where_there_is_something_to_write(models, prompts, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    refused(capsys, "generate", tmp_path / "none", "--prompt", "hi", "--out", out)
    assert not out.exists()


def test_a_prompt_that_is_too_long_is_said_to_lose_its_beginning(models, caplog):
    with caplog.at_level("INFO", logger="pytorch_lightning.utilities.rank_zero"):
        main(["generate", models[0], "--prompt", "bread " * 80 + "end", "--max_new_tokens", "4"])
    assert "1 of 1 prompts leave" in caplog.text
    assert "lost their beginning" in caplog.text


def test_words_are_a_turn_only_where_nothing_says_how_the_model_was_taught(tmp_path):
    base = save_llama(tmp_path, tiny_tokenizer(chat_template=True))
    policy = Policy.load(base)
    assert policy.asked("hi").prompt == [{"role": "user", "content": "hi"}]
    policy.model.config.dialogue_rendering = {"dialogue_format": "auto", "plain_format": {}}
    assert policy.asked("hi").prompt == "hi"
    assert Policy.load(save_llama(tmp_path / "plain")).asked("hi").prompt == "hi"


def test_a_short_context_leaves_half_for_the_answer(models, prompts, tmp_path, capsys):
    main(["generate", models[0], "--file", prompts])
    assert max(row["tokens"] for row in lines(capsys.readouterr().out)) <= 32
    assert Policy.load(models[0]).ample_response == 32


def sometimes_nothing(prompts, responses):
    return [float("inf") if response.endswith("!") else 1.0 * len(response) for response in responses]


def test_a_score_that_is_not_finite_is_null_and_counts_for_nothing(tmp_path, capsys):
    rows = [{"prompt": "p", "chosen": "yes", "rejected": "n"}, {"prompt": "q", "chosen": "yes", "rejected": "no!"}]
    main(["score", f"{__name__}.sometimes_nothing", "--file", write(tmp_path / "pairs.jsonl", rows)])
    said = capsys.readouterr()
    assert [row["rejected_score"] for row in lines(said.out)] == [1.0, None]
    assert said.err.splitlines()[-1] == (
        "mean score 3.0000 of 1 chosen responses; 100.0% above all that were ranked lower; "
        "1 rows have a score that is not finite and count for nothing"
    )


def test_responses_of_one_rank_are_not_compared(tmp_path, capsys):
    row = {"prompt": "p", "responses": ["aa", "aaaa", "a"], "ranks": [0, 0, 1]}
    main(["score", f"{__name__}.sometimes_nothing", "--file", write(tmp_path / "ranked.jsonl", [row])])
    assert "100.0% above all that were ranked lower" in capsys.readouterr().err
