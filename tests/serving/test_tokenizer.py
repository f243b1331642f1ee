import json
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import tokenizer as module
from serving.errors import FormatError, InputError, ModelError
from serving.lines import MOST_AT_ONCE
from serving.tokenizer import Tokenizer, codegen25, load_tokenizer

VECTORS = {
    "int add(int a, int b) { return a + b; }\nπ": (
        [600, 751, 7, 600, 257, 11, 493, 275, 8, 1391, 1441, 257, 1343, 275, 26, 1782, 198, 46582]
    ),
    "    return": [50285, 1441],
    "\t\t\tx": [50294, 197, 87],
}
SPELLINGS = ["<mask_1>", "<mask_881>", "<sep>", "<eom>", "<|endoftext|>", "<fim_prefix>", "<dummy_3>", "<filename>"]
BLANKS = [" " * n for n in (1, 2, 5, 31, 40)] + ["\t" * n for n in (1, 2, 9, 12)] + ["\n", "\r\n", "\u00a0", "\x1c"]
PIECE = st.sampled_from(SPELLINGS + BLANKS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
TEXT = st.lists(PIECE, max_size=20).map("".join)


@pytest.mark.parametrize(("text", "ids"), VECTORS.items())
def test_ids_are_the_publishers(text: str, ids: list[int]) -> None:
    assert codegen25().encode(text) == ids


def test_control_tokens_have_the_publishers_ids() -> None:
    special = codegen25().special_id
    assert [special(t) for t in ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")] == [50295, 50297, 50296]
    assert [special(t) for t in ("<|endoftext|>", "<sep>", "<eom>")] == [50256, 50317, 50318]
    assert [special(t) for t in ("<mask_1>", "<mask_881>", "<reponame>", "<dummy_0>")] == [51199, 50319, 50312, 50313]
    words = codegen25().encode
    assert [*words("prefix"), special("<mask_1>"), *words("suffix")] == [40290, 51199, 37333, 844]


@given(TEXT)
def test_text_stays_text_whatever_it_spells(text: str) -> None:
    ids = codegen25().encode(text)
    assert all(i < 50_256 or 50_257 <= i <= 50_294 for i in ids)
    assert codegen25().decode(ids) == text


@given(st.lists(TEXT, max_size=70))
def test_a_batch_is_its_texts_one_by_one(texts: list[str]) -> None:
    assert codegen25().encode_batch(texts) == [codegen25().encode(text) for text in texts]


def test_the_standard_library_survives_and_stays_text() -> None:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-h]*.py"))
    texts = [file.read_text(encoding="utf-8") for file in files]
    for text, ids in zip(texts, codegen25().encode_batch(texts), strict=True):
        assert codegen25().decode(ids) == text
        assert codegen25().special_ids.isdisjoint(ids)


def test_long_texts_are_encoded_in_pieces_without_changing_an_id() -> None:
    text = "".join(p.read_text() for p in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-c]*.py")))
    assert len(text) > 20 * MOST_AT_ONCE
    assert codegen25().encode(text) == codegen25()._encoding.encode_ordinary(text)


@pytest.mark.parametrize("unit", ["a", " ", "\n", "^", "é漢"])
def test_ten_megabytes_without_a_place_to_cut_neither_hang_nor_crash(unit: str) -> None:
    text = unit * (10_000_000 // len(unit.encode()))
    assert codegen25().decode(codegen25().encode(text)) == text


def test_half_a_character_is_shown_as_such() -> None:
    ids = codegen25().encode("漢")
    assert len(ids) > 1
    assert codegen25().decode(ids[:1]) == "\ufffd"
    assert codegen25().decode([*ids, 51_199, 50_318]) == "漢"


def test_lone_surrogates_are_refused_and_spare_their_neighbours() -> None:
    with pytest.raises(InputError, match="lone surrogate at character 1"):
        codegen25().encode("a\ud800")
    found = codegen25().encode_arrays(["a", "\ud800", "b"])
    assert [isinstance(f, InputError) for f in found] == [False, True, False]


def test_the_vocabulary_is_complete() -> None:
    vocab = codegen25().vocab()
    assert codegen25().vocab_size == 51_200
    assert sorted(vocab.values()) == list(range(51_200))
    assert (vocab["<eom>"], vocab["<mask_1>"]) == (50_318, 51_199)


def test_an_unknown_control_token_is_named() -> None:
    with pytest.raises(FormatError, match="<PRE>"):
        codegen25().special_id("<PRE>")


def test_damaged_ranks_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RANKS_SHA256", "0" * 64)
    codegen25.cache_clear()
    with pytest.raises(ModelError, match="damaged"):
        codegen25()
    codegen25.cache_clear()


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level BPE tokenizer with StarCoder's control tokens, built here."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    built.train_from_iterator(["def return"] * 3, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    fim = ["<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>"]
    built.add_special_tokens([AddedToken(token, special=True) for token in fim])
    folder = tmp_path_factory.mktemp("hf-starcoder")
    built.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt_bigcode"}))
    (folder / "model.safetensors").touch()
    return load_tokenizer(str(folder))


@given(TEXT)
def test_a_hugging_face_tokenizer_keeps_text_as_text(hugging_face: Tokenizer, text: str) -> None:
    ids = hugging_face.encode(text)
    assert hugging_face.special_ids.isdisjoint(ids)
    assert hugging_face.decode(ids) == text


def test_a_hugging_face_tokenizer_knows_its_control_tokens(hugging_face: Tokenizer) -> None:
    assert hugging_face.token(hugging_face.special_id("<fim_prefix>")) == "<fim_prefix>"
    assert hugging_face.eos_id == hugging_face.special_id("<|endoftext|>")
    assert hugging_face.decode([*hugging_face.encode("a"), hugging_face.special_id("<fim_middle>")]) == "a"
    with pytest.raises(FormatError, match="<eom>"):
        hugging_face.special_id("<eom>")


def test_a_folder_without_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": 51_200}))
    (tmp_path / "model.safetensors").touch()
    folder = tmp_path.rename(tmp_path.with_name("a-starcoder"))
    with pytest.raises(ModelError, match="--format codegen25"):
        load_tokenizer(str(folder))
