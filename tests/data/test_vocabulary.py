import json
from pathlib import Path

import numpy as np
import pytest

from ldm.data.captions import caption
from ldm.data.scenes import scene_at
from ldm.data.vocabulary import COMMON_WORDS, learn_merges, train_vocabulary


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [caption(scene_at(i, "train"), np.random.default_rng(i)) for i in range(1500)]


@pytest.fixture(scope="module")
def folder(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    assert train_vocabulary(texts, 1000, folder) == 1000
    return folder


def test_the_layout_is_openais(folder: Path):
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    assert sorted(vocabulary.values()) == list(range(1000))
    # The ids that OpenAI's table gives; U+00A1 is byte 0xA1, U+0100 is byte 0x00.
    known = {"!": 0, "a": 64, "\u00a1": 94, "\u0100": 188, "!</w>": 256, "a</w>": 320}
    assert {token: vocabulary[token] for token in known} == known
    assert tokens[-2:] == ["<|startoftext|>", "<|endoftext|>"]
    assert lines[0] == "#version: 0.2"
    assert [line.replace(" ", "") for line in lines[1:]] == tokens[512:-2]


def test_transformers_reads_it_and_gives_captions_back(folder: Path, texts: list[str]):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    ids = [tokenizer(text)["input_ids"] for text in texts[:300]]
    assert all((row[0], row[-1]) == (998, 999) for row in ids)
    assert max(map(len, ids)) <= 77

    def letters(text: str) -> str:
        return text.lower().replace(" ", "")

    decoded = [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    assert [letters(text) for text in decoded] == [letters(text) for text in texts[:300]]


def test_words_of_captions_are_one_token_and_common_words_few(folder: Path, texts: list[str]):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    words = {word.strip(",.") for text in texts for word in text.lower().split()}
    assert [word for word in words if len(tokenizer.tokenize(word)) != 1] == []
    assert np.mean([len(tokenizer.tokenize(word)) for word in COMMON_WORDS.split()]) < 2


def test_our_own_tokenizer_agrees_with_transformers(folder: Path, texts: list[str]):
    from ldm.modules.encoders.tokenizer import CLIPTokenizer

    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.CLIPTokenizer.from_pretrained(folder), CLIPTokenizer.from_folder(folder)
    others = ["An astronaut, riding a horse; 1984!", "caf\u00e9 \u2014 na\u00efve"]
    for text in [*texts[:100], *others]:
        assert ours.encode(text) == theirs(text)["input_ids"]


def test_the_same_captions_give_the_same_files(folder: Path, texts: list[str], tmp_path: Path):
    train_vocabulary(reversed(texts), 1000, tmp_path)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_merges_of_a_worked_example():
    words = {tuple("low"): 5, tuple("lower"): 2, tuple("newest"): 6, tuple("widest"): 3}
    # By hand: e s (9), es t (9), l o (7), lo w (7), then n e, ew and w est at 6: "ew" comes first.
    merges = learn_merges(words, 5)
    assert merges[:4] == [("e", "s"), ("es", "t"), ("l", "o"), ("lo", "w")]
    assert merges[4] == min([("n", "e"), ("e", "w"), ("w", "est")])
    assert learn_merges({("a", "b"): 1}, 9) == [("a", "b")]


def test_a_repeated_letter_merges_from_the_left():
    assert learn_merges({tuple("aaa"): 3}, 2) == [("a", "a"), ("aa", "a")]


def test_where_the_ids_are_the_merges_are(tmp_path: Path):
    (tmp_path / "merges.txt").mkdir()  # cannot be written
    with pytest.raises(OSError, match="merges"):
        train_vocabulary(["a cube"], 520, tmp_path)
    assert not (tmp_path / "vocab.json").exists()


def test_too_small_a_vocabulary_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="513"):
        train_vocabulary(["a cube"], 513, tmp_path)
    assert train_vocabulary(["a cube"], 514, tmp_path) == 514
