"""`benchmarks/ablations.py`: switches that the modules take, and the table and picture that are made of results."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
from matplotlib.image import imread

from rlhf_lightning import RewardModule
from rlhf_lightning.cli.quickstart.stages import GoldCurve, StageResult, merged, settings_of
from rlhf_lightning.models.heads import HEADS_FILE

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of the folder as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def test_every_switch_is_taken_by_its_modules_and_changes_them(bench: Any, tmp_path: Path) -> None:
    for name in ("sft", "reward"):  # modules look whether what they begin with is there
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "reward" / HEADS_FILE).touch()
    models = {"model_name_or_path": str(tmp_path / "sft"), "reward": str(tmp_path / "reward")}
    switches, built = bench("_switches").SWITCHES, {}
    for switch in switches:
        others = () if switch.algorithm == "ppo" else (f"quickstart/{switch.algorithm}.yaml",)
        settings = settings_of("policy", 1, *others)
        arguments = merged(settings.model, {**models, **switch.settings})
        if switch.algorithm == "dpo":
            arguments.pop("reward")
        of_reward = RewardModule(models["model_name_or_path"], **switch.reward or {}).hparams
        built[switch.name] = repr((dict(settings.classes["model"](**arguments).hparams), dict(of_reward)))
    assert len(built) == len(switches), "a name twice"
    assert len(set(built.values())) == len(built)


def results(bench: Any) -> dict[str, dict[int, dict[str, Any]]]:
    def one(win: float, kl: float) -> dict[str, Any]:
        return {"win_rate": win, "kl": kl, "gold_mean": 2.0, "seconds": 10.0}

    return {"default": {1: one(0.84, 2.5), 2: one(0.88, 2.7)}, "four-epochs": {1: one(0.86, 3.0), 2: one(0.88, 3.4)}}


def test_the_table_has_each_seed_the_mean_and_what_is_gained(bench: Any) -> None:
    rows = [line for line in bench("ablations").report(results(bench)).splitlines() if "four-epochs" in line]
    assert [cell.strip() for cell in rows[0].split("|")[1:-1]] == [
        "`four-epochs`",
        "`ppo_epochs: 4`",
        "86.0 88.0",
        "87.0",
        "+1.0",
        "3.2",
        "2.00",
    ]


def test_the_picture_has_a_row_for_each_switch(bench: Any, tmp_path: Path) -> None:
    few, many = tmp_path / "few.png", tmp_path / "many.png"
    found = results(bench)
    assert bench("ablations").gains(found["four-epochs"], found["default"]) == pytest.approx({1: 2.0, 2: 0.0})
    bench("ablations").picture(found, few)
    bench("ablations").picture(found | {"one-epoch": found["default"], "dpo": found["default"]}, many)
    assert imread(many).shape[0] > imread(few).shape[0] > 100
    assert imread(few).std() > 0.05


def test_a_record_keeps_other_seeds_and_gives_what_was_run_with_these_settings(bench: Any, tmp_path: Path) -> None:
    script, record, root = bench("ablations"), tmp_path / "record.json", tmp_path / "runs"
    keys = {each.name: script.settings_key(each) for each in bench("_switches").SWITCHES}
    assert len(set(keys.values())) == len(keys)
    found = results(bench)
    for name, of_switch in found.items():
        for result in of_switch.values():
            result["settings"] = keys[name]
    script.keep({"default": {1: found["default"][1]}, "four-epochs": found["four-epochs"]}, record)
    script.keep({"default": {2: found["default"][2]}}, record)
    assert script.known(root, record, [1, 2, 3]) == found
    assert script.known(root, record, [2]) == {name: {2: each[2]} for name, each in found.items()}

    later = found["default"][1] | {"win_rate": 0.99}
    for seed, result in ((1, later), (2, later | {"settings": "others"})):
        path = root / f"seed-{seed}" / "switches" / "default" / "result.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(result))
    found["default"][1] = later
    assert script.known(root, record, [1, 2]) == found
    script.keep({"four-epochs": {1: found["four-epochs"][1] | {"settings": "others"}}}, record)
    assert script.known(root, record, [1, 2])["four-epochs"] == {2: found["four-epochs"][2]}


def test_every_switch_hands_its_stages_what_they_take(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def last(algorithm: str, sft: Path, reward: Path, data: Any, folder: Path, *given: Any, **settings: Any) -> Any:
        folder.mkdir(parents=True)
        return StageResult(folder, folder, {}, 0.0), GoldCurve()

    script, rewards = bench("ablations"), {}
    base = (script.toy_paths(tmp_path), tmp_path / "sft", tmp_path / "reward", [{"gold": 1.0}])
    monkeypatch.setattr(script, "base_of", lambda folder, seed: base)
    monkeypatch.setattr(script, "train_last", create_autospec(script.train_last, side_effect=last))
    monkeypatch.setattr(script, "train_reward", create_autospec(script.train_reward))
    monkeypatch.setattr(script, "answer", lambda *given: [{"gold": 1.0, "kl": 2.0}])
    monkeypatch.setattr(script, "summarise", lambda rows, kl: {"kl": kl})
    monkeypatch.setattr(script, "gold_accuracy", lambda *given: 0.9)
    for switch in bench("_switches").SWITCHES:
        assert script.run(switch, 1, tmp_path / "runs")["kl"] == 2.0
        rewards[switch.name] = str(script.train_last.call_args.args[2])
    assert {name for name, reward in rewards.items() if reward.endswith("stages.gold")} == {"gold-as-reward"}


def test_what_is_in_the_record_is_not_run_again(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, record = bench("ablations"), tmp_path / "record.json"
    default = next(each for each in bench("_switches").SWITCHES if each.name == "default")
    found = {"default": {1: results(bench)["default"][1] | {"settings": script.settings_key(default)}}}
    script.keep(found, record)
    ran = []
    monkeypatch.setattr(script, "run", lambda switch, seed, root: ran.append(seed) or found["default"][1])
    words = ["ablations.py", "--root", str(tmp_path / "runs"), "--record", str(record), "--only", "default"]
    monkeypatch.setattr("sys.argv", [*words, "--seeds", "1", "2"])
    script.main()
    assert ran == [2]
    assert "84.0 84.0" in capsys.readouterr().out
    assert list(json.loads(record.read_text())["default"]) == ["1", "2"]


def test_the_page_shows_the_record(bench: Any) -> None:
    script = bench("ablations")
    record = json.loads((FOLDER / "ablations.json").read_text(encoding="utf-8"))
    found = {name: {int(seed): each for seed, each in of_switch.items()} for name, of_switch in record.items()}
    page = (FOLDER.parent / "docs" / "ablations.md").read_text(encoding="utf-8")
    assert page.split(script.BEGIN)[1].split(script.END)[0].strip() == script.report(found).strip()


def test_results_go_between_the_marks_of_a_page(bench: Any, tmp_path: Path) -> None:
    script, page = bench("ablations"), tmp_path / "page.md"
    page.write_text(f"before\n{script.BEGIN}old\n{script.END}after\n")
    script.write(page, "new")
    assert page.read_text() == f"before\n{script.BEGIN}\nnew\n{script.END}after\n"
