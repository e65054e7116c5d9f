"""Map camera pixels to two-dimensional images, with matrices made from the file's pixel positions.

Positions are those in the file (before ctapipe's derotation), in which every CTA camera is aligned
with the axes, or the derotated ones. square, axial and oversampling turn a lattice that is not
aligned to the nearest axis, and state the angle. Image axes are (x, y): the first index grows with
x, the second with y, as in the historic SCT map.

method        cells                                                        charge conserved
square        one per pixel at [rank of x, rank of y]; square cameras      yes
axial         one per pixel at its axial lattice coordinates; hexagonal    yes
oversampling  2 x 2 per pixel, rows offset by half a pixel if hexagonal    yes
rebin         square grid, charge shared by overlapping area               yes
nearest       square grid, value of the pixel that covers the cell         no
bilinear      square grid, linear between the three nearest pixels         no
none          no image: a vector of pixels                                 yes

`auto` is square for square lattices and axial for hexagonal ones. The lattice is recognised from
the positions, not from the pixel shape in the file, which prod2 files omit. Peak times are mapped
to the same cells with weights that add up to one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import csr_matrix
from scipy.spatial import Delaunay, cKDTree

from .errors import DataError
from .settings import MAPPINGS

REBIN_POINTS = 12  # sample points across a pixel when its area is shared among cells
SAME_LEVEL = 0.2  # pixels closer than this fraction of the spacing are in one row or column
SPARSEST = 16  # maximum ratio of the area of an image to that of its pixels
ALIGNED_DEG = 0.5  # lattices rotated by less than this count as aligned with the axes


@dataclass(frozen=True, eq=False)
class Mapping:
    """Matrices from pixels to the cells of an image.

    Attributes
    ----------
    shape : tuple of int
        Image axes (x, y), or (n_pixels,) for `none`.
    charge, time : (n_cells, n_pixels) csr_matrix
        Weights, with cells in C order of `shape`.
    cells : (n_pixels,) array or None
        Cell of each pixel, if each has one of its own.
    turn_deg : float
        Angle by which the pixel positions were turned counter-clockwise before they were mapped.
    """

    method: str
    shape: tuple[int, ...]
    charge: csr_matrix
    time: csr_matrix
    cells: np.ndarray | None
    turn_deg: float = 0.0

    def flat(self, values: np.ndarray, kind: str = "charge") -> np.ndarray:
        """Map pixel values (n_pixels,) to cells (n_cells,); empty cells are 0.

        `kind` chooses the weights: "charge" or "time".
        """
        if self.cells is None:
            return (self.charge if kind == "charge" else self.time) @ values
        flat = np.zeros(self.charge.shape[0], values.dtype)
        flat[self.cells] = values
        return flat

    def image(self, values: np.ndarray, kind: str = "charge") -> np.ndarray:
        """Map pixel values (n_pixels,) to an image of `shape`."""
        return self.flat(values, kind).reshape(self.shape)


def camera_mapping(pixel_x: np.ndarray, pixel_y: np.ndarray, method: str = "auto") -> Mapping:
    """Build the mapping of a camera.

    Parameters
    ----------
    pixel_x, pixel_y : (n_pixels,) array
        Positions in any unit.
    method : str
        One of settings.MAPPINGS.

    Raises
    ------
    DataError
        If the method is unknown or cannot be used for the lattice of the pixels.
    """
    x, y = np.asarray(pixel_x, np.float64), np.asarray(pixel_y, np.float64)
    if method not in MAPPINGS:
        raise DataError(
            f"mapping {method!r}: not a valid method (expected {' | '.join(MAPPINGS)}). "
            "Choose one of these."
        )
    if not np.isfinite([x, y]).all():
        raise DataError(
            "a pixel position is not a number, so the description is damaged. Leave the file out."
        )
    if method == "none":
        return _one_cell_each("none", np.arange(x.size), (x.size,))
    spacing = _spacing(x, y)
    if np.ptp(x) * np.ptp(y) > SPARSEST * x.size * spacing**2:
        raise DataError(
            "the pixels lie too far apart for a camera, so the description is damaged. "
            "Leave the file out."
        )
    is_hexagonal = lattice_neighbors(x, y) == 6
    if method == "auto":
        method = "axial" if is_hexagonal else "square"
    if method == "square" and is_hexagonal:
        raise DataError("mapping 'square' needs a square pixel lattice. Use axial or oversampling.")
    if method in ("square", "axial", "oversampling"):
        x, y, turn_deg = _aligned(x, y, spacing, 6 if is_hexagonal else 4)
        if method == "oversampling":
            return replace(_oversampled(x, y, spacing, is_hexagonal), turn_deg=turn_deg)
        column_row = (
            _axial(x, y, spacing) if is_hexagonal else (_levels(x, spacing), _levels(y, spacing))
        )
        return replace(_one_cell_each(method, *_cells(*column_row)), turn_deg=turn_deg)
    return _regridded(x, y, spacing, is_hexagonal, method)


def lattice_neighbors(x: np.ndarray, y: np.ndarray) -> int:
    """Count the neighbours of an inner pixel: 6 on a hexagonal lattice, 4 on a square one."""
    tree = cKDTree(np.c_[x, y])
    near = tree.query_ball_point(np.c_[x, y], 1.25 * _spacing(x, y), return_length=True) - 1
    return 6 if near.max() >= 5 else 4


def _spacing(x: np.ndarray, y: np.ndarray) -> float:
    """Median distance between neighbouring pixels (gaps between modules are wider)."""
    distance, _ = cKDTree(np.c_[x, y]).query(np.c_[x, y], k=2)
    return float(np.median(distance[:, 1]))


def _levels(values: np.ndarray, spacing: float) -> np.ndarray:
    """Rank of each value; values closer than a fraction of the spacing have the same rank.

    In curved cameras the positions of one column differ in the fourth digit.
    """
    order = np.argsort(values, kind="stable")
    steps = np.diff(values[order]) > SAME_LEVEL * spacing
    ranks = np.empty(values.size, np.int64)
    ranks[order] = np.concatenate([[0], np.cumsum(steps)])
    return ranks


def _cells(column: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """Flat cell numbers and image shape; each pixel must have a cell of its own."""
    column, row = column - column.min(), row - row.min()
    shape = (int(column.max()) + 1, int(row.max()) + 1)
    cells = column * shape[1] + row
    if np.unique(cells).size != cells.size:
        raise DataError(
            "the camera's pixels do not form a lattice. Use mapping nearest, bilinear or rebin."
        )
    return cells, shape


def _one_cell_each(method: str, cells: np.ndarray, shape: tuple[int, ...]) -> Mapping:
    n_cells, n_pixels = int(np.prod(shape)), cells.size
    matrix = csr_matrix(
        (np.ones(n_pixels, np.float32), (cells, np.arange(n_pixels))), (n_cells, n_pixels)
    )
    return Mapping(method, shape, matrix, matrix, cells)


def _aligned(
    x: np.ndarray, y: np.ndarray, spacing: float, fold: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """Turn a lattice of 6 or 4 neighbours so that rows run along an axis: (x, y, angle in deg)."""
    off = _direction(x, y, spacing, fold)
    if fold == 6 and abs(off) >= 15:
        off -= np.copysign(30.0, off)
    if abs(off) <= ALIGNED_DEG:
        return x, y, 0.0
    c, s = np.cos(np.radians(off)), np.sin(np.radians(off))
    return c * x + s * y, -s * x + c * y, -float(off)


def _direction(x: np.ndarray, y: np.ndarray, spacing: float, fold: int) -> float:
    """Mean direction of the neighbours in deg, modulo 360 deg / fold."""
    pairs = cKDTree(np.c_[x, y]).query_pairs(1.25 * spacing, output_type="ndarray")
    dx, dy = x[pairs[:, 1]] - x[pairs[:, 0]], y[pairs[:, 1]] - y[pairs[:, 0]]
    return float(np.degrees(np.angle(np.mean(np.exp(1j * fold * np.arctan2(dy, dx)))))) / fold


def _doubled(x: np.ndarray, y: np.ndarray, spacing: float) -> tuple[np.ndarray, np.ndarray, bool]:
    """Doubled coordinates of an aligned hexagonal lattice: (fine, coarse, whether fine is along x).

    Neighbours in a row differ by 2 in `fine`, rows by 1 in `coarse`; fine + coarse is even for all
    pixels or odd for all.
    """
    along_x = abs(_direction(x, y, spacing, 6)) < 15  # 0 if rows run along x, 30 if along y
    along, across = (x, y) if along_x else (y, x)
    fine = np.rint((along - along.min()) / (0.5 * spacing)).astype(np.int64)
    coarse = _levels(across, spacing)
    parity = (fine + coarse) & 1
    if np.unique(parity).size != 1:
        raise DataError(
            "the camera's pixels do not form a hexagonal lattice. "
            "Use mapping nearest, bilinear or rebin."
        )
    return fine, coarse, along_x


def _axial(x: np.ndarray, y: np.ndarray, spacing: float) -> tuple[np.ndarray, np.ndarray]:
    """Axial coordinates (column, row), sheared to the side that gives the smaller image."""
    fine, coarse, along_x = _doubled(x, y, spacing)
    choices = []
    for sign in (-1, 1):
        axial = (fine + sign * coarse + (fine[0] + coarse[0]) % 2) // 2
        choices.append(axial - axial.min())
    axial = min(choices, key=lambda a: int(a.max()))
    return (axial, coarse) if along_x else (coarse, axial)


def _oversampled(x: np.ndarray, y: np.ndarray, spacing: float, is_hexagonal: bool) -> Mapping:
    """Give each pixel 2 x 2 cells, each with a quarter of its charge."""
    if is_hexagonal:
        fine, coarse, along_x = _doubled(x, y, spacing)
        columns, rows = (fine, 2 * coarse) if along_x else (2 * coarse, fine)
    else:
        columns, rows = 2 * _levels(x, spacing), 2 * _levels(y, spacing)
    shape = (int(columns.max()) + 2, int(rows.max()) + 2)
    cells = np.concatenate([(columns + i) * shape[1] + rows + j for i in (0, 1) for j in (0, 1)])
    pixels = np.tile(np.arange(x.size), 4)
    return _weighted("oversampling", shape, x.size, cells, pixels, np.full(cells.size, 0.25))


def _regridded(
    x: np.ndarray, y: np.ndarray, spacing: float, is_hexagonal: bool, method: str
) -> Mapping:
    """Map the camera to a square grid whose cells have the area of a pixel."""
    pitch = spacing * (np.sqrt(np.sqrt(3) / 2) if is_hexagonal else 1.0)
    axes = []
    for values in (x, y):
        n = int(np.ceil((np.ptp(values) + spacing) / pitch - 1e-6))
        axes.append((values.min() + values.max()) / 2 + (np.arange(n) - (n - 1) / 2) * pitch)
    shape = (axes[0].size, axes[1].size)
    tree = cKDTree(np.c_[x, y])
    centres = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    if method == "nearest":
        distance, pixel = tree.query(centres)
        # Distance from the centre of a hexagon or a square to its corner.
        inside = distance <= spacing * (1 / np.sqrt(3) if is_hexagonal else np.sqrt(0.5)) * 1.02
        cells = np.flatnonzero(inside)
        return _weighted(method, shape, x.size, cells, pixel[inside], np.ones(cells.size))
    if method == "bilinear":
        return _interpolated(x, y, spacing, centres, shape)
    # rebin: divide each pixel among the cells by a fine raster of points over its area
    steps = (np.arange(2 * REBIN_POINTS) + 0.5) / REBIN_POINTS - 1  # -1 .. 1
    raster = np.stack(np.meshgrid(steps, steps, indexing="ij"), -1).reshape(-1, 2) * spacing
    points = (np.c_[x, y][:, None, :] + raster[None]).reshape(-1, 2)
    distance, owner = tree.query(points, distance_upper_bound=spacing)
    pixel = np.repeat(np.arange(x.size), len(raster))
    reach = spacing * (1 / np.sqrt(3) if is_hexagonal else np.sqrt(0.5))
    kept = (owner == pixel) & (distance <= reach)
    pixel, points = pixel[kept], points[kept]
    column = np.clip(np.rint((points[:, 0] - axes[0][0]) / pitch).astype(int), 0, shape[0] - 1)
    row = np.clip(np.rint((points[:, 1] - axes[1][0]) / pitch).astype(int), 0, shape[1] - 1)
    weight = 1.0 / np.bincount(pixel, minlength=x.size)[pixel]
    return _weighted(method, shape, x.size, column * shape[1] + row, pixel, weight)


def _interpolated(
    x: np.ndarray, y: np.ndarray, spacing: float, centres: np.ndarray, shape: tuple[int, int]
) -> Mapping:
    """Interpolate on the triangles between pixel centres, at most one spacing from the nearest."""
    mesh = Delaunay(np.c_[x, y])
    triangle = mesh.find_simplex(centres)
    distance, _ = cKDTree(np.c_[x, y]).query(centres)
    cells = np.flatnonzero((triangle >= 0) & (distance <= spacing))
    triangle = triangle[cells]
    frame = mesh.transform[triangle]  # (n, 3, 2): inverse of the triangle's edges, and its origin
    first = np.einsum("nij,nj->ni", frame[:, :2], centres[cells] - frame[:, 2])
    weights = np.c_[first, 1 - first.sum(axis=1)]
    pixels = mesh.simplices[triangle].ravel()
    return _weighted("bilinear", shape, x.size, np.repeat(cells, 3), pixels, weights.ravel())


def _weighted(
    method: str,
    shape: tuple[int, int],
    n_pixels: int,
    cells: np.ndarray,
    pixels: np.ndarray,
    weights: np.ndarray,
) -> Mapping:
    size = (shape[0] * shape[1], n_pixels)
    charge = csr_matrix((weights.astype(np.float32), (cells, pixels)), size)
    charge.sum_duplicates()
    total = np.asarray(charge.sum(axis=1)).ravel()
    time = charge.copy()
    time.data = (time.data / np.repeat(total, np.diff(charge.indptr))).astype(np.float32)
    return Mapping(method, shape, charge, time, None)
