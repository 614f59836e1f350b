"""The LAION-400M text encoder against the original's figures, its tokenizer against BERT's algorithm."""

import string

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.modules.encoders import bert
from ldm.modules.encoders.bert import BERTTokenizer, find_vocabulary
from ldm.modules.encoders.modules import BERTEmbedder
from ldm.util import InputError
from tests.support.golden_data import TOLERANCE, figure, keys, relative_error, weight_of

FIGURES = "tiny_bert_inpaint.npz"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = [*string.ascii_lowercase, *string.digits, *string.punctuation, *"ßıøłασςかн东京한🌃é"]
WORDS = ["cat", "horse", "rid", "##ing", "un", "##aff", "##able", "the", "##s"]
TOKENS = list(dict.fromkeys([*SPECIAL, *LETTERS, *("##" + letter for letter in LETTERS), *WORDS]))

PROMPTS = [
    "",
    "   ",
    "a cat Riding horses",
    "unaffable",
    "don't STOP!!! (cat:1.2), [cat] $5.00 50% #1 a/b\\c ~^`|",
    "Café ÉCOLE naïve e\u0301 \u0301",
    "ß ẞ ı İstanbul Straße ﬁ",
    "東京の夜景 한국어 москва नमस्ते",
    "a\x00b\x1bc\ufffdd\x7fe",
    "a\tb\nc\u2028d\u00a0e\u200bf\u3000g",
    "🌃cat🌃 cat",
    "a－b。、「x」 “quoted” — dash",
    "[SEP] [CLS][MASK] [sep] [PAD]",
    "x" * 100,
    "x" * 101,
    "\U0001d400 \ue000 K",
]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return write(tmp_path_factory.mktemp("bert") / "vocab.txt", TOKENS)


def write(path, tokens):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(vocabulary):
    return BERTTokenizer.from_file(vocabulary, 77)


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A computer without a vocabulary, except those of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ldm.places.ROOT", tmp_path / "toolkit")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def refusal(build) -> str:
    with pytest.raises(InputError) as caught:
        build()
    assert str(caught.value).isprintable()
    return str(caught.value)


# --- the transformer ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedder():
    model = BERTEmbedder(n_embed=64, n_layer=3, vocab_size=1000).eval().requires_grad_(False)
    names = {name: f"cond_stage_model.{name}" for name in model.state_dict()}
    shapes = {names[name]: list(value.shape) for name, value in model.state_dict().items()}
    assert shapes == keys("tiny_bert_keys.json")
    model.load_state_dict({name: weight_of(key, shapes[key]) for name, key in names.items()})
    return model


def test_figures_of_the_original(embedder):
    embedding = embedder.encode(figure("bert/tokens", FIGURES))
    assert relative_error(embedding, figure("bert/embedding", FIGURES)) <= TOLERANCE


def test_dropout_acts_in_training_only(embedder):
    ids = figure("bert/tokens", FIGURES)
    model = BERTEmbedder(64, 3, 1000, embedding_dropout=0.5)
    model.load_state_dict(embedder.state_dict())
    assert torch.equal(model.eval()(ids), embedder(ids))
    assert not torch.equal(model.train()(ids), embedder(ids))


def test_prompts_become_what_their_ids_become(vocabulary, tokenizer):
    model = BERTEmbedder(16, 1, len(TOKENS), version=str(vocabulary)).eval()
    prompts = ["a cat", "the horses"]
    assert torch.equal(model.encode(prompts), model(torch.tensor(tokenizer(prompts))))
    assert model.encode(prompts).shape == (2, 77, 16)


def test_without_its_tokenizer_it_takes_ids_only():
    model = BERTEmbedder(16, 1, 100, use_tokenizer=False)
    assert model(torch.zeros(1, 5, dtype=torch.long)).shape == (1, 5, 16)
    assert "use_tokenizer" in refusal(lambda: model.encode(["a cat"]))


# --- the tokenizer ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def python_own(vocabulary):
    """BERT's published algorithm in Python, as in transformers."""
    legacy = pytest.importorskip("transformers.models.bert.tokenization_bert_legacy")
    tokenizer = legacy.BertTokenizerLegacy(str(vocabulary))
    return lambda text: tokenizer(text, padding="max_length", truncation=True, max_length=77)["input_ids"]


@pytest.mark.parametrize("text", PROMPTS, ids=ascii)
def test_equals_the_published_algorithm_on_prompts(tokenizer, python_own, text):
    assert tokenizer([text]) == [python_own(text)]


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("".join(LETTERS) + string.ascii_uppercase + " \t\n\x00\x1b\u0301\u00a0\u2003", max_size=90)
    | st.text(
        st.characters(max_codepoint=0x5FF, exclude_characters="Σ", exclude_categories=["Cn"]), max_size=40
    )
)
def test_equals_the_published_algorithm_on_any_text(tokenizer, python_own, text):
    assert tokenizer([text]) == [python_own(text)]


def test_padding_and_truncation(vocabulary):
    pad, _, begin, end = range(4)
    cat, rid, ing = (TOKENS.index(token) for token in ("cat", "rid", "##ing"))
    assert BERTTokenizer.from_file(vocabulary, 5)(["Cat", "", "cat riding horses"]) == [
        [begin, cat, end, pad, pad],
        [begin, end, pad, pad, pad],
        [begin, cat, rid, ing, end],
    ]


def test_cut_words(vocabulary, tokenizer, caplog):
    words = [f"cat{'!' * (i % 2)}" for i in range(100)]
    assert tokenizer.cut_words(" ".join(words)) == " ".join(words[50:])  # 75 tokens are 50 words
    assert tokenizer.cut_words("cat " * 75) == ""
    model = BERTEmbedder(16, 1, len(TOKENS), 5, version=str(vocabulary))
    assert model.cut_words("A  CAT and\x1b a Dog") == "nd\x1b a Dog"
    model.encode(["A  CAT and\x1b a Dog", "cat"])
    (record,) = caplog.records
    assert record.getMessage() == r"prompt longer than 3 tokens; this is cut off: nd\x1b a Dog"


def test_only_the_first_of_many_long_prompts_are_shown(vocabulary, caplog):
    model = BERTEmbedder(16, 1, len(TOKENS), 5, version=str(vocabulary))
    for _ in range(20):
        model.encode(["cat and a dog and a cat", "cat " * 500])
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 11 and max(map(len, messages)) < 400
    assert messages[-1] == "more prompts are longer than 3 tokens; --dry_run counts them"


def test_lone_surrogate(tokenizer):
    assert "\\udce9 at position 3" in refusal(lambda: tokenizer(["caf\udce9"]))
    assert "\\udce9 at position 3" in refusal(lambda: tokenizer.cut_words("caf\udce9"))


# --- the vocabulary's places --------------------------------------------------------------------------------


def snapshot(hub, repository):
    """The place of a file in the hub's cache, whose main branch is at one commit."""
    folder = hub / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("86b5e093")
    return folder / "snapshots" / "86b5e093" / "vocab.txt"


def test_places_of_the_vocabulary(nowhere):
    found = []
    for path in (
        snapshot(nowhere / "hub", "bert-base-uncased"),
        snapshot(nowhere / "hub", "google-bert/bert-base-uncased"),
        nowhere / "toolkit" / bert.OWN_VOCABULARY,
        nowhere / bert.OWN_VOCABULARY,
        nowhere / "bert-base-uncased" / "vocab.txt",
    ):
        write(path, TOKENS)
        found.append(find_vocabulary().resolve() == path)
    assert found == [True] * 5  # each goes before those above it


def test_a_vocabulary_by_its_file_or_folder(nowhere):
    path = write(nowhere / "mine" / "vocab.txt", TOKENS)
    assert find_vocabulary("mine").resolve() == path
    assert find_vocabulary("mine/vocab.txt").resolve() == path


def test_no_vocabulary_is_one_line_with_file_source_and_place(nowhere):
    said = refusal(lambda: BERTEmbedder(16, 1).encode(["a cat"]))
    assert "models/ldm/text2img-large/vocab.txt does not exist" in said
    assert "https://huggingface.co/google-bert/bert-base-uncased/resolve/main/vocab.txt" in said


@pytest.mark.parametrize("version", ["no/such", "x\x1b[2J", "bert-base-cased", "x" * 300, "\x00"])
def test_another_vocabulary_that_is_nowhere(nowhere, version):
    write(nowhere / bert.OWN_VOCABULARY, TOKENS)
    assert "neither a file nor a folder" in refusal(lambda: find_vocabulary(version))


# --- damaged vocabularies -----------------------------------------------------------------------------------


def test_vocabulary_of_another_size(vocabulary):
    said = refusal(lambda: BERTEmbedder(16, 1, version=str(vocabulary)).encode(["a cat"]))
    assert f"{len(TOKENS)} entries, the text encoder 30522" in said


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([], "lacks"),
        (SPECIAL[:2], r"lacks \[CLS\], \[SEP\], \[MASK\]"),
        ([*TOKENS, "cat"], "twice"),
        ([*TOKENS, "", ""], "twice"),
        (
            [*TOKENS, *(f"w{i}" for i in range(30522 - len(TOKENS)))],
            "not the vocabulary of bert-base-uncased",
        ),
    ],
    ids=["empty", "few", "double", "blank lines", "another of BERT's size"],
)
def test_damaged_vocabulary(tmp_path, tokens, said):
    path = write(tmp_path / "vocab.txt", tokens)
    with pytest.raises(InputError, match=said):
        BERTTokenizer.from_file(path, 77)


def test_unreadable_vocabulary(tmp_path):
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe[PAD]")
    assert "not UTF-8" in refusal(lambda: BERTTokenizer.from_file(tmp_path / "vocab.txt", 77))
    assert "does not exist" in refusal(lambda: BERTTokenizer.from_file(tmp_path / "none\x1b", 77))


def test_line_ends_and_mark_of_other_systems(tmp_path, tokenizer):
    path = tmp_path / "vocab.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(TOKENS).encode())
    assert BERTTokenizer.from_file(path, 77)(PROMPTS) == tokenizer(PROMPTS)


def test_berts_own_ids_pass_the_check(tmp_path):
    """A vocabulary of BERT's size is accepted if the known sentence has BERT's ids."""
    tokens = [f"w{i}" for i in range(30522)]
    places = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 7592: "hello", 1010: ","}
    places |= {2026: "my", 3899: "dog", 2003: "is", 10140: "cute"}
    for index, token in places.items():
        tokens[index] = token
    assert BERTTokenizer.from_file(write(tmp_path / "vocab.txt", tokens), 4)(["dog"]) == [[101, 3899, 102, 0]]
