"""The page of `rlhf chat` on tiny models, served for as long as tests need it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers.stages import save_llama, save_reward_model
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.app.judgements import Judgements
from rlhf_lightning.app.models import Models
from rlhf_lightning.app.page import build_page, serve
from rlhf_lightning.generation.sampling import Sampling


def tiny_models(folder: Path) -> Models:
    """Two small models that write anything at all, and a reward model."""
    tokenizer = tiny_tokenizer(chat_template=True)
    one = save_llama(folder / "one", tokenizer)
    other = save_llama(folder / "other", tokenizer, hidden_size=16)
    return Models([one, other], save_reward_model(folder / "reward", one, tokenizer))


def free_port() -> int:
    """A port that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def served(models: Models, judgements: Judgements, **options: Any) -> Iterator[str]:
    """The page's address."""
    page = build_page(models, judgements, sampling=Sampling(temperature=1.0, max_new_tokens=24), **options)
    try:
        yield serve(page, port=free_port())
    finally:
        page.close(verbose=False)
