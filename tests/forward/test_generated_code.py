"""What is compiled once is there for the next process, unless somebody has said where it goes."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch

from helpers.answers import LENGTHS, model_of, prompts
from helpers.forked import run_ranks
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.forward import generated_code
from rlhf_lightning.forward.generated_code import FOLDER, keep_generated_code
from rlhf_lightning.generation.engine import TransformersEngine
from rlhf_lightning.generation.sampling import Sampling


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's caches; nobody has said where code goes, and what is said here is forgotten afterwards."""
    monkeypatch.setenv("RLHF_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(FOLDER, "")
    monkeypatch.delenv(FOLDER)
    return tmp_path / "cache"


def test_it_goes_to_the_users_caches(cache: Path) -> None:
    keep_generated_code()
    first = Path(os.environ[FOLDER])
    assert first.is_dir()
    assert first.parent == cache / "compiled"
    keep_generated_code()
    assert Path(os.environ[FOLDER]) == first


def test_a_machine_of_another_kind_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = set()
    read = Path.read_text
    for flags in ("flags : sse4 avx2", "flags : sse4 avx2 avx512f", "flags : sse4 avx2"):
        monkeypatch.setattr(
            Path, "read_text", lambda self, *_, f=flags, **__: f"cpu MHz : {os.urandom(2)!r}\n{f}\n{f}\n"
        )
        kinds.add(generated_code._kind_of_machine())
    monkeypatch.setattr(Path, "read_text", read)
    assert len(kinds) == 2


def test_a_folder_that_somebody_has_named_is_left(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, "/elsewhere")
    keep_generated_code()
    assert os.environ[FOLDER] == "/elsewhere"
    assert not cache.exists()


def test_where_nothing_can_be_written_it_goes_where_torch_would_put_it(cache: Path) -> None:
    cache.write_text("no folder")
    keep_generated_code()
    assert FOLDER not in os.environ


def compile_step(folder: Path) -> None:
    """Answer with generated code, and write down what torch had to generate."""
    from torch._dynamo.utils import counters

    engine = TransformersEngine(model_of("llama-grouped", layers=1), tiny_tokenizer(), compiled=True)
    engine.generate(*prompts(LENGTHS), Sampling(max_new_tokens=3), generator=torch.Generator().manual_seed(0))
    assert engine.compiled_step is not None
    assert engine.compiled_step.trusted
    hits, misses = (counters["inductor"][f"fxgraph_cache_{what}"] for what in ("hit", "miss"))
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps([hits, misses]))


@pytest.mark.long
def test_another_process_compiles_nothing_anew_and_several_may_at_once(cache: Path, tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        ranks = run_ranks(["--version"], tmp_path, before=partial(compile_step, tmp_path), timeout=500)
        assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stderr[-2000:] + ranks[1].stderr[-2000:]
        found.append([json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)])
    assert any((cache / "compiled").rglob("*.so"))
    assert sum(misses for _, misses in found[0]) > 0
    assert [misses for _, misses in found[1]] == [0, 0]
    assert all(hits > 0 for hits, _ in found[1])
