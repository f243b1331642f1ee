"""The gateway's figures for Prometheus; no label holds a prompt, a key or anything else that a caller can choose."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serving.api.ask import Usage
from serving.protocol import EngineStats

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

READINGS = (
    "running",
    "waiting",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "output_tokens",
    "steps",
    "busy_seconds",
)


class Metrics:
    """One gateway's; several gateways are several targets, whose counters add up."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._requests = Counter("spanfill_requests", "Requests answered.", ["route", "status"], registry=registry)
        self._seconds = Histogram(
            "spanfill_request_seconds", "End to end.", ["route"], buckets=SECONDS, registry=registry
        )
        self._first = Histogram(
            "spanfill_ttft_seconds", "From admission to the first token.", buckets=SECONDS, registry=registry
        )
        self._waited = Histogram(
            "spanfill_wait_seconds", "From arrival to admission.", buckets=SECONDS, registry=registry
        )
        self._tokens = Counter("spanfill_tokens", "Tokens served.", ["kind"], registry=registry)
        self._engines = Gauge(
            "spanfill_engine", "The replicas' latest readings, added up.", ["reading"], registry=registry
        )

    def answered(self, route: str, status: int, seconds: float) -> None:
        """A request ended; status 499: its client went away."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def waited(self, seconds: float) -> None:
        """A request was admitted."""
        self._waited.observe(seconds)

    def began(self, seconds: float) -> None:
        """A request's first token came."""
        self._first.observe(seconds)

    def used(self, usage: Usage) -> None:
        """A request's tokens."""
        self._tokens.labels("prompt").inc(usage.prompt_tokens)
        self._tokens.labels("cached").inc(usage.cached_tokens)
        self._tokens.labels("completion").inc(usage.completion_tokens)

    def read(self, stats: Mapping[str, EngineStats]) -> None:
        """The replicas' latest readings, by their names."""
        self._engines.labels("replicas").set(len(stats))
        for reading in READINGS:
            self._engines.labels(reading).set(sum(getattr(found, reading) for found in stats.values()))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
