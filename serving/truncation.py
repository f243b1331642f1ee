"""Which tokens of prefix and suffix a prompt keeps. Pure: the answer depends on lengths and options alone."""

from dataclasses import dataclass

from serving.errors import ConfigError

DEFAULT_SUFFIX_SHARE = 0.25
DEFAULT_PREFIX_ALIGN = 256


@dataclass(frozen=True, slots=True)
class Window:
    """The kept tokens: the prefix from ``prefix_start`` on, the suffix up to ``suffix_stop``."""

    prefix_start: int
    suffix_stop: int


def window(
    prefix_tokens: int,
    suffix_tokens: int,
    room: int,
    *,
    suffix_share: float | None = None,
    align: int = DEFAULT_PREFIX_ALIGN,
) -> Window:
    """Keep the prefix's end and the suffix's beginning, together at most ``room`` tokens.

    The suffix may use ``suffix_share`` of the room and what the prefix leaves over, and the prefix the rest and what
    the suffix leaves over. A cut prefix starts at a multiple of ``align`` tokens from its text's start, rounded up, so
    that rows cut from one file share their windows' starts. Where ``align`` exceeds three quarters of the prefix's
    room, the largest power of two that does not is taken, so at least a quarter of that room is used.
    """
    share = DEFAULT_SUFFIX_SHARE if suffix_share is None else suffix_share
    suffix_room = max(int(room * share), room - prefix_tokens)
    kept_suffix = min(suffix_tokens, suffix_room)
    prefix_room = room - kept_suffix
    cut = prefix_tokens - prefix_room
    if cut <= 0:
        return Window(0, kept_suffix)
    step = _step(align, prefix_room)
    return Window(min(prefix_tokens, -(-cut // step) * step), kept_suffix)


def _step(align: int, room: int) -> int:
    most = max(1, room * 3 // 4)
    return align if align <= most else 1 << (most.bit_length() - 1)


def room_for_text(max_context: int, max_tokens: int, control_tokens: int) -> int:
    """Tokens left for prefix and suffix; raises ``ConfigError`` when ``max_tokens`` leaves none."""
    room = max_context - max_tokens - control_tokens
    if room < 1:
        most = max_context - control_tokens - 1
        raise ConfigError(
            f"max_tokens = {max_tokens} leaves no room for a prompt in a context of {max_context} tokens.",
            remedy=f"Use --max-tokens {most} at most." if most > 0 else "Use a longer context.",
        )
    return room
