"""Parts and stages of the data: no prompt on two sides, and none that moves."""

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.preparing import build, row_ids
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.chat.plain import render_plain
from rlhf_lightning.data import InstructionDataModule, PreferenceDataModule, PromptDataModule
from rlhf_lightning.data.preparing.filters import Filters, RowFilter, Splits, key_of
from rlhf_lightning.data.preparing.manifest import PARTS
from rlhf_lightning.data.rows import Row, split_of
from rlhf_lightning.data.sources import Blend, Table
from rlhf_lightning.errors import UserError

KINDS = ("finetune", "preference", "prompts")
HALVES = {"train": 0.5, "validation": 0.5}
PAIRS = [{"prompt": f"question {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(300)]


def sides(folder, need, rows):
    return {part: {rows[i]["prompt"] for i in numbers} for part, numbers in row_ids(folder, need).items()}


@settings(max_examples=25)
@given(
    order=st.permutations(range(60)),
    size=st.integers(30, 60),
    shuffle=st.booleans(),
    copies=st.sampled_from(["question {}", "QUESTION  {}", "\n\nHuman: question {}\n\nAssistant:"]),
)
def test_a_prompt_stays_on_its_side_in_any_company(tmp_path_factory, order, size, shuffle, copies):
    def prepared(rows):
        splits = Splits(0.2, 0.2, {"sft": 0.5, "reward": 0.5})
        folder = tmp_path_factory.mktemp("data")
        return build(folder, rows, splits=splits, filters=Filters(shuffle=shuffle), kinds=("finetune", "preference"))

    rows = PAIRS[:60]
    some = [rows[i] for i in order[:size]] + [rows[order[0]] | {"chosen": "again"}]
    whole, part = prepared(rows), prepared(some)

    for need in ("finetune", "preference"):
        by_part = sides(whole, need, rows)
        assert sum(map(len, by_part.values())) == len(set().union(*by_part.values()))
        assert all(found <= by_part[name] for name, found in sides(part, need, some).items())
    stages = [set().union(*sides(whole, need, rows).values()) for need in ("finetune", "preference")]
    assert not stages[0] & stages[1]
    assert len(stages[0] | stages[1]) == 60


def test_shares_are_about_what_was_asked_and_stages_do_not_lean_on_parts(tmp_path):
    rows = [{"prompt": f"question {i}", "chosen": "yes", "rejected": "no"} for i in range(3000)]
    stages = {"sft": 0.2, "reward": 0.4, "ppo": 0.4}
    folder = build(tmp_path / "data", rows, splits=Splits(0.1, 0.2, stages))

    for need, stage in zip(KINDS, stages, strict=True):
        numbers = row_ids(folder, need)
        assert sum(map(len, numbers.values())) == pytest.approx(3000 * stages[stage], rel=0.1)
        shares = [len(numbers[part]) / sum(map(len, numbers.values())) for part in PARTS]
        assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.05)


@pytest.mark.parametrize("kind", ["text", "dialogue", "messages"])
def test_stages_are_disjoint_across_the_three_data_modules(kind):
    question = {"text": "{}", "dialogue": "\n\nHuman: {}\n\nAssistant:", "messages": "{}"}[kind]
    prompts = [question.format(f"question {i}") for i in range(120)]
    if kind == "messages":
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    rows = [{"prompt": prompt, "chosen": "yes", "rejected": "no"} for prompt in prompts]
    split = {"sft": 0.3, "reward": 0.3, "ppo": 0.4}
    served = {}
    for module in (InstructionDataModule, PreferenceDataModule, PromptDataModule):
        size = {"rollout_batch_size": 1} if module is PromptDataModule else {}
        data = module(tiny_tokenizer(), rows, stage_split=split, dialogue_format="plain", **size)
        data.setup("fit")
        served[module] = {i for part in PARTS for i in data._part(part).row_ids.tolist()}
        assert data.counts["other stages"] == 120 - len(served[module])
        assert {
            i for loader in (data.train_dataloader(), data.val_dataloader()) for b in loader for i in b.row_ids.tolist()
        }
    assert sum(map(len, served.values())) == len(set().union(*served.values())) == 120


def test_a_stage_that_is_not_named_gets_every_row(tmp_path):
    folder = build(tmp_path / "data", PAIRS, splits=Splits(stages={"sft": 0.5, "reward": 0.5}))
    numbers = {need: set(row_ids(folder, need)["train"]) for need in KINDS}
    assert numbers["prompts"] == set(range(300)) == numbers["finetune"] | numbers["preference"]
    assert not numbers["finetune"] & numbers["preference"]


def test_pairs_and_ratings_take_the_share_of_the_reward_model():
    splits = Splits(stages={"sft": 0.3, "reward": 0.3, "ppo": 0.4})
    served = {splits.kinds(f"question {i}", (*KINDS, "rated")) for i in range(100)}
    assert served == {("finetune",), ("preference", "rated"), ("prompts",)}
    served = {Splits(stages={"sft": 0.5, "dpo": 0.5}).kinds(f"question {i}", (*KINDS, "rated")) for i in range(100)}
    assert served == {("finetune", "prompts", "rated"), ("preference", "prompts", "rated")}


def test_policies_learn_from_the_pairs_that_a_reward_model_would(tmp_path):
    shares = {"sft": 0.3, "ppo": 0.3}
    folders = {
        stage: build(tmp_path / stage, PAIRS, splits=Splits(0.2, stages=shares | {stage: 0.4}))
        for stage in ("reward", "dpo")
    }
    for need in KINDS:
        assert row_ids(folders["dpo"], need) == row_ids(folders["reward"], need)
    data = PreferenceDataModule(tiny_tokenizer(), PAIRS, stage_split={"sft": 0.6, "dpo": 0.4})
    data.setup("fit")
    assert 90 < data.counts["kept"] < 150 < data.counts["other stages"] == 300 - data.counts["kept"]


SHOUTED = {"hi there": "HI  there", "how are you?": "How are\nyou?", "bye": " bye", "be kind": "Be  kind"}
WORDS = st.sampled_from(list(SHOUTED))


@st.composite
def conversations(draw):
    """Messages, which end with the user, and what they open with."""
    systems = draw(st.lists(WORDS, max_size=2))
    spoken = draw(st.lists(WORDS, min_size=1, max_size=7).filter(lambda words: len(words) % 2))
    shout = SHOUTED.__getitem__ if draw(st.booleans()) else str
    messages = [{"role": "system", "content": shout(word)} for word in systems]
    messages += [{"role": ("user", "assistant")[i % 2], "content": shout(word)} for i, word in enumerate(spoken)]
    return messages, (*systems, spoken[0])


@settings(max_examples=60)
@given(drawn=st.lists(st.tuples(conversations(), st.booleans()), min_size=2, max_size=30))
def test_no_opening_of_a_dialogue_stands_on_two_sides(drawn):
    splits = Splits(0.3, 0.3, {"sft": 0.5, "ppo": 0.5})
    sides = {}
    for (messages, opening), as_text in drawn:
        plain = all(message["role"] != "system" for message in messages)
        row = Row(render_plain(messages)[0] if plain and as_text else messages)
        key = splits.key(row, key_of(row))
        sides.setdefault(opening, set()).add((splits.part(key), *splits.kinds(key, KINDS)))
    assert all(len(found) == 1 for found in sides.values()), sides


def test_dialogues_may_be_split_by_their_whole_prompt(tmp_path):
    turns = [{"role": "user", "content": "hi"}]
    rows = [{"prompt": [*turns, {"role": "user", "content": f"more {i}"}], "response": "yes"} for i in range(60)]
    held_out = {}
    for by in ("dialogue", "prompt"):
        folder = build(
            tmp_path / by,
            rows + [{"prompt": f"plain {i}", "response": "yes"} for i in range(60)],
            splits=Splits(0.5, by=by),
            dialogue_format="plain",
            kinds=("finetune",),
        )
        held_out[by] = set(row_ids(folder, "finetune")["validation"])
    dialogues = set(range(60))
    assert len(held_out["dialogue"] & dialogues) in (0, 60)
    assert 10 < len(held_out["prompt"] & dialogues) < 50
    assert held_out["dialogue"] - dialogues == held_out["prompt"] - dialogues


def test_where_prompts_fall_has_not_moved_but_for_dialogues():
    sides = [Splits(0.5).part(Splits.key(Splits(), row, key_of(row))) for row in map(Row, map(str, range(12)))]
    assert [side == "validation" for side in sides] == [split_of(str(i), HALVES) == "validation" for i in range(12)]
    assert len(set(sides)) == 2


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"validation": 1.0}, r"validation_split \(1.0\) must be at least 0 and below 1"),
        ({"test": -0.1}, r"test_split \(-0.1\) must be at least 0"),
        ({"validation": 0.5, "test": 0.5}, r"validation_split \(0.5\) and test_split \(0.5\) leave nothing"),
        ({"stages": {"sft": 0.5, "rm": 0.5}}, "stage_split: 'rm' is not one of sft, reward, dpo, ppo"),
        ({"stages": {"sft": 0.5, "ppo": 0.4}}, r"stage_split \(sft 0.5, ppo 0.4\) must be shares .* sum to 1"),
        (
            {"stages": {"sft": 0.2, "dpo": 0.4, "reward": 0.4}},
            "stage_split: reward and dpo both read the preference pairs, .* name one of them",
        ),
        ({"by": "turn"}, "split_by: 'turn' is not one of dialogue, prompt"),
        ({"stages": {"sft": 1.5, "ppo": -0.5}}, "must be shares of at least 0"),
    ],
)
def test_shares_that_cannot_be_are_refused(shares, message):
    with pytest.raises(UserError, match=message):
        Splits(**shares)


@pytest.fixture
def said(logged):
    """What was said so far."""
    return lambda: "\n".join(logged())


def three_splits(**others):
    names = {"train": PAIRS[:20], "validation": PAIRS[20:24], "test": PAIRS[24:26]} | others
    return datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in names.items()})


@pytest.mark.parametrize("kind", ["from python", "saved", "folder"])
def test_splits_that_the_data_bring_are_validated_and_tested_on(tmp_path, said, kind):
    data = three_splits()
    if kind == "saved":
        data.save_to_disk(tmp_path / "data")
    if kind == "folder":
        (tmp_path / "data").mkdir()
        for name, rows in data.items():
            rows.to_parquet(tmp_path / "data" / f"{name}-00000-of-00001.parquet")
    module = PreferenceDataModule(tiny_tokenizer(), data if kind == "from python" else tmp_path / "data")
    module.setup("fit")
    texts = {part: {len(module._part(part)), *module._part(part).row_ids.tolist()} for part in PARTS}
    assert texts == {"train": {20, *range(20)}, "validation": {4, *range(4)}, "test": {2, 0, 1}}
    name = "the DatasetDict" if kind == "from python" else str(tmp_path / "data")
    assert f"data: {name}, validation data: {name} validation, test data: {name} test" in said()
    assert module.counts["validation rows"] == 4


def test_what_is_given_for_evaluation_comes_before_what_the_data_bring(tmp_path, said):
    folder = build(tmp_path / "data", three_splits(), validation_data=PAIRS[30:37], splits=Splits(0.5, 0.5 - 1e-9))
    assert {part: len(numbers) for part, numbers in row_ids(folder, "preference").items()} == {
        "train": 20,
        "validation": 7,
        "test": 2,
    }
    assert "the DatasetDict validation is not read: `validation_data` is given" in said()


def test_data_for_evaluation_give_their_own_split_of_that_name(tmp_path):
    folder = build(tmp_path / "data", PAIRS[50:53], validation_data=three_splits(), test_data=three_splits())
    assert [len(numbers) for numbers in row_ids(folder, "preference").values()] == [3, 4, 2]


def test_a_split_without_what_is_needed_is_not_read_and_said(tmp_path, said):
    data = three_splits(test=[{"prompt": "p"}])
    folder = build(tmp_path / "data", data)
    assert folder.manifest["kinds"] == list(KINDS)
    assert len(row_ids(folder, "prompts")["test"]) == 0
    assert "DatasetDict test is not read: its columns do not hold what finetune and preference and prompts" in said()
    hidden = three_splits(test=[{"prompt": "p", "chosen": "", "rejected": ""}])
    with pytest.raises(
        UserError, match=r"DatasetDict test leaves nothing to test on .*; give `test_data`, or name the"
    ):
        build(tmp_path / "hidden", hidden, on_bad_row="skip")


def test_a_blend_brings_a_split_that_all_its_sources_have(tmp_path, said):
    both, one = Table(three_splits(), name="a"), Table(PAIRS[40:43], name="b")
    folder = build(tmp_path / "both", Blend([both, both], [1, 0.5]))
    assert [len(numbers) for numbers in row_ids(folder, "finetune").values()] == [40, 8, 4]
    assert set(folder.part("finetune", "validation").sources.tolist()) == {0, 1}
    folder = build(tmp_path / "one", Blend([both, one]), splits=Splits(0.3))
    assert len(row_ids(folder, "finetune")["test"]) == 0
    assert 0 < len(row_ids(folder, "finetune")["validation"]) < 20
    assert "the test split of a is not read, as not all sources of the blend have one; give `test_data`" in said()


def test_whole_texts_fall_on_sides_of_their_own(tmp_path):
    texts = [{"text": f"story number {i}"} for i in range(40)]
    folder = build(tmp_path / "a", texts, splits=Splits(validation=0.5))
    sides = row_ids(folder, "finetune")
    assert len(sides["train"]) > 10
    assert len(sides["validation"]) > 10


def test_rows_that_differ_in_their_tools_alone_are_no_duplicates():
    row = Row([{"role": "user", "content": "Go!"}], ("Done.",))
    others = [row._replace(tools=({"name": "walk"},)), row._replace(tools=({"name": "run"},))]
    for filters in (Filters(duplicates="exact"), Filters(duplicates="normalised"), Filters(remove_same_inputs=True)):
        once = RowFilter(filters, set())
        assert [once.reason(other, key_of(other)) for other in (row, *others)] == [None] * 3
        assert all(once.reason(other, key_of(other)) for other in (row, *others))
