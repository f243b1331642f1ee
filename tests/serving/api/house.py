"""A ``FleetService`` on one simulated engine in this process, a desk that admits everybody, and what they were told."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from serving.api.ask import Answer, Ask, End, Piece, ServedModel, Usage
from serving.api.calls import Call
from serving.api.metrics import Metrics
from serving.api.service import Engines, FleetService
from serving.config import EngineConfig, RooflineConfig
from serving.errors import LimitError
from serving.formats import load_format
from serving.merging import merged
from serving.protocol import Growth, MicroBatch, MicroBatchResult
from serving.simulated import SimulatedEngine
from serving.tenants.caller import Caller
from serving.tenants.limits import Level, Standing
from serving.tenants.tickets import Capacity, Demand, Place, Ticket, Used

FORMAT = load_format("codegen25")
MODEL = ServedModel("demo", "codegen25", 256, can_infill=True)
ACME = Caller("acme", "k1")
ROOM = Standing(tokens=Level(100, 60, 24.0))
NO_ROOM = Standing(tokens=Level(100, 0, 60.0))


@dataclass
class Desk:
    """Admits everybody, or nobody; remembers who left with what."""

    refuses: bool = False
    demands: list[Demand] = field(default_factory=list)
    charged: list[int] = field(default_factory=list)
    left: list[Used | None] = field(default_factory=list)
    share: Capacity | None = None

    async def admit(self, demand: Demand) -> Ticket:
        """As the desk."""
        if self.refuses:
            raise LimitError("too many.", retry_after=2.0)
        self.demands.append(demand)
        return Ticket(Place("here", len(self.demands)), demand, ROOM)

    async def standing(self, caller: Caller) -> Standing:
        """As the desk."""
        return NO_ROOM

    def charge(self, ticket: Ticket, output_tokens: int) -> None:
        """As the desk."""
        self.charged.append(output_tokens)

    def leave(self, ticket: Ticket, used: Used | None = None) -> None:
        """As the desk."""
        self.left.append(used)


class House:
    """A service on one engine; make it inside an event loop. ``stream`` and ``whole`` answer in the engine's stead."""

    def __init__(
        self,
        *,
        instant: bool = True,
        desk: Desk | None = None,
        stream: Call[list[Growth]] | None = None,
        whole: Call[MicroBatchResult] | None = None,
        model: ServedModel = MODEL,
        time_scale: float = 1.0,
    ) -> None:
        config = EngineConfig(
            kind="instant" if instant else "simulated",
            model="demo",
            max_model_len=model.context,
            roofline=RooflineConfig(time_scale=time_scale),
        )
        self.engine = SimulatedEngine(config)
        self.batches: list[MicroBatch] = []
        self.used: list[tuple[str, Usage]] = []
        self.requests: list[int] = []
        self.desk = desk or Desk()
        self.metrics = Metrics("one")
        engines = Engines(model, FORMAT, "codegen25", whole or self._whole, stream or self._stream)
        self.service = FleetService(engines, self.desk, self._meter, self.metrics)

    def _meter(self, caller: Caller, model: str, usage: Usage, requests: int) -> None:
        self.used.append((caller.tenant, usage))
        self.requests.append(requests)

    async def _whole(self, batch: MicroBatch) -> AsyncIterator[MicroBatchResult]:
        self.batches.append(batch)
        results = [
            await self.engine.generate(r, batch.sampling, priority=batch.priority, cache_salt=batch.cache_salt)
            for r in batch.requests
        ]
        yield MicroBatchResult("here", tuple(results))

    async def _stream(self, batch: MicroBatch) -> AsyncIterator[list[Growth]]:
        self.batches.append(batch)
        sources = [
            self.engine.stream(r, batch.sampling, priority=batch.priority, cache_salt=batch.cache_salt)
            for r in batch.requests
        ]
        async with aclosing(merged(sources)) as growths:
            async for growth in growths:
                yield [growth]


def telling(growths: Sequence[Growth]) -> Call[list[Growth]]:
    """A replica's stream of these, one at a time."""

    async def stream(batch: MicroBatch) -> AsyncIterator[list[Growth]]:
        for growth in growths:
            yield [growth]

    return stream


def answered(*asks: Ask, house: House | None = None) -> Answer:
    """The answer to asks."""

    async def run() -> Answer:
        return await (house or House()).service.answer(asks, ACME, "demo")

    return asyncio.run(run())


async def streamed(house: House, *asks: Ask) -> tuple[dict[int, str], list[Piece], End]:
    """The texts, pieces and end of a stream."""
    texts: dict[int, str] = {}
    pieces: list[Piece] = []
    end = None
    async for item in house.service.stream(asks, ACME, "demo"):
        if isinstance(item, End):
            end = item
            continue
        pieces.append(item)
        texts[item.index] = texts.get(item.index, "") + item.text
    assert end is not None
    return texts, pieces, end
