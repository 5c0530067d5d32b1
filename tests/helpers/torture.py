"""Runs that are killed at random moments and resumed until they are done, compared with runs that were left alone.

`python -m helpers.torture FOLDER N` makes the cases 0 to N - 1, two at a time or as many as a third argument says, and
tells every 50 how it stands. Each result is a line of `FOLDER/results.jsonl`; a torture that is stopped goes on where
it was. The folders of cases that failed stay. Everything about a case follows from its number, but not at what
instruction a process is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors.torch import load_file

from helpers.cli_runs import save_model, save_pairs
from helpers.forked import Forked
from helpers.stages import save_reward_model
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.runs.event_files import PATTERN, find_event_files, read_event_file

CLOCK = ("seconds", "tokens_per_second", "memory_gib")
"""Parts of the names of metrics that depend on the clock or the machine."""

SHORT = {"max_new_tokens": 4, "temperature": 1.0}
ONLINE = {"rollout_batch_size": 4, "micro_batch_size": 2, "sampling": SHORT}
LORA = {"mode": "lora", "rank": 2}
ADAPTIVE = {"coef": 0.15, "target": 0.05, "horizon": 50}
GROUPS = {"minibatch_size": 4, "samples_per_prompt": 2}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("SFTModule", {"micro_batch_size": 2, "sampling": SHORT}),
    "sft lora": ("SFTModule", {"finetune": LORA, "sampling": SHORT}),
    "reward": ("RewardModule", {"micro_batch_size": 2}),
    "dpo": ("DPOModule", {"micro_batch_size": 2, "sampling": SHORT}),
    "ppo": ("PPOModule", {**ONLINE, "minibatch_size": 2, "kl": ADAPTIVE}),
    "ppo lora": ("PPOModule", {**ONLINE, "minibatch_size": 4, "finetune": LORA, "value_trunk": "policy"}),
    "rloo": ("RLOOModule", {**ONLINE, **GROUPS, "kl": ADAPTIVE}),
    "grpo": ("GRPOModule", {**ONLINE, **GROUPS}),
}
"""The class of the module and its arguments, by name."""

DATA = {"SFTModule": "Instruction", "RewardModule": "Preference", "DPOModule": "Preference"}
STEPS_PER_BATCH = {"ppo": 4, "ppo lora": 2, "rloo": 4, "grpo": 4}
LATE = ("SampleTexts", "Evaluate", "OverOptimisation")
"""Callbacks that do something at the end of training; what it is stands in the logs."""

TIMEOUT = 300  # seconds that no run takes
PROMPTS = ["\n\nHuman: how do i bake bread?\n\nAssistant:"]


class Reference(NamedTuple):
    """A run that was left alone: what it ended with, seconds from its start to its config, and bytes that it logged."""

    outcome: dict[str, Any]
    begun: float
    logged: int


def prepare(folder: Path) -> None:
    """Write what all runs start from: models, data, and a config for each variant."""
    if (folder / "prepared").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    base = save_model(folder / "model")
    save_reward_model(folder / "reward", str(base), tiny_tokenizer())
    save_reward_model(folder / "judge", str(base), tiny_tokenizer())
    save_pairs(folder / "pairs.jsonl", 20)
    for name in VARIANTS:
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config(folder, name)))
    (folder / "prepared").touch()


def config(folder: Path, variant: str) -> dict[str, Any]:
    """The config of a run: two epochs of four batches, a validation every third, a checkpoint every second batch."""
    kind, options = VARIANTS[variant]
    module: dict[str, Any] = {"model_name_or_path": str(folder / "model"), **options}
    data: dict[str, Any] = {"data": str(folder / "pairs.jsonl"), "validation_split": 0.2}
    if kind in DATA:
        data |= {"max_length": 64, "batch_size": 4}
    else:
        module |= {"reward": str(folder / "reward")}
        data |= {"max_prompt_length": 48}
    steps = STEPS_PER_BATCH.get(variant, 1)
    checkpoint = {"filename": "step={step}", "auto_insert_metric_name": False, "every_n_train_steps": 2 * steps}
    callbacks: list[dict[str, Any]] = [
        {"class_path": "pytorch_lightning.callbacks.ModelCheckpoint", "init_args": {**checkpoint, "save_last": True}},
        {"class_path": "rlhf_lightning.HFExport"},
    ]
    if kind != "RewardModule":
        callbacks.append({"class_path": "rlhf_lightning.SampleTexts", "init_args": {"prompts": PROMPTS}})
    if variant == "reward":
        worse = {"monitor": "val/loss", "mode": "max", "min_delta": 1e9, "patience": 1}  # at the second validation
        early = {"class_path": "pytorch_lightning.callbacks.EarlyStopping", "init_args": worse}
        best = {"filename": "best", "monitor": "val/loss", "save_top_k": 1}  # saved after a validation
        callbacks += [early, {"class_path": "pytorch_lightning.callbacks.ModelCheckpoint", "init_args": best}]
    if variant == "ppo":
        judge = {"judge": "helpers.torture.count_letters", "every_n_iterations": 3, "num_prompts": 2}
        callbacks.append({"class_path": "rlhf_lightning.Evaluate", "init_args": judge})
        callbacks.append({"class_path": "rlhf_lightning.OverOptimisation"})
    return {
        "seed_everything": 7,
        "trainer": {
            "max_epochs": 2,
            "accelerator": "cpu",
            "val_check_interval": 3,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "callbacks": callbacks,
        },
        "model": {"class_path": f"rlhf_lightning.{kind}", "init_args": module},
        "data": {"class_path": f"rlhf_lightning.{DATA.get(kind, 'Prompt')}DataModule", "init_args": data},
        "report": False,
    }


def count_letters(prompts: list[str], responses: list[str]) -> list[float]:
    """A judge."""
    return [float(sum(letter.isalpha() for letter in text)) for text in responses]


def start(folder: Path, variant: str, root: Path) -> Forked:
    """Start a run, or resume it: always by the same command."""
    words = ["fit", f"--config={folder / variant}.yaml", f"--trainer.default_root_dir={root}", "--ckpt_path=auto"]
    return Forked(words, folder, env={"RLHF_LIGHTNING_CACHE": str(folder / "cache")})


def reference(folder: Path, variant: str) -> Reference:
    """Make a run that is left alone."""
    root = folder / "reference" / variant
    shutil.rmtree(root, ignore_errors=True)
    started = time.monotonic()
    forked = start(folder, variant, root)
    forked.wait_for((root / "config.yaml").exists, TIMEOUT)
    begun = time.monotonic() - started
    finished = forked.wait(TIMEOUT)
    if finished.returncode:
        raise RuntimeError(finished.stderr)
    return Reference(outcome(root), begun, logged(root))


def logged(root: Path) -> int:
    """Bytes of the event files of a run, which grow with each step; a resumed run puts others in their place."""
    sizes = 0
    for path in root.glob(PATTERN):
        with contextlib.suppress(FileNotFoundError):
            sizes += path.stat().st_size
    return sizes


def wait_for_a_moment(forked: Forked, rng: random.Random, root: Path, reference: Reference) -> None:
    """Wait until something random has come about, by what is in the folder: how quick a process is changes."""
    kind, share = rng.random(), rng.random()
    if kind < 0.15:  # while it starts
        forked.process.join(share * reference.begun)
        return
    if kind < 0.8:  # while it trains
        begun = logged(root)
        forked.wait_for(lambda: logged(root) >= begun + share * (reference.logged - begun) > begun, TIMEOUT)
    else:  # while it exports, and after that
        forked.wait_for(lambda: any((root / name).exists() for name in (".export.unfinished", "export")), TIMEOUT)
    forked.process.join(0.1 * rng.random())


def variant_of(number: int) -> str:
    """The variant of a case."""
    return list(VARIANTS)[number % len(VARIANTS)]


def torture(folder: Path, number: int, reference: Reference) -> dict[str, Any]:
    """Make one case, of the variant of the reference; what came of it, as a line of the results."""
    rng = random.Random(number)
    variant = variant_of(number)
    root = folder / "cases" / str(number)
    shutil.rmtree(root, ignore_errors=True)
    kills = 0
    try:
        for _ in range(rng.randint(1, 4)):
            forked = start(folder, variant, root)
            wait_for_a_moment(forked, rng, root, reference)
            forked.kill()
            if forked.wait().returncode == 0:
                break
            kills += 1
        for path in root.glob("checkpoints/*.ckpt"):
            torch.load(path, weights_only=True)
        finished = start(folder, variant, root).wait(TIMEOUT)
        wrong = finished.stderr[-2000:] if finished.returncode else differences(outcome(root), reference.outcome)
    except Exception as e:  # a fault, too: the other cases go on
        wrong = f"{type(e).__name__}: {e}"[-2000:]
    if not wrong:
        shutil.rmtree(root)
    return {"case": number, "variant": variant, "kills": kills, "wrong": wrong}


def outcome(root: Path) -> dict[str, Any]:
    """All that a run ended with and that does not depend on the clock."""
    scalars: dict[str, list[Any]] = {}
    texts: dict[str, list[Any]] = {}
    for path in find_event_files(root):
        logged = read_event_file(path)
        for name, points in logged.scalars.items():
            scalars.setdefault(name, []).extend(point[:2] for point in points)
        for name, said in logged.texts.items():
            texts.setdefault(name, []).extend(said)
    checkpoints = {path.name: torch.load(path, weights_only=True) for path in root.glob("checkpoints/*.ckpt")}
    # Not the place within a step: a run that is resumed at its last one saves it again at the end of training.
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "rlhf_lightning", "global_step", "callbacks")
    for saved in checkpoints.values():
        for state in saved["callbacks"].values():
            state.pop("current_score", None)  # which Lightning does not take from a checkpoint
        # Made in validation; a run that is resumed at its last step saves it once more, after that validation.
        for name in ("calibration", "calibrated_at"):
            saved["rlhf_lightning"].pop(name, None)
        for name, state in saved["callbacks"].items():
            if name.startswith("EarlyStopping"):
                for key in state.keys() - {"best_score"}:
                    del state[key]
            elif "'monitor': 'val/" in name and saved is checkpoints["last.ckpt"]:
                saved["callbacks"][name] = sorted(Path(path).name for path in state["best_k_models"])
        saved["callbacks"] = {name: state for name, state in saved["callbacks"].items() if not name.startswith(LATE)}
    samples = root / "samples.md"
    card = (root / "export" / "README.md").read_text().splitlines()
    return {
        "scalars": {name: points for name, points in scalars.items() if not any(word in name for word in CLOCK)},
        "texts": texts,
        "files": sorted(str(path.relative_to(root)) for path in root.rglob("*") if "events.out" not in path.name),
        "checkpoints": {name: {key: saved[key] for key in kept if key in saved} for name, saved in checkpoints.items()},
        "export": load_file(root / "export" / "model.safetensors"),
        "configs": {path.name: json.loads(path.read_text()) for path in (root / "export").glob("*config.json")},
        "card": [line for line in card if not any(word in line for word in (*CLOCK, str(root.parent)))],
        "samples": samples.read_text() if samples.exists() else "",
    }


def differences(found: Any, expected: Any, path: str = "") -> str:
    """The first difference between two outcomes, empty if there is none; paths of the runs themselves are left out."""
    if isinstance(found, torch.Tensor) and isinstance(expected, torch.Tensor):
        return "" if torch.equal(found, expected) else f"{path}: other numbers"
    if isinstance(found, dict) and isinstance(expected, dict):
        found, expected = (
            {re.sub(r".*/checkpoints/", "", str(k)): v for k, v in each.items()} for each in (found, expected)
        )
        if found.keys() != expected.keys():
            return f"{path}: {sorted(map(str, found.keys() ^ expected.keys()))}"
        pairs: Iterable[Any] = [(key, found[key], expected[key]) for key in found]
    elif isinstance(found, list | tuple) and isinstance(expected, list | tuple):
        if len(found) != len(expected):
            return f"{path}: {str(found)[:1000]}, not {str(expected)[:1000]}"
        pairs = [(number, *each) for number, each in enumerate(zip(found, expected, strict=True))]
    else:
        same = found == expected or (found != found and expected != expected)
        ours = isinstance(found, str) and "checkpoints/" in found + "/"  # where a run lies
        return "" if same or ours else f"{path}: {str(found)[:200]}, not {str(expected)[:200]}"
    for key, one, other in pairs:
        if said := differences(one, other, f"{path}/{key}"):
            return said
    return ""


def run(folder: Path, count: int, at_once: int = 2) -> list[dict[str, Any]]:
    """Make the cases that are not made yet; all results."""
    prepare(folder)
    lines = folder / "results.jsonl"
    results = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    missing = sorted(set(range(count)) - {result["case"] for result in results})
    with ThreadPoolExecutor(at_once) as pool, lines.open("a") as file:
        # A case waits for its reference, which has been started before it.
        variants = sorted({variant_of(number) for number in missing})
        references = {variant: pool.submit(reference, folder, variant) for variant in variants}
        for result in pool.map(lambda n: torture(folder, n, references[variant_of(n)].result()), missing):
            results.append(result)
            file.write(json.dumps(result) + "\n")
            file.flush()
            if len(results) % 50 == 0 or len(results) == count:
                print(summary(results), flush=True)
    return results


def summary(results: list[dict[str, Any]]) -> str:
    """One line."""
    kills, wrong = sum(result["kills"] for result in results), [each for each in results if each["wrong"]]
    said = "".join(f"\n  case {each['case']} ({each['variant']}): {each['wrong']}" for each in wrong)
    return f"{len(results)} runs killed {kills} times: {len(results) - len(wrong)} as the undisturbed run{said}"


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    if any(result["wrong"] for result in run(Path(sys.argv[1]).resolve(), *map(int, sys.argv[2:]))):
        sys.exit(1)
