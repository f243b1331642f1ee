"""The one tree of errors: each carries a code, an HTTP status, an exit code, whether a retry helps, and the remedy.

Errors are raised where they happen and translated once, at the edge: to an exit code by ``jobs.cli``, to an error row
by ``jobs.rows``, to an HTTP answer by ``serving.api``.
"""

from collections.abc import Sequence
from typing import ClassVar


class SpanfillError(Exception):
    """Base of every error that spanfill raises on purpose.

    ``code`` is a stable machine-readable name (also the ``error_code`` of an error row), ``remedy`` one sentence that
    tells the user what to do.
    """

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.remedy)

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()


def _rebuild(kind: type[SpanfillError], message: str, remedy: str) -> SpanfillError:
    return kind(message, remedy=remedy)


class UsageError(SpanfillError):
    """A wrong option or combination of options; nothing was started."""

    code = "bad_usage"
    http_status = 400
    exit_code = 2


class ConfigError(UsageError):
    """A configuration file, environment variable or engine argument is wrong; names key and value."""

    code = "bad_config"


class InputError(UsageError):
    """An input file, folder or column is missing, unreadable or of the wrong type; names file, row and column."""

    code = "bad_input"


class OutputError(UsageError):
    """The output folder belongs to another job, is not empty, or cannot be written before anything was started."""

    code = "bad_output"


class OtherJobError(OutputError):
    """The output folder belongs to another job; ``differing`` names what is not alike in what they are."""

    code = "other_job"

    def __init__(self, message: str, *, remedy: str = "", differing: Sequence[str] = ()) -> None:
        super().__init__(message, remedy=remedy)
        self.differing = tuple(differing)


class JobHeldError(OutputError):
    """Another runner, still alive, holds the output folder's lease."""

    code = "job_held"


class DamagedStateError(OutputError):
    """A file of a job's own state is damaged or missing; names it."""

    code = "damaged_state"


class ModelError(UsageError):
    """The model is unknown, has no files, or does not fit where it should run."""

    code = "bad_model"


class FormatError(ModelError):
    """The model's tokenizer lacks what the infill format needs, or the format cannot do what is asked."""

    code = "no_infill"


class NoInfillError(FormatError):
    """A suffix for a model that has no control tokens for infilling."""


class VersionError(UsageError):
    """Nodes of one cluster run different versions, or stored state is of a format that this version cannot read."""

    code = "version_mismatch"


class AuthenticationError(SpanfillError):
    """No key, or one that is unknown, revoked or expired."""

    code = "invalid_api_key"
    http_status = 401


class ForbiddenError(SpanfillError):
    """The key is valid and may not do this."""

    code = "forbidden"
    http_status = 403


class NotFoundError(SpanfillError):
    """There is nothing of that name, or it is another tenant's."""

    code = "not_found"
    http_status = 404


class ModelNotFoundError(NotFoundError):
    """The model that a client names is not served here, or not for this tenant."""

    code = "model_not_found"


class LimitError(SpanfillError):
    """A limit of the tenant or key is reached; ``retry_after`` seconds later there is room again."""

    code = "rate_limit_exceeded"
    http_status = 429
    retryable = True

    def __init__(self, message: str, *, remedy: str = "", retry_after: float = 1.0) -> None:
        super().__init__(message, remedy=remedy)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_limit, (type(self), self.message, self.remedy, self.retry_after)


def _rebuild_limit(kind: type[LimitError], message: str, remedy: str, retry_after: float) -> LimitError:
    return kind(message, remedy=remedy, retry_after=retry_after)


class OverloadedError(LimitError):
    """Too many requests wait, or one waited beyond its deadline."""

    code = "overloaded"
    http_status = 503


class ResourceError(SpanfillError):
    """The cluster lacks the cores, GPUs or memory that the replicas ask for."""

    code = "no_resources"
    http_status = 503


class EngineError(SpanfillError):
    """The engine refused or failed one request; other requests go on."""

    code = "engine_error"


class PromptTooLongError(EngineError):
    """The prompt and ``max_tokens`` together exceed the engine's context."""

    code = "prompt_too_long"
    http_status = 400


class EngineDeadError(EngineError):
    """The engine process is gone; every request it held may be sent to another replica."""

    code = "engine_dead"
    http_status = 503
    retryable = True


class EngineGoneError(EngineDeadError):
    """The engine was dead before the request came, so the request has nothing to do with it."""

    code = "engine_gone"


class EngineHungError(EngineDeadError):
    """The engine stopped stepping while it held requests; its replica is started again."""

    code = "engine_hung"


class StorageError(SpanfillError):
    """A part, segment or manifest could not be written (disk full, store unreachable); what was published stays."""

    code = "storage_failed"


class DatabaseAwayError(StorageError):
    """The database of tenants does not answer, or is locked for too long; the same may work a little later."""

    code = "database_away"
    http_status = 503
    retryable = True


class DatabaseUnfitError(DatabaseAwayError):
    """The database is of a later spanfill, or its user may not make tables: to clients it is away until that is mended.

    They are not to know which it is, and whoever was let in before stays so.
    """

    exit_code = 2


class InputChangedError(SpanfillError):
    """An input file changed or vanished while the job ran; what was published stays."""

    code = "input_changed"


class LeaseLostError(SpanfillError):
    """Another runner took the job over while this one was silent; this one stops writing."""

    code = "lease_lost"


class FeederError(SpanfillError):
    """The processes that read and write die again and again without finishing a row."""

    code = "feeder_dies"


class TooManyErrorsError(SpanfillError):
    """The share of error rows passed ``max_error_rate``; the job stopped and can be resumed."""

    code = "too_many_errors"


class InterruptedJobError(SpanfillError):
    """SIGINT or SIGTERM; what is done is kept and the same command resumes."""

    code = "interrupted"
    exit_code = 130

    def __init__(
        self,
        message: str = "interrupted; what is done is kept.",
        *,
        remedy: str = "Run the same command again to resume.",
    ) -> None:
        super().__init__(message, remedy=remedy)


class TerminatedJobError(InterruptedJobError):
    """SIGTERM; as ``InterruptedJobError`` with the exit code that the signal asks for."""

    code = "terminated"
    exit_code = 143
