"""Textual inversion: every file format, and the vectors in place of the words, against transformers' text encoder."""

import base64
import json
import logging
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.checkpoints.adapters.embeddings import Embeddings, read_embedding
from ldm.checkpoints.formats.detect import CheckpointError
from ldm.checkpoints.inspect import inspect_path
from ldm.modules.encoders.modules import AbstractEncoder, FrozenCLIPEmbedder
from ldm.util import InputError

WIDTH, LONGEST = 48, 75
SHARED = {"width": WIDTH, "layers": 2, "heads": 4}
PADDING = 49407


def vectors(count=2, width=WIDTH, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) / 10


@pytest.fixture(scope="module")
def shared():
    torch.manual_seed(0)
    return FrozenCLIPEmbedder(**SHARED)


@pytest.fixture
def encoder(shared):
    yield shared
    shared.use_embeddings({})


def save(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def web_ui(tensor, name="inner", as_module=False):
    """A file as the web UI and the original code write it."""
    terms = {"*": tensor}
    return {
        "string_to_token": {"*": 265},
        "string_to_param": torch.nn.ParameterDict(terms) if as_module else terms,
        "name": name,
        "step": 500,
        "sd_checkpoint": None,
        "sd_checkpoint_name": "v1-5",
    }


# --- files ----------------------------------------------------------------------------------------------------------


def test_all_forms_are_read(tmp_path):
    two = vectors()
    forms = {
        "a.pt": (web_ui(two), ("inner",)),
        "b.pt": (web_ui(two, as_module=True), ("inner",)),
        "c.bin": ({"<cat-toy>": two}, ("<cat-toy>",)),
        "d.pt": ([{"clip_l": two[:1]}, {"other": two[1:]}], ("other",)),
        "e.pt": (web_ui(two, name=None), ()),
    }
    for name, (content, names) in forms.items():
        read = read_embedding(save(tmp_path / name, content), WIDTH, LONGEST)
        assert (read.name, read.others) == (Path(name).stem, names)
        assert torch.equal(read.vectors, two)
    single = read_embedding(save(tmp_path / "f.bin", {"<x>": two[0]}), WIDTH, LONGEST)
    assert torch.equal(single.vectors, two[:1])


def test_safetensors_forms(tmp_path):
    torch_files = pytest.importorskip("safetensors.torch")
    two = vectors()
    for key, names in (("emb_params", ()), ("<cat-toy>", ("<cat-toy>",))):
        torch_files.save_file({key: two.half()}, tmp_path / "x.safetensors")
        read = read_embedding(tmp_path / "x.safetensors", WIDTH, LONGEST)
        assert torch.equal(read.vectors, two.half().float()) and read.others == names
    torch_files.save_file({"clip_l": two, "clip_g": vectors(2, 1280)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="SDXL"):
        read_embedding(tmp_path / "x.safetensors", WIDTH, LONGEST)


def png(path, text, keyword="sd-ti-embedding", packed=False):
    """A PNG image as the web UI writes it, with a text."""
    info = PngInfo()
    info.add_text(keyword, text, zip=packed)
    Image.new("RGB", (64, 64), "navy").save(path, pnginfo=info)
    return path


def web_ui_text(tensor, name="inner"):
    """The text of such an image: base64 of JSON, each tensor as numbers under a separate name."""
    tree = {**web_ui(tensor, name), "string_to_param": {"*": {"TORCHTENSOR": tensor.tolist()}}}
    return base64.b64encode(json.dumps(tree).encode()).decode()


@pytest.mark.parametrize(
    "tree",
    [
        {"clip_g": vectors(2, 1280)},
        {"<cat>": {"clip_l": vectors(2, 768), "clip_g": vectors(2, 1280)}},
        {"text_encoders_0": vectors(2, 768), "text_encoders_1": vectors(2, 1280)},
        [{"<cat>": vectors(2, 768)}, {"<cat>": vectors(2, 1280)}],
    ],
)
def test_embeddings_of_sdxl_are_refused_by_name(tmp_path, tree):
    torch.save(tree, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=r"x\.bin: is an embedding for SDXL"):
        read_embedding(tmp_path / "x.bin", 768, 75)


@pytest.mark.parametrize("packed", [False, True])
def test_an_image_may_hold_one(tmp_path, packed):
    two = vectors()
    path = png(tmp_path / "Ink.png", web_ui_text(two), packed=packed)
    read = read_embedding(path, WIDTH, LONGEST)
    assert (read.name, read.others) == ("Ink", ("inner",)) and torch.equal(read.vectors, two)
    (found,) = inspect_path(path)
    assert found.kind.part == "embedding" and found.format == "PNG" and not found.refused


def test_images_of_a_folder_that_hold_one_are_used(encoder, tmp_path, caplog):
    png(tmp_path / "ink.png", web_ui_text(vectors()))
    save(tmp_path / "oil.pt", web_ui(vectors(1), name="o"))
    Image.new("RGB", (64, 64)).save(tmp_path / "oil.preview.png")
    png(tmp_path / "broken.png", "e30")
    with caplog.at_level(logging.WARNING):
        embeddings = Embeddings(encoder, folder=tmp_path)
    assert [e.name for e in embeddings.used_in("ink and oil")] == ["ink", "oil"]
    assert not embeddings.used_in("oil.preview")[1:]
    assert len(caplog.messages) == 1 and "broken.png" in caplog.messages[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("!", "is damaged"),
        (base64.b64encode(b"[1]").decode(), "is not a mapping"),
        (base64.b64encode(b"[" * 100_000).decode(), "is damaged"),
        (base64.b64encode(b'{"a": {"TORCHTENSOR": [[1, 2], [3]]}}').decode(), "not an array of numbers"),
        (base64.b64encode(b'{"a": {"TORCHTENSOR": ["x"]}}').decode(), "not an array of numbers"),
        (base64.b64encode(b'{"a": {"TORCHTENSOR": [NaN]}}').decode(), "numbers a vector are needed"),
    ],
)
def test_a_damaged_embedding_in_an_image_is_refused(tmp_path, text, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        read_embedding(png(tmp_path / "x.png", text), WIDTH, LONGEST)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 700


def test_an_image_without_an_embedding_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="hidden in the pixels is not read"):
        read_embedding(png(tmp_path / "x.png", "a cat", "parameters"), WIDTH, LONGEST)
    path = png(tmp_path / "bomb.png", "A" * 20_000_000, packed=True)
    with pytest.raises(CheckpointError, match="more than 16777216 bytes"):
        read_embedding(path, WIDTH, LONGEST)
    data = bytearray(png(tmp_path / "y.png", web_ui_text(vectors())).read_bytes())
    data[data.index(b"sd-ti-embedding") + 40] ^= 1
    (tmp_path / "y.png").write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum"):
        read_embedding(tmp_path / "y.png", WIDTH, LONGEST)
    (tmp_path / "y.png").write_bytes(data[:60])
    with pytest.raises(CheckpointError, match="without a textual inversion"):
        read_embedding(tmp_path / "y.png", WIDTH, LONGEST)


@pytest.mark.parametrize(
    "content, message",
    [
        (web_ui(vectors(2, 1024)), "768 numbers a vector are needed, the file has 1024: .* Stable Diffusion 2"),
        ({"a": vectors(1, 768), "b": vectors(1, 768)}, "one word; found 2: a, b"),
        ({"step": 3}, "found 0"),
        ([1], "not an embedding"),
        (vectors(), "not an embedding"),
        ([], "the file has 0"),
        (web_ui(vectors(76, 768)), "has 76 vectors; a prompt has room for 75"),
        (web_ui(torch.full((1, 768), float("nan"))), "NaN"),
        (web_ui(torch.zeros(1, 1, 768)), "found 0"),
    ],
)  # fmt: skip
def test_what_is_no_embedding_of_this_model_is_refused(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        read_embedding(save(tmp_path / "x.pt", content), 768, 75)
    assert str(caught.value).isprintable()


# --- words ----------------------------------------------------------------------------------------------------------


def test_words_are_the_files_name_and_the_names_inside(encoder, tmp_path):
    save(tmp_path / "My-Style.pt", web_ui(vectors(), name="inner"))
    embeddings = Embeddings(encoder, folder=tmp_path)
    for prompt in ("my-style", "a MY-STYLE, too", "<my-style>", "inner", "x (<inner>)"):
        assert [e.name for e in embeddings.used_in(prompt)] == ["My-Style"], prompt
    for prompt in ("my style", "mystyle", "my-styles", "winner", "inner_style"[:4], "*", ""):
        assert not embeddings.used_in(prompt), prompt
    assert [e.name for e in embeddings.used_in("inner", "my-style")] == ["My-Style"]


def test_a_given_name_is_the_only_one(encoder, tmp_path):
    path = save(tmp_path / "x.pt", web_ui(vectors(), name="inner"))
    embeddings = Embeddings(encoder, [(path, "Ink Wash")])
    assert embeddings.used_in("an ink  wash drawing") and not embeddings.used_in("x inner")
    with pytest.raises(InputError, match="cannot be a word"):
        Embeddings(encoder, [(path, "<>")])


def test_equal_names(encoder, tmp_path):
    for folder in ("a", "b"):
        save(tmp_path / folder / "x.pt", web_ui(vectors(), name="one"))
    with pytest.raises(InputError, match="two embeddings are called x"):
        Embeddings(encoder, folder=tmp_path)
    save(tmp_path / "c" / "y.pt", web_ui(vectors(1), name="twice"))
    save(tmp_path / "c" / "twice.pt", web_ui(vectors(1, seed=1), name="z"))
    save(tmp_path / "c" / "v.pt", web_ui(vectors(1), name="both"))
    save(tmp_path / "c" / "w.pt", web_ui(vectors(1), name="both"))
    embeddings = Embeddings(encoder, folder=tmp_path / "c")
    assert [e.name for e in embeddings.used_in("twice")] == ["twice"]
    assert not embeddings.used_in("both")


def test_a_folder_may_hold_other_files(encoder, tmp_path, caplog):
    save(tmp_path / "good.pt", web_ui(vectors()))
    save(tmp_path / "wide.pt", web_ui(vectors(1, 1024)))
    (tmp_path / "notes.txt").write_text("x")
    with caplog.at_level(logging.WARNING):
        embeddings = Embeddings(encoder, folder=tmp_path)
    assert embeddings.used_in("good") and not embeddings.used_in("wide")
    assert len(caplog.messages) == 1 and "wide.pt" in caplog.messages[0]
    with pytest.raises(InputError, match="does not exist"):
        Embeddings(encoder, folder=tmp_path / "nowhere")
    with pytest.raises(InputError, match="takes no embeddings"):
        Embeddings(AbstractEncoder())


# --- vectors --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(shared):
    """transformers' text encoder with three more rows in its table of tokens."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=PADDING + 1 + 3,
    )
    model = transformers.CLIPTextModel(config).eval()
    prefix = "text_model." if any(k.startswith("text_model.") for k in model.state_dict()) else ""
    state = {prefix + k: v for k, v in shared.transformer.text_model.state_dict().items()}
    table = f"{prefix}embeddings.token_embedding.weight"
    state[table] = torch.cat([state[table], vectors(2), vectors(1, seed=1)])
    # some versions of transformers keep the position ids, which are computed, in the state dict
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert all(key.endswith("position_ids") for key in [*missing, *unexpected])
    return model


def test_vectors_stand_where_the_word_stands(encoder, theirs, tmp_path):
    save(tmp_path / "ink.pt", web_ui(vectors(2), name="a"))
    save(tmp_path / "zed.pt", web_ui(vectors(1, seed=1), name="b"))
    Embeddings(encoder, [(tmp_path / "ink.pt", "ink"), (tmp_path / "zed.pt", "zed")])
    ids = encoder.tokenizer.encode
    first, second, third = PADDING + 1, PADDING + 2, PADDING + 3
    row = [*ids("a cat in ")[:-1], first, second, *ids(", zebra")[1:-1], third, *ids("!")[1:]]
    row += [PADDING] * (77 - len(row))
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor([row])).last_hidden_state
        assert torch.allclose(encoder.encode(["a cat in ink, zebra <ZED>!"]), expected, atol=2e-6)


def test_other_prompts_keep_their_bits(encoder, tmp_path):
    prompts = ["", "a cat", "a photo of an astronaut & a horse"]
    plain = encoder.encode(prompts)
    save(tmp_path / "ink.pt", web_ui(vectors()))
    Embeddings(encoder, folder=tmp_path)
    assert torch.equal(encoder.encode(prompts), plain)
    assert not torch.equal(encoder.encode(["a cat ink"]), encoder.encode(["a cat"]))
    assert not [key for key in encoder.state_dict() if "added" in key]
    encoder.use_embeddings({})
    assert torch.equal(encoder.encode(prompts), plain)


def test_vectors_count_against_the_length(encoder, tmp_path, caplog):
    save(tmp_path / "long.pt", web_ui(vectors(70)))
    Embeddings(encoder, folder=tmp_path)
    assert encoder.cut_words("long one two three four five") == ""
    assert encoder.cut_words("long one two three four five, six") == ", six"
    assert encoder.cut_words("a b c d e f g long tail") == "long tail"
    with caplog.at_level(logging.WARNING):
        assert encoder.encode(["long one two three four five, six"]).shape == (1, 77, WIDTH)
    assert caplog.messages[0].endswith(": , six")
