"""Small scenes of coloured solids, rendered deterministically: a data set that needs no download.

A scene holds one or two solids on a plain backdrop. The camera is fixed; only positions, the cube's rotation and the
light vary a little with the seed. World axes: x right, y away from the camera, z up from the ground.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]  # float32 throughout
Rgb = tuple[float, float, float]
Plan = list[tuple[float, float, float]]  # a point (x, y, z) for each solid

# sRGB in [0, 1]. Guidance pushes a colour away from the others, so none is between two others: these are the
# corners of the colour cube, softened.
COLOURS: dict[str, Rgb] = {
    "red": (0.90, 0.08, 0.10),
    "yellow": (0.98, 0.90, 0.10),
    "green": (0.08, 0.64, 0.16),
    "cyan": (0.08, 0.82, 0.88),
    "blue": (0.10, 0.24, 0.94),
    "purple": (0.64, 0.16, 0.76),
    "white": (0.98, 0.98, 0.98),
    "black": (0.11, 0.11, 0.12),
}
BACKGROUNDS: dict[str, Rgb] = {  # sRGB in [0, 1]
    "grey": (0.56, 0.56, 0.56),
    "pink": (0.90, 0.64, 0.71),
    "beige": (0.80, 0.71, 0.56),
    "light blue": (0.60, 0.72, 0.88),
    "mint": (0.60, 0.83, 0.69),
}
SIZES: dict[str, float] = {"small": 0.52, "large": 0.75}  # radius in world units
RELATIONS: tuple[str, ...] = ("on top of", "left of", "behind")
SPLITS: tuple[str, ...] = ("train", "fresh", "heldout")
SINGLE_SHARE = 0.3  # of the scenes in "train" and "fresh"


@dataclass(frozen=True)
class Solid:
    """One solid: keys of `SHAPES`, `COLOURS` and `SIZES`."""

    shape: str
    colour: str
    size: str


@dataclass(frozen=True)
class Scene:
    """One or two solids; `relation` is that of `solids[0]` to `solids[1]` (None for a single solid)."""

    solids: tuple[Solid, ...]
    relation: str | None
    background: str


# --- the five solids, in units of their radius --------------------------------------------------------------


def _sphere(x: Floats, y: Floats, z: Floats) -> Floats:
    return np.sqrt(x * x + y * y + z * z) - 0.90


def _cube(x: Floats, y: Floats, z: Floats) -> Floats:
    half, edge = 0.76, 0.06  # half side, radius of the rounded edges
    x, y, z = (np.abs(axis) - (half - edge) for axis in (x, y, z))
    outside = np.sqrt(np.maximum(x, 0) ** 2 + np.maximum(y, 0) ** 2 + np.maximum(z, 0) ** 2)
    return outside + np.minimum(np.maximum(np.maximum(x, y), z), 0) - edge


def _cylinder(x: Floats, y: Floats, z: Floats) -> Floats:
    edge = 0.04
    rho = np.sqrt(x * x + y * y) - (0.66 - edge)
    z = np.abs(z) - (0.80 - edge)
    outside = np.sqrt(np.maximum(rho, 0) ** 2 + np.maximum(z, 0) ** 2)
    return outside + np.minimum(np.maximum(rho, z), 0) - edge


def _cone(x: Floats, y: Floats, z: Floats) -> Floats:
    # Base radius 0.86 at z = -0.88, narrowing to a blunt tip of radius 0.06 at z = 0.88. A lower bound.
    run, rise = 0.80, 1.76
    slope = np.hypot(run, rise)
    side = (np.sqrt(x * x + y * y) - 0.46) * np.float32(rise / slope) + z * np.float32(run / slope)
    return np.maximum(side, np.abs(z) - 0.88)


def _torus(x: Floats, y: Floats, z: Floats) -> Floats:
    rho = np.sqrt(x * x + y * y) - 0.68
    return np.sqrt(rho * rho + z * z) - 0.28


@dataclass(frozen=True)
class Form:
    """The surface of a solid, in units of its radius."""

    distance: Callable[[Floats, Floats, Floats], Floats]  # signed distance, or a lower bound of it
    bound: float  # radius of the enclosing ball
    half_height: float  # from the centre to the ground below it
    seat: float  # from the centre up to where another solid rests
    tilt: float = 0.0  # towards the camera, in radians
    turn: float = 0.0  # about the vertical, in radians


Shapes = Mapping[str, Form]
SHAPES: dict[str, Form] = {
    "cube": Form(_cube, 1.28, 0.76, 0.76, turn=0.65),  # corner on: three faces always show
    "sphere": Form(_sphere, 0.92, 0.90, 0.86),
    "cone": Form(_cone, 1.24, 0.88, 0.86),
    "cylinder": Form(_cylinder, 1.05, 0.80, 0.80),
    "torus": Form(_torus, 0.97, 0.54, 0.50, tilt=0.42),
}


# --- positions ----------------------------------------------------------------------------------------------

_ELEVATION = 0.45  # of the camera above the ground, in radians
_CAMERA_DISTANCE = 8.0
_FRAME_WIDTH = 3.55  # world units across the image at the target's distance
_TARGET_HEIGHT = 1.02


@dataclass(frozen=True)
class _Placed:
    form: Form
    colour: Floats  # [3]
    radius: float
    centre: Floats  # [3], world
    rotation: Floats  # [3, 3], world to solid

    def distance(self, points: Floats) -> Floats:
        """Returns the world distance to the surface at `points` [3, n]."""
        x, y, z = self.rotation @ ((points - self.centre[:, None]) / np.float32(self.radius))
        return self.form.distance(x, y, z) * np.float32(self.radius)

    def chord(self, origin: Floats, directions: Floats, margin: float = 0.0) -> tuple[Floats, Floats]:
        """Returns the distance along rays to the middle of the enclosing ball's chord, and half its length or 0."""
        offset = self.centre.reshape(3, 1) - origin
        middle = (offset * directions).sum(axis=0)
        reach = (self.form.bound * self.radius + margin) ** 2
        half = np.sqrt(np.maximum(reach + middle * middle - (offset * offset).sum(axis=0), 0))
        return middle, half


def _rotation(turn: float, tilt: float) -> Floats:
    about_z = [[np.cos(turn), np.sin(turn), 0], [-np.sin(turn), np.cos(turn), 0], [0, 0, 1]]
    about_x = [[1, 0, 0], [0, np.cos(tilt), np.sin(tilt)], [0, -np.sin(tilt), np.cos(tilt)]]
    return np.array(about_z, np.float32) @ np.array(about_x, np.float32)


def _ground_plan(scene: Scene, rng: np.random.Generator, shapes: Shapes) -> Plan:
    """Returns the point (x, y, z) below each solid, before jitter."""
    radii = [SIZES[solid.size] for solid in scene.solids]
    if scene.relation is None:
        return [(0.0, 0.0, 0.0)]
    first, second = radii
    if scene.relation == "on top of":
        below = shapes[scene.solids[1].shape]
        return [(0.0, 0.0, (below.half_height + below.seat) * second), (0.0, 0.0, 0.0)]
    if scene.relation == "left of":
        apart = 0.75 * (first + second) + 0.55
        return [(-apart * second / (first + second), 0.0, 0.0), (apart * first / (first + second), 0.0, 0.0)]
    aside = 0.5 * (0.90 * second + 0.60 * first) * rng.choice([-1.0, 1.0])
    return [(aside, 1.30, 0.0), (-aside, -0.45, 0.0)]


def _arrange(
    scene: Scene, rng: np.random.Generator, colours: Mapping[str, Rgb], shapes: Shapes, anywhere: bool
) -> list[_Placed]:
    plan = _ground_plan(scene, rng, shapes)
    shift = rng.uniform(*(_room(scene, plan, shapes) if anywhere else (-0.06, 0.06)), size=2)  # of all
    apart = 0.20 if anywhere and scene.relation != "on top of" else 0.03
    placed: list[_Placed] = []
    for solid, (x, y, z) in zip(scene.solids, plan, strict=True):
        form, radius = shapes[solid.shape], SIZES[solid.size]
        own = rng.uniform(-apart, apart, size=2)
        centre = (x + shift[0] + own[0], y + shift[1] + own[1], z + form.half_height * radius)
        rotation = _rotation(form.turn + rng.uniform(-0.12, 0.12), form.tilt)
        colour = np.array(colours[solid.colour], np.float32)
        placed.append(_Placed(form, colour, radius, np.array(centre, np.float32), rotation))
    return placed


def _room(scene: Scene, plan: Plan, shapes: Shapes) -> tuple[Floats, Floats]:
    """Returns the least and the greatest (x, y) by which a group can move and stay in the frame."""
    sin, cos = np.sin(_ELEVATION), np.cos(_ELEVATION)  # perspective is left out: hence the margin of 0.3
    radii = np.array([[SIZES[solid.size]] for solid in scene.solids])
    x, y, z = np.array(plan).T
    middle = (
        z - _TARGET_HEIGHT + [shapes[solid.shape].half_height * SIZES[solid.size] for solid in scene.solids]
    )
    seen = np.stack([x, y * sin + middle * cos], axis=1)  # right, up
    edge, scale = _FRAME_WIDTH / 2 - 0.3, np.array([1, sin])
    least, most = (-edge - (seen - radii).min(0)) / scale, (edge - (seen + radii).max(0)) / scale
    return least, np.maximum(least, np.minimum(most, [np.inf, 1.6 - y.max()]))  # not far behind the target


# --- rendering ----------------------------------------------------------------------------------------------

_LIGHT = (-0.50, -0.52, 0.95)
_AMBIENT = 0.50


@functools.cache
def _camera(side: int) -> tuple[Floats, Floats]:
    """Returns the eye [3] and the unit directions [3, side * side] through the pixel centres, row by row."""
    sin, cos = np.sin(_ELEVATION), np.cos(_ELEVATION)
    forward, up = np.array([0, cos, -sin]), np.array([0, sin, cos])
    eye = np.array([0, 0, _TARGET_HEIGHT]) - _CAMERA_DISTANCE * forward
    grid = ((np.arange(side) + 0.5) / side - 0.5) * _FRAME_WIDTH / _CAMERA_DISTANCE
    right, down = np.meshgrid(grid, grid)
    rays = forward[:, None] - np.outer(up, down) + np.outer([1, 0, 0], right)
    return eye.astype(np.float32), (rays / np.linalg.norm(rays, axis=0)).astype(np.float32)


@functools.cache
def _ground(size: int) -> Floats:
    """Returns the ground points [3, size * size] visible at the pixels, kept finite near the horizon."""
    eye, rays = _camera(size)
    return eye[:, None] + rays * (-eye[2] / np.minimum(rays[2], -0.05))


@functools.cache
def _backdrop(size: int) -> Floats:
    """Returns brightness [size * size]: ground in front, a slightly darker wall behind, a soft edge between."""
    depth = _ground(size)[1]
    blend = np.clip((depth - 1.8) / 3.0, 0, 1)
    return 1.0 - 0.16 * blend * blend * (3 - 2 * blend)


def _first_hits(solid: _Placed, eye: Floats, rays: Floats) -> tuple[npt.NDArray[np.intp], Floats]:
    """Traces spheres: returns indices of the rays that hit the solid, and the distances along them."""
    middle, half = solid.chord(eye[:, None], rays)
    active = np.flatnonzero(half)
    along, end, rays = (middle - half)[active], (middle + half)[active], rays[:, active]
    hit: list[npt.NDArray[np.intp]] = []
    hit_along: list[Floats] = []
    for _ in range(40):
        gap = solid.distance(eye[:, None] + rays * along)
        along = along + gap
        close = gap < 2e-3
        hit.append(active[close])
        hit_along.append(along[close])
        going = ~close & (along < end)
        active, along, end, rays = active[going], along[going], end[going], rays[:, going]
        if not active.size:
            break
    return np.concatenate(hit), np.concatenate(hit_along)


def _normals(solid: _Placed, points: Floats) -> Floats:
    corners = np.array([[1, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]], np.float32)
    total = np.zeros_like(points)
    for corner in corners[:, :, None]:
        total += corner * solid.distance(points + np.float32(4e-3) * corner)
    return total / np.maximum(np.sqrt((total * total).sum(axis=0)), 1e-9)


def _light_through(points: Floats, light: Floats, casters: Sequence[_Placed]) -> Floats:
    """Returns how much of the light [3] reaches `points` [3, n]: 0 in full shadow, 1 in the open, soft between."""
    visible = np.ones(points.shape[1], np.float32)
    softness = 0.22  # half width of the penumbra per unit of distance to the caster
    for solid in casters:
        middle, half = solid.chord(points, light[:, None], margin=0.25)
        near = np.flatnonzero((half > 0) & (middle + half > 0))
        start = points[:, near]
        along, end = np.maximum(middle - half, 0.03)[near], (middle + half)[near]
        openness = np.ones(near.size, np.float32)
        for _ in range(9):
            gap = solid.distance(start + light[:, None] * along)
            openness = np.minimum(openness, np.where(along < end, gap / (softness * along + 0.02), 1))
            along = along + np.maximum(gap, 0.10)
        edge = 0.5 + 0.5 * np.maximum(openness, -1)
        visible[near] *= edge * edge * (3 - 2 * edge)
    return visible


def _shade(solid: _Placed, points: Floats, eye: Floats, light: Floats, reach: Floats) -> Floats:
    """Returns colours [n, 3]: Lambert and ambient light, and a small highlight (Blinn and Phong)."""
    normals = _normals(solid, points)
    view = eye[:, None] - points
    half = view / np.sqrt((view * view).sum(axis=0)) + light[:, None]
    half /= np.sqrt((half * half).sum(axis=0))
    lambert = np.maximum(light @ normals, 0) * reach
    sky = 0.85 + 0.15 * normals[2]
    highlight = 0.22 * np.maximum((half * normals).sum(axis=0), 0) ** 40 * reach
    brightness = _AMBIENT * sky + (1.12 - _AMBIENT) * lambert
    return brightness[:, None] * solid.colour + highlight[:, None]


def _draw(placed: Sequence[_Placed], background: Rgb, light: Floats, size: int) -> Floats:
    """Renders the image [size, size, 3] in [0, 1]: 2 x 2 rays a pixel on the solids, one a pixel on the ground."""
    eye, rays = _camera(2 * size)
    ground_light = _light_through(_ground(size), light, placed)
    floor = (_backdrop(size) * (0.55 + 0.45 * ground_light)).reshape(size, size, 1)
    fine = np.repeat(np.repeat(floor * np.array(background, np.float32), 2, axis=0), 2, axis=1)
    pixels = fine.reshape(-1, 3)
    nearest = np.full(rays.shape[1], np.inf, np.float32)
    for i, solid in enumerate(placed):
        index, along = _first_hits(solid, eye, rays)
        seen = along < nearest[index]
        index, along = index[seen], along[seen]
        nearest[index] = along
        points = eye[:, None] + rays[:, index] * along
        others = [*placed[:i], *placed[i + 1 :]]
        pixels[index] = _shade(solid, points, eye, light, _light_through(points, light, others))
    fine = fine[0::2] + fine[1::2]
    return (fine[:, 0::2] + fine[:, 1::2]) / 4


def render(
    scene: Scene,
    seed: int,
    size: int = 128,
    colours: Mapping[str, Rgb] = COLOURS,
    shapes: Mapping[str, Form] = SHAPES,
    anywhere: bool = False,
) -> npt.NDArray[np.uint8]:
    """Renders the scene as pixels [size, size, 3], sRGB; the same scene, seed and size give the same bytes.

    `colours` and `shapes` are what the names of its solids mean. The solids stand in the middle, as in all that the
    bundled model was trained on, or with `anywhere` anywhere in the frame.
    """
    rng = np.random.default_rng(seed)
    placed = _arrange(scene, rng, colours, shapes, anywhere)
    light = np.array(_LIGHT, np.float32) + rng.uniform(-0.06, 0.06, size=3).astype(np.float32)
    light /= np.linalg.norm(light)
    image = _draw(placed, BACKGROUNDS[scene.background], light, size)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


# --- scenes of a split --------------------------------------------------------------------------------------

ALWAYS_HELD_OUT = "blue sphere + red cube"


def pair_key(scene: Scene) -> str:
    """Returns the unordered pair of colours and shapes, such as "blue sphere + red cube", whatever the relation."""
    return " + ".join(sorted(f"{solid.colour} {solid.shape}" for solid in scene.solids))


def held_out(scene: Scene) -> bool:
    """Returns whether the pair is excluded from training: one in five by its CRC-32, and `ALWAYS_HELD_OUT`.

    A single solid is never held out.
    """
    key = pair_key(scene)
    return len(scene.solids) == 2 and (key == ALWAYS_HELD_OUT or zlib.crc32(key.encode()) % 5 == 0)


def _sample(rng: np.random.Generator, count: int) -> Scene:
    def pick(names: Iterable[str]) -> str:
        return rng.choice(list(names)).item()

    relation = pick(RELATIONS) if count == 2 else None
    sizes = [pick(SIZES) for _ in range(count)]
    if relation == "on top of":
        sizes.sort(key=lambda size: SIZES[size])  # no solid rests on a smaller one, which it would hide
    solids = tuple(Solid(pick(SHAPES), pick(COLOURS), size) for size in sizes)
    return Scene(solids, relation, pick(BACKGROUNDS))


def scene_at(index: int, split: str) -> Scene:
    """Returns scene number `index` of a split; scenes are independent, so they can be made in any order.

    "train" and "fresh" draw from the same distribution with different random streams and hold no held-out
    pair; "heldout" holds two-solid scenes with held-out pairs only. Two solids never share both colour and
    shape, and no large solid rests on a small one.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
    rng = np.random.default_rng([zlib.crc32(split.encode()), index])
    count = 1 if split != "heldout" and rng.random() < SINGLE_SHARE else 2
    while True:
        scene = _sample(rng, count)
        distinct = len({(solid.colour, solid.shape) for solid in scene.solids}) == count
        if distinct and held_out(scene) == (split == "heldout"):
            return scene


def image_at(index: int, split: str, size: int = 128) -> npt.NDArray[np.uint8]:
    """Renders the image [size, size, 3] of `scene_at(index, split)`."""
    return render(scene_at(index, split), zlib.crc32(f"{split} {index}".encode()), size)
