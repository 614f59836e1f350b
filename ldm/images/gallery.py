"""A page that shows a run's pictures and how each was made: one file, offline, safe whatever the prompts say."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable
from html import escape
from pathlib import Path
from urllib.parse import quote

from ldm.images.foreign import Recipe, read_job
from ldm.util import InputError, printable

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")

_STYLE = """
:root { color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif; }
body { margin: 0; }
header { position: sticky; top: 0; padding: .6rem 1rem; background: Canvas; border-bottom: 1px solid GrayText; }
input { font: inherit; width: min(30rem, 60vw); padding: .2rem .4rem; }
main { display: grid; gap: 1rem; padding: 1rem; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); }
figure { margin: 0; min-width: 0; }
figure[hidden] { display: none; }
img { width: 100%; height: auto; display: block; background: #8884; }
p { margin: .3rem 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 8rem; overflow: auto; }
.negative, .settings, .file { color: GrayText; font-size: .85rem; }
code { display: block; overflow: auto; white-space: pre; font-size: .8rem; padding: .3rem; background: #8882; }
button { font: inherit; margin-top: .3rem; }
"""

# The part of the address behind # is a filter as well, so that a search can be bookmarked.
_SCRIPT = """
"use strict";
const figures = [...document.querySelectorAll("figure")];
const filter = document.getElementById("filter");
function show() {
  const words = filter.value.toLowerCase().split(/\\s+/).filter(Boolean);
  for (const figure of figures) {
    const text = figure.textContent.toLowerCase();
    figure.hidden = !words.every((word) => text.includes(word));
  }
  const shown = figures.filter((figure) => !figure.hidden).length;
  document.getElementById("count").textContent = `${shown} of ${figures.length}`;
}
async function copy(button) {
  const code = button.parentElement.querySelector("code");
  getSelection().selectAllChildren(code);
  try { await navigator.clipboard.writeText(code.textContent); } catch { document.execCommand("copy"); }
  button.textContent = "copied";
}
filter.addEventListener("input", show);
document.addEventListener("click", (event) => { if (event.target.matches("button")) copy(event.target); });
try { filter.value = decodeURIComponent(location.hash.slice(1)); } catch { filter.value = ""; }
show();
"""


def gallery(folder: str | Path, command: Callable[[Recipe], str]) -> str:
    """The HTML text of a page that lies in `folder` and shows the pictures of its folder `samples`, by number.

    `command` says how a picture is made again, as a line that can be pasted. The page loads pictures from its own
    place and nothing else, and runs no script but its own (its content security policy says so). Texts are
    escaped for HTML, and controls in them shown as escapes. Raises InputError if there are no pictures.
    """
    samples = Path(folder) / "samples"
    try:
        names = [name for name in os.listdir(samples) if name.lower().endswith(_ENDINGS)]
    except OSError as error:
        raise InputError(
            f"{printable(samples)} cannot be read: {error.strerror}; give a run's folder"
        ) from None
    if not names:
        raise InputError(f"{printable(samples)} holds no pictures; give a run's folder")
    names.sort(key=lambda name: (len(name), name))  # 99999.png comes before 100000.png
    figures = "\n".join(_figure(samples / name, command) for name in names)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_policy()}">
<meta name="viewport" content="width=device-width">
<meta name="referrer" content="no-referrer">
<title>{len(names)} pictures</title>
<style>{_STYLE}</style>
</head>
<body>
<header><input id="filter" type="search" placeholder="words of a prompt, a seed" autocomplete="off">
<output id="count">{len(names)} pictures</output></header>
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


def _figure(path: Path, command: Callable[[Recipe], str]) -> str:
    source = "samples/" + quote(os.fsencode(path.name))
    try:
        recipe = read_job(str(path))
    except InputError as error:
        caption = f'<p class="settings">{_shown(str(error))}</p>'
    else:
        caption = _caption(recipe, command(recipe))
    return (
        f'<figure><a href="{source}"><img src="{source}" alt="" loading="lazy"></a><figcaption>\n'
        f'<p class="file">{_shown(path.name)}</p>\n{caption}</figcaption></figure>'
    )


def _caption(recipe: Recipe, command: str) -> str:
    job = recipe.job
    size = f"{job.width}x{job.height}" + (f" times {job.upscale:g}" if job.upscale != 1 else "")
    settings = (
        f"seed {job.seed}, {job.steps} steps of {job.sampler}, scale {job.scale:g}, {size}, {recipe.model}"
    )
    negative = f'<p class="negative" dir="auto">without: {_shown(job.negative_prompt)}</p>\n'
    return (
        f'<p class="prompt" dir="auto">{_shown(job.prompt)}</p>\n'
        f"{negative if job.negative_prompt else ''}"
        f'<p class="settings">{_shown(settings.removesuffix(", "))}</p>\n'
        f'<code>{_shown(command)}</code><button type="button">copy the command</button>'
    )


def _shown(text: str) -> str:
    """A text for HTML; its lines stay lines, and other controls are shown as escapes."""
    return "\n".join(escape(printable(line)) for line in text.split("\n"))
