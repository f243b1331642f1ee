"""How many rows a second a replica does once its batch is full: continuous batching on the roofline's clock.

Every step computes one token of each sequence that decodes and the prompts of those that have just taken a free place
(chunked prefill, Agrawal et al., "Sarathi-Serve", OSDI 2024); how long it takes is ``serving.roofline.step_seconds``.
"""

import math
from dataclasses import dataclass

from serving.config import RooflineConfig
from serving.roofline import step_seconds


@dataclass(frozen=True)
class Load:
    """Rows as an engine sees them: mean tokens, and the share of the prompt tokens that the prefix cache serves.

    ``stop_share`` of the rows end by a stop token: the engine decodes it, but ``output_tokens`` leave it out.
    ``varied`` tells whether the rows' outputs end here and there, as infills do (lengths spread evenly from 1 to twice
    the mean), or all at the same length, as when each runs to ``max_tokens``. ``n`` rows are samples of one prompt:
    they begin together and hold ``shared_share`` of it in the KV cache once. What others share is held by each.
    """

    prompt_tokens: float
    output_tokens: float
    cached_share: float = 0.0
    varied: bool = True
    stop_share: float = 0.0
    n: int = 1
    shared_share: float = 0.0

    @property
    def computed(self) -> float:
        """Prompt tokens of a row that must be computed: one at least, whose logits are needed."""
        return max(1.0, self.prompt_tokens * (1 - self.cached_share))

    @property
    def steps(self) -> float:
        """Steps that a row keeps its place, one a token with its stop token; the prefill gives the first."""
        return max(1.0, self.output_tokens + self.stop_share)

    @property
    def square(self) -> float:
        """Mean of the squared steps: their mean's square, and the variance of whole lengths that are evenly spread."""
        mean = max(1.0, self.output_tokens)
        return self.steps**2 + (mean * (mean - 1) / 3 if self.varied else 0.0)

    @property
    def held(self) -> float:
        """Tokens of KV cache that a place in the batch is given: the longer a row, the more often it is met there."""
        return self.prompt_tokens * (1 - self.shared_share * (1 - self._prompts)) + self.square / self.steps

    @property
    def _prompts(self) -> float:
        """Prompts held for each place: one stays until its last sample ends, after 2n / (n + 1) of the mean steps."""
        return 2 / (self.n + 1) if self.varied else 1 / self.n


def batch_size(roofline: RooflineConfig, load: Load) -> int:
    """Sequences that run at once: as many as are allowed and as the KV cache holds, one at least."""
    return max(1, min(roofline.max_num_seqs, int(roofline.kv_cache_tokens / load.held)))


def steady_rows_per_second(roofline: RooflineConfig, load: Load) -> float:
    """Rows a second of one replica in steady state, its queue never empty.

    With B sequences that keep their places for T steps, B / T rows end in a step, so it computes B / T prompts and
    B - B / T single tokens, up to ``max_num_batched_tokens``. A step without a prompt may be bound by reading the
    weights and one with several by compute, so the seconds of a step are averaged over how many prompts it holds:
    with varied outputs their number is binomial; with equal ones all rows of a batch begin and end together, and
    prompts come in waves that fill whole steps.
    """
    places = batch_size(roofline, load)
    rows = places / load.steps
    if places + rows * (load.computed - 1) >= roofline.max_num_batched_tokens:
        rows = roofline.max_num_batched_tokens / (load.computed + load.steps - 1)
        seconds = _seconds(roofline, roofline.max_num_batched_tokens)
    elif load.varied:
        seconds = _mixed_seconds(roofline, load, places)
    else:
        seconds = _wave_seconds(roofline, load, places)
    return rows / (seconds + rows * _attention_seconds(roofline, load))


def _seconds(roofline: RooflineConfig, tokens: float) -> float:
    return step_seconds(roofline, tokens=tokens, kv_tokens_read=0)


def _attention_seconds(roofline: RooflineConfig, load: Load) -> float:
    """Seconds that a row's attention takes to read the KV cache, in its decoding and in its prefill's chunks."""
    decoding = (load.steps - 1) * load.prompt_tokens + (load.square - load.steps) / 2
    cached = load.prompt_tokens - load.computed
    splits = load.computed / roofline.max_num_batched_tokens
    prefill = cached + splits * (cached + load.computed / 2)
    return (decoding + prefill) * roofline.kv_bytes_per_token / roofline.bytes_per_second / roofline.efficiency


def _mixed_seconds(roofline: RooflineConfig, load: Load, places: int) -> float:
    """Mean seconds of a step when each place falls free with chance 1 / T, whatever the others do."""
    chance = 1 / load.steps
    return sum(
        _binomial(places, prompts, chance) * _seconds(roofline, places + prompts * (load.computed - 1))
        for prompts in range(places + 1)
    )


def _binomial(count: int, hits: int, chance: float) -> float:
    if chance >= 1:
        return float(hits == count)
    ways = math.lgamma(count + 1) - math.lgamma(hits + 1) - math.lgamma(count - hits + 1)
    return math.exp(ways + hits * math.log(chance) + (count - hits) * math.log1p(-chance))


def _wave_seconds(roofline: RooflineConfig, load: Load, places: int) -> float:
    """Mean seconds of a step when a batch's prompts fill as few steps as they can and the other steps only decode."""
    room = roofline.max_num_batched_tokens - places
    prefills = places * (load.computed - 1) / room
    filled = min(math.floor(prefills), load.steps - 1)
    decoding = load.steps - filled - 1
    seconds = filled * _seconds(roofline, places + room)
    seconds += _seconds(roofline, places + (prefills - filled) * room)
    return (seconds + decoding * _seconds(roofline, places)) / load.steps
