"""Tar files of images, written by the webdataset package and by tar: the same images and captions come out."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from ldm.finetuning.data import Example, read_examples
from ldm.images.source import read_image
from ldm.util import InputError


def png(colour):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


def write(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_images_and_captions_of_a_folder_of_shards(tmp_path):
    red, blue, green = map(png, ("red", "blue", "green"))
    write(
        tmp_path / "a.tar",
        [("x/1.png", red), ("x/1.txt", b"a red one\n"), ("x/2.0.json", b"{}"), ("notes", b"-")],
    )
    write(
        tmp_path / "b.tar",
        [("3.json", b'{"caption": "a blue one", "size": 8}'), ("3.png", blue), ("4.PNG", green)],
    )
    examples = read_examples(tmp_path, Example(tmp_path, "one", repeats=2))
    assert [(example.caption, example.repeats) for example in examples] == [
        ("a red one", 2), ("a blue one", 2), ("one", 2),
    ]  # fmt: skip
    for example, colour in zip(examples, ("red", "blue", "green"), strict=True):
        pixels = np.asarray(read_image(example.image).color)
        assert (pixels == np.asarray(Image.new("RGB", (8, 8), colour))).all()
    assert examples[0].image.endswith("a.tar/x/1.png")


def test_what_webdataset_writes_is_what_it_reads(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    rng = np.random.default_rng(0)
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as shard:
        for number in range(5):
            image = rng.integers(256, size=(8, 8, 3), dtype=np.uint8)
            shard.write(
                {"__key__": f"{number:04}", "png": Image.fromarray(image), "txt": f"caption {number}"}
            )
    theirs = list(webdataset.WebDataset(str(tmp_path / "0.tar"), shardshuffle=False).decode("rgb8"))
    ours = read_examples(tmp_path / "0.tar", Example(tmp_path, ""))
    assert [example.caption for example in ours] == [sample["txt"] for sample in theirs]
    for example, sample in zip(ours, theirs, strict=True):
        assert example.path.name == sample["__key__"]
        assert np.array_equal(np.asarray(read_image(example.image).color), sample["png"])


@pytest.mark.parametrize("mode", ["w:gz", "cut"])
def test_a_compressed_or_damaged_shard_is_one_line(tmp_path, mode):
    path = tmp_path / "a.tar"
    write(path, [("1.png", png("red")), ("1.txt", b"red")])
    if mode == "cut":
        path.write_bytes(path.read_bytes()[:700])
    else:
        with tarfile.open(path, mode) as tar:
            tar.add(__file__, "x.txt")
    with pytest.raises(InputError, match="is not a plain tar file"):
        read_examples(path, Example(tmp_path, "x"))
