"""Batch rows make way for people in one engine: how many may go on, and how many may begin, in the next step. Pure.

Rows that stand still keep their place and their KV cache, and go on where they were when nobody is served any more.
Only where people who wait would find no place or no KV cache do rows leave; they begin again from what is still cached.
"""

from dataclasses import dataclass

BESIDE = "spanfill_rows_beside"
"""The key of vLLM's ``additional_config`` that says how many batch rows go on while people are served."""

SEATS = 8
"""One of so many places in an engine's batch is kept free of batch rows, where there are two; none begins while less
than one of so many blocks of its KV cache is free."""

STEP_TOKENS = 256
"""Prompt tokens of batch rows that a step computes while nobody is served: whoever comes waits until it has ended.

Computing them takes a GPU about as long as reading the weights, which a step does anyway; with fewer it would idle.
"""


@dataclass(frozen=True, slots=True)
class Turn:
    """Of the batch rows that run, the first ``going`` go on; ``beginning`` of those that wait may begin."""

    going: int
    beginning: int


def turn(*, people: int, rows: int, beside: int, places: int, is_full: bool = False) -> Turn:
    """What batch rows may do while ``people`` requests run or wait and ``rows`` batch rows run.

    ``beside`` rows run at most while people are served. ``places`` is what the engine's batch holds; ``is_full`` says
    that its KV cache has no more room for batch rows.
    """
    most = beside if people else max(1, places - max(1, places // SEATS))
    return Turn(min(rows, beside) if people else rows, 0 if is_full else max(0, most - rows))
