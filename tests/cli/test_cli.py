"""The command line's own behaviour: what it prints, what it finds, what wins, what stays out of the way."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.demos.boring_classes import BoringModel
from pytorch_lightning.utilities import rank_zero_info
from transformers import AutoModelForCausalLM

import rlhf_lightning
from helpers.cli_runs import SFT, save_model, save_pairs, short
from helpers.stages import save_reward_model
from rlhf_lightning.callbacks import ShortSummary, StageProgressBar
from rlhf_lightning.cli.main import main
from rlhf_lightning.cli.recipes import recipe_names, resolve_recipes


@pytest.fixture(autouse=True)
def _own_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["rlhf"])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "lm")
    save_pairs(folder / "pairs.jsonl")
    return folder


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, for copies."""
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sys.argv", ["rlhf"])
        main(["fit", *SFT, *short(inputs / "lm", inputs / "pairs.jsonl", root)])
    return root


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What would have been trained; nothing is."""
    seen: dict[str, Any] = {}

    def note(trainer: Any, fn: Any, module: Any, train: Any, val: Any, data: Any, *_: Any) -> None:
        seen.update(module=module, data=data)

    monkeypatch.setattr("pytorch_lightning.trainer.call._call_and_handle_interrupt", note)
    return seen


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"], ["help"]])
def test_the_overview_names_every_command_and_recipe(capsys, args):
    main(args)
    out = capsys.readouterr().out
    for word in ("quickstart", "fit", "validate", "test", "predict", *recipe_names()):
        assert f"\n  {word}" in out
    assert max(len(line) for line in out.splitlines()) <= 120


def test_the_version_is_printed(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"rlhf-lightning {rlhf_lightning.__version__}\n"


def test_what_needs_no_model_imports_no_torch():
    code = (
        "import sys; from rlhf_lightning.cli.main import main\n"
        "sft = ['fit', '--config', 'sft.yaml']\n"
        "words = ['--help'], ['ift'], ['fit', '--config', 'nope.yaml'], [*sft, '--help'], [*sft, '--model.lr=3']\n"
        "for args in words:\n"
        "    try: main(args)\n"
        "    except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'pytorch_lightning'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_what_a_command_imports_is_no_garbage_to_look_through_and_collections_go_on():
    main(["env"])
    assert gc.isenabled()
    assert gc.get_freeze_count() > 10_000
    frozen = gc.get_freeze_count()
    main(["env"])
    assert gc.get_freeze_count() <= frozen  # what a caller makes between commands can be collected


def test_every_public_name_is_there_and_no_other():
    for name in rlhf_lightning.__all__:
        assert getattr(rlhf_lightning, name).__name__ == name
        assert name in dir(rlhf_lightning)
    with pytest.raises(AttributeError, match="has no attribute 'TRLModule'"):
        rlhf_lightning.TRLModule  # noqa: B018


def test_a_recipe_in_the_working_folder_comes_before_that_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (packaged,) = resolve_recipes(["--config", "sft.yaml"])
    assert Path(packaged.removeprefix("--config=")).is_absolute()
    (tmp_path / "sft.yaml").write_text("seed_everything: 7\n")
    assert resolve_recipes(["--config", "sft.yaml"]) == ["--config=sft.yaml"]


def test_options_win_over_configs_wherever_they_stand(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--model.sampling.top_k", "5", "-c", "sft.yaml", "--config=trainer/ddp.yaml", "--print_config"])
    parsed = yaml.safe_load(capsys.readouterr().out)
    assert parsed["model"]["init_args"]["sampling"]["top_k"] == 5
    assert parsed["trainer"]["strategy"] == "ddp"


@pytest.mark.parametrize(
    ("module", "data", "options", "betas"),
    [
        ("SFTModule", "InstructionDataModule", [], [0.9, 0.95]),
        ("RewardModule", "PreferenceDataModule", [], [0.9, 0.95]),
        ("PPOModule", "PromptDataModule", ["--model.reward=builtins.len"], [0.9, 0.999]),
    ],
)
def test_a_config_that_names_no_optimizer_can_be_read_again(tmp_path, capsys, module, data, options, betas):
    def printed(*words):
        with pytest.raises(SystemExit) as end:
            main(["fit", *words, "--print_config"])
        assert not end.value.code
        return capsys.readouterr().out

    classes = [f"--model=rlhf_lightning.{module}", f"--data=rlhf_lightning.{data}", "--data.data=rows.jsonl"]
    first = printed(*classes, "--model.model_name_or_path=lm", "--model.optimizer.lr=3e-4", *options)
    (tmp_path / "config.yaml").write_text(first)

    assert printed(f"--config={tmp_path / 'config.yaml'}") == first
    optimizer = yaml.safe_load(first)["model"]["init_args"]["optimizer"]
    assert optimizer["class_path"] == "torch.optim.AdamW"
    assert (optimizer["init_args"]["lr"], optimizer["init_args"]["betas"]) == (3e-4, betas)


def test_help_documents_every_argument_with_the_values_of_the_recipe(capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "ppo.yaml", "--help_all"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    text = " ".join(out.split())
    assert "--model.rollout_batch_size ROLLOUT_BATCH_SIZE prompts answered per iteration, by all processes" in text
    assert "--model.sampling.top_p TOP_P sample among the most likely tokens" in text
    assert "--model.kl.coef COEF weight per nat" in text
    assert "--model.score.clip CLIP" in text
    assert "--model.objective.gae_lambda GAE_LAMBDA weight between one-step" in text
    assert "a response is cut here if it has not ended. (type: int, default: 48)" in text
    assert "--data.max_prompt_length" in text
    assert "default: 256" in text
    assert "--trainer.max_steps" in text
    assert "<function" not in text.partition("usage: rlhf fit")[0]
    assert "--data.tokenizer" not in text
    assert "--data.rollout_batch_size" not in text


def test_the_model_and_the_rollout_size_are_named_once(inputs, tmp_path, started):
    data = [f"--data.data={inputs / 'pairs.jsonl'}", f"--trainer.default_root_dir={tmp_path}"]
    reward = save_reward_model(tmp_path / "reward", str(inputs / "lm"))
    models = [f"--model.model_name_or_path={inputs / 'lm'}", f"--model.reward={reward}"]
    sizes = ["--model.rollout_batch_size=6", "--model.minibatch_size=3", "--model.micro_batch_size=1"]
    limits = ["--trainer.accelerator=cpu", "--data.max_prompt_length=48"]
    main(["fit", "--config=ppo.yaml", *models, *sizes, *data, *limits])
    assert started["module"].rollout_batch_size == started["data"].batch_size == 6
    started["data"].setup("fit")
    assert started["data"].tokenizer.name_or_path == str(inputs / "lm")


def test_processes_of_a_strategy_get_the_words_that_were_typed(inputs, tmp_path, monkeypatch, started):
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/rlhf"])
    options = short(inputs / "lm", inputs / "pairs.jsonl", tmp_path)
    main(["fit", *SFT, *options])
    assert sys.argv[:2] == ["/somewhere/bin/rlhf", "fit"]
    assert sys.argv[3:] == [*SFT[1:], *options]


def test_settings_come_from_the_command_line_when_a_run_resumes(inputs, tmp_path, started):
    options = short(inputs / "lm", inputs / "pairs.jsonl", tmp_path)
    checkpoint = tmp_path / "last.ckpt"
    hyper_parameters = {"micro_batch_size": 4, "_class_path": "rlhf_lightning.SFTModule"}
    parts = {key: {} for key in ("state_dict", "loops", "optimizer_states", "lr_schedulers")}
    torch.save({"pytorch-lightning_version": "2.6.6", "hyper_parameters": hyper_parameters, **parts}, checkpoint)
    main(["fit", *SFT, *options, f"--ckpt_path={checkpoint}", "--model.micro_batch_size=2"])
    assert started["module"].micro_batch_size == 2


def test_overwrite_starts_anew_and_removes_what_the_earlier_run_left(inputs, finished, tmp_path):
    options = short(inputs / "lm", inputs / "pairs.jsonl", tmp_path)
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints" / "step=900.ckpt").write_bytes(b"of the earlier run")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "evaluation.json").write_text("{}")  # of weights that are replaced; the report would show it
    main(["fit", *SFT, *options, "--overwrite=true"])
    assert not (tmp_path / "evaluation.json").exists()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    assert (tmp_path / "samples.md").read_text().count("## Step 0") == 1
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["overwrite"] is False


def test_a_mismatch_is_one_line_unless_it_is_allowed(inputs, tmp_path, capsys):
    """Adapters on another base; the folder says what the run came from, and nothing of the base that was refused."""
    lora, record = ["--model.finetune.mode=lora", "--model.finetune.rank=2"], tmp_path / "run" / "lineage.json"
    main(["fit", *SFT, *short(inputs / "lm", inputs / "pairs.jsonl", tmp_path / "run"), *lora])
    first = record.read_text()
    assert f'"name": "{inputs / "lm"}"' in first
    assert (tmp_path / "run" / "export" / "lineage.json").read_text() == first
    save_model(tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    for weight in model.parameters():
        weight.data += 1
    model.save_pretrained(tmp_path / "other")
    again = short(tmp_path / "other", inputs / "pairs.jsonl", tmp_path / "run")
    words = ["fit", *SFT, *again, *lora, f"--ckpt_path={tmp_path / 'run' / 'checkpoints' / 'last.ckpt'}"]
    with pytest.raises(SystemExit) as end:
        main([*words, "--trainer.max_steps=3"])
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: the checkpoint's adapters were trained on '")
    assert record.read_text() == first
    with pytest.warns(UserWarning, match="a mismatch is allowed: the checkpoint's adapters were trained on"):
        main([*words, "--trainer.max_steps=3", "--allow_mismatch=true"])
    assert f'"name": "{tmp_path / "other"}"' in record.read_text()


def test_a_checkpoint_of_another_model_is_refused_in_one_line(inputs, finished, tmp_path, capsys):
    options = short(inputs / "lm", inputs / "pairs.jsonl", tmp_path / "run")
    tiny = torch.load(finished / "checkpoints/last.ckpt", weights_only=True)
    del tiny["state_dict"]["model.model.norm.weight"]
    torch.save(tiny, tmp_path / "other.ckpt")
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["fit", *SFT, *options, f"--ckpt_path={tmp_path / 'other.ckpt'}"])
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_the_summary_is_one_line(caplog):
    columns = [("Name", ["policy", "mean"]), ("Type", ["LlamaForCausalLM", "MeanMetric"]), ("Params", ["8.8 K", "0"])]
    with caplog.at_level("INFO", logger="pytorch_lightning.utilities.rank_zero"):
        ShortSummary.summarize(columns, 17_600, 8_800, 0.1, {}, 0)
    assert caplog.messages == ["models: policy LlamaForCausalLM 8.8 K; 8.8 K of 17.6 K weights are trained"]


@pytest.mark.parametrize("terminal", [True, False])
def test_the_inner_bar_shows_on_a_terminal_only(monkeypatch, capsys, terminal):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    bar = StageProgressBar()
    for stage in ("generating", "scoring"):
        for done in (1, 2):
            bar.on_progress(stage, done, 2)
    bar.on_progress("updating", 1, 2)
    bar.on_exception(SimpleNamespace(), SimpleNamespace(), KeyboardInterrupt())
    written = "".join(capsys.readouterr())
    for stage in ("generating", "scoring", "updating"):
        assert (f"{stage}:" in written) is terminal


def test_the_bar_names_training_metrics_briefly():
    bar = StageProgressBar()
    trainer = SimpleNamespace(
        loggers=[], progress_bar_metrics={"train/score": 1.0, "train/kl": 2.0, "val/score": 3.0}, lightning_module=None
    )
    assert bar.get_metrics(trainer, None) == {"score": 1.0, "kl": 2.0, "val/score": 3.0}


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_what_is_logged_has_a_line_of_its_own(monkeypatch, caplog, enabled, fails):
    terminal = io.StringIO()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr("sys.stdout", terminal)
    log = logging.getLogger("pytorch_lightning")
    monkeypatch.setattr(log, "handlers", before := [logging.StreamHandler(terminal)])
    caplog.set_level("INFO", logger=log.name)

    class Talks(BoringModel):
        def validation_step(self, batch, batch_idx):
            rank_zero_info("in the check before")
            return super().validation_step(batch, batch_idx)

        def training_step(self, batch, batch_idx):
            rank_zero_info(f"in step {batch_idx}")
            if fails:
                raise ValueError("no more")
            return super().training_step(batch, batch_idx)

    bar = StageProgressBar()
    if not enabled:
        bar.disable()
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=[bar],
        max_steps=2,
        num_sanity_val_steps=1,
        logger=False,
        enable_checkpointing=False,
    )
    with pytest.raises(ValueError, match="no more") if fails else contextlib.nullcontext():
        trainer.fit(Talks())
    lines = terminal.getvalue().replace("\r", "\n").split("\n")
    assert {"in the check before", "in step 0"} <= set(lines)
    assert ("in step 1" in lines) is not fails
    assert any(line.startswith("Epoch 0: ") for line in lines) is enabled
    assert log.handlers == before
