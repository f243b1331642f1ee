"""``bench gateway``: what is no whole stream is an error, and the command says so."""

import asyncio

import httpx
import pytest

from tests.benchmarks.gateway import Streams, parse, percentiles, stream_once

TEXT = 'data: {"choices":[{"text":"a"}],"usage":null}\n\n'
USED = 'data: {"choices":[],"usage":{"completion_tokens":7}}\n\n'
DONE = "data: [DONE]\n\n"


def streamed(answer: httpx.Response | Exception) -> Streams:
    """One stream that is answered so."""

    def handle(_: httpx.Request) -> httpx.Response:
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def run() -> Streams:
        into = Streams()
        async with httpx.AsyncClient(transport=httpx.MockTransport(handle), base_url="http://server") as client:
            await stream_once(client, ("a", "b"), 7, into)
        return into

    return asyncio.run(run())


def test_a_whole_stream_counts_with_its_tokens_and_times() -> None:
    found = streamed(httpx.Response(200, text=TEXT + USED + DONE))
    assert (found.tokens, len(found.first), found.errors) == (7, 1, {})
    assert 0 < found.first[0] <= found.total[0]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (httpx.Response(503, text='{"error": "overloaded"}'), '{"error": "overloaded"}'),
        (httpx.Response(200, text=TEXT + 'data: {"error":{}}\n\n'), 'data: {"error":{}}'),
        (httpx.Response(200, text=TEXT), TEXT.strip()),
        (httpx.ReadError("gone"), "ReadError('gone')"),
    ],
)
def test_whatever_else_is_an_error(answer: httpx.Response | Exception, told: str) -> None:
    found = streamed(answer)
    assert (found.errors, found.total) == ({told: 1}, [])


def test_percentiles_are_in_the_unit_that_is_asked_for() -> None:
    assert percentiles([0.001, 0.002, 0.003], 1_000) == {"p50": 2.0, "p99": 2.98}
    assert percentiles([]) == {}


def test_a_file_that_could_not_be_written_is_refused_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--json", "/nowhere/at/all.json"])
    assert "cannot be written" in capsys.readouterr().err
