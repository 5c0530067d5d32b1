"""bitsandbytes is imported only when four bits are asked for, and PEFT knows of it once it is there."""

import sys

import peft.import_utils
import pytest

from helpers.forked import forked_process
from helpers.lora import import_by_need
from helpers.models import save_folder, tiny_causal_lm
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.models.peft_library import without_bitsandbytes


def test_only_four_bits_import_it(tmp_path):
    folder = save_folder(tmp_path, tiny_causal_lm("llama"), tiny_tokenizer())
    process = forked_process(import_by_need, folder)  # which has imported nearly all else
    process.start()
    process.join(60)
    assert process.exitcode == 0


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
