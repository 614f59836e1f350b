"""Networks that measure images, against the programs that others measure with, and the messages about their files."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.evaluation.detector import Detector, relations
from ldm.evaluation.inception import Inception
from ldm.evaluation.networks import ClipFeatures, DinoFeatures, InceptionFeatures, SceneFeatures
from ldm.evaluation.pairs import Lpips, alexnet, psnr, ssim
from ldm.evaluation.prompts import Question
from ldm.evaluation.resize import MODES, crop_to
from ldm.evaluation.scores import Aesthetic, clip_scores
from ldm.evaluation.weights import NETWORKS
from ldm.util import InputError
from tests.support.networks import draw_weights, image, write_clip, write_detector, write_dinov2
from tests.support.paths import GOLDEN

FIGURES = json.loads((GOLDEN / "evaluation.json").read_text())
PLACES = [(0, 0, 0), (1, 150, 150), (2, 298, 298), (0, 17, 203)]


@pytest.mark.parametrize("mode", ["clean", "tensorflow", "pytorch"])
def test_resizing_is_that_of_clean_fid_and_torch_fidelity(mode):
    resized = MODES[mode](image(96, 3, 80), 299)
    assert [float(resized[place]) for place in PLACES] == pytest.approx(FIGURES[mode], abs=1e-4)
    assert float(resized.double().sum()) == pytest.approx(FIGURES["sums"][mode], rel=1e-7)


def test_cropping_takes_the_largest_square_in_the_middle():
    pixels = image(90, 1, 60)
    assert np.array_equal(crop_to(pixels, 60), pixels[:, 15:75])
    assert crop_to(pixels, 32).shape == (32, 32, 3)
    assert crop_to(image(64), 64) is not None and np.array_equal(crop_to(image(64), 64), image(64))


@pytest.mark.slow
def test_inception_has_the_features_of_torch_fidelity(tmp_path):
    torch.save(draw_weights(Inception()).state_dict(), tmp_path / "inception.pth")
    net = InceptionFeatures(str(tmp_path / "inception.pth"), resize="tensorflow")
    with torch.inference_mode():
        features = net.features(net.prepare(image(96, 3, 80))[None])[0]
    assert features.shape == (net.width,)
    assert features[:16].tolist() == pytest.approx(FIGURES["inception"], rel=1e-4, abs=1e-5)
    assert float(features.mean()) == pytest.approx(FIGURES["inception mean"], rel=1e-5)


def test_lpips_is_that_of_its_authors_package(tmp_path):
    weights = {f"features.{name}": value for name, value in draw_weights(alexnet()).state_dict().items()}
    torch.save(weights, tmp_path / "alexnet.pth")
    measure = Lpips(str(tmp_path / "alexnet.pth"))
    found = [measure(image(64, a), image(64, b)) for a, b in ((0, 1), (2, 5), (4, 4))]
    assert found == pytest.approx(FIGURES["lpips"], rel=1e-5, abs=1e-7)


def test_psnr_and_ssim_of_known_pairs():
    flat = np.full((32, 32, 3), 100, np.uint8)
    assert psnr(flat, flat + 10) == pytest.approx(10 * np.log10(255**2 / 100))
    assert ssim(flat, flat) == pytest.approx(1)
    # of two even images, SSIM is the comparison of their means alone
    c = (0.01 * 255) ** 2
    assert ssim(flat, flat + 10) == pytest.approx((2 * 100 * 110 + c) / (100**2 + 110**2 + c), rel=1e-5)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


def test_clip_has_the_score_of_transformers(clip_folder):
    from transformers import CLIPImageProcessorPil, CLIPModel

    from ldm.modules.encoders.tokenizer import CLIPTokenizer

    pixels, prompts = [image(48, 1), image(48, 2)], ["a red cube", "two dogs on a bench"]
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    inputs = processor([Image.fromarray(one) for one in pixels], return_tensors="pt")
    ids = torch.as_tensor(CLIPTokenizer.openai()(prompts, 77))
    with torch.no_grad():
        out = CLIPModel.from_pretrained(clip_folder)(input_ids=ids, pixel_values=inputs["pixel_values"])
    expected = 100 * (out.image_embeds * out.text_embeds).sum(-1)
    clip = ClipFeatures(str(clip_folder))
    with torch.inference_mode():
        features = clip.features(torch.stack([clip.prepare(one) for one in pixels])).numpy()
    assert clip_scores(features, prompts, clip) == pytest.approx(expected.clamp(min=0).numpy(), abs=1e-3)
    assert (clip.width, clip.side) == (12, 32)


def test_dinov2_gives_the_class_token(tmp_path):
    from transformers import Dinov2Model

    net = DinoFeatures(str(write_dinov2(tmp_path)))
    x = net.prepare(image(64))[None]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normal = (x / 255 - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(tmp_path)(normal).last_hidden_state[:, 0]
        assert torch.allclose(net.features(x), expected, atol=1e-5)


def test_the_aesthetic_predictors_of_both_forms_are_linear_in_the_features(tmp_path):
    sides = zip(Aesthetic.WIDTHS[:-1], Aesthetic.WIDTHS[1:], strict=True)
    layers = [torch.nn.Linear(*side) for side in sides]
    chain = torch.nn.ModuleDict(
        {str(place): layer for place, layer in zip(Aesthetic.PLACES, layers, strict=True)}
    )
    draw_weights(chain)
    torch.save(
        {f"layers.{k}": v for k, v in chain.state_dict().items()},
        tmp_path / "sac+logos+ava1-l14-linearMSE.pth",
    )
    matrix, bias = np.eye(768), np.zeros(768)
    for layer in layers:
        weight = layer.weight.double().numpy()
        matrix, bias = weight @ matrix, weight @ bias + layer.bias.double().numpy()
    x = np.random.default_rng(0).standard_normal((3, 768)).astype(np.float32)
    found = Aesthetic(str(tmp_path / "sac+logos+ava1-l14-linearMSE.pth"))(x)
    assert found == pytest.approx((x @ matrix.T + bias)[:, 0], rel=1e-3)
    torch.save(draw_weights(torch.nn.Linear(768, 1)).state_dict(), tmp_path / "sa_0_4_vit_l_14_linear.pth")
    assert Aesthetic(str(tmp_path / "sa_0_4_vit_l_14_linear.pth"))(x).shape == (3,)
    with pytest.raises(InputError, match="768 features, and this one has 12"):
        Aesthetic(str(tmp_path / "sa_0_4_vit_l_14_linear.pth"))(x[:, :12])


@pytest.mark.parametrize("name", NETWORKS)
def test_a_missing_file_is_named_with_its_place(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for variable in ("HF_HOME", "HF_HUB_CACHE", "TORCH_HOME"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(InputError) as caught:
        NETWORKS[name].find()
    assert f"put {NETWORKS[name].names[0]} into models/evaluation" in str(caught.value)
    with pytest.raises(InputError, match=r"none\.pth does not exist"):
        NETWORKS[name].find("none.pth")
    place = tmp_path / "models/evaluation" / NETWORKS[name].names[-1]
    place.parent.mkdir(parents=True)
    place.touch()
    assert NETWORKS[name].find() == place.relative_to(tmp_path)


def test_a_file_of_another_network_is_refused_in_one_line(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"other\.pth is not a file of Inception") as caught:
        InceptionFeatures(str(tmp_path / "other.pth"))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"is not a folder with config\.json"):
        ClipFeatures(str(tmp_path / "other.pth"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be used") as caught:
        DinoFeatures(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_the_reader_of_scenes_has_64_features_of_any_size():
    net = SceneFeatures()
    with torch.inference_mode():
        small, large = (net.features(net.prepare(np.full((n, n, 3), 90, np.uint8))[None]) for n in (64, 128))
    assert small.shape == (1, 64) and torch.allclose(small, large, atol=1e-5)


@pytest.mark.slow
def test_a_detector_of_a_local_folder_finds_objects(tmp_path, clip_folder, monkeypatch):
    folder = write_detector(tmp_path)
    asked = Question("a red dog", "colors", ({"class": "dog", "count": 1, "color": "red"},))
    monkeypatch.setattr("ldm.evaluation.detector.CERTAIN", 0.0)
    detector = Detector(str(folder), str(clip_folder), [asked])
    found = detector(image(64), asked)
    assert len(found) == 5 and {one.name for one in found} <= {"dog", "cat", "bench"}
    assert all((one.colour is not None) == (one.name == "dog") for one in found)
    with pytest.raises(InputError, match="knows no sofa"):
        Detector(str(folder), None, [Question("a sofa", "", ({"class": "sofa"},))])
    with pytest.raises(InputError, match="boxes do not show inside"):
        Detector(str(folder), None, [Question("x", "", ({"class": "dog", "position": ["inside", 0]},))])
    with pytest.raises(InputError, match="asks nothing"):
        Detector(str(folder), None, [Question("a dog")])


@pytest.mark.parametrize(
    ("box", "names"),
    [
        ((0, 100, 50, 150), {"left of"}),
        ((200, 100, 250, 150), {"right of"}),
        ((100, 0, 150, 50), {"above"}),
        ((100, 200, 150, 250), {"below"}),
        ((0, 0, 50, 50), {"left of", "above"}),
        ((105, 100, 155, 150), set()),  # a tenth of both sides is 10 pixels
    ],
)
def test_positions_follow_genevals_rule(box, names):
    assert relations(np.array(box), np.array((100, 100, 150, 150))) == names
