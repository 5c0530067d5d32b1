"""A policy that learns from pairs beside a frozen reference, which may say all that it has to say before training.

A pair is then known by its tokens, so that neither the order of the data nor the process that reads it matters.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel

from rlhf_lightning.algorithms.pairs import Pairs, PairStage, both_sides, response_logprobs
from rlhf_lightning.algorithms.stage import Stage
from rlhf_lightning.arguments import check_arguments
from rlhf_lightning.batches import PreferenceBatch
from rlhf_lightning.errors import UserError
from rlhf_lightning.host import to_device
from rlhf_lightning.lightning_compat import load_training_data, validation_loader
from rlhf_lightning.models.causal_lm import load_causal_lm
from rlhf_lightning.models.finetune import choose_trained, enable_gradient_checkpointing
from rlhf_lightning.models.folders import check_model_folder
from rlhf_lightning.models.lora import add_adapter
from rlhf_lightning.models.sharing import load_reference
from rlhf_lightning.training import world_size

_BYTES = 15
"""Of a pair's hash: two numbers of 60 bits, which no two pairs of a data set are likely to share."""


_STARTED_FROM = re.compile(r"started from `([^`]+)`")
"""What the model card of an export says."""


class Reference(nn.Module):
    """Log-probabilities of chosen and rejected responses under a frozen model, or as that has said before.

    Args:
        model: frozen; None for a reference to which everything is equally likely.
        name: its folder or hub id.
    """

    def __init__(self, model: PreTrainedModel | None, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name
        self._known: dict[tuple[int, int], tuple[float, float]] = {}

    @torch.no_grad()
    def forward(self, pairs: Pairs) -> Tensor:
        """In nats, `[B, 2]`, 0 without a model.

        Args:
            pairs: B of them, all of which were there when the reference was computed, if it was computed before.
        """
        if self.model is not None:
            return response_logprobs(self.model, pairs)[0]
        if self._known:
            return self._looked_up(pairs.batch)
        return torch.zeros(len(pairs.batch.row_ids), 2, device=pairs.batch.row_ids.device)

    @torch.no_grad()
    def precompute(self, stage: Stage) -> None:
        """Read all pairs that are trained on and validated with, then let the model go; every process must call it.

        Args:
            stage: inside its `on_fit_start`.

        Raises:
            UserError: the data come as a stream.
        """
        trainer: Any = stage.trainer
        if self.model is not None and not self._known:
            load_training_data(trainer)
            held_out = validation_loader(trainer) or []
            with trainer.precision_plugin.forward_context():
                said = [
                    self._measured(stage, loader)
                    for loader in [trainer.train_dataloader, *(held_out if isinstance(held_out, list) else [held_out])]
                ]
            self._known = {key: pair for part in said for key, pair in part.items()}
        self.model = None

    def _measured(self, stage: Stage, loader: Any) -> dict[Any, Any]:
        """What the model says of all pairs of a loader's data, each process measuring its share."""
        rows: list[tuple[tuple[int, int], list[float]]] = []
        for batch in _every_batch(stage, loader):
            pairs = Pairs.of(batch, shared=False)
            rows += zip(_keys(pairs.batch), self(pairs).double().tolist(), strict=True)
        # Keys are whole numbers of 60 bits, which no float holds: they and the values travel apart.
        keys = torch.tensor([key for key, _ in rows], dtype=torch.int64, device=stage.device)
        values = torch.tensor([pair for _, pair in rows], dtype=torch.float64, device=stage.device)
        if world_size(stage) > 1:
            # Of rankings a process may have more pairs than another: the last again, as all send equally many.
            most = int(stage.all_gather(torch.tensor(len(rows), device=stage.device)).max())  # type: ignore[union-attr]
            filled = torch.arange(most, device=stage.device).clamp(max=len(rows) - 1)
            gathered = (stage.all_gather(each[filled]) for each in (keys, values))
            keys, values = (each.flatten(0, 1) for each in gathered)  # type: ignore[union-attr]
        return dict(zip(map(tuple, keys.tolist()), map(tuple, values.tolist()), strict=True))

    def _looked_up(self, batch: PreferenceBatch) -> Tensor:
        try:
            rows = [self._known[key] for key in _keys(batch)]
        except KeyError as e:
            raise UserError(
                "a pair was not there when the reference was computed: resume with the data that the run began with, "
                "and test in a run of its own, or set precompute_reference to false"
            ) from e
        return to_device(torch.tensor(rows, dtype=torch.float32), batch.chosen_ids.device)

    def known(self) -> dict[str, Any]:
        """What was computed before training, as plain lists for a checkpoint."""
        return {"of": self.name, "keys": [*map(list, self._known)], "values": [*map(list, self._known.values())]}

    def load_known(self, known: dict[str, Any]) -> None:
        """Take over what `known` gave, unless another reference said it: then this one is asked anew.

        Args:
            known: as it was in the checkpoint.
        """
        if known["of"] != self.name:
            return
        self._known = dict(zip(map(tuple, known["keys"]), map(tuple, known["values"]), strict=True))


def _every_batch(stage: Stage, loader: Any) -> Iterator[PreferenceBatch]:
    """All data of a loader in their own order, on the device; every process has as many batches as the others."""
    if isinstance(loader.dataset, IterableDataset):
        raise UserError("precompute_reference needs data that do not come as a stream: set streaming to false")
    count, world = len(loader.dataset), world_size(stage)
    rows = [row % count for row in range(stage.global_rank, -(-count // world) * world, world)]
    size = loader.batch_size or (None if loader.batch_sampler is None else loader.batch_sampler.batch_size)
    batches = DataLoader(loader.dataset, batch_size=size, sampler=rows, collate_fn=loader.collate_fn)
    rank_zero_info(f"the reference reads {count:,} examples, once")
    for batch in batches:
        yield stage.trainer.strategy.batch_to_device(batch)


def _keys(batch: PreferenceBatch) -> list[tuple[int, int]]:
    ids, mask = (each.cpu() for each in both_sides(batch))
    keys = []
    for pair, kept in zip(ids, mask, strict=True):
        chosen, rejected = (side[real].numpy().tobytes() for side, real in zip(pair, kept, strict=True))
        digest = hashlib.blake2b(len(chosen).to_bytes(8, "big") + chosen + rejected, digest_size=_BYTES).digest()
        number = int.from_bytes(digest, "big")
        keys.append((number >> 60, number & ((1 << 60) - 1)))
    return keys


def warn_own_reference(model: str) -> None:
    """Say where a policy that was held near a reference is about to be compared with itself.

    Args:
        model: the policy's folder or hub id, which no reference was named beside.
    """
    card = Path(model).expanduser() / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    held_near_it = "ppo_epochs:" in text or "length_normalized:" in text  # online, or by DPO
    if held_near_it and (start := _STARTED_FROM.search(text)):
        rank_zero_warn(
            f"'{model}' was trained from '{start[1]}': with no other reference its KL is that to itself, 0 by "
            f"construction; pass --model.reference {start[1]} for the KL to where it started"
        )


class ReferenceStage(PairStage):
    """Learns from pairs beside a frozen reference.

    Args:
        model_name_or_path: Hugging Face folder or hub id of the SFT model, which the policy starts from.
        reference: folder or hub id of the frozen reference; None for `model_name_or_path`, which is free with LoRA.
        precompute_reference: let the reference read all pairs once, before training, and keep its log-probabilities in
            its place: afterwards one model in memory instead of two (with LoRA there is one anyway), and a quarter less
            work, for the time of one pass.
        reference_free: compare log-probabilities themselves, as if the reference found everything equally likely.
        **options: those of `PairStage` and `Stage`. An example is a pair.
    """

    policy: PreTrainedModel
    reference_model: Reference

    def __init__(
        self,
        model_name_or_path: str,
        *,
        reference: str | None = None,
        precompute_reference: bool = False,
        reference_free: bool = False,
        **options: Any,
    ) -> None:
        check_arguments(ReferenceStage, locals())
        if reference_free and (reference is not None or precompute_reference):
            raise UserError("reference_free needs no reference: leave out reference and precompute_reference")
        super().__init__(model_name_or_path, **options)
        check_model_folder(reference or model_name_or_path)  # before minutes go into data
        self.strict_loading = False  # the reference is not in the checkpoint
        self.reference = reference
        self.precompute_reference = precompute_reference
        self.reference_free = reference_free

    @property
    def parents(self) -> dict[str, str]:
        """The policy and, unless there is none, its reference."""
        reference = {} if self.reference_free else {"reference": self.reference or self.model_name_or_path}
        return super().parents | reference

    def load_models(self) -> None:
        """Load the policy, to be trained, and the reference, frozen."""
        name, trust = self.model_name_or_path, self.trust_remote_code
        policy = load_causal_lm(name, self.dropout, trust)
        choose_trained(policy, self.finetune)
        known = None if self.reference_free else load_reference(policy, name, self.reference, self.tokenizer, trust)
        self.reference_model = Reference(known, str(self.reference or name))
        add_adapter(policy, self.finetune)
        if self.gradient_checkpointing:
            enable_gradient_checkpointing(policy)
        self.policy = policy

    @property
    def export_model(self) -> PreTrainedModel:
        """The policy."""
        return self.policy

    @property
    def readers(self) -> list[PreTrainedModel]:
        """The policy, and its reference while that reads."""
        return [self.policy, *([self.reference_model.model] if self.reference_model.model is not None else [])]

    @property
    def updating_models(self) -> list[nn.Module]:
        """The policy, and its reference while that reads."""
        return [*self.readers]

    def setup(self, stage: str) -> None:
        """Say where an evaluation would compare a policy with itself."""
        super().setup(stage)
        if stage != "fit" and self.reference is None and not self.reference_free and not self.trainer.ckpt_path:
            warn_own_reference(self.model_name_or_path)

    def on_fit_start(self) -> None:
        """Let the reference read all pairs, if it is to do so once."""
        super().on_fit_start()
        if self.precompute_reference:
            self.reference_model.precompute(self)

    def run_state(self) -> dict[str, Any]:
        """What the reference said, if it is not asked again."""
        return {"reference": self.reference_model.known()}

    def step_state(self) -> dict[str, Any]:
        """Nothing: the reference has spoken before the first step."""
        return {}

    def load_run_state(self, state: dict[str, Any]) -> None:
        """Go on with what the reference said."""
        self.reference_model.load_known(state["reference"])
