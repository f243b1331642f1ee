"""OpenAI's own package against the routes of files and batches at a real socket; no engine is needed."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from openai import BadRequestError, NotFoundError, OpenAI, RateLimitError
from openai.types import Batch

from jobs.api.config import RoutesConfig
from tests.jobs.routed import ENDED, ask, jsonl, logs, routing

pytestmark = pytest.mark.usefixtures("home")

SECONDS = 120.0


@contextmanager
def listening(config: RoutesConfig) -> Iterator[Callable[[str], OpenAI]]:
    """OpenAI's client of a tenant, by the tenant's name; it tries nothing twice."""
    with routing(config) as app:
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
        thread.start()
        until(lambda: server.started)
        host, port = server.servers[0].sockets[0].getsockname()
        try:
            yield lambda name: OpenAI(base_url=f"http://{host}:{port}/v1", api_key=name, max_retries=0)
        finally:
            server.should_exit = True
            thread.join(SECONDS)


def until(condition: Callable[[], bool]) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, logs()
        time.sleep(0.05)


def create(client: OpenAI, *lines: Any) -> Batch:
    """A batch of lines."""
    file = client.files.create(file=("lines.jsonl", jsonl(*lines)), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")


def ended(client: OpenAI, batch: Batch) -> Batch:
    """The batch once it has ended."""
    until(lambda: client.batches.retrieve(batch.id).status in ENDED)
    return client.batches.retrieve(batch.id)


def test_files_are_stored_listed_read_and_deleted() -> None:
    with listening(RoutesConfig(at_once=0)) as client_of:
        acme, zeta = client_of("acme"), client_of("zeta")
        data = jsonl(ask("a"))
        files = [acme.files.create(file=("lines.jsonl", data), purpose="batch") for _ in range(3)]
        kept = acme.files.create(
            file=("x", data), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3_600}
        )
        assert kept.expires_at == kept.created_at + 3_600
        assert acme.files.content(files[0].id).read() == data
        assert acme.files.retrieve(files[0].id) == files[0]
        assert acme.files.wait_for_processing(files[0].id).status == "processed"
        assert [file.id for file in acme.files.list(limit=2, order="asc")] == [*(file.id for file in files), kept.id]
        assert list(zeta.files.list()) == []
        for ask_for in (zeta.files.retrieve, zeta.files.content, zeta.files.delete):
            with pytest.raises(NotFoundError, match=files[0].id):
                ask_for(files[0].id)
        assert acme.files.delete(files[0].id).deleted
        with pytest.raises(NotFoundError):
            acme.files.content(files[0].id)


def test_a_batch_with_wrong_lines_fails_and_says_which() -> None:
    with listening(RoutesConfig()) as client_of:
        client = client_of("acme")
        told = ended(client, create(client, ask("a"), ask("a"), ask("b", model="gpt-5")))
    assert (told.status, told.output_file_id) == ("failed", None)
    assert told.errors is not None
    found = [(error.line, error.code) for error in told.errors.data or []]
    assert found == [(2, "duplicate_custom_id"), (3, "mismatched_model")]


def test_batches_are_listed_and_a_cancelled_one_says_what_was_not_run() -> None:
    with listening(RoutesConfig(at_once=0)) as client_of:
        acme, zeta = client_of("acme"), client_of("zeta")
        batches = [create(acme, ask("a"), ask("b")) for _ in range(3)]
        assert [batch.id for batch in acme.batches.list(limit=2)] == [batch.id for batch in reversed(batches)]
        assert list(zeta.batches.list()) == []
        with pytest.raises(NotFoundError):
            zeta.batches.cancel(batches[0].id)
        assert [acme.batches.cancel(batch.id).status for batch in batches] == ["cancelling"] * 3
    with listening(RoutesConfig()) as client_of:
        client = client_of("acme")
        told = ended(client, batches[0])
        assert told.status == "cancelled"
        assert told.request_counts is not None
        assert (told.request_counts.total, told.request_counts.failed) == (2, 2)
        lines = [json.loads(line) for line in client.files.content(str(told.error_file_id)).iter_lines()]
    assert [(line["custom_id"], line["error"]["code"]) for line in lines] == [
        ("a", "batch_cancelled"),
        ("b", "batch_cancelled"),
    ]


def test_what_cannot_be_is_refused_in_openais_errors() -> None:
    with listening(RoutesConfig(at_once=0, unfinished=1)) as client_of:
        client = client_of("acme")
        with pytest.raises(BadRequestError, match="neither batch nor job"):
            client.files.create(file=("x", b"{}"), purpose="fine-tune")
        create(client, ask("a"))
        with pytest.raises(RateLimitError, match="not finished") as refused:
            create(client, ask("a"))
        assert refused.value.response.headers["retry-after"] == "60"
        file = client.files.create(file=("x", b"{}"), purpose="batch")
        with pytest.raises(BadRequestError, match="endpoint"):
            client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
