"""CLIP's tokenizer against the golden ids, OpenAI's code and transformers."""

import gzip
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.modules.encoders.tokenizer import CLIPTokenizer
from ldm.util import InputError
from tests.support.paths import GOLDEN

CASES = json.loads((GOLDEN / "clip_tokens.json").read_text(encoding="utf-8"))
CLIP_FOLDER = Path(importlib.util.find_spec("clip").submodule_search_locations[0])
TABLE = CLIP_FOLDER / "bpe_simple_vocab_16e6.txt.gz"

PROMPTS = [
    "a photograph of an astronaut riding a horse",
    "portrait, (masterpiece:1.2), [blurry], 8k uhd --ar 16:9 {red|blue}",
    "don't we'll I'M you've she'd 'tis rock'n'roll",
    "1234567890 $5.00 50% #1 @home a/b\\c a_b ~^`|",
    "x" * 300,
    "!!<|startoftext|>?? <|endoftext|>end",
    "",
]


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.openai()


@pytest.fixture(scope="module")
def theirs(tokenizer):
    """transformers' class, as other people's code gets it."""
    from ldm.modules.encoders.transformers_tokenizer import TransformersTokenizer

    return TransformersTokenizer(tokenizer, 77)


@pytest.fixture(scope="module")
def openai_own():
    """OpenAI's tokenizer, loaded from its file without the rest of its package."""
    spec = importlib.util.spec_from_file_location(
        "openai_simple_tokenizer", CLIP_FOLDER / "simple_tokenizer.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer(str(TABLE))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, openai_own):
    """The table in the layout of transformers, written by way of OpenAI's code."""
    path = tmp_path_factory.mktemp("tokenizer")
    path.joinpath("vocab.json").write_text(json.dumps(openai_own.encoder), encoding="utf-8")
    merges = "".join(f"{left} {right}\n" for left, right in openai_own.bpe_ranks)
    path.joinpath("merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    return path


def refusal(build) -> str:
    with pytest.raises(InputError) as caught:
        build()
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["prompt"][:20])
def test_golden_ids(tokenizer, case):
    ids = case["ids"]
    assert tokenizer([case["prompt"]]) == [ids + [49407] * (77 - len(ids))]
    assert len(tokenizer.encode(case["prompt"])) == case["untruncated_length"]


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(st.characters(codec="utf-8"), max_size=40)
    | st.text("aA'sS<|>&;#x39lt \t\r\n/éß…“ﬁÃ©İſ", max_size=30)
)
def test_equals_openai_on_any_text(tokenizer, theirs, openai_own, text):
    expected = [49406, *openai_own.encode(text), 49407]
    assert tokenizer.encode(text) == expected
    assert theirs(text)["input_ids"] == expected


@pytest.mark.parametrize(
    "text", [*PROMPTS, "<|STARTOFTEXT|>", "&amp;lt; &eacute;", "\x1b[31mred\x00", "a\u2028b\x85c"]
)
def test_equals_openai_on_prompts(tokenizer, theirs, openai_own, text):
    expected = [49406, *openai_own.encode(text), 49407]
    assert tokenizer.encode(text) == expected
    assert theirs.encode(text) == expected


def test_its_table_is_openais_and_builds_it_again(tokenizer, openai_own):
    vocabulary, merges = tokenizer.table()
    assert vocabulary == openai_own.encoder
    assert merges == list(openai_own.bpe_ranks)
    again = CLIPTokenizer(vocabulary, merges, "its own table")
    assert again(PROMPTS) == tokenizer(PROMPTS)


def test_equals_transformers(folder):
    import transformers

    theirs = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    prompts = [
        prompt for prompt in PROMPTS if "<|" not in prompt
    ]  # there theirs splits off control tokens first
    expected = theirs(prompts, padding="max_length", truncation=True, max_length=77)["input_ids"]
    assert CLIPTokenizer.from_folder(folder)(prompts) == expected


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["prompt"][:20])
def test_golden_ids_by_the_call_of_the_original(theirs, case):
    ids = theirs(
        case["prompt"],
        truncation=True,
        max_length=77,
        return_length=True,
        return_overflowing_tokens=False,
        padding="max_length",
        return_tensors="pt",
    )["input_ids"]
    assert ids.tolist() == [case["ids"] + [49407] * (77 - len(case["ids"]))]


def test_members_of_transformers_tokenizer(theirs):
    import transformers

    assert isinstance(theirs, transformers.CLIPTokenizer)
    assert (len(theirs), theirs.model_max_length, theirs.vocab_size) == (49408, 77, 49408)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (49406, 49407, 49407)
    assert theirs.get_vocab()["cat</w>"] == 2368 == theirs.convert_tokens_to_ids("cat</w>")
    assert theirs._tokenize("A CAT!") == theirs.tokenize("A CAT!") == ["a</w>", "cat</w>", "!</w>"]
    assert theirs("a cat", truncation=False, add_special_tokens=False)["input_ids"] == [320, 2368]
    assert theirs(["a", "", "a cat"], padding=True)["input_ids"] == [
        [49406, 320, 49407, 49407],
        [49406, 49407, 49407, 49407],
        [49406, 320, 2368, 49407],
    ]
    parts = theirs(
        "cat " * 100, truncation=True, max_length=77, return_overflowing_tokens=True, return_length=True
    )
    assert [len(part) for part in parts["input_ids"]] == parts["length"] == [77, 27]


def test_tokens_that_other_code_adds(folder):
    from ldm.modules.encoders.transformers_tokenizer import TransformersTokenizer

    reader = CLIPTokenizer.from_folder(folder)
    theirs = TransformersTokenizer(reader, 77)
    assert theirs.add_tokens(["<My Cat>", "<x>"]) == 2 and len(theirs) == 49410
    assert theirs.convert_tokens_to_ids("<My Cat>") == 49408
    dog = reader.encode("dog")[1]
    assert theirs("A DOG<x><My Cat>")["input_ids"] == [49406, 320, dog, 49409, 49408, 49407]
    reader.use_placeholders({"ink": [49410, 49411]})
    assert theirs("INK <x> dog")["input_ids"] == [49406, 49410, 49411, 49409, dog, 49407]
    reader.use_placeholders({"ink": [49408]})
    assert "49408" in refusal(lambda: theirs("ink"))


def test_folder_equals_table(tokenizer, folder):
    texts = [case["prompt"] for case in CASES]
    assert CLIPTokenizer.from_folder(folder)(texts) == tokenizer(texts)


def test_padding_and_truncation(tokenizer):
    assert tokenizer.begin_id == 49406
    assert tokenizer.end_id == 49407
    assert tokenizer(["cat", "a cat on a mat"], max_length=4, pad_id=0) == [
        [49406, 2368, 49407, 0],
        [49406, 320, 2368, 49407],
    ]
    with pytest.raises(ValueError, match="max_length is 1"):
        tokenizer(["cat"], max_length=1)


def test_placeholders(folder):
    tokenizer = CLIPTokenizer.from_folder(folder)
    plain = tokenizer.encode
    outside = {text: plain(text) for text in (*PROMPTS, "a inkwell, blink, i n k")}
    commas = plain("a , b")[1:-1]
    tokenizer.use_placeholders({"ink": [49408, 49409], "<ink>": [49410], "ink 2": [49411], "v1": [49412]})
    assert {text: plain(text) for text in outside} == outside
    assert plain("a INK, b")[1:-1] == [commas[0], 49408, 49409, *commas[1:]]
    assert plain("ink<ink>ink 2 ink2 v1 v12 v1x")[1:-1] == [
        *(49408, 49409, 49410, 49411, 49408, 49409),
        *(*plain("2")[1:-1], 49412, *plain("v12")[1:-1], 49412, *plain("x")[1:-1]),
    ]
    assert tokenizer.placeholders_in("an ink, <ink> and inks") == ["ink", "<ink>"]
    assert tokenizer.cut_words("a ink tail", max_length=5) == "tail"
    assert tokenizer.cut_words("a ink tail", max_length=4) == "ink tail"
    assert tokenizer(["a ink b"], max_length=4) == [[49406, commas[0], 49408, 49407]]
    assert tokenizer.decode(plain("a ink b")) == "a b"
    tokenizer.use_placeholders({})
    assert plain("a ink")[1:-1] == [commas[0], *plain("ink")[1:-1]]


def test_decode(tokenizer):
    ids = tokenizer(["A red  Cube, 東京 café"])[0]
    assert tokenizer.decode(ids) == "a red cube , 東京 café"
    assert tokenizer.decode([]) == ""


def test_cut_words(tokenizer):
    words = [f"cat{'!' * (i % 2)}" for i in range(100)]
    text = " ".join(words)
    assert len(tokenizer.encode(text)) == 2 + 150
    assert tokenizer.cut_words(text) == " ".join(words[50:])  # 75 tokens are 50 words
    assert tokenizer.cut_words("cat " * 75) == ""
    assert tokenizer.cut_words("A  CAT &amp; a Dog", max_length=4) == "& a dog"


@pytest.mark.parametrize(
    "text", ["東京の夜景 " * 40, "supercalifragilistic" * 30, "🌃" * 50, "Straße İstanbul é" * 20]
)
def test_cut_words_are_what_the_kept_ids_lack(tokenizer, text):
    kept = tokenizer.decode(tokenizer([text])[0]).replace(" ", "").rstrip("\ufffd")
    cut = tokenizer.cut_words(text).replace(" ", "")
    whole = tokenizer.decode(tokenizer.encode(text)).replace(" ", "")
    assert 0 < len(cut) < len(whole)
    assert whole.endswith(cut)
    assert len(kept) + len(cut) - len(whole) in (0, 1)  # one character may be cut through


def test_placeholders_are_those_of_one_tokenizer(tokenizer, monkeypatch):
    """Though the tokenizers of a process share the table, which is read once."""
    monkeypatch.setattr(gzip, "open", lambda *_, **__: pytest.fail("the table is read again"))
    other, plain = CLIPTokenizer.openai(), tokenizer.encode("a cat")
    other.use_placeholders({"cat": [49408]})
    assert other.encode("a cat") == [plain[0], plain[1], 49408, plain[-1]]
    assert tokenizer.encode("a cat") == CLIPTokenizer.openai().encode("a cat") == plain


def test_lone_surrogate(tokenizer):
    message = refusal(lambda: tokenizer.encode("caf\udce9"))
    assert "\\udce9 at position 3" in message


def test_long_word_is_fast(tokenizer):
    start = time.process_time()
    tokenizer.encode("a" * 10_000)
    assert time.process_time() - start < 0.5


def test_package_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install openai-clip" in refusal(CLIPTokenizer.openai)


def test_another_package_called_clip(monkeypatch, tmp_path):
    tmp_path.joinpath("clip").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "clip" / "__init__.py").write_text("raise RuntimeError('imported')")
    assert "pip install openai-clip" in refusal(CLIPTokenizer.openai)


def use_table(monkeypatch, folder, content: bytes):
    package = folder / "clip"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / TABLE.name).write_bytes(content)
    monkeypatch.syspath_prepend(folder)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda table: b"not gzip", id="no gzip"),
        pytest.param(lambda table: table[:100_000], id="cut short"),
        pytest.param(lambda table: table[:50_000] + bytes(1000) + table[51_000:], id="zeros"),
        pytest.param(
            lambda table: gzip.compress(b"\n".join(gzip.decompress(table).split(b"\n")[:30_000])),
            id="few merges",
        ),
        pytest.param(
            lambda table: gzip.compress(b"\n".join(gzip.decompress(table).split(b"\n")[1:])),
            id="shifted",
            marks=pytest.mark.long,
        ),
        pytest.param(
            lambda table: gzip.compress(gzip.decompress(table).replace(b"\ni n\n", b"\nin\n", 1)),
            id="no pair",
            marks=pytest.mark.long,
        ),
        pytest.param(
            lambda table: gzip.compress(gzip.decompress(table).replace(b"\nh e</w>\n", b"\nhzzz e</w>\n", 1)),
            id="unknown part",
        ),
        pytest.param(lambda table: gzip.compress(b"\xff\xfe" * 100_000), id="no text"),
        pytest.param(
            lambda table: gzip.compress(
                gzip.decompress(table).replace(b"\nz z\n", b"\nz z \n", 1) + b"z q\n"
            ),
            id="longer",
            marks=pytest.mark.long,
        ),
    ],
)
def test_damaged_table(monkeypatch, tmp_path, damage):
    use_table(monkeypatch, tmp_path, damage(TABLE.read_bytes()))
    assert TABLE.name in refusal(CLIPTokenizer.openai)


def test_folder_without_files(tmp_path):
    assert "vocab.json" in refusal(lambda: CLIPTokenizer.from_folder(tmp_path))
    assert "vocab.json" in refusal(lambda: CLIPTokenizer.from_folder(tmp_path / "none\x1b"))


def swap(vocabulary, one, other):
    return {**vocabulary, one: vocabulary[other], other: vocabulary[one]}


@pytest.mark.parametrize(
    "damage",
    [
        lambda v: {"<|startoftext|>": 0, "<|endoftext|>": 1},
        lambda v: {**v, "extra": 49408},
        lambda v: {**v, "a": 1},
        lambda v: {**v, "a": "1"},
        lambda v: {**v, "a": None},
        lambda v: list(v),
        lambda v: swap(v, "<|startoftext|>", "<|endoftext|>"),
        lambda v: swap(v, "horse</w>", "cat</w>"),
    ],
    ids=["two tokens", "one more", "double", "text id", "no id", "list", "begin is end", "swapped"],
)
def test_damaged_vocabulary(folder, tmp_path, damage):
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    (tmp_path / "vocab.json").write_text(json.dumps(damage(vocabulary)), encoding="utf-8")
    (tmp_path / "merges.txt").write_bytes((folder / "merges.txt").read_bytes())
    refusal(lambda: CLIPTokenizer.from_folder(tmp_path))


@pytest.mark.parametrize(
    "merges", [b"", b"#version: 0.2\n", b"a b c\n", b"ab\n", b"\xff\n", b"zzzzzz qqqqqq\n"]
)
def test_damaged_merges(folder, tmp_path, merges):
    (tmp_path / "vocab.json").write_bytes((folder / "vocab.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes(merges)
    refusal(lambda: CLIPTokenizer.from_folder(tmp_path))


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "\x00", "null", "3"])
def test_vocabulary_that_is_no_json_object(tmp_path, text):
    (tmp_path / "vocab.json").write_text(text)
    assert "vocab.json" in refusal(lambda: CLIPTokenizer.from_folder(tmp_path))


def test_light_and_fast():
    """A plain prompt needs neither torch nor ftfy nor the `clip` package, and the table loads at once."""
    code = (
        "import sys, tokenizers, regex, time\n"
        "from ldm.modules.encoders.tokenizer import CLIPTokenizer\n"
        "times = []\n"
        "for _ in range(3):\n"
        "    start = time.process_time()\n"
        "    CLIPTokenizer.openai()(['a cat'])\n"
        "    times.append(time.process_time() - start)\n"
        "print(min(times), [m for m in ('torch', 'ftfy', 'clip', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    seconds, heavy = out.split(maxsplit=1)
    assert heavy.strip() == "[]"
    assert float(seconds) < 0.5  # of the CPU; 0.08 on a desktop machine
