"""One server for the whole folder: two gateways before a real engine, ended before other tests need the cores."""

from collections.abc import Iterator

import pytest

from tests.api import INFILL, MODEL, Api
from tests.server import running_server


@pytest.fixture(scope="package")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """The server, and two tenants of it."""
    usual = {"RAY_AUTH_MODE": "token"}  # As Ray has it in a cluster of its own.
    with running_server(tmp_path_factory.mktemp("api"), "--model", MODEL, "--gateways", "2", env=usual) as server:
        yield Api(server, server.new_tenant("acme"), server.new_tenant("other"))


@pytest.fixture(scope="package")
def expected(api: Api) -> str:
    """What comes of ``INFILL``, greedily: every client must be told the same."""
    text: str = api.complete(INFILL)["choices"][0]["text"]
    assert text
    return text
