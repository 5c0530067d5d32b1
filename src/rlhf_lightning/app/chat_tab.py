"""Talking to a model, and to two models side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import Event, Lock
from typing import Any

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
from rlhf_lightning.app.markup import turns, verdict_html
from rlhf_lightning.app.models import Ask, Models
from rlhf_lightning.chat.messages import Message
from rlhf_lightning.chat.written import WrittenPrompt


def chat_tab(models: Models, controls: Sequence[Any], stops: Stops, examples: Sequence[str], sides: int) -> None:
    """A conversation with one model, or the same prompts to two.

    Args:
        models: those of the page.
        controls: of sampling.
        stops: what visitors may stop.
        examples: prompts to begin with.
        sides: 1 or 2.
    """
    name = "chat" if sides == 1 else "compare"
    names, windows, verdicts = [], [], []
    with gr.Row():
        for side in range(sides):
            with gr.Column():
                choice = models.choices[min(side, len(models.choices) - 1)]
                label = "model" if sides == 1 else ("left model", "right model")[side]
                names.append(gr.Dropdown(models.choices, value=choice, label=label, elem_id=f"{name}-model-{side}"))
                windows.append(
                    gr.Chatbot(
                        label=label.replace("model", "answers") if sides == 2 else "conversation",
                        elem_id=f"{name}-window-{side}",
                        height=340,
                        render_markdown=False,  # what is left is HTML, of which `turns` writes none
                        feedback_options=None,
                        buttons=[],  # they would copy what is escaped
                        layout="bubble",
                    )
                )
    box = gr.Textbox(
        label="your turn", placeholder="Write, and press Enter", lines=1, max_lines=8, elem_id=f"{name}-box"
    )
    with gr.Row() as row:
        send = gr.Button("Send", variant="primary", elem_id=f"{name}-send", **SMALL)
        stop = gr.Button("Stop", elem_id=f"{name}-stop", **SMALL)
        again = gr.Button("Regenerate", elem_id=f"{name}-again", **SMALL)
        reset = gr.Button("Start anew", elem_id=f"{name}-reset", **SMALL)
    with gr.Row():
        for side in range(sides):
            with gr.Column():
                verdicts.append(gr.HTML(elem_id=f"{name}-verdict-{side}"))
    if examples:
        gr.Examples([[example] for example in examples], [box], label="examples", api_visibility="private")
    talk = gr.State(_Talk(sides))
    conversation = _Conversation(models, stops, sides)
    shown = [*windows, *verdicts]
    asked = [*names, talk, *controls]
    # The box is emptied when its words stand in the conversation, and what follows waits for a model; that an answer is
    # being written keeps nobody from going on.
    answering = {"show_progress": "minimal", "trigger_mode": "always_last", **ONE_AT_A_TIME}
    taken = [event(conversation.take, [box, talk], [box, *shown], **AT_ONCE) for event in (send.click, box.submit)]
    taken.append(again.click(conversation.back, [talk], shown, **AT_ONCE))
    for each in taken:
        each.success(conversation.answer, asked, shown, **answering)
    stop.click(stops.stop, None, None, **AT_ONCE)
    for event in (reset.click, *(window.clear for window in windows)):
        event(conversation.reset, [talk], shown, **AT_ONCE)
    with row:
        export_button("Export", f"{name}-export", conversation.export, [*names, talk, *controls])


class _Talk:
    """What was said to each side, of which the last turn is the user's while it is answered.

    Gradio hands the same one to all events of a visitor, and none returns it: what an event that is still running
    returns would stand over what the visitor has done meanwhile.

    Attributes:
        histories: the turns of each side.
        attempt: how often the last turn was answered anew.
        changes: what the visitor has done; an answer counts only while nothing was added to it.
        answering: ends the answer that is being written.
    """

    def __init__(self, sides: int) -> None:
        self.histories: list[list[Message]] = [[] for _ in range(sides)]
        self.attempt = self.changes = 0
        self.answering: Event | None = None

    def go_on(self, histories: Sequence[list[Message]], attempt: int = 0) -> None:
        """As the visitor wants it, whatever is still being written."""
        self.changes += 1
        self.histories, self.attempt = list(histories), attempt
        if self.answering is not None:
            self.answering.set()

    def shown(self, verdicts: Sequence[str] = ()) -> list[Any]:
        """For the windows, and what stands below them."""
        return [*map(turns, self.histories), *(verdicts or [""] * len(self.histories))]


class _Conversation:
    """What happens in a tab."""

    def __init__(self, models: Models, stops: Stops, sides: int) -> None:
        self.models, self.stops, self.sides = models, stops, sides
        self._one_at_a_time = Lock()

    def take(self, text: str, talk: _Talk) -> list[Any]:
        """The user's turn enters the conversation; an answer that is being written ends where it is."""
        if not text.strip():
            gr.Info("There is nothing to send: write something first.", title="Empty")
            return [gr.skip()] * (1 + 2 * self.sides)
        with self._one_at_a_time:
            talk.go_on([[*_answered(history), {"role": "user", "content": text}] for history in talk.histories])
        return ["", *talk.shown()]

    def back(self, talk: _Talk) -> list[Any]:
        """The last answer leaves the conversation, for another one."""
        with self._one_at_a_time:
            asked = [each[:-1] if each and each[-1]["role"] == "assistant" else each for each in talk.histories]
            if not asked[0]:
                gr.Info("There is no answer yet.", title="Nothing to regenerate")
                return [gr.skip()] * (2 * self.sides)
            talk.go_on(asked, talk.attempt + 1)
        return talk.shown()

    def answer(self, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        """Each side answers a turn that waits for it, and is scored."""
        names, talk, controls = values[: self.sides], values[self.sides], values[self.sides + 1 :]
        with self._one_at_a_time:
            changes, histories, stopped = talk.changes, talk.histories, self.stops.begin(request)
            talk.answering = stopped
        if not histories[0] or histories[0][-1]["role"] != "user":
            yield talk.shown()
            return
        with told():
            settings = settings_of(*controls)
            prompts = [WrittenPrompt(history) for history in histories]
            asks = [
                Ask(name, prompt, (len(prompt.prompt), talk.attempt, side))
                for side, (name, prompt) in enumerate(zip(names, prompts, strict=True))
            ]
            answers = None
            for answers in answers_to(self.models, asks, settings, stopped):
                said: list[Message] = [{"role": "assistant", "content": answer.text} for answer in answers]
                with self._one_at_a_time:
                    if talk.changes == changes:
                        talk.histories = [[*history, turn] for history, turn in zip(histories, said, strict=True)]
                yield talk.shown()
            if answers is not None and talk.changes == changes:
                scored = zip(prompts, answers, strict=True)
                verdicts = [self.models.verdict(prompt, answer.text, answer.ended) for prompt, answer in scored]
                yield talk.shown([*map(verdict_html, verdicts)] if talk.changes == changes else ())
            if talk.changes != changes:  # what is returned last is shown once more at the end
                yield talk.shown()

    def reset(self, talk: _Talk) -> list[Any]:
        """Begin anew, also while an answer is being written."""
        with self._one_at_a_time:
            talk.go_on([[] for _ in range(self.sides)])
        return talk.shown()

    def export(self, *values: Any) -> str:
        """The conversation as a line of JSON for each side, which the stages read as a row of messages."""
        names, talk, controls = values[: self.sides], values[self.sides], values[self.sides + 1 :]
        with told():
            settings = settings_of(*controls)
        made = {**vars(settings.sampling), "seed": settings.seed}
        lines = [
            {"messages": history, "model": name, "sampling": made}
            for name, history in zip(names, talk.histories, strict=True)
        ]
        return download("conversation.jsonl", lines)


def _answered(history: list[Message]) -> list[Message]:
    """Without a turn of the user at the end that was never answered: no template takes two in a row."""
    return history[:-1] if history and history[-1]["role"] == "user" else history
