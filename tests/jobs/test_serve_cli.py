"""What ``spanfill serve`` refuses before it starts anything."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Command

pytestmark = pytest.mark.usefixtures("home")

ELSEWHERE = ("--host", "0.0.0.0")


@pytest.fixture
def taken() -> Iterator[int]:
    """A port where somebody listens."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening.getsockname()[1]


def test_a_port_that_is_taken_is_refused(spanfill: Command, taken: int) -> None:
    told = spanfill("serve", "--port", taken, "--engine", "instant")
    assert (told.code, f"127.0.0.1:{taken}" in told.stderr, "--port" in told.stderr) == (2, True, True)


def test_loopback_has_two_addresses_and_what_is_none_is_named(spanfill: Command) -> None:
    with socket.socket(socket.AF_INET6) as listening:
        listening.bind(("::1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        told = spanfill("serve", "--host", "::1", "--port", port, "--engine", "instant")
    assert (told.code, f"::1:{port}: Address already in use" in told.stderr) == (2, True), told
    told = spanfill("serve", "--host", "no.such.host.invalid", "--engine", "instant")
    assert (told.code, "no.such.host.invalid" in told.stderr) == (2, True), told


def test_a_server_for_others_needs_a_tenant_and_says_how_to_make_one(spanfill: Command) -> None:
    told = spanfill("serve", *ELSEWHERE, "--port", 18_231, "--engine", "instant")
    assert (told.code, "spanfill tenants create NAME" in told.stderr) == (2, True)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("open_until_tenants: true", "open_until_tenants"),
        ("gateways: 0", "gateways = 0"),
        ("gateway: 1", "gateway"),
        ("routes: {'jobs.routes:routes': {input_prefixes: ['file:///etc/']}}", "input_prefixes"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(spanfill: Command, tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "app.yaml").write_text(f"{line}\n")
    spanfill("tenants", "create", "acme")
    told = spanfill("serve", "--config", tmp_path / "app.yaml", *ELSEWHERE, "--engine", "instant", "--port", 18_232)
    assert (told.code, words in told.stderr) == (2, True), told
