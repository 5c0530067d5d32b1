"""The report on a prepared folder: numbers worked out by hand, and how it looks in text, in colour and as a picture."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.data.collate import EncodedExample, EncodedPair, EncodedPrompt
from rlhf_lightning.data.encode import Encoder
from rlhf_lightning.data.limits import TokenLimits
from rlhf_lightning.data.preparing.filters import Splits
from rlhf_lightning.data.preparing.lengths import WholeLengths
from rlhf_lightning.data.preparing.preparation import Preparation
from rlhf_lightning.data.preparing.prepared import FolderWriter, PreparedFolder
from rlhf_lightning.data.preparing.report import print_report, render, report_on, save_report
from rlhf_lightning.data.rows import Need, Row
from rlhf_lightning.data.sources import Table

LIMITS = TokenLimits(64, None, None, "cut")
Make = Callable[..., PreparedFolder]


@pytest.fixture
def prepared(tmp_path: Path) -> Make:
    """Prepares rows with the tiny tokenizer."""

    def make(rows: list[dict[str, Any]], **settings: Any) -> PreparedFolder:
        folder = tmp_path / "prepared"
        folder.mkdir()
        chat = ChatEncoder(tiny_tokenizer(), "plain")
        Preparation(Table(rows, name="rows"), chat, LIMITS, on_bad_row="skip", **settings).build(folder)
        return PreparedFolder.open(folder)

    return make


def measured(tmp_path: Path, lengths: dict[Need, list[tuple[int, ...]]]) -> PreparedFolder:
    """A folder of training rows of given lengths, in tokens."""
    chat = ChatEncoder(tiny_tokenizer())
    folder = tmp_path / "measured"
    folder.mkdir()
    writer = FolderWriter(folder, list(lengths))
    for need, rows in lengths.items():
        for i, row in enumerate(rows):
            prompt, *responses = row
            whole = [np.full(prompt + length, 20, np.int32) for length in responses]
            make = {"finetune": EncodedExample, "preference": EncodedPair}.get(need)
            example = make(*whole, prompt, i) if make else EncodedPrompt(np.full(prompt, 20, np.int32), "", i)
            writer[need, "train"].add(example)
    writer.close()
    count = max(map(len, lengths.values()))
    source = {
        "name": "rows",
        "source_names": ["rows"],
        "source_weights": [1.0],
        "counts": {"rows": count + 3, "kept": count, "dropped: chosen is null": 1, "other stages": 2},
        "bad_rows": {"count": 0, "first": []},
    }
    writer.finish({"arguments": {"find_turns": True}, "sources": {"data": source}}, {}, chat)
    return PreparedFolder.open(folder)


def report_of(folder: PreparedFolder, **settings: Any) -> dict[str, Any]:
    return report_on(folder, tiny_tokenizer(), **settings)


def text_of(report: dict[str, Any], **console: Any) -> str:
    out = io.StringIO()
    print_report(Console(file=out, **console), report)
    return out.getvalue()


def test_every_row_is_accounted_for_by_reason(prepared):
    rows = [
        {"prompt": "a", "chosen": " b", "rejected": " c"},
        {"prompt": "a", "chosen": " d", "rejected": " e"},
        {"prompt": "f", "chosen": " g", "rejected": " g"},
        {"prompt": "h", "chosen": None, "rejected": " i"},
        {"prompt": "j", "chosen": " k" * 80, "rejected": " l"},
    ]
    report = report_of(prepared(rows))
    account = report["rows"]["data"]
    assert (account["rows in"], account["kept"]) == (5, 4)
    assert account["dropped"] == {"chosen is null": 1}
    assert account["lacking"] == {"chosen and rejected are the same": 1}
    assert account["cut"] == {"response": 1}
    assert account["responses"] == 7  # two each, but one of those which are the same
    assert account["notes"] == {"prompt is a duplicate": 1}
    assert report["bad_rows"]["data"]["count"] == 1
    assert report["written"]["preference"] == {"train": 3, "validation": 0, "test": 0}
    assert report["written"]["finetune"]["train"] == 4
    assert report["written"]["prompts"]["train"] == 3
    text = text_of(report, width=100)
    for words in (
        "rows in",
        "- chosen is null",
        "= kept",
        "but not for all kinds",
        "responses cut, their end of turn",
        "row 3: chosen is null",
    ):
        assert words in text
    assert "prompts that came before and are not written again: 1" in text


def test_what_is_not_used_is_counted_and_said_in_one_line_each(prepared):
    turns = [{"role": "user", "content": "hi", "lang": "en"}, {"role": "assistant", "content": "hello", "lang": "en"}]
    rows = [
        {"messages": turns, "source": "forum", "id": None},
        {"messages": turns, "source": "", "id": 7},
        {"messages": 3},
    ]
    report = report_on(prepared(rows), tiny_tokenizer())
    assert report["rows"]["data"]["unused"] == {"key 'lang' of a turn": 2, "column 'source'": 1, "column 'id'": 1}
    text = io.StringIO()
    print_report(Console(file=text, width=110, color_system=None), report)
    assert " key 'lang' of a turn is not used: 2 rows hold something there\n" in text.getvalue()
    assert " column 'source' is not used: 1 rows hold something there\n" in text.getvalue()


def test_what_is_not_used_is_counted_of_rows_that_are_kept(prepared):
    folder = prepared([{"prompt": "hi", "source": "forum"}] * 3, kinds=("prompts",))
    account = report_on(folder, tiny_tokenizer())["rows"]["data"]
    assert (account["kept"], account["unused"]) == (1, {"column 'source'": 1})


def test_an_account_that_does_not_add_up_is_an_error(tmp_path):
    folder = measured(tmp_path, {"prompts": [(3,)]})
    folder.manifest["sources"]["data"]["counts"]["rows"] += 1
    with pytest.raises(AssertionError):
        report_of(folder)


def test_lengths_are_those_of_the_rows(tmp_path):
    folder = measured(tmp_path, {"preference": [(1, 2, 1), (2, 2, 2), (3, 5, 6), (4, 1, 3)]})
    report = report_of(folder)
    lengths = report["lengths"]["preference train"]
    assert lengths["prompt"]["mean"] == 2.5
    assert (lengths["prompt"]["p50"], lengths["prompt"]["max"]) == (2.5, 4)
    assert lengths["chosen"]["p25"] == 1.75
    assert lengths["rejected"]["mean"] == 3.0
    assert lengths["together"]["max"] == 9
    shares = {"longer": 0.25, "as long": 0.25, "shorter": 0.5}
    assert report["chosen_against_rejected"] == {"train": shares}
    assert "train 25.0% 25.0% 50.0%" in " ".join(text_of(report).split())


def test_what_is_taught_is_marked_earlier_turns_too(prepared):
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "see you")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in turns]}]
    (example,) = report_of(prepared(rows, find_turns=True))["examples"]
    pieces = [(piece["text"], piece["taught"]) for piece in example["texts"]["response"]]
    assert pieces == [
        ("\n\nHuman: hi\n\nAssistant:", False),
        (" hello", True),
        ("\n\nHuman: bye\n\nAssistant:", False),
        (" see you<|end|>", True),
    ]


def test_both_responses_of_a_pair_stand_after_one_prompt(prepared):
    folder = prepared([{"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}], kinds=("preference",))
    (example,) = report_of(folder)["examples"]
    assert (example["kind"], example["row"]) == ("preference", 0)
    chosen, rejected = example["texts"]["chosen"], example["texts"]["rejected"]
    assert [piece["text"] for piece in chosen] == ["1 + 1 =", " 2<|end|>"]
    assert rejected == [{"text": " 3<|end|>", "taught": True}]


def test_ten_examples_are_spread_over_the_kinds_and_the_rows(tmp_path):
    rows = [(3, 2)] * 101
    folder = measured(tmp_path, {"finetune": rows, "preference": [(3, 2, 1)] * 3})
    examples = report_of(folder)["examples"]
    assert [example["row"] for example in examples if example["kind"] == "finetune"] == [0, 25, 50, 75, 100]
    assert [example["row"] for example in examples if example["kind"] == "preference"] == [0, 1, 2]


def test_prompts_alone_are_shown_with_nothing_marked(tmp_path):
    report = report_of(measured(tmp_path, {"prompts": [(3,), (5,)]}))
    assert [list(example["texts"]) for example in report["examples"]] == [["prompt"], ["prompt"]]
    assert "⟦" not in text_of(report).partition("Examples")[2].partition("\n")[2]


def test_colour_marks_on_a_terminal_and_brackets_elsewhere():
    pieces = [{"text": "hi\x1b[31m", "taught": False}, {"text": " hello\n", "taught": True}]
    assert render(pieces, coloured=False).plain == "hi\\x1b[31m⟦ hello\n⟧"
    text = render(pieces, coloured=True)
    assert text.plain == "hi\\x1b[31m hello\n"
    assert [(span.start, span.end) for span in text.spans] == [(10, 17)]


def test_long_prompts_are_shortened_on_a_terminal_only(tmp_path):
    report = report_of(measured(tmp_path, {"finetune": [(4000, 3)]}))
    piece = report["examples"][0]["texts"]["response"][0]["text"]
    assert piece in text_of(report).replace("\n", "")
    assert "characters …" in text_of(report, force_terminal=True)


def test_the_sources_of_a_blend_are_counted_apart(tmp_path):
    folder = measured(tmp_path, {"prompts": [(3,), (5,)]})
    folder.manifest["sources"]["data"] |= {"source_names": ["ours", "theirs"], "source_weights": [1.0, 0.5]}
    report = report_of(folder)
    assert report["sources"] == [
        {"name": "ours", "weight": 1.0, "train": {"prompts": 2}},
        {"name": "theirs", "weight": 0.5, "train": {"prompts": 0}},
    ]
    assert "theirs" in text_of(report)


@pytest.mark.parametrize("kinds", [("finetune", "preference", "prompts"), ("finetune",), ("prompts",), ("preference",)])
def test_the_report_is_saved_beside_the_tables(tmp_path, kinds):
    rng = np.random.default_rng(0)
    widths = {"finetune": 2, "preference": 3, "prompts": 1}
    rows = {kind: [tuple(row) for row in rng.integers(1, 60, (50, widths[kind]))] for kind in kinds}
    folder = measured(tmp_path, rows)
    report = report_of(folder)
    save_report(folder, report)
    assert json.loads((folder.path / "report.json").read_text(encoding="utf-8")) == report
    text = (folder.path / "report.txt").read_text(encoding="utf-8")
    assert "\x1b" not in text
    assert max(map(len, text.partition("Examples")[0].splitlines())) <= 100
    picture = (folder.path / "lengths.png").read_bytes()
    assert picture[:4] == b"\x89PNG"
    width, height = np.frombuffer(picture[16:24], ">u4").tolist()
    assert width >= height > 600


def test_held_out_parts_are_reported_too(prepared):
    rows = [{"prompt": f"{i} + 1 =", "response": f" {i + 1}"} for i in range(40)]
    folder = prepared(rows, splits=Splits(validation=0.3, test=0.3))
    report = report_of(folder)
    assert {"finetune train", "finetune validation", "finetune test"} <= set(report["lengths"])
    assert sum(report["written"]["finetune"].values()) == 40
    save_report(folder, report)
    assert (folder.path / "lengths.png").is_file()


def test_lengths_before_cutting_say_what_would_keep_the_responses(prepared):
    rows = [{"prompt": "a b c", "response": " k" * (5 * i + 1)} for i in range(40)]
    report = report_of(prepared(rows))
    whole = report["whole_lengths"]["data"]
    tokens = [len(tiny_tokenizer()("a b c" + row["response"])["input_ids"]) + 1 for row in rows]  # and the EOS
    assert whole["columns"]["together"]["max"] == max(tokens) > LIMITS.max_length
    assert report["rows"]["data"]["cut"]["response"] == sum(n > LIMITS.max_length for n in tokens)
    assert sum(n <= whole["keeps_95"] for n in tokens) == 38
    text = text_of(report, width=100)
    words = " ".join(text.split())
    cut = report["rows"]["data"]["cut"]["response"] / 40
    assert f"responses cut, their end of turn with it {report['rows']['data']['cut']['response']} {cut:.1%}" in words
    last = f"max_length {whole['keeps_95']} keeps 95% whole"
    assert f"{cut:.0%} of the responses of rows are cut at max_length 64 and lose their end; {last}" in text
    assert text.rindex("Examples") < text.index("rows in") < text.index("before cutting") < text.index(last)


@settings(max_examples=15)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.lists(st.integers(1, 60), min_size=1, max_size=3)), min_size=1),
    max_prompt_length=st.sampled_from([None, 4]),
)
def test_the_max_length_that_is_named_keeps_95_percent_of_the_responses(lengths, max_prompt_length):
    rows = [Row("a" + " k" * p, tuple(" k" * r for r in responses)) for p, responses in lengths]
    chat = ChatEncoder(tiny_tokenizer())

    def encode(max_length):
        limits = TokenLimits(max_length, max_prompt_length, 1, "cut")
        return Encoder(chat, limits).encode(rows)

    whole = WholeLengths(max_prompt_length)
    for row in encode(16):
        whole.add(row.whole_lengths[0], row.whole_lengths[1:])
    cut = sum(row.cut.count("response") for row in encode(max(6, whole.describe()["keeps_95"])))
    assert cut <= 0.05 * sum(len(responses) for _, responses in lengths)


def test_rows_of_which_something_is_not_used_are_not_said_to_be_kept_whole(prepared):
    folder = prepared([{"prompt": "a", "response": " b", "mood": "glad"}])
    text = text_of(report_of(folder), width=120)
    assert "= kept, not all of what they hold" in text
    assert "mood" in text
