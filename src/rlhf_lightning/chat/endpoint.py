"""A chat model behind an OpenAI-compatible endpoint, asked with nothing but the standard library.

Whatever goes wrong there is told with the request it happened to: a server that is down, slow or overloaded, a reply
that is no JSON or of another shape. Requests that may succeed later are sent again.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rlhf_lightning.arguments import AT_LEAST_1, POSITIVE, check_arguments
from rlhf_lightning.chat.messages import Message
from rlhf_lightning.errors import UserError

_PASSING = frozenset({408, 409, 425, 429})
"""Codes, besides those of a server's own faults, after which the same request may succeed."""
_LONGEST_WAIT = 60.0  # seconds
_LARGEST_REPLY = 2**20  # bytes
_OPTIONS: dict[str, Any] = {"temperature": 0.0, "max_tokens": 512}
_ADVICE = {
    401: "the key is missing or wrong",
    403: "the key is not allowed to ask this model",
    404: "look at the URL, which goes before /chat/completions, and at the model's name",
}
CHAT = "/chat/completions"
NOT_ASKED = "not asked"
"""The problem of a request that was not sent, since too many before it had no reply."""


class Reply(NamedTuple):
    """What came back for one request.

    Attributes:
        text: what the model said; None if there is none.
        problem: why there is none; empty if there is.
    """

    text: str | None
    problem: str = ""


@dataclass(frozen=True)
class Endpoint:
    """A chat model behind an OpenAI-compatible HTTP endpoint: a hosted one, or a server of one's own (vLLM, llama.cpp).

    Texts are sent there; nothing is sent anywhere else, and redirects are not followed.

    Args:
        url: what goes before `/chat/completions`, such as `http://localhost:8000/v1`.
        model: the name that the server knows the model by.
        api_key_variable: environment variable that holds the key; None to send none.
        timeout: seconds for one request.
        retries: how often a request is sent again that may succeed later.
        backoff: seconds before it is sent again for the first time, doubled each time; a server that says how long to
            wait is obeyed, up to a minute.
        parallel: requests at once.
        give_up_after: so many requests in a row that stayed without a reply end the questions: the rest is not asked.
        options: further fields of a request; `temperature` is 0 and `max_tokens` 512 unless they stand here, and one
            that is null is left out.

    Raises:
        UserError: no URL, or a variable that is not set.
    """

    url: str
    model: str
    api_key_variable: str | None = None
    timeout: float = 60.0
    retries: int = 4
    backoff: float = 1.0
    parallel: int = 8
    give_up_after: int = 20
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranges = {"timeout": POSITIVE, "parallel": AT_LEAST_1, "give_up_after": AT_LEAST_1}
        check_arguments(Endpoint, vars(self), ranges, "endpoint.")
        if not re.fullmatch(r"https?://[^\s/]\S*", self.url):
            raise UserError(f"endpoint.url '{self.url}' is none; write one such as http://localhost:8000/v1")
        if re.search("[@?#]", self.url):  # it is written into results, and said
            raise UserError(
                "endpoint.url holds a name, a password or a query; give the address alone, and the key in an "
                "environment variable that api_key_variable names"
            )
        if self.api_key_variable is not None and not os.environ.get(self.api_key_variable):
            raise UserError(f"the environment variable {self.api_key_variable} is to hold the judge's key; set it")

    @property
    def name(self) -> str:
        """As results name it."""
        return f"{self.model} at {self.url.rstrip('/')}"

    @property
    def asked(self) -> list[Any]:
        """What decides its replies."""
        return [self.url.rstrip("/"), self.model, {**_OPTIONS, **self.options}]

    def ask(self, conversations: Sequence[list[Message]]) -> list[Reply]:
        """Send conversations, several at once.

        Args:
            conversations: each as messages that end with one of the user.

        Returns:
            What came back for each, in the order given.

        Raises:
            UserError: the server refuses the key, or knows neither the address nor the model.
        """
        bodies = [{"model": self.model, "messages": messages, **_OPTIONS, **self.options} for messages in conversations]
        return self.post(bodies, _content, CHAT)

    def post(self, bodies: Sequence[Mapping[str, Any]], read: Callable[[bytes], str], path: str = "") -> list[Reply]:
        """Send requests of any kind, several at once.

        Args:
            bodies: fields of each; those that are None are left out.
            read: what a reply says; raises `FailedError` for one that cannot be read.
            path: goes behind the URL.

        Returns:
            What came back for each, in the order given.

        Raises:
            UserError: as in `ask`.
        """
        questioning = _Questioning(self.give_up_after)
        with ThreadPoolExecutor(self.parallel, thread_name_prefix="judge") as pool:
            futures = [pool.submit(self._reply, body, read, path, questioning) for body in bodies]
            try:
                return [future.result() for future in futures]
            except BaseException:
                questioning.over.set()
                pool.shutdown(cancel_futures=True)
                raise

    def _reply(
        self, body: Mapping[str, Any], read: Callable[[bytes], str], path: str, questioning: _Questioning
    ) -> Reply:
        """The reply to one request; that none came is told to the other requests."""
        problem = NOT_ASKED
        for attempt in range(self.retries + 1):
            if questioning.over.is_set():
                break
            try:
                text = read(self._send(body, path, questioning.opener))
            except FailedError as failure:
                problem = str(failure)
                if not failure.passing:
                    break
                wait = min(max(self.backoff * 2**attempt, failure.wait), _LONGEST_WAIT)
                if attempt < self.retries:
                    questioning.over.wait(wait)
            else:
                questioning.answered()
                return Reply(text)
        questioning.failed()
        return Reply(None, problem)

    def _send(self, fields: Mapping[str, Any], path: str, opener: urllib.request.OpenerDirector) -> bytes:
        """What the server says.

        Raises:
            FailedError: nothing came.
            UserError: nothing will come.
        """
        body = json.dumps({name: value for name, value in fields.items() if value is not None}).encode()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.api_key_variable is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.api_key_variable]}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}{path}", body, headers, method="POST")
        try:
            with opener.open(request, timeout=self.timeout) as response:
                return _read(response, time.monotonic() + self.timeout)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error, _detail(error), path) from None
        except urllib.error.URLError as error:
            raise FailedError(f"no connection ({error.reason})") from None
        except TimeoutError:
            raise FailedError(f"no reply within {self.timeout:g} seconds") from None
        except (http.client.HTTPException, OSError) as error:
            raise FailedError(f"the connection broke ({type(error).__name__})") from None

    def _refused(self, error: urllib.error.HTTPError, detail: str, path: str) -> Exception:
        code, reason = error.code, error.reason
        if code in _ADVICE:
            advice = _ADVICE[code] if path == CHAT or code != 404 else "look at the URL"
            return UserError(f"the judge at {self.url} answers {code} {reason}{detail}: {advice}")
        if 300 <= code < 400:
            leads = error.headers.get("Location", "elsewhere")
            return UserError(
                f"the judge at {self.url} answers {code}, which leads to {leads}; name that address itself"
            )
        wait = error.headers.get("Retry-After", "")
        return FailedError(
            f"{code} {reason}{detail}",
            passing=code in _PASSING or code >= 500,
            wait=float(wait) if wait.isdigit() else 0.0,  # it may also be a date
        )


class FailedError(Exception):
    """A request without a reply; `passing` if it may have one later, `wait` seconds from now at the earliest."""

    def __init__(self, problem: str, passing: bool = True, wait: float = 0.0) -> None:
        super().__init__(problem)
        self.passing, self.wait = passing, wait


class _Questioning:
    """What the requests of one `ask` know of one another: how many have failed in a row, and whether it is over."""

    def __init__(self, give_up_after: int) -> None:
        self.over = threading.Event()
        self.opener = urllib.request.build_opener(_NoRedirects)
        self._give_up_after, self._in_a_row, self._lock = give_up_after, 0, threading.Lock()

    def answered(self) -> None:
        with self._lock:
            self._in_a_row = 0

    def failed(self) -> None:
        with self._lock:
            self._in_a_row += 1
            if self._in_a_row >= self._give_up_after:
                self.over.set()


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected request would carry the key elsewhere."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The body, if it is complete in time: the timeout of a connection starts anew with every byte."""
    parts, size, length = [], 0, response.length  # None where the server does not say it
    while part := response.read1(65536):
        parts.append(part)
        size += len(part)
        if time.monotonic() > deadline:
            raise TimeoutError
        if size > _LARGEST_REPLY:
            raise FailedError("a reply of more than a megabyte")
    if length is not None and size < length:  # which read1 does not mind
        raise http.client.IncompleteRead(b"", length - size)
    return b"".join(parts)


def _detail(error: urllib.error.HTTPError) -> str:
    """What the server says of a refusal, in brackets, if it says so in the usual form."""
    try:
        said = json.loads(error.read(_LARGEST_REPLY))["error"]["message"]
    except (ValueError, KeyError, TypeError, OSError, http.client.HTTPException):
        return ""
    return f" ({' '.join(str(said).split())[:200]})"


def _content(raw: bytes) -> str:
    try:
        reply = json.loads(raw)
    except ValueError:
        raise FailedError("a reply that is no JSON") from None
    try:
        text = reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise FailedError("a reply without choices[0].message.content") from None
    if not isinstance(text, str):
        raise FailedError("a reply whose content is no text")
    return text
