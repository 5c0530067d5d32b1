"""People say which of two answers is better, without knowing whose they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import gradio as gr

from rlhf_lightning.app.controls import (
    AT_ONCE,
    ONE_AT_A_TIME,
    SMALL,
    Stops,
    answers_to,
    download,
    export_button,
    settings_of,
    told,
)
from rlhf_lightning.app.judgements import Choice, Judgement, Judgements, Pair
from rlhf_lightning.app.markup import judged_html
from rlhf_lightning.app.models import Ask, Models
from rlhf_lightning.chat.written import WrittenPrompt
from rlhf_lightning.errors import UserError

CHOICES = (
    ("left", "Left is better", "← or 1"),
    ("right", "Right is better", "→ or 2"),
    ("tie", "Tie", "↑ or 3"),
    ("bad", "Both bad", "↓ or 4"),
)
"""Ends of the buttons' ids, their words, and their keys."""

KEYS = """
<script>
document.addEventListener("keydown", (event) => {
  const keys = {ArrowLeft: "left", ArrowRight: "right", ArrowUp: "tie", ArrowDown: "bad",
                1: "left", 2: "right", 3: "tie", 4: "bad"};
  const inside = "input, textarea, select, [contenteditable=true], [role=tab], [role=slider], [role=listbox]";
  const name = keys[event.key];
  if (!name || event.repeat || event.ctrlKey || event.altKey || event.metaKey || event.target.closest(inside)) return;
  const button = document.getElementById("judge-" + name);
  if (!button || button.offsetParent === null || button.disabled) return;
  event.preventDefault();
  button.click();
});
</script>
"""
"""Keys press the buttons while these are to be seen, but not while somebody writes."""

_KEEP = "(name) => { localStorage.setItem('rlhf-annotator', name); }"
_FIND = "(name) => name || localStorage.getItem('rlhf-annotator') || ''"
"""The browser remembers who judges."""


def judge_tab(
    page: gr.Blocks,
    models: Models,
    controls: Sequence[Any],
    stops: Stops,
    judgements: Judgements,
    prompts: Sequence[WrittenPrompt],
    seed: int,
) -> None:
    """Two answers to a prompt, and four ways to judge them.

    Args:
        page: it stands on.
        models: those of the page.
        controls: of sampling.
        stops: what visitors may stop.
        judgements: are kept here.
        prompts: are asked one after another; none to let the annotator write them.
        seed: of the sides.
    """
    pair: Any = gr.State(None)
    with gr.Row():
        annotator = gr.Textbox("", label="your name", placeholder="judgements are kept under it", elem_id="judge-name")
        sides = [models.choices[0], models.choices[min(1, len(models.choices) - 1)]]
        first, second = (
            gr.Dropdown(models.choices, value=side, label=label)
            for side, label in zip(sides, ("one model", "other model"), strict=True)
        )
    prompt = gr.Textbox(
        label="prompt",
        lines=3,
        max_lines=12,
        elem_id="judge-prompt",
        placeholder="Write one, and ask" if not prompts else "Give your name, and ask for the next prompt",
        interactive=not prompts,
    )
    with gr.Row():
        ask = gr.Button("Next prompt" if prompts else "Ask", variant="primary", elem_id="judge-ask", **SMALL)
        stop = gr.Button("Stop", elem_id="judge-stop", **SMALL)
    left, right, comment, buttons = _answers()
    said = gr.HTML(elem_id="judge-said")
    tab = _Judging(models, stops, judgements, prompts, seed)
    shown = [prompt, left, right, pair, *buttons]
    asked = [annotator, prompt, first, second, *controls]
    ask.click(tab.ask, asked, shown, show_progress="minimal", **ONE_AT_A_TIME)
    stop.click(stops.stop, None, None, **AT_ONCE)
    for button, (end, *_) in zip(buttons, CHOICES, strict=True):
        taken = button.click(tab.judging(end), [pair, comment], [said, comment, left, right, pair, *buttons], **AT_ONCE)
        if prompts:
            taken.success(tab.ask, asked, shown, show_progress="minimal", **ONE_AT_A_TIME)
    page.load(None, annotator, annotator, js=_FIND)  # without the server, whose answer may come after a name is written
    annotator.change(None, annotator, js=_KEEP)
    gr.on([page.load, annotator.change], tab.so_far, annotator, said, trigger_mode="always_last", **AT_ONCE)
    export_button("Export preferences", "judge-export", tab.export)


def _answers() -> tuple[Any, Any, Any, list[Any]]:
    """Boxes of the two answers and of a comment, and the buttons that judge."""
    with gr.Row():
        left, right = (
            gr.Textbox(label=side, lines=5, max_lines=20, interactive=False, elem_id=f"judge-{side}-answer")
            for side in ("left", "right")
        )
    comment = gr.Textbox(label="comment", placeholder="why, if you like; write it before you choose", max_lines=4)
    with gr.Row():
        buttons = [
            gr.Button(f"{words}  [{keys}]", elem_id=f"judge-{end}", interactive=False, **SMALL)
            for end, words, keys in CHOICES
        ]
    return left, right, comment, buttons


class _Shown(NamedTuple):
    """A pair as somebody sees it."""

    pair: Pair
    annotator: str
    first_is_left: bool


class _Judging:
    """What happens in the tab."""

    def __init__(
        self, models: Models, stops: Stops, judgements: Judgements, prompts: Sequence[WrittenPrompt], seed: int
    ) -> None:
        self.models, self.stops, self.judgements, self.prompts = models, stops, judgements, prompts
        self.seed = seed
        self._same: set[tuple[str, ...]] = set()  # prompts with twice the same answer

    def so_far(self, annotator: str) -> str:
        """What was judged."""
        with told():
            return judged_html(self.judgements.all(), self.judgements.agreement(), annotator)

    def ask(
        self, request: gr.Request, annotator: str, text: str, first: str, second: str, *values: float
    ) -> Iterator[list[Any]]:
        """Both models answer; nothing is shown before both have, for speed would tell them apart."""
        annotator = annotator.strip()
        with told():
            if not annotator:
                raise UserError("give your name first: judgements are kept under it")
            settings, stopped = settings_of(*values), self.stops.begin(request)
            made = {**vars(settings.sampling), "seed": settings.seed}
            for written in self._prompts(annotator, text, first, second, str(settings)):
                yield [written.text, "", "", None, *_buttons(False)]
                place = (str(written.prompt),)
                asks = [Ask(first, written, (*place, 0)), Ask(second, written, (*place, 1))]
                said = list(answers_to(self.models, asks, settings, stopped))
                if stopped.is_set() or not said:
                    return
                pair = Pair(written, first, second, said[-1][0].text, said[-1][1].text, made)
                if pair.first != pair.second:
                    break
                gr.Info("Both answers are the same, so there is nothing to judge.", title="The same")
                self._same.add((str(written), first, second, str(settings)))
                yield [written.text, pair.first, pair.second, None, *_buttons(False)]
            else:
                if self.prompts:
                    gr.Info("Every prompt is judged: thank you.", title="Done")
                return
        shown = _Shown(pair, annotator, pair.first_is_left(self.seed, annotator))
        answers = (pair.first, pair.second) if shown.first_is_left else (pair.second, pair.first)
        yield [written.text, *answers, shown, *_buttons(True)]

    def _prompts(self, annotator: str, text: str, first: str, second: str, settings: str) -> Iterator[WrittenPrompt]:
        """What is asked: what was written, or those of a file that the annotator has not judged."""
        if not self.prompts:
            if not text.strip():
                raise UserError("there is no prompt: write one first")
            yield self.models.load(first).asked(text)
            return
        done = {
            str(judgement.pair.written)
            for judgement in self.judgements.all()
            if judgement.annotator == annotator
            and {judgement.pair.first_model, judgement.pair.second_model} == {first, second}
        }
        for written in self.prompts:
            if str(written) not in done and (str(written), first, second, settings) not in self._same:
                yield written

    def judging(self, end: str) -> Any:
        """What a button does.

        Args:
            end: of its id.
        """

        def judge(shown: _Shown | None, comment: str) -> list[Any]:
            if shown is None:  # a second click of the same
                return [gr.skip()] * (5 + len(CHOICES))
            sides: tuple[Choice, Choice] = ("first", "second") if shown.first_is_left else ("second", "first")
            choices: dict[str, Choice] = {"left": sides[0], "right": sides[1], "tie": "tie", "bad": "both bad"}
            said = Judgement(shown.pair, shown.annotator, choices[end], shown.first_is_left, comment)
            with told():
                if not self.judgements.add(said):
                    gr.Info("You have judged this pair before; that judgement stands.", title="Known")
            return [self.so_far(shown.annotator), "", "", "", None, *_buttons(False)]

        return judge

    def export(self) -> str:
        """The preferences as the rows that `PreferenceDataModule` reads."""
        with told():
            rows = self.judgements.preferences()
            left_out = len(self.judgements.all()) - len(rows)
        gr.Info(f"{len(rows)} preferences; {left_out} ties and bad pairs are left out.", title="Export")
        return download("preferences.jsonl", rows)


def _buttons(on: bool) -> list[Any]:
    return [gr.Button(interactive=on) for _ in CHOICES]
