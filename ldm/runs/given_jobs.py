"""A plan of jobs that are known already, such as those of an image that is recreated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, overload

from ldm.job import Init, Job
from ldm.prompts.files import Faults
from ldm.runs.plan import Plan, RequestedPrompts

if TYPE_CHECKING:
    from ldm.images.canvas import Canvas
    from ldm.models.diffusion.noise import StreamPlace


class GivenJobs(Plan):
    """A plan of jobs that are known already, in batches of `size`; only the last batch is made.

    With `stream` its noise is that of an image at this position in the noise stream of another run.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        size: int,
        canvases: Callable[[Init], Canvas],
        stream: StreamPlace | None = None,
    ) -> None:
        self._jobs, self._size, self.canvases, self.stream = jobs, size, canvases, stream
        self.prompts, self.combinations = RequestedPrompts(Faults(), [], None), [{}]

    def __len__(self) -> int:
        return len(self._jobs)

    @overload
    def __getitem__(self, index: int) -> Job: ...
    @overload
    def __getitem__(self, index: slice) -> list[Job]: ...
    def __getitem__(self, index: int | slice) -> Job | list[Job]:
        return list(self._jobs[index]) if isinstance(index, slice) else self._jobs[index]

    def batches(self) -> list[list[int]]:
        starts = range(0, len(self._jobs), self._size)
        return [list(range(i, min(i + self._size, len(self._jobs)))) for i in starts]

    def wanted(self) -> list[list[int]]:
        return self.batches()[-1:]

    def kinds(self) -> Iterator[Job]:
        yield from dict.fromkeys(self._jobs)
