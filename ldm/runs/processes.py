"""One run by several processes, on several devices and machines: which take part, and which images each makes.

`--devices N` starts N processes here (`ldm.runs.launch`). Where torchrun, SLURM, LSF or MPI has started them,
Lightning's Fabric finds this one's rank. They synchronise twice before the first image, so that all know the run's
numbers and its existing images. After that they are independent: each makes every world-th batch, and the last one to
end writes the files that need all images.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Generator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from ldm.files import temporary_folder
from ldm.runs.options import RunOptions
from ldm.util import InputError, need

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("ldm")

PATIENCE = timedelta(minutes=15)  # for the slowest process to load its model
_LAUNCHERS = (
    "SLURM_",
    "LSB_",
    "OMPI_",
    "PMI_",
    "PMIX_",
    "MPI_",
    "MV2_",
    "HYDRA_",
)  # prefix of their variables
TEMPORARY = "ldm-v1-processes-"  # prefix of the names of temporary folders
MEETING, PARENT = "LDM_MEETING", "LDM_PARENT"  # set for the processes that are started here
_Item = TypeVar("_Item")


class ProcessInfo:
    """The only process of a run, on its device."""

    rank, world = 0, 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def share(self, batches: Sequence[_Item]) -> Sequence[_Item]:
        """Returns this process's share of the batches."""
        return batches[self.rank :: self.world]

    def agree(self, number: int = 0) -> int:
        """Returns the number of rank 0, on all ranks."""
        return number

    def barrier_then_detach(self) -> None:
        """Waits for all ranks, then leaves the process group: ranks do not communicate after this."""

    @property
    def supervised(self) -> bool:
        """Whether another process waits for this one, and reports its result."""
        return self.world > 1 and _is_started_here()

    @property
    def deserted(self) -> bool:
        """Whether the parent process is gone, so that no process would stop this one."""
        parent = os.environ.get(PARENT, "") if self.supervised else ""
        return parent.isdigit() and int(parent) != os.getppid()


class DistributedProcess(ProcessInfo):
    """One process of several. Raises InputError if they cannot connect."""

    def __init__(self, options: RunOptions, device: torch.device) -> None:
        from lightning_fabric import Fabric
        from lightning_fabric.strategies import DDPStrategy

        devices, nodes = asked_for(options)
        if nodes == 1 and MEETING in os.environ:
            _meet_by_file(devices)
        strategy = DDPStrategy(process_group_backend="gloo", timeout=PATIENCE)
        try:
            # they exchange only numbers, so they connect on the CPU, whatever device computes
            self._fabric = Fabric(accelerator="cpu", devices=devices, num_nodes=nodes, strategy=strategy)
            self._fabric.launch()
        except (ValueError, RuntimeError, KeyError) as error:
            raise InputError(f"the processes cannot meet: {_line(error)}") from error
        self.rank, self.world = self._fabric.global_rank, self._fabric.world_size
        super().__init__(_own_device(device, self._fabric.local_rank))

    def agree(self, number: int = 0) -> int:
        import torch

        with _together():  # a sum to which only rank 0 contributes: no pickle is sent
            number = 0 if self.rank else number
            agreed = cast("torch.Tensor", self._fabric.all_reduce(torch.tensor(number), reduce_op="sum"))
        return int(agreed)

    def barrier_then_detach(self) -> None:
        import torch

        with _together():
            self._fabric.barrier()
        torch.distributed.destroy_process_group()
        if self.supervised:
            begun_file(os.environ[MEETING]).touch()


def join(options: RunOptions, device: torch.device) -> ProcessInfo:
    """Returns this process's rank in the run, and its device."""
    return DistributedProcess(options, device) if is_one_of_several(options) else ProcessInfo(device)


def silence_other_ranks(options: RunOptions) -> None:
    """Logs errors only on ranks other than 0 until the process group is initialised: rank 0 logs the rest."""
    if is_one_of_several(options) and (_is_started_here() or os.environ.get("LOCAL_RANK", "0") != "0"):
        logger.setLevel(logging.ERROR)


def _is_started_here() -> bool:
    """Returns whether this process is one of those that `start` starts."""
    return PARENT in os.environ and MEETING in os.environ


def is_one_of_several(options: RunOptions) -> bool:
    """Returns whether several processes make the run."""
    devices, nodes = asked_for(options)
    return devices * nodes > 1


def starts_all(options: RunOptions) -> bool:
    """Returns whether this process starts all others of the run."""
    return asked_for(options)[1] == 1 and not started_by_another()


def check(options: RunOptions, device: torch.device, reads_input: bool = False) -> str | None:
    """Checks that the options go together, else raises InputError.

    A run that `reads_input` gets its prompts from standard input. If this process will start others, it copies the
    input to a file for them and returns its name.
    """
    for name in ("devices", "num_nodes"):
        value = getattr(options, name)
        need(value is None or 1 <= value <= 1024, f"--{name} is {value}; give 1 to 1024")
    if not is_one_of_several(options):
        return None
    need(not options.skip_save, "--skip_save leaves no files for several processes to share; leave it out")
    need(device.type != "mps", "there is one mps device; leave --devices out")
    need(":" not in str(device), f"--devices counts from the first, so give --device cuda, not {device}")
    need(
        importlib.util.find_spec("lightning_fabric") is not None,
        "several devices need the package pytorch-lightning, which is not installed: run pip install -e .",
    )
    if not reads_input or PARENT in os.environ:
        return None
    need(not started_by_another(), "only one process can read --from-file -; give a file")
    return _copy_input()


def asked_for(options: RunOptions) -> tuple[int, int]:
    """Returns the number of devices per machine, and of machines; torchrun sets both itself."""
    local, world = (os.environ.get(name, "") for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and local.isdigit() and world.isdigit()
    devices = options.devices or (int(local) if by_torchrun else 1)
    return devices, options.num_nodes or (max(int(world) // int(local), 1) if by_torchrun else 1)


def _own_device(device: torch.device, local_rank: int) -> torch.device:
    import torch

    if device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    if count == 1 and PARENT not in os.environ:  # the launcher shows each process one device
        return device
    need(
        local_rank < count,
        f"torch sees {count} CUDA devices, too few for process {local_rank} of this machine",
    )
    return torch.device("cuda", local_rank)


def _meet_by_file(world: int) -> None:
    """Connects the processes that were started on this machine through a file, without the network."""
    import torch

    torch.distributed.init_process_group(
        "gloo", init_method=Path(os.environ[MEETING], "store").as_uri(), rank=int(os.environ["LOCAL_RANK"]),
        world_size=world, timeout=PATIENCE,
    )  # fmt: skip


@contextlib.contextmanager
def _together() -> Generator[None]:
    """Raises an error of one line if another process is missing."""
    try:
        yield
    except RuntimeError as error:
        logger.debug("%s", error)
        raise InputError(
            "another process of this run ended before the first image; see its messages"
        ) from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def begun_file(meeting: str) -> Path:
    """Returns the file whose existence means that all processes have connected and begun."""
    return Path(meeting, "begun")


def started_by_another() -> bool:
    """Returns whether a launcher has started the processes already."""
    if "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return True
    if not any(name.startswith(_LAUNCHERS) for name in os.environ):  # importing Fabric takes seconds
        return False
    from lightning_fabric.plugins import environments as known

    launchers = (known.SLURMEnvironment, known.LSFEnvironment, known.MPIEnvironment)
    return any(launcher.detect() for launcher in launchers)


def _copy_input() -> str:
    """Replaces standard input with a copy in a file, so that every process can read it; returns its name."""
    keeper = contextlib.ExitStack()  # until the end
    atexit.register(keeper.close)
    kept = keeper.enter_context(temporary_folder(TEMPORARY, Path(tempfile.gettempdir()))) / "input"
    with kept.open("w+b") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
        file.seek(0)
        os.dup2(file.fileno(), 0)
    return str(kept)
