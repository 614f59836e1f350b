import logging
import os
from collections.abc import Iterator

# several test processes on as many cores spin against each other otherwise
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
else:
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
os.environ["XDG_DATA_HOME"] = os.devnull  # a developer's weights do not change a test

import pytest

# torch and ldm are imported below: the process that only deals out the tests does without


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips GPU tests where there is none, also when they were requested."""
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _own_messages() -> Iterator[None]:
    """A script's --quiet ends with the test that ran it."""
    logger = logging.getLogger("ldm")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(autouse=True)
def _shared_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process read and load a model of an earlier run once; the script would do it each time."""
    from tests.support.models import SHARED_MODELS, shared_reading

    monkeypatch.setattr("ldm.runs.model_cache.ModelCache.get", SHARED_MODELS.get)
    monkeypatch.setattr("ldm.checkpoints.model_files.read_model", shared_reading)


@pytest.fixture(autouse=True)
def _shared_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dry runs measure this machine once; the script would measure it each time."""
    from tests.support.models import shared_pace

    monkeypatch.setattr("ldm.runtime.estimate.measure_pace", shared_pace)


@pytest.fixture(scope="session")
def tiny():
    """The tiny model with rebuilt weights, on the CPU in float32; to copy or change one, build it.

    Runs pack its weights, and packed ones cannot be copied.
    """
    from tests.support.golden_data import tiny_model

    return tiny_model()
