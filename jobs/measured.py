"""What a run's manifest says of how well its engines were kept busy, where the CPU time went, and how it started."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jobs.process import since_birth
from jobs.tally import Tally
from serving.protocol import EngineInfo, EngineStats

NOTHING = EngineStats()


@dataclass
class StartUp:
    """Seconds from one step of the start to the next, beginning now; a step counts once."""

    seconds: dict[str, float] = field(default_factory=dict)
    _since: float = field(default_factory=time.monotonic)

    @classmethod
    def of_command(cls) -> "StartUp":
        """The start of a process that runs one job: what it has done since its birth is imports."""
        return cls({"imports": round(since_birth(), 3)})

    def reached(self, step: str) -> None:
        """The step is done."""
        now = time.monotonic()
        if step not in self.seconds:
            self.seconds[step] = round(now - self._since, 3)
            self._since = now


def occupancy(
    info: EngineInfo,
    before: Mapping[str, EngineStats],
    after: Mapping[str, EngineStats],
    seconds: float,
    tally: Tally,
) -> dict[str, Any]:
    """Between two readings ``seconds`` apart: how long the engines that gave both, or began since, had work.

    Where engines came later, ``seconds`` is the mean time of one.

    ``busy_share``: the share of the time in which a row ran; ``mean_running``: rows at once, while one did;
    ``occupancy``: mean rows at once, of the most that fit by ``max_num_seqs`` and by the KV cache without sharing.
    """
    spans = [(before.get(name, NOTHING), stats) for name, stats in after.items()]
    if not spans or not seconds or info.kind == "instant":
        return {}
    busy = sum(b.busy_seconds - a.busy_seconds for a, b in spans)
    rows = sum(b.row_seconds - a.row_seconds for a, b in spans)
    row_tokens = (tally.prompt_tokens + tally.completion_tokens) / max(1, tally.samples)
    most = min(info.max_num_seqs, info.kv_cache_tokens / row_tokens if row_tokens else info.max_num_seqs)
    return {
        "busy_share": round(busy / seconds / len(spans), 4),
        "mean_running": round(rows / busy, 2) if busy else 0.0,
        "occupancy": round(rows / seconds / len(spans) / max(1.0, most), 4),
    }


def cpu_seconds(
    feeders: float, before: Mapping[str, EngineStats], after: Mapping[str, EngineStats], tally: Tally
) -> dict[str, float]:
    """CPU seconds by work: what the feeders used beside reading, tokenising, ordering and writing is dispatch."""
    told = dict(tally.cpu_seconds)
    told["dispatch"] = max(0.0, feeders - sum(told.values()))
    told["replica"] = sum(stats.cpu_seconds - before.get(name, NOTHING).cpu_seconds for name, stats in after.items())
    return {work: round(seconds, 3) for work, seconds in told.items()}
