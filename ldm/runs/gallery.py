"""A page that shows a run's images and how each was made: one file, offline, safe for any text in the prompts."""

from __future__ import annotations

import base64
import hashlib
import logging
import os
from collections.abc import Callable
from html import escape
from pathlib import Path
from urllib.parse import quote

from ldm.files import open_regular
from ldm.metadata.read import Recipe, read_job
from ldm.runs.hints import HINTS, hint_files
from ldm.util import InputError, printable

logger = logging.getLogger("ldm")

GALLERY_MARK = "<!-- written by ldm -->\n"
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")

_STYLE = """
:root { color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif; scroll-padding-top: 4rem; }
body { margin: 0; }
header { display: flex; align-items: center; gap: .8rem; padding: .6rem 1rem; border-bottom: 1px solid #8886; }
header { position: sticky; top: 0; z-index: 1; background: Canvas; }
input { font: inherit; flex: 0 1 30rem; min-width: 0; padding: .2rem .4rem; }
::placeholder { color: inherit; opacity: .7; }
output { white-space: nowrap; }
main { display: grid; gap: 1.5rem 1rem; padding: 1rem; align-items: start; }
main { grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); }
figure { margin: 0; min-width: 0; }
figure[hidden] { display: none; }
a { display: block; }
a.hint { display: inline-block; width: 4rem; margin: .3rem .3rem 0 0; }
img { width: 100%; height: auto; display: block; background: #8884; }
p { margin: .3rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
p { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 4; overflow: hidden; }
figure:has(details[open]) p { display: block; }
.negative, .settings, .file, summary { color: color-mix(in srgb, CanvasText 70%, Canvas); font-size: .85rem; }
code { display: block; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem; }
code { margin-top: .3rem; padding: .4rem; background: #8882; }
summary { padding: .3rem 0; cursor: pointer; }
button { font: inherit; font-size: .85rem; min-width: 9rem; cursor: pointer; float: right; }
"""

# The fragment of the address is the filter too, so that a search can be bookmarked.
_SCRIPT = """
"use strict";
const filter = document.getElementById("filter");
const count = document.getElementById("count");
const figures = [...document.querySelectorAll("figure")];
const texts = figures.map((figure) =>
  Array.from(figure.querySelectorAll("p"), (p) => p.textContent.toLowerCase()).join("\\n"));
function show() {
  const words = filter.value.toLowerCase().split(/\\s+/).filter(Boolean);
  figures.forEach((figure, i) => { figure.hidden = !words.every((word) => texts[i].includes(word)); });
  count.textContent = `${figures.filter((figure) => !figure.hidden).length} of ${figures.length}`;
}
function readAddress() {
  try { filter.value = decodeURIComponent(location.hash.slice(1)); } catch { filter.value = ""; }
  show();
}
async function copy(button) {
  const details = button.nextElementSibling;
  const code = details.querySelector("code");
  let copied = true;
  try { await navigator.clipboard.writeText(code.textContent); } catch {
    details.open = true;
    getSelection().selectAllChildren(code);
    copied = document.execCommand("copy");
  }
  button.textContent = copied ? "copied" : "selected: press Ctrl+C";
  setTimeout(() => { button.textContent = "copy command"; }, 3000);
}
filter.addEventListener("input", show);
filter.addEventListener("change", () => history.replaceState(null, "", `#${encodeURIComponent(filter.value)}`));
addEventListener("hashchange", readAddress);
document.addEventListener("click", (event) => { if (event.target.matches("button")) copy(event.target); });
readAddress();
"""


Words = Callable[[Recipe], str]


def gallery(folder: str | Path, command: Words, remark: Words = lambda recipe: "") -> str:
    """Returns the HTML of a page in `folder` that shows the images of its folder `samples`, by number.

    `command` returns the command line that makes an image, and `remark` what may differ then. The content security
    policy of the page allows images of its origin, its inline style and script, and nothing else. Texts are escaped
    for HTML, and controls in them shown as escapes. Raises InputError if there are no images.
    """
    samples = Path(folder) / "samples"
    try:
        names = [name for name in os.listdir(samples) if name.lower().endswith(_ENDINGS)]
    except OSError as error:
        raise InputError(
            f"{printable(samples)} cannot be read: {error.strerror}; give a run's folder"
        ) from None
    if not names:
        raise InputError(f"{printable(samples)} holds no images; give a run's folder")
    names.sort(key=lambda name: (len(name), name))  # 99999.png comes before 100000.png
    figures = "\n".join(_figure(samples / name, command, remark) for name in names)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_policy()}">
<meta name="viewport" content="width=device-width">
<meta name="referrer" content="no-referrer">
<title>{len(names)} images</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<input id="filter" type="search" aria-label="filter" placeholder="words of a prompt, a seed" autocomplete="off">
<output id="count">{len(names)} images</output></header>
<main>
{figures}
</main>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _policy() -> str:
    style, script = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (_STYLE, _SCRIPT)
    )
    return (
        f"default-src 'none'; img-src 'self'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _figure(path: Path, command: Words, remark: Words) -> str:
    source, name = "samples/" + quote(os.fsencode(path.name)), _shown(path.name)
    sides = ""
    try:
        recipe = read_job(str(path))
    except InputError as error:
        caption = f'<p class="settings">{_shown(str(error))}</p>'
    else:
        caption = _caption(recipe, command(recipe), remark(recipe))
        sides = (
            f' width="{recipe.job.width}" height="{recipe.job.height}"'  # room for it before it has loaded
        )
    return (
        f'<figure><a href="{source}"><img src="{source}"{sides} alt="{name}" loading="lazy"></a>{_hints(path)}'
        "<figcaption>\n"
        f'<p class="file">{name}</p>\n{caption}</figcaption></figure>'
    )


def _hints(path: Path) -> str:
    """The saved hints of an image, small."""
    sources = [f"{HINTS}/{quote(os.fsencode(hint.name))}" for hint in hint_files(path)]
    links = (f'<a class="hint" href="{s}"><img src="{s}" alt="hint" loading="lazy"></a>' for s in sources)
    return "".join(links)


def _caption(recipe: Recipe, command: str, remark: str) -> str:
    job = recipe.job
    size = f"{job.width}x{job.height}" + (f" times {job.upscale:g}" if job.upscale != 1 else "")
    settings = (
        f"seed {job.seed}, {job.steps} steps of {job.sampler}, scale {job.scale:g}, {size}, {recipe.model}"
    )
    remark = f'<p class="settings">{_shown(remark)}</p>' if remark else ""
    negative = f'<p class="negative" dir="auto">negative prompt: {_shown(job.negative_prompt)}</p>\n'
    return (
        f'<p class="prompt" dir="auto">{_shown(job.prompt)}</p>\n'
        f"{negative if job.negative_prompt else ''}"
        f'<p class="settings">{_shown(settings.removesuffix(", "))}</p>\n'
        '<button type="button">copy command</button>'
        f"<details><summary>details</summary><code>{_shown(command)}</code>{remark}</details>"
    )


def _shown(text: str) -> str:
    """Escapes a text for HTML; its lines stay lines, and other controls are shown as escapes."""
    return "\n".join(escape(printable(line)) for line in text.split("\n"))


def write_gallery(folder: Path) -> None:
    """Writes gallery.html; replaces only a gallery of this toolkit."""
    from ldm.images.writer import publish
    from ldm.metadata.command import command_alone, remark_alone

    path = folder / "gallery.html"
    if os.path.lexists(path) and not _is_own_page(path):
        logger.warning("%s was not written by this tool and is left alone", printable(path))
        return
    text = gallery(folder, command_alone, remark_alone) + GALLERY_MARK
    publish(path, text.encode("utf-8", "backslashreplace"), overwrite=True)


def _is_own_page(path: Path) -> bool:
    """Returns whether a file ends like the galleries written here."""
    mark = GALLERY_MARK.encode()
    try:
        with open_regular(path) as file:
            file.seek(-len(mark), os.SEEK_END)
            return file.read(len(mark)) == mark
    except (OSError, InputError):
        return False
