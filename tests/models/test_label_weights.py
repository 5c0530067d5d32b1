"""Classifiers of several labels, as anybody trained them: the score is the weighted sum of transformers' logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from helpers.classifiers import ATTRIBUTES, ENCODERS, WEIGHTS, encoder, named, pair_tokenizer, save_encoder
from helpers.models import VOCAB_SIZE, save_folder, spread_weights, tiny_classifier
from helpers.stages import save_llama, save_reward_model
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.chat.written import WrittenPrompt
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation import Judge
from rlhf_lightning.functional import scores_at_end
from rlhf_lightning.models import classifiers
from rlhf_lightning.models.classifiers import Classifier, check_hides_padding
from rlhf_lightning.models.labels import labels_of
from rlhf_lightning.models.rewarding import load_scorer
from rlhf_lightning.models.scalar_lm import Calibration, ScalarLM, load_reward_model
from rlhf_lightning.models.scorers import ModelScorer, Responses, TextScorer

PROMPTS = ["can you help", "bake bread", "how do i repair my old bicycle?", "yeast"]
ANSWERS = [" me repair my bicycle?", " and wait", " Start with the chain.", ""]
BY_ORDER = torch.tensor([0.65, 0.8, 0.0, 0.0, -0.4])
CLOSE = {"atol": 2e-5, "rtol": 1e-5}
"""Of logits of a few units in float32, the head folded into one row before it is applied."""


def responses(prompts: list[str], answers: list[str]) -> Responses:
    """As a rollout of a policy with the tiny tokenizer holds them; all ended."""
    tokenizer = tiny_tokenizer()
    asked = [tokenizer(text).input_ids for text in prompts]
    said = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in answers]
    left, right = max(map(len, asked)), max(map(len, said))
    ids = torch.zeros(len(prompts), left + right, dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, (a, b) in enumerate(zip(asked, said, strict=True)):
        ids[row, left - len(a) : left + len(b)] = torch.tensor(a + b)
        mask[row, left - len(a) : left + len(b)] = True
    return Responses(ids, mask, torch.ones(len(prompts)).bool(), prompts, answers)


def chunks(size: int) -> list[Responses]:
    """The four prompts with their answers, so many at a time."""
    return [responses(PROMPTS[i : i + size], ANSWERS[i : i + size]) for i in range(0, len(PROMPTS), size)]


@torch.no_grad()
def ours(scorer: Any, size: int) -> Tensor:
    return torch.cat([scorer(batch) for batch in chunks(size)])


@torch.no_grad()
def plain_pairs(folder: str, size: int) -> Tensor:
    """Logits of plain transformers, which is given pairs of texts, `[4, K]`."""
    tokenizer, found = AutoTokenizer.from_pretrained(folder), []
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    for i in range(0, len(PROMPTS), size):
        texts = tokenizer(PROMPTS[i : i + size], ANSWERS[i : i + size], padding=True, return_tensors="pt")
        found.append(model(**texts).logits)
    return torch.cat(found)


@torch.no_grad()
def plain_ids(folder: str, size: int) -> Tensor:
    """Logits of plain transformers, which is given the policy's ids, padded on the right by its own pad token."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    found = []
    for batch in chunks(size):
        rows = [ids[mask] for ids, mask in zip(batch.sequences, batch.sequence_mask, strict=True)]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=model.config.pad_token_id)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows]).unsqueeze(1)
        found.append(model(input_ids=ids, attention_mask=mask.long()).logits)
    return torch.cat(found)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt-neox", "gemma2", "qwen3", "bloom"])
def test_a_decoder_s_attributes_are_weighed_as_transformers_computes_them(tmp_path, family, size):
    model = tiny_classifier(family, num_labels=5, **named(ATTRIBUTES), problem_type="regression")
    folder = save_folder(tmp_path / "model", model, tiny_tokenizer())
    scorer = load_scorer(folder, ChatEncoder(tiny_tokenizer()), weights=WEIGHTS)
    assert isinstance(scorer, ModelScorer)
    assert scorer.model.model.config.num_labels == 1
    expected = plain_ids(folder, size) @ BY_ORDER
    torch.testing.assert_close(ours(scorer, size), expected, **CLOSE)
    assert expected.std() > 0.01


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("kind", [*ENCODERS])
def test_an_encoder_s_labels_are_weighed_as_transformers_computes_them(tmp_path, kind, size):
    folder = save_encoder(tmp_path / "model", kind, num_labels=5, **named(ATTRIBUTES))
    scorer = load_scorer(folder, ChatEncoder(tiny_tokenizer()), weights=WEIGHTS)
    assert isinstance(scorer, TextScorer)
    assert isinstance(scorer.model, Classifier)
    expected = plain_pairs(folder, size) @ BY_ORDER
    torch.testing.assert_close(ours(scorer, size), expected, **CLOSE)
    judged = Judge.load(folder, weights=WEIGHTS, dtype="float32", device="cpu")
    texts = [WrittenPrompt(prompt) for prompt in PROMPTS]
    torch.testing.assert_close(judged.scores(texts, ANSWERS, max_tokens=60 * size), expected, **CLOSE)
    assert judged.token_scores(texts[0], ANSWERS[0]) == []
    assert judged.chat is None
    assert expected.std() > 1e-4


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_of_one_label_the_score_is_its_logit(tmp_path, kind):
    folder = save_encoder(tmp_path / "model", kind, num_labels=1)
    scorer = load_scorer(folder, ChatEncoder(tiny_tokenizer()))
    torch.testing.assert_close(ours(scorer, 4), plain_pairs(folder, 4).squeeze(1), **CLOSE)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_difference_of_two_logits_is_the_log_odds_of_a_label(tmp_path, kind):
    names = named(["NEGATIVE", "POSITIVE"])
    if kind == "llama":
        folder = save_folder(tmp_path / "model", tiny_classifier(num_labels=2, **names), tiny_tokenizer())
    else:
        folder = save_encoder(tmp_path / "model", kind, num_labels=2, **names)
    scorer = load_scorer(folder, ChatEncoder(tiny_tokenizer()), weights={"POSITIVE": 1, "NEGATIVE": -1})
    logits = plain_ids(folder, 4) if kind == "llama" else plain_pairs(folder, 4)
    torch.testing.assert_close(ours(scorer, 4), logits.softmax(dim=1)[:, 1].logit(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_two_labels_that_nobody_named_are_found_in_the_files(tmp_path, family):
    """transformers leaves their names out of the config, which then looks like that of one label."""
    if family == "llama":
        folder = save_folder(tmp_path / "model", tiny_classifier(num_labels=2), tiny_tokenizer())
    else:
        folder = save_encoder(tmp_path / "model", num_labels=2)
    assert "id2label" not in json.loads(Path(folder, "config.json").read_text())
    with pytest.raises(UserError, match=r"a classifier with 2 labels \(LABEL_0, LABEL_1\), and a reward is one score"):
        load_scorer(folder, ChatEncoder(tiny_tokenizer()))
    scorer = load_scorer(folder, ChatEncoder(tiny_tokenizer()), weights={"LABEL_1": 2.0})
    logits = plain_ids(folder, 4) if family == "llama" else plain_pairs(folder, 4)
    torch.testing.assert_close(ours(scorer, 4), 2 * logits[:, 1], **CLOSE)


def in_older_format(folder: str, file: str = "model") -> str:
    """The weights as `torch.save` writes them."""
    weights = Path(folder, f"{file}.safetensors")
    torch.save(load_file(weights), Path(folder, f"{'pytorch_' if file == 'model' else ''}{file}.bin"))
    weights.unlink()
    return folder


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_labels_that_nobody_named_are_two_where_no_file_tells(tmp_path, monkeypatch, family):
    if family == "llama":
        folder = save_folder(tmp_path / "model", tiny_classifier(num_labels=2), tiny_tokenizer())
    else:
        folder = save_encoder(tmp_path / "model", num_labels=2)
    expected = (plain_ids(folder, 4) if family == "llama" else plain_pairs(folder, 4)) @ torch.tensor([-1.0, 2.0])
    with pytest.raises(UserError, match=r"a classifier with 2 labels \(LABEL_0, LABEL_1\)"):
        load_scorer(in_older_format(folder), ChatEncoder(tiny_tokenizer()))
    scorer = load_scorer(folder, ChatEncoder(tiny_tokenizer()), weights={"LABEL_0": -1.0, "LABEL_1": 2.0})
    torch.testing.assert_close(ours(scorer, 4), expected, **CLOSE)
    said = json.loads(Path(folder, "config.json").read_text())
    monkeypatch.setattr("transformers.PretrainedConfig.get_config_dict", lambda name: (said, {}))
    assert labels_of("owner/two", fetch=True) == ["LABEL_0", "LABEL_1"]
    assert labels_of("owner/two") == ["LABEL_0"], "nothing is asked of the hub"


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_reward_model_of_this_package_has_one_label_in_any_format(tmp_path, ending):
    folder = save_reward_model(tmp_path / "reward", save_llama(tmp_path / "policy"))
    if ending == "bin":
        in_older_format(folder)
    assert labels_of(folder) == ["LABEL_0"]
    assert load_reward_model(folder).calibration.std == 2.0


def test_an_adapter_s_labels_are_those_of_its_head_in_any_format(tmp_path):
    base = save_folder(tmp_path / "base", tiny_classifier(num_labels=2), tiny_tokenizer())
    model = AutoModelForSequenceClassification.from_pretrained(base)
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], modules_to_save=["score"])
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    assert labels_of(str(tmp_path / "adapter")) == ["LABEL_0", "LABEL_1"]
    assert labels_of(in_older_format(str(tmp_path / "adapter"), "adapter_model")) == ["LABEL_0", "LABEL_1"]


def test_a_language_model_of_the_hub_is_none_before_its_labels_are_spoken_of(monkeypatch):
    said = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    monkeypatch.setattr("transformers.PretrainedConfig.get_config_dict", lambda name: (said, {}))
    with pytest.raises(UserError, match="'owner/model' has no trained reward head"):
        load_reward_model("owner/model")


def test_a_head_with_a_bias_is_folded_with_it(tmp_path):
    model: Any = tiny_classifier(num_labels=5)
    folder = save_folder(tmp_path / "model", model, tiny_tokenizer())
    scalar = load_reward_model(folder, weights={"0": 1.5, "4": -2.0})
    head = torch.nn.Linear(16, 5)
    from rlhf_lightning.models.labels import fold_head

    hidden, factors = torch.randn(3, 16), torch.tensor([1.5, 0, 0, 0, -2.0])
    torch.testing.assert_close(fold_head(head, factors.tolist())(hidden).squeeze(1), head(hidden) @ factors)
    ids = torch.tensor([[5, 6, 7, 2]])
    expected = model(ids).logits @ factors
    torch.testing.assert_close(scalar.scores(ids, ids > 0), expected, **CLOSE)


def test_weights_leave_a_calibration_out(tmp_path):
    scalar = ScalarLM(tiny_classifier())
    scalar.calibration = Calibration(mean=0.5, std=2.0, probe_ids=[5, 6], probe_score=7.0)
    folder = save_folder(tmp_path / "model", scalar.model, tiny_tokenizer())
    ids = torch.tensor([[5, 6, 7, 2]])
    weighed = load_reward_model(folder, weights={"LABEL_0": -1.0})
    torch.testing.assert_close(weighed.scores(ids, ids > 0), -scores_at_end(scalar.raw(ids, ids > 0), ids > 0), **CLOSE)
    assert weighed.calibration == Calibration()


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (None, "is a classifier with 5 labels (helpfulness, correctness, coherence, complexity, verbosity)"),
        ({"helpfullness": 1.0}, "has no label 'helpfullness'; did you mean helpfulness? its labels are helpfulness, "),
        ({"5": 1.0}, "has no label '5'; its labels are helpfulness, "),
        ({"verbosity": 1.0, "4": 2.0}, "names label 4 of"),
        ({"verbosity": 0.0}, "gives no label of"),
        ({}, "gives no label of"),
    ],
)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_weights_that_do_not_fit_are_refused_before_anything_is_loaded(tmp_path, family, weights, said):
    if family == "llama":
        folder = save_folder(tmp_path / "m", tiny_classifier(num_labels=5, **named(ATTRIBUTES)), tiny_tokenizer())
    else:
        folder = save_encoder(tmp_path / "m", num_labels=5, **named(ATTRIBUTES))
    Path(folder, "model.safetensors").unlink()
    with pytest.raises(UserError) as error:
        load_scorer(folder, ChatEncoder(tiny_tokenizer()), weights=weights)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_function_has_no_labels():
    with pytest.raises(UserError, match="'len' is a function"):
        load_scorer(len, ChatEncoder(tiny_tokenizer()), weights={"a": 1.0})


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_pair_that_is_too_long_loses_the_beginning_of_its_prompt(tmp_path, kind):
    folder = save_encoder(tmp_path / "model", kind, num_labels=1)
    scorer: Any = load_scorer(folder, ChatEncoder(tiny_tokenizer()))
    ids = scorer.encode(WrittenPrompt("z" * 200), "yeast", True)
    room = 80 - 2 * (kind == "roberta")  # whose first token stands at the place after that of padding
    tokenizer = pair_tokenizer(kind)
    whole = tokenizer("z" * 200, "yeast").input_ids
    assert ids == [whole[0], *whole[len(whole) - room + 1 :]]
    other: Any = load_scorer(folder, ChatEncoder(tiny_tokenizer()))
    with pytest.warns(UserWarning, match=f"more than {room} tokens"):
        scores = other(responses(["z" * 200], ["yeast"]))
    assert torch.isfinite(scores).all()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_text_that_holds_a_separator_is_read_as_transformers_reads_it(tmp_path, kind):
    folder = save_encoder(tmp_path / "model", kind, num_labels=1)
    judge = Judge.load(folder, dtype="float32", device="cpu")
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    pairs = [("bake <|end|> bread", "yeast"), ("bake", "yeast <|end|> x"), ("", "yeast"), ("bake", ""), ("a", "b")]
    found = judge.scores([WrittenPrompt(prompt) for prompt, _ in pairs], [answer for _, answer in pairs])
    expected = [model.eval()(**tokenizer([a], [b], return_tensors="pt")).logits.item() for a, b in pairs]
    torch.testing.assert_close(found, torch.tensor(expected), **CLOSE)
    alone = [judge.scores([WrittenPrompt(a)], [b]) for a, b in pairs]
    torch.testing.assert_close(torch.cat(alone), torch.tensor(expected), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("length", [70, 71, 75, 76, 77, 78, 79, 100])
def test_a_response_that_is_too_long_stays_the_second_text(tmp_path, kind, length):
    folder = save_encoder(tmp_path / "model", kind, num_labels=1)
    judge: Any = Judge.load(folder, dtype="float32", device="cpu")
    room, tokenizer = 80 - 2 * (kind == "roberta"), pair_tokenizer(kind)
    whole, said = tokenizer(["bake bread"], ["x" * length]), tokenizer("x" * length).input_ids[1:]
    between = [2] if kind == "bert" else [2, 2]
    prompt = whole.input_ids[0][1 : len(whole.input_ids[0]) - len(said) - len(between)]
    left, tail = max(0, room - 1 - len(between) - len(said)), said[-(room - 1 - len(between)) :]
    cut = [3, *prompt[max(0, len(prompt) - left) :], *between, *tail]
    assert judge.scores_by.encode(WrittenPrompt("bake bread"), "x" * length, True) == cut
    ids = torch.tensor([cut])
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    types = (torch.arange(len(cut)) >= cut.index(2) + 1).long()[None] * (kind == "bert")
    expected = model(input_ids=ids, token_type_ids=types).logits[0]
    torch.testing.assert_close(judge.scores([WrittenPrompt("bake bread")], ["x" * length]), expected, **CLOSE)


def test_a_classifier_that_reads_padding_is_refused(tmp_path):
    config = AutoConfig.for_model(
        "xlnet", vocab_size=VOCAB_SIZE, d_model=16, n_layer=1, n_head=2, d_inner=16, pad_token_id=0, num_labels=1
    )
    model = AutoModelForSequenceClassification.from_config(config).eval()
    spread_weights(model)
    folder = save_folder(tmp_path / "model", model, pair_tokenizer("xlnet"))
    with pytest.raises(UserError, match=r"\(XLNetForSequenceClassification\) gives a text other logits where padding"):
        load_scorer(folder, ChatEncoder(tiny_tokenizer()))


@pytest.mark.parametrize("why", ["it raised", "its weights are spread over processes"])
def test_where_it_cannot_be_tried_what_padding_does_that_is_said(monkeypatch, recwarn, why):
    model = encoder("bert", num_labels=1)
    if why == "it raised":
        monkeypatch.setattr(model, "forward", Mock(side_effect=RuntimeError(why)))
    else:
        monkeypatch.setattr(classifiers, "is_sharded", lambda _: True)
    check_hides_padding("bert", model)
    assert [str(each.message) for each in recwarn] == [
        f"it was not tried whether padding changes what 'bert' says of a text: {why}"
    ]


def test_a_head_that_nobody_trained_is_none(tmp_path):
    model: Any = encoder("bert", num_labels=2, **named(["a", "b"]))
    folder = tmp_path / "model"
    model.bert.save_pretrained(folder)
    pair_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(json.loads(model.config.to_json_string())))
    with pytest.raises(UserError, match=r"lack classifier[.]bias, which would be random"):
        load_scorer(str(folder), ChatEncoder(tiny_tokenizer()), weights={"b": 1.0})


@torch.no_grad()
@pytest.mark.parametrize("model", [tiny_classifier(), encoder("roberta", num_labels=1)], ids=["decoder", "encoder"])
def test_what_stands_in_padding_changes_nothing(model):
    """transformers' decoders read the last id that is no pad."""
    scorer = Classifier(model, [1.0])
    ids, mask = torch.tensor([[3, 7, 8, 2], [3, 9, 5, 5]]), torch.tensor([[True] * 4, [True, True, False, False]])
    scores = scorer.scores(ids, mask)
    torch.testing.assert_close(scores[1:], scorer.scores(ids[1:, :2], mask[1:, :2]), **CLOSE)
