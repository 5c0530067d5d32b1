"""Where scores come from: ids, text, or a Python function."""

import pytest
import torch

from helpers.models import save_folder, tiny_causal_lm, tiny_classifier
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.chat.written import WrittenPrompt
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.rewarding import load_scorer
from rlhf_lightning.models.scalar_lm import Calibration, ScalarLM, load_reward_model
from rlhf_lightning.models.scorers import FunctionScorer, ModelScorer, Responses, TextScorer

PROMPTS = ["can you help", "bake bread"]
ANSWERS = [" me repair my bicycle?", " and wait"]
ENDED = [True, False]


def reward_folder(path, tokenizer):
    scalar = ScalarLM(tiny_classifier())
    scalar.calibration = Calibration(mean=0.5, std=2.0)
    return save_folder(path, scalar.model, tokenizer)


def responses(tokenizer):
    """The texts above as a rollout holds them: prompts padded on the left, responses on the right."""
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    answers = [
        tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] * ended
        for text, ended in zip(ANSWERS, ENDED, strict=True)
    ]
    width, length = max(map(len, prompts)), max(map(len, answers))
    rows, masks = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        left, right = width - len(prompt), length - len(answer)
        rows.append([tokenizer.eos_token_id] * left + prompt + answer + [tokenizer.eos_token_id] * right)
        masks.append([False] * left + [True] * len(prompt + answer) + [False] * right)
    return Responses(torch.tensor(rows), torch.tensor(masks), torch.tensor(ENDED), PROMPTS, ANSWERS)


@torch.no_grad()
def scores_by_hand(folder, rows):
    """Each row alone, without padding, calibrated by hand."""
    model = load_reward_model(folder)
    return [(model.raw(torch.tensor([row]), torch.ones(1, len(row)).bool())[0, -1].item() - 0.5) / 2.0 for row in rows]


@pytest.mark.parametrize("pad", ["own", "eos", "none"])
@torch.no_grad()
def test_a_reward_model_with_the_policy_s_tokenizer_reads_ids(tmp_path, pad):
    folder = reward_folder(tmp_path, tiny_tokenizer())
    policy_tokenizer = tiny_tokenizer(pad=pad)
    scorer = load_scorer(folder, ChatEncoder(policy_tokenizer))
    assert isinstance(scorer, ModelScorer)
    batch = responses(policy_tokenizer)
    scores = scorer(batch)
    assert scores.shape == (2,)
    torch.testing.assert_close(scores, load_reward_model(folder).scores(batch.sequences, batch.sequence_mask))
    rows = [ids[mask].tolist() for ids, mask in zip(batch.sequences, batch.sequence_mask, strict=True)]
    assert scores.tolist() == pytest.approx(scores_by_hand(folder, rows), abs=1e-5)


@pytest.mark.parametrize("bos", [False, True])
@torch.no_grad()
def test_a_reward_model_with_another_tokenizer_reads_text(tmp_path, bos):
    theirs = tiny_tokenizer(bos=bos)
    theirs.add_tokens([" repair", "bread"])
    folder = reward_folder(tmp_path, theirs)
    scorer = load_scorer(folder, ChatEncoder(tiny_tokenizer()))
    assert isinstance(scorer, TextScorer)
    scores = scorer(responses(tiny_tokenizer()))
    rows = []
    for prompt, answer, ended in zip(PROMPTS, ANSWERS, ENDED, strict=True):
        # The BOS once, in front; the EOS only where the response ended by itself.
        row = [1] * bos + theirs(prompt, add_special_tokens=False).input_ids
        rows.append(row + theirs(answer, add_special_tokens=False).input_ids + [2] * ended)
    assert theirs.convert_tokens_to_ids(" repair") in rows[0]
    assert scores.tolist() == pytest.approx(scores_by_hand(folder, rows), abs=1e-5)


def test_prompt_and_response_meet_in_one_place_only():
    tokenizer = tiny_tokenizer()
    encode = TextScorer(ScalarLM(tiny_classifier()), ChatEncoder(tokenizer)).encode
    prompt = WrittenPrompt("bake")
    assert encode(prompt, " it", ended=True) == tokenizer("bake").input_ids + tokenizer(" it").input_ids + [2]
    assert encode(prompt, "", ended=True) == [*tokenizer("bake").input_ids, 2]
    assert encode(prompt, " it", ended=False)[-1] != 2


@pytest.fixture
def rewards_module(tmp_path, monkeypatch):
    """A user's module on the import path."""
    (tmp_path / "my_rewards.py").write_text(
        "limit = 3\n"
        "def length(prompts, responses):\n"
        "    return [len(p) + 100 * len(r) for p, r in zip(prompts, responses)]\n"
        "def one_too_few(prompts, responses):\n"
        "    return [0.0] * (len(responses) - 1)\n"
    )
    (tmp_path / "needs_more.py").write_text("import a_package_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("rewards_module")
@pytest.mark.parametrize("path", ["my_rewards.length", "my_rewards:length"])
def test_a_function_by_its_import_path(path):
    scorer = load_scorer(path, ChatEncoder(tiny_tokenizer()))
    assert isinstance(scorer, FunctionScorer)
    scores = scorer(responses(tiny_tokenizer()))
    assert scores.dtype == torch.float32
    assert scores.tolist() == [len(p) + 100 * len(r) for p, r in zip(PROMPTS, ANSWERS, strict=True)]


@pytest.mark.parametrize("wrap", [list, tuple, torch.tensor, iter])
def test_a_function_itself_with_any_sequence_of_numbers(wrap):
    scorer = load_scorer(lambda prompts, answers: wrap([1.5, 2]), ChatEncoder(tiny_tokenizer()))
    assert scorer(responses(tiny_tokenizer())).tolist() == [1.5, 2.0]


@pytest.mark.usefixtures("rewards_module")
def test_a_wrong_number_of_scores_is_refused():
    scorer = load_scorer("my_rewards.one_too_few", ChatEncoder(tiny_tokenizer()))
    with pytest.raises(
        UserError, match=r"^reward function 'my_rewards.one_too_few' returned 1 scores for 2 responses$"
    ):
        scorer(responses(tiny_tokenizer()))


@pytest.mark.usefixtures("rewards_module")
@pytest.mark.parametrize(
    ("reward", "complaint"),
    [
        ("my_rewards.nothing", "module 'my_rewards' has no function 'nothing'"),
        ("my_rewards.limit", "module 'my_rewards' has no function 'limit'"),
        ("no_such_module.length", "neither a reward model folder nor the import path of a function"),
        ("needs_more.length", "cannot be imported: ModuleNotFoundError: No module named 'a_package_nobody_has'"),
        ("my_rewards.py:length", "names a file: name the function in it, like `my_rewards.politeness`"),
        ("./rewards/my_rewards.py", "names a file: name the function in it"),
        ("word", "neither a reward model folder nor the import path of a function"),
        ("./runs/reward/export", "model folder './runs/reward/export' does not exist"),
        ("nobody/nothing", "'nobody/nothing'"),
    ],
)
def test_what_is_neither_a_model_nor_a_function_is_refused_in_one_line(reward, complaint):
    with pytest.raises(UserError) as error:
        load_scorer(reward, ChatEncoder(tiny_tokenizer()))
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("rewards_module")
def test_the_limit_of_time_is_a_function_s_own(tmp_path):
    assert load_scorer("my_rewards.length", ChatEncoder(tiny_tokenizer()), timeout=2.0).function.timeout == 2.0
    with pytest.raises(UserError, match=r"reward_timeout is a limit for functions, and .* is a reward model; leave it"):
        load_scorer(reward_folder(tmp_path, tiny_tokenizer()), ChatEncoder(tiny_tokenizer()), timeout=2.0)


def test_a_wrong_score_is_named_by_its_row_in_the_data():
    batch = responses(tiny_tokenizer())
    nones = load_scorer(lambda prompts, answers: [1.0, None], ChatEncoder(tiny_tokenizer()))
    for rows, said in ((None, "row 1"), (torch.tensor([40, 7]), "row 7")):
        with pytest.raises(UserError, match=f"returned None for {said}; return one number per response"):
            nones(batch._replace(row_ids=rows))


def test_a_language_model_is_no_reward(tmp_path):
    folder = save_folder(tmp_path, tiny_causal_lm(), tiny_tokenizer())
    with pytest.raises(UserError, match="no trained reward head"):
        load_scorer(folder, ChatEncoder(tiny_tokenizer()))
