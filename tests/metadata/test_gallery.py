"""The page of a run: complete, escaped, and with one script, which a real browser runs and no other."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
from PIL import Image

from ldm.images.writer import encode_png
from ldm.job import Job
from ldm.metadata.infotext import infotext
from ldm.metadata.read import Recipe
from ldm.metadata.record import record
from ldm.runs.gallery import gallery
from ldm.util import InputError
from tests.support.metadata import HOSTILE

HANDLER = "' onmouseover='x"
ATTACKS = [
    *HOSTILE,
    "</p></figure><script>document.title='owned'</script>",
    '"><img src=x onerror="document.title=\'owned\'">',
    HANDLER,
    "</script></style><svg onload=document.title='owned'>",
    "<!-- <![CDATA[ ]]> --> &lt;b&gt; &#60; &amp",
    "javascript:alert(1)",
    "{{constructor}} ${1} `x`",
]
NAMES = ["'\"><script>.png", "a b%20#?&.png", "日本.PNG", "\x1b[31m.png", "..png", "&lt;.png"]
EXPECTED_TAGS = {
    "html", "head", "meta", "title", "style", "body", "header", "input", "output", "main", "figure", "a", "img",
    "figcaption", "p", "code", "button", "details", "summary", "script",
}  # fmt: skip
EXPECTED_ATTRIBUTES = {
    "lang", "charset", "http-equiv", "content", "name", "id", "type", "placeholder", "autocomplete", "href", "src",
    "width", "height", "alt", "aria-label", "loading", "class", "dir",
}  # fmt: skip


class Page(HTMLParser):
    """The content of a page: tags with attributes, and the texts of elements by tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)
        self.texts.setdefault(tag, []).append("")

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]][-1] += data

    def handle_endtag(self, tag: str) -> None:
        while self.open.pop() != tag:
            pass

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def picture(path: Path, job: Job | None, colour: tuple[int, int, int] = (200, 30, 60)) -> None:
    pixels = np.full((64, 64, 3), colour, np.uint8)
    text, note = (infotext(job, {}), record(job, {})) if job else ("", "")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(encode_png(pixels, text, record=note))


def command(recipe: Recipe) -> str:
    return f"make {recipe.job.seed} <{recipe.job.prompt!r}>"


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder whose prompts and file names are attacks."""
    folder = tmp_path_factory.mktemp("run")
    for i, prompt in enumerate(ATTACKS):
        picture(
            folder / f"samples/{i:05d}.png",
            Job(prompt, negative_prompt=prompt, seed=i, width=512, height=512),
        )
    for name in NAMES:
        picture(folder / "samples" / name, Job(name, width=512, height=512))
    (folder / "samples/broken.png").write_bytes(b"<script>")
    picture(folder / "samples/silent.png", None)
    return folder


def test_nothing_but_the_page_s_own_tags(attacked: Path) -> None:
    text = gallery(attacked, command)
    text.encode("utf-8")
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
    page = Page(text)
    assert {tag for tag, _ in page.tags} == EXPECTED_TAGS
    assert {name for _, attributes in page.tags for name in attributes} <= EXPECTED_ATTRIBUTES
    count = len(ATTACKS) + len(NAMES) + 2
    assert [len(page.all(tag)) for tag in ("script", "style", "img", "figure")] == [1, 1, count, count]


def test_every_prompt_can_be_read_and_copied(attacked: Path) -> None:
    page = Page(gallery(attacked, command))
    plain = [prompt for prompt in ATTACKS if prompt.isprintable() and prompt]
    assert set(plain) <= set(page.texts["p"])
    for i, prompt in enumerate(ATTACKS):
        if prompt.isprintable():
            assert f"make {i} <{prompt!r}>" in page.texts["code"]


def test_sources_are_relative_and_exact(attacked: Path) -> None:
    page = Page(gallery(attacked, command))
    sources = [attributes["src"] or "" for attributes in page.all("img")]
    assert all(re.fullmatch("samples/[A-Za-z0-9_.~%-]+", source) for source in sources)
    found = {unquote_to_bytes(source.removeprefix("samples/")) for source in sources}
    assert found == {os.fsencode(name) for name in os.listdir(attacked / "samples")}
    assert [attributes["href"] for attributes in page.all("a")] == sources


def test_the_policy_allows_the_page_s_own_script_and_style_only(attacked: Path) -> None:
    page = Page(gallery(attacked, command))
    (policy,) = [
        a["content"] or "" for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert (rules["default-src"], rules["img-src"]) == ("'none'", "'self'")
    for tag in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(page.texts[tag][0].encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"


def test_pictures_stand_by_number(tmp_path: Path) -> None:
    for name in ("100000.png", "99999.png", "00002.png"):
        picture(tmp_path / "samples" / name, Job("x", width=512, height=512))
    (tmp_path / "samples/notes.txt").write_text("no picture")
    sources = [attributes["src"] for attributes in Page(gallery(tmp_path, command)).all("img")]
    assert sources == ["samples/00002.png", "samples/99999.png", "samples/100000.png"]


def test_odd_numbers_do_no_harm(tmp_path: Path) -> None:
    picture(tmp_path / "samples/0.png", None)
    text = "x\nSteps: 20, Sampler: PLMS, CFG scale: inf, Seed: 1, Size: 9999999x8, Hires upscale: 1e999"
    (tmp_path / "samples/1.png").write_bytes(encode_png(np.zeros((8, 8, 3), np.uint8), text))
    assert "Hires upscale cannot be" in gallery(tmp_path, lambda recipe: "")


def test_folders_without_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        gallery(tmp_path, command)
    (tmp_path / "samples").mkdir()
    with pytest.raises(InputError, match="no images"):
        gallery(tmp_path, command)


# --- in a browser ----------------------------------------------------------------------------------------------

BROWSERS = (
    "chromium-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
)
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), "")
in_a_browser = pytest.mark.skipif(
    not BROWSER, reason="needs Chromium: apt-get install chromium-headless-shell"
)


def browse(page: Path, profile: Path, fragment: str, *options: str) -> str:
    """The document as the browser has it when its scripts have run."""
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=2000",
        f"--user-data-dir={profile}",
    ]
    run = subprocess.run(
        [BROWSER, *flags, *options, page.as_uri() + fragment], capture_output=True, timeout=600, check=True
    )
    return run.stdout.decode("utf-8", "replace")


@in_a_browser
def test_a_browser_runs_the_page_s_script_and_no_other(attacked: Path, tmp_path: Path) -> None:
    path = attacked / "gallery.html"
    attack = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"
    path.write_text(gallery(attacked, command).replace("</main>", f"</main>{attack}"), encoding="utf-8")
    page = Page(browse(path, tmp_path, "#onmouseover%20javascript", "--dump-dom"))
    count = len(ATTACKS) + len(NAMES) + 2
    assert page.texts["title"] == [f"{count} images"]
    assert page.texts["output"] == [f"0 of {count}"]
    page = Page(browse(path, tmp_path, "#onMOUSEover%20seed", "--dump-dom"))
    assert page.texts["output"] == [f"1 of {count}"]
    hidden = ["hidden" in attributes for attributes in page.all("figure")]
    assert hidden.count(False) == 1
    images = page.all("img")[:count]  # the last one is the attack's
    (shown,) = [image["src"] for image, away in zip(images, hidden, strict=True) if not away]
    assert shown == f"samples/{ATTACKS.index(HANDLER):05d}.png"


@in_a_browser
def test_a_browser_shows_the_pictures(tmp_path: Path) -> None:
    picture(tmp_path / "samples/a b#%41.png", Job("x", width=512, height=512), colour=(255, 0, 128))
    path = tmp_path / "gallery.html"
    path.write_text(gallery(tmp_path, command), encoding="utf-8")
    shot = tmp_path / "shot.png"
    browse(path, tmp_path / "profile", "", f"--screenshot={shot}", "--window-size=600,500")
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert (pixels == (255, 0, 128)).all(axis=1).sum() > 10_000


def test_a_recipe_of_another_program_is_shown(tmp_path: Path) -> None:
    picture(tmp_path / "samples/0.png", Job("ours", width=512, height=512))
    text = "theirs\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 64x64, Model: v1-5"
    (tmp_path / "samples/1.png").write_bytes(encode_png(np.zeros((8, 8, 3), np.uint8), text))
    page = Page(gallery(tmp_path, lambda recipe: recipe.source))
    assert page.texts["code"] == ["ldm", "A1111"]
    assert "theirs" in page.texts["p"]
