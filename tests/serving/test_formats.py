"""Each format renders the prompt that its model's own documentation shows."""

import array
import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from serving.errors import FormatError, InputError, SpanfillError
from serving.formats import FORMATS, Format, load_format


class Letters:
    """A tokenizer of one id a character, with whatever control tokens it is given."""

    def __init__(self, control: Sequence[str], *, bos: str | None = None, eos: str | None = None) -> None:
        self._special = {token: 1 << 21 | i for i, token in enumerate(control)}
        self._names = {i: token for token, i in self._special.items()}
        self.special_ids = frozenset(self._names)
        self.bos_id = self._special.get(bos or "")
        self.eos_id = self._special.get(eos or "")
        self.vocab_size = 1 << 22

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_arrays(self, texts: Sequence[str]) -> list["array.array[int] | InputError"]:
        return [array.array("i", self.encode(text)) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i) for i in ids if i not in self.special_ids)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return self.decode(ids).encode()

    def special_id(self, token: str) -> int:
        if token not in self._special:
            raise FormatError(f"no control token {token}.")
        return self._special[token]

    def token(self, token_id: int) -> str:
        return self._names.get(token_id) or chr(token_id)

    def vocab(self) -> dict[str, int]:
        return dict(self._special)


def render(fmt: Format, prefix: str, suffix: str | None) -> str:
    """The prompt as text, SentencePiece's marker aside."""
    return "".join(map(fmt.tokenizer.token, fmt.prompt(prefix, suffix, max_tokens=8).token_ids))


def letters_for(name: str) -> Letters:
    spec = FORMATS[name]
    control = [*dict.fromkeys([*spec.control_tokens, *([spec.end] if spec.end else []), *spec.stops, "<s>", "</s>"])]
    return Letters(control, bos="<s>", eos="</s>")


QUICK_SORT = (
    "def quick_sort(arr):\n    if len(arr) <= 1:\n        return arr\n    pivot = arr[0]\n    left = []\n",
    "\n        if arr[i] < pivot:\n            left.append(arr[i])",
)
DOCUMENTED = [
    # hf.co/Salesforce/codegen25-7b-multi_P, README, "Infill sampling"
    (
        "codegen25",
        ("def hello_world():\n    ", "    return name"),
        "def hello_world():\n    <mask_1>    return name<|endoftext|><sep><mask_1>",
    ),
    # hf.co/Salesforce/codegen2-7B_P, README, "Infill sampling"
    (
        "codegen2",
        ("def hello_world():\n    ", "    return name"),
        "def hello_world():\n    <mask_1>    return name<|endoftext|><sep><mask_1>",
    ),
    # hf.co/bigcode/starcoder, README, "Fill-in-the-middle", and its discussion 31
    (
        "starcoder",
        ("def fib(n):", "    else:\n        return fib(n - 2) + fib(n - 1)"),
        "<fim_prefix>def fib(n):<fim_suffix>    else:\n        return fib(n - 2) + fib(n - 1)<fim_middle>",
    ),
    # hf.co/bigcode/starcoder2-15b, discussion 6: as StarCoder
    (
        "starcoder2",
        ("def fib(n):", "    else:\n        return fib(n - 2) + fib(n - 1)"),
        "<fim_prefix>def fib(n):<fim_suffix>    else:\n        return fib(n - 2) + fib(n - 1)<fim_middle>",
    ),
    # github.com/QwenLM/Qwen2.5-Coder, README, "Fill in the middle with Qwen2.5-Coder"
    (
        "qwen2.5-coder",
        ("def quicksort(arr):\n    if len(arr) <= 1:\n        return arr\n    ", "\n    return x"),
        "<|fim_prefix|>def quicksort(arr):\n    if len(arr) <= 1:\n        return arr\n    <|fim_suffix|>\n"
        "    return x<|fim_middle|>",
    ),
    # ai.google.dev/gemma/docs/codegemma/prompt-structure, "Fill in task example"; BOS by the tokenizer
    (
        "codegemma",
        ("import ", "\nif __name == '__main__':\n   sys.exit(0)"),
        "<s><|fim_prefix|>import <|fim_suffix|>\nif __name == '__main__':\n   sys.exit(0)<|fim_middle|>",
    ),
    # github.com/deepseek-ai/DeepSeek-Coder, README, "Code Insertion"; BOS by the tokenizer
    (
        "deepseek-coder",
        QUICK_SORT,
        f"<s><｜fim▁begin｜>{QUICK_SORT[0]}<｜fim▁hole｜>{QUICK_SORT[1]}<｜fim▁end｜>",
    ),
    # github.com/meta-llama/codellama, llama/generation.py, infilling_prompt_tokens
    ("codellama", ("def f(x):\n", "    return y"), "<s><PRE>def f(x):\n<SUF>    return y<MID>"),
    ("codellama-spm", ("def f(x):\n", "    return y"), "<s><PRE><SUF>    return y<MID>def f(x):\n"),
    # github.com/mistralai/mistral-common, InstructTokenizerV2.encode_fim
    ("codestral", ("def f(x):\n", "    return y"), "<s>[SUFFIX]    return y[PREFIX]def f(x):\n"),
    # github.com/ByteDance-Seed/Seed-Coder, README, "Fill-in-the-Middle"
    (
        "seed-coder",
        ("def add(a, b):\n", "\n    return c"),
        "<[fim-suffix]>\n    return c<[fim-prefix]>def add(a, b):\n<[fim-middle]>",
    ),
]


@pytest.mark.parametrize(("name", "pair", "prompt"), DOCUMENTED)
def test_the_documented_prompt(name: str, pair: tuple[str, str], prompt: str) -> None:
    assert render(Format(FORMATS[name], letters_for(name)), *pair) == prompt


def test_every_format_is_checked_against_its_documentation() -> None:
    assert {name for name, _, _ in DOCUMENTED} | {"causal"} == set(FORMATS)


@pytest.mark.parametrize("name", [n for n in FORMATS if n != "causal"])
def test_a_model_without_a_control_token_is_refused_by_name(name: str) -> None:
    for token in FORMATS[name].control_tokens:
        whole = letters_for(name)
        whole._special.pop(token)
        with pytest.raises(FormatError, match=r"control token") as caught:
            Format(FORMATS[name], whole)
        assert token in str(caught.value)


def test_the_cards_two_snippets_give_the_cards_ids() -> None:
    """The model card's causal and infill prompts, with the ids of the publisher's tokenizer."""
    fmt = load_format("codegen25")
    causal = fmt.prompt("def hello_world():", max_tokens=8)
    assert causal.token_ids == fmt.tokenizer.encode("def hello_world():") == [4299, 23748, 62, 6894, 33529]
    infill = fmt.prompt("def hello_world():\n    ", "    return name", max_tokens=8)
    assert infill.token_ids == (
        [4299, 23748, 62, 6894, 33529, 198, 50284, 51199, 50285, 1441, 1438, 50256, 50317, 51199]
    )
    assert fmt.stop_token_ids == (50_318, 50_256, 51_198, 51_199, 50_317)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_what_a_prompt_is_made_of_ends_an_infill(name: str) -> None:
    """A model that begins another prompt by itself need not go on with it."""
    fmt = Format(FORMATS[name], letters_for(name))
    ids = {fmt.tokenizer.special_id(token) for token in FORMATS[name].control_tokens}
    assert ids <= set(fmt.stop_token_ids)
    assert len(set(fmt.stop_token_ids)) == len(fmt.stop_token_ids)


def test_no_suffix_and_an_empty_suffix_are_not_the_same() -> None:
    fmt = load_format("codegen25")
    assert render(fmt, "a", None) == "a"
    assert render(fmt, "a", "") == "a<mask_1><|endoftext|><sep><mask_1>"


def test_control_tokens_in_user_text_stay_text() -> None:
    fmt = load_format("codegen25")
    ids = fmt.prompt("<mask_1><sep>", "<eom>", max_tokens=8).token_ids
    assert [fmt.tokenizer.token(i) for i in ids if i in fmt.tokenizer.special_ids] == (
        ["<mask_1>", "<|endoftext|>", "<sep>", "<mask_1>"]
    )


def test_a_bad_row_spares_its_neighbours() -> None:
    good, bad, also = load_format("codegen25").prompt_batch([("a", "b"), ("\ud800", "b"), ("c", None)], max_tokens=8)
    assert isinstance(bad, SpanfillError)
    assert not isinstance(good, SpanfillError)
    assert not isinstance(also, SpanfillError)


def test_an_infill_ends_at_the_first_control_token_or_stop_string() -> None:
    fmt = load_format("codegen25")
    body = fmt.tokenizer.encode("return name\nx")
    eom, mask = fmt.tokenizer.special_id("<eom>"), fmt.tokenizer.special_id("<mask_2>")
    assert fmt.infill(body, stop_token_id=eom).finish_reason == "eom"
    assert fmt.infill(body).finish_reason == "length"
    assert fmt.infill(body, stop_token_id=fmt.tokenizer.special_id("<sep>")).finish_reason == "eos"
    leaked = fmt.infill([*body, mask, *body])
    assert (leaked.text, leaked.finish_reason) == ("return name\nx", "eos")
    stopped = fmt.infill(body, stop_token_id=eom, stop=("x", "\n"))
    assert (stopped.text, stopped.finish_reason) == ("return name", "stop")


def test_a_character_cut_in_half_at_the_end_is_shown_as_such() -> None:
    fmt = load_format("codegen25")
    assert fmt.infill(fmt.tokenizer.encode("a漢")[:-1]).text == "a\ufffd"


def test_a_format_that_needs_a_tokenizer_says_so() -> None:
    with pytest.raises(FormatError, match="needs its model's tokenizer"):
        load_format("starcoder2")


def test_a_causal_prompt_of_an_empty_prefix_is_the_token_that_begins_a_document() -> None:
    fmt = load_format("codegen25")
    assert fmt.prompt("", max_tokens=8).token_ids == [fmt.tokenizer.special_id("<|endoftext|>")]
    assert fmt.prompt("", "", max_tokens=8).token_ids[0] == fmt.tokenizer.special_id("<mask_1>")


def test_a_causal_format_refuses_a_suffix() -> None:
    fmt = Format(FORMATS["causal"], letters_for("causal"))
    assert render(fmt, "a", None) == "a"
    with pytest.raises(FormatError, match="suffix"):
        fmt.prompt("a", "b", max_tokens=8)


def save(folder: Path, tokenizer: Any, config: dict[str, Any], **tokens: str) -> None:
    """A model's folder with this tokenizer and nothing else of a model."""
    tokenizer.save(str(folder / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").touch()


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece-like tokenizer as Code Llama's: a blank is put before each text, bytes are a fallback."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdefxyz ():\n", "▁a", "▁▁", "▁x"]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    built = Tokenizer(models.BPE(vocab, [("▁", "a"), ("▁", "▁"), ("▁", "x")], byte_fallback=True, unk_token="<unk>"))
    built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    built.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = ["<s>", "</s>", "▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"]
    built.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    folder = tmp_path_factory.mktemp("codellama")
    save(folder, built, {"model_type": "llama", "vocab_size": 32_016}, bos_token="<s>", eos_token="</s>")
    return folder


def test_code_llama_gets_no_blank_before_suffix_or_infill(llama_folder: Path) -> None:
    fmt = load_format("codellama", tokenizer_of=str(llama_folder))
    ids = fmt.prompt("a b", "x y", max_tokens=8).token_ids
    assert [fmt.tokenizer.token(i) for i in ids] == (
        ["<s>", "▁<PRE>", "▁a", "▁", "b", "▁<SUF>", "x", "▁", "y", "▁<MID>"]
    )
    marked = fmt.tokenizer.encode("☺ a x")[len(fmt.tokenizer.encode("☺")) :]
    assert fmt.infill(marked).text == " a x"


def test_a_prefix_behind_the_suffix_is_cut_where_the_room_ends() -> None:
    """Rows do not share such a prefix's beginning, so its text is not given up for that."""
    aligned = {name for name, spec in FORMATS.items() if spec.prefix_align > 1}
    assert set(FORMATS) - aligned == {"codellama-spm", "codestral", "seed-coder"}


def test_code_llama_is_cut_as_its_layout_says(llama_folder: Path) -> None:
    first, last = (load_format(name, tokenizer_of=str(llama_folder)) for name in ("codellama-spm", "codellama"))
    cut = {"max_tokens": 4, "max_context": 400}
    sliding = first.prompt("a " * 900, "x", prefix_align=1, **cut).token_ids
    assert first.prompt("a " * 900, "x", **cut).token_ids == sliding
    assert len(last.prompt("a " * 900, "x", **cut).token_ids) < len(sliding)


def test_code_llama_counts_characters_when_cut(llama_folder: Path) -> None:
    fmt = load_format("codellama", tokenizer_of=str(llama_folder))
    prompt = fmt.prompt("a " * 40, "x " * 40, max_tokens=4, max_context=40, prefix_align=1)
    assert prompt.truncated
    assert len(prompt.token_ids) <= 36
    assert 0 < prompt.suffix_chars < 80
    assert 0 < prompt.prefix_chars < 80


@pytest.mark.parametrize("name", ["codegen25", "starcoder", "codellama", "codestral"])
def test_a_given_completion_has_the_ids_of_its_text(name: str) -> None:
    fmt = Format(FORMATS[name], letters_for(name))
    found = fmt.completions(["  return x", ""])
    assert [list(ids) for ids in found if not isinstance(ids, SpanfillError)] == [
        fmt.tokenizer.encode("  return x"),
        [],
    ]
    assert fmt.infill(fmt.tokenizer.encode("  return x")).text == "  return x"
    assert fmt.finish_reason(fmt.end_token_id) == "eom"


@pytest.fixture(scope="module")
def composing(tmp_path_factory: pytest.TempPathFactory) -> Format:
    """Qwen2.5-Coder's format over bytes, with its tokenizer's normaliser: a letter and its accent are one character."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    built.normalizer = normalizers.NFC()
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.decoder = decoders.ByteLevel()
    spec = FORMATS["qwen2.5-coder"]
    built.add_special_tokens([AddedToken(token, special=True) for token in (*spec.control_tokens, *spec.stops)])
    folder = tmp_path_factory.mktemp("qwen")
    save(folder, built, {"model_type": "qwen2", "vocab_size": 512}, eos_token="<|endoftext|>")
    return load_format("qwen2.5-coder", tokenizer_of=str(folder))


ACCENT = "e\u0301"


@pytest.mark.parametrize("accent", [ACCENT, "e\u0302\u0301", "a\u0323\u0306"])
@pytest.mark.parametrize("room", range(40, 48))
def test_what_a_tokenizer_composes_is_cut_between_characters_all_the_same(
    composing: Format, room: int, accent: str
) -> None:
    """What the prompt holds never equals the text where one accent stands in it, wherever the text is cut."""
    prefix, suffix = f"{accent} 漢é🙂" * 40, f"{accent} 漢é🙂" * 40
    prompt = composing.prompt(prefix, suffix, max_tokens=4, max_context=room, prefix_align=1)
    assert prompt.truncated
    assert room - 4 - 2 * 3 <= len(prompt.token_ids) <= room - 4
    text = composing.decode(prompt.token_ids)
    assert "\ufffd" not in text
    kept = prefix[len(prefix) - prompt.prefix_chars :], suffix[: prompt.suffix_chars]
    assert "".join(sorted(text)) == "".join(sorted(unicodedata.normalize("NFC", "".join(kept))))


def test_a_cut_in_a_long_composed_text_looks_at_a_few_places(
    composing: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    plain = Format.decode

    def counted(self: Format, ids: Sequence[int]) -> str:
        decoded.append(len(ids))
        return plain(self, ids)

    monkeypatch.setattr(Format, "decode", counted)
    long = f"{ACCENT} " * 20_000
    prompt = composing.prompt(long, long, max_tokens=4, max_context=1_000, prefix_align=1)
    assert 900 < len(prompt.token_ids) <= 996
    assert len(decoded) <= 10
