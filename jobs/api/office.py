"""What the running of works needs, in one place."""

import threading
from dataclasses import dataclass

from jobs.api.config import RoutesConfig
from jobs.api.order import Order, WorkFolder
from jobs.api.queue import Queue, kind_of
from jobs.api.shelf import Shelf
from serving.api.ask import Service
from serving.api.gateway import GatewayConfig
from serving.tenants.caller import Caller
from serving.tenants.journal import Add
from serving.tenants.tables import WorkRow


@dataclass(frozen=True)
class Office:
    """Where works and files are, how usage is counted, what engines there are.

    ``holder`` names this gateway in its claims; ``stopping`` is set when it ends.
    """

    queue: Queue
    shelf: Shelf
    add_usage: Add
    gateway: GatewayConfig
    service: Service
    config: RoutesConfig
    holder: str
    stopping: threading.Event

    @property
    def models(self) -> list[str]:
        """The models whose works can be run here."""
        return [model.name for model in self.service.models]

    def order(self, work: WorkRow, folder: WorkFolder) -> Order:
        """What the work's process is told; raises ``ModelNotFoundError``."""
        model = self.service.model(work.model, Caller(work.tenant, work.key))
        kind = kind_of(work)
        return Order(
            id=work.id,
            kind=kind,
            tenant=work.tenant,
            app=self.gateway.app,
            model=model.name,
            format=model.format,
            context=model.context,
            can_infill=model.can_infill,
            engine=self.config.engine_of(self.gateway),
            source=work.source if "://" in work.source else str(folder.source(kind)),
            began=int(self.queue.clock()),
            endpoint=work.details.get("endpoint", ""),
            options=work.details.get("options", {}),
            most_lines=self.config.batch_lines,
            weight=work.details.get("weight", 1.0),
        )
