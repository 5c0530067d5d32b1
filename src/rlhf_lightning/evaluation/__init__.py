"""Whether it worked: models asked and answers judged outside of training."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_lightning.evaluation.judge import Judge as Judge
    from rlhf_lightning.evaluation.policy import Answer as Answer
    from rlhf_lightning.evaluation.policy import Policy as Policy

_HOME_OF = {"Answer": "policy", "Judge": "judge", "Policy": "policy"}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: a report reads results, for which it need not load torch."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'rlhf_lightning.evaluation' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(f"rlhf_lightning.evaluation.{_HOME_OF[name]}"), name)
    return value
