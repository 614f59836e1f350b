"""One measured process: reads orders as JSON lines from stdin and answers each with a JSON line on stdout.

The first line is its `Setting`. Orders: `prepare`, `load`, `run`, `arrange`, `check`.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from ldm.benchmark.subjects import PROMPT, Diffusers, Enough, OpenSubject, Ours, Setting, Subject, Work

if TYPE_CHECKING:
    from torch import Tensor


def _peer(name: str) -> Callable[[Setting], Subject]:
    """Returns a class of `peers`, which is imported when the subject is made."""
    return lambda setting: getattr(importlib.import_module("ldm.benchmark.peers"), name)(setting)


SUBJECTS: dict[str, Callable[[Setting], Subject]] = {
    "ours": Ours,
    "diffusers": Diffusers,
    "openvino": _peer("OpenVino"),
    "sdcpp": _peer("StableDiffusionCpp"),
    "zentorch": _peer("Zentorch"),
}


class Worker:
    """Executes orders. Each order is a method; its fields are the parameters."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.subject: Subject

    def prepare(self, cache: str, peer_dtypes: list[str], picture: bool) -> dict[str, Any]:
        """Returns checkpoint, peer folders and image, which are made if missing."""
        from ldm.benchmark.weights import prepare
        from ldm.config import read_config

        config = read_config(self.setting.config)
        return prepare(config, self.setting.ckpt, Path(cache), peer_dtypes, picture)

    def load(self) -> dict[str, Any]:
        """Imports the subject, then loads the checkpoint until it is ready."""
        import torch

        if self.setting.subject == "ours":
            importlib.import_module("ldm.pipeline")
        elif self.setting.folder:
            import diffusers

            # diffusers imports its parts at their first use
            _ = diffusers.StableDiffusionPipeline, diffusers.StableDiffusionImg2ImgPipeline
        if self.setting.threads:
            torch.set_num_threads(self.setting.threads)
        imported = time.time()
        self.subject = SUBJECTS[self.setting.subject](self.setting)
        self.subject.watch.settle()
        seconds = {"import": [imported - self.setting.spawned], "load": [time.time() - imported]}
        return {"seconds": seconds, "facts": self.subject.facts() | _machine(), "memory": self._memory()}

    def arrange(self, channels_last: bool) -> dict[str, Any]:
        cast("OpenSubject", self.subject).arrange(channels_last)
        return {"facts": self.subject.facts()}

    def run(self, **fields: Any) -> dict[str, Any]:
        """Runs one batch; returns the seconds of its phases, and those since the process was started."""
        work, watch = Work(**fields), self.subject.watch
        self.subject.compiling = 0.0
        images = self._make(work)
        seconds = watch.seconds()
        if self.subject.compiling:
            seconds["compile"] = [self.subject.compiling]
        if work.outdir:
            before = time.perf_counter()
            self.subject.save(images, Path(work.outdir))
            seconds["png"] = [time.perf_counter() - before]
            seconds["start to first step"] = [watch.first_step_at - self.setting.spawned]
            seconds["whole run"] = [time.time() - self.setting.spawned]
        return {"seconds": seconds, "memory": self._memory(), "load average": _load_average()}

    def _make(self, work: Work) -> list[Any]:
        self.subject.watch.start(work)
        try:
            return self.subject.make(work, self._noise(work.size))
        except Enough:
            return []

    def _noise(self, size: int) -> Tensor:
        import torch

        generator = torch.Generator().manual_seed(self.setting.seed)
        channels, factor = self.subject.latents
        shape = (self.setting.batch, channels, size // factor, size // factor)
        return torch.randn(shape, generator=generator).to(self.subject.watch.device)

    def check(self, size: int, steps: int, reference: str) -> dict[str, Any]:
        """Returns the distance of latents, one U-Net call and a decoded image from the reference, as relative L2.

        The first process that checks writes the reference.
        """
        import torch

        subject = cast("OpenSubject", self.subject)
        with torch.inference_mode():
            self._make(Work(size, steps, 0, 0, ""))
            latents: Tensor = torch.cat(subject.watch.latents).float().cpu()
            if isinstance(subject, Diffusers):
                latents *= subject.pipe.vae.config.scaling_factor
            if not os.path.exists(reference):
                torch.save(self._reference(size, latents), reference)
            known = torch.load(reference, weights_only=True)
            device = subject.watch.device
            inputs = [known[name].to(device) for name in ("x", "t", "context")]
            found = {
                "latents": latents,
                "unet": subject.predict(*inputs),
                "picture": subject.decode(known["latents"].to(device)),
            }
            return {"error": {key: _relative(value, known[key]) for key, value in found.items()}}

    def _reference(self, size: int, latents: Tensor) -> dict[str, Tensor]:
        import torch

        assert isinstance(self.subject, Ours)
        x = torch.cat([self._noise(size)] * 2)
        t = torch.full((len(x),), 981, device=x.device)
        prompts = ["0", PROMPT.format(0)]
        context = self.subject.encode(prompts).repeat_interleave(self.setting.batch, dim=0)
        eps = self.subject.predict(x, t, context)
        picture = self.subject.decode(latents.to(x.device))
        values = {"x": x, "t": t, "context": context, "unet": eps, "picture": picture, "latents": latents}
        return {name: value.cpu() for name, value in values.items()}

    def _memory(self) -> dict[str, int]:
        """Returns the peak memory so far in bytes, by kind."""
        import torch

        from ldm.runtime.memory import peak_resident

        memory = {"resident": peak_resident()}
        device = self.subject.watch.device
        if device.type == "cuda":
            memory["allocated"] = torch.cuda.max_memory_allocated(device)
            memory["reserved"] = torch.cuda.max_memory_reserved(device)
        return memory


def _relative(value: Tensor, expected: Tensor) -> float:
    difference = value.double().cpu() - expected.double()
    return float(cast("Tensor", difference.norm() / expected.double().norm()))


def _load_average() -> float | None:
    return os.getloadavg()[0] if sys.platform != "win32" else None


def _machine() -> dict[str, Any]:
    """Returns the facts of the machine that the figures depend on."""
    import torch

    from ldm.runtime import kernels, native

    settings = ("GLIBC_TUNABLES", "LD_PRELOAD", "OMP_NUM_THREADS", "KMP_AFFINITY")
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu kernels": torch.backends.cpu.get_cpu_capability(),
        "amx": kernels.has_matrix_units(),
        "avx512_bf16": native.has_bf16(),
        "compiled library": native.library() is not None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "environment": {k: v for k, v in os.environ.items() if k in settings or k.startswith("MALLOC_")},
        "load average": _load_average(),
    }


def main() -> NoReturn:
    """Executes orders until stdin ends."""
    from ldm.cli.app import missing_package
    from ldm.util import InputError

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of libraries must not be mixed with the answers
    worker = Worker(Setting(**json.loads(sys.stdin.readline())))
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = getattr(worker, order.pop("order"))(**order)
        except InputError as error:
            answer = {"refused": str(error)}
        except ImportError as error:
            answer = {"refused": missing_package(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    sys.exit(0)


if __name__ == "__main__":
    main()
