"""A chat endpoint is asked over a real connection: what fails is tried again, and told, and never becomes a reply."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

import pytest

from helpers.judge_server import Said, chat, chat_server
from rlhf_lightning.chat.endpoint import Endpoint, Reply
from rlhf_lightning.errors import UserError

FAST: dict[str, Any] = {"backoff": 0.0, "timeout": 20.0, "retries": 2}


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def asked(*texts: str) -> list[list[dict[str, Any]]]:
    return [[{"role": "user", "content": text}] for text in texts]


def last(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"])


def test_replies_come_in_the_order_of_the_questions():
    met = threading.Barrier(4, timeout=20)

    def answer(body: dict[str, Any]) -> Said:
        met.wait()  # so that all are there at once
        return chat(f"said {last(body)}")

    with chat_server(answer) as server:
        endpoint = Endpoint(f"{server.url}/", "judge-1", parallel=4, **FAST)
        replies = endpoint.ask(asked(*(f"ü{i}" for i in range(8))))
    assert replies == [Reply(f"said ü{i}") for i in range(8)]
    assert server.most == 4
    assert set(server.paths) == {"/v1/chat/completions"}
    assert {body["model"] for body in server.bodies} == {"judge-1"}
    assert {body["temperature"] for body in server.bodies} == {0.0}


def test_the_key_is_taken_from_the_variable_that_is_named(monkeypatch):
    monkeypatch.setenv("MY_JUDGE", "s3cret")
    with chat_server(lambda body: chat("yes")) as server:
        endpoint = Endpoint(server.url, "m", "MY_JUDGE", **FAST)
        Endpoint(server.url, "m", **FAST).ask(asked("without"))
        endpoint.ask(asked("with"))
    assert [headers.get("Authorization") for headers in server.headers] == [None, "Bearer s3cret"]
    assert "s3cret" not in repr(vars(endpoint))


def test_a_key_that_is_not_there_is_missed_at_once(monkeypatch):
    monkeypatch.delenv("MY_JUDGE", raising=False)
    with pytest.raises(UserError, match="environment variable MY_JUDGE is to hold the judge's key"):
        Endpoint("http://127.0.0.1:1/v1", "m", "MY_JUDGE")


@pytest.mark.parametrize("url", ["localhost:8000/v1", "file:///etc/passwd", "http://", "http://a b"])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(UserError, match="is none; write one such as http"):
        Endpoint(url, "m")


def test_fields_of_a_request_can_be_added_and_left_out():
    with chat_server(lambda body: chat("yes")) as server:
        Endpoint(server.url, "m", options={"max_tokens": None, "seed": 3}, **FAST).ask(asked("x"))
    assert server.bodies == [{"model": "m", "messages": asked("x")[0], "temperature": 0.0, "seed": 3}]


@pytest.mark.parametrize(
    ("failure", "problem"),
    [
        (Said("", 500), "500 Internal Server Error"),
        (Said("", 503, {"Retry-After": "0"}), "503 Service Unavailable"),
        (Said("", 429, {"Retry-After": "Fri, 01 Jan 2038 00:00:00 GMT"}), "429 Too Many Requests"),
        (Said(json.dumps({"error": {"message": "slow\ndown"}}), 429), "429 Too Many Requests (slow down)"),
        (Said("<html>"), "a reply that is no JSON"),
        (Said(b"\xff\xfe{"), "a reply that is no JSON"),
        (Said(""), "a reply that is no JSON"),
        (Said('{"choices": []}'), "a reply without choices[0].message.content"),
        (Said("[1]"), "a reply without choices[0].message.content"),
        (Said('{"choices": [{"text": "A"}]}'), "a reply without choices[0].message.content"),
        (chat(None), "a reply whose content is no text"),
        (chat([{"type": "text"}]), "a reply whose content is no text"),
        (Said(b" " * (2**20 + 70_000)), "a reply of more than a megabyte"),
    ],
)
def test_what_may_pass_is_asked_again_and_told_if_it_stays(failure, problem):
    tried: dict[str, int] = {}

    def answer(body: dict[str, Any]) -> Said:
        tried[last(body)] = tried.get(last(body), 0) + 1
        return chat("at last") if last(body) == "passes" and tried["passes"] == 3 else failure

    with chat_server(answer) as server:
        replies = Endpoint(server.url, "m", **FAST).ask(asked("passes", "stays"))
    assert replies == [Reply("at last"), Reply(None, problem)]
    assert tried == {"passes": 3, "stays": 3}


def test_a_request_that_is_wrong_is_not_sent_again():
    said = Said(json.dumps({"error": {"message": "too long"}}), 400)
    with chat_server(lambda body: said) as server:
        replies = Endpoint(server.url, "m", **FAST).ask(asked("x"))
    assert replies == [Reply(None, "400 Bad Request (too long)")]
    assert len(server.bodies) == 1


def test_a_server_that_is_slow_is_not_waited_for():
    over = threading.Event()

    def answer(body: dict[str, Any]) -> Said:
        if last(body) == "slow":
            over.wait(20)
        return chat("yes")

    with chat_server(answer) as server:
        endpoint = Endpoint(server.url, "m", timeout=0.2, retries=1, backoff=0.0)
        replies = endpoint.ask(asked("slow", "quick"))
        over.set()
    assert replies == [Reply(None, "no reply within 0.2 seconds"), Reply("yes")]


def test_a_reply_that_never_ends_is_not_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        over = threading.Event()

        def drip() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
                while not over.is_set():
                    try:
                        connection.sendall(b" ")
                    except OSError:  # the client has gone
                        return
                    over.wait(0.05)  # less than the timeout: no single read is late

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        replies = Endpoint(url, "m", timeout=0.3, retries=0).ask(asked("x"))
        over.set()
        thread.join()
    assert replies == [Reply(None, "no reply within 0.3 seconds")]


def test_a_server_that_is_down_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    endpoint = Endpoint(f"http://127.0.0.1:{port}/v1", "m", retries=1, backoff=0.0, parallel=1, give_up_after=3)
    replies = endpoint.ask(asked(*"abcde"))
    assert all(reply.text is None for reply in replies)
    assert [reply.problem.partition(" (")[0] for reply in replies] == ["no connection"] * 3 + ["not asked"] * 2


def test_failures_count_from_the_last_reply():
    with chat_server(lambda body: chat("yes") if last(body) == "good" else Said("", 400)) as server:
        endpoint = Endpoint(server.url, "m", parallel=1, give_up_after=2, **FAST)
        replies = endpoint.ask(asked("bad", "good", "bad", "bad", "good"))
    assert [reply.text for reply in replies] == [None, "yes", None, None, None]
    assert [reply.problem for reply in replies] == ["400 Bad Request", "", *["400 Bad Request"] * 2, "not asked"]


@pytest.mark.parametrize(("code", "advice"), [(401, "key is missing"), (403, "not allowed"), (404, "look at the URL")])
def test_what_the_user_can_mend_ends_the_questions(code, advice):
    with chat_server(lambda body: Said("", code)) as server:
        endpoint = Endpoint(server.url, "m", parallel=1, **FAST)
        with pytest.raises(UserError, match=f"answers {code}.*{advice}"):
            endpoint.ask(asked(*"abcdef"))
    assert len(server.bodies) < 6


def test_a_key_is_not_carried_elsewhere(monkeypatch):
    monkeypatch.setenv("MY_JUDGE", "s3cret")
    with chat_server(lambda body: chat("yes")) as other:
        moved = Said("", 302, {"Location": f"{other.url}/chat/completions"})
        with chat_server(lambda body: moved) as server, pytest.raises(UserError, match="302, which leads to http"):
            Endpoint(server.url, "m", "MY_JUDGE", **FAST).ask(asked("x"))
    assert other.bodies == []


@pytest.mark.parametrize(
    "url", ["http://me:s3cret@host/v1", "https://host/v1?api_key=s3cret", "https://host/v1#s3cret"]
)
def test_a_url_that_may_hold_a_secret_is_refused_without_saying_it(url):
    with pytest.raises(UserError, match=r"a name, a password or a query; .*api_key_variable") as caught:
        Endpoint(url, "judge")
    assert "s3cret" not in str(caught.value)
