"""Finds the files that an infotext names: LoRAs, textual inversions, the VAE, with their hashes and weights."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ldm.job import lora_name
from ldm.json_value import Json, load_json, load_object, objects_of
from ldm.metadata.foreign.entries import NOTHING, SPELLINGS, positive
from ldm.metadata.infotext import file_name
from ldm.metadata.recipe import Draft


def find_files(entries: Mapping[str, str], draft: Draft) -> None:
    """Reads names, hashes and weights of LoRAs, textual inversions and the VAE from the text."""
    listed = load_object(entries.get("Hashes", ""))
    hashes = {key: value for key, value in listed.items() if isinstance(value, str)}
    loras = listed_hashes(entries, "Lora hashes") | {
        k[5:]: v for k, v in hashes.items() if k.startswith("lora:")
    }
    words = {name.strip(): "" for name in _names(entries)} | listed_hashes(entries, "TI hashes")
    words |= {k[6:]: v for k, v in hashes.items() if k.startswith("embed:") and k[6:] not in words}
    draft.model_hash = draft.model_hash or hashes.get("model", "")
    asked = {file_name(name).lower() for name, *_ in draft.loras}
    weights = listed_hashes(entries, "Lora weights")
    numbers = [part.strip() for part in entries.get("Lora weights", "").split(",")]
    if len(numbers) == len(loras) and all(map(positive, numbers)):  # without names, as SwarmUI lists them
        weights = dict(zip(loras, numbers, strict=True))
    for name, weight in weights.items():
        if name.lower() not in asked:
            number = _number(weight)
            draft.lora(name, number, number)
            asked.add(name.lower())
    for name, weight, on_text, digest in _of_additional_networks(entries):
        draft.lora(name, weight, on_text)
        asked.add(name.lower())
        loras.setdefault(name, digest)
    for name, number in _of_cpp(entries):
        if name.lower() not in asked:
            draft.lora(name, number, number)
            asked.add(name.lower())
    for name in loras:
        if not asked & {name.lower(), re.sub("[:,]", "", name.lower())} and not any(
            f":{name.lower()}:" in draft.values[prompt].lower() for prompt in ("prompt", "negative_prompt")
        ):
            draft.note(f"left out: the LoRA {name}, whose weight is not given")
    for what in _of_civitai(entries, asked):
        draft.note(f"left out: {what}, which Civitai's list of resources names")
    draft.hashes(loras, words)
    vae = entries.get("VAE", "")
    if vae.lower() not in NOTHING:
        draft.note(f"it was made with the VAE {vae[:100]}; give its file with --vae")


def listed_hashes(entries: Mapping[str, str], key: str) -> dict[str, str]:
    """Reads a list `name: hash, name: hash`; more of it may follow unquoted as separate entries."""
    listed: dict[str, str] = {}
    for part in entries.get(key, "").replace('"', "").split(","):
        name, sign, digest = (
            part.strip().partition(": ") if part.count(": ") > 1 else part.strip().rpartition(":")
        )
        if sign and name.strip():
            listed[name.strip()] = digest.partition(":")[0].strip()
    following = list(entries.items())[list(entries).index(key) + 1 :] if listed else []
    for name, digest in following:
        if name in SPELLINGS.values() or not re.fullmatch("[0-9a-fA-F]{8,64}", digest):
            break
        listed[name] = digest
    return listed


def _names(entries: Mapping[str, str]) -> list[str]:
    """Returns the textual inversions that are listed by name alone, some with the web UI's old checksum."""
    listed = ", ".join(entries.get(key, "") for key in ("Embeddings", "Used embeddings"))
    return [re.sub(r"\s*\[[0-9a-f]*\]$", "", name) for name in listed.split(", ") if name.strip()]


def _of_additional_networks(entries: Mapping[str, str]) -> list[tuple[str, float, float, str]]:
    """Reads LoRAs of the extension Additional Networks: name, weights on U-Net and text encoder, hash."""
    found: list[tuple[str, float, float, str]] = []
    for i in range(1, 6):
        model = re.fullmatch(r"(.+?)(?:\(([0-9a-f]*)\))?", entries.get(f"AddNet Model {i}", ""))
        if model and entries.get(f"AddNet Module {i}", "LoRA") == "LoRA":
            weight = entries.get(f"AddNet Weight A {i}", entries.get(f"AddNet Weight {i}", "1"))
            on_text = entries.get(f"AddNet Weight B {i}", weight)
            found.append((model[1], _number(weight), _number(on_text), model[2] or ""))
    return found


def _of_cpp(entries: Mapping[str, str]) -> list[tuple[str, Json]]:
    """Reads LoRAs and weights in the JSON of stable-diffusion.cpp, whose server accepts them outside the prompt."""
    found = list(objects_of(load_object(entries.get("SDCPP", "")).get("loras")))
    return [(lora_name(file_name(str(entry.get("name")))), entry.get("multiplier")) for entry in found[:20]]


def _of_civitai(entries: Mapping[str, str], asked: set[str]) -> list[str]:
    """Reads Civitai's list of resources, except checkpoints and the LoRAs in the prompt."""
    try:
        listed = load_json(entries.get("Civitai resources", "[]"))
    except ValueError:
        return ["what cannot be read"]
    found: list[str] = []
    for entry in objects_of(listed):
        kind, weight = str(entry.get("type", "")).lower(), entry.get("weight")
        name = str(entry.get("modelName") or f"version {entry.get('modelVersionId')}")
        if kind not in ("checkpoint", "model", "vae", "") and name.lower() not in asked:
            shown = next((word for word in ("lora", "locon", "embed", "hypernet") if word in kind), kind)
            found.append(f"{shown} {name}{'' if weight is None else f' at {weight}'}"[:150])
    return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 1.0
