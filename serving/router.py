"""How calls reach replicas: as streams, at the lane that the first argument names, whose prefix cache is met again."""

import random
from collections.abc import Collection, Sequence
from typing import Any

from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from serving.protocol import MicroBatch


class LaneRouter(RequestRouter):  # type: ignore[misc]
    """Each replica that is there is one of the lanes 0, 1, ...; calls without a lane go to the less busy of two."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._lanes: list[str] = []

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas, the best first; Serve takes one of a rank that has room."""
        lane = _lane(pending_request)
        some = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        if lane is None or not candidate_replicas:
            return [some]
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        self._lanes = settled(self._lanes, replicas)
        return [[replicas[self._lanes[lane % len(replicas)]]], some]


def settled(lanes: Sequence[str], present: Collection[str]) -> list[str]:
    """The lanes' replicas after some came or went: of the others as few as can be change theirs.

    A new one takes the lane of one that is gone, or a further one; where none is new, the last one takes it.
    """
    new = sorted(set(present).difference(lanes))
    kept = [replica if replica in present else "" for replica in lanes]
    for gap in [lane for lane, replica in enumerate(kept) if not replica]:
        if new:
            kept[gap] = new.pop(0)
    while "" in kept:
        last = kept.pop()
        if last:
            kept[kept.index("")] = last
    return kept + new


def streamed(handle: DeploymentHandle) -> DeploymentHandle:
    """The handle for calls whose answers come in parts, over gRPC: past Ray's object store."""
    return handle.options(
        stream=True, _by_reference=False, request_serialization="pickle", response_serialization="pickle"
    )


def _lane(pending: PendingRequest | None) -> int | None:
    asked = pending.args[0] if pending is not None and pending.args else None
    return asked.lane if isinstance(asked, MicroBatch) else asked if isinstance(asked, int) else None
