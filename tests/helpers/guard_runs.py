"""Stages some of whose rows give losses or gradients that are not finite, also as functions for `run_in_processes`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from helpers.stages import (
    fit,
    instruction_rows,
    preference_rows,
    prompt_rows,
    share_of_letters,
)
from rlhf_lightning import (
    DPOModule,
    InstructionDataModule,
    PPOModule,
    PreferenceDataModule,
    PromptDataModule,
    RewardModule,
    Sampling,
    SFTModule,
    SkipNonFinite,
)

OPTIONS: dict[str, Any] = {
    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}},
    "lr_schedule": "constant",
    "warmup_steps": 0,
}


class Poisoned:
    """Makes the loss, or its gradient, of every micro-batch that holds a bad row NaN or infinite."""

    bad_rows: tuple[int, ...] = ()
    what = "loss"

    def optimise(self, pieces: Any, loss_of: Any, *args: Any, **kwargs: Any) -> Any:
        def poisoned(piece: Any) -> Iterator[Any]:
            rows = (piece.batch if hasattr(piece, "batch") else piece).row_ids
            for loss, logged in loss_of(piece):
                if not set(rows.tolist()) & set(self.bad_rows):
                    yield loss, logged
                elif self.what == "loss":
                    yield loss * float("nan"), logged
                else:
                    yield loss + (loss - loss.detach()).sqrt(), logged  # 0, with an infinite slope

        return super().optimise(pieces, poisoned, *args, **kwargs)  # type: ignore[misc]


class PoisonedSFT(Poisoned, SFTModule):
    pass


class PoisonedReward(Poisoned, RewardModule):
    pass


class PoisonedDPO(Poisoned, DPOModule):
    pass


class PoisonedPPO(Poisoned, PPOModule):
    pass


def stage(name: str, folder: str, reward: Any = share_of_letters) -> tuple[Any, list[Any]]:
    """A module, and its three batches: rows 0 to 3, 4 to 7 and 8 to 11."""
    sizes: dict[str, Any] = {"validation_split": 0.0, "eval_batch_size": 4}
    if name == "ppo":
        module: Any = PoisonedPPO(
            folder,
            reward,
            sampling=Sampling(max_new_tokens=4),
            rollout_batch_size=4,
            minibatch_size=2,
            micro_batch_size=1,
            ppo_epochs=2,
            **OPTIONS,
        )
        rows = prompt_rows(12)
        data: Any = PromptDataModule(
            folder, rows, validation_data=rows, rollout_batch_size=4, max_prompt_length=40, **sizes
        )
    elif name == "sft":
        module = PoisonedSFT(folder, micro_batch_size=2, **OPTIONS)
        rows = instruction_rows(12)
        data = InstructionDataModule(folder, rows, validation_data=rows, max_length=48, **sizes)
    else:
        module = {"reward": PoisonedReward, "dpo": PoisonedDPO}[name](folder, micro_batch_size=2, **OPTIONS)
        rows = preference_rows(12)
        data = PreferenceDataModule(folder, rows, validation_data=rows, max_length=48, **sizes)
    data.setup("fit")
    held = data.val_dataloader()  # of which each process would be given a part
    return module, [held.collate_fn([held.dataset[row] for row in range(at, at + 4)]) for at in (0, 4, 8)]


def loader(batches: list[Any]) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def run_with_skips(folder: str, root: str) -> dict[str, Any]:
    """Two processes, the second of which finds a bad row in its second batch; and again without those two batches."""
    second = os.environ["RANK"] == "1"
    results: dict[str, Any] = {}
    for name, order in (("skipped", [2, 1, 0] if second else [0, 0, 2]), ("without", [2, 0] if second else [0, 2])):
        module, batches = stage("sft", folder)
        module.bad_rows = (5,)
        skip = SkipNonFinite()
        settings = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False, "default_root_dir": root}
        fit(module, loader([batches[i] for i in order]), callbacks=[skip], **settings)
        weights = [weight.double().flatten().tolist() for weight in module.model.state_dict().values()]
        results[name] = {"weights": weights, "steps": module.trainer.global_step, "skips": skip.skips}
    return results
