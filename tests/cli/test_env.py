"""`rlhf env`: what a bug report needs, and nothing that is nobody's business."""

from __future__ import annotations

import getpass
import platform
import re
import socket
import stat
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from rlhf_lightning import __version__
from rlhf_lightning.cli import env
from rlhf_lightning.cli.main import main

INTEL = """\
processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8488C
flags\t\t: fpu avx avx2 avx512f avx512_bf16 amx_bf16 amx_tile
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd sve bf16\n"


def report(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    main(["env"])
    return dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())


def test_versions_and_devices_are_named_one_a_line(capsys):
    said = report(capsys)
    assert said["rlhf-lightning"] == __version__
    assert said["python"].startswith(platform.python_version())
    assert said["torch"] == version("torch")
    assert {"system", "processor", "instructions", "gpu", *env.PACKAGES} <= said.keys()


def test_every_package_that_is_asked_for_is_named():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    wanted, _, rest = project.partition("dev = [")
    named = re.findall(r'"([a-z][\w-]*)(?:\[\w+\])?>=', wanted.partition("dependencies = [")[2])
    assert set(named) <= {name.lower() for name in env.PACKAGES}
    assert rest


def test_a_package_that_is_not_there_is_said_to_be_so(capsys, monkeypatch):
    monkeypatch.setattr(env, "PACKAGES", ("torch", "no-such-package"))
    assert report(capsys)["no-such-package"] == "not installed"


def test_no_path_name_of_the_machine_or_person_is_in_it(capsys):
    main(["env"])
    out = capsys.readouterr().out
    assert "/root" not in out
    assert str(Path.home()) not in out
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", out)
    assert f" {getpass.getuser()} " not in out


@pytest.mark.parametrize(
    ("text", "model", "instructions"),
    [
        (INTEL, "Intel(R) Xeon(R) Platinum 8488C", "avx2 avx512f avx512_bf16 amx_bf16"),
        (ARM, "", "asimd sve bf16"),
        ("flags : fpu sse2\n", "", "none of avx2"),
        ("", "", "unknown"),
    ],
)
def test_the_instruction_sets_that_matter_are_told(tmp_path, monkeypatch, text, model, instructions):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(env, "_CPU", tmp_path / "cpuinfo")
    monkeypatch.setattr(env, "_MEMORY", tmp_path / "none")
    said = env.processor()
    assert said["processor"].startswith(model)
    assert said["instructions"].startswith(instructions)
    assert "memory" not in said


def nvidia(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder))


def test_the_driver_is_asked_for_cards(tmp_path, monkeypatch):
    card = "NVIDIA H100 80GB HBM3, 81559 MiB, 580.65, 9.0"
    nvidia(tmp_path, f'echo "{card}"; echo "{card}"', monkeypatch)
    assert env.graphics() == f"{card}; {card}"


def test_a_driver_that_fails_is_told(tmp_path, monkeypatch):
    nvidia(tmp_path, "exit 9", monkeypatch)
    assert env.graphics() == "nvidia-smi does not answer (CalledProcessError)"


def test_without_a_driver_there_is_no_card(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert env.graphics() in ("none found", "Apple's, by torch's mps")


def test_torch_is_not_imported_for_it():
    code = "import sys; from rlhf_lightning.cli.main import main; main(['env']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_words_after_it_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["env", "all"])
    assert capsys.readouterr().err == "error: unexpected word 'all'; `rlhf env` takes none\n"
