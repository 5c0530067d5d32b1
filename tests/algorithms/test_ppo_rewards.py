"""What the reward of PPO is given: the ids of reward training, whatever the policy reads, or clean text."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.stages import fit, save_llama, save_reward_model, trainer
from helpers.tokenizers import CHAT_TEMPLATE, tiny_tokenizer
from rlhf_lightning import (
    FineTune,
    HFExport,
    PPOModule,
    PreferenceDataModule,
    PromptDataModule,
    RewardModule,
    Sampling,
    UserError,
)
from rlhf_lightning.algorithms.online.models import ModelSource
from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.chat.plain import PlainFormat
from rlhf_lightning.chat.written import WrittenPrompt
from rlhf_lightning.data.sources import Table
from rlhf_lightning.generation.engine import Generation, decode_responses
from rlhf_lightning.models.rendering import RENDERING, rendering_of
from rlhf_lightning.models.rewarding import load_scorer
from rlhf_lightning.models.scalar_lm import load_reward_model
from rlhf_lightning.models.scorers import ModelScorer, Responses, TextScorer

SIZES = {"rollout_batch_size": 2, "minibatch_size": 2, "sampling": Sampling(max_new_tokens=4)}
CHATML = CHAT_TEMPLATE.replace(" | trim", "")
GEMMA_LIKE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA = GEMMA_LIKE.replace("<|end|>", "<end_of_turn>")
"""Ends its turns by another token than the EOS."""
THINKS = CHATML.replace("assistant\\n", "assistant\\n<think>\\n")
"""Opens the thoughts before each answer in the prompt for generation."""
LLAMA2_LIKE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}"
    "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
TOOLS_SHOWN = "{% if tools %}{{ tools[0]['function']['name'] }}\n{% endif %}" + CHATML
REFUSES_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + CHATML
ANGLES = PlainFormat("<user> ", "<bot>", "<rules> ", " ", "")

SYSTEM = {"role": "system", "content": "Be kind."}
ASKED = [{"role": "user", "content": "how do I bake bread?"}, {"role": "assistant", "content": "Slowly."}]
LAST = {"role": "user", "content": "and faster?"}
HH = "\n\nHuman: how do I bake bread?\n\nAssistant: Slowly.\n\nHuman: and faster?\n\nAssistant:"
PROMPTS: list[Any] = [[SYSTEM, *ASKED, LAST], [LAST], HH]
ANSWERS = ["With more yeast.", "  Two things:\n\n1. wait\n2. bake\n", "Buy it!"]
ROWS = [{"prompt": p, "chosen": a, "rejected": "No."} for p, a in zip(PROMPTS, ANSWERS, strict=True)]
TEXT_ROWS = [
    {"prompt": prompt, "chosen": f"{answer} {i}", "rejected": "No."}
    for i, (prompt, answer) in enumerate([(HH, "Buy it!"), ("Once upon a time", " there was"), ("1, 2,", " 3")])
]


def tokenizer_of(template=None, bos=False, more=()):
    tokenizer = tiny_tokenizer(bos=bos)
    tokenizer.chat_template = template
    tokenizer.add_tokens(list(more))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    return tokenizer


def reward_folder(path, tokenizer, recorded=None, context=512):
    """A reward model on `tokenizer`, as an export of this package if a format is to be recorded."""
    base = save_llama(path / "base", tokenizer)
    folder = save_reward_model(path / "reward", base, tokenizer)
    model = load_reward_model(folder).model
    model.config.max_position_embeddings = context
    if recorded is not None:
        setattr(model.config, RENDERING, rendering_of(recorded))
    model.save_pretrained(folder)
    return folder


def batches(data, stage="fit"):
    data.prepare_data()
    data.setup(stage)
    return data


def trained_ids(tokenizer, rows, tmp_path, **options):
    """The ids of the chosen side of each row in reward training."""
    fixed = {"validation_split": 0.0, "batch_size": len(rows), "max_length": 400, "cache_dir": tmp_path}
    batch = next(iter(batches(PreferenceDataModule(tokenizer, rows, **fixed | options)).train_dataloader()))
    return {
        int(row): ids[mask].tolist()
        for row, ids, mask in zip(batch.row_ids, batch.chosen_ids, batch.chosen_mask, strict=True)
    }


def prompts_of(tokenizer, rows, tmp_path, **options):
    fixed = {"validation_split": 0.0, "rollout_batch_size": len(rows), "max_prompt_length": 300, "cache_dir": tmp_path}
    data = batches(PromptDataModule(tokenizer, rows, **fixed | options))
    return data.chat, next(iter(data.train_dataloader()))


def answered(chat, prompts: PromptBatch, rows, ended: bool):
    """What a policy generates that says the chosen answers, cut before the end of the turn or not."""
    said = [chat.encode_dialogue(rows[i]["prompt"], rows[i]["chosen"])[1] for i in prompts.row_ids.tolist()]
    said = [torch.tensor(ids if ended else ids[:-1]).long() for ids in said]
    ids = torch.nn.utils.rnn.pad_sequence(said, batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in said]).unsqueeze(1)
    generation = Generation(ids, mask, torch.full((len(said),), ended))
    return generation, decode_responses(chat.tokenizer, generation)


def scored_ids(scorer, prompts, generation, texts):
    """The ids that a scorer's model is shown, by row."""
    shown = []
    scorer.model.scores = lambda ids, mask: (
        shown.extend(row[kept].tolist() for row, kept in zip(ids, mask, strict=True)) or torch.zeros(len(ids))
    )
    sequences = torch.cat([prompts.prompt_ids, generation.response_ids], dim=1)
    kept = torch.cat([prompts.prompt_mask, generation.response_mask], dim=1)
    known = generation.ended, prompts.prompts, texts, prompts.row_ids, prompts.written
    scorer(Responses(sequences, kept, *known))
    return dict(zip(prompts.row_ids.tolist(), shown, strict=True))


PAIRS = {
    "plain policy, templated reward": ((None, {}), (GEMMA_LIKE, True, {}), TEXT_ROWS),
    "templated policy, plain reward": ((CHATML, {}), (None, False, {"dialogue_format": "plain"}), ROWS),
    "two templates": ((CHATML, {}), (GEMMA_LIKE, True, {}), ROWS),
    "spaces around answers": ((LLAMA2_LIKE, {}), (CHATML, False, {}), ROWS),
    "spaces around answers of the reward": ((GEMMA_LIKE, {}), (LLAMA2_LIKE, False, {}), ROWS),
    "the policy's own end of turn": ((GEMMA, {}), (CHATML, False, {}), ROWS),
    "the reward's own end of turn": ((CHATML, {}), (GEMMA, True, {}), ROWS),
    "a policy that thinks": ((THINKS, {}), (GEMMA_LIKE, True, {}), ROWS),
    "two plain formats": (
        (None, {"dialogue_format": "plain"}),
        (None, False, {"dialogue_format": "plain", "plain_format": ANGLES}),
        ROWS,
    ),
    "a template for every text": ((CHATML, {}), (GEMMA_LIKE, True, {"dialogue_format": "chat_template"}), ROWS),
}


@pytest.mark.parametrize("own_tokens", [True, False], ids=["own tokens", "the policy's tokens"])
@pytest.mark.parametrize(("policy", "reward", "rows"), PAIRS.values(), ids=PAIRS)
def test_ids_scored_are_those_of_reward_training(tmp_path, policy, reward, rows, own_tokens):
    (template, options), (reward_template, bos, reward_options) = policy, reward
    theirs = tokenizer_of(reward_template, bos and own_tokens, [" bread", "yeast"] if own_tokens else [])
    expected = trained_ids(theirs, rows, tmp_path / "cache", **reward_options)
    folder = reward_folder(tmp_path, theirs, ChatEncoder(theirs, **reward_options))

    chat, prompts = prompts_of(tokenizer_of(template), rows, tmp_path / "cache", **options)
    scorer = load_scorer(folder, chat)
    assert isinstance(scorer, TextScorer)
    assert scorer.same_ids != own_tokens
    assert scored_ids(scorer, prompts, *answered(chat, prompts, rows, ended=True)) == expected
    without_end = {row: ids[:-1] for row, ids in expected.items()}
    assert scored_ids(scorer, prompts, *answered(chat, prompts, rows, ended=False)) == without_end


def test_ids_are_handed_over_only_where_they_are_written_alike(tmp_path):
    ours, theirs = tokenizer_of(CHATML), tokenizer_of(GEMMA_LIKE)
    folder = reward_folder(tmp_path, ours, ChatEncoder(ours))
    alike = [ChatEncoder(ours), ChatEncoder(tokenizer_of(CHATML), plain_format=ANGLES)]
    other = [
        ChatEncoder(theirs),
        ChatEncoder(tokenizer_of()),
        ChatEncoder(ours, "plain"),
        ChatEncoder(ours, "chat_template"),
    ]
    assert all(isinstance(load_scorer(folder, chat), ModelScorer) for chat in alike)
    assert all(isinstance(load_scorer(folder, chat), TextScorer) for chat in other)
    plain = reward_folder(tmp_path / "plain", tokenizer_of(), ChatEncoder(tokenizer_of()))
    assert isinstance(load_scorer(plain, ChatEncoder(theirs, "plain")), ModelScorer)
    assert isinstance(load_scorer(plain, ChatEncoder(theirs, "plain", plain_format=ANGLES)), TextScorer)


@pytest.mark.parametrize(
    ("template", "ours", "dialogue_format", "how"),
    [
        (CHATML, True, "auto", "by its tokenizer's chat template"),
        (CHATML, False, "chat_template", "by its tokenizer's chat template"),
        (None, True, "plain", "in the plain Human and Assistant format"),
        (None, False, "plain", "in the plain Human and Assistant format"),
    ],
)
def test_a_reward_model_without_a_record_is_read_by_its_tokenizer_and_that_is_said(
    tmp_path, logged, template, ours, dialogue_format, how
):
    folder = reward_folder(tmp_path, tokenizer_of(template, more=["yeast"]))
    if not ours:
        config = json.loads((Path(folder) / "config.json").read_text())
        del config["reward_calibration"]
        (Path(folder) / "config.json").write_text(json.dumps(config))
    scorer = load_scorer(folder, ChatEncoder(tokenizer_of(GEMMA_LIKE)))
    assert scorer.chat.dialogue_format == dialogue_format
    (line,) = (line for line in logged() if line.startswith("reward model"))
    assert line == f"reward model '{folder}' does not record how its dialogues were written; they are written {how}"


def test_a_record_that_says_nothing_sound_is_refused(tmp_path):
    folder = reward_folder(tmp_path, tokenizer_of(CHATML), ChatEncoder(tokenizer_of(CHATML)))
    config = json.loads((Path(folder) / "config.json").read_text())
    (Path(folder) / "config.json").write_text(json.dumps(config | {RENDERING: {"dialogue_format": "auto"}}))
    with pytest.raises(UserError, match=f"^{RENDERING} in the config of '.*' is not as it should be: KeyError"):
        load_scorer(folder, ChatEncoder(tokenizer_of()))


def test_a_prompt_that_was_cut_for_the_policy_is_scored_whole_up_to_the_reward_model_s_own_context(tmp_path):
    theirs = tokenizer_of(GEMMA_LIKE, bos=True)
    asked = [[*before, {"role": "user", "content": f"faster, {i}?"}] for i, before in enumerate((ASKED, []))]
    rows = [{"prompt": prompt, "chosen": "Buy it!", "rejected": "No."} for prompt in asked]
    expected = trained_ids(theirs, rows, tmp_path / "cache")
    chat, prompts = prompts_of(tokenizer_of(CHATML), rows, tmp_path / "cache", max_prompt_length=16)
    assert prompts.prompt_ids.shape[1] == 16
    answers = answered(chat, prompts, rows, ended=True)
    whole = load_scorer(reward_folder(tmp_path, theirs, ChatEncoder(theirs)), chat)
    assert scored_ids(whole, prompts, *answers) == expected

    short = load_scorer(reward_folder(tmp_path / "short", theirs, ChatEncoder(theirs), context=90), chat)
    with pytest.warns(UserWarning, match="more than 90 tokens are too long for the reward model"):
        cut = scored_ids(short, prompts, *answers)
    # The BOS, and the end of the dialogue.
    assert cut == {row: ids if len(ids) <= 90 else [*ids[:1], *ids[-89:]] for row, ids in expected.items()}
    assert [len(expected[row]) > 90 for row in range(2)] == [True, False]


def test_only_what_a_reward_model_has_no_room_for_is_cut(tmp_path, recwarn):
    theirs = tokenizer_of(GEMMA_LIKE, bos=True)
    folder = reward_folder(tmp_path, theirs, ChatEncoder(theirs), context=40)
    cut = load_scorer(folder, ChatEncoder(tokenizer_of(CHATML)))
    scaled = load_reward_model(folder)
    scaled.model.config.rope_parameters = {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}
    question = WrittenPrompt("why " * 60)
    whole = TextScorer(scaled, cut.chat).encode(question, "so", ended=True)
    assert len(whole) > 60
    assert not recwarn.list
    assert len(cut.encode(question, "so", ended=True)) == 40


def test_a_dialogue_that_the_reward_model_s_template_refuses_is_named(tmp_path):
    theirs = tokenizer_of(REFUSES_SYSTEM)
    chat, prompts = prompts_of(tokenizer_of(CHATML), ROWS, tmp_path / "cache")
    scorer = load_scorer(reward_folder(tmp_path, theirs, ChatEncoder(theirs)), chat)
    with pytest.raises(UserError, match=r"^row 0: the reward model cannot read the prompt: .*no system turns"):
        scored_ids(scorer, prompts, *answered(chat, prompts, ROWS, ended=True))


def test_responses_are_scored_as_they_were_said(tmp_path):
    tokenizer = tokenizer_of()
    tokenizer.clean_up_tokenization_spaces = True
    ids = torch.tensor([tokenizer("Wait , it is n't done .").input_ids])
    generation = Generation(ids, torch.ones_like(ids).bool(), torch.tensor([False]))
    assert decode_responses(tokenizer, generation) == ["Wait , it is n't done ."]


@pytest.mark.parametrize("export", ["merged", "adapter"])
def test_the_folder_of_reward_training_records_its_rendering_and_ppo_reads_by_it(tmp_path, monkeypatch, export):
    base = save_llama(tmp_path / "base", tokenizer_of(more=["yeast"]))
    settings = {} if export == "merged" else {"finetune": FineTune(mode="lora", export="adapter", rank=2)}
    options = {"chat_template": LLAMA2_LIKE, "dialogue_format": "chat_template", "max_length": 60}
    asked = [[{"role": "user", "content": f"faster, {i}?"}] for i in range(8)]
    rows = [{"prompt": prompt, "chosen": "Buy it!", "rejected": "No."} for prompt in asked]
    held_out = {"validation_split": 0.5, "cache_dir": tmp_path / "cache"}
    data = PreferenceDataModule(base, rows, batch_size=2, **held_out, **options)
    fit(RewardModule(base, **settings), data, max_steps=1, callbacks=[HFExport(str(tmp_path / "rm"))])
    expected = {tuple(ids) for ids in trained_ids(base, rows, tmp_path / "cache", **options).values()}

    shown, read = [], TextScorer.read

    def spy(self, written, said, ended):
        shown.append(read(self, written, "Buy it!", True).ids)
        return read(self, written, said, ended)

    monkeypatch.setattr(TextScorer, "read", spy)
    policy = save_llama(tmp_path / "policy", tokenizer_of(CHATML))
    module = PPOModule(policy, str(tmp_path / "rm"), **SIZES)
    prompts = PromptDataModule(policy, rows, rollout_batch_size=2, max_prompt_length=50, **held_out)
    fit(module, prompts, max_steps=1)
    trainer(max_steps=1).predict(module, prompts)
    chat = module.scorer.chat
    assert (chat.dialogue_format, chat.tokenizer.chat_template) == ("chat_template", LLAMA2_LIKE)
    assert {tuple(ids) for ids in shown} <= expected
    assert len(shown) > 4


def test_a_value_model_starts_from_a_reward_model_of_the_same_tokens(tmp_path):
    ours, theirs = tokenizer_of(CHATML), tokenizer_of(GEMMA_LIKE)
    folder = reward_folder(tmp_path, theirs, ChatEncoder(theirs))
    policy = str(tmp_path / "base")
    models = ModelSource(policy, folder).load(ChatEncoder(ours))
    assert isinstance(models.scorer, TextScorer)
    assert models.value.model.score.weight.abs().sum() > 0
    assert models.value is not models.scorer.model
    torch.testing.assert_close(models.value.model.score.weight, models.scorer.model.model.score.weight)
    other = tokenizer_of(GEMMA_LIKE, more=["yeast", " bread"])
    models = ModelSource(policy, reward_folder(tmp_path / "other", other)).load(ChatEncoder(ours))
    assert models.value.model.score.weight.abs().sum() == 0


TOOL = {"type": "function", "function": {"name": "oven", "description": "", "parameters": {}}}


@pytest.mark.parametrize("how", ["cached", "given", "streamed"])
def test_rewards_are_given_what_the_rows_say_wherever_prompts_come_from(tmp_path, monkeypatch, how):
    given = []

    def judge(prompts, responses, messages):
        given.append((prompts, responses, messages))
        return [float(i) for i in range(len(responses))]

    turns = [{"role": "user", "content": f"faster, {i}?"} for i in range(8)]
    rows = [{"prompt": [turn], "tools": [TOOL]} for turn in turns]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    policy = save_llama(tmp_path / "policy", tokenizer_of(TOOLS_SHOWN))
    options = {
        "rollout_batch_size": 2,
        "max_prompt_length": 60,
        "validation_split": 0.5,
        "cache_dir": tmp_path / "cache",
    }
    data = {"cached": str(tmp_path / "rows.jsonl"), "given": rows}
    if how == "streamed":
        options |= {"validation_split": 0.0, "validation_data": rows[4:]}
        data = {"streamed": Table(str(tmp_path / "rows.jsonl"), streaming=True)}
    prompts = PromptDataModule(policy, data[how], predict_data=rows[:2], **options)
    module = PPOModule(policy, judge, **SIZES)
    fit(module, prompts, max_steps=2)
    for stage in (trainer().validate, trainer().predict):
        before = len(given)
        stage(module, datamodule=prompts)
        assert len(given) > before
    for texts, responses, messages in given:
        assert messages == [[{"role": "user", "content": text}] for text in texts]
        assert {text in {turn["content"] for turn in turns} for text in texts} == {True}
        assert not any("<|" in text for text in responses)

    # And with their tools, to a reward model that reads other tokens.
    theirs = tokenizer_of(TOOLS_SHOWN, more=["yeast"])
    scorer = load_scorer(reward_folder(tmp_path, theirs, ChatEncoder(theirs)), prompts.chat)
    batch = next(iter(prompts.train_dataloader()))
    generation = Generation(*torch.ones(2, 2, 1).long().unbind(), torch.tensor([True, True]))
    shown = scored_ids(scorer, batch, generation._replace(response_mask=generation.response_mask.bool()), ["yes", "no"])
    assert all(theirs.decode(ids).startswith("oven") for ids in shown.values())
