"""What a checkpoint will hold, in bytes."""

import pytest
import pytorch_lightning as pl
import torch

from rlhf_lightning.training.checkpoint_size import checkpoint_size


def unknown(groups):
    raise RuntimeError("made within its strategy only")


@pytest.mark.parametrize(
    ("optimizer", "dtype", "bytes_each"),
    [
        (torch.optim.AdamW, torch.float32, 4 + 8),
        (lambda groups: torch.optim.SGD(groups, lr=1.0), torch.float32, 4),
        (lambda groups: torch.optim.SGD(groups, lr=1.0, momentum=0.9), torch.float32, 4 + 4),
        (torch.optim.AdamW, torch.bfloat16, 2 + 4 + 8),  # float32 copies, and moments of those
        (unknown, torch.float32, 4 + 8),
    ],
)
def test_weights_and_what_the_optimizer_keeps_of_those_that_are_trained(optimizer, dtype, bytes_each):
    module = pl.LightningModule()
    module.trained = torch.nn.Linear(100, 10, bias=False, dtype=dtype)
    module.frozen = torch.nn.Linear(100, 10).requires_grad_(False)
    module.optimizer = optimizer
    assert checkpoint_size(module) == pytest.approx(1000 * bytes_each, rel=0.01)  # AdamW counts its steps
