"""`rlhf report` writes a page about runs, and one line where there is nothing to write about."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from helpers.cli_runs import environment, run, working_folder
from helpers.runs import write_run
from rlhf_lightning.cli.main import main
from rlhf_lightning.cli.report import default_path


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for name in ("ppo", "other"):
        write_run(root / name, steps=3)
    return root


def test_the_page_lies_in_the_run_or_where_it_was_asked_for(root, capsys):
    with working_folder(root):
        main(["report", "ppo"])
        assert capsys.readouterr().out.splitlines()[-2:] == ["report  ppo/report.html", "PNGs    ppo/report"]
        main(["report", "ppo", "other", "--out", "compared/page.html"])
        assert {"ppo/report.html", "compared/page.html"} <= {str(p) for p in Path().rglob("*.html")}
    assert capsys.readouterr().out.count("PPO: 3 iterations") == 2


def test_the_page_of_several_runs_lies_in_the_folder_that_holds_them(root):
    with working_folder(root):
        assert default_path([Path("ppo")]) == Path("ppo/report.html")
        assert default_path([Path("ppo"), Path("other")]) == Path("report.html")
        assert default_path([Path("ppo/a"), Path("ppo/b")]) == Path("ppo/report.html")


def test_what_cannot_be_read_is_said(root, tmp_path, capsys):
    folder = write_run(tmp_path / "cut", steps=3)
    (events,) = folder.glob("events*")
    events.write_bytes(events.read_bytes()[:-5])
    main(["report", str(folder)])
    assert f"  warning: '{events}' ends in the middle of a record" in capsys.readouterr().out


def test_a_folder_without_logs_ends_in_one_line(tmp_path):
    result = run("report", str(tmp_path / "nothing"))
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1] == (
        f"error: '{tmp_path / 'nothing'}' does not exist; pass the --trainer.default_root_dir of a run"
    )


def test_a_report_loads_no_torch(root):
    code = (
        "import sys; from rlhf_lightning.cli.main import main\n"
        f"main(['report', {str(root / 'ppo')!r}])\n"
        "assert not {'torch', 'transformers', 'pytorch_lightning'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("page", "end it in .html"),
        ("folder.html", "exists and is no report of runs"),
        ("config.yaml/x.html", "File exists"),
    ],
)
def test_a_page_that_cannot_be_written_is_one_line(root, capsys, out, said):
    (root / "ppo" / "folder.html").mkdir(exist_ok=True)
    with pytest.raises(SystemExit) as ended:
        main(["report", str(root / "ppo"), "--out", str(root / "ppo" / out)])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
