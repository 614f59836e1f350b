"""The base class of the original's data sets of text and images that are read as streams."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import IterableDataset

logger = logging.getLogger(__name__)


class Txt2ImgIterableBaseDataset(IterableDataset[Any]):
    """An iterable data set that can be split among workers by `sample_ids`; subclasses define `__iter__`.

    `num_records` is its length, `valid_ids` the ids of all records and `size` the side of its images in pixels.
    """

    def __init__(self, num_records: int = 0, valid_ids: Sequence[Any] | None = None, size: int = 256):
        super().__init__()
        self.num_records, self.valid_ids, self.sample_ids, self.size = num_records, valid_ids, valid_ids, size
        logger.info("%s has %d examples", type(self).__name__, len(self))

    def __len__(self) -> int:
        return self.num_records

    @abstractmethod
    def __iter__(self) -> Iterator[Any]:
        """Yields the records of `sample_ids`."""
