"""Wrong words and numbers are refused by every public class, whichever arguments it has."""

from __future__ import annotations

import collections.abc
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rlhf_lightning
from helpers.signatures import hints, parameters
from rlhf_lightning import FineTune, PPOModule, RewardModule, Sampling, SFTModule, UserError
from rlhf_lightning.arguments import NOT_NEGATIVE, SHARE, Range, check_arguments
from rlhf_lightning.cli.prepare import prepare

NEEDED = {
    "model_name_or_path": "nowhere",
    "reward": "nowhere.function",
    "judge": "nowhere.function",
    "tokenizer": "nowhere",
    "path": "nowhere",
    "prompts": ["a"],
    "sources": [rlhf_lightning.Table("nowhere")],
    "data": "nowhere",
    "out": "nowhere",
    "metric": "train/kl",
    "model": None,
    "url": "http://nowhere",
}
"""Arguments without a default."""

ZERO_MAKES_SENSE = {
    *("seed", "num_workers", "num_examples", "logging_level", "refresh_rate", "stage"),
    *("validation_split", "test_split", "stage_split", "minimum_response_length"),
    *("warmup_steps", "label_smoothing", "gradient_clip_val", "value_lr", "sft_coef", "center_coef", "lm_coef"),
    *("temperature", "top_k", "min_new_tokens", "dropout"),
    *("coef", "missing_eos_penalty", "value_coef", "gamma", "gae_lambda", "tolerance"),
    *("min_lr_factor", "value_gae_lambda", "value_warmup_iterations", "value_gradient_clip_val", "overlong_penalty"),
    *("decay", "pretraining_coef", "rating_margins", "retries", "backoff", "calibration_samples"),
}
NEGATIVE_MAKES_SENSE = {"above", "below", "missing_eos_score", "OtherReward.weight", "reward_weights", "judge_weights"}
AT_MOST_1 = {"gamma", "gae_lambda", "top_p", "validation_split", "test_split", "label_smoothing", "dropout"}
AT_MOST_1 |= {"min_lr_factor", "value_gae_lambda"}


def takers() -> list[Any]:
    """Every public class that has arguments of its own, and `rlhf prepare`."""
    classes = [getattr(rlhf_lightning, name) for name in rlhf_lightning.__all__]
    own = [c for c in classes if isinstance(c, type) and "rlhf_lightning" in getattr(c.__init__, "__module__", "")]
    return [c for c in own if not issubclass(c, rlhf_lightning.ScalarLM)] + [prepare]


def members(annotation: Any) -> list[Any]:
    """An annotation and all that stands inside it, save what a function takes and returns."""
    inside = () if get_origin(annotation) is collections.abc.Callable else get_args(annotation)
    return [annotation, *(member for inner in inside for member in members(inner))]


def holds(annotation: Any, kinds: tuple[Any, ...]) -> bool:
    """Whether one of some kinds stands inside an annotation."""
    inside = members(annotation)
    return any(kind in inside or kind in [getattr(m, "__origin__", None) for m in inside] for kind in kinds)


def arguments(*kinds: Any) -> list[Any]:
    """Every argument of a taker whose annotation has one of some kinds inside: taker, name, how it is wrapped."""
    found = []
    for taker in takers():
        annotations = hints(taker)
        for name in parameters(taker):
            annotation = annotations.get(name)
            if holds(annotation, kinds):
                around = [m for m in members(annotation) if getattr(m, "__origin__", None) in (list, dict)]
                wrapped = next((m.__origin__ for m in around if holds(m, kinds)), None)
                found.append(pytest.param(taker, name, wrapped, id=f"{taker.__name__}-{name}"))
    return found


def refused(taker: Any, name: str, wrapped: Any, value: Any) -> str:
    """What is said when an argument has a value."""
    given = [value] if wrapped is list else {"ppo": value} if wrapped is dict else value
    needed = {
        key: NEEDED[key]
        for key, parameter in parameters(taker).items()
        if parameter.default is parameter.empty and key in NEEDED
    }
    with pytest.raises(UserError) as error:
        taker(**needed | {name: given})
    assert "\n" not in str(error.value)
    return str(error.value)


LITERALS, NUMBERS, FLAGS = arguments(Literal), arguments(int, float), arguments(bool)


def test_the_sweep_below_sees_every_kind_of_argument():
    assert {p.values[1] for p in LITERALS} >= {"loss", "lr_schedule", "estimator", "value_trunk", "on_bad_row", "mode"}
    assert {p.values[1] for p in NUMBERS} >= {"clip", "ppo_epochs", "gamma", "horizon", "weights", "batch_size"}
    assert {p.values[0].__name__ for p in LITERALS + NUMBERS + FLAGS} >= {
        *("SFTModule", "RewardModule", "PPOModule", "KLPenalty", "ScoreShaping", "Objective", "Sampling", "FineTune"),
        *("InstructionDataModule", "PreferenceDataModule", "PromptDataModule", "Filters", "Blend", "Table", "prepare"),
        *("DeepSpeedStrategy", "HFExport", "StageProgressBar"),
    }


@pytest.mark.parametrize(("taker", "name", "wrapped"), LITERALS)
def test_a_word_that_is_none_of_the_known_ones_is_refused(taker, name, wrapped):
    said = refused(taker, name, wrapped, "something else")
    assert name in said
    assert "'something else' is unknown; " in said
    assert " or " in said


@pytest.mark.parametrize(("taker", "name", "wrapped"), NUMBERS)
def test_a_number_that_makes_no_sense_is_refused(taker, name, wrapped):
    negative = bool(NEGATIVE_MAKES_SENSE & {name, f"{taker.__name__}.{name}"})
    for value in [math.nan, math.inf, "3", True, *([] if negative else [-1])]:
        assert name in refused(taker, name, wrapped, value)
    if name not in ZERO_MAKES_SENSE and not negative:
        assert name in refused(taker, name, wrapped, 0)
    if name in AT_MOST_1:
        assert name in refused(taker, name, wrapped, 1.5)


@pytest.mark.parametrize(("taker", "name", "wrapped"), FLAGS)
def test_a_word_is_no_yes_or_no(taker, name, wrapped):
    said = refused(taker, name, wrapped, "false")
    others = f"{name} 'false' is unknown; use auto or true or false"  # where a word is allowed, too
    assert said.endswith((f"{name} ('false') must be true or false", others))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: RewardModule("nowhere", loss="last_tokn"),
            "loss 'last_tokn' is unknown; did you mean last_token? use last_token, average or per_sample",
        ),
        (
            lambda: SFTModule("nowhere", lr_schedule="cosin"),
            "lr_schedule 'cosin' is unknown; did you mean cosine? use cosine, linear or constant",
        ),
        (lambda: rlhf_lightning.KLPenalty(estimator="k9"), "kl.estimator 'k9' is unknown; use k1, k2 or k3"),
        (lambda: rlhf_lightning.ScoreShaping(clip=-1), "score.clip (-1) must be above 0"),
        (lambda: rlhf_lightning.Objective(gamma=9), "objective.gamma (9) must be at least 0 and at most 1"),
        (lambda: PPOModule("a", "operator.eq", ppo_epochs=0), "ppo_epochs (0) must be at least 1"),
        (lambda: PPOModule("a", "operator.eq", kl=1.0), "kl (1.0) must be a KLPenalty"),
        (lambda: Sampling(stop_strings="abc"), "stop_strings ('abc') must be a list"),
        (lambda: Sampling(max_new_tokens=2.5), "max_new_tokens (2.5) must be a whole number at least 1"),
        (lambda: FineTune(mode=None), "finetune.mode None is unknown; use all, last_layer or lora"),
    ],
)
def test_the_message_says_what_is_allowed(make, message):
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value) == message


def test_null_passes_where_it_is_allowed_and_numbers_of_numpy_are_numbers():
    rlhf_lightning.KLPenalty(target=None, coef=np.float32(0.5), horizon=np.int64(3))
    rlhf_lightning.ScoreShaping(clip=None)
    PPOModule("a", "operator.eq", micro_batch_size=None, value_lr=0.0, gradient_clip_val=None)
    with pytest.raises(UserError, match=r"^kl\.coef \(None\) must be a number at least 0$"):
        rlhf_lightning.KLPenalty(coef=None)


def test_a_subclass_with_arguments_of_its_own_is_checked_as_its_parent():
    class Mine(SFTModule):
        def __init__(self, lr_schedule: int) -> None:
            super().__init__("nowhere", lr_schedule="constant")

    assert Mine(lr_schedule=3).lr_schedule == "constant"


BOUNDS = st.none() | st.integers(-3, 3)


@given(st.integers(-9, 9).map(lambda x: x / 2), BOUNDS, BOUNDS, BOUNDS, BOUNDS)
def test_a_range_holds_what_lies_within_its_bounds(number, at_least, above, at_most, below):
    wanted = all(
        bound is None or holds
        for bound, holds in [
            (at_least, at_least is None or number >= at_least),
            (above, above is None or number > above),
            (at_most, at_most is None or number <= at_most),
            (below, below is None or number < below),
        ]
    )
    assert Range(at_least, above, at_most, below).holds(number) is wanted


@dataclass
class Everything:
    """One argument of each kind."""

    word: Literal["left", "right"] | None = None
    words: list[Literal["a", "b"]] | None = None
    number: int | str = 1
    shares: dict[str, float] | None = None
    anything: Any = None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"word": "lefty"}, "word 'lefty' is unknown; did you mean left? use left or right"),
        ({"words": ["a", "c"]}, "words 'c' is unknown; use a or b"),
        ({"words": "a"}, "words ('a') must be a list"),
        ({"shares": {"x": 0.5, "y": 2}}, "shares (2) must be at least 0 and at most 1"),
        ({"shares": [0.5]}, "shares ([0.5]) must be a dict"),
    ],
)
def test_lists_dicts_and_unions_are_looked_into(values, message):
    with pytest.raises(UserError) as error:
        check_arguments(Everything, vars(Everything(**values)), {"shares": SHARE})
    assert str(error.value) == message


def test_what_is_sound_passes():
    sound = Everything("left", ("a", "b"), "one", {"x": 0.0, "y": 1}, object())
    check_arguments(Everything, vars(sound), {"shares": SHARE})
    assert str(NOT_NEGATIVE) == "at least 0"
