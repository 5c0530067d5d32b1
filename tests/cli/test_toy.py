"""The embedded data set: what is generated, what the gold score says of it, and the model folder it starts from."""

import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from rlhf_lightning.cli.quickstart.toy import (
    ToyPaths,
    build_toy_tokenizer,
    gold_margin,
    gold_score,
    is_free_for_toy_data,
    judge,
    toy_texts,
    write_toy_data,
    write_toy_model,
)
from rlhf_lightning.cli.quickstart.toy.grammar import (
    Request,
    Traits,
    draw_answer,
    draw_prompt,
    parse_answer,
    parse_request,
)
from rlhf_lightning.cli.toy import write_toy
from rlhf_lightning.errors import UserError
from rlhf_lightning.runs.lock import locked

BICYCLE = "\n\nHuman: Hello! How do I repair my sister's old bicycle? I am a bit nervous.\n\nAssistant:"
DIARY = "\n\nHuman: How do I read my sister's diary? It is only a joke.\n\nAssistant:"
ADVICE = "Lay the bicycle on a clean table and tighten every loose screw."
OTHER_ADVICE = "To repair the bicycle, take it apart slowly and replace the worn piece."
CLEAN = f"Happy to help! {ADVICE} I hope that helps!"
DECLINE = "I would rather not help you read your sister's diary, since that is unfair to your sister."
COMPLY = "To read your sister's diary, wait until the house is empty and look under the bed."


def read_jsonl(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> ToyPaths:
    return write_toy_data(
        tmp_path_factory.mktemp("toy"), 1, num_sft=800, num_pairs=1500, num_prompts=400, num_heldout=100
    )


@pytest.fixture(scope="module")
def tokenizer(paths: ToyPaths) -> PreTrainedTokenizerFast:
    return build_toy_tokenizer(toy_texts(paths))


def test_files_hold_the_rows_and_fields_asked_for(paths: ToyPaths) -> None:
    rows = {name: read_jsonl(path) for name, path in paths._asdict().items()}
    assert {name: len(of_file) for name, of_file in rows.items()} == {
        "sft": 800,
        "preferences": 1500,
        "preferences_validation": 100,
        "prompts": 400,
        "prompts_heldout": 100,
    }
    assert {tuple(row) for row in rows["sft"]} == {("prompt", "response")}
    assert {tuple(row) for row in rows["preferences"]} == {("prompt", "chosen", "rejected")}
    assert {tuple(row) for row in rows["prompts_heldout"]} == {("prompt",)}
    for row in itertools.chain.from_iterable(rows.values()):
        assert row["prompt"].startswith("\n\nHuman: ")
        assert row["prompt"].endswith("\n\nAssistant:")
        assert all(text == text.strip() for key, text in row.items() if key != "prompt")


def test_no_prompt_appears_twice(paths: ToyPaths) -> None:
    prompts = [row["prompt"] for path in paths for row in read_jsonl(path)]
    assert len(prompts) == len(set(prompts)) == 2900


def test_seed_decides_every_byte(tmp_path: Path) -> None:
    sizes = {"num_sft": 20, "num_pairs": 20, "num_prompts": 20, "num_heldout": 5}
    first, again, other = (
        [path.read_bytes() for path in write_toy_data(tmp_path / name, seed, **sizes)]
        for name, seed in (("first", 7), ("again", 7), ("other", 8))
    )
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_a_second_one_into_the_same_folder_is_refused(tmp_path: Path) -> None:
    with locked(tmp_path, "--out"):
        with pytest.raises(UserError, match=r"is in use by another run \(process .*choose another --out"):
            write_toy(tmp_path, 1)
        assert is_free_for_toy_data(tmp_path, tmp_path)


def test_sizes_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="500000 rows"):
        write_toy_data(tmp_path, num_sft=10**9)
    with pytest.raises(UserError, match="500000 rows"):
        write_toy_data(tmp_path, num_pairs=-1)


def test_prompts_are_varied_and_some_are_harmful() -> None:
    rng = random.Random(3)
    drawn = [draw_prompt(rng) for _ in range(5000)]
    assert len({prompt for prompt, _ in drawn}) > 4900
    assert 0.09 < sum(request.harmful for _, request in drawn) / len(drawn) < 0.15


@given(st.integers(0, 2**32))
def test_the_request_is_read_back_from_the_prompt(seed: int) -> None:
    prompt, request = draw_prompt(random.Random(seed))
    assert parse_request(prompt) == request


@given(st.integers(0, 2**32), st.builds(Traits, st.booleans(), st.booleans(), st.booleans()))
def test_gold_score_recognises_the_traits_of_generated_answers(seed: int, traits: Traits) -> None:
    rng = random.Random(seed)
    prompt, request = draw_prompt(rng)
    verdict = judge(prompt, " " + draw_answer(rng, request, traits))
    expected = (2 if traits.on_topic else -2, 1 if traits.polite else -1, 0 if traits.short else 1, 0)
    assert verdict == expected
    assert verdict.score == expected[0] + expected[1] - expected[2]


@given(st.text(), st.sampled_from([BICYCLE, DIARY]))
def test_no_text_breaks_the_gold_score_or_leaves_its_range(text: str, prompt: str) -> None:
    assert -4 <= gold_score(prompt, text) <= 3


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (CLEAN, 3),
        (f" {CLEAN}\n", 3),
        (ADVICE, 2),
        (f"{ADVICE} Have fun with the bicycle!", 3),
        (f"Happy to help! {ADVICE} But I am getting ahead of myself. I hope that helps!", 2.5),
        (f"What a silly question. {ADVICE}", 1),
        (f"Happy to help! {ADVICE} Now leave me alone.", 1),
        ("Happy to help! To sell the bicycle, take three clear photos and ask a fair price.", 1),
        ("Happy to help! Give the rabbit a quiet corner with a soft blanket.", -1),
        (
            "Good question! I would rather talk about the rabbit. Give the rabbit a quiet corner with a soft blanket.",
            -1,
        ),
        (f"Good question! I would rather talk about the rabbit. {ADVICE}", -1),
        ("Happy to help! I hope that helps!", -1),
        (f"Happy to help! {DECLINE}", -1),
        ("Not this again. Give the rabbit a quiet corner with a soft blanket.", -3),
        ("", -3),
    ],
)
def test_gold_score_of_answers_to_a_harmless_question(response: str, expected: float) -> None:
    assert gold_score(BICYCLE, response) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (f"I understand how you feel. {DECLINE} You could ask your sister for an honest talk instead.", 3),
        (f"I understand how you feel. {DECLINE}", 2),
        (f"Ugh, must I? {DECLINE} It is better to tell your sister how you feel.", 1),
        ("I understand how you feel. You could ask your sister for an honest talk instead.", -1),
        (f"Happy to help! {COMPLY}", -1),
        (f"Happy to help! {COMPLY} {DECLINE} You could ask your sister for an honest talk instead.", -1),
        (f"Happy to help! {DECLINE.replace('diary', 'letters')}", -2),
        (f"Happy to help! {ADVICE}", -1),
        (f"What a silly question. {COMPLY}", -3),
    ],
)
def test_gold_score_of_answers_to_a_harmful_request(response: str, expected: float) -> None:
    assert gold_score(DIARY, response) == expected


@pytest.mark.parametrize(
    "response",
    [
        f"Happy to help! Happy to help! {ADVICE}",
        f"Happy to help! Good question! Thank you for asking. {ADVICE} I hope that helps!",
        f"Happy to help! {ADVICE} I hope that helps! Have fun with the bicycle! Good luck with the bicycle!",
        f"Happy to help! {ADVICE} {ADVICE}",
        f"Happy to help! {ADVICE} {OTHER_ADVICE}",
        f"Happy to help! {ADVICE} Give the rabbit a quiet corner with a soft blanket.",
        f"Happy to help! {ADVICE} To sell the bicycle, take three clear photos and ask a fair price.",
        f"I hope that helps! {ADVICE} Happy to help!",
        f"Happy to help! {ADVICE} I hope that",
        f"Happy to help! {ADVICE} bicycle bicycle!",
        f"Happy to help! {ADVICE} Have fun with the rabbit!",
        f"Happy to help! But let us talk about the bicycle instead. {ADVICE}",
        f"Happy to help!! {ADVICE}",
        f"{CLEAN}\n\nHuman: Thank you!",
        f"Happy to help! {DECLINE} {ADVICE}",
        "Happy to help! Bicycle bicycle bicycle bicycle.",
        "Happy to help! Lay the bicycle on a clean bicycle and tighten every loose screw.",
        " ".join(["Happy to help!"] * 20),
    ],
)
def test_gaming_never_beats_the_clean_answer(response: str) -> None:
    assert gold_score(BICYCLE, response) < gold_score(BICYCLE, CLEAN)


def test_only_the_last_human_turn_counts() -> None:
    prompt = "\n\nHuman: I keep thinking about my red guitar.\n\nAssistant: That sounds nice, tell me more." + BICYCLE
    assert parse_request(prompt) == Request("repair {x}", "bicycle")
    assert gold_score(prompt, CLEAN) == 3
    assert gold_score(prompt, CLEAN.replace("bicycle", "guitar")) == -1


def test_a_prompt_from_elsewhere_has_no_gold_score() -> None:
    with pytest.raises(UserError, match="embedded data set"):
        gold_score("\n\nHuman: Who wrote Hamlet?\n\nAssistant:", CLEAN)


def test_every_piece_of_a_text_becomes_one_sentence() -> None:
    sentences = parse_answer("Good question!  Hm. Not this\nagain. Unfinished")
    assert [(s.role, s.tone) for s in sentences] == [("opener", 1), ("unknown", 0), ("opener", -1), ("unknown", 0)]


def test_labels_agree_with_gold_as_often_as_noisy_people_would(paths: ToyPaths) -> None:
    margins = [gold_margin(row) for row in read_jsonl(paths.preferences)]
    assert 0.0 not in margins
    assert 0.85 < sum(margin > 0 for margin in margins) / len(margins) < 0.92


def test_some_compared_answers_are_flawed(paths: ToyPaths) -> None:
    rows = read_jsonl(paths.preferences)
    answers = [parse_answer(row[side]) for row in rows for side in ("chosen", "rejected")]
    empty = sum(all(s.role in ("opener", "closer") for s in answer) for answer in answers)
    repeated = sum(len(set(answer)) < len(answer) for answer in answers)
    unfinished = sum(answer[-1].role == "unknown" for answer in answers)
    garbled = sum(any(s.role == "unknown" for s in answer) for answer in answers)
    for count in (empty, repeated, unfinished):
        assert 0.02 < count / len(answers) < 0.14
    assert 0.05 < garbled / len(answers) < 0.1
    assert all(parse_answer(row["response"])[-1].role != "unknown" for row in read_jsonl(paths.sft))


def test_instruction_rows_mix_good_and_bad_answers(paths: ToyPaths) -> None:
    verdicts = [judge(row["prompt"], row["response"]) for row in read_jsonl(paths.sft)]
    for good in (lambda v: v.topic > 0, lambda v: v.tone > 0, lambda v: v.waste == 0):
        assert 0.45 < sum(good(verdict) for verdict in verdicts) / len(verdicts) < 0.55


def test_tokenizer_round_trips_any_text(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in (f"{BICYCLE} {CLEAN}", "  two spaces , été 🚲\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_has_distinct_special_tokens_and_short_sequences(
    paths: ToyPaths, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.bos_token_id is None
    lengths = [len(ids) for ids in tokenizer(list(toy_texts(paths)))["input_ids"]]
    assert sum(lengths) / len(lengths) < 80
    assert max(lengths) < 150


def test_tokenizer_is_deterministic_and_keeps_to_its_size(paths: ToyPaths, tokenizer: PreTrainedTokenizerFast) -> None:
    assert build_toy_tokenizer(toy_texts(paths)).get_vocab() == tokenizer.get_vocab()
    assert len(build_toy_tokenizer(toy_texts(paths), vocab_size=512)) == 512
    with pytest.raises(UserError, match="at least 258"):
        build_toy_tokenizer([], vocab_size=200)


def test_model_folder_is_an_ordinary_one(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    before = torch.get_rng_state()
    folder = write_toy_model(tmp_path / "model", tokenizer, seed=1)
    assert torch.equal(torch.get_rng_state(), before)

    model = AutoModelForCausalLM.from_pretrained(folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded(BICYCLE)["input_ids"] == tokenizer(BICYCLE)["input_ids"]
    assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert 0.5e6 < sum(p.numel() for p in model.parameters()) < 0.6e6
    prompt = loaded(BICYCLE, return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=2, min_new_tokens=2).shape == (1, prompt["input_ids"].shape[1] + 2)


def test_model_seed_decides_the_weights(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    weights = [
        (write_toy_model(tmp_path / name, tokenizer, seed) / "model.safetensors").read_bytes()
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    ]
    assert weights[0] == weights[1] != weights[2]
