"""What vLLM is asked, and what is made of what it says; without vLLM itself, which `make test-vllm` asks."""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.answers import model_of
from helpers.models import table_tokenizer
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning import VLLMEngine, VLLMServer
from rlhf_lightning.chat.text_so_far import decode_response
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine_weights import PolicyWeights
from rlhf_lightning.generation.sampling import Sampling
from rlhf_lightning.generation.vllm_requests import Reply, generation_of, requests_of, sampling_fields
from rlhf_lightning.models.finetune_settings import FineTune
from rlhf_lightning.models.lora import add_adapter, lora_layers

IDS = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
MASK = torch.tensor([[False, False, True, True], [True, True, True, True]])
CPU = torch.device("cpu")


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_each_prompt_is_asked_without_its_padding_and_with_its_own_seed():
    asked = requests_of(IDS, MASK, generators(3, 4), longest=4, context=8)
    assert asked == [([5, 6], 3), ([7, 8, 9, 10], 4)]
    swapped = requests_of(IDS.flip(0), MASK.flip(0), generators(4, 3), longest=4, context=None)
    assert swapped == asked[::-1]


def test_one_generator_gives_each_prompt_another_seed():
    first, second = (requests_of(IDS, MASK, *generators(seed), longest=4, context=8) for seed in (1, 1))
    assert first == second != requests_of(IDS, MASK, *generators(2), longest=4, context=8)
    assert first[0].seed != first[1].seed
    assert all(0 <= request.seed < 2**63 for request in first)


def test_a_prompt_that_leaves_no_room_is_refused():
    with pytest.raises(UserError, match="a prompt of 4 tokens and a response of 5 need more than the 8 tokens"):
        requests_of(IDS, MASK, None, longest=5, context=8)


def test_the_settings_are_those_of_the_run_and_the_ends_those_of_every_engine():
    model = model_of("llama-grouped")
    model.generation_config.update(eos_token_id=[2, 9], temperature=0.1)
    sampling = Sampling(temperature=0.7, top_k=5, top_p=0.9, max_new_tokens=6, min_new_tokens=2, stop_strings=["x"])
    assert sampling_fields(sampling, model, tiny_tokenizer()) == {
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 0.9,
        "max_tokens": 6,
        "min_tokens": 2,
        "stop": ["x"],
        "stop_token_ids": [tiny_tokenizer().eos_token_id, *{2, 9} - {tiny_tokenizer().eos_token_id}],
        "ignore_eos": True,
        "logprobs": 0,
    }


@pytest.mark.parametrize("temperature", [1e-3, 2.5])
def test_a_temperature_that_vllm_would_change_is_refused(temperature):
    with pytest.raises(UserError, match=f"sampling.temperature is {temperature:g}"):
        sampling_fields(Sampling(temperature=temperature), model_of("llama-grouped"), tiny_tokenizer())


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=4), st.sampled_from("abc"))
def test_a_reply_ends_with_the_first_token_that_completes_a_stop_string(rows, stop):
    tokenizer = table_tokenizer()
    replies = [Reply(ids, [-0.5 * (i + 1) for i in range(len(ids))], stopped=False) for ids in rows]
    found = generation_of(replies, Sampling(max_new_tokens=6, stop_strings=[stop]), tokenizer, CPU)
    for row, ids in enumerate(rows):
        length = int(found.response_mask[row].sum())
        said = found.response_ids[row, :length].tolist()
        assert said == ids[:length]
        assert stop not in decode_response(tokenizer, said[:-1])
        assert bool(found.ended[row]) == (stop in decode_response(tokenizer, ids))
        assert length == len(ids) or found.ended[row]
        assert found.sampler_logprobs[row].tolist()[:length] == replies[row].logprobs[:length]
        assert not found.sampler_logprobs[row, length:].any()


@pytest.mark.parametrize("lora", ["adapters", "merged"])
def test_the_base_below_adapters_is_sent_or_the_merged_weights(lora):
    model = model_of("llama-grouped")
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_adapter(model, FineTune("lora", rank=2))
    for _, layer in lora_layers(model):
        layer.lora_B["default"].weight.data.fill_(0.1)
    weights = PolicyWeights(model, lora)
    sent = {name: tensor.clone() for name, tensor in weights.tensors()}
    assert sent.keys() == plain.keys()
    changed = {name for name, tensor in sent.items() if not torch.equal(tensor, plain[name])}
    adapted = {f"{name}.weight" for name, _ in lora_layers(model)}
    assert changed == (adapted if lora == "merged" else set())
    assert weights.adapters == (lora == "adapters")
    assert weights.rank == 2


def test_what_engines_do_not_serve_is_merged():
    model = model_of("llama-grouped")
    add_adapter(model, FineTune("lora", rank=2, use_dora=True))
    assert not PolicyWeights(model, "adapters").adapters


def test_weights_in_four_bits_are_refused():
    model = model_of("llama-grouped")
    model.lm_head.weight.quant_state = "nf4"
    with pytest.raises(UserError, match="takes none in four bits; leave frozen_dtype at auto"):
        PolicyWeights(model, "adapters")


def test_without_vllm_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"pip install 'rlhf-lightning\[vllm\]'") as error:
        VLLMEngine(model_of("llama-grouped"), tiny_tokenizer())
    assert "\n" not in str(error.value)


def test_arguments_that_the_engine_sets_itself_are_refused():
    with pytest.raises(UserError, match=r"engine.options sets load_format, which the engine sets itself"):
        VLLMEngine(model_of("llama-grouped"), tiny_tokenizer(), options={"load_format": "auto"})
    with pytest.raises(UserError, match=r"engine.url 'localhost' is none; write one such as http://127.0.0.1:8000"):
        VLLMServer(model_of("llama-grouped"), tiny_tokenizer(), url="localhost")


@pytest.fixture
def guarded_server():
    """The address of a server that serves a model to whoever has the key."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.headers["Authorization"] == "Bearer sesame"
            said = {"data": [{"id": "policy", "max_model_len": 7}]} if known else {"error": "Unauthorized"}
            self.send_response(200 if known else 401)
            self.end_headers()
            self.wfile.write(json.dumps(said).encode())

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_server_is_given_the_key_of_the_environment(guarded_server, monkeypatch):
    model, tokenizer = model_of("llama-grouped"), tiny_tokenizer()
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    assert VLLMServer(model, tokenizer, url=guarded_server).context == 7
    monkeypatch.delenv("VLLM_API_KEY")
    with pytest.raises(UserError, match=r"refuses /v1/models \(401: .*; set VLLM_API_KEY to the key that the server"):
        VLLMServer(model, tokenizer, url=guarded_server)
