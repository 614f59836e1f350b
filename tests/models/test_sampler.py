"""The samplers' public API."""

import numpy as np
import pytest
import torch

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.guidance import Guidance, join
from ldm.models.diffusion.noise import PhiloxNoise, TorchNoise
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampling_run import times_of
from tests.support.golden_data import TOLERANCE, figure, relative_error


class Shrinker:
    """Predicts x itself as the noise; one call a step, and every call is recorded."""

    num_timesteps = 1000
    device = torch.device("cpu")

    def __init__(self, tiny):
        self.alphas_cumprod, self.q_sample = tiny.alphas_cumprod, tiny.q_sample
        self.calls = []

    def apply_model(self, x, t, cond):
        self.calls.append((x.shape[0], int(t[0])))
        return x * cond


def run(sampler, **options):
    settings = {"S": 10, "batch_size": 2, "shape": (4, 3, 5), "conditioning": torch.full((2, 1, 1, 1), 0.5)}
    torch.manual_seed(3)
    return sampler.sample(**{**settings, "verbose": False, **options})


@pytest.mark.parametrize(("kind", "calls"), [(DDIMSampler, 10), (PLMSSampler, 11)])
def test_model_calls_and_callbacks(tiny, kind, calls):
    model, seen, images = Shrinker(tiny), [], []
    run(kind(model), callback=seen.append, img_callback=lambda x0, i: images.append((i, x0.shape)))
    assert len(model.calls) == calls
    assert seen == list(range(10))
    assert images == [(i, (2, 4, 3, 5)) for i in range(10)]


@pytest.mark.parametrize(("scale", "rows"), [(1.0, 2), (7.5, 4)])
def test_guidance_doubles_the_batch_unless_its_scale_is_one(tiny, scale, rows):
    model = Shrinker(tiny)
    run(
        DDIMSampler(model),
        unconditional_guidance_scale=scale,
        unconditional_conditioning=torch.zeros(2, 1, 1, 1),
    )
    assert {count for count, _ in model.calls} == {rows}


def test_guidance_formula_is_linear_in_the_scale(tiny):
    model, x, t = Shrinker(tiny), torch.randn(2, 4, 3, 5), torch.tensor([5, 5])
    cond, uncond = torch.full((2, 1, 1, 1), 0.5), torch.full((2, 1, 1, 1), 0.2)
    at = {s: Guidance(cond, uncond, s).noise(model, x, t) for s in (0.0, 1.0, 3.0)}
    assert torch.allclose(at[0.0], 0.2 * x)
    assert torch.allclose(at[3.0], at[0.0] + 3 * (at[1.0] - at[0.0]), atol=1e-6)


class Velocity(Shrinker):
    """Predicts v for the noise that `Shrinker` predicts, at the level of a timestep or between two."""

    parameterization = "v"

    def apply_model(self, x, t, cond):
        level = np.interp(t.double().numpy(), np.arange(1000), self.alphas_cumprod.double().log().numpy())
        alpha = torch.from_numpy(np.exp(level)).view(-1, 1, 1, 1)
        return ((super().apply_model(x, t, cond) - (1 - alpha) ** 0.5 * x) / alpha**0.5).float()


@pytest.mark.parametrize("kind", [DDIMSampler, PLMSSampler, DPMSolverSampler])
def test_a_model_of_v_gives_the_latents_of_the_same_model_of_the_noise(tiny, kind):
    options = {
        "unconditional_guidance_scale": 3.0,
        "unconditional_conditioning": torch.full((2, 1, 1, 1), 0.2),
    }
    (noise, _), (velocity, _) = (run(kind(model(tiny)), **options) for model in (Shrinker, Velocity))
    assert velocity.dtype == torch.float32
    assert relative_error(velocity, noise) < 1e-5


@pytest.mark.long
def test_rescaled_guidance(tiny):
    """Against diffusers' function; each sample has a share of its own, and 0 changes no bit."""
    pipelines = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    model, x, t = Shrinker(tiny), torch.randn(3, 4, 3, 5), torch.tensor([5, 5, 5])
    cond, uncond = torch.full((3, 4, 3, 5), 0.5), 0.2 * torch.randn(3, 4, 3, 5)
    plain = Guidance(cond, uncond, 7.5).noise(model, x, t)
    assert torch.equal(Guidance(cond, uncond, 7.5, 0.0).noise(model, x, t), plain)
    shares = torch.tensor([0.0, 0.7, 1.0])[:, None, None, None]
    found = Guidance(cond, uncond, 7.5, shares).noise(model, x, t)
    assert torch.equal(found[0], plain[0])
    for i, share in enumerate(shares.flatten().tolist()):
        expected = pipelines.rescale_noise_cfg(plain[i : i + 1], (x * cond)[i : i + 1], share)
        assert relative_error(found[i : i + 1], expected) < 1e-6
        assert (
            relative_error(Guidance(cond, uncond, 7.5, share).noise(model, x, t)[i : i + 1], expected) < 1e-6
        )
    assert torch.equal(Guidance(cond, cond * 0, 0.0, 0.7).noise(model, x, t), x * 0), (
        "nothing has no contrast"
    )


@pytest.mark.parametrize("kind", [DDIMSampler, PLMSSampler, DPMSolverSampler])
def test_a_run_rescales_its_guidance(tiny, kind):
    options = {
        "unconditional_guidance_scale": 3.0,
        "unconditional_conditioning": torch.full((2, 1, 1, 1), 0.2),
    }
    plain, off, on = (
        run(kind(Shrinker(tiny)), **options, **more)[0]
        for more in ({}, {"guidance_rescale": 0.0}, {"guidance_rescale": 1.0})
    )
    assert torch.equal(plain, off)
    # two conditionings that are multiples of x: full rescaling leaves the conditional prediction
    assert relative_error(on, run(kind(Shrinker(tiny)))[0]) < 1e-5


def test_join_keeps_the_structure():
    a, b = torch.zeros(1, 2), torch.ones(1, 2)
    joined = join({"c_crossattn": [a], "c_concat": [a]}, {"c_crossattn": [b], "c_concat": [b]})
    assert {key: [t.tolist() for t in value] for key, value in joined.items()} == {
        "c_crossattn": [[[0, 0], [1, 1]]],
        "c_concat": [[[0, 0], [1, 1]]],
    }


@pytest.mark.parametrize("kind", [DDIMSampler, PLMSSampler])
def test_a_mask_of_ones_gives_back_the_original(tiny, kind):
    x0 = torch.randn(2, 4, 3, 5)
    latents, _ = run(kind(Shrinker(tiny)), S=50, mask=torch.ones(1, 1, 3, 5), x0=x0)
    noise_left = (1 - float(tiny.alphas_cumprod[1])) ** 0.5
    assert float((latents - x0).abs().max()) < 6 * noise_left


def test_intermediates(tiny):
    _, trail = run(DDIMSampler(Shrinker(tiny)), log_every_t=5)
    # the start, the first step, and the steps with index 5 and 0
    assert [len(trail[key]) for key in ("x_inter", "pred_x0")] == [4, 4]


@pytest.mark.parametrize(("kind", "draws"), [(DDIMSampler, 10), (PLMSSampler, 11), (DPMSolverSampler, 0)])
def test_draws_follow_the_original_also_where_noise_has_no_use(tiny, kind, draws):
    x_T = torch.randn(2, 4, 3, 5)
    run(kind(Shrinker(tiny)), x_T=x_T)
    drawn = torch.randn(3)
    torch.manual_seed(3)
    for _ in range(draws):
        torch.randn(2, 4, 3, 5)
    assert torch.equal(drawn, torch.randn(3))


def test_a_generator_of_ones_own_leaves_the_global_one_alone(tiny):
    state = torch.get_rng_state()
    noise = TorchNoise(torch.Generator().manual_seed(1), torch.device("cpu"))
    DDIMSampler(Shrinker(tiny)).sample(
        S=3,
        batch_size=1,
        shape=(4, 2, 2),
        conditioning=torch.ones(1, 1, 1, 1),
        eta=1.0,
        noise=noise,
        verbose=False,
    )
    assert torch.equal(state, torch.get_rng_state())


def test_plms_takes_no_eta(tiny):
    with pytest.raises(ValueError, match=r"eta 0, not 0\.5"):
        run(PLMSSampler(Shrinker(tiny)), eta=0.5)


def test_decoding_all_original_steps_ends_clean(tiny):
    """With the true noise predicted at every step the last one returns the clean latent exactly."""
    x0, noise = torch.randn(1, 4, 3, 5), torch.randn(1, 4, 3, 5)

    class Oracle(Shrinker):
        def apply_model(self, x, t, cond):
            return noise.expand(x.shape)

    sampler = DDIMSampler(Oracle(tiny))
    sampler.make_schedule(10, verbose=False)
    z = sampler.stochastic_encode(x0, torch.tensor([30]), use_original_steps=True, noise=noise)
    assert torch.allclose(sampler.decode(z, None, 31, use_original_steps=True), x0, atol=1e-4)
    assert sampler.decode(z, None, 99).shape == x0.shape  # more steps than there are: all of them


def test_a_mask_works_with_every_sampler(tiny):
    latents, _ = run(
        DPMSolverSampler(Shrinker(tiny)), mask=torch.ones(1, 1, 3, 5), x0=torch.zeros(2, 4, 3, 5)
    )
    assert float(latents.abs().max()) < 1.0


def test_coefficients_are_where_scripts_look_for_them(tiny):
    sampler = DDIMSampler(tiny)
    sampler.make_schedule(20, ddim_eta=0.5, verbose=False)
    assert torch.allclose(sampler.ddim_alphas + sampler.ddim_sqrt_one_minus_alphas**2, torch.ones(20))
    assert sampler.ddim_alphas_prev[1:].tolist() == pytest.approx(sampler.ddim_alphas[:-1].tolist())


def test_original_steps(tiny):
    sampler = DDIMSampler(Shrinker(tiny))
    sampler.make_schedule(10, verbose=False)
    x0, noise = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    t = torch.tensor([0, 999])
    assert torch.allclose(
        sampler.stochastic_encode(x0, t, use_original_steps=True, noise=noise),
        tiny.q_sample(x0, t, noise),
        atol=1e-6,
    )


# --- one step at a time, as extensions of the original run it -------------------------------------------------


GUIDED = {"unconditional_guidance_scale": 7.5, "unconditional_conditioning": figure("sample/uncond")}


def walked(sampler, steps, **options):
    """The guided inputs of the figures, denoised step by step by hand."""
    sampler.make_schedule(steps, verbose=False, ddim_eta=options.pop("eta", 0.0))
    x, cond, past = figure("sample/x_T"), figure("sample/cond"), []
    times = [torch.full((2,), int(t)) for t in reversed(sampler.ddim_timesteps)]
    for i, t in enumerate(times):
        index = len(times) - i - 1
        if isinstance(sampler, DDIMSampler):
            x, _ = sampler.p_sample_ddim(x, cond, t, index=index, **GUIDED, **options)
        else:
            t_next = times[min(i + 1, len(times) - 1)]
            x, _, eps = sampler.p_sample_plms(x, cond, t, index, old_eps=past, t_next=t_next, **GUIDED)
            past = [*past, eps][-4:]
    return x


@pytest.mark.parametrize(
    ("kind", "options", "name"),
    [
        (DDIMSampler, {}, "ddim_S10_scale7.5"),
        (DDIMSampler, {"eta": 1.0}, "ddim_S10_eta1_torchseed7"),
        (PLMSSampler, {}, "plms_S10_scale7.5"),
    ],
)
def test_steps_taken_by_hand_give_the_figures_of_the_original(tiny, kind, options, name):
    torch.manual_seed(7)
    assert relative_error(walked(kind(tiny), 10, **options), figure(f"sample/{name}")) <= TOLERANCE


def test_a_first_step_of_plms_needs_the_next_timestep(tiny):
    sampler = PLMSSampler(Shrinker(tiny))
    sampler.make_schedule(10, verbose=False)
    with pytest.raises(ValueError, match="t_next"):
        sampler.p_sample_plms(torch.randn(1, 4, 2, 2), torch.ones(1, 1, 1, 1), torch.tensor([901]), 9)


def test_a_step_of_the_original_schedule_and_repeated_noise(tiny):
    sampler = DDIMSampler(Shrinker(tiny))
    sampler.make_schedule(10, ddim_eta=1.0, verbose=False)
    x, cond = torch.randn(1, 4, 3, 5).repeat(2, 1, 1, 1), torch.ones(2, 1, 1, 1)
    t = torch.tensor([500, 500])
    repeated, clean = sampler.p_sample_ddim(x, cond, t, 500, repeat_noise=True, use_original_steps=True)
    assert torch.equal(repeated[0], repeated[1])
    alpha = float(tiny.alphas_cumprod[500])
    assert torch.allclose(clean, x * (1 - (1 - alpha) ** 0.5) / alpha**0.5, atol=1e-6)
    fresh, _ = sampler.p_sample_ddim(x, cond, t, 500, use_original_steps=True)
    assert not torch.allclose(fresh[0], fresh[1])


def hooked_on_the_object(kind, name, calls, patch):
    def build(model):
        sampler = kind(model)
        own = getattr(sampler, name)

        def hook(x, cond, ts, unconditional_conditioning, *args, **kwargs):
            calls.append(kwargs["index"])
            return own(x, cond, ts, *args, unconditional_conditioning=unconditional_conditioning, **kwargs)

        setattr(sampler, name, hook)
        return sampler

    return build


def hooked_by_a_subclass(kind, name, calls, patch):
    def step(self, *args, **kwargs):
        calls.append(kwargs["index"])
        return getattr(kind, name)(self, *args, **kwargs)

    return type("Extension", (kind,), {name: step})


def hooked_on_the_class(kind, name, calls, patch):
    own = getattr(kind, name)

    def step(self, x, c, t, index, **kwargs):
        calls.append(index)
        return own(self, x, c, t, index, **kwargs)

    patch.setattr(kind, name, step)
    return kind


@pytest.mark.parametrize("hooked", [hooked_on_the_object, hooked_by_a_subclass, hooked_on_the_class])
@pytest.mark.parametrize(("kind", "name"), [(DDIMSampler, "p_sample_ddim"), (PLMSSampler, "p_sample_plms")])
def test_an_extension_takes_every_step_of_a_run(tiny, monkeypatch, hooked, kind, name):
    """In each of the ways in which extensions replace the original's step."""
    options = {
        "eta": 0.8 if kind is DDIMSampler else 0.0,
        "mask": torch.ones(1, 1, 3, 5).tril(),
        "x0": torch.zeros(2, 4, 3, 5),
        "temperature": 0.9,
        "unconditional_guidance_scale": 3.0,
        "unconditional_conditioning": torch.zeros(2, 1, 1, 1),
    }
    plain, _ = run(kind(Shrinker(tiny)), noise=PhiloxNoise(5, "cpu"), **options)
    calls = []
    sampler = hooked(kind, name, calls, monkeypatch)(Shrinker(tiny))
    latents, _ = run(sampler, noise=PhiloxNoise(5, "cpu"), **options)
    assert calls == list(range(9, -1, -1))
    assert torch.equal(latents, plain)
    calls.clear()
    sampler.decode(latents, torch.ones(2, 1, 1, 1), 5, use_original_steps=True)
    assert calls == [4, 3, 2, 1, 0]


@pytest.mark.parametrize(
    ("kind", "t", "expected"),
    [
        (torch.float64, 999 / 7, torch.float64),
        (torch.float32, 999 / 7, torch.float32),
        (torch.float64, 3, torch.int64),
    ],
)
def test_timesteps_are_as_exact_as_the_latents(kind, t, expected):
    times = times_of(torch.zeros(2, 4, 1, 1, dtype=kind), t)
    assert times.dtype == expected and times.tolist() == pytest.approx([t, t], rel=1e-7)
    assert expected != torch.float64 or times[0].item() == t
