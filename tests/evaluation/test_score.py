"""Scores of sets of images: sanity laws, the cache, statistics in files, and refusals of one line."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from ldm.data.scenes import image_at, scene_at
from ldm.evaluation import features as features_module
from ldm.evaluation.compare import compare_sets, pair_values, write_sheet
from ldm.evaluation.features import FeatureCache, compute
from ldm.evaluation.images import array_set, folder_set, read_set, scene_set
from ldm.evaluation.networks import SceneFeatures
from ldm.evaluation.prompts import Question
from ldm.evaluation.results import Result, as_csv, as_markdown, read_results, write_results
from ldm.evaluation.score import Request, Scorer
from ldm.evaluation.shapes import skill_questions
from ldm.evaluation.skills import Found, is_right
from ldm.evaluation.statistics import read_statistics, write_statistics
from ldm.util import InputError

COUNT = 24
DISTANCES = ("fid", "kid", "precision", "recall")


class Means(SceneFeatures):
    """Six features that need no time: means of the halves of an image."""

    name, width, weights, resize = "means", 6, "none", "none"

    def __init__(self):
        self.calls = 0

    def prepare(self, pixels):
        return torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32))

    def features(self, x):
        self.calls += len(x)
        return torch.cat([x[..., :16].mean((2, 3)), x[..., 16:].mean((2, 3))], 1)


@pytest.fixture(scope="module")
def scenes():
    return [image_at(i, "fresh", 32) for i in range(COUNT)]


def blurred(images, radius):
    return [np.asarray(Image.fromarray(one).filter(ImageFilter.GaussianBlur(radius))) for one in images]


def noise(count):
    return [np.random.default_rng(i).integers(256, size=(32, 32, 3), dtype=np.uint8) for i in range(count)]


def written(folder, images):
    folder.mkdir(parents=True)
    for i, one in enumerate(images):
        Image.fromarray(one).save(folder / f"{i:05d}.png")
    return folder


@pytest.fixture
def references(tmp_path, scenes):
    return written(tmp_path / "references", scenes)


def scored(images, against, metrics=DISTANCES, **changes):
    request = Request(metrics, "shapes", str(against), few=True, resamples=0)
    return {one.metric: one for one in Scorer(replace(request, **changes))(images)}


def test_a_set_is_at_0_from_itself_noise_is_far_and_blur_is_monotone(scenes, references):
    same = scored(array_set("same", scenes), references)
    assert same["fid"].value == pytest.approx(0, abs=1e-4)
    assert (same["precision"].value, same["recall"].value) == (1, 1)
    blurs = [scored(array_set(f"blur {r}", blurred(scenes, r)), references) for r in (0.5, 1, 2, 4)]
    wild = scored(array_set("noise", noise(COUNT)), references)
    for metric in ("fid", "kid"):
        values = [same[metric].value, *(one[metric].value for one in blurs), wild[metric].value]
        assert values == sorted(values) and values[-1] > 20 * abs(values[1])
    assert (wild["precision"].value, wild["recall"].value) == (0, 0)


def test_figures_carry_what_they_depend_on(scenes, references):
    first = scored(array_set("a", scenes[:8]), references)["fid"]
    assert (first.network, first.resize, len(first.weights), first.images) == ("shapes", "area", 64, 8)
    assert (first.references, first.reference_images, len(first.reference_sha256)) == (
        str(references),
        COUNT,
        64,
    )
    assert (first.low, first.high) == (None, None)
    with_interval = scored(array_set("a", scenes[:8]), references, ("kid",), resamples=20)["kid"]
    assert with_interval.low < with_interval.value < with_interval.high


def test_features_are_computed_once_for_each_content_and_kept(tmp_path, references):
    net, cache = Means(), FeatureCache(tmp_path / "cache")
    first = compute(folder_set(references), net, cache)
    assert (net.calls, first.size) == (COUNT, (32, 32))
    (references / "00000.png").rename(references / "other.png")  # the content is the key, not the name
    again = compute(folder_set(references), net, cache)
    assert net.calls == COUNT
    assert np.array_equal(np.sort(first.values, 0), np.sort(again.values, 0))
    Image.fromarray(noise(1)[0]).save(references / "other.png")
    compute(folder_set(references), net, cache)
    compute(folder_set(references), net, cache, side=16)
    assert net.calls == 2 * COUNT + 1


def test_memory_does_not_grow_with_the_number_of_images(monkeypatch):
    held, most = [0], [0]

    class Counted:
        def __init__(self):
            held[0] += 1
            most[0] = max(most[0], held[0])

        def __del__(self):
            held[0] -= 1

    class Watched(np.ndarray):
        pass

    def pixels():
        made = np.zeros((8, 8, 3), np.uint8).view(Watched)
        made.counted = Counted()
        return made

    images = array_set("many", [np.zeros((8, 8, 3), np.uint8)] * 200)
    items = [replace(item, key=lambda i=i: str(i), pixels=pixels) for i, item in enumerate(images.items)]
    monkeypatch.setattr(features_module, "BATCH", 4)
    made = compute(replace(images, items=items), Means())
    assert isinstance(made.values, np.memmap) and most[0] <= 8


def test_statistics_are_read_in_the_forms_that_others_publish(tmp_path, scenes, references):
    scorer = Scorer(Request(("fid",), "shapes", str(references), few=True, resamples=0))
    gaussian = scorer.reference("shapes")[1]
    write_statistics(tmp_path / "own.npz", gaussian)
    np.savez(tmp_path / "theirs.npz", mu=gaussian.mean, sigma=gaussian.covariance)
    blur = array_set("blur", blurred(scenes, 1))
    expected = scored(blur, references, ("fid",))["fid"].value
    for name in ("own.npz", "theirs.npz"):
        assert scored(blur, tmp_path / name, ("fid",))["fid"].value == pytest.approx(expected, rel=1e-9)
    assert (read_statistics(tmp_path / "own.npz").count, read_statistics(tmp_path / "theirs.npz").count) == (
        COUNT,
        0,
    )


def test_rendered_references_are_not_the_scenes_of_prompts():
    references = scene_set(3)
    assert [len(references), references.items[0].pixels().shape] == [3, (128, 128, 3)]
    assert not np.array_equal(references.items[0].pixels(), image_at(0, "fresh"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"few": False},
            "fid of 64 features needs 128 images, and a has 8: it would be far too large; use --metrics kid",
        ),
        ({"metrics": ("fidd",)}, "--metrics fidd: give some of fid, kid, "),
        ({"against": None}, "fid compare with references: give a folder or a .npz file with --against"),
        ({"against": "none"}, "none is not a folder of images; give one, a .npz file, or scenes:2000"),
        ({"against": "scenes:many"}, "scenes:many: write scenes:2000, the number of scenes"),
        ({"against": "none.npz"}, "none.npz: no such file; check the path"),
        ({"network": "vgg"}, "--network vgg: give one of inception, dinov2, clip, shapes"),
        ({"size": 2}, "--size is 2; give 8 to 4096 pixels"),
        ({"metrics": ("answers",)}, "answers needs the questions of an evaluation's folder, or --questions"),
        ({"metrics": ("clip",)}, "a: rendered images have no prompts; give --questions"),
    ],
    ids=str,
)
def test_wrong_requests_are_one_line(change, message, scenes, references):
    request = Request(("fid",), "shapes", str(references), few=True, resamples=0)
    with pytest.raises(InputError) as caught:
        Scorer(replace(request, **change))(array_set("a", scenes[:8]))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_sizes_that_differ_are_refused_until_they_are_cut(scenes, references, tmp_path):
    large = array_set("large", [image_at(i, "fresh", 48) for i in range(4)])
    with pytest.raises(InputError, match="the references are 32x32 and the images 48x48; give --size 48"):
        scored(large, references, ("kid",))
    assert scored(large, references, ("kid",), size=32)["kid"].resize == "cut to 32, area"
    mixed = array_set("mixed", [scenes[0], large.items[0].pixels()])
    with pytest.raises(InputError, match="mixed: 0 is 32x32 and 1 48x48; give --size"):
        scored(mixed, references, ("kid",))


def test_damaged_files_and_folders_without_images_are_one_line(tmp_path, references):
    (references / "00003.png").write_bytes((references / "00003.png").read_bytes()[:90])
    with pytest.raises(InputError, match=r"00003\.png"):
        scored(folder_set(references), references, ("kid",))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds no images"):
        read_set(str(tmp_path / "empty"))
    for content, message in ((b"PK\3\4", "not a .npz file"), (b"", "damaged")):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(InputError, match=r"bad\.npz: is " + message):
            read_statistics(tmp_path / "bad.npz")
    np.savez(tmp_path / "bad.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    with pytest.raises(InputError, match="not statistics of features"):
        read_statistics(tmp_path / "bad.npz")
    np.savez(tmp_path / "bad.npz", x=np.zeros(3))
    with pytest.raises(InputError, match="holds x, and not mu and sigma"):
        read_statistics(tmp_path / "bad.npz")
    np.savez(tmp_path / "bad.npz", mu=np.zeros(3), sigma=np.zeros((3, 3)))
    with pytest.raises(InputError, match="has 3 features and shapes 64"):
        scored(array_set("a", noise(4)), tmp_path / "bad.npz", ("fid",))
    with pytest.raises(InputError, match=r"kid needs reference images, and .* has statistics alone"):
        gaussian = Scorer(Request(("fid",), "shapes", "scenes:4", few=True)).reference("shapes")[1]
        write_statistics(tmp_path / "good.npz", gaussian)
        scored(array_set("a", noise(4)), tmp_path / "good.npz", ("kid",))


def test_rendered_scenes_answer_their_prompts_and_others_do_not():
    questions = [Question("", "scene", scene=("fresh", i)) for i in range(12)]
    right = array_set("right", [image_at(i, "fresh") for i in range(12)])
    scorer = Scorer(Request(("answers",), "shapes"))
    assert scorer(right, questions)[0].value > 98
    assert scorer(right, questions[6:] + questions[:6])[0].value < 70
    with pytest.raises(InputError, match="right has 12 images for 3 prompts"):
        scorer(right, questions[:3])


def test_questions_about_rendered_scenes_are_answered_by_the_reader():
    index = next(i for i in range(99) if scene_at(i, "fresh").relation == "left of")
    a, b = scene_at(index, "fresh").solids
    both = ({"class": b.shape, "color": b.colour}, {"class": a.shape, "color": a.colour})
    asked = [
        Question("", "position", (both[0], {**both[1], "position": ["left of", 0]})),
        Question("", "position", ({**both[0], "position": ["left of", 1]}, both[1])),
        Question("", "counting", ({"class": "solid", "count": 2},), ({"class": "solid", "count": 3},)),
        Question("", "counting", ({"class": "solid", "count": 3},)),
    ]
    images = array_set("one", [image_at(index, "fresh")] * 4)
    found = {one.metric: one.value for one in Scorer(Request(("skills",), "shapes"))(images, asked)}
    assert found == {"position": 50, "counting": 50, "all skills": 50}


def test_rules_of_questions():
    dog, cat = Found("dog", "red", {1: frozenset({"above"})}), Found("cat", "blue", {0: frozenset({"below"})})
    over = ({"class": "cat"}, {"class": "dog", "position": ["above", 0]})
    assert is_right(Question("", "", over), [dog, cat])
    assert not is_right(
        Question("", "", ({"class": "dog"}, {"class": "cat", "position": ["above", 0]})), [dog, cat]
    )
    assert not is_right(Question("", "", ({"class": "dog", "color": "blue"},)), [dog, cat])
    assert not is_right(Question("", "", ({"class": "dog", "count": 2},)), [dog, cat])
    assert not is_right(Question("", "", (), ({"class": "cat", "count": 1},)), [dog, cat])
    assert is_right(Question("", "", (), ({"class": "cat", "count": 2},)), [dog, cat])


def test_skill_questions_are_as_many_of_each():
    questions = skill_questions(50, 1)
    tags = [question.tag for question in questions]
    assert {tags.count(tag) for tag in tags} == {10}
    assert questions == skill_questions(50, 1) != skill_questions(50, 2)


def test_pairs_have_differences_with_intervals(scenes):
    first, second = array_set("a", scenes), array_set("b", [one ^ 1 for one in scenes])
    values = pair_values(first, second, "psnr")
    assert values == pytest.approx([20 * np.log10(255)] * COUNT)
    assert pair_values(first, first, "psnr") == [100.0] * COUNT
    with pytest.raises(InputError, match="a has 24 images and b 3"):
        pair_values(first, array_set("b", scenes[:3]), "psnr")
    scorer = Scorer(Request(("psnr", "ssim", "answers"), "shapes"))
    questions = [Question("", scene=("fresh", i)) for i in range(COUNT)]
    found, psnrs = compare_sets(first, second, scorer, questions)
    by_name = {(one.images_of, one.metric): one for one in found}
    assert psnrs == values and by_name["a and b", "psnr"].value == pytest.approx(20 * np.log10(255))
    one, other, apart = (
        by_name[key] for key in (("a", "answers"), ("b", "answers"), ("a and b", "answers difference"))
    )
    assert apart.value == pytest.approx(other.value - one.value)
    assert apart.high - apart.low < (one.high - one.low) / 5  # the pairs share their prompts


def test_the_sheet_begins_with_the_pair_that_differs_most(tmp_path, scenes):
    first, second = array_set("a", scenes[:8]), array_set("b", [scenes[0], *noise(1), *scenes[2:8]])
    write_sheet(tmp_path / "pairs.png", first, second, pair_values(first, second, "psnr"), None)
    page = np.asarray(Image.open(tmp_path / "pairs.png").convert("RGB"))
    corner = noise(1)[0][0]  # the first row of the odd image
    places = [
        y for y in range(200) for x in range(len(page[0]) - 32) if np.array_equal(page[y, x : x + 32], corner)
    ]
    assert len(places) == 1 and places[0] < 100


def test_results_are_kept_replaced_and_read_again(tmp_path):
    old = Result(
        "a", "fid", 3.0, 2.0, 4.0, 10, "v1", {"scale": 7.5}, "inception", "abc", "clean", command="x | y"
    )
    write_results(tmp_path, [old, Result("b", "clip", 30.0, None, None, 10)])
    merged = write_results(tmp_path, [replace(old, value=5.0)])
    assert (
        [one.value for one in merged]
        == [5.0, 30.0]
        == [one.value for one in read_results(tmp_path / "results.jsonl")]
    )
    assert as_markdown(merged).splitlines()[:4] == [
        "| images | fid (inception) | clip |",
        "| --- | --- | --- |",
        "| v1 scale=7.5 | 5 (2 to 4) |  |",
        "| b |  | 30 |",
    ]
    assert as_csv(merged).splitlines()[1].startswith("a,fid,5.0,2.0,4.0,10,v1,scale=7.5,inception,abc,clean")
    (tmp_path / "results.jsonl").write_text(json.dumps({"metric": "fid"}) + "\n")
    with pytest.raises(InputError, match="line 1 is not a result"):
        read_results(tmp_path / "results.jsonl")
