"""All that knows how Lightning's strategies differ, so that the modules need not.

Every stage uses manual optimisation: `training_step` splits its batch into micro-batches, and `GradientAccumulation`
turns them into one optimizer step whose gradient is that of the *sum* of all losses passed in, over all micro-batches
and ranks.

Left out: float16 (its loss scaler skips steps, which cannot be told from a loss gone wrong; use bfloat16).
"""

from rlhf_lightning.training.accumulation import GradientAccumulation as GradientAccumulation
from rlhf_lightning.training.accumulation import equally_many as equally_many
from rlhf_lightning.training.accumulation import forget_gradient as forget_gradient
from rlhf_lightning.training.accumulation import is_single_device as is_single_device
from rlhf_lightning.training.accumulation import sum_over_ranks as sum_over_ranks
from rlhf_lightning.training.accumulation import world_size as world_size
from rlhf_lightning.training.deepspeed import DeepSpeedStrategy as DeepSpeedStrategy
from rlhf_lightning.training.fsdp2 import FSDP2Strategy as FSDP2Strategy
from rlhf_lightning.training.ranks import gather_objects as gather_objects
from rlhf_lightning.training.ranks import rows_of_all_ranks as rows_of_all_ranks
from rlhf_lightning.training.rollouts import rollout_weights as rollout_weights
from rlhf_lightning.training.sharded import consolidated_state_dict as consolidated_state_dict
from rlhf_lightning.training.sharded import synced as synced
from rlhf_lightning.training.supported import check_parts_apart as check_parts_apart
from rlhf_lightning.training.supported import check_skipping as check_skipping
