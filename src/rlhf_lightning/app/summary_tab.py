"""Summaries of a post by two models, for those that learnt from the TL;DR data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from rlhf_lightning.app.controls import AT_ONCE, ONE_AT_A_TIME, SMALL, Stops, answers_to, settings_of, told
from rlhf_lightning.app.markup import verdict_html
from rlhf_lightning.app.models import Ask, Models
from rlhf_lightning.chat.written import WrittenPrompt
from rlhf_lightning.errors import UserError

_END = "TL;DR:"


def summary_prompt(post: str, title: str = "", subreddit: str = "") -> str:
    r"""A post as the prompts of the TL;DR data are written (Stiennon et al. 2020); one that is so already is kept.

    Args:
        post: the post.
        title: of the post; left out if empty.
        subreddit: where it stood; left out if empty.

    Example:
        >>> summary_prompt("My dog barks.", "Dog", "pets")
        'SUBREDDIT: r/pets\n\nTITLE: Dog\n\nPOST: My dog barks.\n\nTL;DR:'
    """
    if post.rstrip().endswith(_END):
        return post.rstrip()
    parts = [("SUBREDDIT: r/", subreddit.strip().removeprefix("r/")), ("TITLE: ", title.strip())]
    written = [f"{name}{value}" for name, value in parts if value]
    return "\n\n".join([*written, f"POST: {post.strip()}", _END])


def summary_tab(models: Models, controls: Sequence[Any], stops: Stops) -> None:
    """A post in, summaries of two models out.

    Args:
        models: those of the page.
        controls: of sampling.
        stops: what visitors may stop.
    """
    with gr.Row():
        subreddit = gr.Textbox(label="subreddit", placeholder="r/…, may be empty", scale=1)
        title = gr.Textbox(label="title", placeholder="may be empty", scale=3)
    post = gr.Textbox(label="post", lines=6, max_lines=16, elem_id="summary-post")
    with gr.Row():
        go = gr.Button("Summarise", variant="primary", elem_id="summary-go", **SMALL)
        stop = gr.Button("Stop", elem_id="summary-stop", **SMALL)
    names, boxes, verdicts = [], [], []
    with gr.Row():
        for side, label in enumerate(("left", "right")):
            with gr.Column():
                choice = models.choices[min(side, len(models.choices) - 1)]
                names.append(gr.Dropdown(models.choices, value=choice, label=f"{label} model"))
                boxes.append(
                    gr.Textbox(
                        label=f"{label} summary",
                        lines=4,
                        max_lines=12,
                        interactive=False,
                        elem_id=f"summary-{label}",
                    )
                )
                verdicts.append(gr.HTML())

    def summarise(
        request: gr.Request, post: str, title: str, subreddit: str, left: str, right: str, *values: float
    ) -> Iterator[list[str]]:
        with told():
            if not post.strip():
                raise UserError("there is no post: paste one first")
            prompt = WrittenPrompt(summary_prompt(post, title, subreddit))
            asks = [Ask(left, prompt, (0,)), Ask(right, prompt, (1,))]
            answers = None
            for answers in answers_to(models, asks, settings_of(*values), stops.begin(request)):
                yield [*(answer.text for answer in answers), "", ""]
            if answers is not None:
                said = [models.verdict(prompt, answer.text, answer.ended) for answer in answers]
                yield [*(answer.text for answer in answers), *map(verdict_html, said)]

    go.click(
        summarise,
        [post, title, subreddit, *names, *controls],
        [*boxes, *verdicts],
        show_progress="minimal",
        **ONE_AT_A_TIME,
    )
    stop.click(stops.stop, None, None, **AT_ONCE)
