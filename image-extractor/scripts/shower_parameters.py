"""Hillas and stereo parameters of the events of a data set, as tables.

Reads   a data set whose images have one cell per pixel; optionally a file of tables made before.
Writes  that file of tables (npz), if one is named.

Images are cleaned and parametrised by ctapipe's ImageProcessor. Directions and cores are where the
axes of an event's images meet (Hofmann et al. 1999, Astropart. Phys. 12, 135, algorithm 1), solved
for all telescopes together, which takes a tenth of the time of ctapipe's HillasReconstructor; a
test compares both with the truth.
"""

import multiprocessing
import warnings
from dataclasses import dataclass, fields
from io import BytesIO
from pathlib import Path

import numpy as np

from image_extractor.reader import Events, unit_vector
from image_extractor.transaction import write_whole

CLEANING = {"picture_threshold_pe": 6.0, "boundary_threshold_pe": 3.0}
# Weight of the pointing and the middle of the array, to which nearly parallel axes are drawn.
RIDGE = 1e-3


@dataclass(frozen=True)
class Parameters:
    """Tables of n events; NaN where a value is missing.

    Attributes
    ----------
    numbers : (n, 2) int array
        Run and event number.
    direction : (n, 2) array, deg
        Reconstructed, relative to the pointing: towards larger altitude and larger azimuth.
    event : (n, 6) array
        Distances of the direction from the pointing (deg) and of the core from the origin (m),
        height of the maximum (km), number of images and of those with an axis, log10 of the charge.
    images : (n, n_telescopes, 16) array
        The images of an event in the order of Tel_Table: log10 of the charge (p.e.), impact
        distance (m), numbers of pixels and islands, length, width and distance from the pointing
        (deg), skewness, kurtosis, time slope and its scatter, leakage (2), concentration (3).
    """

    numbers: np.ndarray
    direction: np.ndarray
    event: np.ndarray
    images: np.ndarray

    def table(self) -> np.ndarray:
        """One row (38,) per event: `event`, mean over images by charge, and of the brightest."""
        weight = np.nan_to_num(10 ** self.images[..., :1])
        total = (weight * ~np.isnan(self.images)).sum(1)
        mean = np.nansum(weight * self.images, 1) / np.maximum(total, 1e-9)
        brightest = np.take_along_axis(self.images, weight.argmax(1)[:, None], 1)[:, 0]
        return np.concatenate([self.event, mean, brightest], 1)


def stereo(
    centres: np.ndarray, psi: np.ndarray, weight: np.ndarray, positions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Direction and core: the points with the least weighted squared distances from the axes.

    Parameters
    ----------
    centres : (n, 2) array, deg
        Centres of the images, towards larger altitude and larger azimuth.
    psi : (n,) array, rad
        Angles of their axes from the azimuth.
    weight : (n,) array
    positions : (n, 2) array, m
        Of the telescopes, along the same two axes, all of which point the same way.

    Returns
    -------
    direction (2,), deg; core (2,), m
    """
    across = np.stack([-np.cos(psi), np.sin(psi)], 1)
    planes = (
        across[:, :, None] * across[:, None] * (weight / max(weight.sum(), 1e-9))[:, None, None]
    )
    matrix = planes.sum(0) + RIDGE * np.eye(2)
    direction, core = (
        np.linalg.solve(matrix, np.einsum("nij,nj->i", planes, x)) for x in (centres, positions)
    )
    return direction, core


def _of_image(p: object) -> list[float]:
    """Parameters of an image, then its centre (deg) and the angle of its axis (rad)."""
    h, t, c = p.hillas, p.timing, p.concentration
    row = [np.log10(h.intensity), np.nan, p.morphology.n_pixels, p.morphology.n_islands]
    row += [angle.to_value("deg") for angle in (h.length, h.width, h.r)]
    row += [h.skewness, h.kurtosis, t.slope.value, t.deviation]
    row += [p.leakage.intensity_width_1, p.leakage.intensity_width_2, c.cog, c.core, c.pixel]
    return [*row, h.fov_lat.to_value("deg"), h.fov_lon.to_value("deg"), h.psi.to_value("rad")]


def _of_event(event: object, positions: np.ndarray) -> tuple[np.ndarray, ...]:
    """Make the rows of an event, see Parameters; `positions` (n_images, 3) of telescopes, m."""
    rows = np.array([_of_image(dl1.parameters) for dl1 in event.dl1.tel.values()], float)
    images, place = rows[:, :16], rows[:, 16:]
    pointing = event.monitoring.pointing
    azimuth, altitude = (
        angle.to_value("rad") for angle in (pointing.array_azimuth, pointing.array_altitude)
    )
    up = unit_vector(azimuth, altitude + np.pi / 2)
    side = unit_vector(azimuth + np.pi / 2, 0.0)
    positions = positions @ np.stack([up, side], 1)
    seen = np.isfinite(place).all(1)
    charge = 10 ** images[seen, 0]
    # An axis is uncertain by its width / length / sqrt(charge).
    weight = charge * (images[seen, 4] / np.maximum(images[seen, 5], 0.01)) ** 2
    centres, positions = place[seen, :2], positions[seen]
    direction, core = stereo(centres, place[seen, 2], weight, positions)
    images[seen, 1] = impact = np.linalg.norm(positions - core, axis=1)
    away = np.radians(np.linalg.norm(centres - direction, axis=1))
    height = charge @ impact / (charge @ away) / 1000 if seen.any() else np.nan
    size = np.log10(max(charge.sum(), 1e-9))
    row = [np.linalg.norm(direction), np.linalg.norm(core), height, len(rows), seen.sum(), size]
    return direction, np.array(row), images


def compute(path: Path, part: str | None = None) -> Parameters:
    """Compute the parameters of the events of a part, or of all."""
    warnings.simplefilter("ignore")  # ctapipe's, of empty images
    from ctapipe.image import ImageProcessor
    from traitlets.config import Config

    from image_extractor.ctapipe_source import DatasetSource

    numbers, rows = [], []
    with DatasetSource(path, part=part) as source:
        array, config = source.subarray, Config({"TailcutsImageCleaner": CLEANING})
        process = ImageProcessor(array, config=config)
        for event in source:
            process(event)
            positions = np.array([array.positions[t].to_value("m") for t in event.dl1.tel])
            direction, row, images = _of_event(event, positions)
            padded = np.full((len(array.tel), 16), np.nan)
            padded[: len(images)] = images
            numbers.append((event.index.obs_id, event.index.event_id))
            rows.append((direction, row, padded))
    return Parameters(np.array(numbers), *map(np.array, zip(*rows, strict=True)))


def of_parts(path: Path, parts: dict[str, Events], kept: Path | None) -> dict[str, Parameters]:
    """Make the parameters of the events of each part, in the order of its events.

    `kept` is a file in which they are found, or written after they were computed.
    """
    wanted = {part: events.events[["run_number", "event_number"]] for part, events in parts.items()}
    places: dict[tuple[int, int], int] = {}
    if kept is not None and kept.is_file():
        with np.load(kept) as file:
            whole = Parameters(*(file[field.name] for field in fields(Parameters)))
        places = {number: k for k, number in enumerate(map(tuple, whole.numbers.tolist()))}
    if not all(number in places for numbers in wanted.values() for number in numbers.tolist()):
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            found = pool.starmap(compute, [(path, part) for part in parts], 1)
        tables = zip(*(vars(of_part).values() for of_part in found), strict=True)
        whole = Parameters(*map(np.concatenate, tables))
        places = {number: k for k, number in enumerate(map(tuple, whole.numbers.tolist()))}
        if kept is not None:
            buffer = BytesIO()
            np.savez(buffer, **vars(whole))
            write_whole(kept, buffer.getvalue())
    rows = {part: [places[n] for n in numbers.tolist()] for part, numbers in wanted.items()}
    return {part: Parameters(*(x[k] for x in vars(whole).values())) for part, k in rows.items()}
