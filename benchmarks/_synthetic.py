"""A random model of Llama's shape and random rows for it: all that gpu.py is fed, without a download."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Work(NamedTuple):
    """The arithmetic that the maths of a step asks for, in floating-point operations.

    Attributes:
        dense: products with weights.
        attention: of the half of the square of scores and values that a causal mask leaves.
    """

    dense: float
    attention: float

    @property
    def flops(self) -> float:
        """What must be computed."""
        return self.dense + self.attention

    @property
    def unhalved(self) -> float:
        """The same as it is often published: attention counted as if there were no mask."""
        return self.dense + 2 * self.attention


class Shape(NamedTuple):
    """The model and what it is fed."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    rows: int
    max_length: int
    micro_tokens: int
    prompts: int
    prompt_length: int
    new_tokens: int

    @property
    def block_weights(self) -> int:
        """Weights in the matrices of all blocks."""
        keys = self.hidden * self.kv_heads // self.heads
        return self.layers * (2 * self.hidden**2 + 2 * self.hidden * keys + 3 * self.hidden * self.intermediate)

    @property
    def cache_elements(self) -> int:
        """Keys and values of one token, in all layers."""
        return 2 * self.layers * self.hidden * self.kv_heads // self.heads

    def training_work(self, lengths: list[int], targets: int) -> Work:
        """What a forward and backward pass asks for."""
        dense = 6 * self.block_weights * sum(lengths) + 6 * self.hidden * self.vocabulary * targets
        return Work(dense, 6 * self.layers * self.hidden * sum(length**2 for length in lengths))


FULL = Shape(28, 1024, 16, 8, 4096, 32768, 64, 512, 16384, 64, 256, 128)
TINY = Shape(2, 64, 4, 2, 128, 512, 8, 64, 256, 4, 16, 8)
SHAPES = {
    "0.5B": FULL,
    "0.5B-152k": FULL._replace(vocabulary=151_936),
    "1B": FULL._replace(layers=16, hidden=2048, heads=32, intermediate=8192),
}
"""By the size of the blocks and of the vocabulary; 32,768 words where nothing is said."""

TINY_SHAPES = {
    "0.5B": TINY,
    "0.5B-152k": TINY._replace(vocabulary=2048),
    "1B": TINY._replace(hidden=128, intermediate=256),
}
"""What stands for them in a try."""


def llama_config(shape: Shape) -> Any:
    """The model's config, for transformers."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=max(2048, shape.max_length),
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )


def new_model(shape: Shape, device: str = "cpu") -> Any:
    """A language model with random weights, in float32."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(llama_config(shape))


def new_tokenizer(vocabulary: int) -> Any:
    """A tokenizer of numbered words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, vocabulary)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def write_model(shape: Shape, folder: Path, device: str = "cpu", with_reward: bool = True) -> tuple[str, str]:
    """A language model and a reward model with random weights, and their tokenizer.

    Args:
        shape: of both.
        folder: they are written to `policy` and `reward` in it.
        device: where the weights are drawn.
        with_reward: write the reward model, too.

    Returns:
        Their folders.
    """
    from rlhf_lightning.models.scalar_lm import new_scalar_lm

    tokenizer = new_tokenizer(shape.vocabulary)
    policy, reward = folder / "policy", folder / "reward"
    new_model(shape, device).to(torch.bfloat16).save_pretrained(policy)
    tokenizer.save_pretrained(policy)
    if with_reward:
        new_scalar_lm(str(policy)).model.to(torch.bfloat16).save_pretrained(reward)
        tokenizer.save_pretrained(reward)
    return str(policy), str(reward)


def random_lengths(rng: random.Random, count: int, longest: int) -> list[int]:
    """Log-normal, as dialogues are: about a third of the longest in the middle."""
    return [max(4, min(longest, int(rng.lognormvariate(0, 0.6) * longest / 3))) for _ in range(count)]


def padded(rng: random.Random, lengths: list[int], vocabulary: int, left: bool = False) -> Any:
    """Random ids of these lengths and their mask, `[B, T]`."""
    width = max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        place = slice(width - length, width) if left else slice(0, length)
        ids[row, place] = torch.tensor(rng.choices(range(2, vocabulary), k=length))
        mask[row, place] = True
    return ids, mask


def instruction_batches(shape: Shape, steps: int) -> tuple[list[Any], list[Work]]:
    """Batches in which the second half of every row is taught, and the arithmetic of each."""
    from rlhf_lightning.batches import InstructionBatch

    rng, batches, work = random.Random(0), [], []
    for _ in range(steps):
        lengths = random_lengths(rng, shape.rows, shape.max_length)
        ids, mask = padded(rng, lengths, shape.vocabulary)
        taught = mask & (mask.cumsum(1) > torch.tensor(lengths).unsqueeze(1) // 2)
        batches.append(InstructionBatch(ids, mask, taught, torch.arange(shape.rows)))
        work.append(shape.training_work(lengths, int(taught.sum())))
    return batches, work


def packed(batch: Any, length: int) -> Any:
    """The same examples, packed in rows: each goes into the first row that has room for it.

    Args:
        batch: an `InstructionBatch` of one example a row.
        length: of the rows, `T`; no example is longer.

    Returns:
        An `InstructionBatch` with `position_ids`, as many rows as are needed.
    """
    rows: list[list[int]] = []
    lengths = batch.attention_mask.sum(dim=1).tolist()
    for example, size in enumerate(lengths):
        room = next((row for row in rows if sum(lengths[i] for i in row) + size <= length), None)
        if room is None:
            rows.append(room := [])
        room.append(example)
    shape = len(rows), length
    ids, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    real, taught = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    row_ids = torch.full((len(rows), max(map(len, rows))), -1)
    for row, examples in enumerate(rows):
        start = 0
        for place, example in enumerate(examples):
            here, size = slice(start, start := start + lengths[example]), lengths[example]
            ids[row, here], taught[row, here] = batch.input_ids[example, :size], batch.loss_mask[example, :size]
            real[row, here], positions[row, here] = True, torch.arange(size)
            row_ids[row, place] = batch.row_ids[example]
    return type(batch)(ids, real, taught, row_ids, positions)


def preference_batches(shape: Shape, steps: int) -> tuple[list[Any], list[Work]]:
    """Pairs that share the first two thirds, and the arithmetic of each batch, the shared part counted once."""
    from rlhf_lightning.batches import PreferenceBatch

    rng, batches, work = random.Random(0), [], []
    rows = max(2, shape.rows // 2)
    for _ in range(steps):
        lengths = random_lengths(rng, rows, shape.max_length)
        chosen, mask = padded(rng, lengths, shape.vocabulary)
        rejected, _ = padded(rng, lengths, shape.vocabulary)
        shared = [2 * length // 3 for length in lengths]
        rejected = torch.where(torch.arange(chosen.shape[1]) < torch.tensor(shared).unsqueeze(1), chosen, rejected)
        batches.append(PreferenceBatch(chosen, mask, rejected, mask.clone(), torch.arange(rows)))
        apart = [length - same for length, same in zip(lengths, shared, strict=True)]
        # The second response attends to the shared part too: twice the area of one sequence, less the shared square.
        area = sum(2 * length**2 - same**2 for length, same in zip(lengths, shared, strict=True))
        dense = 6 * shape.block_weights * (sum(lengths) + sum(apart))
        work.append(Work(dense, 6 * shape.layers * shape.hidden * area))
    return batches, work


def prompt_batches(shape: Shape, steps: int) -> list[Any]:
    """Prompts padded on the left."""
    from rlhf_lightning.batches import PromptBatch

    rng, batches = random.Random(0), []
    for _ in range(steps):
        lengths = random_lengths(rng, shape.prompts, shape.prompt_length)
        ids, mask = padded(rng, lengths, shape.vocabulary, left=True)
        batches.append(PromptBatch(ids, mask, [""] * shape.prompts, torch.arange(shape.prompts)))
    return batches
