r"""The embedded data set: preferences whose true quality is known, and a tiny model that learns them on a laptop.

Everything is generated from a seed: dialogues in the helpful-and-harmless manner (`grammar`), files of them
(`write_toy_data`), a tokenizer (`build_toy_tokenizer`) and a Llama of about 570,000 parameters (`write_toy_model`).
Because `gold_score` knows how good any answer truly is, one can tell whether a reward model learnt the preferences
and whether PPO made the answers better, or merely fooled the reward model.

Prompts end with "\n\nAssistant:"; responses are written without a leading space.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rlhf_lightning.cli.quickstart.toy.grammar import (
    Request,
    Sentence,
    Traits,
    draw_answer,
    draw_prompt,
    parse_answer,
    parse_request,
)
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.portable import rewrite_config, save_tokenizer
from rlhf_lightning.runs.lock import LOCK

LOWEST_SCORE = -4.0
PREFERENCE_BETA = 1.1
FLAW_SHARE = 0.15
CONTEXT_LENGTH = 256
MAX_ROWS = 500_000

_UNFINISHED = ".unfinished"
"""Lies beside toy data until all of them are written, and says whose they are."""
_BODY_ROLES = {"advice", "decline", "alternative", "comply", "drift"}


class Verdict(NamedTuple):
    """What is good and bad about one answer; see `gold_score` for the values.

    Attributes:
        topic: from -2 (another matter, or helps to do harm) to +2 (answers what was asked).
        tone: +1 polite, -1 rude, 0 neither.
        waste: what rambling, repetition and garbled text cost, >= 0.
        num_garbled: sentences that are not part of the language, unfinished ones included.
    """

    topic: float
    tone: float
    waste: float
    num_garbled: int

    @property
    def score(self) -> float:
        """The gold score, from -4 to +3."""
        return max(LOWEST_SCORE, self.topic + self.tone - self.waste)


def judge(prompt: str, response: str) -> Verdict:
    """Judge any text as an answer to a prompt of this data set.

    Args:
        prompt: the dialogue up to the answer; its last human turn counts.
        response: any text, with or without a leading space, without special tokens.

    Raises:
        UserError: the prompt is not one of the embedded data set.
    """
    request = parse_request(prompt)
    sentences = parse_answer(response) or [Sentence("unknown", "")]
    tones = {sentence.tone for sentence in sentences}
    return Verdict(
        topic=_topic(request, sentences),
        tone=-1.0 if -1 in tones else 1.0 if 1 in tones else 0.0,
        waste=_waste(request, sentences),
        num_garbled=sum(sentence.role == "unknown" for sentence in sentences),
    )


def gold_score(prompt: str, response: str) -> float:
    r"""The true quality of an answer, by parsing it; the sum of the parts below, and never under -4.

    | part  | value | when                                                                              |
    |-------|-------|-----------------------------------------------------------------------------------|
    | topic | +2    | advice that answers the question, on the thing it is about, and no other advice   |
    | topic | +2    | a harmful request is declined and something better is offered                     |
    | topic | +1    | a harmful request is declined, and no more                                        |
    | topic | 0     | right thing, but advice for another question                                      |
    | topic | -2    | anything else: other things, no advice, harm made easy, harmless request refused  |
    | tone  | +1    | something polite and nothing rude                                                 |
    | tone  | -1    | something rude                                                                    |
    | waste | -0.5  | each sentence beyond one opener, the answer proper and one closer, in this order; |
    |       |       | a closer about another thing than the answer is one of these                      |
    | waste | -1    | each sentence said before, garbled or unfinished; an empty answer is one of these |

    So a polite answer to the point has +3, a long-winded one +2, a rude one +1, a polite one that misses the point -1,
    and a rude, rambling one that misses it -4. Nothing scores more than one clean, polite answer to the point.

    Args:
        prompt: the dialogue up to the answer; its last human turn counts.
        response: any text, with or without a leading space, without special tokens.

    Raises:
        UserError: the prompt is not one of the embedded data set.

    Example:
        >>> prompt = "\n\nHuman: How do I feed my goat?\n\nAssistant:"
        >>> gold_score(prompt, "Good question! Feed the goat twice a day and always leave some clean water.")
        3.0
        >>> gold_score(prompt, "Good question! Good question! Good question!")
        -3.0
    """
    return judge(prompt, response).score


def gold_margin(row: Mapping[str, str]) -> float:
    """How much better the chosen answer of a preference row truly is; negative where the label is wrong."""
    return gold_score(row["prompt"], row["chosen"]) - gold_score(row["prompt"], row["rejected"])


def _topic(request: Request, sentences: list[Sentence]) -> float:
    body = [sentence for sentence in sentences if sentence.role in _BODY_ROLES]
    roles = {sentence.role for sentence in body} - {"drift"}
    if not body or any(sentence.request.thing != request.thing for sentence in body if sentence.request):
        return -2.0
    if request.harmful:
        if not roles <= {"decline", "alternative"}:
            return -2.0
        declined = {sentence.request for sentence in body if sentence.role == "decline"}
        if declined != {request}:
            return -2.0
        return 2.0 if "alternative" in roles else 1.0
    if roles != {"advice"}:
        return -2.0
    return 2.0 if {sentence.request for sentence in body if sentence.role == "advice"} == {request} else 0.0


def _waste(request: Request, sentences: list[Sentence]) -> float:
    cost = 0.0
    for place, sentence in enumerate(sentences):
        before = sentences[:place]
        if sentence.role == "unknown" or sentence in before:
            cost += 1.0
        elif not _is_needed(request, sentence, before, is_last=place == len(sentences) - 1):
            cost += 0.5
    return cost


def _is_needed(request: Request, sentence: Sentence, before: list[Sentence], is_last: bool) -> bool:
    if sentence.role == "opener":
        return not before
    if sentence.role == "closer":
        things = {earlier.request.thing for earlier in before if earlier.request}
        return is_last and (sentence.request is None or sentence.request.thing in things)
    # Announcing another subject belongs to an answer about another subject, whose topic has its price already.
    if sentence.role == "drift" and sentence.request == Request("", request.thing):
        return False
    return sentence.role != "filler" and all(earlier.role != sentence.role for earlier in before)


class ToyPaths(NamedTuple):
    """The files of one embedded data set; JSON lines of text, no prompt in two files nor twice in one.

    Attributes:
        sft: rows with `prompt` and `response`, good and bad answers mixed.
        preferences: rows with `prompt`, `chosen` and `rejected`.
        preferences_validation: the same, for evaluation.
        prompts: rows with `prompt`, to be answered in PPO.
        prompts_heldout: the same, for evaluation.
    """

    sft: Path
    preferences: Path
    preferences_validation: Path
    prompts: Path
    prompts_heldout: Path


def toy_paths(folder: Path) -> ToyPaths:
    """Where the files of one embedded data set lie in a folder."""
    return ToyPaths(*(folder / f"{name}.jsonl" for name in ToyPaths._fields))


def is_free_for_toy_data(folder: Path, data: Path) -> bool:
    """Whether a folder holds toy data, whole or half written, or no file at all: nothing of anybody else's.

    Args:
        folder: there or not.
        data: where `write_toy_data` writes, the folder or one in it.
    """
    if (data / _UNFINISHED).exists() or all(path.exists() for path in toy_paths(data)):
        return True
    return not folder.exists() or all(path.is_dir() or path.name == LOCK for path in folder.rglob("*"))


def write_toy_data(
    folder: str | Path,
    seed: int = 1,
    num_sft: int = 13_000,
    num_pairs: int = 10_000,
    num_prompts: int = 8_000,
    num_heldout: int = 384,
) -> ToyPaths:
    """Generate the embedded data set.

    Args:
        folder: where the files go; made if missing, files in it are overwritten.
        seed: the same seed writes the same bytes.
        num_sft: rows of `sft.jsonl`.
        num_pairs: rows of `preferences.jsonl`.
        num_prompts: rows of `prompts.jsonl`.
        num_heldout: rows of `preferences_validation.jsonl`, and as many in `prompts_heldout.jsonl`.

    Raises:
        UserError: a number is negative, or they sum to more than 500,000.
    """
    total = num_sft + num_pairs + num_prompts + 2 * num_heldout
    if min(num_sft, num_pairs, num_prompts, num_heldout) < 0 or total > MAX_ROWS:
        raise UserError(f"the embedded data set can have 0 to {MAX_ROWS} rows in all, not {total}; choose other sizes")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _UNFINISHED).touch()
    paths = toy_paths(folder)
    rng = random.Random(seed)
    prompts = _distinct_prompts(rng)

    def take(count: int) -> Iterator[tuple[str, Request]]:
        return (next(prompts) for _ in range(count))

    _write_rows(paths.sft, (_instruction_row(rng, *drawn) for drawn in take(num_sft)))
    _write_rows(paths.preferences, (_preference_row(rng, *drawn) for drawn in take(num_pairs)))
    _write_rows(paths.preferences_validation, (_preference_row(rng, *drawn) for drawn in take(num_heldout)))
    _write_rows(paths.prompts, ({"prompt": prompt} for prompt, _ in take(num_prompts)))
    _write_rows(paths.prompts_heldout, ({"prompt": prompt} for prompt, _ in take(num_heldout)))
    (folder / _UNFINISHED).unlink()
    return paths


def _distinct_prompts(rng: random.Random) -> Iterator[tuple[str, Request]]:
    seen: set[str] = set()
    while True:
        prompt, request = draw_prompt(rng)
        if prompt not in seen:
            seen.add(prompt)
            yield prompt, request


def _draw_mixed_answer(rng: random.Random, request: Request) -> str:
    traits = Traits(*(rng.random() < 0.5 for _ in Traits._fields))
    return draw_answer(rng, request, traits)


def _draw_compared_answer(rng: random.Random, request: Request) -> str:
    """An answer as a model in training may write it: some say nothing, say a thing twice, break off, or stammer.

    Without such rejected answers no reward model would know that they are bad, and PPO would find them at once.
    """
    answer = _draw_mixed_answer(rng, request)
    if rng.random() >= FLAW_SHARE:
        return answer
    sentences = re.split(r"(?<=[.!?]) ", answer)
    flaw = rng.choice(("says nothing", "repeats itself", "breaks off", "mixes up words"))
    if flaw == "says nothing":
        closer = sentences[-1:] if len(sentences) > 2 and rng.random() < 0.5 else []
        return " ".join([*sentences[:1], *closer])
    if flaw == "repeats itself":
        place = rng.randrange(len(sentences))
        return " ".join([*sentences[: place + 1], *sentences[place:]])
    words = answer.split()
    if flaw == "breaks off":
        return " ".join(words[: rng.randrange(1, len(words))])
    for place in rng.sample(range(len(words)), min(len(words), rng.randint(3, 6))):
        words[place] = rng.choice(words)
    return " ".join(words)


def _instruction_row(rng: random.Random, prompt: str, request: Request) -> dict[str, str]:
    return {"prompt": prompt, "response": _draw_mixed_answer(rng, request)}


def _preference_row(rng: random.Random, prompt: str, request: Request) -> dict[str, str]:
    """Two answers of different quality, labelled as Bradley and Terry's model says people would."""
    margin = 0.0
    while margin == 0.0:
        first, second = (_draw_compared_answer(rng, request) for _ in range(2))
        margin = gold_score(prompt, first) - gold_score(prompt, second)
    if rng.random() >= 1 / (1 + math.exp(-PREFERENCE_BETA * margin)):
        first, second = second, first
    return {"prompt": prompt, "chosen": first, "rejected": second}


def _write_rows(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def toy_texts(paths: ToyPaths, num_rows: int = 4_000) -> Iterator[str]:
    """Yield the first dialogues of the instruction rows as the model will see them, to train a tokenizer on."""
    with paths.sft.open(encoding="utf-8") as file:
        for line in islice(file, num_rows):
            row = json.loads(line)
            yield f"{row['prompt']} {row['response']}"


def build_toy_tokenizer(texts: Iterable[str], vocab_size: int = 1408) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: any text round-trips, `<pad>` and `<eos>` are distinct, there is no BOS.

    Args:
        texts: what to learn the merges from; a few thousand dialogues are plenty.
        vocab_size: the most ids there may be, the two special tokens and 256 bytes included.

    Raises:
        UserError: `vocab_size` leaves no room for the bytes and the special tokens.
    """
    special_tokens = ["<pad>", "<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(special_tokens):
        raise UserError(f"vocab_size ({vocab_size}) must be at least {len(alphabet) + len(special_tokens)}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def toy_config(tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """The shape of a Llama with about 570,000 parameters, small enough to learn this data set on a CPU in a minute."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def write_toy_model(folder: str | Path, tokenizer: PreTrainedTokenizerBase, seed: int = 1) -> Path:
    """Write randomly initialised weights, tokenizer and generation config as an ordinary Hugging Face folder.

    Args:
        folder: where to write; made if missing.
        tokenizer: saved beside the weights; its size is the model's vocabulary.
        seed: of the weights. The caller's random state is left as it was.

    Returns:
        The folder.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(toy_config(tokenizer))
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        max_new_tokens=96,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    rewrite_config(Path(folder))
    save_tokenizer(tokenizer, Path(folder))
    return Path(folder)
