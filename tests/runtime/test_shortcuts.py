"""Products that are left out: the authors' own programs on diffusers, and what must not change."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.checkpoints.layouts.names import to_diffusers
from ldm.checkpoints.layouts.settings import component_configs
from ldm.job import Job
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.passes import check_sampling
from ldm.pipeline import Pipeline
from ldm.runtime.fast import accelerate
from ldm.runtime.packing import Packer
from ldm.runtime.shortcuts import Matching, full_steps, shortcuts
from ldm.util import InputError
from tests.support.golden_data import relative_error, tiny_model

TIMES = [901, 801, 701, 601, 501, 401, 301]


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return tiny_model()


@pytest.fixture(scope="module")
def theirs(model: LatentDiffusion) -> Any:
    """diffusers' U-Net with the tiny model's weights."""
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel(**component_configs(model)["unet"]).eval()
    unet.load_state_dict(to_diffusers(model.state_dict())["unet"])
    return unet.requires_grad_(False)


def inputs(seed: int, side: int = 16) -> Tensor:
    return torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(seed))


CONTEXT = torch.randn(2, 77, 64, generator=torch.Generator().manual_seed(99))


@torch.inference_mode()
@pytest.mark.parametrize(
    ("interval", "branch"),
    [
        (3, 0),
        *(pytest.param(*case, marks=pytest.mark.long) for case in [(2, 1), (3, 2), (2, 3), (3, 7), (5, 10)]),
    ],
)
def test_deepcache(model: LatentDiffusion, theirs: Any, interval: int, branch: int) -> None:
    """The authors' package, with each step's own latents."""
    deepcache = pytest.importorskip("DeepCache")
    pipe = SimpleNamespace(unet=theirs, scheduler=SimpleNamespace(timesteps=[torch.tensor(t) for t in TIMES]))
    helper = deepcache.DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    network = model.model.diffusion_model
    exact = [network(inputs(i), torch.tensor([t, t]), CONTEXT) for i, t in enumerate(TIMES)]
    helper.enable()
    try:
        with shortcuts(network, (interval, branch), 0.0, len(TIMES)) as stepped:
            for i, t in enumerate(TIMES):
                expected = theirs(inputs(i), torch.tensor(t), CONTEXT, return_dict=False)[0]
                got = network(inputs(i), torch.tensor([t, t]), CONTEXT)
                stepped()
                assert relative_error(got, expected) < 1e-5
                assert torch.equal(got, exact[i]) == (i % interval == 0)
    finally:
        helper.disable()


@torch.inference_mode()
@pytest.mark.parametrize(("height", "width", "ratio"), [(8, 8, 0.5), (6, 10, 0.3), (7, 9, 0.75), (4, 4, 0.1)])
def test_tokens_are_merged_as_by_tomesd(height: int, width: int, ratio: float) -> None:
    merge = pytest.importorskip("tomesd").merge
    tokens, x = (
        torch.randn(3, height * width, 16, generator=torch.Generator().manual_seed(i)) for i in (1, 2)
    )
    r = int(height * width * ratio)
    theirs = merge.bipartite_soft_matching_random2d(tokens, width, height, 2, 2, r, no_rand=True)
    ours = Matching(tokens, height, width, ratio)
    assert ours.merge(x).shape == theirs[0](x).shape
    assert torch.allclose(ours.unmerge(ours.merge(x)), theirs[1](theirs[0](x)), atol=1e-6)


@torch.inference_mode()
def test_a_network_with_merged_tokens(model: LatentDiffusion, theirs: Any) -> None:
    tomesd = pytest.importorskip("tomesd")
    unet = copy.deepcopy(theirs)
    tomesd.apply_patch(unet, ratio=0.5, use_rand=False)
    network = model.model.diffusion_model
    expected = unet(inputs(0), torch.tensor(500), CONTEXT, return_dict=False)[0]
    with shortcuts(network, (), 0.5, 1):
        got = network(inputs(0), torch.tensor([500, 500]), CONTEXT)
    assert relative_error(got, expected) < 1e-5
    assert relative_error(network(inputs(0), torch.tensor([500, 500]), CONTEXT), expected) > 1e-3


@torch.inference_mode()
@pytest.mark.parametrize("settings", [((), 0.0), ((1,), 0.0), ((1, 3), 0.0)])
def test_nothing_to_leave_out_changes_nothing(model: LatentDiffusion, settings: Any) -> None:
    network = model.model.diffusion_model
    before = dict(vars(network))
    exact = network(inputs(0), torch.tensor([500, 500]), CONTEXT)
    with shortcuts(network, settings[0], settings[1], 9) as stepped:
        assert vars(network) == before
        for _ in range(3):
            assert torch.equal(network(inputs(0), torch.tensor([500, 500]), CONTEXT), exact)
            stepped()
    with shortcuts(network, (2, 1), 0.5, 9):
        assert vars(network) != before
    assert vars(network) == before and not any(
        m._forward_pre_hooks or m._forward_hooks for m in network.modules()
    )


@torch.inference_mode()
@pytest.mark.long
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("branch", [0, 4])
def test_a_step_with_the_same_input_gives_the_same(branch: int, fast: bool) -> None:
    """Also in the fast network, which computes equal halves once, with control maps, and after changes."""
    network = tiny_model().model.diffusion_model
    if fast:
        accelerate(network, Packer(torch.float32, lambda weight: None))
    both, times = torch.cat([inputs(0)[:1]] * 2), torch.tensor([500, 500])
    x, other = inputs(1), CONTEXT.clone()
    maps = [torch.full_like(h, 0.1) for h in network.encode(x, network.embed_time(times), CONTEXT)]
    given = [
        (both, CONTEXT, {}),
        (x, CONTEXT.clone(), {"control": maps, "features": {0: maps[0]}}),
        (x[:1], other[:1], {}),
        (x, other, {}),
    ]
    exact = [network(z, times[: len(z)], c, **more) for z, c, more in given]
    with shortcuts(network, (9, branch), 0.0, 9) as stepped:
        for (z, c, more), expected in zip(given, exact, strict=True):
            for _ in range(3):
                assert relative_error(network(z, times[: len(z)], c, **more), expected) < 1e-6
                stepped()
        kept = network(inputs(2), times, other)
        assert relative_error(kept, network.__class__.forward(network, inputs(2), times, other)) > 1e-3


def test_the_steps_that_are_whole() -> None:
    assert (
        full_steps(10, 3) == {0, 3, 6, 9} and full_steps(4, 9) == {0} and full_steps(5, 1) == {0, 1, 2, 3, 4}
    )
    for centre in (0, 12, 25, 50):
        found = sorted(full_steps(50, 5, centre))
        gaps = {at: b - a for a, b in zip(found, [*found[1:], 50], strict=True) for at in range(a, b)}
        assert found[0] == 0 and 8 <= len(found) <= 10
        assert gaps[min(centre, 49)] <= min(gaps.values()) + 1 and max(gaps.values()) > 5


FIELDS: dict[str, Any] = {"width": 64, "height": 64, "steps": 6, "seed": 1}


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.from_pretrained(precision="full", device="cpu", safety=False)


def latent(pipeline: Pipeline, **fields: Any) -> Tensor:
    found = pipeline.make(Job("a red cube", **{**FIELDS, **fields}))[0].latent
    assert found is not None
    return found


@pytest.mark.long
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"scale": 1.0},
        {"sampler": "heun", "steps": 4},
        {"sampler": "plms"},
        {"guidance_interval": (0.3, 0.8)},
        {"upscale": 1.5, "upscale_in": "latents"},
        {"prompt": "a red [cube:sphere:0.5]", "prompt_syntax": "a1111"},
    ],
    ids=lambda fields: ",".join(fields) or "plain",
)
def test_an_image_does_not_depend_on_the_ones_around_it(pipeline: Pipeline, fields: dict[str, Any]) -> None:
    """In a batch, alone, and again after another: equal; and not equal to the exact one."""
    jobs = [Job(**{**FIELDS, "prompt": text, "seed": seed, **fields, "cache_steps": (2, 1), "merge_tokens": 0.3})
            for text, seed in (("a red cube", 1), ("a blue sphere", 2))]  # fmt: skip
    together = [picture.latent for picture in pipeline.make(jobs)]
    for job, one in zip(jobs, together, strict=True):
        alone = pipeline.make(job)[0].latent
        assert alone is not None and one is not None
        assert relative_error(alone, one) < 1e-4
        again = pipeline.make(job)[0].latent
        assert again is not None and torch.equal(alone, again)
        exact = pipeline.make(Job(**{**FIELDS, "prompt": job.prompt, "seed": job.seed, **fields}))[0].latent
        assert exact is not None and 1e-3 < relative_error(alone, exact) < 1


def test_calls_of_a_solver_of_second_order(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both calls of a step are whole, or neither is: the middle block runs in the first and third step."""
    calls = []
    middle = pipeline.model.model.diffusion_model.middle_block
    hook = middle.register_forward_hook(lambda *_: calls.append(1))
    try:
        latent(pipeline, sampler="heun", steps=4, cache_steps=(2,))
        assert len(calls) == 4
        latent(pipeline, sampler="heun", steps=4)
        assert len(calls) == 4 + 7
    finally:
        hook.remove()


@pytest.mark.parametrize("wrong", [(0,), (3, -1), (-2,)])
def test_wrong_values_are_named(wrong: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="--cache_steps is"):
        check_sampling(Job("", cache_steps=wrong))


def test_a_branch_that_is_not_there_is_named(pipeline: Pipeline) -> None:
    with pytest.raises(InputError, match="has branch 5; this U-Net has branches 0 to 4"):
        latent(pipeline, cache_steps=(3, 5))
