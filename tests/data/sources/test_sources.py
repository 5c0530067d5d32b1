import gzip
import json
import pickle
from collections import Counter

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from rlhf_lightning.data.rows import BadRowError, DroppedRow, Row
from rlhf_lightning.data.sources import (
    TLDR,
    Blend,
    DataSource,
    HelpfulHarmless,
    Rows,
    Table,
    as_source,
    source_name,
)
from rlhf_lightning.errors import UserError

# Rows in the schemas of the public sets

HH = [
    {
        "chosen": "\n\nHuman: How do I get wine out of a rug?\n\nAssistant: Is it wool?\n\nHuman: Yes, wool."
        "\n\nAssistant: Dab it with cold water, then with a little vinegar.",
        "rejected": "\n\nHuman: How do I get wine out of a rug?\n\nAssistant: Is it wool?\n\nHuman: Yes, wool."
        "\n\nAssistant: Buy a new one.",
    },
    {
        "chosen": "\n\nHuman: Say hello.\n\nAssistant: Hello!",
        "rejected": "\n\nHuman: Say hello.\n\nAssistant: Hello!",
    },
    {
        "chosen": "\n\nHuman: What is two and two?\n\nAssistant: Four.",
        "rejected": "\n\nHuman: What is two and three?\n\nAssistant: Four.",
    },
    {
        "chosen": "\n\nHuman: Are you there?\n\nAssistant: Yes.\n\nHuman: Good.",
        "rejected": "\n\nHuman: Are you there?\n\nAssistant: No.",
    },
    {"chosen": "\n\nHuman: Tell me more.\n\nAssistant:", "rejected": "\n\nHuman: Tell me more.\n\nAssistant: No."},
]
RUG = "\n\nHuman: How do I get wine out of a rug?\n\nAssistant: Is it wool?\n\nHuman: Yes, wool.\n\nAssistant:"
FULL_HH = [
    {
        "prompt": RUG,
        "response": " Dab it with cold water, then with a little vinegar.",
        "chosen": " Dab it with cold water, then with a little vinegar.",
        "rejected": " Buy a new one.",
    }
]
POST = "SUBREDDIT: r/pets\n\nTITLE: My cat hides\n\nPOST: She came a week ago.\n\nShe lives under the sofa."
COMPARISONS = [
    {"prompt": POST, "chosen": "TL;DR: New cat hides, what to do?", "rejected": "TL;DR:  I have a sofa."},
    {"prompt": f"{POST}\nTL;DR:", "chosen": "New cat hides.", "rejected": " TL;DR: TL;DR: cat"},
    {"prompt": POST, "chosen": "TL;DR: the same", "rejected": "the same "},
    {"prompt": POST, "chosen": "TL;DR: ", "rejected": "TL;DR: x"},
    {"prompt": "TL;DR:", "chosen": "a", "rejected": "b"},
]
SUMMARIES = [{"prompt": f"{POST}\n\nTL;DR: ", "label": " New cat hides, help!"}]


def outcomes(source, need, index=None):
    """What comes of each row, and that it is the same by number and in a stream."""
    rows = source.open()
    rows.check(need)
    streamed = [said(outcome) for _, outcome in rows.stream(need)]
    assert [said(one(rows, i, need)) for i in range(len(rows))] == streamed
    assert [place for place, _ in rows.stream(need)] == [rows.place(i) for i in range(len(rows))]
    return streamed


def one(rows, index, need):
    try:
        return rows.parse(index, need)
    except (BadRowError, DroppedRow) as reason:
        return reason


def said(outcome):
    return outcome if isinstance(outcome, Row) else f"{type(outcome).__name__}: {outcome}"


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


# Helpful and harmless


def test_helpful_harmless_dialogues(tmp_path):
    source = HelpfulHarmless(write(tmp_path / "train.jsonl.gz", HH))
    best, worst = " Dab it with cold water, then with a little vinegar.", " Buy a new one."

    assert outcomes(source, "preference") == [
        Row(RUG, (best, worst)),
        "DroppedRow: chosen and rejected are the same",
        "DroppedRow: prompts of chosen and rejected differ",
        "BadRowError: chosen does not end with the assistant",
        "DroppedRow: response in chosen is empty",
    ]
    assert outcomes(source, "finetune")[:3] == [
        Row(RUG, (best,)),
        Row("\n\nHuman: Say hello.\n\nAssistant:", (" Hello!",), row_id=1),
        Row("\n\nHuman: What is two and two?\n\nAssistant:", (" Four.",), row_id=2),
    ]
    assert outcomes(source, "prompts")[4] == Row("\n\nHuman: Tell me more.\n\nAssistant:", row_id=4)


def test_the_same_pairs_with_their_prompts_apart(tmp_path):
    dialogues = HelpfulHarmless(write(tmp_path / "a.jsonl", HH[:1]))
    apart = HelpfulHarmless(write(tmp_path / "b.jsonl", FULL_HH))
    for need in ("preference", "finetune", "prompts"):
        assert outcomes(apart, need) == outcomes(dialogues, need)


def test_a_copy_of_the_repository_is_read_by_split_and_subset(tmp_path):
    for name in ("harmless-base", "helpful-base", "red-team-attempts"):
        write(tmp_path / name / "train.jsonl.gz", [{**HH[0], "from": name}])
        write(tmp_path / name / "test.jsonl.gz", HH[1:3])

    assert len(HelpfulHarmless(tmp_path).open()) == 2
    assert len(HelpfulHarmless(tmp_path, split="test").open()) == 4
    rows = HelpfulHarmless(tmp_path, subset="helpful-base").open()
    assert len(rows) == 1
    assert rows.place(0) == f"{tmp_path}/helpful-base/train.jsonl.gz line 1"
    with pytest.raises(UserError, match="missing does not exist"):
        HelpfulHarmless(tmp_path, subset="missing").open()


def test_the_published_sets_are_asked_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(repo, **options):
        asked.append((repo, options))
        return datasets.Dataset.from_list(COMPARISONS if "summarize" in repo else HH)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = HelpfulHarmless(subset="helpful-base", split="test").open()
    assert rows.parse(0, "preference").prompt == RUG
    assert rows.source_names == ["Anthropic/hh-rlhf helpful-base"]
    assert TLDR(split="valid1").open().parse(0, "preference").prompt == POST
    assert asked == [
        ("Anthropic/hh-rlhf", {"split": "test", "data_dir": "helpful-base"}),
        ("CarperAI/openai_summarize_comparisons", {"split": "valid1"}),
    ]


# TL;DR


def test_compared_summaries(tmp_path):
    source = TLDR(write(tmp_path / "a.jsonl", COMPARISONS))
    suffix = "\n\nTL;DR:"

    assert outcomes(source, "preference") == [
        Row(POST, (" New cat hides, what to do?", " I have a sofa."), suffix=suffix),
        Row(POST, (" New cat hides.", " TL;DR: cat"), suffix=suffix, row_id=1),  # handled once
        "DroppedRow: chosen and rejected are the same",
        "BadRowError: a response is empty but for TL;DR:",
        "BadRowError: prompt is empty but for TL;DR:",
    ]
    assert outcomes(source, "finetune")[0] == Row(POST, (" New cat hides, what to do?",), suffix=suffix)
    assert outcomes(source, "prompts")[1] == Row(POST, suffix=suffix, row_id=1)


def test_summaries_by_the_author(tmp_path):
    source = TLDR(write(tmp_path / "a.jsonl", SUMMARIES))
    assert outcomes(source, "finetune") == [Row(POST, (" New cat hides, help!",), suffix="\n\nTL;DR:")]
    assert not source.open().has("preference")
    with pytest.raises(UserError, match=r"a.jsonl has columns prompt, label; needed: prompt, chosen and rejected"):
        source.open().check("preference")


# Tables


def test_a_table_reads_what_its_columns_say():
    rows = [{"question": "p", "good": "r", "bad": "x"}]
    source = Table(rows, {"prompt": "question", "chosen": "good", "rejected": "bad"})
    assert outcomes(source, "preference") == [Row("p", ("r", "x"))]
    assert source.name == source_name(rows) == source_name(source) == "the list of rows"
    assert Table("a.jsonl", name="mine").name == "mine"


def test_labelled_rows_are_paired_by_prompt():
    rows = [
        {"prompt": "a", "completion": "bad a", "label": False},
        {"prompt": "a", "completion": "good a", "label": True},
        {"prompt": "b", "completion": "good b", "label": True},
        {"prompt": "a", "completion": "good a 2", "label": True},
        {"prompt": None, "completion": "x", "label": True},
        {"prompt": "a", "completion": "bad a 2", "label": False},
        {"prompt": "A", "completion": "bad A", "label": False},
        {"prompt": "c", "completion": "same", "label": True},
        {"prompt": "c", "completion": " same", "label": False},
    ]
    opened = Table(rows).open()
    opened.check("preference")
    rejected = "LabelledRow: response is the rejected one of another row's pair"
    alone = "DroppedRow: no response with the other label answers the same prompt"

    assert [said(one(opened, i, "preference")) for i in range(len(rows))] == [
        rejected,
        Row("a", ("good a", "bad a"), row_id=1),
        alone,
        Row("a", ("good a 2", "bad a 2"), row_id=3),
        "BadRowError: prompt is null",
        rejected,
        alone,
        "DroppedRow: chosen and rejected are the same",
        rejected,
    ]
    assert outcomes(Table(rows), "finetune")[:2] == [
        "LabelledRow: response is labelled as bad",
        Row("a", ("good a",), row_id=1),
    ]
    with pytest.raises(UserError, match="pairs cannot be sought in a stream"):
        next(opened.stream("preference"))


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), min_size=1))
def test_as_many_labelled_rows_are_paired_as_can_be(drawn):
    rows = [{"prompt": p, "completion": f"{i}", "label": label} for i, (p, label) in enumerate(drawn)]
    opened = Table(rows).open()
    counts = Counter(type(one(opened, i, "preference")) for i in range(len(rows)))
    numbers = Counter(drawn)
    assert counts[Row] == sum(min(numbers[p, True], numbers[p, False]) for p in "abc")
    assert counts.total() == len(rows)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n \n", r"x.jsonl has no rows; give at least one"),
        (
            "<html>\n<p>\n</html>\n",
            r"x.jsonl line 1: broken JSON \(this looks like an HTML page\); no row of .* can be",
        ),
        ("{\n{\n", r"x.jsonl line 1: broken JSON"),
        ('{"a": 1}\n', r"x.jsonl has columns a; needed: prompt, or messages, or chosen"),
    ],
)
def test_data_without_a_row_to_read_is_one_clear_line(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        Table(tmp_path / "x.jsonl").open().check("prompts")


@pytest.mark.parametrize("name", ["x.csv", "x.parquet"])
def test_a_header_without_rows_is_said(tmp_path, name):
    empty = datasets.Dataset.from_dict({"prompt": ["p"]}).select([])
    empty.to_csv(tmp_path / name) if name == "x.csv" else empty.to_parquet(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} has no rows"):
        Table(tmp_path / name).open().check("prompts")


BAD_LINES = {
    '{"prompt": "p", "chosen": ': "broken JSON (Expecting value)",
    '{"chosen": "a", "rejected": "b"}': "prompt is missing",
    '{"query": "p", "chosen": "a", "rejected": "b"}': "prompt is missing; unknown column 'query'",
    '{"prompt": null, "chosen": "a", "rejected": "b"}': "prompt is null",
    '{"prompt": "p", "chosen": "", "rejected": "b"}': "chosen is empty",
    '{"prompt": "p", "chosen": 7, "rejected": "b"}': "chosen is not text but int",
    '{"prompt": "p", "chosen": [{"from": "human", "value": "x"}], "rejected": "b"}': (
        "chosen does not end with the assistant"
    ),
    r'{"prompt": "p\ud83d", "chosen": "a", "rejected": "b"}': "prompt holds a lone surrogate",
    r'{"prompt": "p", "chosen": "a\u0000", "rejected": "b"}': "chosen holds a NUL byte",
    '{"prompt": "'
    + "p" * 5_000_000
    + '", "chosen": "a", "rejected": "b"}': "prompt is longer than 1,000,000 characters",
    "<html>": "broken JSON (Expecting value)",
}


def test_each_bad_input_is_named_with_its_line_and_costs_itself_only(tmp_path):
    good = '{"prompt": "p", "chosen": "a", "rejected": "b"}'
    same = '{"prompt": "p", "chosen": "a", "rejected": "a"}'
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join([good, *BAD_LINES, same, good]))

    assert outcomes(Table(path), "preference") == [
        Row("p", ("a", "b")),
        *(f"BadRowError: {reason}" for reason in BAD_LINES.values()),
        "DroppedRow: chosen and rejected are the same",
        Row("p", ("a", "b"), row_id=len(BAD_LINES) + 2),
    ]
    rows = Table(path).open()
    assert rows.place(len(BAD_LINES) + 1) == f"{path} line {len(BAD_LINES) + 2}"


FIELDS = st.sampled_from(["\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: c", "x", "", None, 3])


@given(st.lists(st.fixed_dictionaries({"chosen": FIELDS, "rejected": FIELDS}), min_size=1))
def test_rows_in_are_rows_out_and_rows_with_a_reason(rows):
    opened = Table(rows).open()
    results = [one(opened, i, "preference") for i in range(len(opened))]
    kept = [i for i, result in enumerate(results) if isinstance(result, Row)]
    assert [results[i].row_id for i in kept] == kept
    assert len(results) == len(rows) == len(kept) + sum(not isinstance(result, Row) for result in results)


# Blends

SMALL = [{"prompt": f"s{i}", "response": "r"} for i in range(2)]
LARGE = [{"prompt": f"l{i}", "response": "r"} for i in range(5)]


def test_a_blend_numbers_rows_and_sources():
    blend = Blend([Table(SMALL, name="small"), Table(LARGE, name="large")], [1.0, 0.5])
    rows = blend.open()

    assert len(rows) == 7
    assert rows.parse(1, "prompts") == Row("s1", row_id=1, source=0)
    assert rows.parse(2, "finetune") == Row("l0", ("r",), row_id=2, source=1)
    assert rows.place(3) == "the list of rows row 1"
    assert (rows.source_names, rows.source_weights) == (["small", "large"], [1.0, 0.5])
    assert blend.name == "small + large"


def test_blends_within_blends_keep_all_sources():
    inner = Blend([Table(SMALL, name="a"), Table(LARGE, name="b")], [1.0, 3.0])
    rows = Blend([Table(LARGE, name="c"), inner, Table(SMALL, name="d")], [1.0, 0.5, 2.0]).open()

    assert rows.source_names == ["c", "a", "b", "d"]
    assert rows.source_weights == [1.0, 0.5, 1.5, 2.0]
    parsed = [rows.parse(i, "prompts") for i in range(len(rows))]
    assert [row.source for row in parsed] == [0] * 5 + [1] * 2 + [2] * 5 + [3] * 2
    assert [row.row_id for row in parsed] == list(range(14))


def test_a_blend_needs_of_every_source_what_is_needed():
    pairs = Table([{"prompt": "p", "chosen": "a", "rejected": "b"}])
    rows = Blend([pairs, Table(SMALL, name="small")]).open()
    assert rows.has("finetune")
    assert not rows.has("preference")
    with pytest.raises(UserError, match="small has columns prompt, response; needed"):
        rows.check("preference")


@pytest.mark.parametrize(
    ("sources", "weights", "message"),
    [
        ([], None, "a blend needs at least one source"),
        ([Table(SMALL)], [1.0, 2.0], "a blend of 1 sources has 2 weights"),
        ([Table(SMALL)], [0.0], r"weights \(0.0\) must be above 0"),
        ([Table(SMALL)], [float("nan")], r"weights \(nan\) must be above 0"),
        ([Table(SMALL), Table("o/n", streaming=True)], None, "a blend is streamed whole or not at all"),
    ],
)
def test_blends_that_cannot_be_are_refused(sources, weights, message):
    with pytest.raises(UserError, match=message):
        Blend(sources, weights)


def test_a_streamed_blend_gives_each_source_its_weight():
    many = [{"prompt": f"m{i}"} for i in range(1000)]
    rows = Blend([Table(SMALL, name="small"), Table(many, name="many")], [2.0, 0.5]).open()

    epochs = [[outcome for _, outcome in rows.stream("prompts", epoch)] for epoch in (0, 0, 1)]
    assert epochs[0] == epochs[1] != epochs[2]
    small, large = ([row.prompt for row in epochs[0] if row.source == source] for source in (0, 1))
    assert small == ["s0", "s1", "s0", "s1"]
    assert len(large) == len(set(large))
    assert 450 < len(large) < 550


def test_a_streamed_blend_mixes_its_sources():
    first, second = ([{"prompt": f"{name}{i}"} for i in range(6)] for name in "ab")
    rows = Blend([Table(first), Table(second)]).open()
    assert [outcome.prompt for _, outcome in rows.stream("prompts")] == [f"{n}{i}" for i in range(6) for n in "ab"]


# Streams, fingerprints, and YAML


def test_a_streamed_source_is_read_in_order_only(tmp_path):
    rows = Table(write(tmp_path / "a.jsonl.gz", SMALL), streaming=True).open()
    rows.check("prompts")
    assert [row.prompt for _, row in rows.stream("prompts")] == ["s0", "s1"]
    for use in (lambda: len(rows), lambda: rows.parse(0, "prompts")):
        with pytest.raises(UserError, match=r"a.jsonl.gz is streamed: .* pass `streaming: false`"):
            use()


def test_all_that_changes_the_rows_changes_the_fingerprint(tmp_path):
    path = write(tmp_path / "a.jsonl", COMPARISONS)
    sources = [
        Table(path),
        Table(path, {"response": "chosen"}),
        Table(path, {"response": "rejected"}),
        HelpfulHarmless(path),
        TLDR(path),
        Blend([Table(path)]),
        Blend([Table(path)], [0.5]),
        Blend([Table(path), Table(path)]),
        Table(COMPARISONS[:2]),
    ]
    prints = [source.open().fingerprint() for source in sources]
    assert len(set(prints)) == len(sources)
    assert prints == [pickle.loads(pickle.dumps(source)).open().fingerprint() for source in sources]


def test_a_fingerprint_needs_no_pass_over_the_rows(tmp_path, monkeypatch):
    rows = Table(write(tmp_path / "a.jsonl", SMALL)).open()
    monkeypatch.setattr(json, "loads", lambda _: pytest.fail("parsed a row"))
    rows.fingerprint()


def test_data_that_is_no_source_is_a_table():
    table = as_source("a.jsonl", {"prompt": "q"})
    assert isinstance(table, Table)
    assert (table.path, table.columns) == ("a.jsonl", {"prompt": "q"})
    blend = Blend([table])
    assert as_source(blend, None) is as_source(blend, {}) is blend
    with pytest.raises(UserError, match="`columns` beside Blend has no effect"):
        as_source(blend, {"prompt": "q"})


class Reader:
    """Something that is given data.

    Args:
        data: where from.
    """

    def __init__(self, data: DataSource) -> None:
        self.data = data


SOURCES = "rlhf_lightning.data.sources"


@pytest.mark.parametrize(
    ("given", "check"),
    [
        ("rows.jsonl", lambda data: data == "rows.jsonl"),
        ("owner/name:test", lambda data: data == "owner/name:test"),
        ([{"prompt": "p"}], lambda data: data == [{"prompt": "p"}]),
        ({"class_path": f"{SOURCES}.HelpfulHarmless"}, lambda data: data.path == "Anthropic/hh-rlhf"),
        (
            {"class_path": f"{SOURCES}.TLDR", "init_args": {"path": "x.jsonl", "split": "test"}},
            lambda data: (data.path, data.split) == ("x.jsonl", "test"),
        ),
        (
            {
                "class_path": f"{SOURCES}.Blend",
                "init_args": {
                    "sources": [
                        {
                            "class_path": f"{SOURCES}.Table",
                            "init_args": {"path": "x.jsonl", "columns": {"prompt": "q"}},
                        },
                        {"class_path": f"{SOURCES}.HelpfulHarmless", "init_args": {"subset": "helpful-base"}},
                    ],
                    "weights": [1, 0.5],
                },
            },
            lambda data: [source.name for source in data.sources] == ["x.jsonl", "Anthropic/hh-rlhf helpful-base"],
        ),
    ],
)
def test_yaml_names_files_and_classes(given, check):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Reader, "reader")
    parsed = parser.parse_object({"reader": {"data": given}})
    assert check(parser.instantiate_classes(parsed).reader.data)
    if isinstance(given, str):
        parsed = parser.parse_args([f"--reader.data={given}"])
        assert check(parser.instantiate_classes(parsed).reader.data)


def test_an_opened_source_says_all_that_rows_must():
    assert isinstance(Table(SMALL).open(), Rows)
    assert isinstance(Blend([Table(SMALL)]).open(), Rows)
