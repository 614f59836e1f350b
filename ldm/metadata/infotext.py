"""Writes a job as the text of an image, in the form of AUTOMATIC1111's web UI, and reads it.

the prompt, on as many lines as it has
Negative prompt: the negative prompt          (only if there is one)
Steps: 50, Sampler: DDIM, CFG scale: 7.5, Seed: 42, Size: 512x512, Model hash: ..., RNG: NV, Version: ...
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ldm.fields import DEFAULTS, FIELDS, INIT, SETTINGS, Field
from ldm.job import V1_DEFAULTS, Job, lora_name, lora_tag, split_loras
from ldm.job_values import override, values_of
from ldm.json_value import Json, load_json
from ldm.setting import Setting
from ldm.util import InputError, printable

NEGATIVE = "Negative prompt:"
_EXACT_PROMPT, _EXACT_NEGATIVE = "Exact prompt", "Exact negative prompt"
_LORAS = "Loras"
_NOT_FOR_EXTRAS = ("Prompt", "Negative prompt", "Size-1", "Size-2", _EXACT_PROMPT, _EXACT_NEGATIVE, _LORAS)
_FEWEST_PAIRS = 3  # a line with fewer pairs is part of the prompt
_STEPS = ("steps", "sampling steps", "num_inference_steps")  # one of them is in every line of settings

_KEY = re.compile(r"\w[\w \-/]{1,80}")
_NAMED = re.compile(rf"({_KEY.pattern}):[^\S\n]*")
_STRING = re.compile(r'"(?:\\.|[^\\"])+"', re.DOTALL)
_ENDS = {",": (re.compile(r"[^,\n]*"), re.compile(r"[^\S\n]*(?:,|\n|$)"))}
_ENDS["|"] = (re.compile(r"[^|\n]*"), re.compile(r"[^\S\n]*(?:\||\n|$)"))
_WITH_BARS = re.compile(rf"\s*{_KEY.pattern}:[^,|\n]*\|\s*{_KEY.pattern}:")  # as SD.Next wrote for a while
_TEMPLATE = re.compile(
    r"\s*(?:Negative )?Template:", re.IGNORECASE
)  # of dynamic prompts: all that follows it
_STEPS_LINE = re.compile(r"Steps: ?[0-9]+,?\s*$", re.IGNORECASE)
_JSON_TRIES = 100  # in one text, each of which may look far ahead
_SIZE = re.compile(r"([0-9]+)x([0-9]+)")
_UNSTORABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # controls and surrogates


@dataclass(frozen=True, slots=True)
class _Codec:
    """The writer and the reader of values of one `Job` field."""

    write: Callable[[Any], str]
    read: Callable[[str], Any]


def _table(labels: Mapping[str, str]) -> _Codec:
    """Returns a codec for names with special labels in the text; any other name is written unchanged."""
    names = {label: name for name, label in labels.items()}
    return _Codec(lambda name: labels.get(name, name), lambda label: names.get(label, label))


def model_name(path: Path) -> str:
    """Returns a checkpoint's name in an image's text: without the suffix, or its folder's name if that is `model`."""
    path = path.absolute()
    if path.is_dir():
        return path.name
    return path.parent.name if path.stem == "model" else path.stem


def file_name(path: str) -> str:
    """Returns the last part of a path, of Windows or another system."""
    return PureWindowsPath(path).name if "\\" in path else PurePosixPath(path).name


def _number(value: float) -> str:
    return repr(float(value)).removesuffix(".0")


def _read_switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise ValueError(text)
    return text == "on"


def _row(setting: Setting) -> _Codec:
    """Returns a codec for several numbers."""
    kinds = [part.kind for part in setting.row]

    def read(text: str) -> tuple[Any, ...]:
        return tuple(kind(word) for kind, word in zip(kinds, text.split(), strict=True))

    return _Codec(lambda values: " ".join(map(_number, values)), read)


def _read_loras(text: str) -> tuple[tuple[str, float, float], ...]:
    loras = load_json(text)
    if not isinstance(loras, list):
        raise ValueError(text)
    return tuple(map(_read_lora, loras))


def _read_lora(lora: Json) -> tuple[str, float, float]:
    match lora:
        case [name, str() | int() | float() as weight, str() | int() | float() as text_weight]:
            return file_name(str(name)), float(weight), float(text_weight)
        case _:
            raise ValueError(f"{lora} is not a LoRA")


def _named_loras(job: Job) -> tuple[tuple[str, float, float], ...]:
    """Returns the job's LoRAs by file name, without folders."""
    return tuple((lora_name(file_name(name)), weight, on_text) for name, weight, on_text in job.loras)


_INT, _FLOAT = _Codec(str, int), _Codec(_number, float)
_SWITCH = _Codec(lambda value: "on" if value else "off", _read_switch)
# A1111 has many upscalers; those of latents are called Latent (nearest) and the like
_UPSCALER = _Codec(
    _table({"pixels": "Lanczos", "latents": "Latent"}).write,
    lambda label: "latents" if label.startswith("Latent") else "pixels",
)
_FILE = _Codec(file_name, str)  # its folder is private to the user
_NUMBERS = _Codec(lambda values: " ".join(map(_number, values)), lambda text: tuple(map(float, text.split())))
_CONTROLS = _Codec(
    lambda controls: to_json([[file_name(file), file_name(image), *rest] for file, image, *rest in controls]),
    lambda text: SETTINGS["controls"].check(load_json(text)),
)
_CODECS: Mapping[str, _Codec] = {"upscale_in": _UPSCALER}


def _codec(row: Field) -> _Codec:
    """Returns the writer and the reader of a field's values."""
    setting = SETTINGS[row.name]
    kind = setting.kind
    if row.name in _CODECS:
        return _CODECS[row.name]
    if row.entry is not None:
        return _CONTROLS
    if setting.row:
        return _NUMBERS if setting.many else _row(setting)
    if row.is_file:
        return _FILE
    return {bool: _SWITCH, int: _INT, float: _FLOAT}.get(kind) or _table(row.words)


_ENTRIES = [(row, _codec(row)) for row in FIELDS if row.label]
# the entries of a text that belong to the job, as `parse_infotext` names them; all others are extras
_FIRST = ("Steps", "Sampler", "CFG scale", "Seed")  # before the size
JOB_KEYS = frozenset(row.label for row, _ in _ENTRIES) | {"Size", *_NOT_FOR_EXTRAS}


def infotext(job: Job, extras: Mapping[str, str]) -> str:
    """Returns the text from which `job` can be recreated, with the entries `extras` (Model hash, Version, ...).

    LoRAs are written as `<lora:name:weight>` at the end of the prompt. Where the plain form would lose something of a
    prompt (control characters, a line in it that begins with `Negative prompt:`), the entries `Exact prompt`
    (with `Loras`) and `Exact negative prompt` hold it as JSON. Empty extras are left out. Raises ValueError for
    an extra whose name cannot be written or belongs to the job.
    """
    pairs = _pairs(job, {key: value for key, value in extras.items() if value})
    tags = "".join(lora_tag(*lora) for lora in _named_loras(job))
    shown = [_storable(" ".join(filter(None, (job.prompt, tags))))] if job.prompt or tags else []
    if job.negative_prompt:
        shown.append(f"{NEGATIVE} {_storable(job.negative_prompt)}")
    prompt, negative, _ = _split("\n".join([*shown, _line(pairs)]))
    exact = {}
    if split_loras(prompt) != (job.prompt, _named_loras(job)):
        exact[_EXACT_PROMPT] = _plain_json(job.prompt)
        if tags:
            exact[_LORAS] = _plain_json(to_json(_named_loras(job)))
    if negative != job.negative_prompt:
        exact[_EXACT_NEGATIVE] = _plain_json(job.negative_prompt)
    return "\n".join([*shown, _line(pairs | exact)])


def parse_infotext(text: str) -> dict[str, str]:
    """Returns the entries of an infotext by name, with the prompts under `Prompt` and `Negative prompt`.

    The prompt's LoRA tags are moved to `Loras`, as JSON. A size such as `Size: 512x768`
    becomes `Size-1` and `Size-2`. Lines after the settings, which extensions write, add what the settings lack. A
    text without a line of settings is all prompt.
    """
    prompt, negative, pairs = _split(text.replace("\r\n", "\n"))
    negative = pairs.pop(_EXACT_NEGATIVE, negative)
    if _EXACT_PROMPT in pairs:
        prompt = pairs.pop(_EXACT_PROMPT)
    else:
        prompt, loras = split_loras(prompt)
        pairs |= {_LORAS: to_json(loras)} if loras else {}
    return pairs | {"Prompt": prompt, "Negative prompt": negative}


def has_settings(text: str) -> bool:
    """Returns whether a text has a line of settings."""
    lines = text.strip().splitlines() or [""]
    pairs = _settings(lines[_settings_at(lines) :])
    return any(key.lower() in (*_STEPS, "seed", "sampler") for (key, _), _ in pairs)


def job_from_infotext(text: str) -> Job:
    """Returns the job that an infotext describes; fields that it lacks are as in `V1_DEFAULTS`.

    Raises InputError for a text without settings or with an invalid value.
    """
    return job_from_entries(parse_infotext(text))


def job_from_entries(entries: Mapping[str, str]) -> Job:
    """Does the same as `job_from_infotext`, from the entries that `parse_infotext` returns."""
    if "Steps" not in entries:
        raise InputError("the text holds no generation settings: its last line should begin with `Steps: `")
    codecs = [(row.label, row.name, codec) for row, codec in _ENTRIES]
    codecs += [("Size-1", "width", _INT), ("Size-2", "height", _INT)]
    codecs += [(_LORAS, "loras", _Codec(to_json, _read_loras))]
    values: dict[str, Any] = {}
    for key, name, codec in codecs:
        if key in entries:
            try:
                values[name] = codec.read(entries[key])
            except (ValueError, TypeError, OverflowError, RecursionError):
                raise InputError(
                    f"the text's entry {key} cannot be {printable(entries[key][:100])!r}"
                ) from None
    if "init.image" not in values:
        values = {name: value for name, value in values.items() if not name.startswith(INIT)}
    prompts = {"prompt": entries["Prompt"], "negative_prompt": entries["Negative prompt"]}
    return override(V1_DEFAULTS, prompts | values)


def _pairs(job: Job, extras: Mapping[str, str]) -> dict[str, str]:
    """Returns all entries as written, in the web UI's order: the size and the model after the main settings."""
    held = values_of(job)
    own = {
        row.label: codec.write(held[row.name])
        for row, codec in _ENTRIES
        if row.name in held and (row.always or held[row.name] != DEFAULTS[row.name])
    }
    first = {key: own.pop(key) for key in _FIRST} | {"Size": f"{job.width}x{job.height}"}
    for key in extras:
        if key in JOB_KEYS or not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} cannot be the name of an extra entry")
    model = {key: extras[key] for key in ("Model hash", "Model") if key in extras}
    version = {key: extras[key] for key in ("Version",) if key in extras}
    rest = {key: value for key, value in extras.items() if key not in model and key not in version}
    pairs = first | model | own | rest | version
    return {key: value if key == "Size" else _quoted(value) for key, value in pairs.items()}


def _line(pairs: Mapping[str, str]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in pairs.items())


def _split(text: str) -> tuple[str, str, dict[str, str]]:
    """Returns prompt, negative prompt, and the entries of the settings."""
    lines = text.rstrip("\n").split("\n")
    at = _settings_at(lines)
    entries: dict[str, str] = {}
    for (key, value), is_later in _settings(lines[at:]):
        entry = _entry(key, value)
        if not (is_later and entry.keys() & entries.keys()):
            entries |= entry
    lines = lines[:at]
    first = next((i for i, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
    negative = "\n".join(lines[first:]).removeprefix(NEGATIVE).removeprefix(" ")
    return "\n".join(lines[:first]), negative, entries


def _settings_at(lines: Sequence[str]) -> int:
    """Returns the index of the first line of settings: the last with enough pairs and a count of steps.

    Extensions write more lines after it. Without such a line the settings may begin with the steps and continue
    line by line, or are the last line, as in the web UI, if it has enough pairs.
    """
    places = [i for i, line in enumerate(lines) if "steps" in line.lower() and not _TEMPLATE.match(line)]
    for at in reversed(places):
        if _is_enough(pairs := _pairs_in(lines[at])) and any(key.lower() in _STEPS for key, *_ in pairs):
            return at
    for at in reversed(places):
        if _STEPS_LINE.match(lines[at]) and all(map(_NAMED.match, lines[at:])) and _is_enough(lines[at:]):
            return at
    return len(lines) - _is_enough(_pairs_in(lines[-1]))


def _is_enough(pairs: Sequence[object]) -> bool:
    return len(pairs) >= _FEWEST_PAIRS


def _settings(lines: Sequence[str]) -> Iterator[tuple[tuple[str, str], bool]]:
    """Yields the pairs of the settings and of the lines after them, with a flag that marks the latter."""
    end = next((i for i, line in enumerate(lines) if _TEMPLATE.match(line)), len(lines))
    for key, value, start in _pairs_in("\n".join(lines[:end])):
        yield (key, value), start > len(lines[0])


def _pairs_in(text: str) -> list[tuple[str, str, int]]:
    """Returns the pairs `key: value`, between commas or bars, with the positions of their keys.

    A value is a string, list or object of JSON, or all up to the next comma, bar or end of line.
    """
    plain, ending = _ENDS["|" if _WITH_BARS.match(text) else ","]
    pairs: list[tuple[str, str, int]] = []
    at, tries = 0, _JSON_TRIES
    while key := _NAMED.search(text, at):
        at = key.end()
        value = _STRING.match(text, at)
        end = value.end() if value else None
        if text[at : at + 1] in ("[", "{") and tries:
            tries -= 1
            end = _json_end(text, at)
        if end is None or not ending.match(text, end):
            found = plain.match(text, at)
            end = found.end() if found else at
        pairs.append((key[1], text[at:end].strip(), key.start()))
        at = end
    return pairs


def _json_end(text: str, start: int) -> int | None:
    try:
        return json.JSONDecoder().raw_decode(text, start)[1]
    except (ValueError, RecursionError):
        return None


def _entry(key: str, value: str) -> dict[str, str]:
    """Returns the value of a pair of the text, or the two values of a size."""
    if size := _SIZE.fullmatch(value):
        return {f"{key}-1": size[1], f"{key}-2": size[2]}
    return {key: _unquoted(value)}


def _quoted(value: str) -> str:
    """Returns `value`, as a JSON string if the plain form could not be read back."""
    plain = value == value.strip() and not value.startswith('"') and not re.search("[,:\n]", value)
    return value if plain and not _SIZE.fullmatch(value) and not _UNSTORABLE.search(value) else to_json(value)


def _unquoted(value: str) -> str:
    if not (value.startswith('"') and value.endswith('"')):
        return value
    try:
        return str(json.loads(value, strict=False))
    except ValueError:
        return value


def to_json(value: Any) -> str:
    """Returns JSON on one line; characters that could control a terminal are escaped."""
    return _UNSTORABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(value, ensure_ascii=False))


def _plain_json(value: str) -> str:
    """Returns JSON with commas and colons escaped, at which simpler readers would split it."""
    return to_json(value).replace(",", "\\u002c").replace(":", "\\u003a")


def _storable(prompt: str) -> str:
    return _UNSTORABLE.sub(lambda match: printable(match[0]), prompt)
