"""Which responses go together, and that it changes nothing but the work."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from helpers.models import tiny_causal_lm
from helpers.stages import (
    assert_close_weights,
    fit,
    same_weights,
    save_llama,
    save_reward_model,
    sgd,
    share_of_letters,
    trainer,
    weights,
)
from rlhf_lightning import GRPOModule, KLPenalty, PPOModule, RLOOModule, Sampling
from rlhf_lightning.algorithms.online import sharing
from rlhf_lightning.algorithms.online.sharing import cut_responses
from rlhf_lightning.batches import PromptBatch, length_sorted_pieces
from rlhf_lightning.forward import numerics, shared_prompts

LM = tiny_causal_lm("llama")


def answered(prompts, responses, width=8):
    """Prompt ids and masks of responses: prompt k is token k as often as it is long."""
    lengths = torch.tensor([length for _, length in prompts]).unsqueeze(1)
    ids = torch.tensor([[number] * width for number, _ in prompts])
    longest = max(responses)
    mask = torch.arange(longest) < torch.tensor(responses).unsqueeze(1)
    return ids, torch.arange(width) >= width - lengths, mask


def cut(prompts, responses, size=None, max_tokens=None, least=1, models=(LM,)):
    pieces = cut_responses(*answered(prompts, responses), size, max_tokens, least, models)
    return [(piece.rows.tolist(), piece.groups) for piece in pieces]


X, Y, Z = (1, 5), (2, 3), (3, 8)


def test_responses_to_a_prompt_stay_together():
    assert cut([X, Y, X, Y], [2, 2, 2, 2]) == [([0, 2, 1, 3], (2, 2))]
    assert cut([X, Y, Z, X, Z], [2, 2, 2, 2, 2], size=2) == [([2, 4], (2,)), ([0, 3], (2,)), ([1], (1,))]
    # The single one, which is the longest, has room for one of the others, but for no part of the next.
    assert cut([X, X, Y, Y, Z], [1] * 5, size=3) == [([4, 0, 1], (1, 2)), ([2, 3], (2,))]


def test_a_group_that_is_too_large_is_cut():
    assert cut([X] * 5, [2] * 5, size=2) == [([0, 1], (2,)), ([2, 3], (2,)), ([4], (1,))]
    assert cut([X] * 5, [2] * 5, max_tokens=9) == [([0, 1], (2,)), ([2, 3], (2,)), ([4], (1,))]


def test_a_budget_counts_a_prompt_once():
    assert cut([X] * 4, [2] * 4, max_tokens=13) == [([0, 1, 2, 3], (4,))]
    assert cut([X] * 4, [2] * 4, max_tokens=13, models=()) == [([0], None), ([1], None), ([2], None), ([3], None)]
    # Rows are as wide as the widest: 13 tokens and 13, of which the second holds 7.
    assert cut([X, X, X, X, Y, Y], [2] * 6, max_tokens=26) == [([0, 1, 2, 3, 4, 5], (4, 2))]
    assert cut([X, X, X, X, Y, Y], [2] * 6, max_tokens=25) == [([0, 1, 2, 3], (4,)), ([4, 5], (2,))]
    assert cut([Z, Z, X], [30, 30, 1], max_tokens=20) == [([0], None), ([1], None), ([2], None)]


def test_more_pieces_are_made_of_whole_groups_first():
    rows = [X, X, Y, Y]
    assert cut(rows, [2] * 4, least=2) == [([0, 1], (2,)), ([2, 3], (2,))]
    assert cut(rows, [2] * 4, least=3) == [([0], (1,)), ([1], (1,)), ([2, 3], (2,))]
    assert cut(rows, [2] * 4, least=4) == [([0], (1,)), ([1], (1,)), ([2], (1,)), ([3], (1,))]
    with pytest.raises(ValueError, match="fewer rows than pieces"):
        cut(rows, [2] * 4, least=5)


def test_what_cannot_or_does_not_share_goes_as_ever(monkeypatch):
    rows, responses = [X, Y, Z, X], [3, 1, 2, 2]
    lengths = torch.tensor([[length, response] for (_, length), response in zip(rows, responses, strict=True)])
    apart = [(piece.tolist(), None) for piece in length_sorted_pieces(lengths, 3, None)]
    said = []
    monkeypatch.setattr(numerics, "rank_zero_info", said.append)
    monkeypatch.setattr(numerics, "_said", set())
    bloom = tiny_causal_lm("bloom")
    assert cut(rows, responses, size=3, models=(bloom, LM)) == apart
    assert cut(rows, responses, size=3, models=(LM, bloom)) == apart
    assert [line for line in said if "begin alike" in line] == [
        "BloomForCausalLM runs sequences that begin alike one by one: it takes no position_ids"
    ]
    assert cut(rows, responses, size=3) != apart
    different = [X, Y, Z, (4, 5)]
    assert cut(different, responses, size=3) == apart  # nothing to share
    assert cut([(1, 0), (1, 0)], [2, 2], size=3) == [([0, 1], None)]  # no token to predict the first one from
    window = tiny_causal_lm("llama", sliding_window=8)
    assert cut([X] * 4, [3] * 4, models=(window,)) == [([0, 1, 2, 3], (4,))]
    assert cut([X] * 4, [4] * 4, models=(window,)) == [([0, 1, 2, 3], None)]


def test_where_padding_is_computed_groups_of_several_sizes_may_not_pay():
    eager = tiny_causal_lm("llama", attn_implementation="eager")
    rows, responses = [X, X, X, X, Y, Z, (4, 6), (5, 6)], [4] * 8
    assert cut(rows, responses) == [([0, 1, 2, 3, 5, 6, 7, 4], (4, 1, 1, 1, 1))]
    assert cut(rows, responses, models=(eager,))[0][1] is None
    assert cut(rows[:4] + rows[:4], responses, models=(eager,)) == [(list(range(8)), (8,))]


@st.composite
def experiences(draw):
    count = draw(st.integers(1, 12))
    prompts = [(1, 5), (2, 3), (3, 8), (4, 1)]
    rows = [draw(st.sampled_from(prompts)) for _ in range(count)]
    return rows, [draw(st.integers(1, 6)) for _ in range(count)]


@given(experiences(), st.none() | st.integers(1, 5), st.none() | st.integers(6, 40), st.integers(1, 12))
def test_limits_are_kept_and_no_row_is_lost(batch, size, max_tokens, least):
    rows, responses = batch
    least = min(least, len(rows))
    first = cut(rows, responses, size, max_tokens)
    pieces = cut(rows, responses, size, max_tokens, least)
    assert sorted(row for piece, _ in pieces for row in piece) == list(range(len(rows)))
    assert len(pieces) == max(least, len(first))  # not more than asked for: another process has as many
    assert (pieces[0][1] is None) == (first[0][1] is None)
    for piece, groups in pieces:
        assert size is None or len(piece) <= size
        if groups is None:
            continue
        assert sum(groups) == len(piece)
        split = torch.tensor(piece).split(list(groups))
        widths = [rows[group[0]][1] + sum(responses[row] for row in group) for group in split]
        assert all(len({rows[row] for row in group}) == 1 for group in split)
        assert max_tokens is None or len(piece) == 1 or len(groups) * max(widths) <= max_tokens
    assert cut(rows, responses, size, max_tokens, least) == pieces


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = save_llama(tmp_path_factory.mktemp("llama"))
    return folder, save_reward_model(tmp_path_factory.mktemp("reward"), folder)


def prompt_batches():
    """Two batches of four prompts of 1 to 9 tokens, two of which are the same text."""
    ids = torch.arange(40, 76).view(4, 9)
    ids[3] = ids[1]
    mask = torch.arange(9) >= 9 - torch.tensor([[1], [9], [4], [9]])
    return DataLoader([PromptBatch(ids, mask, ["x"] * 4, torch.arange(4) + 4 * i) for i in range(2)], batch_size=None)


def trained(kind, folder, reward, **settings):
    """The stage after two iterations in float64, and how many tokens its policy was shown meanwhile."""
    module = kind(
        folder,
        reward,
        rollout_batch_size=4,
        **{"samples_per_prompt": 4, "minibatch_size": 8, "ppo_epochs": 2} | settings,
        sampling=Sampling(max_new_tokens=5),
        optimizer=sgd(0.1),
        lr_schedule="constant",
        gradient_clip_val=None,
    )
    module.configure_model()
    shown = []
    embed = module.policy.get_input_embeddings()
    embed.register_forward_hook(lambda _, args, __: shown.append(args[0].numel()) if torch.is_grad_enabled() else None)
    log = fit(module, prompt_batches(), precision="64-true")
    return module, log, sum(shown)


STAGES = [
    (GRPOModule, {}),
    (GRPOModule, {"micro_batch_size": 2, "loss": "grpo"}),
    (GRPOModule, {"max_tokens_per_batch": 40, "gradient_checkpointing": True}),
    (GRPOModule, {"minibatch_size": 16, "ppo_epochs": 1}),  # on policy: the answers are not measured again
    (RLOOModule, {"micro_batch_size": 4, "kl": KLPenalty(0.1)}),
    (PPOModule, {"micro_batch_size": 4}),
    (PPOModule, {"max_tokens_per_batch": 40, "value_trunk": "policy", "samples_per_prompt": 2}),
]


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize(("kind", "settings"), STAGES)
def test_a_run_is_the_same_with_prompts_shared(folders, kind, settings):
    (shared, log, fewer), (apart, other, tokens) = (
        trained(kind, *folders, prefix_sharing=prefix_sharing, **settings) for prefix_sharing in (True, False)
    )
    assert fewer < 0.95 * tokens
    for name in ("score", "kl", "reward", "policy_loss", "grad_norm", "entropy"):
        assert log.series(f"train/{name}") == pytest.approx(other.series(f"train/{name}"), abs=1e-5), name
    for part, model in shared.trained_parts.items():
        assert_close_weights(weights(model), weights(apart.trained_parts[part]))


def test_a_single_response_takes_the_path_that_it_took(folders, monkeypatch):
    runs = []
    for prefix_sharing in (True, False):
        if prefix_sharing:
            monkeypatch.setattr(shared_prompts, "share_rows", None)
            monkeypatch.setattr(sharing, "can_share", None)
        settings = {"samples_per_prompt": 1, "minibatch_size": 4, "micro_batch_size": 2}
        runs.append(trained(PPOModule, *folders, prefix_sharing=prefix_sharing, **settings)[0])
        monkeypatch.undo()
    for part, model in runs[0].trained_parts.items():
        assert same_weights(weights(model), weights(runs[1].trained_parts[part]))


def test_answers_of_an_evaluation_go_as_ever(folders, monkeypatch):
    sizes = {"rollout_batch_size": 4, "samples_per_prompt": 2, "minibatch_size": 8}
    module = RLOOModule(folders[0], share_of_letters, **sizes, sampling=Sampling(max_new_tokens=4))
    monkeypatch.setattr(sharing, "can_share", None)
    trainer().validate(module, prompt_batches(), verbose=False)
