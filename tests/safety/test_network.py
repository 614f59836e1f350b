"""The safety checker against the published one in diffusers and CLIP's image encoder in transformers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ldm.checkpoints.load import skip_init
from ldm.safety.network import SafetyChecker

SMALL = {"side": 28, "patch": 14, "width": 32, "layers": 2, "heads": 2, "inner": 64, "projection": 32}
POSITIONS = "vision_model.vision_model.embeddings.position_ids"


def config_of(side: int, patch: int, width: int, layers: int, heads: int, inner: int, projection: int):
    transformers = pytest.importorskip("transformers")
    vision = transformers.CLIPVisionConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        image_size=side, patch_size=patch, projection_dim=projection,
    )  # fmt: skip
    return transformers.CLIPConfig(vision_config=vision.to_dict(), projection_dim=projection)


def published_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layout of the published file, whether or not this transformers keeps its inner level."""
    inner = "vision_model.vision_model."
    return {
        key.replace("vision_model.", inner, 1) if not key.startswith((inner, "visual_", "concept", "special"))
        else key: tensor
        for key, tensor in state.items()
    }  # fmt: skip


@pytest.fixture(scope="module")
def theirs():
    module = pytest.importorskip("diffusers.pipelines.stable_diffusion.safety_checker")
    checker = module.StableDiffusionSafetyChecker(config_of(**SMALL)).eval()
    generator = torch.Generator().manual_seed(3)
    for tensor in checker.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return checker


@pytest.fixture
def ours(theirs) -> SafetyChecker:
    checker = SafetyChecker(**SMALL).eval()
    positions = {POSITIONS: checker.state_dict()[POSITIONS]}
    checker.load_state_dict({**published_keys(theirs.state_dict()), **positions})
    return checker


def pictures(count: int) -> Tensor:
    return torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(4)) * 2


@torch.no_grad()
def test_embeddings_equal_those_of_transformers(ours: SafetyChecker) -> None:
    transformers = pytest.importorskip("transformers")
    tower = transformers.CLIPVisionModelWithProjection(config_of(**SMALL).vision_config).eval()
    state = {
        key.replace("vision_model.vision_model.", "vision_model."): tensor
        for key, tensor in ours.state_dict().items()
        if key.startswith("vis") and key != POSITIONS
    }
    tower.load_state_dict(state)
    torch.testing.assert_close(ours.embed(pictures(3)), tower(pictures(3)).image_embeds, atol=1e-5, rtol=1e-5)


def recorded_scores(checker, inputs: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, list[bool]]:
    """The published checker's concept scores before they are rounded [N, 17], and its flags."""
    seen: list[float] = []
    module = __import__(type(checker).__module__, fromlist=["round"])
    monkeypatch.setattr(
        module,
        "round",
        lambda score, digits: (seen.append(float(score)), round(score, digits))[1],
        raising=False,
    )
    flags = checker(inputs, torch.ones(len(inputs), 1))[1]
    return torch.tensor(seen).view(len(inputs), 3 + 17)[:, 3:], flags


@torch.no_grad()
def test_scores_and_flags_equal_the_published_ones(
    theirs, ours: SafetyChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = pictures(48)
    for concepts, weights in (
        (ours.concept_embeds, ours.concept_embeds_weights),
        (ours.special_care_embeds, ours.special_care_embeds_weights),
    ):
        cosines = nn.functional.cosine_similarity(ours.embed(inputs)[:, None], concepts[None], dim=-1)
        weights.copy_(cosines.quantile(0.95, dim=0))
    for name in ("concept_embeds_weights", "special_care_embeds_weights"):
        getattr(theirs, name).copy_(getattr(ours, name))
    scores, flags = recorded_scores(theirs, inputs, monkeypatch)
    torch.testing.assert_close(ours.scores(ours.embed(inputs)), scores, atol=1e-5, rtol=0)
    assert ours(inputs).tolist() == flags
    assert {True, False} == set(flags)


class Given(nn.Module):
    """An image encoder whose pooled output is its input."""

    def forward(self, embeddings: Tensor) -> tuple[None, Tensor]:
        return None, embeddings


@pytest.fixture
def crafted(theirs, monkeypatch: pytest.MonkeyPatch):
    """Both checkers on orthogonal concepts with the threshold 0.2, fed with embeddings."""
    checkers = type(theirs)(config_of(**SMALL)), SafetyChecker(**SMALL)
    basis = torch.eye(32)
    for checker in checkers:
        checker.concept_embeds.data.copy_(basis[:17])
        checker.special_care_embeds.data.copy_(basis[17:20])
        checker.concept_embeds_weights.data.fill_(0.2)
        checker.special_care_embeds_weights.data.fill_(0.2)
    checkers[0].vision_model, checkers[0].visual_projection = Given(), nn.Identity()
    monkeypatch.setattr(checkers[1], "embed", lambda embeddings: embeddings)
    return checkers


def embedding(cosines: dict[int, float]) -> Tensor:
    """A vector [32] of any length with the given cosines to basis vectors; the rest is in another direction."""
    vector = torch.zeros(32)
    for axis, cosine in cosines.items():
        vector[axis] = cosine
    vector[31] = (1 - vector.square().sum()).sqrt()
    return 7 * vector


@pytest.mark.parametrize(
    ("cosines", "flagged"),
    [
        ({}, False),
        ({0: 0.1996}, False),
        ({0: 0.2004}, False),  # rounds to 0.000
        ({0: 0.2006}, True),
        ({16: 0.2006}, True),
        ({5: 0.9}, True),
        ({17: 0.9}, False),  # special care alone flags nothing
        ({0: 0.1904, 17: 0.1}, False),
        ({0: 0.1904, 17: 0.2004}, False),  # the special score rounds to 0.000
        ({0: 0.1904, 17: 0.2006}, False),  # 0.0004 after the adjustment
        ({0: 0.1906, 17: 0.2006}, True),
        ({16: 0.1906, 19: 0.2006}, True),
        ({0: 0.185, 17: 0.3, 18: 0.3, 19: 0.3}, False),  # the adjustment is made once
    ],
)
def test_thresholds_are_kept_to_the_published_three_decimals(crafted, cosines, flagged: bool) -> None:
    theirs, ours = crafted
    vector = embedding(cosines)[None]
    assert ours(vector).tolist() == [flagged]
    assert theirs(vector, torch.ones(1, 1))[1] == [flagged]


def test_random_embeddings_are_flagged_alike(crafted) -> None:
    theirs, ours = crafted
    vectors = torch.randn(300, 32, generator=torch.Generator().manual_seed(5))
    for checker in crafted:
        checker.concept_embeds_weights.data.fill_(0.36)
    flags = ours(vectors)
    assert flags.tolist() == theirs(vectors, torch.ones(300, 1))[1]
    assert 50 < flags.sum() < 250 and flags.dtype == torch.bool


@pytest.mark.parametrize("name", ["concept_embeds", "special_care_embeds_weights"])
def test_a_score_that_is_not_finite_is_an_error_and_no_pass(crafted, name: str) -> None:
    ours = crafted[1]
    getattr(ours, name)[1] = float("nan")
    with pytest.raises(ArithmeticError, match="not finite"):
        ours(embedding({})[None])


def test_keys_and_shapes_at_the_published_sizes(theirs) -> None:
    sizes = {"side": 224, "patch": 14, "width": 1024, "layers": 24, "heads": 16, "inner": 4096}
    with torch.device("meta"), skip_init():
        published = type(theirs)(config_of(**sizes, projection=768)).state_dict()
        ours = SafetyChecker().state_dict()
    expected = {key: tensor.shape for key, tensor in published_keys(published).items()}
    expected[POSITIONS] = torch.Size([1, 257])
    assert {key: tensor.shape for key, tensor in ours.items()} == expected
