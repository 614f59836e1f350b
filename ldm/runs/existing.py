"""The images of a run whose files exist: whole ones, and damaged ones."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.files import open_regular
from ldm.util import InputError, printable

if TYPE_CHECKING:
    import numpy as np

    from ldm.runs.run_file import RunFile


logger = logging.getLogger("ldm")


class Present:
    """The images of a run whose files exist: `whole` ones, and with `verify` those that are `damaged`."""

    def __init__(self, run: RunFile, verify: bool) -> None:
        there = run.existing()
        self.damaged = {i for i in there if verify and not is_whole(run.sample_path(i))}
        self.whole = there - self.damaged
        for i in sorted(self.damaged):
            logger.warning("%s is damaged and will be replaced", printable(run.sample_path(i)))

    def lacks(self, indices: Sequence[int]) -> bool:
        """Returns whether an image of a batch is missing."""
        return any(i not in self.whole for i in indices)


def read_pixels(path: Path) -> np.ndarray:
    """Reads the uint8 pixels [H, W, 3] of an image of this run; InputError if the file is damaged."""
    import numpy as np
    from PIL import Image

    try:
        with open_regular(path) as file, Image.open(file, formats=["PNG"]) as image:
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = printable(error).replace(printable(path), "it")
        raise InputError(
            f"{printable(path)} cannot be read ({reason}); --resume --verify makes it again"
        ) from None


def is_whole(path: Path) -> bool:
    """Returns whether a PNG file is undamaged: every checksum, and the pixels."""
    from PIL import Image

    try:
        with open_regular(path) as file, Image.open(file, formats=["PNG"]) as image:
            image.verify()
        read_pixels(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
    return True
