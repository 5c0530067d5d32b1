"""Folders of tokens that the user gives, in our layout or the original system's, checked against what the run asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.data.fitting import check_context, check_ids
from rlhf_lightning.data.preparing.cache import find_or_build
from rlhf_lightning.data.preparing.legacy import LegacyPreparation, is_legacy
from rlhf_lightning.data.preparing.manifest import PARTS, is_prepared
from rlhf_lightning.data.preparing.prepared import PreparedFolder
from rlhf_lightning.data.rows import Need
from rlhf_lightning.errors import UserError


def holds_tokens(data: Any) -> bool:
    """Whether some data is the path of such a folder."""
    return is_prepared(data) or is_legacy(data)


def open_tokens(
    path: Path, need: Need, chat: ChatEncoder, limit: int, find_turns: bool, cache_dir: str | Path | None
) -> PreparedFolder:
    """Open such a folder; one of the original system's is converted first.

    Args:
        path: of the folder.
        need: the kind of example that is read.
        chat: the tokenizer and dialogue format about to be used.
        limit: most tokens of a row, as the user set it; rows that are longer are read all the same, and that is said.
        find_turns: the earlier turns of the assistant are needed.
        cache_dir: root of the cache.

    Raises:
        UserError: it was made with another tokenizer, or does not hold what is needed.
    """
    path = path.expanduser()
    if is_prepared(path):
        folder = PreparedFolder.open(path)
        folder.check_tokenizer(chat)
    else:
        folder = find_or_build(LegacyPreparation(path, need, chat), cache_dir)
    if find_turns and not folder.manifest["arguments"]["find_turns"]:
        raise UserError(f"{folder.path} was prepared without the turns that `loss_on: turns` needs")
    longest = max(int(folder.part(need, part).total_lengths.max(initial=0)) for part in PARTS)
    check_context(chat.tokenizer, f"the longest row of {folder.path}", longest, "prepare it with --max_length")
    check_ids(chat.tokenizer, lambda: folder.largest_id(need))
    if longest > limit:
        rank_zero_warn(
            f"{folder.path} holds rows of up to {longest} tokens, more than the limit of {limit} given "
            "here; a prepared folder is read as it is, prepare it again with that limit to have it obeyed"
        )
    return folder


def say_unheeded(folder: PreparedFolder, **asked: Any) -> None:
    """Say in one line which settings a folder was not prepared with, as nothing is made of them any more.

    Args:
        folder: given by the user.
        **asked: settings that choose rows, as `rlhf prepare` names them; None for what is not asked for.
    """
    theirs = folder.manifest["arguments"]
    known = {name: json.loads(json.dumps(value)) for name, value in asked.items() if value is not None}
    if others := [name for name, value in known.items() if theirs.get(name) != value]:
        rank_zero_warn(
            f"{folder.path} was prepared with other {' and '.join(others)}; a prepared folder is read as it is, "
            "prepare it again with these to have them obeyed"
        )
