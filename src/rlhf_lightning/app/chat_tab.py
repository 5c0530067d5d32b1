"""Talking to a model, and to two models side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    histories = [gr.State([]) for _ in range(sides)]
    attempt = gr.State(0)
    conversation = _Conversation(models, stops, sides)
    shown = [*windows, *verdicts, *histories, attempt]
    asked = [*names, *histories, attempt, *controls]
    # The box is emptied when its words stand in the conversation, and what follows waits for a model; that an answer is
    # being written keeps nobody from going on.
    answering = {"show_progress": "minimal", "trigger_mode": "always_last", **ONE_AT_A_TIME}
    for event in (send.click, box.submit):
        event(conversation.take, [box, *histories], [box, *windows, *histories, attempt], **AT_ONCE).success(
            conversation.answer, asked, shown, **answering
        )
    again.click(conversation.back, [*histories, attempt], [*windows, *histories, attempt], **AT_ONCE).success(
        conversation.answer, asked, shown, **answering
    )
    stop.click(stops.stop, None, None, **AT_ONCE)
    for event in (reset.click, *(window.clear for window in windows)):
        event(conversation.reset, None, shown, **AT_ONCE)
    with row:
        export_button("Export", f"{name}-export", conversation.export, [*names, *histories, *controls])


class _Conversation:
    """What happens in a tab: one history for each side, of which the last turn is the user's while it is answered."""

    def __init__(self, models: Models, stops: Stops, sides: int) -> None:
        self.models, self.stops, self.sides = models, stops, sides

    def take(self, request: gr.Request, text: str, *histories: list[Message]) -> list[Any]:
        """The user's turn enters the conversation; an answer that is being written ends where it is."""
        if not text.strip():
            gr.Info("There is nothing to send: write something first.", title="Empty")
            return [gr.skip()] * (2 + 2 * self.sides)
        self.stops.forget(request)
        asked = [[*_answered(history), {"role": "user", "content": text}] for history in histories]
        return ["", *map(turns, asked), *asked, 0]

    def back(self, request: gr.Request, *values: Any) -> list[Any]:
        """The last answer leaves the conversation, for another one."""
        histories, attempt = values[: self.sides], values[self.sides]
        asked = [history[:-1] if history and history[-1]["role"] == "assistant" else history for history in histories]
        if not asked[0]:
            gr.Info("There is no answer yet.", title="Nothing to regenerate")
            return [gr.skip()] * (1 + 2 * self.sides)
        self.stops.forget(request)
        return [*map(turns, asked), *asked, attempt + 1]

    def answer(self, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        """Each side answers a turn that waits for it, and is scored."""
        sides = self.sides
        names, histories, attempt = values[:sides], values[sides : 2 * sides], values[2 * sides]
        if not histories[0] or histories[0][-1]["role"] != "user":
            return
        with told():
            settings = settings_of(*values[2 * sides + 1 :])
            prompts = [WrittenPrompt(history) for history in histories]
            asks = [
                Ask(name, prompt, (len(prompt.prompt), attempt, side))
                for side, (name, prompt) in enumerate(zip(names, prompts, strict=True))
            ]
            grown, answers, stopped = list(histories), None, self.stops.begin(request)
            for answers in answers_to(self.models, asks, settings, stopped):
                if stopped.forgotten:
                    return
                said: list[Message] = [{"role": "assistant", "content": answer.text} for answer in answers]
                grown = [[*history, turn] for history, turn in zip(histories, said, strict=True)]
                yield [*map(turns, grown), *[""] * sides, *grown, attempt]
            if answers is not None:
                scored = zip(prompts, answers, strict=True)
                verdicts = [self.models.verdict(prompt, answer.text, answer.ended) for prompt, answer in scored]
                if stopped.forgotten:
                    return
                yield [*map(turns, grown), *map(verdict_html, verdicts), *grown, attempt]

    def reset(self, request: gr.Request) -> list[Any]:
        """Begin anew, also while an answer is being written."""
        self.stops.forget(request)
        empty: list[Any] = [[] for _ in range(self.sides)]
        return [*empty, *[""] * self.sides, *empty, 0]

    def export(self, *values: Any) -> str:
        """The conversation as a line of JSON for each side, which the stages read as a row of messages."""
        names, histories = values[: self.sides], values[self.sides : 2 * self.sides]
        with told():
            settings = settings_of(*values[2 * self.sides :])
        made = {**vars(settings.sampling), "seed": settings.seed}
        lines = [
            {"messages": history, "model": name, "sampling": made}
            for name, history in zip(names, histories, strict=True)
        ]
        return download("conversation.jsonl", lines)


def _answered(history: list[Message]) -> list[Message]:
    """Without a turn of the user at the end that was never answered: no template takes two in a row."""
    return history[:-1] if history and history[-1]["role"] == "user" else history
