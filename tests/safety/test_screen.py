"""The input of the safety check, and that no image passes unchecked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.safety.screen import SafetyError, Screen, prepare


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def plain(level: int, height: int = 20, width: int = 24) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def is_bright(prepared: Tensor) -> Tensor:
    return prepared.mean(dim=(1, 2, 3)) > 0


@pytest.mark.parametrize(
    ("height", "width"), [(224, 224), (512, 512), (64, 64), (512, 768), (770, 333), (225, 231), (97, 640)]
)
def test_pictures_are_prepared_as_transformers_does(height: int, width: int) -> None:
    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    pixels = picture(height, width)
    expected = module.CLIPImageProcessorPil()(pixels, return_tensors="pt")["pixel_values"]
    prepared = prepare([pixels], 224)
    assert prepared.shape == (1, 3, 224, 224) and prepared.dtype == torch.float32
    torch.testing.assert_close(prepared, expected, atol=2e-6, rtol=0)


def test_pictures_of_several_sizes_keep_their_order() -> None:
    pixels = [picture(40, 64), picture(64, 40, seed=1)]
    both = prepare(pixels, 28)
    assert both.shape == (2, 3, 28, 28) and both.is_contiguous()
    for one, alone in zip(both, pixels, strict=True):
        assert torch.equal(one, prepare([alone], 28)[0])


def test_flagged_pictures_are_black_and_the_others_are_themselves() -> None:
    pictures = [plain(250), None, plain(3), plain(251, 16, 40), plain(4)]
    verdicts = Screen(is_bright, side=14, batch=2).screen(pictures)
    assert [v.word for v in verdicts] == ["flagged", "unchecked", "passed", "flagged", "passed"]
    for verdict, given in zip(verdicts, pictures, strict=True):
        if verdict.word == "flagged":
            assert given is not None and verdict.pixels is not None
            assert verdict.pixels.shape == given.shape and verdict.pixels.dtype == np.uint8
            assert not verdict.pixels.any() and given.all(), "a blank copy; the picture given is left alone"
        else:
            assert verdict.pixels is given


def test_the_check_is_called_in_batches_without_gradients() -> None:
    sizes: list[int] = []

    def flag(prepared: Tensor) -> Tensor:
        assert torch.is_inference_mode_enabled()
        sizes.append(len(prepared))
        return torch.zeros(len(prepared), dtype=torch.bool)

    assert len(Screen(flag, side=14, batch=3).screen([plain(i) for i in range(7)])) == 7
    assert sizes == [3, 3, 1]
    assert Screen(flag, side=14).screen([None]) == Screen(None).screen([None])
    assert sizes == [3, 3, 1], "there was nothing to check"


def test_without_a_check_pictures_are_unchecked() -> None:
    pictures = [plain(250), None]
    verdicts = Screen(None).screen(pictures)
    assert [v.word for v in verdicts] == ["unchecked", "unchecked"]
    assert verdicts[0].pixels is pictures[0] and verdicts[1].pixels is None


def fails_on_the_second_batch(prepared: Tensor) -> Tensor:
    if prepared.mean() > 0:
        raise MemoryError("no\x1b room")
    return is_bright(prepared)


def test_a_check_that_fails_lets_nothing_through() -> None:
    with pytest.raises(SafetyError, match=r"withheld: MemoryError: no\\x1b room") as error:
        Screen(fails_on_the_second_batch, side=14, batch=1).screen([plain(3), plain(250)])
    assert isinstance(error.value.__cause__, MemoryError)


@pytest.mark.parametrize(
    "answer",
    [
        lambda prepared: torch.zeros(len(prepared) + 1, dtype=torch.bool),
        lambda prepared: torch.zeros(1, dtype=torch.bool),
        lambda prepared: torch.zeros(len(prepared)),
        lambda prepared: torch.zeros(len(prepared), 1, dtype=torch.bool),
        lambda prepared: None,
    ],
)
def test_an_answer_that_is_no_flag_for_each_picture_is_a_failure(answer) -> None:
    with pytest.raises(SafetyError):
        Screen(answer, side=14).screen([plain(3), plain(4)])


def test_pixels_that_cannot_be_prepared_are_a_failure() -> None:
    with pytest.raises(SafetyError):
        Screen(is_bright, side=14).screen([plain(3).astype(np.float32)])
