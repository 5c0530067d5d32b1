"""What the tabs of the page share: sampling controls, the button that stops, and errors that are told."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import gradio as gr

from rlhf_lightning.app.models import Ask, Models
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.policy import Answer
from rlhf_lightning.generation.sampling import Sampling

ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "models", "api_visibility": "private"}
"""Of events that ask models: the others wait in a line that they are shown."""
AT_ONCE: dict[str, Any] = {"concurrency_limit": None, "api_visibility": "private", "show_progress": "hidden"}
"""Of events that need no model; only what is queued can tell a visitor something."""

SMALL: dict[str, Any] = {"size": "md", "min_width": 80}
"""Of buttons, that all of a tab stand in a row."""


class Settings(NamedTuple):
    """How answers are drawn.

    Attributes:
        sampling: temperature and limits.
        seed: of the page, or the user's.
    """

    sampling: Sampling
    seed: int


def settings_of(temperature: float, top_p: float, top_k: float, max_new_tokens: float, seed: float) -> Settings:
    """What the controls say.

    Args:
        temperature: of the slider.
        top_p: of the slider.
        top_k: of the slider.
        max_new_tokens: of the slider.
        seed: of the box.

    Raises:
        UserError: a value that cannot be.
    """
    if seed is None or max_new_tokens is None or top_k is None:
        raise UserError("seed, top-k and the length must be numbers")
    sampling = Sampling(float(temperature), int(top_k), float(top_p), int(max_new_tokens))
    return Settings(sampling, int(seed))


def sampling_controls(sampling: Sampling, seed: int) -> list[Any]:
    """Sliders of how answers are drawn, in the order of `settings_of`.

    Args:
        sampling: what they stand at first.
        seed: likewise.
    """
    with gr.Accordion("Sampling", open=False), gr.Row():
        return [
            gr.Slider(0, 2, sampling.temperature, step=0.05, label="temperature", info="0: the likeliest token"),
            gr.Slider(0.05, 1, sampling.top_p, step=0.05, label="top-p"),
            gr.Slider(0, 200, sampling.top_k, step=1, label="top-k", info="0: all tokens"),
            gr.Slider(1, 1024, sampling.max_new_tokens, step=1, label="longest answer", info="tokens"),
            gr.Number(seed, precision=0, label="seed"),
        ]


class Stops:
    """What each visitor may stop."""

    def __init__(self) -> None:
        self._running: dict[str, Event] = {}

    def begin(self, request: gr.Request) -> Event:
        """Something that a visitor may stop from now on.

        Args:
            request: of the visitor.
        """
        event = self._running[str(request.session_hash)] = Event()
        return event

    def stop(self, request: gr.Request) -> None:
        """Stop it.

        Args:
            request: of the visitor.
        """
        if event := self._running.pop(str(request.session_hash), None):
            event.set()


@contextmanager
def told() -> Iterator[None]:
    """What the user can fix is told on the page, its markup shown and not run."""
    try:
        yield
    except UserError as error:
        raise gr.Error(escape(str(error)), print_exception=False, title="This cannot be done") from error


def answers_to(models: Models, asks: Sequence[Ask], settings: Settings, stopped: Event) -> Iterator[list[Answer]]:
    """Stream answers, and tell where a model does not read a whole prompt.

    Args:
        models: those of the page.
        asks: answers that are wanted.
        settings: how they are drawn.
        stopped: ends them.
    """
    with told():
        for model in dict.fromkeys(ask.model for ask in asks if not models.fits(ask, settings.sampling.max_new_tokens)):
            gr.Warning(f"{escape(model)} has no room for all of this: it reads the end only", title="Too long")
        yield from models.stream(asks, *settings, stopped=stopped)


def export_button(label: str, name: str, export: Callable[..., str], inputs: Sequence[Any] = ()) -> None:
    """A button that makes a file and saves it; Gradio's own would save what was made before.

    Args:
        label: of the button.
        name: its id on the page.
        export: makes the file, and returns its path.
        inputs: what it is given.
    """
    button = gr.Button(label, elem_id=name, **SMALL)
    file = gr.DownloadButton(visible="hidden", elem_id=f"{name}-file")
    press = f"() => setTimeout(() => document.getElementById('{name}-file').click(), 100)"
    button.click(export, list(inputs), file, **AT_ONCE).success(None, js=press)


def download(name: str, lines: Sequence[Any]) -> str:
    """A file of JSON lines for the browser to save.

    Args:
        name: of the file.
        lines: one object for each.
    """
    path = Path(tempfile.mkdtemp(prefix="rlhf-chat-")) / name
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return str(path)
