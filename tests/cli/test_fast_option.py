"""--fast: a name for options, which the same options replace."""

from __future__ import annotations

from typing import Any

import pytest

from ldm.cli.commands.generate import img2img_parser, inpaint_parser, txt2img_parser
from ldm.cli.fast import FAST
from ldm.cli.values import request_of
from ldm.fields import SETTINGS
from ldm.job import Job


def job_of(*arguments: str) -> Job:
    return request_of(txt2img_parser().parse_args(["--prompt", "a red cube", *arguments])).job


def test_its_values_are_those_that_options_set() -> None:
    assert job_of("--fast", "exact") == job_of() and job_of().is_exact
    assert job_of("--fast", "balanced") == job_of("--cache_steps", "3")
    assert job_of("--fast", "draft") == job_of("--cache_steps", "5")
    for values in FAST.values():
        for name, value in values.items():
            assert SETTINGS[name].check(value) == value


def test_given_options_count_more() -> None:
    given = job_of("--fast", "draft", "--cache_steps", "2,1", "--merge_tokens", "0.5")
    assert (given.cache_steps, given.merge_tokens) == ((2, 1), 0.5)
    assert job_of("--fast", "draft", "--cache_steps", "1").is_exact


@pytest.mark.parametrize("parser", [txt2img_parser, img2img_parser, inpaint_parser])
def test_every_script_has_it(parser: Any) -> None:
    image = [] if parser is txt2img_parser else ["--init-img", "a.png"]
    assert parser().parse_args([*image, "--fast", "draft"]).fast == "draft"
