"""Before anything is paid for: every node has the same versions, sees the weights, the input and the output."""

import platform
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.store import Location, delete, exists, publish_bytes
from serving.config import EngineConfig
from serving.engine_args import installed_version
from serving.errors import OutputError, ResourceError, StorageError, UsageError, VersionError

ANSWER_SECONDS = 120
PACKAGES = ("spanfill", "vllm", "torch", "ray", "pyarrow", "tiktoken")


def versions() -> dict[str, str]:
    """The versions that matter, of this process."""
    found = {name: installed_version(name) for name in PACKAGES}
    return found | {"python": platform.python_version()}


def look(model: str | None, inputs: Sequence[Location], probe: Location | None) -> dict[str, Any]:
    """What one node sees: its versions and the paths that it cannot reach."""
    wanted = [*inputs, *([probe] if probe else [])]
    return {
        "versions": versions(),
        "missing": [str(location) for location in wanted if not exists(location)],
        "model_missing": model is not None and not exists(Location(model, model)),
    }


def check_cluster(engine: EngineConfig, inputs: Sequence[Location], output: Location) -> None:
    """Ask every live node; raises ``VersionError`` or ``UsageError`` naming the node and what it lacks."""
    probe = output.join("_spanfill", f".probe-{uuid.uuid4().hex[:8]}")
    publish_bytes(probe, b"")
    model = engine.model if engine.kind == "vllm" and engine.model.startswith("/") else None
    nodes = [node for node in ray.nodes() if node["Alive"]]
    try:
        answers = [
            ray.remote(look)
            .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
            .remote(model, inputs, probe)
            for node in nodes
        ]
        for node, answer in zip(nodes, ray.get(answers, timeout=ANSWER_SECONDS), strict=True):
            judge(node["NodeManagerHostname"], answer, engine)
    except ray.exceptions.GetTimeoutError as error:
        raise ResourceError(
            f"a node of {len(nodes)} does not answer within {ANSWER_SECONDS} s.", remedy="See `ray status`."
        ) from error
    finally:
        delete(probe)


def judge(host: str, seen: dict[str, Any], engine: EngineConfig) -> None:
    """Compare what ``look`` saw on a node with this process; raises as ``check_cluster`` does."""
    here = versions()
    different = [n for n, v in here.items() if v and seen["versions"].get(n) not in (v, "")]
    if different:
        pairs = ", ".join(f"{name} {seen['versions'][name]} (here {here[name]})" for name in different)
        raise VersionError(f"node {host} runs {pairs}.", remedy="Install the same lock on every node.")
    if seen["model_missing"]:
        raise UsageError(
            f"node {host} does not see the model {engine.model}.", remedy="Put it on a shared path or a hub."
        )
    if seen["missing"]:
        raise UsageError(
            f"node {host} does not reach {', '.join(seen['missing'])}.", remedy="Use a shared path or a URI."
        )


@contextmanager
def writing_is_possible() -> Iterator[None]:
    """Before anything is started, a failed write is the output's fault: raise ``OutputError`` for it."""
    try:
        yield
    except StorageError as error:
        raise OutputError(error.message, remedy="Check --output, its permissions and the free space.") from error
