"""What ``ignore_eos`` is to vLLM, for stop tokens too: every row runs to its longest, whoever asks for it.

Random weights would end a row by chance. A job has no option for it, so both contestants' engines are given this
logits processor; vLLM's two model runners, of which a CPU has the first, each call it in a way of their own.
"""

from typing import Any

from vllm.v1.sample.logits_processor import LogitsProcessor as FirstRunners
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SecondRunners

from serving.formats import load_format
from tests.benchmarks.peers.inputs import FORMAT


class Endless(FirstRunners, SecondRunners):  # type: ignore[misc]
    """No stop token of the format is ever the likeliest."""

    def __init__(self, *_: Any) -> None:
        self._stops = list(load_format(FORMAT).stop_token_ids)
        self._columns: Any = None

    def apply(self, logits: Any, *_: Any) -> Any:
        """Called with the logits of all rows, a row each."""
        import torch

        if self._columns is None:
            self._columns = torch.tensor(self._stops, device=logits.device)
        return logits.index_fill_(-1, self._columns, float("-inf"))

    def is_argmax_invariant(self) -> bool:
        """False: without it another token may be the likeliest."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Nothing to remember of a row."""
