"""Modules that have moved can be imported by the names of earlier commits."""

import importlib
import subprocess
import sys

import pytest

from ldm.former import MOVED, SUCCESSORS
from tests.support.paths import ROOT


@pytest.mark.parametrize("name", SUCCESSORS)
def test_a_former_name_gives_what_its_successors_hold(name):
    sys.modules.pop(name, None)
    with pytest.warns(DeprecationWarning, match=f"{name} is now {SUCCESSORS[name][0]}"):
        former = importlib.import_module(name)
    first = importlib.import_module(SUCCESSORS[name][0])
    public = {key: value for key, value in vars(first).items() if not key.startswith("_")}
    assert public and all(getattr(former, key) is value for key, value in public.items())


@pytest.mark.long
def test_the_functions_that_were_there_are_there():
    code = (
        "from ldm.images.foreign import Recipe, read_job\n"
        "from ldm.checkpoints.lora import LoraStack\n"
        "from ldm.checkpoints.reader import model_files, read_checkpoint, read_model\n"
        "from ldm.checkpoints.recognise import kind_of\n"
        "from ldm.pipeline.picture import Paste, Picture\n"
        "from ldm.pipeline import GeneratedImage; assert Picture is GeneratedImage\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_nothing_of_this_package_uses_a_former_name():
    for path in (ROOT / "ldm").rglob("*.py"):
        text = path.read_text()
        assert path.name == "former.py" or not any(f"from {name} import" in text for name in SUCCESSORS), path


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, (_, names) in MOVED.items() for n in names])
def test_a_name_that_moved_is_what_it_is_in_its_new_module(module, name):
    new = importlib.import_module(MOVED[module][0])
    with pytest.warns(DeprecationWarning, match=f"{name} is now {new.__name__}.{name}"):
        assert getattr(importlib.import_module(module), name) is getattr(new, name)
    with pytest.raises(AttributeError, match="has no attribute"):
        _ = importlib.import_module(module).nothing


def test_the_table_of_samplers_has_its_former_name_too():
    import ldm.pipeline
    from ldm.models.diffusion.ddim import DDIMSampler

    with pytest.warns(DeprecationWarning, match="SAMPLERS is now SOLVERS"):
        assert ldm.pipeline.SAMPLERS["ddim"] is DDIMSampler
    with pytest.raises(AttributeError, match="SAMPLES"):
        _ = ldm.pipeline.SAMPLES
