"""What Tab completes, asked of a real bash and a real zsh."""

from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_lightning.cli.completion import SHELLS, candidates
from rlhf_lightning.cli.main import COMMANDS, STAGE_COMMANDS, main
from rlhf_lightning.cli.recipes import recipe_names


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("rlhf ", sorted([*STAGE_COMMANDS, *COMMANDS])),
        ("rlhf", sorted([*STAGE_COMMANDS, *COMMANDS])),
        ("rlhf qu", ["quickstart"]),
        ("rlhf fit --config ", recipe_names()),
        ("rlhf fit --config re", ["regression.yaml", "reward.yaml"]),
        ("rlhf fit --config=trainer/c", ["trainer/cpu.yaml"]),
        ("rlhf fit -c sft", ["sft.yaml"]),
        ("rlhf prepare --config da", ["data.yaml"]),
        ("rlhf fit --config sft.yaml --model.sampling.top", ["--model.sampling.top_k", "--model.sampling.top_p"]),
        ("rlhf fit --config ppo.yaml --model.kl.t", ["--model.kl.target"]),
        ("rlhf fit --config sft.yaml --model.kl", []),
        ("rlhf fit --model SFTModule --model.lab", ["--model.label_smoothing"]),
        ("rlhf fit --trainer.max_", ["--trainer.max_epochs", "--trainer.max_steps", "--trainer.max_time"]),
        ("rlhf fit --config sft.yaml --model.lr_schedule=", ["constant", "cosine", "linear"]),
        ("rlhf fit --config sft.yaml --model.lr_schedule co", ["constant", "cosine"]),
        ("rlhf fit --config missing.yaml --overw", ["--overwrite"]),
        ("rlhf fit --config sft.yaml --data.data ", []),  # the shell's own: files
        ("rlhf chat --he", ["--help"]),
        ("rlhf sing ", []),
    ],
)
def test_what_may_follow(line, expected):
    assert candidates(line) == expected


def environment(folder: Path) -> dict[str, str]:
    """One in which `rlhf` is the command line of these sources."""
    program = folder / "rlhf"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m rlhf_lightning.__main__ "$@"\n')
    program.chmod(0o755)
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder), "TERM": "dumb"}


def completed(folder: Path, line: str) -> list[str]:
    """What bash offers at the end of a line."""
    script = 'eval "$(rlhf completion bash)"; COMP_LINE=$1 COMP_POINT=${#1} _rlhf; printf "%s\\n" "${COMPREPLY[@]}"'
    words = ["bash", "-c", script, "bash", line]
    ran = subprocess.run(words, env=environment(folder), capture_output=True, text=True, check=True, cwd=folder)
    assert not ran.stderr
    return ran.stdout.split()


def test_bash_asks_for_it(tmp_path):
    assert completed(tmp_path, "rlhf fit --config grpo.yaml --model.scal") == ["--model.scaled"]


class Zsh:
    """A zsh at a terminal, as somebody uses it who has nothing in `.zshrc` but our line."""

    def __init__(self, folder: Path) -> None:
        (folder / ".zshrc").write_text('eval "$(rlhf completion zsh)"\nPS1="ready> "\n')
        env = environment(folder)
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.execvpe("zsh", ["zsh", "-i"], env)
        self.read_until("ready> ")

    def read_until(self, text: str) -> str:
        """What it has written by the time that it has written a text."""
        seen, deadline = "", time.monotonic() + 60
        while text not in seen:
            assert select.select([self.terminal], [], [], deadline - time.monotonic())[0], f"{text!r} not in {seen!r}"
            seen += os.read(self.terminal, 4096).decode(errors="replace")
        return seen

    def type(self, keys: str) -> None:
        os.write(self.terminal, keys.encode())

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.terminal)


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh: apt-get install zsh")
def test_zsh_asks_for_it(tmp_path):
    (tmp_path / "pairs.jsonl").touch()
    zsh = Zsh(tmp_path)
    try:
        for typed, becomes in [
            ("rlhf qui\t", "rlhf quickstart "),
            ("rlhf fit --config rew\t", "--config reward.yaml "),
            ("rlhf fit --config=trainer/c\t", "--config=trainer/cpu.yaml "),
            ("rlhf fit --config grpo.yaml --model.scal\t", "--model.scaled "),
            ("rlhf fit --config sft.yaml --model.lr_schedule=li\t", "--model.lr_schedule=linear "),
            ("rlhf fit --data.data pai\t", "--data.data pairs.jsonl "),
        ]:
            zsh.type("\x15" + typed)  # Ctrl-U empties the line
            zsh.read_until(becomes)
    finally:
        zsh.end()


def test_a_shell_of_each_kind_is_told_what_to_do(capsys):
    for shell in SHELLS:
        main(["completion", shell])
        assert "_rlhf rlhf\n" in capsys.readouterr().out
    main(["completion"])
    assert "rlhf completion bash|zsh" in capsys.readouterr().out


def test_another_shell_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["completion", "csh"])
    assert "write `rlhf completion bash` or `rlhf completion zsh`" in capsys.readouterr().err


def test_nothing_slow_is_imported_for_it():
    code = (
        "import sys; from rlhf_lightning.cli.main import main\n"
        "main(['completion', 'for', 'rlhf fit --config ppo.yaml --model.'])\n"
        "assert not {'torch', 'transformers', 'pytorch_lightning'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
