"""What crosses processes: requests to an engine, completions from it, and its statistics.

Token ids cross, text never does. Everything here is a frozen dataclass with slots. What crosses by the thousand says
itself how it is pickled: what dataclasses do for that is written in Python, and takes three times as long.
"""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

BATCH_PRIORITY = 100
"""vLLM scheduling priority of batch rows; lower runs first."""

INTERACTIVE_PRIORITY = 0
"""vLLM scheduling priority of requests that a person waits for."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to decode, shared by every request of a micro-batch.

    ``stop`` strings end a completion by its text, as ``Request.until`` does; ``format`` and ``tokenizer`` are the names
    with which ``load_format`` finds what reads its tokens, needed only then. ``alternatives`` is how many likely
    tokens are told beside each of the completion's and the prompt's, where their logprobs are. Penalties, ``top_k``,
    ``min_p``, ``min_tokens`` and ``logit_bias`` are vLLM's ``SamplingParams``'.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    prompt_logprobs: bool = False
    stop: tuple[str, ...] = ()
    format: str = ""
    tokenizer: str = ""
    alternatives: int = 0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt; ``seeds`` holds one seed for each sample that is wanted, ``key`` comes back with the result.

    ``until`` is the beginning of the row's suffix where a completion that has run into it shall end, None elsewhere.
    ``token_ids`` of a batch are 32-bit arrays: they pickle as bytes, several times faster than lists.
    """

    key: int
    token_ids: Sequence[int]
    seeds: tuple[int, ...] = (0,)
    until: str | None = None

    def __reduce__(self) -> tuple[type["Request"], tuple[Any, ...]]:
        return Request, (self.key, self.token_ids, self.seeds, self.until)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The unit of a call to a replica; ``alone``: nothing else may run in the engine beside it.

    ``patience`` is what the caller's measured pace allows an engine to stand still, in seconds: it counts where the
    replica has measured nothing of its own yet, as after a restart. ``lane`` says which of the replicas is meant.
    ``weight`` is the share of the tenant, which ``cache_salt`` stands for, beside other tenants' batch rows.
    """

    requests: tuple[Request, ...]
    sampling: Sampling
    priority: int = BATCH_PRIORITY
    cache_salt: str | None = None
    alone: bool = False
    patience: float | None = None
    lane: int | None = None
    weight: float = 1.0


Alternatives: TypeAlias = tuple[tuple[int, float], ...]
"""Token ids that were likely at one place with their natural logarithms, the likeliest first."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sample: its token ids without the stop token, which is ``stop_token_id``.

    That is None where it ran to its length or was ended by its text; then the last token may reach beyond the match.
    """

    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    stop_token_id: int | None = None
    logprobs: list[float] | None = None
    alternatives: list[Alternatives] | None = None

    def __reduce__(self) -> tuple[type["Completion"], tuple[Any, ...]]:
        return Completion, (self.token_ids, self.finish_reason, self.stop_token_id, self.logprobs, self.alternatives)


@dataclass(frozen=True, slots=True)
class Result:
    """The answer to one request: its completions in the order of the seeds, or an error in the engine's words.

    ``cached_tokens`` counts prompt tokens found in the prefix cache, summed over the samples. ``prompt_logprobs`` holds
    one natural logarithm a prompt token from the second on, ``prompt_alternatives`` what else was likely there.
    """

    key: int
    completions: tuple[Completion, ...] = ()
    cached_tokens: int = 0
    prompt_logprobs: list[float] | None = None
    prompt_alternatives: list[Alternatives] | None = None
    error_code: str | None = None
    error_message: str | None = None

    def __reduce__(self) -> tuple[type["Result"], tuple[Any, ...]]:
        told = (self.key, self.completions, self.cached_tokens, self.prompt_logprobs, self.prompt_alternatives)
        return Result, (*told, self.error_code, self.error_message)


@dataclass(frozen=True, slots=True)
class MicroBatchResult:
    """Answers to some requests of a micro-batch, by their keys; who gave them, and how many rows wait there now."""

    replica: str
    results: tuple[Result, ...]
    waiting: int = 0


@dataclass(frozen=True, slots=True)
class Growth:
    """What a sample of a request grew by; ids and logprobs are as in ``Completion``, together they are one.

    ``key`` is the request's and ``sample`` counts its seeds. The last one of a sample has a ``finish_reason`` and tells
    the ``cached_tokens``, as those before it may. A request that the engine refuses has one alone, with the error in
    the engine's words.
    """

    key: int
    sample: int
    token_ids: list[int]
    logprobs: list[float] | None = None
    alternatives: list[Alternatives] | None = None
    finish_reason: Literal["stop", "length", "error"] | None = None
    stop_token_id: int | None = None
    cached_tokens: int = 0
    error_code: str | None = None
    error_message: str | None = None

    @classmethod
    def of(
        cls, key: int, sample: int, completion: Completion, cached_tokens: int = 0, *, ends: bool = True
    ) -> "Growth":
        """What a sample grew by as a completion of its own; it goes on where it does not end."""
        reason = completion.finish_reason if ends else None
        grown = (completion.token_ids, completion.logprobs, completion.alternatives)
        return cls(key, sample, *grown, reason, completion.stop_token_id, cached_tokens)

    def __reduce__(self) -> tuple[type["Growth"], tuple[Any, ...]]:
        grown = (self.key, self.sample, self.token_ids, self.logprobs, self.alternatives, self.finish_reason)
        return Growth, (*grown, self.stop_token_id, self.cached_tokens, self.error_code, self.error_message)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """One reading of an engine; ``steps``, tokens and seconds only grow while it lives.

    ``busy_seconds`` are those with a row running, ``row_seconds`` the running rows added up over time, ``cpu_seconds``
    those of the replica's process, where the engine has processes of its own without theirs. One that is not alive is
    started again.
    """

    running: int = 0
    waiting: int = 0
    kv_cache_usage: float = 0.0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    output_tokens: int = 0
    steps: int = 0
    busy_seconds: float = 0.0
    row_seconds: float = 0.0
    cpu_seconds: float = 0.0
    is_alive: bool = True


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine is: ``kind`` is ``vllm``, ``simulated`` or ``instant``; lengths are in tokens.

    ``settings`` are engine arguments of speed as they are in force, given or not: those that ``spanfill tune`` tries.
    """

    kind: str
    model: str
    max_model_len: int
    max_num_seqs: int
    block_size: int
    kv_cache_tokens: int
    dtype: str = ""
    device: str = ""
    cores: tuple[int, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, int | bool] = field(default_factory=dict)


class Engine(Protocol):
    """The interface of ``serving.engine.VllmEngine`` and ``serving.simulated.SimulatedEngine``."""

    @property
    def info(self) -> EngineInfo:
        """What this engine is."""

    async def generate(
        self, request: Request, sampling: Sampling, *, priority: int = BATCH_PRIORITY, cache_salt: str | None = None
    ) -> Result:
        """Answer one request; raises ``EngineDeadError`` when the engine is gone. Cancelling it frees its slot."""

    def stream(
        self, request: Request, sampling: Sampling, *, priority: int = BATCH_PRIORITY, cache_salt: str | None = None
    ) -> AsyncGenerator[Growth, None]:
        """As ``generate``, a step at a time, without the prompt's logprobs. Closing it frees its slots."""

    def stats(self) -> EngineStats:
        """The latest reading."""

    async def check_health(self) -> None:
        """Raise ``EngineDeadError`` if the engine can answer no more."""

    async def shutdown(self) -> None:
        """End the engine and its processes."""
