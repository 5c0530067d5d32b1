"""Text in, batches out: one LightningDataModule per kind of example."""

from rlhf_lightning.data.instruction import InstructionDataModule
from rlhf_lightning.data.preference import PreferenceDataModule
from rlhf_lightning.data.prompt import PromptDataModule

__all__ = ["InstructionDataModule", "PreferenceDataModule", "PromptDataModule"]
