"""`rlhf chat` from the command line: what is refused before anything is served, in one line."""

from __future__ import annotations

import importlib.util
import json
import socket

import pytest

from helpers.stages import save_llama
from rlhf_lightning.cli.chat import PASSWORD, example_prompts
from rlhf_lightning.cli.main import main
from rlhf_lightning.errors import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*words):
        with pytest.raises(SystemExit) as left:
            main(["chat", *map(str, words)])
        assert left.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        return line

    return run


def test_others_are_let_in_only_by_name_and_password(refused, model, monkeypatch):
    assert "pass --user and --password too" in refused(model, "--host", "0.0.0.0")
    assert "pass --user and --password too" in refused(model, "--host", "127.example.com")
    assert "belong together" in refused(model, "--host", "0.0.0.0", "--user", "ann")
    assert "belong together" in refused(model, "--password", "secret")
    monkeypatch.setenv(PASSWORD, "")
    assert "belong together" in refused(model, "--user", "ann")


def test_a_port_in_use(refused, model):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot be served at 127.0.0.1:{port}" in refused(model, "--port", port)


def test_without_gradio_the_page_says_what_to_install(refused, model, monkeypatch, capsys):
    whole = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gradio" else whole(name, *rest)
    )
    assert "pip install rlhf-lightning[app]" in refused(model)
    monkeypatch.setattr("builtins.input", lambda prompt: "/quit")
    main(["chat", model, "--terminal"])
    assert "/help says what else there is" in capsys.readouterr().out


def test_other_bad_input(refused, model, tmp_path):
    (tmp_path / "text").write_text("no database " * 100)
    assert "does not exist" in refused("./nothing")
    assert "has no trained reward head" in refused(model, "--reward", model)
    assert "not a database" in refused(model, "--judgements", tmp_path / "text")
    assert "example_prompt.json" in refused(model, "--examples", tmp_path)
    assert "models" in refused()
    assert "temperature: expected float" in refused(model, "--temperature", "warm")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", "99999999"], "cannot be served at 127.0.0.1:99999999"),
        (["--examples", "nothing"], "example_prompt.json"),
        (["--prompts", "nothing.jsonl"], "nothing.jsonl"),
        (["--device", "gpu"], "--device gpu: write cpu, cuda or cuda:1"),
    ],
)
def test_what_is_refused_leaves_no_file(refused, model, tmp_path, words, said):
    assert said in refused(model, *words)
    assert not [*tmp_path.iterdir()]


def test_the_example_is_what_a_person_would_write(tmp_path):
    (tmp_path / "example_prompt.json").write_text(json.dumps({"prompt": "\n\nHuman: How?\n\nAssistant:"}))
    assert example_prompts(str(tmp_path)) == ["How?"]
    (tmp_path / "example_prompt.json").write_text("[]")
    with pytest.raises(UserError, match="holds no example_prompt"):
        example_prompts(str(tmp_path))
