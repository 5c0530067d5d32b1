"""The output layer of the language model that a scalar model started from, which it loses with its fresh head.

A reward model that is also taught to predict the chosen responses needs it while it is trained (Zheng et al. 2023,
"Secrets of RLHF in Large Language Models Part I: PPO"). Nobody needs it afterwards, so it is in checkpoints and in no
export.

Notation: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_lightning.errors import UserError
from rlhf_lightning.forward.output_layer import inside_layer, is_tied, logit_scaling
from rlhf_lightning.functional import LogitScaling, linear_token_logprobs
from rlhf_lightning.models.causal_lm import load_causal_lm
from rlhf_lightning.models.finetune_settings import FineTune
from rlhf_lightning.models.scalar_lm import has_reward_head
from rlhf_lightning.training.sharded import full_shape, kind_of, widen_now


class LanguageHead(nn.Module):
    """Predicts tokens from hidden states as the language model does.

    Args:
        layer: its output layer.
        scaling: what becomes of the products.
        is_tied: the layer's weight is that of the input embeddings.
    """

    def __init__(self, layer: nn.Linear, scaling: LogitScaling, is_tied: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self.scaling = scaling
        self.is_tied = is_tied
        self.vocab_size = full_shape(layer.weight)[0]

    def stand_beside(self, model: PreTrainedModel, finetune: FineTune) -> None:
        """Share the weights of a scalar model, where they are tied, and choose what is trained of one's own.

        That is as in a language model (`finetune.choose_trained`): with `last_layer` an output layer is trained unless
        it is tied, with `lora` it stays as it is.

        Args:
            model: on the language model's backbone, its input embeddings as they will stay.
            finetune: what to train.
        """
        self.requires_grad_(finetune.mode == "all" or (finetune.mode == "last_layer" and not self.is_tied))
        if self.is_tied:
            embeddings: Any = model.get_input_embeddings()
            self.layer.weight = embeddings.weight
        elif finetune.mode == "lora":
            widen_now(self.layer)  # what is not trained will not be sharded either

    def forward(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """Log-probabilities of tokens in nats, `[N]`, without the logits of all of them at once.

        Args:
            hidden: the hidden states from which the tokens are predicted, `[N, D]`.
            token_ids: `[N]`, int64.
        """

        def fused(layer: nn.Linear, rows: Tensor) -> Tensor:
            # Embeddings that a pad token was added to have a row more than the language model can say.
            weight = layer.weight if len(layer.weight) == self.vocab_size else layer.weight[: self.vocab_size]
            return linear_token_logprobs(rows, weight, layer.bias, token_ids, self.scaling)[0]

        logprobs: Tensor = inside_layer(self.layer, fused, hidden)
        return logprobs


def load_language_head(name_or_path: str | os.PathLike[str], trust_remote_code: bool = False) -> LanguageHead:
    """The output layer of a language model, which is loaded whole, and let go of but for this layer.

    Args:
        name_or_path: folder or hub id of a language model, or folder of its adapter.
        trust_remote_code: allow the folder to run Python code of its own.

    Raises:
        UserError: there is no language model at that place, or its output layer is not a linear one.
    """
    if has_reward_head(name_or_path):
        raise UserError(
            f"lm_coef needs the output layer of a language model, and '{name_or_path}' is a reward model: start from "
            "the language model, or set lm_coef to 0"
        )
    model: Any = load_causal_lm(name_or_path, trust_remote_code=trust_remote_code)
    output: Any = model.get_output_embeddings()
    if kind_of(output) is not nn.Linear:  # or there is none
        raise UserError(
            f"lm_coef needs a linear output layer, which {type(model).__name__} of '{name_or_path}' has not: set "
            "lm_coef to 0"
        )
    return LanguageHead(output, logit_scaling(model), is_tied(model, output))
