"""Of configs and options stacked on each other the later ones win, whatever they hold."""

import pytest
import yaml

from rlhf_lightning.cli.main import main

CALLBACKS = """\
trainer:
  callbacks:
    - class_path: pytorch_lightning.callbacks.ModelCheckpoint
      init_args: {monitor: val/loss}
    - class_path: pytorch_lightning.callbacks.LearningRateMonitor
    - class_path: rlhf_lightning.HFExport
"""
LOGGERS = """\
trainer:
  logger:
    - class_path: pytorch_lightning.loggers.CSVLogger
      init_args: {save_dir: %s, name: %s}
"""
BLEND = """\
data:
  init_args:
    data:
      class_path: rlhf_lightning.Blend
      init_args:
        sources:
          - {class_path: rlhf_lightning.Table, init_args: {path: %s}}
"""


@pytest.fixture
def parsed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["rlhf"])

    def parse(*texts, options=(), command=("fit", "--config", "sft.yaml")):
        words = [*command]
        for number, text in enumerate(texts):
            (tmp_path / f"{number}.yaml").write_text(text)
            words += ["--config", f"{number}.yaml"]
        with pytest.raises(SystemExit) as end:
            main([*words, *options, "--print_config"])
        printed = capsys.readouterr()
        assert end.value.code == 0, printed.err
        return yaml.safe_load(printed.out)

    return parse


def described(callbacks):
    return [(c["class_path"].rpartition(".")[2], c["init_args"]) for c in callbacks]


def test_a_list_of_callbacks_replaces_an_earlier_one_whatever_its_length(parsed):
    alone = described(parsed(CALLBACKS)["trainer"]["callbacks"])
    for length in (1, 2, 3, 4):
        below = {
            "trainer": {"callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"save_last": True}}] * length}
        }
        assert described(parsed(yaml.safe_dump(below), CALLBACKS)["trainer"]["callbacks"]) == alone
    (checkpoint, _), (monitor, _), (export, _) = alone
    assert (checkpoint, monitor, export) == ("ModelCheckpoint", "LearningRateMonitor", "HFExport")
    assert alone[0][1]["save_last"] is None
    assert alone[0][1]["monitor"] == "val/loss"


def test_a_list_on_the_command_line_replaces_that_of_a_config(parsed):
    given = "[{class_path: ModelCheckpoint}, {class_path: LearningRateMonitor}, {class_path: rlhf_lightning.HFExport}]"
    for options in (["--trainer.callbacks", given], [f"--trainer.callbacks={given}"]):
        callbacks = described(parsed(CALLBACKS, options=options)["trainer"]["callbacks"])
        assert callbacks[0][1]["monitor"] is None


def test_so_do_lists_of_loggers_and_of_sources(parsed):
    loggers = parsed(
        LOGGERS % ("here", "mine"), "trainer: {logger: [{class_path: CSVLogger, init_args: {save_dir: x}}]}"
    )
    assert described(loggers["trainer"]["logger"])[0][1]["name"] == "lightning_logs"
    once, again = BLEND % "a.jsonl, columns: {prompt: q}", BLEND % "b.jsonl"
    for config in (
        parsed(once, again)["data"]["init_args"]["data"],
        parsed(
            *(yaml.safe_dump(yaml.safe_load(text)["data"]["init_args"]) for text in (once, again)),
            command=("prepare",),
            options=["--tokenizer=x", "--out=y"],
        )["data"],
    ):
        (source,) = config["init_args"]["sources"]
        assert source["init_args"]["path"] == "b.jsonl"
        assert not source["init_args"]["columns"]


def test_a_list_of_sources_on_the_command_line_replaces_that_of_a_config(parsed):
    given = "--data.data.init_args.sources=[{class_path: rlhf_lightning.Table, init_args: {path: b.jsonl}}]"
    (source,) = parsed(BLEND % "a.jsonl, columns: {prompt: q}", options=[given])["data"]["init_args"]["data"][
        "init_args"
    ]["sources"]
    assert source["init_args"]["path"] == "b.jsonl"
    assert not source["init_args"]["columns"]


def test_an_option_still_changes_one_setting_of_a_list_and_adds_to_it(parsed):
    changed = described(parsed(CALLBACKS, options=["--trainer.callbacks.dirpath=x"])["trainer"]["callbacks"])
    assert len(changed) == 3
    assert changed[2] == ("HFExport", changed[2][1] | {"dirpath": "x"})
    added = described(parsed(CALLBACKS, options=["--trainer.callbacks+=EarlyStopping"])["trainer"]["callbacks"])
    assert [name for name, _ in added[:3]] == [name for name, _ in changed]
    assert len(added) == 4
