"""A model's folder holds what the model says of itself, whatever transformers thinks of it."""

import json

import pytest
from transformers import GenerationConfig

from helpers.answers import model_of
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.models.saving import whole_weights
from rlhf_lightning.models.written_folders import ModelFolder, write_configs


@pytest.fixture
def strict(monkeypatch):
    """Some releases refuse to save settings for sampling beside `do_sample: false`, as many models on the hub have."""

    def save(self, *args, **kwargs):
        if self.temperature is not None:
            raise ValueError("GenerationConfig is invalid")
        self.to_json_file(f"{args[0]}/generation_config.json")

    monkeypatch.setattr(GenerationConfig, "save_pretrained", save)


def test_a_generation_config_that_cannot_be_saved_is_written_all_the_same(strict, tmp_path):
    model = model_of("llama-grouped")
    model.generation_config.temperature = 0.1
    kept = model.generation_config
    folder = ModelFolder(model)
    folder.write(tmp_path, whole_weights(model, folder.groups), tiny_tokenizer())
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert written["temperature"] == 0.1
    assert written["eos_token_id"] == 2
    assert model.generation_config is kept


def test_configs_alone_say_nothing_of_generating(strict, tmp_path):
    model = model_of("llama-grouped")
    model.generation_config.temperature = 0.1
    write_configs(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json"}
