"""What is shown of a response that goes on is the beginning of what it will have said."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rlhf_lightning.chat.spacing import Spacing
from rlhf_lightning.chat.written import WrittenPrompt

PARTS = st.text("ab \n", max_size=3)
TURN, TEXT = WrittenPrompt([{"role": "user", "content": "hi"}]), WrittenPrompt("once upon")


@pytest.mark.parametrize("prompt", [TURN, TEXT])
@given(before=PARTS, after=PARTS, always=st.booleans(), text=st.text("ab \n", max_size=8))
@example(" ", "ab", False, " aabab")
@example("ab", "b", False, "a")
def test_what_is_certain_only_grows_into_the_content(prompt, before, after, always, text):
    spacing = Spacing(before, after, always)
    shown = [spacing.so_far(prompt, text[:n]).strip() for n in range(len(text) + 1)]
    shown.append(spacing.content(prompt, text).strip())
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(shown))


def test_words_are_shown_as_soon_as_they_stand():
    spacing = Spacing(before=" ", after="<end>")
    assert [spacing.so_far(TURN, text) for text in (" ", " so", " so <e", " so <e.")] == ["", "so", "so ", "so <e."]
    assert spacing.so_far(TEXT, " so <e") == " so <e"
