"""How calls reach replicas: as streams, at the lane that the first argument names, whose prefix cache is met again."""

import random

from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from serving.protocol import MicroBatch


class LaneRouter(RequestRouter):  # type: ignore[misc]
    """Replicas in the order of their ids are lanes 0, 1, ...; calls without a lane go to the less busy of two."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas, the best first; Serve takes one of a rank that has room."""
        lane = _lane(pending_request)
        some = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        if lane is None or not candidate_replicas:
            return [some]
        replicas = sorted(candidate_replicas, key=lambda replica: replica.replica_id.unique_id)
        return [[replicas[lane % len(replicas)]], some]


def streamed(handle: DeploymentHandle) -> DeploymentHandle:
    """The handle for calls whose answers come in parts, over gRPC: past Ray's object store."""
    return handle.options(
        stream=True, _by_reference=False, request_serialization="pickle", response_serialization="pickle"
    )


def _lane(pending: PendingRequest | None) -> int | None:
    asked = pending.args[0] if pending is not None and pending.args else None
    return asked.lane if isinstance(asked, MicroBatch) else asked if isinstance(asked, int) else None
