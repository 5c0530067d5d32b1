"""`rlhf sample`: the best of K answers by a reward, as rows that the stages read; stopped anywhere, it goes on."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

from helpers.forked import Forked, run_forked
from helpers.killed import die_in
from helpers.stages import prompt_rows, save_gpt2, save_llama, save_reward_model, share_of_letters
from helpers.tokenizers import CHAT_TEMPLATE, tiny_tokenizer
from rlhf_lightning import InstructionDataModule, PreferenceDataModule
from rlhf_lightning.chat.written import WrittenPrompt
from rlhf_lightning.cli.main import main
from rlhf_lightning.evaluation import Policy
from rlhf_lightning.evaluation.best_of_n import Drawing, draw
from rlhf_lightning.evaluation.rejection import with_system
from rlhf_lightning.evaluation.rows import read_rows
from rlhf_lightning.generation.sampling import Sampling
from rlhf_lightning.runs.lock import locked

LETTERS = "helpers.stages.share_of_letters"
TURNS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bake bread"},
]


def nothing(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward that likes all alike."""
    return [1.0] * len(responses)


def broken(prompts: list[str], responses: list[str]) -> list[float]:
    return [float("nan")] * len(responses)


def save_policy(folder: Path, chat_template: bool = False) -> str:
    """A language model that ends an answer at one token in six or so, and says as many spaces."""
    place = save_gpt2(folder, 0.0)
    tokenizer = tiny_tokenizer()
    model = GPT2LMHeadModel.from_pretrained(place)
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(0.5)
        for often in (tokenizer.eos_token_id, *tokenizer.encode(" ")):
            model.lm_head.weight[often] = torch.tensor([1.0] * 8 + [0.0] * 8)  # a logit that is larger by 4
    model.save_pretrained(place)
    if chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("chatty"), chat_template=True)


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("reward")
    return save_reward_model(folder / "reward", save_llama(folder / "base"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return save(tmp_path / "prompts.jsonl", prompt_rows(6))


def save(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def words(policy: str, prompts: Path, out: Path, *more: Any, reward: str = LETTERS) -> list[str]:
    sizes = ["--k", "5", "--max_new_tokens", "8"]
    return [
        "sample",
        *("--policy", policy, "--reward", reward, "--data", str(prompts), "--out", str(out)),
        *map(str, (*sizes, *more)),
    ]


def sampled(policy: str, prompts: Path, out: Path, *more: Any, reward: str = LETTERS) -> list[dict[str, Any]]:
    main(words(policy, prompts, out, *more, reward=reward))
    return rows_of(out)


def summaries(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that say what came of the prompts."""
    return [line for line in capsys.readouterr().err.splitlines() if " rows in " in line]


def refused(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def by_hand(policy: str, prompts: Path, temperature: float = 1.0) -> dict[int, list[tuple[float, str, int]]]:
    """Of each row the answers that ended, by score, the best first: score, text, tokens."""
    model, rows, found = Policy.load(policy), read_rows(prompts, "prompts"), {}
    for row in rows:  # one by one: the company changes nothing
        (answers,) = draw(model, [row.written], [row.row], 5, Drawing(Sampling(temperature, max_new_tokens=8), 1))
        able = [one for one in answers if one.ended and one.raw.strip()]
        scores = share_of_letters([], [one.raw for one in able])
        ranked = [(score, one.raw, len(one.ids)) for score, one in zip(scores, able, strict=True)]
        found[row.row] = sorted(ranked, key=lambda one: -one[0])
    return found


def test_the_best_answer_of_each_prompt_is_kept_with_what_it_came_from(policy, prompts, tmp_path, capsys):
    found = sampled(policy, prompts, tmp_path / "best.jsonl", "--label", "iteration 1")
    expected = by_hand(policy, prompts)
    written = {row: ranked for row, ranked in expected.items() if ranked}
    assert [row["row"] for row in found] == list(written)
    assert len(written) > 2
    assert any(row["response"] != row["response"].strip() for row in found)  # a text is continued to the letter
    for row, ranked in zip(found, written.values(), strict=True):
        score, text, tokens = ranked[0]
        origin = {"k": 5, "policy": policy, "reward": LETTERS, "iteration": "iteration 1"}
        said = {"prompt": prompt_rows(6)[row["row"]]["prompt"], "response": text, "ended": True, "tokens": tokens}
        assert row == {"row": row["row"], **said, "score": pytest.approx(score), **origin}
    best = sum(ranked[0][0] for ranked in written.values()) / len(written)
    mean = sum(sum(score for score, *_ in ranked) / len(ranked) for ranked in written.values()) / len(written)
    (line,) = summaries(capsys)
    dropped = 6 - len(written)
    assert f"6 prompts: {len(written)} rows in '{tmp_path / 'best.jsonl'}', dropped {dropped}" in line
    assert f"mean score {best:.4f} of the best answers, {mean:.4f} of all" in line
    assert list(tmp_path.glob("*.partial")) == []


def test_a_ranking_and_a_pair_hold_the_same_answers(policy, prompts, tmp_path):
    expected = by_hand(policy, prompts)
    differing = {row: ranked for row, ranked in expected.items() if len({score for score, *_ in ranked}) > 1}
    ranked = sampled(policy, prompts, tmp_path / "all.jsonl", "--keep", "all")
    pairs = sampled(policy, prompts, tmp_path / "pairs.jsonl", "--keep", "pair")
    assert [row["row"] for row in ranked] == [row["row"] for row in pairs] == list(differing)
    for row, pair, answers in zip(ranked, pairs, differing.values(), strict=True):
        assert row["responses"] == [text for _, text, _ in answers]
        assert row["scores"] == pytest.approx([score for score, *_ in answers])
        assert (pair["chosen"], pair["rejected"]) == (answers[0][1], answers[-1][1])
        assert (pair["chosen_score"], pair["rejected_score"]) == (row["scores"][0], row["scores"][-1])
        assert pair["k"] == row["k"] == 5


def test_what_was_drawn_is_what_is_taught_and_scored_again(policy, reward, prompts, tmp_path, capsys):
    best, scores = tmp_path / "best.jsonl", tmp_path / "scores.jsonl"
    found = sampled(policy, prompts, best, reward=reward)
    main(["score", reward, "--file", str(best), "--out", str(scores)])
    assert [row["score"] for row in rows_of(scores)] == pytest.approx([row["score"] for row in found], abs=1e-4)
    data = InstructionDataModule(
        policy, str(best), validation_split=0, batch_size=len(found), max_length=48, on_bad_row="error"
    )
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    ids = {
        row: ids[mask] for row, ids, mask in zip(batch.row_ids.tolist(), batch.input_ids, batch.loss_mask, strict=True)
    }
    model, exact = Policy.load(policy), 0
    for place, row in enumerate(found):
        (answers,) = draw(
            model, [WrittenPrompt(row["prompt"])], [row["row"]], 5, Drawing(Sampling(max_new_tokens=8), 1)
        )
        (drawn,) = [one for one in answers if one.raw == row["response"] and len(one.ids) == row["tokens"]][:1]
        if "\ufffd" not in drawn.raw and model.tokenizer.encode(drawn.raw) == drawn.ids[:-1].tolist():
            assert ids[place].tolist() == drawn.ids.tolist()  # the tokens that were drawn, the end of sequence too
            exact += 1
    assert exact


@pytest.mark.parametrize("keep", ["best", "all", "pair"])
def test_the_data_modules_read_every_row(chatty, tmp_path, keep):
    rows = [{"messages": TURNS}, {"prompt": [{"role": "system", "content": "Be brief."}, TURNS[0]]}]
    data = save(tmp_path / "dialogues.jsonl", [rows[0], {"messages": [*rows[1]["prompt"], TURNS[1]]}])
    found = sampled(chatty, data, tmp_path / "rows.jsonl", "--keep", keep, "--unfinished", "keep")
    assert [row["prompt"] for row in found] == [TURNS, rows[1]["prompt"]]
    kind = InstructionDataModule if keep == "best" else PreferenceDataModule
    read = kind(
        chatty, str(tmp_path / "rows.jsonl"), validation_split=0, batch_size=1, max_length=64, on_bad_row="error"
    )
    read.setup("fit")
    assert read.counts["rows"] == 2
    assert len(read._train) >= 2


def test_an_answer_depends_on_neither_the_batch_size_nor_its_company(policy, prompts, tmp_path):
    one = sampled(policy, prompts, tmp_path / "one.jsonl", "--batch_size", 1, "--temperature", 1.3)
    many = sampled(policy, prompts, tmp_path / "many.jsonl", "--batch_size", 64, "--temperature", 1.3)
    some = sampled(policy, prompts, tmp_path / "some.jsonl", "--num_samples", 3, "--temperature", 1.3)
    assert one == many
    assert some == [row for row in many if row["row"] in {other["row"] for other in some}]
    expected = by_hand(policy, prompts, temperature=1.3)
    assert [row["response"] for row in many] == [ranked[0][1] for ranked in expected.values() if ranked]


def test_rows_are_prompts_less_what_is_dropped(tmp_path, capsys):
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    place = save_policy(tmp_path / "strict", chat_template=True)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = strict + CHAT_TEMPLATE
    tokenizer.save_pretrained(place)
    asked = [
        [TURNS[0]],
        [{"role": "system", "content": "no"}, TURNS[0]],
        [{"role": "user", "content": "bread " * 80}],
        [TURNS[0]],
        TURNS,
    ]
    data = save(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in asked])
    found = sampled(place, data, tmp_path / "best.jsonl", "--unfinished", "keep", "--k", 8)
    assert [row["row"] for row in found] == [0, 4]
    (line,) = summaries(capsys)
    assert "4 prompts: 2 rows" in line  # the fourth row asks what the first one asks
    assert "dropped 2 (1 the dialogue format refuses the turns: no system turns, 1 prompt is too long)" in line


def test_what_did_not_end_is_not_taught_as_complete(policy, prompts, tmp_path, capsys):
    dropped = sampled(policy, prompts, tmp_path / "some.jsonl", "--max_new_tokens", 2)
    kept = sampled(policy, prompts, tmp_path / "all.jsonl", "--max_new_tokens", 2, "--unfinished", "keep")
    assert all(row["ended"] for row in dropped)
    assert len(dropped) < len(kept)
    assert not all(row["ended"] for row in kept)
    first, second = summaries(capsys)
    assert "response did not end" in first
    assert "no answer that can be taught" in first
    assert "response did not end" not in second
    line = refused(capsys, words(policy, prompts, tmp_path / "none.jsonl", "--max_new_tokens", 1))
    assert "none of 6 prompts leaves a row (6 no answer that can be taught; answers: " in line
    assert line.endswith("raise --max_new_tokens, or pass --unfinished keep")
    assert list(tmp_path.glob("none*")) == []


def test_no_pair_is_made_where_no_answer_is_better(policy, prompts, tmp_path, capsys):
    same = f"{__name__}.nothing"
    line = refused(capsys, words(policy, prompts, tmp_path / "pairs.jsonl", "--keep", "pair", reward=same))
    assert "all answers score alike" in line
    assert len(sampled(policy, prompts, tmp_path / "best.jsonl", reward=same)) > 2


# Stopped, and gone on with.


@pytest.mark.parametrize("call", [2, 3, 4])
def test_killed_and_resumed_it_ends_as_if_it_had_not_been(policy, prompts, tmp_path, call):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    options = ("--batch_size", 10, "--temperature", 1.2)  # two prompts at once
    sampled(policy, prompts, whole, *options)
    die = partial(die_in, "rlhf_lightning.evaluation.results.Lines.add", call)
    ended = run_forked(words(policy, prompts, cut, *options), tmp_path, timeout=300, before=die)
    assert ended.returncode == -signal.SIGKILL
    assert not cut.exists()
    journal = tmp_path / "cut.jsonl.partial"
    journal.write_bytes(journal.read_bytes()[:-40])  # the disk was behind, too: a line is cut off
    ended = run_forked(words(policy, prompts, cut, *options), tmp_path, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert cut.read_bytes() == whole.read_bytes()
    assert not journal.exists()


def test_what_is_made_is_not_made_again(policy, prompts, tmp_path):
    out, die = tmp_path / "cut.jsonl", partial(die_in, "rlhf_lightning.evaluation.rejection.draw", 4)
    run_forked(words(policy, prompts, out, "--batch_size", 5), tmp_path, timeout=300, before=die)
    die = partial(die_in, "rlhf_lightning.evaluation.rejection.draw", 3 + 1)
    ended = run_forked(words(policy, prompts, out, "--batch_size", 5), tmp_path, timeout=300, before=die)
    assert ended.returncode == 0, ended.stderr  # three of six were left


@pytest.mark.parametrize("function", ["os.replace", "pathlib.Path.replace", "pathlib.Path.unlink"])
def test_killed_at_the_end_the_file_is_whole_or_not_there(policy, prompts, tmp_path, function):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    sampled(policy, prompts, whole)
    run_forked(words(policy, prompts, cut), tmp_path, timeout=300, before=partial(die_in, function))
    assert not cut.exists() or cut.read_bytes() == whole.read_bytes()
    ended = run_forked(words(policy, prompts, cut, *(["--overwrite", "true"] if cut.exists() else [])), tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert cut.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "cut.jsonl.partial").exists()


def test_other_settings_are_refused_or_begin_anew(policy, prompts, tmp_path, capsys):
    out, die = tmp_path / "cut.jsonl", partial(die_in, "rlhf_lightning.evaluation.results.Lines.add", 3)
    run_forked(words(policy, prompts, out, "--batch_size", 5), tmp_path, timeout=300, before=die)
    line = refused(capsys, words(policy, prompts, out, "--k", 4, "--seed", 2))
    assert f"{out}.partial was begun with k 5 and seed 1; repeat the command with that to go on" in line
    other = save(tmp_path / "other.jsonl", prompt_rows(7))
    line = refused(capsys, words(policy, other, out))
    assert "was begun with the prompts, which have changed" in line
    assert "Traceback" not in line
    sampled(policy, prompts, out, "--k", 4, "--overwrite", "true")
    sampled(policy, prompts, tmp_path / "undisturbed.jsonl", "--k", 4)
    assert out.read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()


def test_ctrl_c_says_where_it_goes_on(policy, prompts, tmp_path):
    out = tmp_path / "best.jsonl"
    # Many slow answers, so that it is in the middle of them.
    running = Forked(words(policy, prompts, out, "--k", 4000, "--batch_size", 4000), tmp_path)
    journal = tmp_path / "best.jsonl.partial"
    assert running.wait_for(lambda: journal.exists() and bool(journal.read_bytes()))
    running.send(signal.SIGINT)
    ended = running.wait()
    assert ended.returncode == 130
    assert ended.stderr.splitlines()[-2:] == [
        f"what is made stands in '{journal}'; the same command goes on from there",
        "interrupted",
    ]
    assert not out.exists()


# Bad input.


def test_bad_input_is_one_line(policy, reward, prompts, tmp_path, capsys):
    out = tmp_path / "best.jsonl"
    ask = partial(words, policy, prompts, out)

    def said(*more: Any, **options: Any) -> str:
        line = refused(capsys, ask(*more, **options))
        assert line.startswith("error: ")
        return line

    line = refused(capsys, ["sample", "--reward", LETTERS, "--out", str(out)])
    assert line == "error: policy and data missing; pass --policy and --data"
    assert "k (0) must be at least 1" in said("--k", 0)
    assert "keep: pair compares answers, and k is 1" in said("--keep", "pair", "--k", 1)
    assert "--device gpu: write cpu, cuda or cuda:1" in said("--device", "gpu")
    assert "keep: expected one of best, all, pair" in said("--keep", "worst")
    assert "temperature 0 draws the same answer 5 times" in said("--temperature", 0)
    assert "system is empty" in said("--system", " ")
    assert "keeps an instruction, and there is none" in said("--system_kept", "first")
    assert "does not exist" in refused(capsys, words(str(tmp_path / "none"), prompts, out))
    assert "neither a reward model folder nor" in said(reward="none")
    assert "has no trained reward head" in refused(capsys, words(policy, prompts, out, reward=policy))
    assert "unknown key 'kk'" in said("--kk", 3)
    assert "score that is not finite" in said(reward=f"{__name__}.broken")
    assert "there is a folder of that name" in refused(capsys, words(policy, prompts, tmp_path))
    assert not out.exists()


def test_a_second_one_into_the_same_file_is_refused(policy, prompts, tmp_path, capsys):
    out = tmp_path / "runs/best.jsonl"
    with locked(out.parent, "--out", out.name):
        line = refused(capsys, words(policy, prompts, out))
        assert line.startswith(f"error: '{out}' is in use by another run (process {os.getpid()} on ")
        assert line.endswith("; wait until it has ended, or choose another --out")
        sampled(policy, prompts, out.with_name("other.jsonl"))
    assert [path.name for path in out.parent.iterdir()] == ["other.jsonl"]


def test_a_file_of_others_is_never_replaced(policy, prompts, tmp_path, capsys):
    before = prompts.read_bytes()
    assert "is there already" in refused(capsys, words(policy, prompts, prompts))
    line = refused(capsys, words(policy, prompts, prompts, "--overwrite", "true"))
    assert "not what `rlhf sample` writes" in line
    assert prompts.read_bytes() == before
    out = tmp_path / "best.jsonl"
    first = sampled(policy, prompts, out)
    second = sampled(policy, prompts, out, "--seed", 2, "--overwrite", "true")
    assert first != second


# With an instruction.


def test_answers_are_drawn_with_the_instruction_and_written_without(chatty, tmp_path):
    data = save(tmp_path / "dialogues.jsonl", [{"prompt": TURNS}, {"prompt": [TURNS[2]]}])
    options = ("--system", "Hi.", "--unfinished", "keep", "--max_new_tokens", 4)
    found = sampled(chatty, data, tmp_path / "best.jsonl", *options)
    assert [row["prompt"] for row in found] == [TURNS, [TURNS[2]]]
    model, how = Policy.load(chatty), Drawing(Sampling(max_new_tokens=4), 1)
    for row in found:
        asked = with_system(WrittenPrompt(row["prompt"]), "Hi.", False)
        (answers,) = draw(model, [asked], [row["row"]], 5, how)
        (plain,) = draw(model, [WrittenPrompt(row["prompt"])], [row["row"]], 5, how)
        texts = [one.text for one in answers if one.text]
        assert row["response"] == max(texts, key=lambda text: share_of_letters([], [text])[0])
        assert [one.text for one in plain] != [one.text for one in answers]
    ghost = sampled(chatty, data, tmp_path / "ghost.jsonl", *options, "--system_kept", "first")
    assert [row["prompt"][0]["role"] for row in ghost] == ["system"] * 2
    assert ghost[0]["prompt"][1:] == TURNS
