"""Control networks in a run: weights, windows of steps and halves of the guided pair, against sums written out."""

import math

import pytest
import torch

from ldm.job import Job, control_text, split_control
from ldm.models.diffusion.control import Unit, check_control, shares_of
from ldm.models.diffusion.course import Moment
from ldm.models.diffusion.guidance import Guidance, GuidancePlan
from ldm.util import InputError
from tests.support.control import FIGURES, control_network, given
from tests.support.golden_data import TOLERANCE, figure, relative_error


class Network:
    """Three maps that depend on the row's context: their means tell which rows were seen."""

    def __init__(self):
        self.rows = []

    def add(self, x, features, timesteps, context):
        self.rows.append(len(x))
        seen = context.mean((1, 2)).reshape(-1, 1, 1, 1)
        return [
            (i + 1) * seen + features + torch.arange(4.0).reshape(1, 1, 2, 2).repeat(len(x), 1, 1, 1)
            for i in range(3)
        ]


class Model:
    """Predicts the sum of all maps: of the conditioning and of what is added."""

    def apply_model(self, x, t, cond):
        cond = cond if isinstance(cond, dict) else {"c_crossattn": [cond]}
        context = cond["c_crossattn"][0]
        out = x + context.mean((1, 2)).reshape(-1, 1, 1, 1)
        if "control" in cond:
            out = out + sum(one.expand(len(x), -1, 2, 2) for one in cond["control"].added(x, t, context))
        return out


COND, UNCOND = torch.full((2, 3, 4), 5.0), torch.full((2, 3, 4), 1.0)
X, T = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(3)), torch.tensor([7, 7])
FEATURES = torch.tensor([[[[0.25]]]])


def maps(value, factors, pools):
    """What the three maps add for a context of this value."""
    plane = torch.arange(4.0).reshape(1, 1, 2, 2)
    found = [(i + 1) * value + 0.25 + plane for i in range(3)]
    return sum(f * (m.mean().expand(1, 1, 2, 2) if pools else m) for f, m in zip(factors, found, strict=True))


@pytest.mark.parametrize("scale", [1.0, 7.5])
@pytest.mark.parametrize(
    ("mode", "alone", "factors"),
    [
        ("balanced", False, [1, 1, 1]),
        ("prompt", False, [0.825**2, 0.825, 1]),
        ("control", True, [0.825**2, 0.825, 1]),
        ("guess", True, [0.1, 10**-0.5, 1]),
        ("pools", True, [1, 1, 1]),
    ],
)
def test_modes(mode, alone, factors, scale):
    """Both halves get the maps, or only the one with the prompt; the factors are the published ones."""
    pools = mode == "pools"
    shares = shares_of("guess" if pools else mode, 3, pooled=pools)
    network = Network()
    unit = Unit(network, FEATURES, [0.5 * share for share in shares], alone=alone, pools=pools)
    guidance = Guidance(COND, UNCOND, scale).controlled([unit])
    half = [0.5 * factor for factor in factors]
    with_ = X + 5 + maps(5.0, half, pools)
    without = X + 1 + (0 if alone else maps(1.0, half, pools))
    expected = without + scale * (with_ - without)
    assert torch.allclose(guidance.noise(Model(), X, T), expected, atol=1e-4)
    assert network.rows == [2 if alone or scale == 1 else 4]


def test_controls_add_up_and_both_halves_may_differ():
    units = [Unit(Network(), FEATURES, [1.0] * 3), Unit(Network(), FEATURES, [2.0] * 3, alone=True)]
    found = Guidance(COND, UNCOND, 3.0).controlled(units).noise(Model(), X, T)
    with_, without = X + 5 + 3 * maps(5.0, [1] * 3, False), X + 1 + maps(1.0, [1] * 3, False)
    assert torch.allclose(found, without + 3 * (with_ - without), atol=1e-4)


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 0.7), (0.0, 0.05), (0.45, 0.55), (0.5, 1.0)])
@pytest.mark.parametrize("steps", [1, 7, 20])
def test_windows_are_those_of_diffusers(interval, steps):
    """A step i of n counts unless i / n is before the start or (i + 1) / n after the end."""
    start, end = interval
    unit = Unit(Network(), FEATURES, [1.0] * 3, interval)
    plan = GuidancePlan([(math.inf, Guidance(COND, UNCOND, 2.0))], units=(unit,))
    assert plan.changes == (interval != (0.0, 1.0))
    for i in range(steps):
        keep = 1.0 - float(i / steps < start or (i + 1) / steps > end)
        at = plan.at(Moment(i, i + 3, steps + 3, 0.5))  # a run that begins at the fourth row of a schedule
        controlled = isinstance(at.cond, dict) and "control" in at.cond
        assert controlled == bool(keep)
        assert plan.at(Moment(i, i + 3, steps + 3, 0.5)).both is at.both


def test_one_context_for_all_steps():
    """Networks keep what they derive from a context as long as it is the same object."""
    unit = Unit(Network(), FEATURES, [1.0] * 3, (0.0, 0.5), alone=True)
    guidance = Guidance(COND, UNCOND, 2.0)
    plan = GuidancePlan([(math.inf, guidance)], units=(unit,))
    first, last = (plan.at(Moment(i, i, 4, 0.5)).both for i in (0, 3))
    assert first["c_crossattn"][0] is guidance.both and last is guidance.both
    assert first["control"]._with_prompt(guidance.both) is first["control"]._with_prompt(guidance.both)


@torch.inference_mode()
def test_the_authors_figures_through_the_whole_model(tiny):
    """By way of `apply_model`, with a weight: half of the figure's batch is the conditioning, half the other."""
    network = control_network()
    x, hint, t, context = given("x", "hint", "t", "context")
    unit = Unit(network, network.read_hint(hint), [0.4] * 13)
    cond = Guidance(context).controlled([unit]).cond
    assert relative_error(tiny.apply_model(x, t, cond), figure("eps_scale0.4", FIGURES)) <= TOLERANCE


# --- what is typed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "control"),
    [
        ("a.pth:b.png", ("a.pth", "b.png", 1.0, 0.0, 1.0)),
        ("a.pth:b.png:0.5", ("a.pth", "b.png", 0.5, 0.0, 1.0)),
        ("m/a.pth:h/b.png:-1e-1:0.25:.75", ("m/a.pth", "h/b.png", -0.1, 0.25, 0.75)),
        ("C:\\m\\a.pth:D:\\b.png:2", ("C:\\m\\a.pth", "D:\\b.png", 2.0, 0.0, 1.0)),
        ("C:/m/a.pth:b.png", ("C:/m/a.pth", "b.png", 1.0, 0.0, 1.0)),
        ("a.pth:D:/b.png", ("a.pth", "D:/b.png", 1.0, 0.0, 1.0)),
        ("c:b", ("c", "b", 1.0, 0.0, 1.0)),
        ("v1.5:2.png", ("v1.5", "2.png", 1.0, 0.0, 1.0)),
    ],
)
def test_paths_with_colons_and_numbers(text, control):
    assert split_control(text) == control
    assert split_control(control_text(*control)) == control


@pytest.mark.parametrize(
    "text", ["a.pth", "", ":", "a.pth:", ":b.png", "a.pth:0.5", "a.pth:b.png:1:0.5", "C:\\a.pth"]
)
def test_what_names_no_two_files(text):
    with pytest.raises(ValueError, match=r"not two files|two numbers"):
        split_control(text)


@pytest.mark.parametrize(
    ("control", "said"),
    [
        (("a", "b", 11.0, 0.0, 1.0), "has the weight 11; give -10 to 10"),
        (("a", "b", 1.0, 0.5, 0.5), "acts from 0.5 to 0.5; give shares"),
        (("a", "b", 1.0, 0.0, 1.5), "acts from 0 to 1.5; give shares"),
    ],
)
def test_ranges(control, said):
    with pytest.raises(InputError, match=said):
        check_control(Job("", controls=(control,)))


def test_hints_without_what_they_need():
    with pytest.raises(InputError, match="--hint canny is made for a ControlNet"):
        check_control(Job("", hint="canny"))
    with pytest.raises(InputError, match=r"--hint inpaint .* give an image"):
        check_control(Job("", hint="inpaint", controls=(("a", "b", 1.0, 0.0, 1.0),)))
