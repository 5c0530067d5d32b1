"""What people write for an option leads to the option that they mean."""

import pytest

from rlhf_lightning.cli.errors import arguments_of
from rlhf_lightning.cli.spelling import nearest

KNOWN = [
    "config",
    "ckpt_path",
    "seed_everything",
    "overwrite",
    *arguments_of("pytorch_lightning.Trainer", "trainer"),
    *arguments_of("SFTModule", "model"),
    *arguments_of("rlhf_lightning.InstructionDataModule", "data"),
]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("model.optimiser.lr", "model.optimizer.lr"),
        ("model.optimizer.learning_rate", "model.optimizer.lr"),
        ("model.init_args.lr", "model.optimizer.lr"),
        ("lr", "model.optimizer.lr"),
        ("model.lora", "model.finetune.mode"),
        ("model.model", "model.model_name_or_path"),
        ("model.path", "model.model_name_or_path"),
        ("data.path", "data.data"),
        ("data.file", "data.data"),
        ("trainer.max_epoch", "trainer.max_epochs"),
        ("num_train_epochs", "trainer.max_epochs"),
        ("max-steps", "trainer.max_steps"),
        ("trainer.gpus", "trainer.devices"),
        ("batch_size", "data.batch_size"),
        ("model.batch_size", "data.batch_size"),
        ("data.val_split", "data.validation_split"),
        ("data.max_new_tokens", "model.sampling.max_new_tokens"),
        ("model.topk", "model.sampling.top_k"),
        ("resume", "ckpt_path"),
        ("seed", "seed_everything"),
        ("modle.lr_schedule", "model.lr_schedule"),
        ("zzzz", None),
    ],
)
def test_the_nearest_option(written, meant):
    assert nearest(written, KNOWN) == meant


def test_a_class_that_is_not_there_has_no_arguments():
    assert arguments_of("nowhere.Class", "model") == arguments_of("rlhf_lightning.Clas", "model") == []
    assert arguments_of(None, "model") == []
