"""Scores sets of images: against references, their prompts, and each other."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ldm.evaluation.bootstrap import RESAMPLES, Estimate, around, draws, mean_of
from ldm.evaluation.compare import PAIRED, pair_values
from ldm.evaluation.distances import Frechet, Gaussian, gaussian_of, inside, kernel_distance, thinned
from ldm.evaluation.features import FeatureCache, Features, compute
from ldm.evaluation.images import ImageSet, jobs_of, model_of, read_set
from ldm.evaluation.networks import SceneAnswers, file_sha256, network
from ldm.evaluation.prompts import Question
from ldm.evaluation.results import Result
from ldm.evaluation.statistics import read_statistics
from ldm.util import InputError, need, printable

logger = logging.getLogger("ldm")

DISTANCES = ("fid", "kid", "precision", "recall", "fd_dinov2")
OF_IMAGES = ("clip", "answers", "aesthetic", "right")
METRICS = (*DISTANCES, *OF_IMAGES, "skills", *PAIRED)
FEWEST = 2  # images for each feature of a Fréchet distance


@dataclass(frozen=True)
class Request:
    """The measures that are asked for; `paths` are given files of networks, by their names in `NETWORKS`.

    `against` is a folder, a .npz file of statistics, or `scenes:COUNT`. `size` cuts all images to squares of that
    side; `resize` is the mode of the network of distances. With `few` a Fréchet distance is computed whatever the
    number of images, with `mixed` images of several settings are one set.
    """

    metrics: tuple[str, ...]
    network: str = "inception"
    against: str | None = None
    resize: str | None = None
    size: int | None = None
    paths: Mapping[str, str] = field(default_factory=dict[str, str])
    device: str = "cpu"
    few: bool = False
    mixed: bool = False
    resamples: int = RESAMPLES

    def check(self) -> None:
        """Raises InputError for unknown metrics, and for distances without references."""
        for name in self.metrics:
            need(name in METRICS, f"--metrics {printable(name)}: give some of {', '.join(METRICS)}")
        needing = [name for name in self.metrics if name in (*DISTANCES, *PAIRED)]
        need(
            not needing or self.against is not None,
            f"{', '.join(needing)} compare with references: give a folder or a .npz file with --against",
        )
        need(self.size is None or 8 <= self.size <= 4096, f"--size is {self.size}; give 8 to 4096 pixels")


class Scorer:
    """Measures sets of images by one request; networks and the features of references are kept."""

    def __init__(self, request: Request, cache: FeatureCache | None = None) -> None:
        self.request, self._cache = request, cache
        self._references: dict[str, tuple[Features | None, Gaussian, str, int]] = {}
        self._networks: dict[str, Any] = {}
        self._last: tuple[ImageSet | None, dict[str, Features]] = (None, {})

    def __call__(self, images: ImageSet, questions: Sequence[Question] | None = None) -> list[Result]:
        """Returns a result for each metric. `questions` are those of the images, in their order.

        Raises InputError for too few images, prompts that are missing, references of another size, and damaged files.
        """
        self.request.check()
        check_whole(images, questions)
        found: list[Result] = []
        for metric in self.request.metrics:
            started = time.monotonic()
            found += _MEASURES[metric](self, images, metric, questions)
            logger.info(
                "%s of %s: %s (%.1f s)",
                metric,
                printable(images.name),
                found[-1].estimate,
                time.monotonic() - started,
            )
        model = model_of(images)
        return [replace(result, model=model) for result in found]

    # --- features -------------------------------------------------------------------------------------------

    def network(self, name: str) -> Any:
        """Returns the network of this name, loaded once."""
        request = self.request
        if name not in self._networks:
            if name == "shapes-answers":
                self._networks[name] = SceneAnswers(request.paths.get("shapes"), request.device)
            else:
                resize = request.resize if name == request.network else None
                self._networks[name] = network(name, request.paths.get(name), resize, request.device)
        return self._networks[name]

    def features(self, images: ImageSet, name: str) -> Features:
        """Returns the features of a set; those of the last set are kept for its other metrics."""
        if self._last[0] is not images:
            self._last = (images, {})
        kept = self._last[1]
        if name not in kept:
            kept[name] = compute(images, self.network(name), self._cache, self.request.size)
        return kept[name]

    def reference(self, name: str) -> tuple[Features | None, Gaussian, str, int]:
        """Returns the references' features (None: statistics alone), their Gaussian, SHA-256 and number."""
        if name not in self._references:
            against = str(self.request.against)
            if against.endswith(".npz"):
                gaussian = read_statistics(Path(against))
                self._references[name] = (None, gaussian, file_sha256(Path(against)), gaussian.count)
            else:
                images = self.reference_set
                features = compute(images, self.network(name), self._cache, self.request.size)
                self._references[name] = (
                    features,
                    gaussian_of(features.values),
                    images.digest(),
                    len(images),
                )
        return self._references[name]

    @cached_property
    def reference_set(self) -> ImageSet:
        return read_set(str(self.request.against))

    # --- measures -------------------------------------------------------------------------------------------

    def distance(self, images: ImageSet, metric: str, questions: Sequence[Question] | None) -> list[Result]:
        """Measures the distance to the references."""
        name = "dinov2" if metric == "fd_dinov2" else self.request.network
        width = self.network(name).width
        if metric in ("fid", "fd_dinov2"):
            self._enough(len(images), width, metric, printable(images.name))
        features = self.features(images, name)
        reference, gaussian, sha256, count = self.reference(name)
        need(
            len(gaussian.mean) == width,
            f"{printable(self.request.against)} has {len(gaussian.mean)} features and {name} {width}: "
            "give statistics of the same network",
        )
        need(
            reference is None or reference.size == features.size,
            f"the references are {_size(reference)} and the images {_size(features)}; "
            f"give --size {min(features.size)} to cut all to squares of one size",
        )  # fmt: skip
        if metric in ("fid", "fd_dinov2"):
            if reference is not None or count:
                self._enough(count, width, metric, "the references")
            estimate, note = self._frechet(features.values, gaussian), ""
        else:
            need(
                reference is not None,
                f"{metric} needs reference images, and {printable(self.request.against)} has statistics alone: "
                "give their folder, or --metrics fid",
            )
            estimate, note = self._of_both(
                metric, features.values, reference.values if reference else features.values
            )
        result = self.result(images, metric, estimate, name, note)
        return [
            replace(
                result, references=str(self.request.against), reference_images=count, reference_sha256=sha256
            )
        ]

    def _enough(self, count: int, width: int, metric: str, what: str) -> None:
        need(
            self.request.few or count >= FEWEST * width,
            f"{metric} of {width} features needs {FEWEST * width} images, and {what} has {count}: it would be far "
            "too large; use --metrics kid, which has no such bias, or --few to have it all the same",
        )  # fmt: skip

    def _frechet(self, features: np.ndarray, gaussian: Gaussian) -> Estimate:
        distance = Frechet(gaussian)
        weights = draws(len(features), self.request.resamples)
        return around(
            distance(gaussian_of(features)), [distance(gaussian_of(features, row)) for row in weights]
        )

    def _of_both(self, metric: str, features: np.ndarray, references: np.ndarray) -> tuple[Estimate, str]:
        """Returns KID, precision or recall."""
        if metric != "kid":
            pair = (features, references) if metric == "precision" else (references, features)
            return mean_of(inside(*pair).astype(np.float64)), "3 nearest neighbours"
        few, others = thinned(features), thinned(references)
        weights = draws(len(few), self.request.resamples)
        replicates = kernel_distance(few, others, weights) if len(weights) else list[float]()
        note = "" if len(few) == len(features) else f"{len(few)} of the images"
        return around(float(kernel_distance(few, others)[0]), replicates), note

    def per_image(self, images: ImageSet, metric: str, questions: Sequence[Question] | None) -> list[Result]:
        """Measures the mean of a score of each image."""
        scores, name = self.image_scores(images, metric, questions)
        return [self.result(images, metric, mean_of(scores), name)]

    def image_scores(
        self, images: ImageSet, metric: str, questions: Sequence[Question] | None
    ) -> tuple[np.ndarray, str]:
        """Returns the score of each image (a metric of `OF_IMAGES`) [N], and the network's name."""
        from ldm.evaluation.scores import Aesthetic, answer_scores, clip_scores
        from ldm.evaluation.skills import answered

        if metric == "answers":
            need(
                questions is not None, "answers needs the questions of an evaluation's folder, or --questions"
            )
            return answer_scores(
                self.features(images, "shapes-answers").values, questions or ()
            ), "shapes-answers"
        if metric == "right":
            need(questions is not None, "right needs the questions of an evaluation's folder, or --questions")
            right, reader = answered(images, questions or (), self.request, self)
            return np.array([100.0 * ok for ok in right]), reader
        if metric == "aesthetic":
            predictor = Aesthetic(self.request.paths.get("aesthetic"))
            return predictor(self.features(images, "clip").values), "clip"
        prompts = [question.prompt for question in questions] if questions else self._prompts(images)
        return clip_scores(self.features(images, "clip").values, prompts, self.network("clip")), "clip"

    def _prompts(self, images: ImageSet) -> list[str]:
        try:
            return [job.prompt for job in jobs_of(images, self.request.mixed)]
        except InputError as error:
            raise InputError(
                f"{error}; --questions FILE gives the prompts of images that do not record them"
            ) from None

    def skills(self, images: ImageSet, metric: str, questions: Sequence[Question] | None) -> list[Result]:
        """Measures the share of images that answer their questions, for each skill and in all."""
        from ldm.evaluation.skills import answered

        need(questions is not None, "skills needs the questions of an evaluation's folder, or --questions")
        right, reader = answered(images, questions or (), self.request, self)
        tags = [question.tag for question in questions or ()]
        groups = {
            tag: [ok for ok, own in zip(right, tags, strict=True) if own == tag]
            for tag in dict.fromkeys(tags)
        }
        groups["all skills"] = right
        return [
            replace(
                self.result(images, tag, mean_of([100.0 * ok for ok in group]), reader, "percent right"),
                images=len(group),
            )
            for tag, group in groups.items()
        ]

    def paired(self, images: ImageSet, metric: str, questions: Sequence[Question] | None) -> list[Result]:
        """Measures the mean difference of each image from the reference of the same place."""
        values = pair_values(images, self.reference_set, metric, self.request.paths.get("lpips"))
        result = self.result(images, metric, mean_of(values), "")
        return [replace(result, references=self.reference_set.name, reference_images=len(self.reference_set))]

    def result(self, images: ImageSet, metric: str, estimate: Estimate, name: str, note: str = "") -> Result:
        """Returns a figure with the network of this name, if it has one."""
        net = self._networks.get(name)
        cut = f"cut to {self.request.size}, " if self.request.size else ""
        return Result(
            images.name, metric, estimate.value, _number(estimate.low), _number(estimate.high), len(images),
            network=name, weights=net.weights if net else "", resize=f"{cut}{net.resize}" if net else "", note=note,
        )  # fmt: skip


def check_whole(images: ImageSet, questions: Sequence[Question] | None) -> None:
    """Raises InputError unless there is an image for each of the questions."""
    need(
        questions is None or len(questions) == len(images),
        f"{printable(images.name)} has {len(images)} images for {len(questions or ())} prompts; "
        "make the rest with the same `run` command, or give the prompts of these images",
    )


def _number(value: float) -> float | None:
    return None if value != value else value


def _size(features: Features | None) -> str:
    return "" if features is None else f"{features.size[1]}x{features.size[0]}"


Measure = Callable[[Scorer, ImageSet, str, "Sequence[Question] | None"], list[Result]]
_MEASURES: Mapping[str, Measure] = {
    **dict.fromkeys(DISTANCES, Scorer.distance),
    **dict.fromkeys(OF_IMAGES, Scorer.per_image),
    **dict.fromkeys(PAIRED, Scorer.paired),
    "skills": Scorer.skills,
}
