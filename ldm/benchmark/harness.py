"""Measures this toolkit, alone or in turns with a peer: starts worker processes and reports their answers."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import logging
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from ldm import __version__
from ldm.benchmark.worker import Setting
from ldm.checkpoints.configs import V1_CONFIG
from ldm.fields import SETTINGS, shown
from ldm.places import ROOT, cache_path, find
from ldm.runtime.allocator import SWITCH
from ldm.util import InputError, need, printable

logger = logging.getLogger("ldm")

PARTS = ("step", "decode", "whole")
PEERS = ("diffusers",)
# a peer's messages would be mixed with the figures
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}
# in the order of the table
PHASES = (
    "import", "load", "text", "encode", "first step", "step", "unet", "decode", "png",
    "start to first step", "whole run",
)  # fmt: skip


def add_benchmark_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options: the subjects to measure, the peer, and the number of rounds."""
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--parts",
        metavar="LIST",
        default="step,decode",
        help="step, decode, whole. step and decode are timed in long-running processes that take turns, whole in "
        "a fresh process each time, from its start to the last PNG file",
    )
    group.add_argument("--sizes", metavar="LIST", default="512", help="sides of the images in pixels")
    group.add_argument("--batch", metavar="N", type=int, default=1, help="images at a time")
    group.add_argument("--steps", metavar="N", type=int, default=20, help="DDIM steps")
    group.add_argument(
        "--mode", choices=("txt2img", "img2img"), default="txt2img", help="what kind of run is timed"
    )
    group.add_argument(
        "--strength", metavar="X", type=float, default=0.75, help="img2img's share of the steps"
    )
    group.add_argument("--rounds", metavar="N", type=int, default=5, help="how often each part is timed")
    group.add_argument("--check", action="store_true", help="compare results with float32's")
    group.add_argument("--seed", metavar="N", type=int, default=42, help="seed of the start noise")

    group = parser.add_argument_group("computation")
    group.add_argument(
        "--precision",
        metavar="LIST",
        default="autocast",
        help="full, autocast, bf16 or fp16, or several in turn",
    )
    group.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    group.add_argument("--threads", metavar="N", type=int, default=0, help="CPU threads (0: torch's choice)")
    group.add_argument("--compile", action="store_true", help="torch.compile the U-Nets, the peer's too")

    group = parser.add_argument_group("comparison")
    group.add_argument("--peers", choices=PEERS, help="another package that does the same work in turns")
    group.add_argument(
        "--peer_recipe",
        choices=("auto", "plain", "channels-last"),
        default="auto",
        help="the peer's memory layout; auto: whichever is faster",
    )
    group.add_argument(
        "--peer_dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="auto: float32 for full, else float16 on a GPU and bfloat16 on a CPU",
    )

    group.add_argument(
        "--peer_malloc",
        choices=("system", "tuned"),
        default="system",
        help="tuned: the peer gets the allocator setting that this toolkit gives itself, too",
    )

    group = parser.add_argument_group("model")
    group.add_argument("--config", metavar="FILE", default=V1_CONFIG, help="model config")
    group.add_argument(
        "--ckpt", metavar="FILE", help="checkpoint (default: random weights, made once in the cache folder)"
    )
    group.add_argument(
        "--cache",
        metavar="DIR",
        help="folder for what is made: 4.3 GB of weights, 2.1 or 4.3 GB for a peer (default: the user's)",
    )
    group.add_argument("--json", metavar="FILE", help="add every sample to FILE as JSON lines; -: to stdout")


class Process:
    """A worker process, queried over its standard streams."""

    def __init__(self, setting: Setting) -> None:
        environment = dict(os.environ)
        paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        environment |= QUIET
        if (
            setting.malloc == "system" and environment.get(SWITCH) == "tuned"
        ):  # this tool's settings of the allocator
            del environment["GLIBC_TUNABLES"]
        if setting.threads:
            environment["OMP_NUM_THREADS"] = str(setting.threads)
        spawned = time.time()
        self._child = subprocess.Popen(
            [sys.executable, "-m", "ldm.benchmark.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._send(asdict(replace(setting, spawned=spawned)))

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(message) + "\n")
        self._child.stdin.flush()

    def ask(self, order: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Sends an order and returns the answer; `fields` are the parameters of the worker's method of that name."""
        assert self._child.stdout is not None
        try:
            self._send({"order": order, **fields})
            line = self._child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._child.wait()
            raise ChildProcessError(f"the measured process ended with code {code} at {order!r}; see above")
        answer = json.loads(line)
        if "refused" in answer:
            raise InputError(answer["refused"])
        return answer

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Lets it end by itself, or stops it after an error."""
        if kind is not None:
            self._child.kill()
        for stream in (self._child.stdin, self._child.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()
        self._child.wait()


@dataclass(frozen=True)
class Sample:
    """The measurement of one subject in one round: the seconds of each phase, and the peak bytes of memory so far.

    `load` is the machine's load average after it, None where there is none.
    """

    subject: str
    size: int
    round: int
    fresh: bool
    seconds: Mapping[str, Sequence[float]]
    memory: Mapping[str, int]
    load: float | None


class Report:
    """Tables for people, and JSON lines with every raw sample."""

    def __init__(self, json_path: str | None) -> None:
        to_stdout = json_path == "-"
        self._tables: TextIO = sys.stderr if to_stdout else sys.stdout
        self._lines: TextIO | None = sys.stdout if to_stdout else None
        self._path = None if to_stdout else json_path

    def line(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Writes one JSON line."""
        text = json.dumps({"kind": kind, **fields})
        if self._path is not None:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(text + "\n")
        elif self._lines is not None:
            print(text, file=self._lines, flush=True)

    def text(self, line: str) -> None:
        """Writes one line for people."""
        print(printable(line.rstrip()), file=self._tables, flush=True)

    def title(self, line: str) -> None:
        """Writes one line for people, after an empty line."""
        self.text("")
        self.text(line)


def benchmark(opt: argparse.Namespace) -> int:
    """Runs the measurements that the options select; returns the exit code."""
    sizes = [_number("--sizes", part) for part in opt.sizes.split(",")]
    parts = opt.parts.split(",")
    precisions = opt.precision.split(",")
    _check(opt, sizes, parts)
    report = Report(opt.json)
    pairs = [_pair(opt, precision) for precision in precisions]
    prepared = _prepare(opt, [s.precision for pair in pairs for s in pair if s.subject != "ours"])
    machine = {"version": __version__, "platform": platform.platform(), "python": sys.version}
    report.line("run", {"options": vars(opt), **machine})
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        for pair in pairs:
            settings = [_with_files(setting, prepared) for setting in pair]
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
    need(not opt.check or opt.mode == "txt2img", "--check goes with --mode txt2img only")
    missing = [name for name in ("diffusers", "transformers", "safetensors") if not _installed(name)]
    need(
        opt.peers is None or not missing,
        f"--peers {opt.peers} needs {', '.join(missing)}: pip install {' '.join(missing)}",
    )


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _number(option: str, text: str) -> int:
    need(text.strip().isdecimal(), f"{option}: {printable(text)!r} is not a whole number")
    return int(text)


def _pair(opt: argparse.Namespace, precision: str) -> list[Setting]:
    """Returns our subject in one precision, and the peer, if there is one, in the corresponding one."""
    peer_dtype = _peer_dtype(opt, precision)
    ours = _ours(opt, precision)
    return [
        ours,
        *(
            replace(ours, subject=peer, precision=peer_dtype, malloc=opt.peer_malloc)
            for peer in [opt.peers]
            if peer
        ),
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
        return process.ask("prepare", fields)


def _with_files(setting: Setting, prepared: Mapping[str, Any]) -> Setting:
    folder = "" if setting.subject == "ours" else prepared["folders"][setting.precision]
    return replace(setting, ckpt=prepared["ckpt"], picture=prepared["picture"], folder=folder)


def _name(setting: Setting) -> str:
    return f"{setting.subject} {setting.precision}"


def _measure(
    opt: argparse.Namespace,
    report: Report,
    settings: Sequence[Setting],
    sizes: Sequence[int],
    parts: Sequence[str],
    scratch: Path,
) -> None:
    """Measures and reports all figures of one pair of subjects."""
    recipe = opt.peer_recipe
    if set(parts) & {"step", "decode"} or opt.check or (opt.peers and recipe == "auto"):
        with contextlib.ExitStack() as stack:
            processes = {_name(s): stack.enter_context(Process(s)) for s in settings}
            for setting in settings:
                loaded = processes[_name(setting)].ask("load", {})
                if setting.subject != "ours":
                    recipe = _arrange(opt, recipe, processes[_name(setting)], sizes[0])
                report.line("facts", {"subject": _name(setting), **loaded["facts"], "recipe": recipe})
                report.text(_facts_line(_name(setting), loaded["facts"], setting.subject, recipe))
            for size in sizes:
                if set(parts) & {"step", "decode"}:
                    samples = list(_turns(opt, processes, size, parts))
                    _tell(report, samples, list(processes), size)
                if opt.check:
                    _tell_errors(opt, report, settings, processes, size, scratch)
    if "whole" in parts:
        for size in sizes:
            samples = list(_fresh_turns(opt, settings, size, recipe, scratch))
            _tell(report, samples, [_name(s) for s in settings], size)


def _arrange(opt: argparse.Namespace, recipe: str, peer: Process, size: int) -> str:
    """Gives the peer its memory layout, or tries both and selects the faster; returns its name."""
    if recipe == "auto":
        medians = {}
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


def _work(size: int, steps: int, limit: int, number: int, outdir: str = "") -> dict[str, Any]:
    return {"size": size, "steps": steps, "limit": limit, "number": number, "outdir": outdir}


def _turns(
    opt: argparse.Namespace, processes: Mapping[str, Process], size: int, parts: Sequence[str]
) -> Iterator[Sample]:
    """Yields samples of processes that are kept running, after a warm-up."""
    few = min(opt.steps, 3 if opt.mode == "txt2img" else math.ceil(2 / opt.strength))
    steps = opt.steps if "step" in parts else few
    limit = 0 if "decode" in parts else _steps_run(opt)
    for process in processes.values():
        process.ask("run", _work(size, few, 0 if "decode" in parts else 1, number=-1))
    for number, (name, process) in itertools.product(range(1, opt.rounds + 1), processes.items()):
        answer = process.ask("run", _work(size, steps, limit, number))
        yield Sample(name, size, number, False, answer["seconds"], answer["memory"], answer["load average"])


def _fresh_turns(
    opt: argparse.Namespace, settings: Sequence[Setting], size: int, recipe: str, scratch: Path
) -> Iterator[Sample]:
    """Yields samples of processes that are started for each sample."""
    for number, setting in itertools.product(range(1, opt.rounds + 1), settings):
        name = _name(setting)
        with Process(setting) as process:
            loaded = process.ask("load", {})
            if setting.subject != "ours" and recipe == "channels-last":
                process.ask("arrange", {"channels_last": True})
            outdir = str(scratch / f"{name}-{size}-{number}")
            answer = process.ask("run", _work(size, opt.steps, 0, number, outdir))
        seconds = {**loaded["seconds"], **answer["seconds"]}
        yield Sample(name, size, number, True, seconds, answer["memory"], answer["load average"])


def ratios(samples: Sequence[Sample], phase: str, ours: str, peer: str) -> list[float]:
    """Returns our median time in a phase over the peer's, round by round."""
    medians = {
        (s.subject, s.round): statistics.median(s.seconds[phase]) for s in samples if s.seconds.get(phase)
    }
    rounds = sorted({number for _, number in medians})
    return [
        medians[ours, r] / medians[peer, r] for r in rounds if (ours, r) in medians and (peer, r) in medians
    ]


def _tell(report: Report, samples: Sequence[Sample], names: Sequence[str], size: int) -> None:
    """Reports every sample as a line, and a table of phases by subject."""
    for sample in samples:
        report.line("sample", asdict(sample))
    how = "fresh processes" if samples[0].fresh else "processes that live on"
    report.title(f"{size}x{size}, {how}, seconds: median (min, interquartile range)")
    report.text("".join(f"{head:<32}" for head in ("", *names)))
    for phase in PHASES:
        cells = [_cell(_times(samples, phase, name)) for name in names]
        if any(cells):
            report.text("".join(f"{cell:<32}" for cell in (phase, *cells)))
    for kind in samples[0].memory:
        peaks = [max(s.memory[kind] for s in samples if s.subject == name) / 2**30 for name in names]
        report.text("".join(f"{cell:<32}" for cell in (f"peak {kind}", *(f"{p:.2f} GiB" for p in peaks))))
    for peer in names[1:]:
        _tell_ratios(report, samples, names[0], peer, size)


def _times(samples: Sequence[Sample], phase: str, subject: str) -> list[float]:
    """Returns all times of a subject in a phase, over all rounds."""
    return [seconds for s in samples if s.subject == subject for seconds in s.seconds.get(phase, ())]


def _cell(times: Sequence[float]) -> str:
    if not times:
        return ""
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
    return f"{statistics.median(times):.4f} ({min(times):.4f}, {high - low:.4f})"


def _tell_ratios(report: Report, samples: Sequence[Sample], ours: str, peer: str, size: int) -> None:
    report.title(f"time of {ours} / {peer}, by round (below 1: {ours} is faster)")
    for phase in PHASES:
        if values := ratios(samples, phase, ours, peer):
            middle, worst = statistics.median(values), max(values)
            best = min(_times(samples, phase, ours)) / min(_times(samples, phase, peer))
            what = {"phase": phase, "size": size, "ours": ours, "peer": peer, "fresh": samples[0].fresh}
            figures = {"median": middle, "worst": worst, "of minima": best}
            report.line("ratio", {**what, **figures, "rounds": values})
            told = "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
            report.text(f"{phase:<22}{told}  rounds {' '.join(f'{value:.3f}' for value in values)}")


def _tell_errors(
    opt: argparse.Namespace,
    report: Report,
    settings: Sequence[Setting],
    processes: Mapping[str, Process],
    size: int,
    scratch: Path,
) -> None:
    """Reports the distance of each subject from our float32 results."""
    reference = scratch / f"reference-{size}.pt"
    fields = {"size": size, "steps": opt.steps, "reference": str(reference)}
    if not reference.exists():
        with Process(replace(settings[0], precision="full", compiled=False)) as process:
            process.ask("load", {})
            process.ask("check", fields)
    report.title(f"{size}x{size}: distance from our float32 results (relative L2)")
    for name, process in processes.items():
        error = process.ask("check", fields)["error"]
        report.line("error", {"subject": name, "size": size, "steps": opt.steps, **error})
        figures = ", ".join(f"{key} {value:.2e}" for key, value in error.items())
        report.text(f"{name:<32}{figures}")


def _facts_line(name: str, facts: Mapping[str, Any], subject: str, recipe: str) -> str:
    told = {key: value for key, value in facts.items() if value not in (None, {})}
    if subject != "ours":
        told["layout"] = recipe
    return f"{name}: " + ", ".join(f"{key} {value}" for key, value in told.items())
