"""A decoding step that is compiled once and run again for every token of every rollout.

A step reads one token of each row, so most of its time goes into launching small kernels. Compiled, they are fewer; on
CUDA they are also replayed as a graph, with nothing left to Python. Both ask for shapes and buffers that do not change:
batches are filled up to the size of the largest so far, attention covers the whole cache, ended rows stay.

Notation: N rows of the step, n of them in use, C columns of the cache, P width of the longest prompt, D hidden size.
"""

from __future__ import annotations

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lightning.compat import SDPA, attention_kernel, compiler_settings, is_compiler_error, mark_static
from rlhf_lightning.forward.backbone import cache_argument, takes_positions, unusual_layers
from rlhf_lightning.forward.generated_code import keep_generated_code
from rlhf_lightning.forward.numerics import relative_distance, tolerance
from rlhf_lightning.forward.output_layer import output_logits
from rlhf_lightning.generation.cache import RolloutCache, rollout_cache
from rlhf_lightning.generation.picking import CompiledPick, Picked, Rules, pick
from rlhf_lightning.training.sharded import is_sharded

COLUMNS = 64
"""The cache's length is a multiple of it."""

GROWTH = 1.5
"""A cache that is too short grows by this at least, for each length is compiled anew."""

PAYS_AFTER = {"cuda": 5_000}
"""By device, decoded tokens of a row after which compiling is paid for several times over.

On a GPU a step that is replayed takes an eighth of the time; compiling it takes one to two minutes."""

MOST_SIZES = 64
"""Of caches that are compiled for, in a process."""

FEW = 8
"""Tokens of which one may differ between two ways of rounding."""

MOST_CHARACTERS = 300
"""Of a compiler's complaint."""


class CompiledStep:
    """Reads one token of each row. A model for which this is not possible is continued as without it, with a warning.

    The first tokens are read both ways, and compared. Between rollouts the cache stays allocated.

    Args:
        model: a language model.
        num_rows: prompts that are usually answered at once.
    """

    def __init__(self, model: PreTrainedModel, num_rows: int = 1) -> None:
        self.model = model
        self.cache: RolloutCache | None = None
        self.num_rows, self.capacity = num_rows, 0
        self.checks_left = 0
        self.drawn_plainly = ""  # why, where only the step is compiled
        self._picking: CompiledPick | None = None
        self.cache_argument = cache_argument(model)
        self.reason = _obstacle(model)
        if self.reason:
            self._warn()

    @property
    def sizes(self) -> tuple[int, int]:
        """Rows and columns of the largest batch so far, on which rounding depends."""
        return self.num_rows, self.capacity

    @property
    def complaint(self) -> str:
        """Why it was given up on the way, on which rounding depends, too; empty if it was not."""
        return self.reason if self.capacity else ""

    @property
    def said(self) -> tuple[tuple[int, int], str, str]:
        """What `go_on_with` takes."""
        return self.sizes, self.complaint, self.drawn_plainly

    def go_on_with(self, sizes: tuple[int, int], complaint: str = "", drawn_plainly: str = "") -> None:
        """Take over from the run that a checkpoint is of, so that rounding stays the same.

        Args:
            sizes: its `sizes`; no batch has been read yet.
            complaint: its `complaint`.
            drawn_plainly: why it drew tokens without compiled code, if it did.
        """
        self.num_rows, self.capacity = sizes
        if drawn_plainly:
            self._draw_plainly(drawn_plainly)
        if complaint and not self.reason:
            self._give_up(complaint)

    @property
    def is_replayed(self) -> bool:
        """Whether it is a CUDA graph."""
        return self.model.device.type == "cuda" and not self.reason

    @property
    def trusted(self) -> bool:
        """Whether it has been compared, and said the same."""
        return self.cache is not None and not self.checks_left

    def open(self, rows: int, width: int, capacity: int) -> RolloutCache | None:
        """An empty cache for a batch.

        Args:
            rows: n.
            width: of the longest prompt.
            capacity: columns needed in all.

        Returns:
            The cache, the same as for the batch before where that is large enough; None where the model cannot be
            compiled.
        """
        if self.reason:
            return None
        fits = self.cache is not None and rows <= self.num_rows and capacity <= self.capacity
        if not fits or self.ids.device != self.model.device:
            self._allocate(max(rows, self.num_rows), capacity)
        if self.cache is not None:
            self.cache.restart(rows, width)
        return self.cache

    def begin(self, mask: Tensor) -> None:
        """The prompts are read; steps follow.

        Args:
            mask: True for columns with a prompt's token, `[n, P]`, bool.
        """
        assert self.cache is not None
        if self.is_replayed:
            for layer in self.cache.buffers:  # else the graph would be given up, for it writes what it is passed
                mark_static(layer.keys)
                mark_static(layer.values)
        self.mask.zero_()
        self.mask[: len(mask), 0, 0, : mask.shape[1]] = mask  # [n, P]

    def read(self, ids: Tensor, positions: Tensor, expected: Tensor | None = None) -> Tensor | None:
        """Read the next token of each row, into the cache's next column.

        Args:
            ids: the tokens, `[n]`, int64.
            positions: their places in their sequences, `[n]`, int64.
            expected: hidden states of the model as it is, `[n, D]`; needed until the compiled step is trusted.

        Returns:
            Hidden states, `[n, D]`; None where compiling failed, or they are not those expected.
        """
        assert self.cache is not None
        column = self.cache.place.past
        self.ids[: len(ids), 0], self.positions[: len(ids), 0] = ids, positions  # [n], [n]
        self.mask[:, :, :, column] = True
        self.column.fill_(column)
        try:
            hidden = self._read()[: len(ids)].clone()  # [n, D]; a replayed graph writes the same memory again
        except Exception as error:
            if not is_compiler_error(error):
                raise
            self._give_up(_shortened(error))
            return None
        if self.checks_left:
            assert expected is not None
            distance = relative_distance(hidden, expected)
            if not distance <= tolerance(self.model):  # nor NaN
                self._give_up(f"it changes the hidden states by {distance:.1%} of their norm")
                return None
            self.checks_left -= 1
        return hidden

    def pick(
        self, hidden: Tensor, uniform: Tensor, finished: Tensor, ends: Tensor, may_end: bool, rules: Rules
    ) -> Picked | None:
        """The next token of each row, from hidden states that were read; see `CompiledPick`.

        Args:
            hidden: `[n, D]`.
            uniform: `[n]`.
            finished: `[n]`, bool.
            ends: `[E]`, int64.
            may_end: a response may end with this token.
            rules: what holds for all tokens.

        Returns:
            None where compiling failed, or other tokens were drawn than without: it is done without, then.
        """
        if self._picking is None:
            return None
        try:
            picked = self._picking(hidden, uniform, finished, ends, may_end, rules)
        except Exception as error:
            if not is_compiler_error(error):
                raise
            self._draw_plainly(_shortened(error))
            return None
        if self._picks_left:
            self._picks_left -= 1
            expected = pick(output_logits(self.model, hidden), uniform, finished, ends, may_end, rules)
            different = int((picked.ids != expected.ids).sum())
            if different > 1 + len(hidden) // FEW:  # rounding may decide about a token
                self._draw_plainly(f"it draws {different} of {len(hidden)} otherwise")
                return None
        return picked

    def _draw_plainly(self, reason: str) -> None:
        self.drawn_plainly, self._picking = reason, None
        rank_zero_warn(f"compile_decoding: tokens are drawn from the logits as without it: {reason}")

    def _read(self) -> Tensor:
        assert self.cache is not None
        if self.is_replayed:
            torch.compiler.cudagraph_mark_step_begin()
        with compiler_settings(MOST_SIZES), self.cache.written_at(self.column):
            hidden: Tensor = self._compiled(self.ids, self.mask, self.positions)
        return hidden

    def _give_up(self, reason: str) -> None:
        self.reason, self.cache = reason, None
        self._warn()

    def _warn(self) -> None:
        rank_zero_warn(f"compile_decoding: the decoding step cannot be compiled, and goes on as it is: {self.reason}")

    def _allocate(self, rows: int, capacity: int) -> None:
        grown = int(self.capacity * GROWTH) if capacity > self.capacity else self.capacity
        capacity = -(-max(capacity, grown) // COLUMNS) * COLUMNS
        device = self.model.device
        self.num_rows, self.capacity = rows, capacity
        self.cache = rollout_cache(self.model.config, rows, 0, capacity)
        if self.cache is None or any(window is not None and window < capacity for window in self.cache.windows):
            self._give_up("some of its layers keep more than keys and values, or see a window only")
            return
        rank_zero_info(f"compiling the decoding step of {rows} rows with up to {capacity} tokens, once")
        # A graph is run as it is at first, recorded the second time, and replayed from the third.
        self.checks_left = 3 if self.is_replayed else 1
        keep_generated_code()
        mode = "reduce-overhead" if self.is_replayed else "default"
        self._compiled = torch.compile(self._run, fullgraph=True, dynamic=False, mode=mode)
        self._picking = None if self.drawn_plainly else CompiledPick(self.model, rows, self.is_replayed)
        self._picks_left = self.checks_left
        self.ids = torch.zeros(rows, 1, dtype=torch.long, device=device)  # [N, 1]
        self.positions = torch.zeros_like(self.ids)  # [N, 1]
        self.mask = torch.zeros(rows, 1, 1, capacity, dtype=torch.bool, device=device)  # [N, 1, 1, C]
        self.column = torch.zeros(1, dtype=torch.long, device=device)

    def _run(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        cache = {self.cache_argument: self.cache}
        output = self.model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **cache
        )
        hidden: Tensor = output.last_hidden_state[:, -1]  # [N, D]
        return hidden


def compiling_pays(model: PreTrainedModel, steps: float) -> bool:
    """Whether a run decodes so much that compiling is worth it, and can be done as far as can be looked up.

    Args:
        model: on its device.
        steps: of decoding in the whole run, on this process.
    """
    after = PAYS_AFTER.get(model.device.type)
    return after is not None and steps >= after and not _obstacle(model)


def _shortened(error: Exception) -> str:
    return " ".join(str(error).split())[:MOST_CHARACTERS]


def _obstacle(model: PreTrainedModel) -> str:
    """Why a model's step cannot be compiled, as far as it can be looked up."""
    if is_sharded(model):
        return "its weights are sharded over processes"
    if not takes_positions(model) or unusual_layers(model):
        return f"{type(model).__name__} is not of the usual kind, or takes no positions"
    if (kernel := attention_kernel(model)) != SDPA:
        return f"its attention is {kernel}, not {SDPA}"
    return ""
