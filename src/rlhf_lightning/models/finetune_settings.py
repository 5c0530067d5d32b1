"""The settings behind `finetune:`: full fine-tuning, the last layer, or LoRA."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from rlhf_lightning.arguments import AT_LEAST_1, POSITIVE, SHARE_BELOW_1, check_arguments
from rlhf_lightning.errors import UserError


@dataclass(frozen=True)
class FineTune:
    """Which weights are trained.

    Args:
        mode: `all` trains every weight; `last_layer` the last transformer block, the final norm and the output layer;
            `lora` low-rank adapters beside frozen weights (Hu et al. 2021), and a reward model's head.
        rank: inner dimension of the adapters.
        alpha: the adapters' product is multiplied by alpha / rank.
        dropout: dropout in front of the adapters.
        target_modules: which layers get an adapter: `all-linear` for every linear layer but the output layer, a list of
            names such as [q_proj, v_proj], or a regular expression that matches whole names.
        target_parameters: which weights that are no layers get an adapter as well: the ends of their names, such as
            [experts.gate_up_proj, experts.down_proj] for the experts of a mixture, which are one weight together.
        use_dora: learn the magnitude of each row of a weight beside its direction (DoRA, Liu et al. 2024).
        use_rslora: multiply by alpha / sqrt(rank) instead (rsLoRA, Kalajdzievski 2023).
        export: `merged` exports a plain model, the adapters added to the weights; `adapter` only what was trained, as a
            PEFT folder that needs its base.

    Raises:
        UserError: a number is out of its range, or there would be no adapter to export.
    """

    mode: Literal["all", "last_layer", "lora"] = "all"
    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    target_parameters: list[str] = field(default_factory=list)
    use_dora: bool = False
    use_rslora: bool = False
    export: Literal["merged", "adapter"] = "merged"

    def __post_init__(self) -> None:
        ranges = {"rank": AT_LEAST_1, "alpha": POSITIVE, "dropout": SHARE_BELOW_1}
        check_arguments(FineTune, vars(self), ranges, "finetune.")
        if self.export == "adapter" and self.mode != "lora":
            raise UserError(f"finetune.export adapter needs finetune.mode lora, not {self.mode}: it makes no adapter")
        if not self.target_modules and not self.target_parameters:
            raise UserError("finetune.target_modules is empty; use all-linear or a list of layer names")
        if self.target_parameters and (self.use_dora or self.dropout):
            raise UserError("finetune.target_parameters can have neither use_dora nor dropout: set dropout to 0")
        if isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except re.error as e:
                raise UserError(
                    f"finetune.target_modules '{self.target_modules}' is not a regular expression: {e}"
                ) from e
