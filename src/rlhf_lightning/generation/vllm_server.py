"""Answers from a vLLM server: on other GPUs than training's, on this machine or another.

All processes ask the same server. Weights go there through a folder that both sides see, which the first process
writes, weight by weight, and the server reads. Start it with what the policy starts from::

    VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --logprobs-mode processed_logprobs

and, for a policy with LoRA, `--enable-lora --max-lora-rank RANK`. In that mode whoever reaches the server may change
it, so keep it on the loopback or behind a firewall: vLLM asks for its API key under `/v1` alone. That key is taken from
the environment variable `VLLM_API_KEY` here, too.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.arguments import AT_LEAST_1, POSITIVE, check_arguments
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import Generation, RolloutEngine
from rlhf_lightning.generation.engine_weights import PolicyWeights, SentLora
from rlhf_lightning.generation.sampling import RandomSource, Sampling
from rlhf_lightning.generation.vllm_requests import Reply, Request, generation_of, requests_of, sampling_fields

API_KEY = "VLLM_API_KEY"
"""Environment variable of the key, under vLLM's own name for it."""

_ADVICE = {
    "/collective_rpc": "start it with VLLM_SERVER_DEV_MODE=1",
    "/reset_prefix_cache": "start it with VLLM_SERVER_DEV_MODE=1",
    "/v1/load_lora_adapter": "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora",
}


class VLLMServer(RolloutEngine):
    """Answers prompts with a vLLM server, which is started apart; see the text of this module for how.

    Args:
        model: the policy.
        tokenizer: the policy's.
        batch_size: requests of this process at once; None for 64.
        url: of the server, without `/v1`.
        folder: where weights are written for the server to read; None for a temporary folder of this machine.
        lora: `adapters` sends the adapters of a policy with LoRA after an update, `merged` all weights with the
            adapters added.
        timeout: seconds for one request.

    Raises:
        UserError: no server answers there.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int | None = None,
        url: str = "http://127.0.0.1:8000",
        folder: str | None = None,
        lora: SentLora = "adapters",
        timeout: float = 600.0,
    ) -> None:
        check_arguments(VLLMServer, locals(), {"batch_size": AT_LEAST_1, "timeout": POSITIVE}, "engine.")
        if not re.fullmatch(r"https?://[^\s/@?#]+", url.rstrip("/")):
            raise UserError(f"engine.url '{url}' is none; write one such as http://127.0.0.1:8000")
        self.model = model
        self.tokenizer = tokenizer
        self.url = url.rstrip("/")
        self.timeout = timeout
        self._parallel = batch_size or 64
        self._weights = PolicyWeights(model, lora)
        self._temporary = tempfile.TemporaryDirectory(prefix="rlhf-vllm-", dir=folder and os.path.expanduser(folder))
        self._sent = 0  # times that weights were sent
        self._changed = True
        (served, *_) = self._get("/v1/models")["data"]
        self._served, self.context = served["id"], served.get("max_model_len")

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
        if self._changed:
            with torch.inference_mode(False), torch.no_grad():
                self._send_weights()
        name = self._adapter if self._weights.adapters else self._served
        fields |= {"model": name, "return_token_ids": True, "add_special_tokens": False}
        replies: list[Reply] = [Reply([], [], False)] * len(asked)
        with ThreadPoolExecutor(self._parallel, thread_name_prefix="vllm") as pool:
            rows = {pool.submit(self._ask, request, fields): row for row, request in enumerate(asked)}
            try:
                for done, future in enumerate(as_completed(rows), 1):
                    replies[rows[future]] = future.result()
                    before, now = (sampling.max_new_tokens * n // len(asked) for n in (done - 1, done))
                    if on_token is not None and now > before:
                        on_token(now)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return generation_of(replies, sampling, self.tokenizer, prompt_ids.device)

    def sync_weights(self) -> None:
        """Send the policy's weights before the next answer."""
        self._changed = True

    @property
    def _adapter(self) -> str:
        return f"policy-{self._sent}"

    def _send_weights(self) -> None:
        """Write them, let the server read them, and wait until it has; every process takes part."""
        self._sent += 1
        first = not dist.is_initialized() or dist.get_rank() == 0
        if not self._weights.adapters or self._sent == 1:
            folder = self._write(first, base=self._weights.adapters)
            if first:
                self._post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
                shutil.rmtree(folder)
        if self._weights.adapters:
            folder = self._write(first)
            if first:
                self._post("/v1/load_lora_adapter", {"lora_name": self._adapter, "lora_path": str(folder)})
                if self._sent > 1:
                    self._post("/v1/unload_lora_adapter", {"lora_name": f"policy-{self._sent - 1}"})
                    shutil.rmtree(folder.with_name(f"sent-{self._sent - 1}"))
        if first and not self._post("/reset_prefix_cache", {})["success"]:  # keys and values of the old weights
            raise UserError(
                f"the vLLM server at {self.url} is busy with others' requests; give training one of its own"
            )
        if dist.is_initialized():
            dist.barrier()
        self._changed = False

    def _write(self, first: bool, base: bool = False) -> Path:
        folder = Path(self._temporary.name) / f"{'base' if base else 'sent'}-{self._sent}"
        self._weights.write(folder if first else None, self.tokenizer, base=base)
        return folder

    def _ask(self, request: Request, fields: dict[str, Any]) -> Reply:
        body = self._post("/v1/completions", {**fields, "prompt": request.prompt, "seed": request.seed})
        try:
            (choice,) = body["choices"]
            return Reply(choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"] == "stop")
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the server at {self.url} does not answer as vLLM 0.32 does: no {error}") from error

    def _get(self, path: str) -> Any:
        return self._open(urllib.request.Request(self.url + path), path)

    def _post(self, path: str, fields: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        return self._open(urllib.request.Request(self.url + path, json.dumps(fields).encode(), headers), path)

    def _open(self, request: urllib.request.Request, path: str) -> Any:
        """What the server says: JSON, or a text."""
        if key := os.environ.get(API_KEY):
            request.add_header("Authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                said = response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                detail = " ".join(error.read(500).decode(errors="replace").split())
            advice = f"; {_ADVICE[path]}" if error.code in (404, 405) and path in _ADVICE else ""
            if error.code in (401, 403):
                advice = f"; set {API_KEY} to the key that the server was started with"
            raise UserError(
                f"the vLLM server at {self.url} refuses {path} ({error.code}: {detail or error.reason}){advice}"
            ) from error
        except (OSError, http.client.HTTPException) as error:  # a timeout, too, is an OSError
            reason = getattr(error, "reason", None) or error or type(error).__name__
            raise UserError(
                f"no vLLM server answers at {self.url}{path} ({reason}); start one, or set engine.url"
            ) from error
        try:
            return json.loads(said)
        except ValueError:
            return said
