"""Folders in the layout of the system this one descends from: pickled lists of dicts."""

import json
import os

import pytest
import torch

from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.data import InstructionDataModule, PreferenceDataModule, PromptDataModule
from rlhf_lightning.data.preparing.legacy import is_legacy
from rlhf_lightning.errors import UserError

PROMPT = "\n\nHuman: how do i bake bread?\n\nAssistant:"


@pytest.fixture(params=["lists", "tensors"])
def folder(tmp_path, request):
    """Eight training rows, three for validation and two for testing; the prompts of the first two are the same."""
    tokenizer = tiny_tokenizer(bos=True)
    kind = list if request.param == "lists" else lambda ids: torch.tensor(ids)

    def ids(text, end="<|end|>"):
        return tokenizer(text + end).input_ids

    def prompt(i):
        return f"question {max(i, 1)}:"

    sizes = {"train": range(8), "validation": range(100, 103), "test": range(200, 202)}
    for part, numbers in sizes.items():
        finetune, preference = [], []
        for i in numbers:
            length = len(ids(prompt(i), ""))
            good, bad = ids(f"{prompt(i)} yes"), ids(f"{prompt(i)} no, never")
            targets = [-1] * length + good[length:]
            finetune.append({"prompt_len": length, "input_ids": kind(good), "targets": kind(targets)})
            preference.append({"prompt_len": length, "chosen_input_ids": kind(good), "rejected_input_ids": kind(bad)})
        torch.save(finetune, tmp_path / f"finetune_{part}.pt")
        torch.save(preference, tmp_path / f"preference_{part}.pt")
    example = ids(PROMPT, "")
    mask = [1] * len(example)
    saved = {"prompt": PROMPT, "input_ids": kind(example), "attention_mask": kind(mask)}
    torch.save(saved, tmp_path / "example_prompt.pt")
    (tmp_path / "args.json").write_text(json.dumps({"tokenizer_name": "facebook/opt-350m", "max_length": 512}))
    return tmp_path


def ready(kind, folder, tokenizer=None, **settings):
    data = kind(tokenizer or tiny_tokenizer(bos=True), str(folder), **settings)
    data.prepare_data()
    for stage in ("fit", "test", "predict"):
        data.setup(stage)
    return data


def shown(data, ids, mask):
    return [data.tokenizer.decode(row[keep]) for row, keep in zip(ids, mask, strict=True)]


def test_demonstrations_are_taught_as_they_were(folder):
    data = ready(InstructionDataModule, folder, batch_size=8)
    [batch] = data.train_dataloader()
    assert sorted(batch.row_ids.tolist()) == list(range(8))
    texts = dict(zip(batch.row_ids.tolist(), shown(data, batch.input_ids, batch.attention_mask), strict=True))
    assert (texts[1], texts[7]) == ("<|bos|>question 1: yes<|end|>", "<|bos|>question 7: yes<|end|>")
    assert shown(data, batch.input_ids, batch.loss_mask) == [" yes<|end|>"] * 8
    [held_out], [test] = data.val_dataloader(), data.test_dataloader()
    assert shown(data, held_out.input_ids, held_out.attention_mask)[0] == "<|bos|>question 100: yes<|end|>"
    assert shown(data, test.input_ids, test.attention_mask)[0] == "<|bos|>question 200: yes<|end|>"
    assert (data.counts["train"], data.counts["validation"], data.counts["test"]) == (8, 3, 2)
    assert next(iter(data.predict_dataloader())).prompts == [f"question {i}:" for i in (100, 101, 102)]


def test_pairs_are_compared_as_they_were(folder):
    data = ready(PreferenceDataModule, folder, batch_size=8)
    [batch] = data.train_dataloader()
    row = batch.row_ids.tolist().index(3)
    assert shown(data, batch.chosen_ids, batch.chosen_mask)[row] == "<|bos|>question 3: yes<|end|>"
    assert shown(data, batch.rejected_ids, batch.rejected_mask)[row] == "<|bos|>question 3: no, never<|end|>"
    assert batch.weights.tolist() == [1.0] * 8


@pytest.mark.parametrize("other", ["finetune", "preference"])
def test_prompts_come_from_either_kind_each_once(folder, other):
    for path in folder.glob(f"{other}_*.pt"):
        path.unlink()
    data = ready(PromptDataModule, folder, rollout_batch_size=7)
    [batch] = data.train_dataloader()
    assert sorted(batch.prompts) == [f"question {i}:" for i in range(1, 8)]
    assert data.counts["dropped: prompt is a duplicate"] == 1
    assert data.counts["rows"] == 13


def test_a_response_of_which_nothing_is_left_is_dropped(folder):
    rows = torch.load(folder / "preference_train.pt")
    rows[2]["prompt_len"] = len(rows[2]["rejected_input_ids"])
    torch.save(rows, folder / "preference_train.pt")
    data = ready(PreferenceDataModule, folder)
    assert data.counts["dropped: nothing is left of a response"] == 1
    assert data.counts["train"] == 7


def test_a_folder_that_leaves_nothing_to_train_on_is_refused(folder):
    rows = torch.load(folder / "finetune_train.pt")
    torch.save([row | {"prompt_len": len(row["input_ids"])} for row in rows], folder / "finetune_train.pt")
    with pytest.raises(UserError, match="holds nothing to train on; see the counts above"):
        ready(InstructionDataModule, folder)


def test_another_tokenizer_or_template_is_refused_and_both_are_named(folder):
    both = "prepared with facebook/opt-350m and no chat template, now it is other/model with"
    chatty = tiny_tokenizer(bos=True, chat_template=True)
    chatty.name_or_path = "other/model"
    with pytest.raises(UserError, match=rf"example_prompt.pt has other ids for its text, .*{both} its chat template"):
        ready(InstructionDataModule, folder, chatty)
    ready(InstructionDataModule, folder, chatty, dialogue_format="plain")

    other = tiny_tokenizer(bos=True)
    other.name_or_path = "other/model"
    other.add_tokens(["bread"])
    with pytest.raises(UserError, match=rf"{both} no chat template; use that tokenizer, or prepare the data again"):
        ready(InstructionDataModule, folder, other)

    rows = torch.load(folder / "finetune_train.pt")
    rows[5]["input_ids"][1] = 50000
    torch.save(rows, folder / "finetune_train.pt")
    with pytest.raises(UserError, match=r"finetune_train.pt row 5 holds id 50000, so .*facebook/opt-350m"):
        ready(InstructionDataModule, folder)


def test_the_beginning_token_may_be_the_tokenizers_or_not(folder):
    # The old system wrote the BOS itself, before prompts of tokenizers that have one but write none.
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|bos|>"
    data = ready(InstructionDataModule, folder, tokenizer, batch_size=8)
    [batch] = data.train_dataloader()
    assert batch.input_ids[:, 0].unique().tolist() == [tokenizer.bos_token_id]


class Trap:
    def __reduce__(self):
        return print, ("code from a file was run",)


def test_files_that_are_not_as_they_should_be_are_named(folder, capsys):
    saved = torch.load(folder / "finetune_train.pt")
    spoilt = {
        "holds no list of rows but dict": {"rows": saved},
        r"row 1 is not as it should be \(KeyError: 'prompt_len'\); expected prompt_len and input_ids": [saved[0], {}],
        r"row 0 is not as it should be .*TypeError": ["text"],
        "row 0 is not as it should be .*'float' object": [saved[0] | {"prompt_len": float("inf")}],
        "row 0 is not as it should be .*prompt_len -2 is below 0": [saved[0] | {"prompt_len": -2}],
        "row 0 is not as it should be .*float32, not whole numbers": [saved[0] | {"input_ids": torch.ones(5)}],
        "row 0 holds an id below 0": [saved[0] | {"input_ids": [1, 2, -3, 4]}],
        "cannot be read as plain tensors": [Trap()],
    }
    for message, rows in spoilt.items():
        torch.save(rows, folder / "finetune_train.pt")
        with pytest.raises(UserError, match=rf"finetune_train.pt {message}"):
            ready(InstructionDataModule, folder)
    for content in (b"", os.urandom(300)):
        (folder / "finetune_train.pt").write_bytes(content)
        with pytest.raises(UserError, match=r"finetune_train.pt cannot be read"):
            ready(InstructionDataModule, folder)
    torch.save(saved[:-1], folder / "finetune_train.pt")  # as no entry of the cache has it
    for content in ("[3]", "{", "[" * 9999):
        (folder / "args.json").write_text(content)
        with pytest.raises(UserError, match=r"args.json is no JSON object; take it away to go without it"):
            ready(InstructionDataModule, folder)
    assert capsys.readouterr().out == ""


def test_a_change_of_a_file_is_noticed_and_parts_are_the_folders_own(folder):
    ready(InstructionDataModule, folder)
    torch.save(torch.load(folder / "finetune_train.pt")[:3], folder / "finetune_train.pt")
    assert ready(InstructionDataModule, folder).counts["train"] == 3
    with pytest.raises(UserError, match=r"is a prepared folder with parts of its own; leave out validation_data"):
        ready(InstructionDataModule, folder, validation_data=[{"prompt": "a", "response": "b"}])
    with pytest.raises(UserError, match=r"was prepared without the turns that `loss_on: turns` needs"):
        ready(InstructionDataModule, folder, loss_on="turns")
    for path in folder.glob("preference_*"):
        path.unlink()
    with pytest.raises(UserError, match=r"holds no preference_train.pt; give a folder that does"):
        ready(PreferenceDataModule, folder)


def test_what_is_such_a_folder(folder, tmp_path):
    assert is_legacy(folder)
    assert not is_legacy([{"prompt": "a"}])
    assert not is_legacy(tmp_path / "nowhere")
