"""A vLLM server, a process of its own, keeps the contract of every engine, with all weights and with adapters."""

import os
import signal
import subprocess
import sys
import threading
from functools import partial

import pytest

import runs
from helpers.distributed import _free_port
from helpers.engine_contract import CONTRACT, ask, small
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.sampling import Sampling
from rlhf_lightning.generation.vllm_server import VLLMServer

READY = "Application startup complete"


class Server:
    """`vllm serve`, watched until it is ready, and ended with all its processes."""

    def __init__(self, model, *options):
        self.url = f"http://127.0.0.1:{(port := _free_port())}"
        allowed = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
        cheap = ("--enforce-eager", "--kv-cache-memory-bytes", str(2**24), "--dtype", "float32")
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(model),
            "--port",
            str(port),
        ]
        self.process = subprocess.Popen(
            [*command, "--logprobs-mode", "processed_logprobs", *cheap, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | allowed,
            start_new_session=True,
        )
        said = []
        for line in self.process.stdout:
            said.append(line)
            if READY in line:
                break
        else:
            pytest.fail("the server has ended: " + "".join(said[-20:]))
        threading.Thread(target=self.process.stdout.read, daemon=True).start()  # or the pipe would fill

    def end(self):
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    small(9).save_pretrained(folder)  # other weights than those that are sent
    tiny_tokenizer().save_pretrained(folder)
    server = Server(folder)
    yield server
    server.end()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return runs.models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def policy(models):
    server = Server(models["folder"], "--enable-lora", "--max-lora-rank", "8")
    yield server
    server.end()


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_a_server_keeps_the_contract(tiny, check):
    check(partial(VLLMServer, url=tiny.url))


@pytest.mark.parametrize("lora", [None, "adapters", "merged"])
def test_a_server_trains_as_an_engine_in_the_process(policy, models, lora):
    chosen = {} if lora is None else {"lora": lora}
    here = runs.run(**models, lora=lora is not None, engine=chosen)
    there = runs.run(**models, lora=lora is not None, make=partial(VLLMServer, url=policy.url, **chosen))
    assert there["said"] == here["said"]
    assert max(map(abs, there["metrics"]["train/mismatch_kl"])) < 1e-5


def test_no_server_is_one_line(models):
    with pytest.raises(
        UserError, match=r"no vLLM server answers at http://127.0.0.1:9/v1/models .*start one, or set engine.url"
    ) as error:
        VLLMServer(small(), tiny_tokenizer(), url="http://127.0.0.1:9")
    assert "\n" not in str(error.value)


def test_a_server_that_lacks_a_right_says_how_to_start_it(tiny):
    engine = VLLMServer(small(), tiny_tokenizer(), url=tiny.url)
    with pytest.raises(UserError, match=r"refuses /v1/load_lora_adapter .*--enable-lora"):
        engine._post("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/nowhere"})
    with pytest.raises(UserError, match=r"need more than the 64 tokens that vLLM takes"):
        ask(engine, Sampling(max_new_tokens=60))
