"""The tasks of `evaluate.py`: run, score, plot and compare, and how they refuse."""

import json
import re

import numpy as np
import pytest
from PIL import Image

import scripts.evaluate as evaluate
from ldm.evaluation.experiment import Variant, plan_points, read_evaluation
from ldm.evaluation.images import folder_set, jobs_of
from ldm.evaluation.plots import makes_a_curve
from ldm.evaluation.prompts import Question, read_questions, subset
from ldm.evaluation.results import read_results
from ldm.util import InputError
from tests.support.paths import tree

TINY = ["--", "--ddim_steps", "1", "--W", "64", "--H", "64", "--n_samples", "2", "--device", "cpu"]
MEASURES = [
    "--few",
    "--resamples",
    "4",
    "--no_cache",
    "--against",
    "scenes:3",
    "--device",
    "cpu",
    "--size",
    "64",
    "--quiet",
]
COCO = {
    "annotations": [
        {"id": 7, "image_id": 1, "caption": " a dog\n runs"},
        {"id": 3, "image_id": 2, "caption": "a cat"},
    ]
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys, *words):
    try:
        code = evaluate.main([*words, "--quiet"])
    except SystemExit as left:
        code = left.code
    lines = capsys.readouterr().err.replace("no GPU found; using the CPU\n", "").splitlines()
    assert code == 2 and len(lines) == 1
    return lines[0]


@pytest.mark.slow
def test_a_run_is_made_scored_continued_and_extended(here, capsys):
    command = ["run", "--count", "3", "--sweep", "scale=1,5", "--outdir", "e", *MEASURES]
    assert evaluate.main([*command, *TINY]) == 0
    before = tree(here / "e/model")
    assert sorted(name for name in before if name.endswith("png")) == [
        f"scale={scale}/samples/0000{i}.png" for scale in (1, 5) for i in range(3)
    ]
    results = read_results(here / "e/results.jsonl")
    assert [(one.metric, one.settings) for one in results] == [
        (metric, {"scale": scale}) for scale in (1.0, 5.0) for metric in ("fid", "answers")
    ]
    assert re.fullmatch(r"shapes \[[0-9a-f]{10,64}\]", results[0].model)
    assert results[0].command and results[0].versions["torch"] and results[0].resize == "cut to 64, area"
    # image i is of prompt i with the seed 42 + i, the same at each point
    prompts = [question.prompt for question in read_questions(here / "e/questions.jsonl")]
    for point in read_evaluation(here / "e").points:
        jobs = jobs_of(folder_set(here / "e" / point.folder))
        assert [(job.prompt, job.seed, job.scale) for job in jobs] == [
            (prompt, 42 + i, point.settings["scale"]) for i, prompt in enumerate(prompts)
        ]
    (here / "e/model/scale=5/samples/00001.png").unlink()
    assert evaluate.main([*command, "--no_score", *TINY]) == 0
    assert tree(here / "e/model") == before
    extended = ["run", "--count", "3", "--sweep", "scale=2", "--outdir", "e", "--no_score", "--quiet", *TINY]
    assert evaluate.main(extended) == 0
    assert [point.settings["scale"] for point in read_evaluation(here / "e").points] == [1, 5, 2]
    capsys.readouterr()
    (here / "e/model/scale=2/samples/00002.png").unlink()
    assert "e/model/scale=2 has 2 images for 3 prompts; make the rest" in refused(
        capsys, "score", "e", "--few", "--no_cache"
    )
    assert "is an evaluation with 3 other prompts" in refused(
        capsys, "run", "--count", "4", "--outdir", "e", *TINY[:0]
    )


@pytest.mark.slow
def test_two_sets_of_options_are_compared(here, capsys):
    words = [
        "compare",
        "a: --seed 1",
        "b: --seed 2",
        "twice: --seed 1 --steps 4",
        "--count",
        "2",
        "--outdir",
        "c",
        *MEASURES[:4],
        *MEASURES[6:],
    ]
    assert evaluate.main([*words, *TINY]) == 0
    found = {(one.images_of, one.metric): one for one in read_results(here / "c/results.jsonl")}
    assert found["a and b", "psnr"].value < 40 and found["a and b", "answers difference"].images == 2
    difference = found["b", "answers"].value - found["a", "answers"].value
    assert found["a and b", "answers difference"].value == pytest.approx(difference)
    assert Image.open(here / "c/pairs-b.png").size[0] > 128
    right = found["b", "right"].value - found["a", "right"].value
    assert found["a and b", "right difference"].value == pytest.approx(right)
    for name in ("b", "twice"):
        share = found[name, "seconds"].value / found["a", "seconds"].value
        assert found[f"a and {name}", "share of time"].value == pytest.approx(share)
    assert found["a and twice", "share of time"].value > 1.2
    before = (here / "c/a/seconds.json").read_text()
    assert evaluate.main([*words, *TINY]) == 0  # nothing is missing, so nothing is timed
    assert (here / "c/a/seconds.json").read_text() == before
    assert evaluate.main(["compare", "c/a", "c/a", "--outdir", "same", *MEASURES[:4], *MEASURES[6:]]) == 0
    same = {one.metric: one.value for one in read_results(here / "same/results.jsonl")}
    assert (same["psnr"], same["ssim"]) == (100, pytest.approx(1))


def test_a_plot_has_a_curve_for_each_variant(here, capsys):
    pytest.importorskip("matplotlib")
    rows = [
        {"images_of": f"{v}/{s}", "metric": m, "value": x, "low": x - 1, "high": x + 1, "images": 9, "variant": v,
         "settings": {"scale": s}}
        for v in ("one", "two") for s, y, z in ((1.5, 20.0, 10.0), (3.0, 12.0, 14.0), (8.0, 15.0, 16.0))
        for m, x in (("fid", y), ("clip", z))
    ]  # fmt: skip
    (here / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    results = read_results(here / "results.jsonl")
    assert makes_a_curve(results) and not makes_a_curve([one for one in results if one.metric == "fid"])
    assert evaluate.main(["plot", ".", "--out", "p", "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["p.png", "p.svg"] + [
        f"{name}: the lowest fid is 12 at 3, where clip is 14" for name in ("two", "one")
    ]
    assert Image.open("p.png").size == (600, 420)
    text = (here / "p.svg").read_text()
    assert text.count("<svg") == 1 and "CLIP score" in text
    assert "no images have both answers and fid" in refused(capsys, "plot", ".", "--x", "answers")


def test_without_matplotlib_a_plot_names_the_extra(here, monkeypatch, capsys):
    import sys

    row = {"images_of": "a", "value": 1.0, "low": None, "high": None, "images": 9}
    (here / "results.jsonl").write_text(
        "".join(json.dumps({**row, "metric": m}) + "\n" for m in ("fid", "clip"))
    )
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_svg", None)
    assert "plots need matplotlib: pip install" in refused(capsys, "plot", ".")


def test_captions_of_coco_are_read_in_the_order_of_their_ids(tmp_path):
    (tmp_path / "captions_val2017.json").write_text(json.dumps(COCO))
    found = read_questions(tmp_path / "captions_val2017.json")
    assert [question.prompt for question in found] == ["a cat", "a dog runs"]


def test_a_subset_is_drawn_alike_everywhere_and_without_repetition():
    questions = [Question(str(i)) for i in range(100)]
    drawn = [int(question.prompt) for question in subset(questions, 10, 5)]
    # numpy's generator is stable across machines and versions: these are its numbers
    assert drawn == sorted(np.random.default_rng(5).permutation(100)[:10].tolist())
    assert drawn != [int(question.prompt) for question in subset(questions, 10, 6)]
    assert subset(questions, None, 0) == questions


def test_points_are_all_combinations_with_the_options_of_their_variant():
    points = plan_points(
        [Variant.parse("a: --ckpt x.ckpt"), Variant.parse("--lora 'my ink.pt:0.5'")],
        ["scale=1,2.5", "steps=4"],
    )
    assert [(point.folder, point.options) for point in points[1:3]] == [
        ("a/scale=2.5,steps=4", ("--ckpt", "x.ckpt", "--scale=2.5", "--ddim_steps=4")),
        ("lora my ink.pt-0.5/scale=1,steps=4", ("--lora", "my ink.pt:0.5", "--scale=1", "--ddim_steps=4")),
    ]
    with pytest.raises(InputError, match="two variants have the same name"):
        plan_points([Variant("a"), Variant("a")], [])
    with pytest.raises(InputError, match="--sweep seed cannot be a setting"):
        plan_points([Variant("a")], ["seed=1,2"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--preset", "card"], "--preset card needs the prompts: give COCO's captions_val2017.json"),
        (["run", "--prompts", "none.json"], "none.json does not exist"),
        (["run", "--prompts", "bad.json"], "bad.json is not a file of COCO's captions (KeyError: 'annotations')"),
        (["run", "--prompts", "bad.jsonl"], "bad.jsonl, line 1: include holds {'count': 1}; write"),
        (["run", "--prompts", "coco.json", "--count", "5"], "--count is 5, and there are 2 prompts; give 1 to 2"),
        (["run", "--count", "0"], "--count is 0; give 1 or more"),
        (["run", "--variant", "a: "], "--variant a:  has no options; write one such as"),
        (["run", "--variant", "a: 'x"], "--variant a: 'x: No closing quotation; close its quotes"),
        (["run", "--variant", "b: --steps 5", "--variant", "a: --sampler ddim --plms"],
         "a/scale=1.5: --plms and --sampler ddim contradict"),
        (["compare", "a: --steps 5", "b: --lora none.safetensors"], "b: none.safetensors does not exist"),
        (["run", "--sweep", "scales=1"], "--sweep scales=1 names no setting"),
        (["run", "--sweep", "scale=1", "--outdir", "broken"], "broken/evaluation.json is damaged"),
        (["score", "none"], "the folder of images none does not exist"),
        (["score", "mixed", "--metrics", "clip"], "a.png: holds no generation settings"),
        (["score", "mixed", "--network", "clip", "--against", "mixed", "--clip", "."], ". cannot be used"),
        (["score", "."], "fid compare with references: give a folder or a .npz file with --against"),
        (["score", ".", "--resamples", "-1"], "--resamples is -1; give 0 or more"),
        (["plot", "broken"], "broken has no results.jsonl; run `evaluate.py score broken`"),
        (["compare", "mixed", "a: --seed 1"], "mixed and a: --seed 1: give folders alone, or sets of options alone"),
        (["compare", "mixed", "mixed", "--metrics", "fid"], "--metrics fid: pairs have psnr, ssim, lpips"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_mistakes_are_one_line(here, capsys, words, message):
    (here / "bad.json").write_text("{}")
    (here / "bad.jsonl").write_text('{"prompt": "x", "include": [{"count": 1}]}\n')
    (here / "coco.json").write_text(json.dumps(COCO))
    (here / "config.json").write_text("{}")
    (here / "broken").mkdir()
    (here / "broken/evaluation.json").write_text("{")
    (here / "mixed").mkdir()
    Image.new("RGB", (8, 8)).save(here / "mixed/a.png")
    assert message in refused(capsys, *words)


@pytest.mark.slow
def test_images_of_two_settings_are_not_one_set(here):
    words = ["--count", "1", "--sweep", "scale=1,5", "--outdir", "e", "--no_score", "--quiet"]
    assert evaluate.main(["run", *words, *TINY]) == 0
    with pytest.raises(
        InputError, match=r"was made with other settings than 00000\.png: scale 1 and 5; give the folder"
    ):
        jobs_of(folder_set(here / "e"))
    assert [job.scale for job in jobs_of(folder_set(here / "e"), mixed=True)] == [1, 5]
