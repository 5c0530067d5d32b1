"""A run folder as data: what it was told to do, what it logged and said, what lies in it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.results import RESULTS, Evaluation
from rlhf_lightning.report.logs import Curve, Logs, find_logs, read_logs
from rlhf_lightning.report.samples import Sample, read_samples
from rlhf_lightning.yaml_text import load_yaml

STAGES = {
    "SFTModule": "SFT",
    "RewardModule": "Reward model",
    "ScoreRegressionModule": "Model of scores",
    "DPOModule": "DPO",
    "PPOModule": "PPO",
    "RLOOModule": "RLOO",
    "GRPOModule": "GRPO",
}
"""How the stages of this package are called."""
ONLINE = ("PPO", "RLOO", "GRPO")
_GUESSES = {
    "train/value_loss": "PPO",
    "train/no_signal": "GRPO",
    "train/chosen_reward": "DPO",
    "train/chosen_score": "Reward model",
    "train/perplexity": "SFT",
}
"""What a stage logs that those below it in this table do not."""
_CARD_STAGE = re.compile(r"^Made by `\w+`: stage `(\w+)`", re.MULTILINE)
_CARD_SETTINGS = re.compile(r"^## Settings\n+```yaml\n(.*?)^```", re.MULTILINE | re.DOTALL)


class Artefact(NamedTuple):
    """Something that a run left behind.

    Attributes:
        what: for instance `export`.
        path: where it lies.
        note: more about it; may be empty.
    """

    what: str
    path: Path
    note: str


class Run(NamedTuple):
    """A run folder.

    Attributes:
        folder: where it is.
        name: to tell it from the others of a report.
        stage: `SFT`, `Reward model`, `PPO` and so on, or the name of a class that is not of this package.
        settings: of `config.yaml`, else of the export's card, else of `hparams.yaml`; nested.
        logs: what it logged.
        samples: answers to fixed prompts, by finished steps.
        evaluation: what `evaluation.json` holds; None if there is none.
        artefacts: what it left behind.
        problems: what cannot be read, a line each.
    """

    folder: Path
    name: str
    stage: str
    settings: dict[str, Any]
    logs: Logs
    samples: dict[float, list[Sample]]
    evaluation: Evaluation | None
    artefacts: list[Artefact]
    problems: list[str]

    @property
    def curves(self) -> dict[str, Curve]:
        """Of the fit, by name."""
        return self.logs.curves

    @property
    def is_online(self) -> bool:
        """Whether its policy answers prompts, so that its steps are iterations."""
        return self.stage in ONLINE or "train/kl" in self.curves

    @property
    def steps(self) -> int:
        """Finished steps, or iterations."""
        ends = (curve.steps[-1] + name.startswith("train/") for name, curve in self.curves.items())
        return int(max(ends, default=0))

    def has(self, metric: str) -> bool:
        """Whether `train/`, `val/` or `judge/` of a metric was logged."""
        return any(f"{part}/{metric}" in self.curves for part in ("train", "val", "judge"))


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """Read run folders, each with a name of its own: the end of its path that no other shares.

    Args:
        folders: in the order in which they are shown.

    Raises:
        UserError: one is missing or holds no logs.
    """
    paths: dict[tuple[str, ...], Path] = {}
    for folder in folders:
        path = Path(folder).expanduser()
        paths.setdefault(path.resolve().parts, path)
    parts, runs = [*paths], []
    for own, path in paths.items():
        depth = next(n for n in range(1, len(own) + 1) if sum(other[-n:] == own[-n:] for other in parts) == 1)
        runs.append(read_run(path, "/".join(own[-depth:])))
    return runs


def read_run(folder: Path, name: str | None = None, files: Iterable[Path] | None = None) -> Run:
    """Read a run folder.

    Args:
        folder: the `default_root_dir` of a `fit`.
        name: what to call it; None for that of the folder.
        files: its logs; None to look for them in it.

    Raises:
        UserError: it is missing or holds no logs.
    """
    files = find_logs(_checked(folder)) if files is None else list(files)
    if not files:
        raise UserError(f"'{folder}' holds no logs{_runs_below(folder)}")
    logs = read_logs(files)
    problems = list(logs.problems)
    card = _text(folder / "export" / "README.md")
    settings = _settings(folder, card, files[-1].parent, problems)
    if not logs.curves and not logs.measured:
        problems.append(f"'{folder}': the logs hold no numbers")
    stage = _stage(settings, card, logs)
    samples = read_samples(_text(folder / "samples.md"))
    per_step = steps_per_batch(settings)
    return Run(
        folder=folder,
        name=name or folder.resolve().name,
        stage=stage,
        settings=settings,
        logs=logs,
        samples={step / per_step: answers for step, answers in samples.items()},
        evaluation=_evaluation(folder, problems),
        artefacts=_artefacts(folder, files),
        problems=problems,
    )


def _checked(folder: Path) -> Path:
    if not folder.is_dir():
        what = "is a file, not a run folder" if folder.exists() else "does not exist"
        raise UserError(f"'{folder}' {what}; pass the --trainer.default_root_dir of a run")
    return folder


def _runs_below(folder: Path) -> str:
    """Where a folder of several runs was given, their names."""
    below = sorted(str(path) for path in folder.iterdir() if path.is_dir() and find_logs(path))
    return f", but {' '.join(below)} do; pass these" if below else " of TensorBoard or CSV that a report could show"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _settings(folder: Path, card: str, logs: Path, problems: list[str]) -> dict[str, Any]:
    """Settings of a run, from the fullest of what records them."""
    in_card = _CARD_SETTINGS.search(card)
    for source, text in (
        (folder / "config.yaml", _text(folder / "config.yaml")),
        (folder / "export" / "README.md", in_card[1] if in_card else ""),
        (logs / "hparams.yaml", _text(logs / "hparams.yaml")),
    ):
        try:
            settings = load_yaml(text, str(source))
        except (yaml.YAMLError, UserError):
            problems.append(f"'{source}' is no YAML that can be read")
            continue
        if isinstance(settings, dict) and settings:
            return settings if source.name != "hparams.yaml" else {"module": settings}
    return {}


def module_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the module, wherever the settings come from."""
    model = settings.get("model")
    found = model.get("init_args") if isinstance(model, dict) else settings.get("module")
    return found if isinstance(found, dict) else {}


def steps_per_batch(settings: dict[str, Any]) -> int:
    """Optimizer steps of one iteration, in which `samples.md` counts; 1 outside of online algorithms."""
    module = module_settings(settings)
    try:
        responses = module["rollout_batch_size"] * module.get("samples_per_prompt", 1)
        return max(1, module["ppo_epochs"] * responses // module["minibatch_size"])
    except (KeyError, TypeError, ZeroDivisionError):
        return 1


def _stage(settings: dict[str, Any], card: str, logs: Logs) -> str:
    model = settings.get("model")
    named = str(model.get("class_path", "")).rpartition(".")[2] if isinstance(model, dict) else ""
    if not named and (stage := _CARD_STAGE.search(card)):
        named = stage[1]
    if not named:
        return next((stage for metric, stage in _GUESSES.items() if metric in logs.curves), "Run")
    return STAGES.get(named, named)


def _evaluation(folder: Path, problems: list[str]) -> Evaluation | None:
    try:
        return Evaluation.read(folder) if (folder / RESULTS).exists() else None
    except UserError as e:
        problems.append(str(e))
        return None


def _artefacts(folder: Path, files: list[Path]) -> list[Artefact]:
    """What lies in a run folder, in the order in which one asks for it."""
    checkpoints = sorted((folder / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    found = [Artefact("export", folder / "export", f"{_size(folder / 'export')}")]
    if checkpoints:
        note = f"{len(checkpoints)}, the newest {checkpoints[-1].name}, {_size(folder / 'checkpoints')}"
        found.append(Artefact("checkpoints", folder / "checkpoints", note))
    found += [Artefact(path.stem, path, "") for path in (folder / name for name in _FILES)]
    found.append(Artefact("logs", files[-1].parent, f"TensorBoard: tensorboard --logdir {files[-1].parent}"))
    if files[-1].suffix == ".csv":
        found[-1] = Artefact("logs", files[-1], "")
    return [artefact for artefact in found if artefact.path.exists()]


_FILES = ("samples.md", RESULTS, "predictions.jsonl", "config.yaml")


def _size(path: Path) -> str:
    """Of a folder's files together.

    Example:
        >>> _size(Path("no such folder"))
        '0 MB'
    """
    total = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return f"{total / 1e9:.1f} GB" if total >= 1e9 else f"{total / 1e6:.0f} MB"
