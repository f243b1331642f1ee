"""Jobs: Parquet of prefix/suffix pairs in, Parquet of infills out."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobs.runner import run_job
    from jobs.spec import JobSpec

__all__ = ["JobSpec", "run_job"]


def __getattr__(name: str) -> Any:
    """Import on first use: the command's ``--help`` must not wait for Ray."""
    if name == "run_job":
        from jobs.runner import run_job

        return run_job
    if name == "JobSpec":
        from jobs.spec import JobSpec

        return JobSpec
    raise AttributeError(name)
