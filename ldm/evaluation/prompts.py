"""The prompts of an evaluation: COCO's captions, lists of prompts, and questions on what images must show.

Questions have the form of GenEval's `evaluation_metadata.jsonl` (arXiv:2310.11513): a JSON object a line with
`prompt`, `tag` (the skill), and `include` and `exclude`, lists of {"class", "count", "color", "position":
[relation, number]}, where `number` is that of the entry of `include` that the position is relative to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.files import read_side_file
from ldm.json_value import load_json
from ldm.util import InputError, is_list, is_mapping, need, printable

MAX_BYTES = 256 * 2**20  # COCO's captions of 2017 have 92 MB
_ENTRY = {"class": str, "count": int, "color": str, "position": list}


@dataclass(frozen=True)
class Question:
    """A prompt, and what an image of it must show: `include` and `exclude` as in GenEval's files, empty if unknown.

    `scene` is the split and index of the scene of `ldm.data.scenes` that the prompt describes.
    """

    prompt: str
    tag: str = ""
    include: tuple[Mapping[str, Any], ...] = ()
    exclude: tuple[Mapping[str, Any], ...] = ()
    scene: tuple[str, int] | None = None

    def row(self) -> dict[str, Any]:
        """Returns the question as a JSON object, without what is empty."""
        values = {"tag": self.tag, "include": list(self.include), "exclude": list(self.exclude)}
        values |= {"prompt": self.prompt, "scene": None if self.scene is None else list(self.scene)}
        return {name: value for name, value in values.items() if value}


def read_questions(path: Path) -> list[Question]:
    """Reads prompts: COCO's `captions_*.json`, JSON lines of questions, or a text file with a prompt a line.

    COCO's captions are in the order of their ids. Raises InputError, which names the line, for anything else.
    """
    text = read_side_file(path, MAX_BYTES).decode("utf-8", "replace")
    shown = printable(path)
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    need(bool(lines), f"{shown} is empty; give a list of prompts or COCO's captions")
    if path.suffix == ".json":
        return _read_coco(text, shown)
    if path.suffix in (".jsonl", ".ndjson"):
        return [_question(line, f"{shown}, line {number}") for number, line in lines]
    return [Question(line.strip()) for _, line in lines]


def _read_coco(text: str, shown: str) -> list[Question]:
    try:
        captions = sorted((entry["id"], entry["caption"]) for entry in json.loads(text)["annotations"])
        return [Question(" ".join(caption.split())) for _, caption in captions]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = printable(f"{type(error).__name__}: {error}")[:100]
        raise InputError(
            f"{shown} is not a file of COCO's captions ({reason}); give captions_val2017.json"
        ) from None


def _question(line: str, where: str) -> Question:
    try:
        row = load_json(line)
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {printable(error)[:100]}") from None
    if not isinstance(row, dict) or not isinstance(prompt := row.get("prompt"), str):
        raise InputError(f'{where} holds no prompt; write {{"prompt": ...}}')
    include, exclude = (_entries(row.get(name, []), name, where) for name in ("include", "exclude"))
    for entry in include:
        relative = entry.get("position", ["", 0])
        need(
            len(relative) == 2 and type(relative[1]) is int and 0 <= relative[1] < len(include),
            f"{where}: position is {printable(relative)[:60]}; write [\"left of\", 0], with the number of an entry",
        )  # fmt: skip
    scene: Any = row.get("scene")
    return Question(prompt, str(row.get("tag", "")), include, exclude, tuple(scene) if scene else None)


def _entries(value: Any, name: str, where: str) -> tuple[Mapping[str, Any], ...]:
    if not is_list(value):
        raise InputError(f"{where}: {name} is not a list")
    for entry in value:
        fits = is_mapping(entry) and isinstance(entry.get("class"), str)
        wrong = [
            key for key, kind in _ENTRY.items() if fits and key in entry and type(entry[key]) is not kind
        ]
        need(
            fits and not wrong,
            f'{where}: {name} holds {printable(entry)[:80]}; write {{"class": "dog", "count": 1}}',
        )
    return tuple(value)


def subset(questions: Sequence[Question], count: int | None, seed: int) -> list[Question]:
    """Returns `count` of the questions, drawn by `seed` without repetition, in the order of the list; None: all.

    The same list, count and seed give the same questions on every machine. Raises InputError if there are too few.
    """
    import numpy as np

    if count is None or count == len(questions):
        return list(questions)
    need(
        1 <= count <= len(questions),
        f"--count is {count}, and there are {len(questions)} prompts; give 1 to {len(questions)}",
    )
    chosen = np.random.default_rng(seed).permutation(len(questions))[:count]
    return [questions[i] for i in sorted(chosen)]


def digest(questions: Sequence[Question]) -> str:
    """Returns the SHA-256 of questions, all of their entries included."""
    return hashlib.sha256(written(questions).encode("utf-8", "surrogatepass")).hexdigest()


def written(questions: Sequence[Question]) -> str:
    """Returns questions as JSON lines, which `read_questions` reads."""
    return "".join(json.dumps(question.row(), ensure_ascii=False) + "\n" for question in questions)
