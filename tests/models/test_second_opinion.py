"""The same mathematics in other libraries."""

import pytest
import torch

from ldm.checkpoints.load import build_model
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.guidance import Guidance
from ldm.models.diffusion.noise import PhiloxNoise
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampling_run import SamplingRun
from ldm.models.diffusion.schedule import StepTable
from ldm.modules.encoders.clip import CLIPTextModel
from ldm.util import InputError
from tests.support.golden_data import figure, relative_error, tiny_config

SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


class Predictor:
    """A model in closed form: cheap, smooth, and different at every timestep."""

    num_timesteps = 1000
    device = torch.device("cpu")

    def __init__(self, tiny):
        self.alphas_cumprod = tiny.alphas_cumprod

    def apply_model(self, x, t, cond):
        return torch.sin(3 * x + t.view(-1, 1, 1, 1) / 100) * 0.7 + 0.1 * x


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize(("ours", "theirs", "options"), [
    (DDIMSampler, "DDIMScheduler", {"clip_sample": False}),
    (DDIMSampler, "DDIMScheduler", {"clip_sample": False, "prediction_type": "v_prediction"}),
    (PLMSSampler, "PNDMScheduler", {"skip_prk_steps": True}),
])  # fmt: skip
def test_diffusers_schedulers(tiny, ours, theirs, options, steps):
    diffusers = pytest.importorskip("diffusers")
    model = Predictor(tiny)
    model.parameterization = "v" if "prediction_type" in options else "eps"
    x = figure("sample/x_T")
    got, _ = ours(model).sample(
        S=steps, batch_size=2, shape=x.shape[1:], conditioning=x, x_T=x, verbose=False
    )

    scheduler = getattr(diffusers, theirs)(**SCHEDULE, **options)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        eps = model.apply_model(x, torch.full((2,), int(t)), None)
        x = scheduler.step(eps, t, x).prev_sample
    assert relative_error(got, x) < 2e-5


def test_diffusers_without_terminal_signal():
    """A model of v on a schedule that ends at alpha 0, from its last timestep, with and without fresh noise."""
    diffusers = pytest.importorskip("diffusers")
    config = tiny_config()
    config["params"].update(parameterization="v", zero_terminal_snr=True)
    schedule = build_model(config)
    model = Predictor(schedule)
    model.parameterization = "v"
    sampler = DDIMSampler(model)
    scheduler = diffusers.DDIMScheduler(
        **SCHEDULE, clip_sample=False, prediction_type="v_prediction", rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )  # fmt: skip
    assert relative_error(schedule.alphas_cumprod, scheduler.alphas_cumprod) < 1e-6
    scheduler.set_timesteps(10)
    sampler.make_schedule(10, verbose=False)
    start = figure("sample/x_T")
    for eta in (0.0, 0.5):  # with 1 the rounding of their float32 shows
        table = StepTable.build(sampler._alphas_cumprod(), scheduler.timesteps.numpy()[::-1].copy(), eta)
        noise = PhiloxNoise(3, "cpu")
        run = SamplingRun(model, PhiloxNoise(3, "cpu"), Guidance(None))
        ours = x = start
        for t, step in zip(scheduler.timesteps, table.downwards(), strict=True):
            ours, _ = run.advance(ours, run.predict(ours, step.t, step.alpha), step)
            v = model.apply_model(x, torch.full((2,), int(t)), None)
            x = scheduler.step(v, t, x, eta=eta, variance_noise=noise.draw(x.shape)).prev_sample
            assert relative_error(ours, x) < 1e-5, f"eta {eta}, timestep {t}"


def test_transformers_text_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=300,
        hidden_size=48,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=20,
        hidden_act="quick_gelu",
    )
    theirs = transformers.CLIPTextModel(config).eval()
    ours = CLIPTextModel(tokens=300, positions=20, width=48, layers=3, heads=4).eval()
    weights = {
        key if key.startswith("text_model.") else f"text_model.{key}": value
        for key, value in theirs.state_dict().items()
    }
    weights.setdefault("text_model.embeddings.position_ids", torch.arange(20)[None])
    ours.load_state_dict(weights)
    ids = torch.randint(0, 300, (3, 20), generator=torch.Generator().manual_seed(0))
    ids[:, 7], ids[1, 4] = 299, 299  # end tokens, the first of which is pooled
    theirs.config.eos_token_id = getattr(theirs, "text_model", theirs).eos_token_id = 299
    with torch.no_grad():
        found = ours(input_ids=ids, output_hidden_states=True)
        expected = theirs(input_ids=ids, output_hidden_states=True)
    for name in ("last_hidden_state", "pooler_output"):
        assert relative_error(getattr(found, name), getattr(expected, name)) < 2e-5
    for state, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert relative_error(state, other) < 2e-5
    for i in range(2):
        assert relative_error(found[i], expected[i]) < 2e-5
    norm = getattr(theirs, "text_model", theirs).final_layer_norm
    for skip in (1, 2, 3):
        states = ours(input_ids=ids, clip_skip=skip).last_hidden_state
        assert relative_error(states.detach(), norm(expected.hidden_states[-skip]).detach()) < 2e-5
    for skip in (0, 4):
        with pytest.raises(InputError, match=rf"CLIP skip {skip} leaves no layer .* give 1 to 3"):
            ours(input_ids=ids, clip_skip=skip)
