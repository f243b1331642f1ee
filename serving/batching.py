"""Continuous batching without an engine, as vLLM does it: whose tokens are in the next step, and how long it takes."""

import asyncio
import heapq
import itertools
from collections import OrderedDict
from collections.abc import Iterator
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

from serving.config import RooflineConfig
from serving.protocol import BATCH_PRIORITY
from serving.roofline import step_seconds
from serving.yielding import SEATS, STEP_TOKENS, Turn, turn


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample under way: ``computed`` counts tokens in the KV cache, ``left`` output tokens to make.

    ``again`` of the ``made`` ones must be computed again, since it lost its place to people.
    """

    token_ids: Ids[int]
    left: int
    cache_salt: str | None
    done: "asyncio.Future[None]"
    cached: int = 0
    computed: int = 0
    made: int = 0
    again: int = 0
    cancelled: bool = False
    is_of_batch: bool = True
    rank: tuple[int, int] = (BATCH_PRIORITY, 0)
    told: "asyncio.Queue[int] | None" = None
    blocks: list[int] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Tokens of KV cache that it will hold at its end."""
        return len(self.token_ids) + self.made + self.left

    @property
    def known(self) -> int:
        """Tokens that are computed before the next one is made."""
        return len(self.token_ids) + self.again


class Scheduler:
    """``step`` plans one step and says how long it takes; ``beside`` is ``ReplicaConfig.rows_beside``."""

    def __init__(self, roofline: RooflineConfig, *, beside: int | None = None) -> None:
        self._roofline = roofline
        self._beside = beside
        self._order = itertools.count()
        self._cache: OrderedDict[int, None] = OrderedDict()
        self.waiting: list[tuple[tuple[int, int], Sequence]] = []
        self.running: list[Sequence] = []
        self.used_tokens = self.queries = self.hits = 0

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence, priority: int) -> None:
        """Queue one sequence; lower priorities run first."""
        sequence.is_of_batch = priority >= BATCH_PRIORITY
        sequence.rank = (priority, next(self._order))
        heapq.heappush(self.waiting, (sequence.rank, sequence))

    def step(self) -> float:
        """Admit what fits, advance every running sequence, and return the step's seconds."""
        self._drop_cancelled()
        now, budget = self._turn()
        rows = [sequence for sequence in self.running if sequence.is_of_batch]
        going = [s for s in self.running if not s.is_of_batch] + rows[: now.going]
        kv_read = tokens = 0
        for sequence in going:
            if sequence.computed == sequence.known and budget:
                budget, tokens = budget - 1, tokens + 1
                kv_read += sequence.computed + sequence.made - sequence.again
                sequence.made, sequence.left = sequence.made + 1, sequence.left - 1
        for sequence in itertools.chain(going, self._admitted(now.beginning)):
            if not budget:
                break
            chunk = min(sequence.known - sequence.computed, budget)
            if chunk:
                budget, tokens = budget - chunk, tokens + chunk
                kv_read += sequence.computed
                self._compute(sequence, chunk)
        return step_seconds(self._roofline, tokens=tokens, kv_tokens_read=kv_read)

    def _turn(self) -> tuple[Turn, int]:
        """What batch rows may do in this step, and how many tokens it has; without people ever, whatever they like."""
        roofline, budget = self._roofline, self._roofline.max_num_batched_tokens
        if self._beside is None:
            return Turn(len(self.running), len(self.waiting)), budget
        waiting = [sequence for _, sequence in self.waiting if not sequence.is_of_batch and not sequence.cancelled]
        self._make_way(waiting)
        rows = sum(sequence.is_of_batch for sequence in self.running)
        people = len(self.running) - rows + len(waiting)
        is_full = self.used_tokens > roofline.kv_cache_tokens * (1 - 1 / SEATS)
        now = turn(people=people, rows=rows, beside=self._beside, places=roofline.max_num_seqs, is_full=is_full)
        return now, budget if people else min(budget, rows + STEP_TOKENS)

    def _make_way(self, people: Ids[Sequence]) -> None:
        """Let batch rows leave, the latest first, until all people who wait find places and room."""
        needed = sum(sequence.size for sequence in people)
        rows = [sequence for sequence in self.running if sequence.is_of_batch]
        while people and rows:
            has_places = len(self.running) + len(people) <= self._roofline.max_num_seqs
            if has_places and self.used_tokens + needed <= self._roofline.kv_cache_tokens:
                return
            self._send_back(rows.pop())

    def _send_back(self, sequence: Sequence) -> None:
        """Let a sequence wait again, in its old rank; the cache keeps what it has computed for as long as it can."""
        self._release(sequence)
        sequence.again, sequence.computed = sequence.made, 0
        heapq.heappush(self.waiting, (sequence.rank, sequence))

    def _compute(self, sequence: Sequence, chunk: int) -> None:
        """Compute known tokens; whole blocks are in the cache for whoever is admitted next, in this very step too."""
        sequence.computed += chunk
        self._remember(sequence.blocks[: sequence.computed // self._roofline.block_size])
        if sequence.computed == sequence.known:
            sequence.made, sequence.left = sequence.made + 1, sequence.left - 1

    def finish_step(self) -> None:
        """Answer the sequences that the step completed, and tell those that want to know how far they are."""
        for sequence in self.running:
            if sequence.told is not None and sequence.made and sequence.left > 0:
                sequence.told.put_nowait(sequence.made)
        for sequence in [s for s in self.running if s.left <= 0]:
            self._release(sequence)
            if not sequence.done.done():
                sequence.done.set_result(None)

    def _drop_cancelled(self) -> None:
        for sequence in [s for s in self.running if s.cancelled]:
            self._release(sequence)
        while self.waiting and self.waiting[0][1].cancelled:
            heapq.heappop(self.waiting)

    def _release(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.used_tokens -= sequence.size

    def _admitted(self, rows: int) -> Iterator[Sequence]:
        """Waiting sequences as far as there is room, ``rows`` of batches, each admitted when it is asked for."""
        roofline = self._roofline
        while self.waiting and len(self.running) < roofline.max_num_seqs:
            sequence = self.waiting[0][1]
            if sequence.is_of_batch and not rows:
                return
            if self.running and self.used_tokens + sequence.size > roofline.kv_cache_tokens:
                return
            heapq.heappop(self.waiting)
            if sequence.cancelled:
                continue
            rows -= sequence.is_of_batch
            sequence.cached = sequence.computed = self._lookup(sequence)
            self.used_tokens += sequence.size
            self.running.append(sequence)
            yield sequence

    def _lookup(self, sequence: Sequence) -> int:
        size = self._roofline.block_size
        parent = hash(sequence.cache_salt)
        sequence.blocks.clear()
        for start in range(0, len(sequence.token_ids) - size + 1, size):
            parent = hash((parent, tuple(sequence.token_ids[start : start + size])))
            sequence.blocks.append(parent)
        known = len(list(itertools.takewhile(self._cache.__contains__, sequence.blocks)))
        # As in vLLM, the last token is always computed: its logits are needed.
        cached = min(known * size, (len(sequence.token_ids) - 1) // size * size)
        self.queries += len(sequence.token_ids)
        self.hits += cached
        return cached

    def _remember(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self._cache[block] = None
            self._cache.move_to_end(block)
        while len(self._cache) * self._roofline.block_size > self._roofline.kv_cache_tokens:
            self._cache.popitem(last=False)
