"""Measures this toolkit, alone or in turns with a peer: starts worker processes and reports their answers."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import logging
import math
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm import __version__
from ldm.benchmark.options import MODULES, PARTS, PEERS
from ldm.benchmark.process import Process
from ldm.benchmark.report import Report, Sample, facts_line, print_errors, print_report
from ldm.benchmark.subjects import Setting
from ldm.cli.fast import FAST
from ldm.fields import SETTINGS
from ldm.places import cache_path, find
from ldm.setting import shown
from ldm.util import need, printable

logger = logging.getLogger("ldm")


def benchmark(opt: argparse.Namespace) -> int:
    """Runs the measurements that the options select; returns the exit code."""
    sizes = [_number("--sizes", part) for part in opt.sizes.split(",")]
    parts = opt.parts.split(",")
    precisions = opt.precision.split(",")
    _check(opt, sizes, parts)
    report = Report(opt.json)
    peers = _peers(opt, report)
    rows = [_row(opt, precision, peers) for precision in precisions]
    prepared = _prepare(opt, [_held_in(s) for row in rows for s in row if _has_folder(s)])
    machine = {"version": __version__, "platform": platform.platform(), "python": sys.version}
    report.line("run", {"options": vars(opt), **machine})
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        for row in rows:
            settings = [_with_files(setting, prepared) for setting in row]
            _measure(opt, report, settings, sizes, parts, Path(scratch))
    return 0


def _check(opt: argparse.Namespace, sizes: Sequence[int], parts: Sequence[str]) -> None:
    unknown = [part for part in parts if part not in PARTS]
    need(not unknown, f"--parts: unknown part {printable(unknown[:1])[1:-1]}; choose from {', '.join(PARTS)}")
    for name, least in (("batch", 1), ("steps", 2), ("rounds", 1), ("threads", 0)):
        value = getattr(opt, name)
        need(value >= least, f"--{name} is {value}; give {least} or more")
    need(SETTINGS["seed"].fits(opt.seed), f"--seed is {shown(opt.seed)}; give {SETTINGS['seed'].wanted()}")
    need(0 < opt.strength <= 1, f"--strength is {opt.strength}; give more than 0, to 1")
    for size in sizes:
        need(size > 0 and size % 8 == 0, f"--sizes: {size} is not a multiple of 8")
    need(_steps_run(opt) >= 2, f"--strength {opt.strength} leaves {_steps_run(opt)} steps; give more")
    fast = [choice for choice in opt.fast.split(",") if choice not in FAST]
    need(not fast, f"--fast: unknown choice {printable(fast[:1])[1:-1]}; choose from {', '.join(FAST)}")
    need(not opt.check or opt.mode == "txt2img", "--check goes with --mode txt2img only")


def _peers(opt: argparse.Namespace, report: Report) -> list[str]:
    """Returns the peers that were asked for and are installed; those that are not are named."""
    names = [name for name in opt.peers.split(",") if name]
    unknown = [name for name in names if name not in PEERS]
    need(not unknown, f"--peers: unknown peer {printable(unknown[:1])[1:-1]}; choose from {', '.join(PEERS)}")
    found: list[str] = []
    lacking: dict[str, str] = {}
    for name in names:
        peer = PEERS[name]
        packages = (*peer.needs, *((peer.for_int8 or ()) if "int8" in opt.precision.split(",") else ()))
        missing = [package for package in packages if not _installed(MODULES.get(package, package))]
        if peer.closed and (opt.batch > 1 or opt.mode != "txt2img"):
            lacking[name] = f"{name} is measured with --batch 1 and --mode txt2img only"
        elif missing:
            lacking[name] = f"{name} needs {', '.join(missing)}: pip install {' '.join(missing)}"
        else:
            found.append(name)
    need(bool(found) or not names, f"--peers {'; '.join(lacking.values())}")
    for name, reason in lacking.items():
        report.line("left out", {"peer": name, "reason": reason})
        report.text(f"left out: {reason}")
    return found


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _number(option: str, text: str) -> int:
    need(text.strip().isdecimal(), f"{option}: {printable(text)!r} is not a whole number")
    return int(text)


def _row(opt: argparse.Namespace, precision: str, peers: Sequence[str]) -> list[Setting]:
    """Returns our subject in one precision, and the peers in the corresponding one."""
    dtype = _peer_dtype(opt, precision)
    ours = _ours(opt, precision)
    packed = "packed" if opt.cache_weights else ""  # the folder is known later
    own = {peer: PEERS[peer].type_for(precision, dtype) for peer in peers}
    return [
        *(replace(ours, fast=choice, packed=packed) for choice in opt.fast.split(",")),
        *(replace(ours, subject=peer, precision=own[peer], malloc=opt.peer_malloc) for peer in peers),
    ]


def _ours(opt: argparse.Namespace, precision: str) -> Setting:
    return Setting(
        subject="ours",
        config=str(find(opt.config)),
        ckpt=str(find(opt.ckpt)) if opt.ckpt else "",
        folder="",
        precision=precision,
        device=opt.device,
        threads=opt.threads,
        batch=opt.batch,
        mode=opt.mode,
        strength=opt.strength,
        picture="",
        compiled=opt.compile,
        malloc="tuned",
        seed=opt.seed,
        spawned=0.0,
    )


def _peer_dtype(opt: argparse.Namespace, precision: str) -> str:
    """Returns the name of torch's type for the peer; an invalid device or precision is reported here."""
    from ldm.runtime.device import FULL, resolve_device, resolve_precision

    device = resolve_device(opt.device)
    resolved = resolve_precision(precision, device)
    if opt.peer_dtype != "auto":
        return opt.peer_dtype
    if resolved == FULL:
        return "float32"
    return "bfloat16" if device.type == "cpu" or "bf16" in resolved.name else "float16"


def _prepare(opt: argparse.Namespace, peer_dtypes: Sequence[str]) -> dict[str, Any]:
    """Prepares checkpoint, peer folders and image in a separate process, which frees its memory."""
    cache = Path(opt.cache) if opt.cache else cache_path("benchmark")
    with Process(_ours(opt, "full")) as process:
        fields = {
            "cache": str(cache),
            "peer_dtypes": sorted(set(peer_dtypes)),
            "picture": opt.mode == "img2img",
        }
        return {**process.ask("prepare", fields), "packed": str(cache / "packed")}


def _with_files(setting: Setting, prepared: Mapping[str, Any]) -> Setting:
    folder = prepared["folders"][_held_in(setting)] if _has_folder(setting) else ""
    packed = prepared["packed"] if setting.packed else ""
    return replace(setting, ckpt=prepared["ckpt"], picture=prepared["picture"], folder=folder, packed=packed)


def _has_folder(setting: Setting) -> bool:
    """Whether the subject loads a folder of diffusers rather than the checkpoint."""
    return setting.subject != "ours" and not PEERS[setting.subject].closed


def _held_in(setting: Setting) -> str:
    """Returns the type of the weights in a peer's folder."""
    return "bfloat16" if setting.precision == "int8" else setting.precision


def _measure(
    opt: argparse.Namespace,
    report: Report,
    settings: Sequence[Setting],
    sizes: Sequence[int],
    parts: Sequence[str],
    scratch: Path,
) -> None:
    """Measures and reports all figures of subjects that take turns."""
    recipe = opt.peer_recipe
    if (
        set(parts) & {"step", "decode"}
        or opt.check
        or (recipe == "auto" and any(s.subject == "diffusers" for s in settings))
    ):
        with contextlib.ExitStack() as stack:
            processes = {s.name: stack.enter_context(Process(s)) for s in settings}
            for setting in settings:
                loaded = processes[setting.name].ask("load", {})
                if setting.subject == "diffusers":
                    recipe = _arrange(opt, recipe, processes[setting.name], sizes[0])
                report.line("facts", {"subject": setting.name, **loaded["facts"], "recipe": recipe})
                report.text(facts_line(setting.name, loaded["facts"], setting.subject, recipe))
            for size in sizes:
                if set(parts) & {"step", "decode"}:
                    samples = list(_turns(opt, processes, size, parts))
                    print_report(report, samples, list(processes), size)
                if opt.check:
                    print_errors(opt, report, settings, processes, size, scratch)
    if "whole" in parts:
        for size in sizes:
            samples = list(_fresh_turns(opt, settings, size, recipe, scratch))
            print_report(report, samples, [s.name for s in settings], size)


def _arrange(opt: argparse.Namespace, recipe: str, peer: Process, size: int) -> str:
    """Gives the peer its memory layout, or tries both and selects the faster; returns its name."""
    if recipe == "auto":
        medians: dict[str, float] = {}
        for name in ("plain", "channels-last"):
            peer.ask("arrange", {"channels_last": name == "channels-last"})
            work = _work(size, opt.steps, limit=min(5, _steps_run(opt)), number=0)
            peer.ask("run", work)
            medians[name] = statistics.median(peer.ask("run", work)["seconds"]["step"])
        recipe = min(medians, key=lambda name: medians[name])
    peer.ask("arrange", {"channels_last": recipe == "channels-last"})
    return recipe


def _steps_run(opt: argparse.Namespace) -> int:
    """Returns the number of denoising steps of an image."""
    return int(opt.steps * opt.strength) if opt.mode == "img2img" else opt.steps


def _least_steps(opt: argparse.Namespace) -> int:
    """Returns the number of steps of a run that warms up."""
    return min(opt.steps, 3 if opt.mode == "txt2img" else math.ceil(2 / opt.strength))


def _work(size: int, steps: int, limit: int, number: int, outdir: str = "") -> dict[str, Any]:
    return {"size": size, "steps": steps, "limit": limit, "number": number, "outdir": outdir}


def _turns(
    opt: argparse.Namespace, processes: Mapping[str, Process], size: int, parts: Sequence[str]
) -> Iterator[Sample]:
    """Yields samples of processes that are kept running, after a warm-up."""
    few = _least_steps(opt)
    steps = opt.steps if "step" in parts else few
    limit = 0 if "decode" in parts else _steps_run(opt)
    compiled: dict[str, Mapping[str, Sequence[float]]] = {}
    for name, process in processes.items():
        warm = process.ask("run", _work(size, few, 0 if "decode" in parts else 1, number=-1))
        compiled[name] = {key: warm["seconds"][key] for key in ("compile",) if key in warm["seconds"]}
    for number, (name, process) in itertools.product(range(1, opt.rounds + 1), processes.items()):
        answer = process.ask("run", _work(size, steps, limit, number))
        seconds = {**(compiled[name] if number == 1 else {}), **answer["seconds"]}
        yield Sample(name, size, number, False, seconds, answer["memory"], answer["load average"])


def _fresh_turns(
    opt: argparse.Namespace, settings: Sequence[Setting], size: int, recipe: str, scratch: Path
) -> Iterator[Sample]:
    """Yields samples of processes that are started for each sample."""
    for setting in settings:
        if setting.packed:
            with Process(setting) as process:
                process.ask("load", {})
                process.ask("run", _work(size, _least_steps(opt), 0, number=-1))
    for number, setting in itertools.product(range(1, opt.rounds + 1), settings):
        name = setting.name
        with Process(setting) as process:
            loaded = process.ask("load", {})
            if setting.subject == "diffusers" and recipe == "channels-last":
                process.ask("arrange", {"channels_last": True})
            outdir = str(scratch / f"{name}-{size}-{number}")
            answer = process.ask("run", _work(size, opt.steps, 0, number, outdir))
        seconds = {**loaded["seconds"], **answer["seconds"]}
        yield Sample(name, size, number, True, seconds, answer["memory"], answer["load average"])
