"""What of a request runs at once: a large one goes to the engines portion by portion, others' requests in between."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from serving.api.prompts import Rendered
from serving.tenants.caller import Caller
from serving.tenants.tickets import Capacity, Demand


@dataclass(frozen=True, slots=True)
class Portion:
    """Samples of some asks of a request, by the asks' keys."""

    samples: Mapping[int, range]

    def demand(self, rendered: Sequence[Rendered], caller: Caller, patience: float) -> Demand:
        """The room that it takes; the limits are held by the request that it is of."""
        return Demand(
            caller,
            sum(len(rendered[key].token_ids) for key in self.samples),
            sum(len(samples) * rendered[key].sample_tokens for key, samples in self.samples.items()),
            sum(map(len, self.samples.values())),
            patience,
            claims=False,
        )


def portions_of(rendered: Sequence[Rendered], share: Capacity | None) -> list[Portion]:
    """A request in portions that take no more than a share of the engines each, but one sample at least.

    Without a share it is one portion.
    """
    portions: list[Portion] = []
    taken: dict[int, range] = {}
    count = tokens = 0
    for key, each in enumerate(rendered):
        for sample in range(each.samples):
            more = each.sample_tokens + (0 if key in taken else len(each.token_ids))
            if taken and share and (count >= share.samples or tokens + more > share.tokens):
                portions.append(Portion(taken))
                taken, count, tokens, more = {}, 0, 0, each.sample_tokens + len(each.token_ids)
            taken[key] = range(taken[key].start if key in taken else sample, sample + 1)
            count, tokens = count + 1, tokens + more
    return [*portions, Portion(taken)]
