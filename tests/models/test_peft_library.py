"""bitsandbytes is imported only when four bits are asked for, and PEFT knows of it once it is there."""

import subprocess
import sys

import peft.import_utils
import pytest

from helpers.models import save_folder, tiny_causal_lm
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.models.peft_library import without_bitsandbytes

SCRIPT = """
import sys
from rlhf_lightning import FineTune, PPOModule, SFTModule

module = SFTModule(sys.argv[1], finetune=FineTune(mode="lora", rank=2, use_dora=True))
module.configure_model()
assert "peft" in sys.modules
assert "bitsandbytes" not in sys.modules

import peft.import_utils
assert peft.import_utils.is_bnb_available()  # whoever asks from outside

from peft.tuners.lora.bnb import Linear4bit
adapter = FineTune(mode="lora", rank=2, export="adapter")
lengths = lambda prompts, responses: [len(response) for response in responses]
module = PPOModule(sys.argv[1], reward=lengths, frozen_dtype="nf4", finetune=adapter)
module.configure_model()
assert any(isinstance(layer, Linear4bit) for layer in module.policy.modules())
"""


def test_only_four_bits_import_it(tmp_path):
    folder = save_folder(tmp_path, tiny_causal_lm("llama"), tiny_tokenizer())
    done = subprocess.run([sys.executable, "-c", SCRIPT, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_peft_has_found_out_before_is_found_out_again(monkeypatch):
    assert peft.import_utils.is_bnb_4bit_available()
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    with without_bitsandbytes():
        assert not peft.import_utils.is_bnb_available()
        assert not peft.import_utils.is_bnb_4bit_available()
    assert "bitsandbytes" not in sys.modules
    assert peft.import_utils.is_bnb_available()


def test_it_is_found_again_also_after_an_error(monkeypatch):
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    with pytest.raises(KeyError), without_bitsandbytes():
        raise KeyError
    assert "bitsandbytes" not in sys.modules
