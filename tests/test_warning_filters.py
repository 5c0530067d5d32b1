"""Chatter is dropped once and for all, and nothing else is."""

import logging
import warnings

import pytest
from transformers.utils.logging import enable_progress_bar, is_progress_bar_enabled

from rlhf_lightning import InstructionDataModule, SFTModule
from rlhf_lightning.warning_filters import filter_warnings

LOGGERS = ["transformers.modeling_utils", "pytorch_lightning.utilities.rank_zero", "DeepSpeed"]


def state():
    return [list(logging.getLogger(name).filters) for name in LOGGERS], list(warnings.filters)


@pytest.fixture
def talkative(monkeypatch):
    """Loggers and warnings as they are before anything of ours is made."""
    for name in LOGGERS:
        monkeypatch.setattr(logging.getLogger(name), "filters", [])
    with warnings.catch_warnings():
        warnings.resetwarnings()
        yield


@pytest.mark.usefixtures("talkative")
def test_once_more_changes_nothing():
    before = state()
    filter_warnings()
    once = state()
    filter_warnings()
    assert state() == once != before


@pytest.mark.usefixtures("talkative")
@pytest.mark.parametrize("make", [lambda: SFTModule(""), lambda: InstructionDataModule("", [])], ids=["module", "data"])
def test_modules_and_data_modules_are_as_quiet_as_the_command_line(make, caplog):
    make()
    logger = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    logger.propagate = True
    with caplog.at_level(logging.INFO), warnings.catch_warnings(record=True) as warned:
        logger.info("💡 Tip: buy this")
        logger.info("`Trainer.fit` stopped")
        warnings.warn("The 'train_dataloader' does not have many workers which may be a bottleneck", stacklevel=1)
        warnings.warn("the loss is nan", stacklevel=1)
    assert "buy this" not in caplog.text
    assert [str(warning.message) for warning in warned] == ["the loss is nan"]


REPORT = "LlamaForSequenceClassification LOAD REPORT from: lm\nKey          | Status  |\n-------------+---------+-\n%s"


@pytest.mark.usefixtures("talkative")
@pytest.mark.parametrize(("rows", "said"), [(["score.weight"], False), (["score.weight", "model.norm.weight"], True)])
def test_only_a_reward_model_s_new_head_may_be_missing_without_a_word(rows, said, caplog):
    filter_warnings()
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addHandler(caplog.handler)
    logger.warning(REPORT, "\n".join(f"{row} | MISSING |" for row in rows))
    logger.removeHandler(caplog.handler)
    assert ("LOAD REPORT" in caplog.text) == said


@pytest.mark.usefixtures("talkative")
def test_reading_weights_draws_no_bar():
    enable_progress_bar()
    filter_warnings()
    assert not is_progress_bar_enabled()
