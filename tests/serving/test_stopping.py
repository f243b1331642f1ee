"""The rule that cuts an infill by its text, and the watch that knows early what the rule will say."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.config import EngineConfig
from serving.formats import Format, load_format
from serving.protocol import Completion, Request, Sampling
from serving.simulated import SimulatedEngine
from serving.stopping import Cut, GrowingText, StopWatch, find_behind, find_cut, suffix_beginning
from serving.watching import clip

CODEGEN = load_format("codegen25")
EOM = CODEGEN.tokenizer.special_id("<eom>")
PIECES = [*"ab\n ", "ab", "abab", "aab", "def", "return", "    ", "é", "€", "😀", "\ufffd", "☺"]
POOL = sorted({i for piece in PIECES for i in CODEGEN.tokenizer.encode(piece)} | set(range(128, 256)))
"""Ids of text that repeats itself, among them all bytes that are no ASCII: most of their sequences are no text."""

IDS = st.lists(st.sampled_from(POOL[:40]) | st.sampled_from(POOL), max_size=40)
WORD = st.lists(st.sampled_from(PIECES), min_size=1, max_size=3).map("".join)
WORDS = st.lists(WORD, max_size=3)


@st.composite
def completions(draw: st.DrawFn) -> tuple[list[int], list[str], str | None]:
    """Token ids, stop strings and a suffix's beginning, some of which stand in the text."""
    ids = draw(IDS)
    text = CODEGEN.tokenizer.decode(ids)
    place = st.integers(0, max(0, len(text) - 1))
    inside = st.tuples(place, st.integers(1, 6)).map(lambda at: text[at[0] : at[0] + at[1]] or "a")
    words = draw(st.lists(inside | WORD, max_size=3))
    return ids, words, draw(st.none() | inside | WORD)


def watched(watch: StopWatch, ids: Sequence[int], sizes: Sequence[int]) -> int | None:
    """Show a watch the ids some at a time, as an engine may, to its end."""
    at = 0
    for size in [*sizes, len(ids)]:
        watch.add(ids[at : at + size])
        at += size
    return watch.count


def text_of(ids: Sequence[int]) -> str:
    """What so many tokens have settled."""
    growing = GrowingText(CODEGEN.decode)
    return "".join(growing.add(token_id) for token_id in ids)


def naive_count(fmt: Format, ids: list[int], words: list[str], least: int = 0) -> int | None:
    """The shortest beginning whose text, characters cut off aside, holds a match that none can come before."""
    for count in range(1, len(ids) + 1):
        if ids[count - 1] in fmt.tokenizer.special_ids:
            return count
        text = fmt.tokenizer.decode(ids[:count]).rstrip("\ufffd")
        needless = len(text_of(ids[: min(least, count)]))
        matches = [at for word in words if (at := find_behind(text, word, needless)) >= 0]
        begun = [p for p in range(len(text)) if any(w != text[p:] and w.startswith(text[p:]) for w in words)]
        if matches and not any(p < min(matches) for p in begun):
            return count
    return None


@settings(deadline=None)
@given(completions(), st.lists(st.integers(0, 5), max_size=10), st.integers(0, 20))
def test_a_watch_settles_at_the_first_token_that_can_settle_it(
    drawn: tuple[list[int], list[str], str | None], sizes: list[int], least: int
) -> None:
    ids, stop, until = drawn
    found = watched(CODEGEN.watch(stop, until, least=least), ids, sizes)
    assert found == naive_count(CODEGEN, ids, [*stop, *([until] if until else [])], least)


@settings(deadline=None)
@given(completions(), st.lists(st.integers(0, 5), max_size=10), st.integers(0, 40), st.booleans())
def test_what_a_watch_leaves_is_cut_as_the_whole_would_be(
    drawn: tuple[list[int], list[str], str | None], sizes: list[int], at: int, control: bool
) -> None:
    ids, stop, until = drawn
    if control:
        ids[at:at] = [EOM]
    whole = Completion(ids, "length", None, [-1.0] * len(ids))
    watch = CODEGEN.watch(stop, until)
    count = watched(watch, ids, sizes)
    kept = clip(whole, watch)
    infills = [
        CODEGEN.infill(c.token_ids, stop_token_id=c.stop_token_id, stop=stop, until=until) for c in (whole, kept)
    ]
    assert infills[0] == infills[1]
    assert kept.logprobs == [-1.0] * (len(ids) if count is None else count)
    again = CODEGEN.watch(stop, until)
    again.add(kept.token_ids)
    assert clip(kept, again) == kept


def test_a_watch_may_look_through_control_tokens() -> None:
    ids = [*CODEGEN.tokenizer.encode("ab"), EOM, *CODEGEN.tokenizer.encode("c"), *CODEGEN.tokenizer.encode("d")]
    ended, through = CODEGEN.watch(["d"]), CODEGEN.watch(["d"], through=True)
    assert ended.add([*ids, 1]) == ids.index(EOM) + 1
    assert through.add([*ids, 1]) == len(ids)
    assert (ended.ended_by_control, through.ended_by_control) == (True, False)


@settings(deadline=None)
@given(IDS)
def test_growing_text_is_the_text(ids: list[int]) -> None:
    text = CODEGEN.tokenizer.decode(ids)
    growing = GrowingText(CODEGEN.tokenizer.decode)
    assert "".join(map(growing.add, ids)) == text.rstrip("\ufffd")


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Format:
    """Code Llama's format with a small tokenizer that puts a blank before each text and falls back to bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abx\n", "▁a", "▁▁"]
    vocab = {word: i for i, word in enumerate(words)}
    built = Tokenizer(models.BPE(vocab, [("▁", "a"), ("▁", "▁")], byte_fallback=True, unk_token="<unk>"))
    built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    built.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = ["<s>", "</s>", "▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"]
    built.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    folder: Path = tmp_path_factory.mktemp("codellama")
    built.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 32_016}))
    (folder / "model.safetensors").touch()
    return load_format("codellama", tokenizer_of=str(folder))


@settings(deadline=None)
@given(st.text("ab x\né😀", max_size=60), st.lists(st.text("ab x\né😀", min_size=1, max_size=4), max_size=3))
def test_a_sentencepiece_text_is_watched_like_any_other(sentencepiece: Format, text: str, stop: list[str]) -> None:
    ids = sentencepiece.tokenizer.encode(f"☺{text}")[len(sentencepiece.tokenizer.encode("☺")) :]
    watch = sentencepiece.watch(stop)
    kept = clip(Completion(ids, "length"), watch) if watch.add(ids) is not None else Completion(ids, "length")
    assert sentencepiece.infill(ids, stop=stop) == sentencepiece.infill(kept.token_ids, stop=stop)
    assert sentencepiece.infill(ids).text == text


@pytest.mark.parametrize(
    ("text", "stop", "until", "cut"),
    [
        ("abcdef", ["cd"], None, Cut(2, "stop")),
        ("abcdef", ["cd", "abcdef"], None, Cut(0, "stop")),
        ("abcdef", ["ef"], "cd", Cut(2, "overlap")),
        ("abcdef", ["cd"], "cd", Cut(2, "stop")),
        ("abcdef", ["cde"], "cd", Cut(2, "overlap")),
        ("abcdef", ["x"], None, None),
        ("abcdef", [], None, None),
    ],
)
def test_the_earliest_match_cuts(text: str, stop: list[str], until: str | None, cut: Cut | None) -> None:
    assert find_cut(text, stop, until) == cut


@pytest.mark.parametrize(
    ("suffix", "beginning"),
    [
        (None, None),
        ("", None),
        ("\n\n", None),
        (")\n", None),
        ("\n    return total\n    more\n", "\n    return total\n"),
        (")\n    return total\n", ")\n    return total\n"),
        ("\n    else:\n        x = 1\n", "\n    else:\n        x = 1\n"),
        ("\n  end\n}", "\n  end\n}"),
        ("\n" * 300 + "return total", None),
        ("x" * 300, "x" * 200),
    ],
)
def test_the_suffix_says_enough_or_nothing(suffix: str | None, beginning: str | None) -> None:
    assert suffix_beginning(suffix) == beginning


@pytest.mark.parametrize("kind", ["instant", "simulated"])
def test_simulated_engines_stop_early_too(kind: str) -> None:
    config = EngineConfig.parse({"kind": kind, "model": "m", "max_model_len": 512, "roofline": {"time_scale": 1e6}})
    free = Sampling(64, ignore_eos=True)

    async def main() -> None:
        engine = SimulatedEngine(config)
        whole = (await engine.generate(Request(0, [1, 2, 3]), free)).completions[0]
        word = CODEGEN.tokenizer.decode(whole.token_ids[8:11])[1:-1]
        before = engine.stats().output_tokens
        asked = Sampling(64, ignore_eos=True, stop=(word,), format="codegen25")
        cut = (await engine.generate(Request(0, [1, 2, 3]), asked)).completions[0]
        until = (await engine.generate(Request(0, [1, 2, 3], until=word), Sampling(64, format="codegen25"))).completions
        assert (cut.finish_reason, cut.stop_token_id) == ("stop", None)
        assert len(cut.token_ids) <= 11 < len(whole.token_ids)
        assert engine.stats().output_tokens - before == 2 * len(cut.token_ids)
        assert until[0].token_ids == cut.token_ids == whole.token_ids[: len(cut.token_ids)]
        assert CODEGEN.infill(cut.token_ids, stop=[word]) == CODEGEN.infill(whole.token_ids, stop=[word])
        await engine.shutdown()

    asyncio.run(main())
