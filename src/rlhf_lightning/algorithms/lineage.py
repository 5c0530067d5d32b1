"""What a stage begins with, and whether it fits: the models it loads, its data, and the checkpoint it goes on from.

Only what is surely wrong is refused. A reward model with another tokenizer or template than the policy is right as it
is, since it is given the texts anew (`models/rewarding.py`); models and checkpoints without a record, of others or of
earlier versions, are taken as they are.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn

from rlhf_lightning.algorithms.hyperparameters import as_config
from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.chat.fingerprint import hash_of_template, hash_of_tokenizer
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.adapter_folders import adapter_base, is_adapter
from rlhf_lightning.models.tokenizer import load_tokenizer, same_tokenizer
from rlhf_lightning.runs.lineage import (
    all_trained_on,
    folder_of,
    hash_of_weights,
    model_of,
    new_record,
    read_record,
    read_trained_on,
    short,
)

IN_COMMON = 0.05
"""Share of the validation prompts that different data may have in common with those of a stage before."""
_SCALES = "alpha", "use_rslora"
"""Settings of adapters that decide what their weights mean, and leave no trace in their shapes."""


def lineage_of(module: Any) -> dict[str, Any]:
    """The record of a stage.

    Args:
        module: a stage whose tokenizer is loaded.
    """
    known: dict[str, dict[str, Any]] = {}
    for name in module.parents.values():
        known[name] = known.get(name) or _model(name)
    chat, describe = _chat(module), getattr(module.datamodule, "lineage", None)
    written = {"template": None, "plain_format": None} if chat is None else _writing(chat)
    reward = getattr(module, "reward", None)
    functions = {} if reward is None or "reward" in module.parents else {"reward_function": _path_of(reward)}
    functions |= {
        f"reward_function {name}": _path_of(other.reward)
        for name, other in getattr(module, "other_rewards", {}).items()
        if f"reward {name}" not in module.parents
    }
    return new_record(
        type(module).__name__,
        {role: known[name] for role, name in module.parents.items()},
        finetune=asdict(module.finetune),
        tokenizer=_tokenizer_hash(module.tokenizer),
        **written,
        **functions,
        data=describe() if callable(describe) else None,
    )


def _path_of(reward: Any) -> str:
    return str(as_config(reward=reward)["reward"])


def trained_on(module: Any) -> np.ndarray:
    """Hashes of the prompts that a stage and those before it were trained on, sorted, uint64.

    Args:
        module: a stage; of data modules that do not tell their prompts none are known.
    """
    hashes = getattr(module.datamodule, "prompt_hashes", None)
    own = hashes("train") if callable(hashes) else np.zeros(0, np.uint64)
    return all_trained_on(iter({*module.parents.values()}), own)


# The start of a stage


def check_parents(module: Any) -> None:
    """See that the models that a stage begins with fit one another, and its data; no weights are loaded for it.

    Args:
        module: a stage that is about to be fitted, its tokenizer loaded.

    Raises:
        UserError: one does not, unless the module's `allow_mismatch` turns that into a warning.
    """
    for role, name in module.parents.items():
        folder = folder_of(name)
        record = None if folder is None else read_record(folder)
        if record is not None:
            _check_base(module, name, record)
            if role.split()[0] == "reward":
                _check_reward(module, name, record)
        if role == "reference":
            _check_writing(module, name, record)
        if role == "value" and folder is not None:
            _check_value(module, name, folder)
    _check_validation(module)


def _check_base(module: Any, name: str, record: dict[str, Any]) -> None:
    """An adapter stands on the weights it was trained on."""
    if not is_adapter(name):
        return
    base, saved = adapter_base(name), record["models"].get("model", {})
    folder = folder_of(base)
    now = None if folder is None else hash_of_weights(folder)
    if _differ(saved.get("weights"), now):
        _refuse(
            module,
            f"the adapter '{name}' was trained on base weights {short(saved['weights'])} ('{saved['name']}'), those "
            f"of '{base}' are {short(now)}: name the right base in its adapter_config.json",
        )


def _check_reward(module: Any, name: str, record: dict[str, Any]) -> None:
    """The tokenizer files of a reward model, which is frozen, are those of its training."""
    tokenizer = load_tokenizer(name, module.trust_remote_code)
    now = {"tokenizer": _tokenizer_hash(tokenizer)}
    if tokenizer.chat_template is not None:
        now["template"] = hash_of_template(tokenizer)
    for what, hash_ in now.items():
        if _differ(record.get(what), hash_):
            _refuse(
                module,
                f"reward '{name}' was trained with {what} {short(record[what])}, and the one in its folder is "
                f"{short(hash_)}: put back the {what} it was exported with",
            )


def _check_writing(module: Any, name: str, record: dict[str, Any] | None) -> None:
    """The policy's frozen twin reads dialogues as it was taught to."""
    chat = _chat(module)
    if record is None or chat is None:
        return
    saved, now = {key: record.get(key) for key in ("template", "plain_format")}, _writing(chat)
    if saved != now and any(saved.values()):
        _refuse(
            module,
            f"'{name}' was trained on dialogues written by {_said(saved)}, and the data are written by {_said(now)}: "
            "give all stages the same chat_template, dialogue_format and plain_format",
        )


def _check_value(module: Any, name: str, folder: Path) -> None:
    """A value model reads the policy's ids."""
    if not (folder / "tokenizer_config.json").is_file():
        return
    tokenizer = load_tokenizer(name, module.trust_remote_code)
    if not same_tokenizer(tokenizer, module.tokenizer):
        hashes = short(_tokenizer_hash(tokenizer)), short(_tokenizer_hash(module.tokenizer))
        _refuse(
            module,
            f"value_name_or_path '{name}' reads other tokens (tokenizer {hashes[0]}) than the policy (tokenizer "
            f"{hashes[1]}), whose ids it is given: name a model that shares them, or leave it out",
        )


def _check_validation(module: Any) -> None:
    """What is held out was not trained on before: a split by other settings would flatter every validation."""
    hashes = getattr(module.datamodule, "prompt_hashes", None)
    if not callable(hashes) or module.trainer.limit_val_batches == 0:
        return
    # Who validates on prompts of the very training does not take them for unseen.
    held_out = np.setdiff1d(hashes("validation"), hashes("train"), assume_unique=True)
    for name in dict.fromkeys(module.parents.values()):
        folder = folder_of(name)
        if folder is None:
            continue
        seen = len(np.intersect1d(held_out, read_trained_on(folder), assume_unique=True))
        if not seen:
            continue
        what = f"{seen} of {len(held_out)} held-out prompts ({seen / len(held_out):.0%}) were training prompts of"
        if seen <= IN_COMMON * len(held_out):
            rank_zero_info(f"{what} '{name}' or of a stage before it")
            continue
        data = module.datamodule.lineage()
        theirs = ((read_record(folder) or {}).get("data") or {}).get("key")
        _refuse(
            module,
            f"{what} '{name}' (data {short(theirs)}) or of a stage before it, so their scores would flatter (data "
            f"{short(data['key'])}): give all stages the same validation_split, test_split and split_by, or "
            "validation_data that none has seen",
        )


# A checkpoint


def check_resumed(module: Any, saved: dict[str, Any] | None) -> None:
    """See that a checkpoint goes on with the frozen models that it was made with.

    Args:
        module: the stage that loads it, its lineage known.
        saved: the record in the checkpoint; None in those of earlier versions.

    Raises:
        UserError: one is another, unless the module's `allow_mismatch` turns that into a warning.
    """
    if saved is None:
        return
    then, now = saved["models"], module.lineage["models"]
    if module.finetune.mode != "all" and _other(then.get("model"), now["model"]):
        what = "adapters were" if module.finetune.mode == "lora" else "last layer was"
        _refuse_resuming(module, f"the checkpoint's {what} trained on", "model", then["model"], now["model"])
    if module.finetune.mode == saved["finetune"]["mode"] == "lora":
        for name in _SCALES:
            before, after = saved["finetune"][name], getattr(module.finetune, name)
            if before != after:
                _refuse(
                    module,
                    f"the checkpoint's adapters were trained with finetune.{name} {before}, now it is {after}: resume "
                    "with the same",
                )
    if not is_fitting(module):
        return  # evaluated against whatever the user names
    # Whether there is a reference at all is a setting of its own.
    others = {role for role in then if role.startswith("reward ")}  # one that is new or gone is a setting, too
    compared = {"reward"} & {*then, *now} | ({"reference"} | others) & {*then} & {*now}
    for role in sorted(compared):
        if _other(then.get(role), now.get(role)):
            _refuse_resuming(module, f"the checkpoint was made with the {role}", role, then.get(role), now.get(role))
    if module.finetune.mode != "all" and "value" in then and "value" in now and _other(then["value"], now["value"]):
        _refuse_resuming(module, "the checkpoint's value model was trained on", "value", then["value"], now["value"])


def _refuse_resuming(
    module: Any, what: str, role: str, then: dict[str, Any] | None, now: dict[str, Any] | None
) -> None:
    before, after = (
        "none" if model is None else f"'{model['name']}' (weights {short(_weights(model)[-1])})"
        for model in (then, now)
    )
    _refuse(module, f"{what} {before}, now it is {after}: resume with the same {role}")


def _other(then: dict[str, Any] | None, now: dict[str, Any] | None) -> bool:
    """Whether a model is another than before, as far as both are known."""
    if then is None or now is None:
        return True
    before, after = _weights(then), _weights(now)
    return len(before) != len(after) or any(_differ(*pair) for pair in zip(before, after, strict=True))


def _weights(model: dict[str, Any]) -> list[str | None]:
    """Hashes of an adapter's base and of its own weights, or of the weights alone."""
    base = [model["base"]["weights"]] if "base" in model else []
    return [*base, model["weights"]]


def _differ(saved: str | None, now: str | None) -> bool:
    return saved is not None and now is not None and saved != now


# What it is made of


def _model(name: str) -> dict[str, Any]:
    model = model_of(name)
    if is_adapter(name):
        base = model_of(adapter_base(name))
        model["base"] = {"name": base["name"], "weights": base["weights"]}
    return model


def _chat(module: Any) -> ChatEncoder | None:
    """What writes the dialogues of a stage's data, where that is known."""
    chat = getattr(module.datamodule, "chat", None)
    return chat if isinstance(chat, ChatEncoder) else None


def _writing(chat: ChatEncoder) -> dict[str, Any]:
    said = chat.describe()
    return {"template": said["template_hash"], "plain_format": said["plain_format"]}


def _said(writing: dict[str, Any]) -> str:
    template, plain = writing["template"], writing["plain_format"]
    return f"chat template {short(template)}" if template else f"the plain format {plain}"


def _tokenizer_hash(tokenizer: Any) -> str:
    return hash_of_tokenizer(tokenizer, ChatEncoder(tokenizer, "plain").prefix)


def is_fitting(module: Any) -> bool:
    """Whether a trainer is about to train the module, or does.

    Args:
        module: any LightningModule, attached or not.
    """
    try:
        return bool(module.trainer.state.fn == TrainerFn.FITTING)
    except RuntimeError:  # not attached
        return False


def _refuse(module: Any, message: str) -> None:
    if not module.allow_mismatch:
        raise UserError(f"{message}; --allow_mismatch true (module.allow_mismatch = True) goes on all the same")
    rank_zero_warn(f"a mismatch is allowed: {message}")
