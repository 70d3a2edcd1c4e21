"""Three-dimensional toys of our own making, rendered in software: subjects in a look that no drawing has.

Every object is a few surfaces of revolution, tubes and rounded boxes with a color per face, so no third party's mesh
or texture is in it. The pictures ship under ``recipes/subjects``; only who makes them anew needs pybullet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.interpolate import CubicSpline

from ..errors import PocketError
from ..sprites import CELL
from .atlas import fitted

__all__ = ["TOYS", "Mesh", "Toy", "rendering"]

SAMPLES = 4  # samples a side of one pixel of a drawing; the renderer itself knows no half-covered pixels
LIGHT = (-0.5, -0.8, 1.1)  # towards the lamp: from the camera's left, from before and above the object
AMBIENT, DIFFUSE, SPECULAR = 0.68, 0.42, 0.25

Color = tuple[float, float, float]
WHITE: Color = (0.97, 0.96, 0.93)
BLACK: Color = (0.12, 0.12, 0.14)


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Triangles: ``vertices`` (N, 3), z up; ``faces`` (F, 3), anticlockwise from outside, and their ``colors``."""

    vertices: np.ndarray
    faces: np.ndarray
    colors: np.ndarray

    def moved(self, *, to: Sequence[float] = (0, 0, 0), turned: Sequence[float] = (0, 0, 0)) -> Mesh:
        """Turned about x, then y, then z (degrees), then shifted by ``to``."""
        vertices = self.vertices @ _turn(*turned).T + np.asarray(to, float)
        return Mesh(vertices=vertices, faces=self.faces, colors=self.colors)

    def normals(self) -> np.ndarray:
        """(N, 3) unit normals, shared by vertices at the same place, so that seams and poles stay smooth."""
        corners = self.vertices[self.faces]
        across = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        _, same = np.unique(np.round(self.vertices, 5), axis=0, return_inverse=True)
        same = same.ravel()
        total = np.zeros((same.max() + 1, 3))
        for corner in range(3):
            np.add.at(total, same[self.faces[:, corner]], across)
        total /= np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-12)
        return total[same]


@dataclass(frozen=True, kw_only=True)
class Toy:
    """One object: its class, what it looks like, how to build it, and a view for each of its five pictures.

    A view is (turn about the vertical, camera's height, roll), in degrees.
    """

    name: str
    looks: str
    build: Callable[[], list[Mesh]]
    views: tuple[tuple[float, float, float], ...]


def rendering(name: str, view: int) -> np.ndarray:
    """The toy ``name`` in its ``view``-th view, (CELL, CELL, 4) uint8, trimmed and centred as a drawing of the atlas.

    Raises:
        PocketError: no such toy, or no pybullet to render it with.
    """
    if name not in TOYS:
        raise PocketError(f"there is no rendered object {name!r}; there are {', '.join(TOYS)}")
    bullet = _bullet()
    toy = TOYS[name]
    parts = toy.build()
    turn, height, roll = toy.views[view]
    everything = np.concatenate([part.vertices for part in parts])
    middle = (everything.min(0) + everything.max(0)) / 2
    reach = np.linalg.norm(everything - middle, axis=1).max()
    distance = reach / np.sin(np.radians(12.5))
    # The object is turned and the camera stands still, so that light falls on every view from the same side.
    pose = _turn(0, 0, turn)
    tilt = _turn(0, roll, 0) @ _turn(height, 0, 0)
    client = bullet.connect(bullet.DIRECT)
    try:
        for part in parts:
            placed = Mesh(vertices=(part.vertices - middle) @ (tilt @ pose).T, faces=part.faces, colors=part.colors)
            _add(bullet, client, placed)
        side = SAMPLES * CELL
        _, _, pixels, _, labels = bullet.getCameraImage(
            side,
            side,
            viewMatrix=bullet.computeViewMatrix((0, -distance, 0), (0, 0, 0), (0, 0, 1)),
            projectionMatrix=bullet.computeProjectionMatrixFOV(26, 1, distance - 1.5 * reach, distance + 1.5 * reach),
            lightDirection=LIGHT,
            lightColor=(1, 1, 1),
            lightDistance=4 * reach,
            lightAmbientCoeff=AMBIENT,
            lightDiffuseCoeff=DIFFUSE,
            lightSpecularCoeff=SPECULAR,
            shadow=0,
            renderer=bullet.ER_TINY_RENDERER,
            physicsClientId=client,
        )
    finally:
        bullet.disconnect(client)
    rgba = np.array(pixels, np.uint8).reshape(side, side, 4)
    rgba[..., 3] = np.where(np.array(labels).reshape(side, side) >= 0, 255, 0)
    return fitted(rgba, CELL)


def _bullet() -> Any:
    try:
        import pybullet
    except ImportError as error:
        raise PocketError(
            "rendering the toys anew needs pybullet: pip install pybullet (their pictures ship; training does not)"
        ) from error
    return pybullet


def _add(bullet: Any, client: int, mesh: Mesh) -> None:
    """One body for each color of ``mesh``: the renderer takes one color a shape."""
    normals = mesh.normals()
    for color in np.unique(mesh.colors, axis=0):
        corners = mesh.faces[(mesh.colors == color).all(1)].ravel()
        used, indices = np.unique(corners, return_inverse=True)
        shape = bullet.createVisualShape(
            bullet.GEOM_MESH,
            vertices=mesh.vertices[used].tolist(),
            indices=indices.ravel().tolist(),
            normals=normals[used].tolist(),
            rgbaColor=(*color, 1),
            specularColor=(1, 1, 1),
            physicsClientId=client,
        )
        bullet.createMultiBody(baseVisualShapeIndex=shape, physicsClientId=client)


def _turn(x: float, y: float, z: float) -> np.ndarray:
    """Rotation (3, 3) about x, then y, then z, in degrees."""
    out = np.eye(3)
    for axis, degrees in enumerate((x, y, z)):
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        a, b = (axis + 1) % 3, (axis + 2) % 3
        step = np.eye(3)
        step[a, a], step[a, b], step[b, a], step[b, b] = c, -s, s, c
        out = step @ out
    return out


# Surfaces. Each is a grid of points; ``paint`` is one color, or a function of the cells' centres (..., 3) to colors.

Paint = Color | Callable[[np.ndarray], np.ndarray]


def _surface(points: np.ndarray, paint: Paint) -> Mesh:
    """A grid of points (M, N, 3) as triangles that face where row direction x column direction points away from."""
    rows, columns = points.shape[:2]
    index = np.arange(rows * columns).reshape(rows, columns)
    a, b, c, d = index[:-1, :-1], index[:-1, 1:], index[1:, 1:], index[1:, :-1]
    faces = np.stack([np.stack([a, b, c], -1), np.stack([a, c, d], -1)], 2).reshape(-1, 3)
    centres = (points[:-1, :-1] + points[:-1, 1:] + points[1:, 1:] + points[1:, :-1]) / 4
    colors = paint(centres) if callable(paint) else np.broadcast_to(np.array(paint), centres.shape)
    colors = np.repeat(np.asarray(colors, float).reshape(-1, 3), 2, axis=0)
    return Mesh(vertices=points.reshape(-1, 3), faces=faces, colors=colors)


def _sheet(points: np.ndarray, paint: Paint, back: Paint | None = None) -> list[Mesh]:
    """A surface without thickness, seen from both sides."""
    return [_surface(points, paint), _surface(points[:, ::-1], paint if back is None else back)]


def _curve(points: Sequence[Sequence[float]], count: int) -> np.ndarray:
    """``count`` points of a smooth curve through ``points``."""
    given = np.asarray(points, float)
    lengths = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(given, axis=0), axis=1))])
    curve: np.ndarray = CubicSpline(lengths, given)(np.linspace(0, lengths[-1], count))
    return curve


def _lathe(profile: np.ndarray, paint: Paint, around: int = 64) -> Mesh:
    """``profile`` (N, 2) of (radius, height), from the bottom up, turned about z."""
    angle = np.linspace(0, 2 * np.pi, around + 1)
    radius, height = np.maximum(profile[:, :1], 0), profile[:, 1:]
    return _surface(np.stack([radius * np.cos(angle), radius * np.sin(angle), height + 0 * angle], -1), paint)


def _ball(radii: Sequence[float], paint: Paint) -> Mesh:
    """An ellipsoid."""
    up = np.linspace(-np.pi / 2, np.pi / 2, 33)
    sphere = _lathe(np.stack([np.cos(up), np.sin(up)], -1), paint)
    return Mesh(vertices=sphere.vertices * np.asarray(radii), faces=sphere.faces, colors=sphere.colors)


def _tube(path: np.ndarray, radius: float, paint: Paint, around: int = 24) -> Mesh:
    """A tube along ``path`` (N, 3), closed at its ends."""
    along = np.gradient(path, axis=0)
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    side = np.cross(along[0], (0.31, 0.87, 0.38))
    rings = []
    angle = np.linspace(0, 2 * np.pi, around + 1)[:, None]
    for point, direction in zip(path, along, strict=True):
        side = side - direction * (side @ direction)  # carried along, so that the tube does not twist
        side /= np.linalg.norm(side)
        rings.append(point + radius * (np.cos(angle) * side + np.sin(angle) * np.cross(direction, side)))
    ends = [np.broadcast_to(path[i], rings[i].shape) for i in (0, -1)]
    return _surface(np.stack([ends[0], *rings, ends[1]]), paint)


def _box(size: Sequence[float], paint: Paint, radius: float, steps: int = 24) -> Mesh:
    """A box of half sizes ``size`` with its edges rounded off by ``radius``: six grids, finest along the edges."""
    half = np.asarray(size, float)
    spread = np.sin(np.linspace(-np.pi / 2, np.pi / 2, steps + 1))
    sides = []
    for axis in range(3):
        for end in (-1, 1):
            cube = np.empty((len(spread), len(spread), 3))
            # The order of rows and columns decides which way a grid faces.
            first, second = ((axis + 2) % 3, (axis + 1) % 3) if end > 0 else ((axis + 1) % 3, (axis + 2) % 3)
            cube[..., first], cube[..., second], cube[..., axis] = spread[:, None], spread[None], end
            points = cube * half
            core = np.clip(points, radius - half, half - radius)
            out = points - core
            points = core + radius * out / np.linalg.norm(out, axis=-1, keepdims=True)
            sides.append(_surface(points, paint))
    return _joined(sides)


def _cushion(outline: Callable[[np.ndarray], np.ndarray], depth: float, paint: Paint) -> Mesh:
    """A plump shape, upright and facing the camera: ``outline`` maps an angle from its middle to a radius."""
    angle = np.linspace(0, 2 * np.pi, 241)
    swell = np.linspace(0, np.pi, 33)[:, None]
    radius = np.sin(swell) * outline(angle)
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle), -depth * np.cos(swell) + 0 * angle], -1)
    return _surface(points, paint).moved(turned=(90, 0, 0))


def _outline(angles: np.ndarray, radii: np.ndarray, soft: int) -> Callable[[np.ndarray], np.ndarray]:
    """The radius at any angle, from samples of it; corners are rounded over ``soft`` degrees."""
    radii = np.interp(np.radians(np.arange(360)), angles, radii, period=2 * np.pi)
    window = np.hanning(soft + 2)[1:-1]
    around = np.convolve(np.concatenate([radii[-soft:], radii, radii[:soft]]), window / window.sum(), "same")
    return lambda angle: np.interp(angle, np.radians(np.arange(360)), around[soft:-soft], period=2 * np.pi)


def _joined(meshes: Sequence[Mesh]) -> Mesh:
    """One mesh of several: vertices in one place then share their normal."""
    starts = np.cumsum([0, *(len(mesh.vertices) for mesh in meshes[:-1])])
    return Mesh(
        vertices=np.concatenate([mesh.vertices for mesh in meshes]),
        faces=np.concatenate([mesh.faces + start for mesh, start in zip(meshes, starts, strict=True)]),
        colors=np.concatenate([mesh.colors for mesh in meshes]),
    )


def _choose(*choices: tuple[np.ndarray, Color], otherwise: Color) -> np.ndarray:
    """The color of the first true choice at each place."""
    conditions = [condition[..., None] for condition, _ in choices]
    return np.select(conditions, [np.array(color) for _, color in choices], np.array(otherwise))


# The toys: the front looks to -y, which is where the camera stands; the car and the boat head for +x.


def _car() -> list[Mesh]:
    body, roof, glass = (0.10, 0.62, 0.48), (0.55, 0.85, 0.65), (0.45, 0.72, 0.86)
    tyre, hub, chrome, lamp, rear = BLACK, (0.90, 0.90, 0.92), (0.78, 0.80, 0.84), (1.0, 0.97, 0.80), (0.88, 0.12, 0.12)

    def panes(centres: np.ndarray) -> np.ndarray:
        x, y, z = np.moveaxis(centres, -1, 0)
        front = np.abs(y) < 0.38
        sides = (np.abs(x) < 0.64) & (np.abs(x) > 0.05)
        return _choose(((z > -0.16) & (z < 0.22) & (front | sides), glass), otherwise=roof)

    cabin = _box((0.82, 0.54, 0.36), panes, 0.12, steps=48)
    narrow = 1 - 0.26 * (cabin.vertices[:, 2:] + 0.36) / 0.72  # towards the roof, more along the car than across
    scale = np.concatenate([narrow, 0.6 + 0.4 * narrow, np.ones_like(narrow)], axis=1)
    cabin = Mesh(vertices=cabin.vertices * scale, faces=cabin.faces, colors=cabin.colors)

    wall = np.array([(0, -0.13), (0.24, -0.13), (0.33, -0.09), (0.35, 0), (0.33, 0.09), (0.24, 0.13), (0, 0.13)])
    cover = np.array([(0, -0.16), (0.10, -0.155), (0.19, -0.14), (0.19, 0.14), (0.10, 0.155), (0, 0.16)])
    parts = [_box((1.42, 0.62, 0.32), body, 0.16), cabin.moved(to=(-0.12, 0, 0.56))]
    for end in (-1, 1):
        parts.append(_box((0.08, 0.58, 0.08), chrome, 0.07).moved(to=(end * 1.40, 0, -0.17)))
        for side in (-1, 1):
            wheel = [_lathe(wall, tyre), _lathe(cover, hub)]
            parts += [part.moved(to=(end * 0.82, side * 0.58, -0.34), turned=(90, 0, 0)) for part in wheel]
            parts.append(_ball((0.06, 0.13, 0.12), lamp if end > 0 else rear).moved(to=(end * 1.40, side * 0.40, 0.06)))
    return parts


def _boat() -> list[Mesh]:
    orange, navy, deck, mast = (0.95, 0.40, 0.20), (0.20, 0.30, 0.60), (0.80, 0.55, 0.32), (0.50, 0.35, 0.20)
    along = np.linspace(-1, 1, 81)[:, None]
    across = np.linspace(-np.pi / 2, np.pi / 2, 41)[None]
    width = 0.42 * np.sqrt(1 - np.abs(along) ** 3)
    height = -0.52 * np.sqrt(1 - along**4) * np.cos(across)
    # Stem and stern lean out: what is higher reaches further.
    hull = np.stack([1.15 * along * (1.18 + 0.18 * height / 0.52), width * np.sin(across), height], -1)
    edge = np.concatenate([hull[:, -1:], hull[:, :1]], axis=1)

    def stripe(centres: np.ndarray) -> np.ndarray:
        return _choose((centres[..., 2] > -0.14, navy), otherwise=WHITE)

    def bands(centres: np.ndarray) -> np.ndarray:
        return _choose((np.abs((centres[..., 2] / 0.5 + 0.6) % 1 - 0.5) < 0.22, orange), otherwise=WHITE)

    def sail(clew: float, foot: float, top: float, peak: float, belly: float, paint: Paint) -> list[Mesh]:
        """From ``foot`` at the mast to the ``clew``, up to ``top`` at the height ``peak``, swollen by ``belly``."""
        up, out = np.linspace(0, 1, 41)[:, None], np.linspace(0, 1, 41)[None]
        x = (foot + (clew - foot) * out) * (1 - up) + top * up
        y = belly * np.sin(np.pi * out) * (1 - up) * np.sin(0.9 * np.pi * np.minimum(up + 0.3, 1))
        return _sheet(np.stack([x, y, 0.15 + (peak - 0.15) * up + 0 * out], -1), paint)

    return [
        *_sheet(hull, stripe),
        *_sheet(edge, deck),
        _tube(np.array([(0.12, 0, z) for z in (0.0, 0.1, 2.0, 2.1)]), 0.045, mast),
        *sail(-1.05, 0.05, 0.05, 2.05, 0.20, bands),
        *sail(1.00, 0.22, 0.20, 1.75, 0.15, orange),
    ]


def _gift() -> list[Mesh]:
    paper, lid, ribbon = (0.97, 0.62, 0.12), (1.0, 0.74, 0.22), (0.90, 0.12, 0.15)
    parts = [
        _box((0.90, 0.90, 0.72), paper, 0.05),
        _box((0.20, 0.925, 0.70), ribbon, 0.03),
        _box((0.925, 0.20, 0.70), ribbon, 0.03),
        _box((0.98, 0.98, 0.18), lid, 0.06).moved(to=(0, 0, 0.62)),
        _box((0.20, 1.005, 0.205), ribbon, 0.05).moved(to=(0, 0, 0.62)),
        _box((1.005, 0.20, 0.205), ribbon, 0.05).moved(to=(0, 0, 0.62)),
        _ball((0.19, 0.19, 0.16), ribbon).moved(to=(0, 0, 0.95)),
    ]
    loop = _curve([(0, 0, 0), (0.35, 0, 0.36), (0.72, 0, 0.40), (0.74, 0, 0.14), (0.40, 0, 0.02), (0, 0, 0)], 60)
    strip = np.stack([loop + np.array((0, width, 0)) for width in np.linspace(-0.17, 0.17, 7)], 1)
    for turn in (45, 225):
        parts += [side.moved(to=(0, 0, 0.90), turned=(0, 0, turn)) for side in _sheet(strip, ribbon)]
    return parts


def _parasol() -> list[Mesh]:
    violet, pink, lining, wood = (0.45, 0.20, 0.85), (0.95, 0.55, 0.80), (0.28, 0.12, 0.52), (0.30, 0.50, 0.55)
    angle = np.linspace(0, 2 * np.pi, 193)[None]
    down = np.linspace(0, 1, 61)[:, None]
    bend = 0.49 * np.pi * down
    height = 0.75 * np.cos(bend) + 0.10 * down**4 * np.abs(np.cos(4 * angle))  # its hem hangs down at the ribs
    canopy = np.stack([np.sin(bend) * np.cos(angle), np.sin(bend) * np.sin(angle), height], -1)

    def panels(centres: np.ndarray) -> np.ndarray:
        turn = np.arctan2(centres[..., 1], centres[..., 0]) + np.pi / 8
        return _choose((np.floor(turn / (np.pi / 4)) % 2 == 0, violet), otherwise=pink)

    stick = [(0, 0, 0.7), (0, 0, 0.1), (0, 0, -0.5), (0, 0, -0.85), (0.1, 0, -1.02), (0.22, 0, -0.95), (0.24, 0, -0.8)]
    return [
        _surface(canopy[::-1], panels),
        _surface(canopy, lining),
        _tube(_curve(stick, 80), 0.05, wood),
        _ball((0.05, 0.05, 0.08), violet).moved(to=(0, 0, 0.80)),
    ]


def _star() -> list[Mesh]:
    apart = np.pi / 5
    angle = np.radians(np.arange(360))
    # From a tip (radius 1) to a notch (0.55) along a straight edge, and back: polar form of that edge.
    turn = (angle - np.pi / 2) % (2 * apart)
    turn = np.minimum(turn, 2 * apart - turn)
    notch = 0.55 * np.array([np.sin(apart), np.cos(apart)])
    across = np.array([notch[1] - 1, -notch[0]])
    radius = across[1] / (across[0] * np.sin(turn) + across[1] * np.cos(turn))
    return [_cushion(_outline(angle, radius, 12), 0.38, (0.20, 0.75, 0.70))]


def _heart() -> list[Mesh]:
    along = np.radians(np.arange(0, 360, 0.25))
    x = np.sin(along) ** 3
    y = (13 * np.cos(along) - 5 * np.cos(2 * along) - 2 * np.cos(3 * along) - np.cos(4 * along) + 2.5) / 16
    return [_cushion(_outline(np.arctan2(y, x), np.hypot(x, y), 20), 0.42, (0.60, 0.30, 0.85))]


TOYS: dict[str, Toy] = {
    "toy_car": Toy(
        name="car",
        looks="a green toy car with a pale roof and chrome bumpers",
        build=_car,
        views=((15, 10, 0), (200, 10, 0), (180, 12, 0), (-30, 14, 0), (-20, 10, 0)),
    ),
    "toy_boat": Toy(
        name="boat",
        looks="a boat with a white and navy hull and a striped orange sail",
        build=_boat,
        views=((193, 12, 0), (-20, 10, 0), (12, 8, 0), (165, 8, 0), (0, 5, 6)),
    ),
    "gift_box": Toy(
        name="gift",
        looks="a golden gift with a lid, a red ribbon and a bow",
        build=_gift,
        views=((45, 22, 0), (58, 22, 0), (35, 20, 0), (52, 26, 0), (10, 12, 0)),
    ),
    "parasol": Toy(
        name="umbrella",
        looks="an umbrella of violet and pink panels",
        build=_parasol,
        views=((22, 4, 0), (0, 0, 10), (100, -8, 0), (150, 6, 6), (60, 8, -12)),
    ),
    "plump_star": Toy(
        name="star",
        looks="a plump turquoise star",
        build=_star,
        views=((-12, 18, 0), (-25, 10, 0), (16, 8, 6), (10, 0, -8), (0, 5, 0)),
    ),
    "plump_heart": Toy(
        name="heart",
        looks="a plump violet heart",
        build=_heart,
        views=((0, 5, 0), (-25, 10, 0), (10, 0, -8), (25, 6, 6), (-12, 16, 0)),
    ),
}
