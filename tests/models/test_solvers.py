"""Every solver against k-diffusion's own results, exact solutions, and the samplers of the original."""

import math
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ldm.job import Job
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.guidance import ZeroDenoiser
from ldm.models.diffusion.noise import PerImageNoise, PhiloxNoise, SkippingNoise
from ldm.models.diffusion.passes import schedule_length, steps_to_run
from ldm.models.diffusion.schedule import make_beta_schedule, zero_terminal_snr
from ldm.models.diffusion.schedules import Schedule
from ldm.models.diffusion.solvers import K_DIFFUSION, SOLVERS, solve
from ldm.util import InputError
from tests.support.gaussian import SIGMAS, GaussianModel, noise_of
from tests.support.golden_data import figure, figures, keys, relative_error
from tests.support.paths import ROOT

FILE = "samplers.npz"
CASES = sorted(key for key in figures(FILE) if key.count("/") == 2 and "exact" not in key)
NEW = [name for name, row in SOLVERS.items() if "." in row.path]
SHAPE = (2, 4, 6, 6)


def known_model(kind="gauss"):
    return GaussianModel(
        figure("gauss/mean", FILE), figure("gauss/var", FILE), 0.15 if kind == "lat" else 0.0
    )


@pytest.mark.parametrize("case", CASES)
def test_k_diffusion(case):
    kind, schedule, name = case.split("/")
    model, sigmas = known_model(kind), keys("schedules.json")[schedule]
    latents = solve(name, model, figure("x_T", FILE) * sigmas[0], sigmas, noise=noise_of(7, SHAPE))
    assert relative_error(latents, figures(FILE)[case]) < 2e-6 and latents.dtype == torch.float64
    calls = int(figures(FILE)[f"{case}/calls"])
    assert model.calls == calls == SOLVERS[K_DIFFUSION.get(name, name)].model_calls(len(sigmas) - 1)


def test_every_name_of_k_diffusion_is_tested():
    assert len(CASES) == 12 * 6
    names = {case.split("/")[2] for case in CASES}
    assert {K_DIFFUSION.get(name, name) for name in names} < set(SOLVERS) and set(K_DIFFUSION) < names


# --- exact solutions ------------------------------------------------------------------------------------------


def error_after(name, steps, **settings):
    """The error against the exact solution, from sigma 4 to 0.5 in steps that are even in log sigma."""
    model, x = known_model(), figure("x_T", FILE) * 4
    sigmas = np.geomspace(4, 0.5, steps + 1)
    return relative_error(solve(name, model, x, sigmas, **settings), model.exact(x, 4, 0.5))


@pytest.mark.parametrize("name", [name for name, row in SOLVERS.items() if not row.always_draws])
def test_order_of_convergence(name):
    """Measured from 40 and 80 steps without fresh noise: 1 or 2, as the table of solvers states."""
    settings = {"eta": 0} if "eta" in SOLVERS[name].settings else {}
    coarse, fine = (error_after(name, steps, **settings) for steps in (40, 80))
    order = SOLVERS[name].order
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)
    assert fine < (2e-2 if order == 1 else 1e-3)


# lcm and tcd are for models that jump to a sample, not to the mean of all
@pytest.mark.parametrize("name", [name for name in NEW if name not in ("lcm", "tcd")])
def test_spread_of_the_samples(name):
    """With or without fresh noise the clean latents have the mean and variance of the data."""
    model, x = GaussianModel(torch.tensor([0.5]), torch.tensor([0.3])), noise_of(3, (1, 1, 100, 60))
    sigmas = Schedule("karras").levels(60, model.alphas_cumprod.numpy())
    sigmas = ((1 - sigmas.alphas) / sigmas.alphas) ** 0.5
    start = 0.5 + torch.from_numpy(next(x)) * (sigmas[0] ** 2 + 0.3) ** 0.5
    found = solve(name, model, start, sigmas, noise=x)
    assert float(found.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(found.var()) == pytest.approx(0.3, rel=0.17)  # a method of order 1 errs by 0.11


def slope_of(model, z, sigma):
    """The predicted noise in z = x_0 + sigma eps."""
    time = np.interp(np.log(sigma), np.log(SIGMAS), np.arange(1000))
    return model.apply_model(z / (1 + sigma**2) ** 0.5, torch.full((2,), time, dtype=torch.float64), None)


def churned(name, model, x, sigmas, noise, churn, low, high, s_noise):
    """Karras et al. 2022, algorithm 2, and the second prediction of heun and dpm2, in their letters."""
    steps = len(sigmas) - 1
    for t, t_next in pairwise(sigmas):
        gamma = min(churn / steps, 2**0.5 - 1) if low <= t <= high else 0
        t_hat = t + gamma * t
        if gamma:
            x = x + (t_hat**2 - t**2) ** 0.5 * s_noise * torch.from_numpy(next(noise))
        d = slope_of(model, x, t_hat)
        if t_next and name == "heun":
            d = (d + slope_of(model, x + (t_next - t_hat) * d, t_next)) / 2
        if t_next and name == "dpm2":
            middle = (t_hat * t_next) ** 0.5
            d = slope_of(model, x + (middle - t_hat) * d, middle)
        x = x + (t_next - t_hat) * d
    return x


@pytest.mark.parametrize("name", ["euler", "heun", "dpm2"])
def test_noise_that_is_added_before_a_step(name):
    sigmas = keys("schedules.json")["karras_10"]
    x = figure("x_T", FILE) * sigmas[0]
    settings = {"s_churn": 3, "s_tmin": 0.1, "s_tmax": 9.5, "s_noise": 1.01}
    expected = churned(name, known_model("lat"), x, sigmas, noise_of(7, SHAPE), *settings.values())
    found = solve(name, known_model("lat"), x, sigmas, noise=noise_of(7, SHAPE), **settings)
    assert relative_error(found, expected) < 1e-12
    assert relative_error(solve(name, known_model("lat"), x, sigmas), expected) > 1e-3


def extended_reverse_sde(model, x, sigmas, noise, order):
    """ER-SDE-Solver-3 of Cui et al. 2023 as a sum of its stages, for levels given as noise over signal."""
    phi = lambda s: s * (np.exp(s**0.3) + 10)  # noqa: E731
    clean, first = [], []
    for i, (s, t) in enumerate(pairwise(sigmas)):
        clean.append(x - s * slope_of(model, x, s))
        if t == 0:
            return clean[-1]
        ratio, grid, width = phi(t) / phi(s), np.linspace(t, s, 200, endpoint=False), (s - t) / 200
        x = ratio * x + (1 - ratio) * clean[-1]
        if i > 0 and order > 1:
            first.append((clean[-1] - clean[-2]) / (s - sigmas[i - 1]))
            x = x + (t - s + phi(t) * (1 / phi(grid)).sum() * width) * first[-1]
        if i > 1 and order > 2:
            second = 2 * (first[-1] - first[-2]) / (s - sigmas[i - 2])
            x = x + ((t - s) ** 2 / 2 + phi(t) * ((grid - s) / phi(grid)).sum() * width) * second
        x = x + (t**2 - (s * ratio) ** 2) ** 0.5 * torch.from_numpy(next(noise))
    return x


@pytest.mark.parametrize("order", [1, 2, 3])
def test_er_sde_is_the_sum_of_its_stages(order):
    sigmas = keys("schedules.json")["karras_10"]
    x = figure("x_T", FILE) * sigmas[0]
    expected = extended_reverse_sde(known_model("lat"), x, sigmas, noise_of(7, SHAPE), order)
    found = solve("er_sde", known_model("lat"), x, sigmas, noise=noise_of(7, SHAPE), order=order)
    assert relative_error(found, expected) < 1e-12


def restarted(model, x, steps, noise, s_noise):
    """Restart sampling with the levels that A1111's web UI chooses, as the list of its steps."""
    low, high = SIGMAS[0], SIGMAS[-1]
    karras = lambda a, b, n: np.linspace(a ** (1 / 7), b ** (1 / 7), n) ** 7  # noqa: E731
    repeats, times = (9, 1) if steps < 36 else (steps // 4, 2)
    levels = np.append(karras(high, low, steps - repeats * times), 0)
    bottom, top = (int(np.abs(levels - place).argmin()) for place in (0.1, 2.0))
    again = karras(levels[top], levels[bottom], repeats + 1)
    runs = [levels[: bottom + 1], *times * [again], levels[bottom:]]
    assert sum(len(run) - 1 for run in runs) == steps
    before = high
    for run in runs:
        if run[0] > before + 1e-9:
            x = x + s_noise * (run[0] ** 2 - before**2) ** 0.5 * torch.from_numpy(next(noise))
        x, before = churned("heun", model, x, run, None, 0, 0, 0, 0), run[-1]
    return x


@pytest.mark.parametrize("steps", [20, 35, 36, 50])
def test_restart_goes_up_again(steps):
    sampler = SOLVERS["restart"].make(known_model("lat"), "karras", s_noise=0.9)
    sampler.make_schedule(steps, verbose=False)
    x, noise = figure("x_T", FILE) * SIGMAS[-1], noise_of(7, SHAPE)
    source = SimpleNamespace(draw=lambda shape: torch.from_numpy(next(noise)))
    found = sampler.decode(x / (1 + SIGMAS[-1] ** 2) ** 0.5, None, steps, noise=source)
    expected = restarted(known_model("lat"), x, steps, noise_of(7, SHAPE), 0.9)
    assert len(sampler.table) == steps and relative_error(found, expected) < 1e-9
    assert sampler.model.calls == SOLVERS["restart"].model_calls(steps)


def test_few_steps_of_restart_are_heuns():
    assert torch.equal(run_of("restart", "karras", steps=19), run_of("heun", "karras", steps=19))


# --- one theory: what solvers have in common --------------------------------------------------------------------


def run_of(name, schedule, model=None, noise=5, steps=8, **options):
    """The latents of a whole run in float32, from the CUDA generator's noise."""
    sampler = SOLVERS[name].make(model or known_model(), schedule)
    sampler.make_schedule(steps, ddim_eta=options.pop("eta", None), verbose=False)
    source = PhiloxNoise(noise, "cpu")
    x = sampler.starting(source.draw(SHAPE))
    return sampler.decode(x, None, steps, noise=source, **options)


@pytest.mark.parametrize(
    ("names", "schedule"),
    [
        (("ddim", "euler"), "original"),
        (("ddim", "euler"), "karras"),
        (("ddim", "dpm_solver"), Schedule("sigmas", values=(3, 0))),
        (("dpm_solver", "dpmpp_2m"), "exponential"),
        (("euler_a", "ddpm"), "original"),
    ],
)
def test_names_of_the_same_method(names, schedule):
    steps = 1 if isinstance(schedule, Schedule) else 8
    one, two = (run_of(name, schedule, steps=steps) for name in names)
    assert torch.equal(one, two) or relative_error(one, two) < 1e-6


@pytest.mark.parametrize("schedule", ["original", "karras"])
def test_euler_ancestral_is_ddim_with_eta_1(schedule):
    assert relative_error(run_of("euler_a", schedule), run_of("ddim", schedule, eta=1.0)) < 1e-6


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("schedule", ["original", "uniform", "beta", "lcm"])
def test_every_solver_runs_every_schedule(name, schedule):
    latents = run_of(name, schedule)
    assert latents.shape == SHAPE and latents.dtype == torch.float32 and latents.isfinite().all()
    # from the data's mean, which is that of each channel, no latent is far away
    assert float((latents.mean((0, 2, 3)) - figure("gauss/mean", FILE)).abs().max()) < 0.8


# --- the modes of the loop ---------------------------------------------------------------------------------------


class Recorder(PhiloxNoise):
    """Counts draws and what was skipped alike."""

    def __init__(self):
        super().__init__(1, "cpu")
        self.shapes = []

    def skip(self, shape):
        self.shapes.append(tuple(shape))
        super().skip(shape)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("masked", [False, True])
def test_noise_is_left_as_a_run_over_no_model_leaves_it(name, masked):
    """Which is how images are skipped; `draw` of this source skips too."""
    options = {"mask": torch.ones(1, 1, 6, 6), "x0": torch.zeros(SHAPE)} if masked else {}
    model, real, skipped = known_model(), Recorder(), Recorder()
    for one, source in ((model, real), (ZeroDenoiser(model.alphas_cumprod), SkippingNoise(skipped))):
        sampler = SOLVERS[name].make(one)
        sampler.make_schedule(20, verbose=False)  # as few as restart needs
        sampler.decode(torch.zeros(SHAPE), None, 12, noise=source, **options)
    assert real.shapes == skipped.shapes and real.offset == skipped.offset
    draws = len(real.shapes) - (12 if masked else 0)
    assert (draws > 0) == (SOLVERS[name].draws or name in ("ddim", "plms"))


@pytest.mark.parametrize("name", SOLVERS)
def test_a_mask_keeps_its_part(name):
    """The part is as noisy as the last step's start leaves it, and the rest is as it would be alone."""
    mask = torch.zeros(1, 1, 6, 6)
    mask[..., :3] = 1
    x0 = torch.full(SHAPE, 2.5)
    previews = []
    latents = run_of(
        name, "karras", steps=10, mask=mask, x0=x0, img_callback=lambda x, i: previews.append((i, x))
    )
    assert [i for i, _ in previews] == list(range(10))
    assert torch.allclose(previews[-1][1], latents, atol=1e-5)
    assert float((latents - x0)[..., :3].abs().max()) < 0.25
    assert float((latents[..., 3:].mean((0, 2, 3)) - 2.5).abs().min()) > 0.6


@pytest.mark.parametrize("name", NEW)
def test_an_image_does_not_depend_on_its_neighbours(name):
    """With a stream of noise for each image, which is how a batch is sampled."""
    sampler = SOLVERS[name].make(known_model("lat"), "karras")
    sampler.make_schedule(6, verbose=False)

    def latents(seeds):
        noise = PerImageNoise([PhiloxNoise(seed, "cpu") for seed in seeds])
        x = sampler.starting(noise.draw((len(seeds), *SHAPE[1:])))
        return sampler.decode(x, None, 6, noise=noise)

    both = latents([3, 4])
    assert torch.equal(both[:1], latents([3])) and torch.equal(both[1:], latents([4]))
    assert not torch.allclose(both[0], both[1], atol=0.1)


@pytest.mark.parametrize("name", NEW)
def test_an_image_starts_at_the_level_of_its_first_step(name):
    sampler = SOLVERS[name].make(known_model(), "uniform")
    sampler.make_schedule(10, verbose=False)
    x0, noise = torch.full(SHAPE, 2.0), torch.ones(SHAPE)
    for count in (1, 4, 9):
        alpha = sampler.table.step(count - 1).alpha
        assert torch.allclose(
            sampler.start_from(x0, count, noise), torch.full(SHAPE, alpha**0.5 * 2 + (1 - alpha) ** 0.5)
        )
    first = (1 - sampler.table.step(9).alpha) ** 0.5
    assert torch.allclose(sampler.start_from(x0, 10, noise), first * noise)
    whole = SOLVERS[name].make(known_model(), Schedule("uniform", max_denoise=True))
    whole.make_schedule(10, verbose=False)
    assert torch.equal(whole.starting(noise), noise)


def test_strength_of_a1111():
    assert [steps_to_run(s, 20, 20, one_more=True) for s in (0.75, 0.5, 1, 0)] == [16, 11, 20, 1]
    assert steps_to_run(0.75, 20, 20) == 15


def test_history_is_that_of_one_run():
    sampler = SOLVERS["dpmpp_3m_sde"].make(known_model())
    sampler.make_schedule(6, verbose=False)
    x = figure("x_T", FILE).float()
    one, two = (sampler.decode(x, None, 6, noise=PhiloxNoise(1, "cpu")) for _ in range(2))
    assert torch.equal(one, two)


def test_sampling_by_the_originals_api():
    """`sample` with the setting's eta, and with one of its own."""
    arguments = {
        "S": 5,
        "batch_size": 2,
        "shape": SHAPE[1:],
        "x_T": figure("x_T", FILE).float(),
        "verbose": False,
    }
    runs = [
        SOLVERS["euler_a"]
        .make(known_model(), **made)
        .sample(**arguments, **given, noise=PhiloxNoise(1, "cpu"))[0]
        for made, given in (({}, {}), ({"eta": 0.4}, {}), ({}, {"eta": 0.4}))
    ]
    assert torch.equal(runs[1], runs[2]) and not torch.allclose(runs[0], runs[1])
    by_name, _ = DDIMSampler(known_model(), schedule="karras").sample(**arguments)
    assert (
        relative_error(by_name, SOLVERS["euler"].make(known_model(), "karras").sample(**arguments)[0]) < 1e-6
    )


def test_times_of_a_rounded_schedule_are_whole():
    seen = []

    class Model(GaussianModel):
        def apply_model(self, x, t, cond):
            seen.append(float(t[0]))
            return super().apply_model(x, t, cond)

    for rounded in (False, True):
        seen.clear()
        model = Model(torch.zeros(4), torch.ones(4))
        run_of("dpm2", Schedule("karras", rounded=rounded), model)
        assert len(seen) == 15 and all(t == round(t) for t in seen) == rounded


def test_a_model_with_no_more_than_two_names():
    model = known_model()
    bare = SimpleNamespace(apply_model=model.apply_model, alphas_cumprod=model.alphas_cumprod.numpy())
    x = figure("x_T", FILE)
    assert torch.equal(solve("dpm2", bare, x, [2, 1, 0]), solve("dpm2", model, x, torch.tensor([2.0, 1, 0])))


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "sigmas", "message"),
    [
        ("eulr", {}, (2, 0), "unknown solver 'eulr'; it is one of ddim, "),
        ("heun", {"eta": 1}, (2, 0), "heun has no setting eta .here 1.; its settings: s_churn, s_tmin"),
        ("lms", {"order": 7}, (2, 0), "lms has orders 1 to 4, not 7"),
        ("unipc", {"order": 4}, (2, 0), "unipc has orders 1 to 3, not 4"),
        ("er_sde", {"order": 0}, (2, 0), "er_sde has orders 1 to 3, not 0"),
        ("euler", {}, (2, 3, 0), "sigmas must fall, .*: 2, 3, 0"),
        ("euler", {}, (2,), "sigmas must fall, from 2 values on"),
        ("euler_a", {}, (2, 1, 0.5, 0), "noise has 1 arrays, and the solver draws more"),
    ],
)
def test_what_solve_refuses(name, settings, sigmas, message):
    with pytest.raises(InputError, match=message):
        solve(name, known_model(), torch.zeros(SHAPE), sigmas, noise=[np.zeros(SHAPE)], **settings)


def test_names_are_read_without_torch_and_numpy():
    code = (
        "import sys; from ldm.models.diffusion.solvers import SOLVERS; from ldm.models.diffusion import schedules;"
        "assert 'euler_a' in SOLVERS and 'karras' in schedules.SCHEDULES;"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_lengths_of_schedules():
    assert [schedule_length(Job("", sampler=name, steps=30)) for name in ("ddim", "euler")] == [30, 30]
    assert (
        schedule_length(Job("", steps=30, timestep_spacing="compvis")),
        Schedule("ddim_uniform").length(30),
    ) == (31, 31)
    assert Schedule("beta").length(999) < 999 and Schedule("sigmas", values=(3, 1, 0)).length(7) == 2


class WithoutTerminalSignal:
    """Predicts v, exactly, for data of variance 1/4 and mean 0 on a schedule that ends at alpha 0."""

    num_timesteps, parameterization = 1000, "v"
    alphas_cumprod = torch.from_numpy(
        np.cumprod(1 - zero_terminal_snr(make_beta_schedule("linear", 1000, 0.00085, 0.012)))
    ).float()

    def apply_model(self, x, t, cond):
        table = self.alphas_cumprod.double().sqrt().numpy()
        signal = torch.from_numpy(np.interp(t.double().numpy(), np.arange(1000), table)).view(-1, 1, 1, 1)
        clean = signal * x.double() / 4 / (1 - signal**2 * 3 / 4)
        eps = (x - signal * clean) / (1 - signal**2).sqrt()
        return (signal * eps - (1 - signal**2).sqrt() * clean).float()


@pytest.mark.parametrize("name", SOLVERS)
def test_a_run_from_a_level_without_signal(name):
    """The exact solution is half of the noise; with fresh noise only its spread is known."""
    row, x = SOLVERS[name], torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    sampler = row.make(WithoutTerminalSignal(), "trailing")
    out, _ = sampler.sample(
        S=30, batch_size=1, shape=x.shape[1:], x_T=x, noise=PhiloxNoise(1, "cpu"), verbose=False
    )
    assert sampler.table.timesteps[-1] == 999
    assert 0.25 < float(out.std()) < 0.6
    assert row.draws or relative_error(out, x / 2) < 0.15
