"""A server as its clients see it, with the keys of two of its tenants."""

import time
from dataclasses import dataclass
from typing import Any

import httpx
from openai import OpenAI

from serving.api.gateway import LOOK_SECONDS
from tests.server import Server

MODEL = "demo-codegen25"
PREFIX = "def add(a, b):\n    return "
SUFFIX = "\n\n\ndef sub(a, b):\n    return a - b\n"
INFILL: dict[str, Any] = {"model": MODEL, "prompt": PREFIX, "suffix": SUFFIX, "max_tokens": 24, "temperature": 0}
"""A request that all kinds of clients can make, each in its own words."""


@dataclass(frozen=True)
class Api:
    """A server and the keys of the tenants acme and other."""

    server: Server
    acme: str
    other: str

    @property
    def url(self) -> str:
        """Where it listens."""
        return self.server.url

    def headers(self, key: str = "") -> dict[str, str]:
        """Those of a caller, acme unless a key is given."""
        return {"Authorization": f"Bearer {key or self.acme}"}

    def openai(self, key: str = "") -> OpenAI:
        """OpenAI's own client, which tries nothing twice."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=key or self.acme, max_retries=0)

    def post(self, path: str, body: dict[str, Any], key: str = "") -> httpx.Response:
        """Plain HTTP."""
        return httpx.post(f"{self.url}{path}", json=body, headers=self.headers(key), timeout=120)

    def complete(self, body: dict[str, Any], key: str = "") -> dict[str, Any]:
        """A good answer of ``/v1/completions``."""
        answer = self.post("/v1/completions", body, key)
        assert answer.status_code == 200, answer.text
        told: dict[str, Any] = answer.json()
        return told

    def reading(self, name: str) -> float:
        """One of the engines' figures, read after now by every gateway."""
        time.sleep(2 * LOOK_SECONDS + 0.5)
        return self.server.reading(name)
