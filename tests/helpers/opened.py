"""Opens what `helpers.exported` wrote, with whatever transformers is installed; nothing of this package is imported.

PYTHONPATH=tests python -m helpers.opened FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

TEXTS = [
    "\n\nHuman: how do i bake bread?\n\nAssistant: Mix flour.<|end|>",
    "  two spaces, don't stop , now . <a> <b>",
    "é 日本 🙂",
]
DIALOGUE = [{"role": "user", "content": "how do i bake?"}, {"role": "assistant", "content": "mix flour."}]
IDS = [[1, *range(5, 27), 3]]


def answers(folder: Path) -> dict[str, Any]:
    """Everything that a version of transformers makes of a folder, as JSON has it."""
    model, complete = _model(folder)
    found: dict[str, Any] = {"complete": complete}
    with torch.no_grad():
        found["logits"] = model(torch.tensor(IDS)).logits.tolist()
    if not (folder / "tokenizer.json").is_file():
        return found
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    found |= {"batch": {name: rows.tolist() for name, rows in batch.items()}}
    found |= {"text": tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)}
    found |= {"special": [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, len(tokenizer)]}
    found |= {"all special": sorted(tokenizer.all_special_tokens), "longest": tokenizer.model_max_length}
    if tokenizer.chat_template:
        found["dialogue"] = tokenizer.apply_chat_template(DIALOGUE, tokenize=False)
    with torch.no_grad():
        found["batch logits"] = model(**batch).logits[batch["attention_mask"].bool() if _is_lm(model) else ...].tolist()
        if _is_lm(model):  # the generation config's EOS and pad
            one = tokenizer(TEXTS[0], return_tensors="pt")
            found["greedy"] = model.generate(**one, max_new_tokens=8, do_sample=False).tolist()
    return found


def _is_lm(model: Any) -> bool:
    return not hasattr(model.config, "reward_calibration") and "Classification" not in type(model).__name__


def _model(folder: Path) -> tuple[Any, bool]:
    """A model, and whether all its weights were found."""
    adapter = folder / "adapter_config.json"
    if not adapter.is_file():
        kind = AutoModelForCausalLM if "CausalLM" in _architecture(folder) else AutoModelForSequenceClassification
        model, info = kind.from_pretrained(folder, output_loading_info=True)
        return model.eval(), not info["missing_keys"]
    config = json.loads(adapter.read_text(encoding="utf-8"))
    if config["task_type"] == "CAUSAL_LM":
        return AutoPeftModelForCausalLM.from_pretrained(folder).eval(), True
    base = AutoModelForSequenceClassification.from_pretrained(config["base_model_name_or_path"], num_labels=1)
    base.config.pad_token_id = AutoTokenizer.from_pretrained(folder).pad_token_id
    return PeftModel.from_pretrained(base, folder).eval(), True


def _architecture(folder: Path) -> str:
    name: str = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    return name.replace("LMHeadModel", "CausalLM")


def difference(found: Any, expected: Any) -> float:
    """The largest relative difference of numbers in two JSON values; infinity where anything else differs."""
    if isinstance(found, float) and isinstance(expected, float):
        return abs(found - expected) / max(1.0, abs(expected))
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        return max((difference(a, b) for a, b in zip(found, expected, strict=True)), default=0.0)
    if isinstance(found, dict) and isinstance(expected, dict) and found.keys() == expected.keys():
        return max((difference(found[name], expected[name]) for name in found), default=0.0)
    return 0.0 if found == expected else float("inf")


TOLERANCE = 1e-5
"""Of logits in float32, relative to the larger of 1 and the logit."""


def main(root: Path) -> int:
    """Compare all folders; 1 if any differs."""
    transformers.logging.set_verbosity_error()
    expected = json.loads((root / "expected.json").read_text(encoding="utf-8"))
    failed = 0
    for name, wanted in expected.items():
        try:
            found = json.loads(json.dumps(answers(root / name)))
            wrong = {
                part: round(d, 7) for part in wanted if (d := difference(found.get(part), wanted[part])) > TOLERANCE
            }
        except Exception as e:  # whatever this version says of the folder
            wrong = {type(e).__name__: " ".join(str(e).split())[:200]}
        if wrong:
            failed += 1
            print(f"{name}: {wrong}")
    print(f"transformers {transformers.__version__}: {len(expected) - failed} of {len(expected)} exports are the same")
    return 1 if failed or not expected else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
