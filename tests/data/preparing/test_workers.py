"""Workers that tokenise: started where there is text enough, without the script that started them."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from helpers.preparing import preparation
from rlhf_lightning.data.preparing import workers

ROOT = Path(__file__).parents[3]
ROWS = [{"prompt": f"question {i}", "response": "x" * 95} for i in range(2500)]


@pytest.mark.parametrize(("worth", "started"), [(200_000, False), (150_000, True)])
def test_workers_start_where_the_text_that_is_left_is_worth_it(tmp_path, monkeypatch, worth, started):
    monkeypatch.setattr(workers, "WORTH_WORKERS", worth)
    asked = []

    def by_workers(chunks, rows_of, encoder, num_proc):
        asked.append(num_proc)
        for chunk in chunks:
            yield chunk, partial(encoder.encode, rows_of(chunk))

    monkeypatch.setattr(workers, "_by_workers", by_workers)
    preparation(ROWS, kinds=("finetune",), num_proc=3).build(tmp_path)  # 1,500 rows of 107 characters are left
    assert asked == [3] * started


SCRIPT = """
import sys
from rlhf_lightning.data.preparing.workers import _start_worker

assert not {"pytorch_lightning", "torchmetrics", "transformers.modeling_utils"} & set(sys.modules)  # 6 of 9 seconds

from helpers.preparing import preparation
from pathlib import Path
from rlhf_lightning.data.preparing import workers

print("the script runs", flush=True)
workers.WORTH_WORKERS = 1
rows = [{"prompt": f"question {i}", "response": " yes"} for i in range(1200)]
Path("out").mkdir()
preparation(rows, kinds=("finetune",), num_proc=2).build(Path("out"))
print("done", flush=True)
"""


@pytest.mark.launched
def test_a_script_without_a_guard_runs_once_and_to_its_end(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    run = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["the script runs", "done"]
