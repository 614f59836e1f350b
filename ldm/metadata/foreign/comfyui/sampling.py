"""Nodes that sample: a first pass's settings, the part of its schedule that runs, and its noise."""

from __future__ import annotations

from ldm.metadata.foreign.comfyui.graph import as_whole
from ldm.metadata.foreign.comfyui.nodes import SAMPLERS
from ldm.metadata.foreign.comfyui.passes import Passes
from ldm.metadata.foreign.comfyui.start import Start
from ldm.metadata.foreign.samplers import COMFYUI, choose_sampler, steps_of_batch
from ldm.metadata.recipe import Draft


def read_settings(passes: Passes) -> None:
    """Reads seed, steps, scale, sampler and scheduler of the first pass."""
    graph, sampler, draft = passes.graph, passes.sampler, passes.draft
    if sampler.kind not in SAMPLERS:
        draft.note(f"its sampler is the node {sampler.kind}, which is read as a KSampler")
    draft.whole("seed", as_whole(graph.number(sampler, "seed", "noise_seed")))
    draft.whole("steps", as_whole(graph.number(sampler, "steps")))
    draft.number("scale", graph.number(sampler, "cfg"))
    name = graph.text(sampler, "sampler_name") or ""
    scheduler = (graph.text(sampler, "scheduler") or "(none named)")[:50]
    choose_sampler(draft, name, scheduler, COMFYUI)
    if scheduler == "ddim_uniform":
        draft.spacing_of_compvis()
    for name in ("noise", "guider", "sigmas"):
        for node in graph.chain(graph.linked(sampler, name), name):
            passes.expect(node)
    if script := graph.linked(sampler, "script"):
        passes.expect(script)


def read_schedule(passes: Passes, start: Start) -> None:
    """Sets the strength. ComfyUI runs its number of steps as the last ones of a longer schedule."""
    graph, draft, sampler = passes.graph, passes.draft, passes.sampler
    steps = draft.values.get("steps", 50)
    denoise = _denoise(passes, steps)
    if start.from_image:
        draft.number("strength", 1.0 if denoise is None else denoise)
        runs_all = graph.number(sampler, "start_at_step") is None
        if runs_all and denoise is not None and denoise < 1 and steps < 1000 * denoise:
            draft.values["steps"] = longer = int(steps / denoise)
            draft.note(f"{longer} steps at strength {denoise:g} run as many as its {steps}")
    elif denoise is not None and denoise < 1:
        draft.note(f"it starts part-way, at denoise {denoise:g}, from an empty image; all steps are run here")
    end = graph.number(sampler, "end_at_step")
    if end is not None and end < steps:
        leftover = " with noise left over" * (sampler.inputs.get("return_with_leftover_noise") == "enable")
        draft.note(f"it ends at step {end} of {steps}{leftover}; all steps are run here")
    noise = graph.linked(sampler, "noise")
    no_noise = noise is not None and noise.kind == "DisableNoise"
    if no_noise or sampler.inputs.get("add_noise") in ("disable", False):
        draft.note("its first pass adds no noise; here it does")


def _denoise(passes: Passes, steps: int) -> float | None:
    """Returns the share of the schedule that the first pass runs; None if its sampler does not limit it."""
    graph, draft, sampler = passes.graph, passes.draft, passes.sampler
    start = graph.number(sampler, "start_at_step")
    denoise = graph.number(sampler, "denoise")
    if start is not None and 0 < start < steps:
        denoise = (steps - start) / steps
    elif start is not None and start >= steps:
        draft.note(f"it starts at step {start} of {steps}, so nothing is drawn; all steps are run here")
    if "denoise" in sampler.inputs and (denoise is None or not 0 < denoise <= 1):
        draft.note("its denoise is not between 0 and 1; 1 is used")
        return None
    return denoise


def read_noise(passes: Passes, start: Start) -> None:
    """Reads the noise: one stream for the whole batch, of which a node may select one entry.

    Nodes of the Inspire Pack can draw on the GPU, and with a seed for each image, which counts up.
    """
    graph, draft, sampler = passes.graph, passes.draft, passes.sampler
    entry = None
    for node in passes.chain:
        if node.kind in ("LatentFromBatch", "ImageFromBatch") and graph.number(node, "length") == 1:
            entry = as_whole(graph.number(node, "batch_index"))
    if entry is not None and not 0 <= entry < start.batch:
        entry = None
    if graph.text(sampler, "batch_seed_mode") == "incremental":
        _seed_of_entry(draft, entry, start.batch)
    elif entry is not None:
        draft.values |= {"seed_mode": "batch", "batch_index": entry}
    elif start.batch > 1:
        draft.values["seed_mode"] = "batch"
        draft.note(
            f"it is one of a batch of {start.batch} from one seed; the file does not say which, the first is used"
        )
    steps_of_batch(draft)
    if (graph.text(sampler, "noise_mode") or "").startswith("GPU"):
        draft.gpu_noise()
    else:
        draft.cpu_noise()


def _seed_of_entry(draft: Draft, entry: int | float | None, batch: int) -> None:
    """Sets the seed of one entry of a batch whose seeds count up."""
    if entry is not None and "seed" in draft.values:
        draft.values["seed"] += entry
    elif batch > 1:
        draft.note(f"it is one of a batch of {batch}; the file does not say which, the first is used")
