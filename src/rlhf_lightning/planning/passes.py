"""What goes through a stage's models in one step, with weights that are not there.

Forward and backward passes, decoding and measuring are made as the algorithms make them. Every sequence is as long as
its limit, and every token that may count does: the worst that the settings allow.

Notation: B rows that go through a model at once, P prompt length, R response length, T = P + R or the limit of a row, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_lightning.algorithms.online.answering import AnsweringStage
from rlhf_lightning.algorithms.online.models import TrunkValue
from rlhf_lightning.algorithms.pairs import PairStage
from rlhf_lightning.algorithms.reference import ReferenceStage
from rlhf_lightning.algorithms.regression import ScoreRegressionModule
from rlhf_lightning.algorithms.reward import RewardModule
from rlhf_lightning.algorithms.stage import Stage
from rlhf_lightning.compat import attention_function, fake_tensors, sdpa_attention_forward
from rlhf_lightning.errors import UserError
from rlhf_lightning.forward.backbone import HEAD, cache_argument
from rlhf_lightning.forward.casts import PRODUCT_WEIGHT, cast_once
from rlhf_lightning.forward.output_layer import logit_scaling, output_logits
from rlhf_lightning.functional import LogitScaling, linear_cross_entropy_sum, linear_token_logprobs, rows_per_chunk
from rlhf_lightning.generation.cache import rollout_cache
from rlhf_lightning.generation.decoding import PREFILL_TOKENS, PREFILL_TOKENS_ELSEWHERE
from rlhf_lightning.generation.sampling import draw_tokens
from rlhf_lightning.models.classifiers import Classifier
from rlhf_lightning.models.heads import linear_in_float32
from rlhf_lightning.models.merging import merged_adapters
from rlhf_lightning.models.scalar_lm import ScalarLM
from rlhf_lightning.models.scorers import FunctionScorer
from rlhf_lightning.planning.live import LiveBytes, Moment, bytes_of, tensors_of
from rlhf_lightning.planning.skeletons import fill
from rlhf_lightning.training.sharded import blocks_of

PLANNED = "rlhf_lightning_planned"
"""What transformers' configs call the attention while a stage is planned."""


@dataclass(frozen=True)
class Load:
    """What goes through the models at once, on one process.

    Attributes:
        rows: of a micro-batch: examples, pairs or responses, B.
        length: tokens of each row, T.
        response: tokens of a response among them, R; 0 where all of a row is learnt from.
        answered: prompts that are answered at once.
        is_cast: products are computed in bfloat16, their weights being wider.
        one_by_one: the graph of one loss is gone before the next is built.
        on_gpu: batches are padded, so that attention is given a mask; on a CPU they are not.
        gpu_memory: bytes of a GPU, by which chunks of logits are cut; 0 on a CPU.
        takes_sampler_logprobs: the policy is not run over its answers before the update.
        text_rows: rows of text that the policy goes on learning, which go through it at once; 0 for none.
        text_length: tokens of each of them.
        texts: micro-batches of them beside each of the responses.
    """

    rows: int
    length: int
    response: int = 0
    answered: int = 0
    is_cast: bool = False
    one_by_one: bool = True
    on_gpu: bool = True
    gpu_memory: int = 0
    takes_sampler_logprobs: bool = False
    text_rows: int = 0
    text_length: int = 0
    texts: int = 0


@dataclass(frozen=True)
class Passed:
    """What one part of a step was seen to need.

    Attributes:
        name: of the part.
        models: names of those that run in it.
        first: moments of a first micro-batch, or of the part, of which one is the worst.
        later: the same where the gradient of an earlier micro-batch is there already.
        kept: keys and values, bytes.
        merged: weights with their adapters added, bytes.
    """

    name: str
    models: tuple[str, ...]
    first: tuple[Moment, ...]
    later: tuple[Moment, ...] = ()
    kept: float = 0
    merged: float = 0


def models_of(stage: Stage) -> dict[str, nn.Module]:
    """A stage's models by their roles, those first that are trained.

    Args:
        stage: with its models.
    """
    if isinstance(stage, AnsweringStage):
        found: dict[str, Any] = {"policy": stage.policy, "value": stage.value, "reference": stage.reference_model}
        found["reward"] = None if isinstance(stage.scorer, FunctionScorer) else stage.scorer.model
        found |= {f"reward {name}": scorer.model for name, scorer in stage.other_scorers.models.items()}
    elif isinstance(stage, ReferenceStage):
        found = {"policy": stage.policy, "reference": stage.reference_model.model}
    else:
        found = {"reward" if isinstance(stage, RewardModule) else "model": stage.export_model}
        found |= {"output layer": stage.language_head} if isinstance(stage, RewardModule) else {}
    found = {role: model.model if isinstance(model, ScalarLM | Classifier) else model for role, model in found.items()}
    return {role: model for role, model in found.items() if model is not None}


def passed_through(stage: Stage, load: Load) -> list[Passed]:
    """What each part of a step needs.

    Args:
        stage: its models on the meta device; they are changed.
        load: what goes through them.

    Raises:
        UserError: a stage of somebody's own that is none of the kinds that are known here.
    """
    parts: list[Passed] = []
    merged = _merged_bytes(stage) if load.answered else 0
    with fake_tensors() as mode:
        fill(stage, mode)
        with _settings(stage, load):
            if isinstance(stage, AnsweringStage):
                parts += [_answering(stage, load, merged), *_measuring(stage, load)]
            parts += _updating(stage, load)
    return parts


@contextmanager
def _settings(stage: Stage, load: Load) -> Iterator[None]:
    with ExitStack() as entered:
        for model in models_of(stage).values():
            if isinstance(model, PreTrainedModel):
                # transformers would make a mask of positions that cannot be looked at.
                entered.enter_context(attention_function(model, PLANNED, sdpa_attention_forward, _no_mask))
        entered.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=load.is_cast, cache_enabled=False))
        yield


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def _counting(stage: Stage) -> LiveBytes:
    config: Any = stage.export_model.config
    live = LiveBytes(config.get_text_config().vocab_size)
    live.leave_out(tensors_of(stage))
    return live


def _hidden(model: Any, rows: int, load: Load) -> Tensor:
    """Last hidden states, `[rows, T, D]`."""
    ids = torch.zeros(rows, load.length, dtype=torch.long)
    mask = torch.ones(rows, 1, load.length, load.length, dtype=torch.bool) if load.on_gpu else None
    hidden: Tensor = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return hidden


def _chosen(hidden: Tensor) -> Tensor:
    """All rows of hidden states `[B, T, D]`, chosen as a mask chooses them: `[B * T, D]`."""
    places = torch.arange(hidden.shape[0] * hidden.shape[1])
    return hidden[places // hidden.shape[1], places % hidden.shape[1]]


def _head_options(head: Any, load: Load) -> dict[str, Any]:
    rows = rows_per_chunk(head.out_features, load.gpu_memory)
    return {"chunk_rows": rows, "cast": getattr(head, PRODUCT_WEIGHT, None)}


def _logprobs(model: Any, hidden: Tensor, load: Load, with_entropy: bool = False) -> Tensor:
    """Log-probabilities of what hidden states `[B, T, D]` predict, summed."""
    return _logprobs_by(model.get_output_embeddings(), logit_scaling(model), hidden, load, with_entropy)


def _logprobs_by(head: Any, scaling: LogitScaling, hidden: Tensor, load: Load, with_entropy: bool = False) -> Tensor:
    rows = _chosen(hidden)
    ids = torch.zeros(len(rows), dtype=torch.long)
    options = {"with_entropy": with_entropy, **_head_options(head, load)}
    said, _ = linear_token_logprobs(rows, head.weight, head.bias, ids, scaling, **options)
    return said.sum()


def _response(hidden: Tensor, load: Load) -> Tensor:
    return hidden[:, -load.response - 1 : -1]


def _losses(stage: Stage, load: Load) -> Iterator[tuple[str, tuple[str, ...], Tensor]]:
    """Each loss of a micro-batch, with the name of its part and the roles of the models that it is of."""
    if isinstance(stage, AnsweringStage):
        value, text = stage.value, replace(load, rows=load.text_rows, length=load.text_length)
        for _ in range(min(load.texts, 1) if load.one_by_one else load.texts):  # one by one each needs the same
            yield "learns text beside", ("policy",), _text_loss(stage.policy, text)
        hidden = _response(_hidden(stage.policy, load.rows, load), load)
        loss = _logprobs(stage.policy, hidden, load)
        if isinstance(value, TrunkValue):
            loss = loss + value(hidden).sum()
        del hidden
        yield "updates the policy", ("policy",), loss
        if isinstance(value, ScalarLM):
            del loss
            hidden = _response(_hidden(value.model, load.rows, load), load)
            loss = value.head(hidden).sum()
            del hidden
            yield "updates the value model", ("value",), loss
    elif isinstance(stage, RewardModule):
        hidden = _hidden(stage.export_model, 2 * load.rows, load)
        loss = stage.scalar.head(hidden).sum()
        models: tuple[str, ...] = ("reward",)
        if (head := stage.language_head) is not None:  # all tokens of the chosen sides may be of their responses
            loss = loss + _logprobs_by(head.layer, head.scaling, hidden[::2, :-1], load)
            models = ("reward", "output layer")
        del hidden
        yield "learns from pairs", models, loss
    elif isinstance(stage, ScoreRegressionModule):
        loss = linear_in_float32(stage.model.score, _hidden(stage.model, load.rows, load)[:, -1]).sum()
        yield "learns scores", ("model",), loss
    elif isinstance(stage, ReferenceStage):
        loss = _logprobs(stage.policy, _hidden(stage.policy, 2 * load.rows, load)[:, :-1], load)
        models = ("policy",)
        if (reference := stage.reference_model.model) is not None and not stage.precompute_reference:
            models = ("policy", "reference")
            with torch.no_grad():
                _logprobs(reference, _hidden(reference, 2 * load.rows, load)[:, :-1], load)
        yield "learns from pairs", models, loss
    elif isinstance(stage, PairStage):
        raise UserError(f"nothing is known of the memory of {type(stage).__name__}")
    else:
        yield "learns", ("model",), _text_loss(stage.export_model, load)


def _text_loss(model: Any, load: Load) -> Tensor:
    """The likelihood of rows of text, each token of which is a target."""
    rows, head = _chosen(_hidden(model, load.rows, load)[:, :-1]), model.get_output_embeddings()
    targets = torch.zeros(len(rows), dtype=torch.long)
    options = _head_options(head, load)
    loss, _ = linear_cross_entropy_sum(rows, head.weight, head.bias, targets, logit_scaling(model), **options)
    return loss


def _updating(stage: Stage, load: Load) -> list[Passed]:
    """Two micro-batches: the first finds no gradients, the second those of the first."""
    for part in stage.trained_parts.values():
        part.train()
    first_blocks = [p for m in models_of(stage).values() for block in blocks_of(m)[:1] for p in block.parameters()]
    live = _counting(stage)
    live.watch([p for p in stage.parameters() if p.requires_grad], first_blocks)
    seen: list[list[tuple[str, tuple[str, ...], list[Moment]]]] = [[], []]
    with live, cast_once(*stage.updating_models):
        for found in seen:
            live.begin()
            if load.one_by_one:
                losses = _losses(stage, load)
                for name, models, loss in losses:
                    loss.backward()
                    del loss
                    found.append((name, models, live.worst()))
                    live.begin()
            else:
                names, roles, graphs = zip(*_losses(stage, load), strict=True)
                total = torch.stack(list(graphs)).sum()
                del graphs
                total.backward()
                del total
                together = tuple(role for some in roles for role in some)
                found.append(("updates" if len(names) > 1 else names[0], together, live.worst()))
    live.forget_weights()
    return [
        Passed(name, models, tuple(first), tuple(later))
        for (name, models, first), (_, _, later) in zip(*seen, strict=True)
    ]


@torch.no_grad()
def _measuring(stage: AnsweringStage, load: Load) -> Iterator[Passed]:
    """Each model says what it has to say of answers."""
    said: dict[str, Callable[[Any], Any]] = {
        "policy": lambda model: _logprobs(model, _response(_hidden(model, load.rows, load), load), load, True),
        "reference": lambda model: _logprobs(model, _response(_hidden(model, load.rows, load), load), load),
        "value": lambda model: model.score(_response(_hidden(model, load.rows, load), load).float().to(model.dtype)),
        "reward": lambda model: _scored(model, load),
    }
    moments, ran = [], []
    for role, model in models_of(stage).items():
        if isinstance(model, TrunkValue) or (role == "policy" and load.takes_sampler_logprobs):
            continue
        model.eval()
        with _counting(stage) as live:
            live.begin()
            said[role.split()[0]](model)
            moments += live.worst()
        ran.append(role)
    if moments:
        yield Passed("measures answers", tuple(ran), tuple(moments))


def _scored(model: Any, load: Load) -> Tensor:
    """What a reward model makes of answers: its head of hidden states, or all of a classifier of another kind."""
    if isinstance(getattr(model, HEAD, None), nn.Linear):
        scores: Tensor = model.score(_hidden(model, load.rows, load).float().to(model.dtype))
        return scores
    room = Classifier(model, [1.0]).context
    ids = torch.zeros(load.rows, load.length if room is None else min(load.length, room), dtype=torch.long)
    logits: Tensor = model(input_ids=ids).logits
    return logits


@torch.no_grad()
def _answering(stage: AnsweringStage, load: Load, merged: float) -> Passed:
    """Prompts are read in groups, then one token of each is decoded, the caches full."""
    policy: Any = stage.policy.eval()
    prompt, rows = load.length - load.response, load.answered
    at_once = PREFILL_TOKENS_ELSEWHERE if load.on_gpu else PREFILL_TOKENS["cpu"]
    group = min(rows, max(1, at_once // prompt))
    cache = rollout_cache(policy.config, rows, prompt, load.length - 1)
    if cache is None:
        raise UserError(f"nothing is known of the caches of {type(policy).__name__}")
    with _counting(stage) as live, cast_once(policy):
        live.begin()
        cache.prefill(slice(0, group), prompt)
        _read(policy, cache, group, prompt, prompt)
        cache.decode([prompt] * rows)
        cache.place.past = load.length - 2
        hidden = _read(policy, cache, rows, 1, load.length - 1)
        draw_tokens(output_logits(policy, hidden), torch.ones(rows, dtype=torch.float64))
        moments = live.worst()
    kept = bytes_of(tensor for layer in cache.buffers for tensor in (layer.keys, layer.values) if tensor is not None)
    moments = [moment._replace(working=moment.working - kept) for moment in moments]
    return Passed("answers prompts", ("policy",), tuple(moments), kept=kept, merged=merged)


def _read(model: Any, cache: Any, rows: int, tokens: int, seen: int) -> Tensor:
    """Hidden states of the last of so many tokens in each row, `[rows, D]`."""
    ids = torch.zeros(rows, tokens, dtype=torch.long)
    mask = torch.ones(rows, 1, tokens, seen, dtype=torch.bool)
    options = {"position_ids": torch.zeros_like(ids), cache_argument(model): cache}
    hidden: Tensor = model.base_model(input_ids=ids, attention_mask=mask, use_cache=True, **options).last_hidden_state
    return hidden[:, -1]


def _merged_bytes(stage: Stage) -> int:
    """Of the weights that hold their adapters while prompts are answered."""
    before = {id(p): id(p.untyped_storage()) for p in stage.export_model.parameters()}
    with merged_adapters(stage.export_model):
        others = [p for p in stage.export_model.parameters() if id(p.untyped_storage()) != before[id(p)]]
        return bytes_of(others)
