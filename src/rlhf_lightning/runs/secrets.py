"""Passwords and keys, kept out of what a run writes and says."""

from __future__ import annotations

import re

HIDDEN = "***"
"""What stands in the place of a secret."""

_SECRETS = (
    (re.compile(r"(\w+://[^\s/@:\"']*):[^\s/@\"']+@"), rf"\1:{HIDDEN}@"),  # user:password@ of a URL
    (re.compile(r"\b(hf_)[A-Za-z0-9]{20,}"), rf"\1{HIDDEN}"),  # of the hub
    (re.compile(r"\b(sk-)[A-Za-z0-9_-]{20,}"), rf"\1{HIDDEN}"),  # of judges behind a URL
    (re.compile(r"(?i)\b((?:api|access)[_-]?(?:key|token)|password)=[^\s&\"']+"), rf"\1={HIDDEN}"),
)


def without_secrets(text: str) -> str:
    """A text in which passwords of URLs, and keys that are known by their form, are hidden.

    A key of a form of its own cannot be known; it belongs into an environment variable.

    Args:
        text: of a config, a record or a message.

    Example:
        >>> without_secrets("http://me:s3cret@host/v1, hf_abcdefghijklmnopqrst")
        'http://me:***@host/v1, hf_***'
    """
    for pattern, shown in _SECRETS:
        text = pattern.sub(shown, text)
    return text
