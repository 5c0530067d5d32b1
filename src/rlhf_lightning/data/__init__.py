"""Rows of text in, batches out: sources, the prepared tokens, and one LightningDataModule per kind of example."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_lightning.chat.plain import PlainFormat as PlainFormat
    from rlhf_lightning.data.instruction import InstructionDataModule as InstructionDataModule
    from rlhf_lightning.data.preference import PreferenceDataModule as PreferenceDataModule
    from rlhf_lightning.data.preparing.filters import Filters as Filters
    from rlhf_lightning.data.prompt import PromptDataModule as PromptDataModule
    from rlhf_lightning.data.rating import RatingDataModule as RatingDataModule
    from rlhf_lightning.data.sources import TLDR as TLDR
    from rlhf_lightning.data.sources import Blend as Blend
    from rlhf_lightning.data.sources import HelpfulHarmless as HelpfulHarmless
    from rlhf_lightning.data.sources import Source as Source
    from rlhf_lightning.data.sources import Table as Table

_HOMES = {
    "chat.plain": ("PlainFormat",),
    "data.preparing.filters": ("Filters",),
    "data.instruction": ("InstructionDataModule",),
    "data.preference": ("PreferenceDataModule",),
    "data.prompt": ("PromptDataModule",),
    "data.rating": ("RatingDataModule",),
    "data.sources": ("TLDR", "Blend", "HelpfulHarmless", "Source", "Table"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: a process that only tokenises need not wait for Lightning."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'rlhf_lightning.data' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(f"rlhf_lightning.{_HOME_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    """The public names too, although most are not imported yet."""
    return sorted({*globals(), *__all__})
