"""What is planned for ZeRO-3 is what DeepSpeed is given."""

from __future__ import annotations

import pytest
import torch

from rlhf_lightning.training.deepspeed_memory import fitted_sizes
from rlhf_lightning.training.sheets import Sizes, sheet_of

ZERO3 = {"class_path": "rlhf_lightning.DeepSpeedStrategy", "init_args": {"stage": 3}}


@pytest.mark.parametrize("millions", [1, 64, 640, 64_000])
def test_weights_that_are_gathered_at_once(millions: int) -> None:
    total = millions * 10**6
    weight = torch.empty(total, device="meta")
    sizes = fitted_sizes({}, [weight], processes=2)
    live, ahead = (sizes[f"stage3_{name}"] for name in ("max_live_parameters", "prefetch_bucket_size"))
    sheet = sheet_of(ZERO3, "32-true", 2)
    assert sheet.gathered(Sizes(total, 0, 0), total, trains=True) == 4 * (live + ahead)
    assert sheet.reduction_buffer(total, total) == 4 * sizes["reduce_bucket_size"]
