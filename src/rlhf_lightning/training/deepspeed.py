"""Lightning's DeepSpeed strategy, fixed where manual optimisation and Hugging Face models need it."""

import argparse
import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from lightning_fabric.utilities.seed import reset_seed
from pytorch_lightning.strategies import DeepSpeedStrategy as LightningDeepSpeedStrategy
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import nn

from rlhf_lightning.arguments import Range, check_arguments
from rlhf_lightning.errors import UserError
from rlhf_lightning.runs.checkpoint_files import PARTIAL, read_manifest, remove
from rlhf_lightning.training.build_locks import see_to_locks
from rlhf_lightning.training.checkpoint_folders import agree, check_together, finish_together, plain_loading, together
from rlhf_lightning.training.deepspeed_memory import fitted_sizes, share_master_weights
from rlhf_lightning.training.host_memory import free_at_once
from rlhf_lightning.training.optim import clip_value
from rlhf_lightning.training.resharding import cutting


class DeepSpeedStrategy(LightningDeepSpeedStrategy):
    """Lightning's DeepSpeed strategy, made right for manual optimisation and for Hugging Face models.

    Differences to `pytorch_lightning.strategies.DeepSpeedStrategy`:

    * it also runs on CPU (over gloo), every ZeRO stage, on as many processes as `devices` says;
    * gradients are clipped to the module's attribute `gradient_clip_val`, because DeepSpeed clips by its own
      configuration only;
    * `from_pretrained` inside `configure_model` works under ZeRO-3: each process keeps only its part of the weights;
    * frozen weights are left out of checkpoints, so the module needs `strict_loading = False` to resume;
    * a checkpoint folder is written beside its place and renamed when it is whole, with a manifest that is compared
      when it is loaded; and nothing in it is unpickled but tensors, plain values and DeepSpeed's own three classes.

    Any `torch.optim` optimizer is accepted, also with offload, where DeepSpeed's own `DeepSpeedCPUAdam` is faster. To
    train on the CPU of a machine that has a GPU, set the environment variable `DS_ACCELERATOR=cpu`.

    Args:
        stage: what is split over the processes: 0 nothing, 1 optimizer state, 2 gradients too, 3 weights too.
        offload_optimizer: keep the optimizer's state in CPU memory.
        offload_parameters: keep the weights in CPU memory; stage 3 only.
        exclude_frozen_parameters: leave frozen weights out of checkpoints.
        logging_level: what DeepSpeed itself may log, as in `logging`; its warnings are about choices made here.
        gradient_dtype: in which gradients are summed, over micro-batches and processes, when the precision is bfloat16.
            `auto` is `float32` where a step may be made of several micro-batches; it takes two bytes more per trained
            weight (on ZeRO-1 of all of them on each process) and twice the traffic.
        **kwargs: everything else `pytorch_lightning.strategies.DeepSpeedStrategy` takes.

    Raises:
        UserError: DeepSpeed is not installed; or, when the run starts, `config` clips gradients to another value than
            the module, or ZeRO is off and gradients are to be summed in another type than that of the weights.
    """

    def __init__(
        self,
        stage: int = 2,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        exclude_frozen_parameters: bool = True,
        logging_level: int = logging.ERROR,
        gradient_dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        **kwargs: Any,
    ) -> None:
        check_arguments(DeepSpeedStrategy, locals(), {"stage": Range(at_least=0, at_most=3)})
        if find_spec("deepspeed") is None:
            raise UserError("DeepSpeedStrategy needs DeepSpeed (Linux): pip install 'rlhf-lightning[deepspeed]'")
        super().__init__(
            stage=stage,
            offload_optimizer=offload_optimizer,
            offload_parameters=offload_parameters,
            exclude_frozen_parameters=exclude_frozen_parameters,
            logging_level=logging_level,
            **kwargs,
        )
        self.gradient_dtype = gradient_dtype
        self._hf_config: Any = None
        # Of a config that the user has written all sizes are his; otherwise those that were not given are Lightning's.
        written = kwargs.get("config") or os.environ.get(self.DEEPSPEED_ENV_VAR)
        zero = {} if written or self.config is None else self.config.get("zero_optimization", {})
        self._default_sizes = {name: value for name, value in zero.items() if name not in kwargs}

    def setup_environment(self) -> None:
        """Start the process group; unlike the parent, on any accelerator."""
        if self.local_rank == 0:
            see_to_locks()  # before the others have met this process
        super(LightningDeepSpeedStrategy, self).setup_environment()
        if self.zero_stage_3:
            free_at_once(True)

    def setup_distributed(self) -> None:
        """Join the process group; the parent also checks CUDA device numbers, which CPUs lack."""
        if self.root_device.type == "cuda":
            super().setup_distributed()
            return
        reset_seed()
        self.set_world_ranks()
        _leave_out_kernel()
        self._init_deepspeed_distributed()

    def teardown(self) -> None:
        """Let go of the configuration that makes `from_pretrained` split weights, then tear down."""
        self._hf_config = None
        super().teardown()
        if self.zero_stage_3:
            free_at_once(False)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a folder in the place of the one that is there, which stays until then. Every process must call it."""
        path = Path(self.broadcast(filepath))
        partial = path.with_name(path.name + PARTIAL)
        if self.is_global_zero:
            remove(partial)
        self.barrier()
        super().save_checkpoint(checkpoint, str(partial), storage_options)
        finish_together(partial, path, self._settings())

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a folder that is whole, on all processes that of the first one.

        Args:
            checkpoint_path: of the folder.
            weights_only: taken for True, whatever it is.

        Raises:
            UserError: the folder is not whole, holds what could run code, or was saved with other settings.
        """
        if self.load_full_weights and self.zero_stage_3:
            return super().load_checkpoint(checkpoint_path, weights_only=True)
        path = Path(self.broadcast(checkpoint_path))
        assert self.lightning_module is not None
        fits = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        wanted = self._settings()
        del wanted["processes"]
        check_together(path, wanted if fits else None)
        if self.zero_stage_3 and not fits:
            # DeepSpeed asks for it without an optimizer, too, where there are no float32 copies to renew.
            self.deepspeed_engine.optimizer._restore_from_bit16_weights = lambda: None
        with plain_loading():
            cut = cutting(path, self.deepspeed_engine, read_manifest(path)["settings"]["processes"], fits)
            if cut is None:
                return super().load_checkpoint(path, weights_only=True)
            rank_zero_info(f"'{path}' was saved by another number of processes: it is cut anew for {self.world_size}")
            partial = path.with_name(path.name + PARTIAL)
            with together(partial):
                agree(lambda: cut(partial))
                return super().load_checkpoint(partial, weights_only=True)

    def _settings(self) -> dict[str, Any]:
        """What decides which files a checkpoint consists of."""
        assert isinstance(self.config, dict)
        stage = self.config.get("zero_optimization", {}).get("stage", 0)
        precision = "bf16" if self.config.get("bf16", {}).get("enabled") else "32"
        return {"ZeRO stage": stage, "processes": self.world_size, "precision": precision}

    def _init_config_if_needed(self) -> None:
        super()._init_config_if_needed()
        if self.zero_stage_3 and self._hf_config is None:
            from transformers.integrations import HfDeepSpeedConfig

            # transformers keeps a weak reference: from_pretrained splits weights only while this object lives.
            self._hf_config = HfDeepSpeedConfig(self.config)

    def _format_config(self) -> None:
        assert isinstance(self.config, dict)
        # Only DeepSpeed's throughput log reads it; the parent would ask the loader's batch sampler, which may lack it.
        self.config.setdefault("train_micro_batch_size_per_gpu", 1)
        # With offload DeepSpeed insists on its own CPU optimizers, which need a compiler; let any optimizer through.
        self.config.setdefault("zero_force_ds_cpu_optimizer", False)
        clip = clip_value(self.lightning_module)
        if clip is not None:
            configured = self.config.setdefault("gradient_clipping", clip)
            if configured != clip:
                raise UserError(
                    f"gradient_clipping is {configured} in the DeepSpeed config but gradient_clip_val is {clip} "
                    "in the module: remove gradient_clipping from the DeepSpeed config."
                )
        super()._format_config()
        self._set_gradient_dtype()

    def _set_gradient_dtype(self) -> None:
        assert isinstance(self.config, dict)
        if not self.config.get("bf16", {}).get("enabled"):
            return
        stage = self.config.get("zero_optimization", {}).get("stage", 0)
        wanted = self.gradient_dtype
        if wanted == "auto":
            wanted = "float32" if stage > 0 and _accumulates(self.lightning_module) else "bfloat16"
        if wanted == "float32":
            if stage == 0:
                raise UserError("gradient_dtype float32 needs ZeRO: set stage to 1, 2 or 3, or use the strategy ddp")
            self.config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
            self.config.setdefault("communication_data_type", "fp32")
        if stage == 1 and self.config.get("data_types", {}).get("grad_accum_dtype") == "fp32":
            # Without it each micro-batch's gradient is added again with all that come after it.
            self.config["bf16"]["immediate_grad_update"] = True

    def _setup_model_and_optimizer(self, model: nn.Module, optimizer: Any, lr_scheduler: Any = None) -> tuple[Any, Any]:
        trained = [p for p in model.parameters() if p.requires_grad]
        return self._deepspeed_initialize(
            config=self.config, model=model, model_parameters=trained, optimizer=optimizer, lr_scheduler=lr_scheduler
        )

    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        from pytorch_lightning.strategies.deepspeed import remove_module_hooks

        assert isinstance(self.config, dict)
        kept = ["bf16", "fp16", *(["zero_allow_untested_optimizer", "zero_optimization"] if self.zero_stage_3 else [])]
        config = {key: self.config[key] for key in kept if key in self.config}
        remove_module_hooks(model)  # those of an earlier engine
        self.model, _ = self._deepspeed_initialize(config={"train_micro_batch_size_per_gpu": 1, **config}, model=model)

    def _deepspeed_initialize(self, **kwargs: Any) -> tuple[Any, Any]:
        import deepspeed

        device_index = self.root_device.index  # CPUs have none
        arguments = argparse.Namespace(device_rank=self.local_rank if device_index is None else device_index)
        zero = kwargs["config"].get("zero_optimization")
        if zero is not None:
            chosen = {name: value for name, value in zero.items() if self._default_sizes.get(name) != value}
            sizes = fitted_sizes(chosen, kwargs["model"].parameters(), self.world_size)
            zero |= sizes
            self._default_sizes |= sizes
        engine, optimizer, _, _ = deepspeed.initialize(args=arguments, dist_init_required=False, **kwargs)
        share_master_weights(engine)
        return engine, optimizer


def _accumulates(module: Any) -> bool:
    """Whether a step may be made of several micro-batches; of a module that does not say so, it is taken to be."""
    return any(getattr(module, name, 1) is not None for name in ("micro_batch_size", "max_tokens_per_batch"))


def _leave_out_kernel() -> None:
    """Keep DeepSpeed from compiling its all-reduce for CPUs: it takes minutes, and only inference engines call it."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
