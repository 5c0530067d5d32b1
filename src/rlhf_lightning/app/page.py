"""The page: its tabs put together, and served."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from ipaddress import ip_address

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported: it asks other machines otherwise

import gradio as gr

from rlhf_lightning.app.chat_tab import chat_tab
from rlhf_lightning.app.controls import Stops, sampling_controls
from rlhf_lightning.app.judge_tab import KEYS, judge_tab
from rlhf_lightning.app.judgements import Judgements
from rlhf_lightning.app.models import Models
from rlhf_lightning.app.summary_tab import summary_tab
from rlhf_lightning.chat.written import WrittenPrompt
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.sampling import Sampling

_VISITORS = 64
"""Whose events that need no model are looked after at the same time."""
_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
_CSS = """
.message-markdown-disabled { white-space: pre-wrap !important; }
.score { margin: 0.4em 0; }
.tokens { white-space: pre-wrap; line-height: 1.7; margin: 0; }
.tokens span { border-radius: 3px; padding: 1px 0; }
.hint { font-size: 0.85em; margin: 0.3em 0; }
table.judged { border-collapse: collapse; width: 100%; border: 0 !important; }
.judged tr, .judged th, .judged td { border: 0 !important; text-align: left; padding: 4px 10px 4px 0 !important; }
.judged tr { border-bottom: 1px solid rgba(128, 128, 128, 0.35) !important; }
footer { display: none !important; }
"""


def build_page(
    models: Models,
    judgements: Judgements,
    *,
    prompts: Sequence[WrittenPrompt] = (),
    examples: Sequence[str] = (),
    sampling: Sampling = Sampling(temperature=0.7, max_new_tokens=256),
    seed: int = 1,
) -> gr.Blocks:
    """The page, not yet served.

    Args:
        models: what may be asked.
        judgements: are kept here.
        prompts: to be judged one after another; none to let annotators write them.
        examples: prompts to begin a conversation with.
        sampling: what the sliders stand at first.
        seed: of the answers and of the sides of pairs.
    """
    stops = Stops()
    with gr.Blocks(title="rlhf chat", analytics_enabled=False, fill_width=False) as page:
        gr.Markdown("## rlhf chat")
        controls = sampling_controls(sampling, seed)
        with gr.Tab("Chat", elem_id="tab-chat"):
            chat_tab(models, controls, stops, examples, sides=1)
        with gr.Tab("Side by side", elem_id="tab-compare"):
            chat_tab(models, controls, stops, examples, sides=2)
        with gr.Tab("Summarise", elem_id="tab-summary"):
            summary_tab(models, controls, stops)
        with gr.Tab("Judge", elem_id="tab-judge"):
            judge_tab(page, models, controls, stops, judgements, prompts, seed)
    page.queue(default_concurrency_limit=_VISITORS, api_open=False)
    return page


def serve(
    page: gr.Blocks, host: str = "127.0.0.1", port: int = 7860, user: str | None = None, password: str | None = None
) -> str:
    """Serve a page until it is closed; returns at once with its address.

    Args:
        page: of `build_page`.
        host: the address it listens at.
        port: likewise.
        user: who may see it; None for everybody on this machine.
        password: of the user.

    Raises:
        UserError: a port in use, or a host that others reach without user and password.
    """
    check_access(host, user, password)
    check_port(host, port)
    auth = None if user is None or password is None else (user, password)
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        auth=auth,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        footer_links=[],
        enable_monitoring=False,
        theme=_theme(),
        css=_CSS,
        head=KEYS,
    )
    return str(address)


def _theme() -> gr.themes.Base:
    """Fonts of the reader's own machine, and colours that can be told apart."""
    theme = gr.themes.Base(font=_FONTS, font_mono=("ui-monospace", "Consolas", "monospace"))
    return theme.set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        body_text_color_subdued="*neutral_600",
        block_label_text_color="*neutral_600",
        block_title_text_color="*neutral_700",
        input_placeholder_color="*neutral_500",
    )


def is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:  # a name, which may lead anywhere
        return False


def check_access(host: str, user: str | None, password: str | None) -> None:
    """Refuse to open the page to others without user and password.

    Raises:
        UserError: says what is missing.
    """
    if (user is None) != (password is None) or user == "" or password == "":
        raise UserError("--user and --password belong together; pass both, and neither empty")
    if not is_local(host) and user is None:
        raise UserError(
            f"--host {host} lets others reach the page: pass --user and --password too, or leave it at 127.0.0.1"
        )


def check_port(host: str, port: int) -> None:
    """Refuse an address that the page cannot be served at.

    Raises:
        UserError: says why.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise UserError(f"the page cannot be served at {host}:{port} ({error}); pass another --port") from error
