"""The folder of a run: what `--overwrite` may remove, what the saved config holds, how a run ends that is ended."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from jsonargparse import Namespace

from rlhf_lightning.callbacks.run_folder import RunFolder
from rlhf_lightning.errors import UserError
from rlhf_lightning.runs.lineage import new_record, write_record


def run_folder(root, text="overwrite: false\n", **options):
    config = Namespace(trainer=Namespace(default_root_dir=str(root)), ckpt_path=None, **{"overwrite": True} | options)
    return RunFolder(SimpleNamespace(dump=lambda config, **kwargs: text), config)


def start(callback, root):
    trainer = SimpleNamespace(
        is_global_zero=True, default_root_dir=str(root), fast_dev_run=False, checkpoint_callbacks=[], ckpt_path=None
    )
    callback.setup(trainer, None, "fit")
    callback.on_fit_start(trainer, None)


def fill(root):
    for name in ("checkpoints/last.ckpt", "samples.md", "report.html", "report/kl.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("of a run")
    mine = ["report/notes.txt", "checkpoints/mine-hf/README.md", "best_by_judge/README.md", "thesis.txt"]
    for name in mine:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("mine, made with rlhf_lightning")
    for name in ("checkpoints/last-hf",):
        (root / name).mkdir()
        write_record(root / name, new_record("SFTModule", {}))
    return mine


@pytest.mark.parametrize("mark", ["config", "record"])
def test_overwrite_removes_what_a_run_left_and_nothing_else(tmp_path, mark):
    mine = fill(tmp_path)
    if mark == "config":
        (tmp_path / "config.yaml").write_text("seed_everything: 1\noverwrite: false\n")
    else:
        write_record(tmp_path, new_record("SFTModule", {}))
    start(run_folder(tmp_path), tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left - {"config.yaml", "lineage.json"} == {*mine}


@pytest.mark.parametrize("config", [None, "model: something else\n", "# overwrite: true\n"])
def test_overwrite_in_a_folder_that_is_no_runs_is_refused(tmp_path, config):
    fill(tmp_path)
    if config:
        (tmp_path / "config.yaml").write_text(config)
    with pytest.raises(UserError, match=r"but no run of this package that --overwrite could replace; choose another"):
        run_folder(tmp_path)
    run_folder(tmp_path, overwrite=False)


def test_overwrite_in_an_empty_folder_of_somebody_starts(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    start(run_folder(tmp_path), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_the_saved_config_holds_no_secrets(tmp_path):
    text = "uri: http://me:s3cret@host/x\ntoken: hf_abcdefghijklmnopqrstuvwx\ndata: a@b:c.jsonl\n"
    start(run_folder(tmp_path, text), tmp_path)
    said = (tmp_path / "config.yaml").read_text()
    assert said == "uri: http://me:***@host/x\ntoken: hf_***\ndata: a@b:c.jsonl\n"


@pytest.mark.parametrize(("code", "left"), [(None, 1), (0, 1), (3, 3), (143, 143)])
def test_an_exit_that_claims_success_within_a_run_is_a_failure(tmp_path, capsys, code, left):
    """A logger, a callback or a source that calls sys.exit has not trained a model."""
    trainer = SimpleNamespace(is_global_zero=True, state=SimpleNamespace(fn="fit"), global_step=3)
    error = SystemExit(code)
    run_folder(tmp_path).on_exception(trainer, None, error)
    assert error.code == left
    said = "error: something that the run called ended it by sys.exit after 3 optimizer steps\n"
    assert capsys.readouterr().err == (said if code in (None, 0) else "")
