"""Normalises the entries of infotexts, which programs and people write under various names."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping

from ldm.metadata.infotext import JOB_KEYS, NEGATIVE

# entries that change nothing, or that are read; all others without a field of the job are noted
SILENT = {
    "Version", "User", "Model", "Model hash", "Schedule type", "Lora hashes", "TI hashes", "Hashes", "Lora weights",
    "Embeddings", "Used embeddings", "Guidance", "Batch size", "Batch pos", "Batch", "Index", "App", "Operations",
    "Pipeline", "Backend", "SDCPP", "Civitai resources", "Civitai metadata", "Hires size-1", "Hires size-2",
    "Second pass", "Refine", "Init image size-1", "Init image size-2", "Created Date", "Time taken", "VAE hash",
    "Raw prompt", "Raw negative prompt", "Performance", "Template", "Negative Template",
    "HiRes mode", "Hires force", "Seed Mode",
}  # fmt: skip
HARMLESS = {
    ("Emphasis", "Original"), ("Emphasis", "None"), ("Parser", "A1111"),
    ("Variation seed strength", "0"), ("FP8 weight", "Disable"), ("VAE Encoder", "Full"), ("VAE Decoder", "Full"),
    ("Mask mode", "Inpaint masked"), ("Schedule max sigma", "0"), ("Schedule min sigma", "0"), ("Schedule rho", "0"),
    ("Diffusion in Low Bits", "Automatic"),
    ("Parser", "Full parser"),
}  # fmt: skip
NOTHING = {"", "none", "false", "automatic", "use same sampler", "use same scheduler", "use same checkpoint",
            "use same choices", "0x0", "-1x-1"}  # fmt: skip
FOREIGN_KEYS = JOB_KEYS & {
    "Prompt", "Negative prompt", "Steps", "Sampler", "CFG scale", "Seed", "Size-1", "Size-2", "Eta DDIM", "RNG",
    "Denoising strength", "Hires upscale", "Hires upscaler", "Loras", "Clip skip",
    "ENSD", "Sigma noise", "Sigma churn", "Image CFG scale",
}  # fmt: skip

# The name of an entry here, by its name in lower case with letters and digits only
SPELLINGS = {re.sub("[^a-z0-9]", "", name.lower()): name for name in (
    *SILENT, *FOREIGN_KEYS, *(name for name, _ in HARMLESS), "Size", "Eta", "VAE", "Hires resize", "Hires fixed",
    "Hires scale", "Hires steps", "Hires strength", "Hires size", "Hires force", "First pass size", "Init image hash",
    "Init image size", "Mask blur", "Masked content", "Inpaint area", "Masked area padding", "Mask weight",
    "Image CFG scale", "Variation seed",
) if not name.endswith(("-1", "-2"))} | {
    "cfg": "CFG scale", "guidancescale": "CFG scale", "samplingsteps": "Steps", "numinferencesteps": "Steps",
    "samplername": "Sampler", "samplingmethod": "Sampler", "scheduler": "Schedule type", "width": "Size-1",
    "height": "Size-2", "denoise": "Denoising strength", "strength": "Denoising strength",
    "checkpoint": "Model", "hiresfactor": "Hires upscale", "hiresdenoisingstrength": "Hires strength",
    "etanoiseseeddelta": "ENSD", "samplerensd": "ENSD", "sampleretadelta": "ENSD", "variationstrength":
    "Variation seed strength",
}  # fmt: skip
_SIZE = re.compile(r"\(?\s*([0-9]{1,5})\s*[x×*,]\s*([0-9]{1,5})\s*\)?")
_NEGATIVE_FIRST = re.compile(r"(?im)^[^\S\n]*negative[ _]prompt:[^\S\n]*")
_NEGATIVE_WITHIN = re.compile(r"(?i)[\s,.]negative[ _]prompt:\s*")
_NEGATIVE_AFTER_STOP = re.compile(r"(?i)[,.]\s?negative[ _]prompt:\s*")
_STEPS_FIRST = re.compile(r"(?im)^[^\S\n]*(?:\w[\w ]{1,20}:[^\n:]*[,|][^\S\n]*)*(?:sampling )?steps:")
_STEPS_WITHIN = re.compile(r"(?i)[\s,.](?=steps: ?[0-9]+[,|])")
_SETTING = re.compile(r"\b(?:Seed|Sampler|CFG scale|Size|Model):", re.IGNORECASE)
_USED = re.compile(r"(?m)^(Used embeddings): ([^\"\n]+)$")  # a separate line after the settings, unquoted


def tidy(text: str) -> str:
    """Returns `text` with the web UI's line ends and stripped lines, and each part on separate lines."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "").strip()
    within = None if _STEPS_FIRST.search(text) else _STEPS_WITHIN.search(text, text.rfind("\n") + 1)
    if within and not _SETTING.search(text, text.rfind("\n") + 1, within.start()):
        # some programs write one line, with or without full stops between the parts
        prompts = _NEGATIVE_WITHIN.split(text[: within.start()], maxsplit=1)
        text = "\n".join(
            [f"\n{NEGATIVE} ".join(part.rstrip(" ,.") for part in prompts), text[within.end() :]]
        )
    elif not _NEGATIVE_FIRST.search(text):
        prompt, *rest = _NEGATIVE_AFTER_STOP.split(text, maxsplit=1)
        text = f"\n{NEGATIVE} ".join([prompt.rstrip(",.") if rest else prompt, *rest])
    text = "\n".join(line.strip() for line in _NEGATIVE_FIRST.sub(f"{NEGATIVE} ", text).split("\n"))
    return _USED.sub(lambda used: f"{used[1]}: {json.dumps(used[2])}", text)


def named_entries(entries: Mapping[str, str]) -> dict[str, str]:
    """Returns the entries under the web UI's names, whatever their case; a size is split into its sides."""
    named: dict[str, str] = {}
    for key, value in entries.items():
        name, side = (key[:-2], key[-2:]) if key.endswith(("-1", "-2")) else (key, "")
        name = SPELLINGS.get(re.sub("[^a-z0-9]", "", name.lower()), name) + side
        if name == key or name not in entries:
            named[name] = value
    if size := _SIZE.fullmatch(named.get("Size", "")):
        del named["Size"]
        named |= {"Size-1": size[1], "Size-2": size[2]}
    for key in ("Seed", "Steps", "Size-1", "Size-2"):
        if re.fullmatch(r"-?[0-9]+\.0+", named.get(key, "")):
            named[key] = named[key].partition(".")[0]
    for key in FOREIGN_KEYS - {"Prompt", "Negative prompt"}:
        if named.get(key, "").lower() == "none":  # programs write these for settings that are not set
            del named[key]
    named["Prompt"] = named["Prompt"].strip()
    named["Negative prompt"] = re.sub(f"(?m)^{NEGATIVE} ?", "", named["Negative prompt"]).strip()
    return named


def positive(text: str) -> float:
    """Returns the number in a text if it is above 0, else 0."""
    try:
        number = float(text)
    except ValueError:
        return 0.0
    return number if math.isfinite(number) and number > 0 else 0.0
