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
    """One gateway's, whose name stands with each: of several any may answer, and their counters add up."""

    def __init__(self, gateway: str) -> None:
        self._gateway = gateway
        registry = self._registry = CollectorRegistry()

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(name, what, ["gateway", *labels], registry=registry)

        def histogram(name: str, what: str, *labels: str) -> Histogram:
            return Histogram(name, what, ["gateway", *labels], buckets=SECONDS, registry=registry)

        self._requests = counter("spanfill_requests", "Requests answered.", "route", "status")
        self._seconds = histogram("spanfill_request_seconds", "End to end.", "route")
        self._first = histogram("spanfill_ttft_seconds", "From admission to the first token.").labels(gateway)
        self._waited = histogram("spanfill_wait_seconds", "From arrival to admission.").labels(gateway)
        self._tokens = counter("spanfill_tokens", "Tokens served.", "kind")
        self._engines = Gauge(
            "spanfill_engine", "The replicas' latest readings, added up.", ["reading"], registry=registry
        )

    def answered(self, route: str, status: int, seconds: float) -> None:
        """A request ended; status 499: its client went away."""
        self._requests.labels(self._gateway, route, str(status)).inc()
        self._seconds.labels(self._gateway, route).observe(seconds)

    def waited(self, seconds: float) -> None:
        """A request was admitted."""
        self._waited.observe(seconds)

    def began(self, seconds: float) -> None:
        """A request's first token came."""
        self._first.observe(seconds)

    def used(self, usage: Usage) -> None:
        """Tokens of a request."""
        self._tokens.labels(self._gateway, "prompt").inc(usage.prompt_tokens)
        self._tokens.labels(self._gateway, "cached").inc(usage.cached_tokens)
        self._tokens.labels(self._gateway, "completion").inc(usage.completion_tokens)

    def read(self, stats: Mapping[str, EngineStats]) -> None:
        """The replicas' latest readings, by their names."""
        self._engines.labels("replicas").set(len(stats))
        for reading in READINGS:
            self._engines.labels(reading).set(sum(getattr(found, reading) for found in stats.values()))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
