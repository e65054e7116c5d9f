"""Make the images of an event as they are stored: calibrate, cut, map, convert to integers."""

from __future__ import annotations

from functools import partial

import numpy as np
from numba import njit

from . import layout
from .calibrate import Calibrator
from .errors import DataError
from .instrument import (
    Telescope,
    describe_array,
    mapping_method,
    select_telescopes,
    with_types,
)
from .mapping import Mapping, camera_mapping
from .settings import Settings
from .simtel import Corrupt, Event, SimtelFile, guarded

# Mappings of the cameras seen so far, also of earlier files: some take seconds to make.
_mappings: dict[tuple[str, str, bool], Mapping] = {}


@njit(cache=True)
def _quantise(values: np.ndarray, scale: float, low: float, high: float, out: np.ndarray) -> int:
    """Write rint(values * scale), clipped, to `out`; count values above `high`. NaN becomes 0."""
    too_large = 0
    for i in range(values.size):
        value: float = np.float64(values[i]) * scale
        if np.isnan(value):
            value = 0.0
        value = np.rint(value)
        if value > high:
            too_large += 1
            value = high
        elif value < low:
            value = low
        out[i] = value
    return too_large


def quantise(
    values: np.ndarray, scale: float, dtype: np.dtype, lowest: float | None = None
) -> tuple[np.ndarray, int]:
    """Round values * scale to an integer type without wrapping; count values that are too large.

    Parameters
    ----------
    values : (n,) array
        NaN becomes 0.
    lowest : float, optional
        Clip at this from below (0 for charges); by default at the smallest value of the type.

    Returns
    -------
    (n,) array of dtype, int
        Stored numbers, and how many exceeded the largest value of the type. float32 is neither
        rounded nor clipped.
    """
    if dtype.kind == "f":
        return (values.astype(np.float64) * scale).astype(dtype), 0
    limits = np.iinfo(dtype)
    low = float(limits.min if lowest is None else lowest)
    out = np.empty(values.shape, dtype)
    return out, _quantise(values, scale, low, float(limits.max), out)


def stored_image(
    charge: np.ndarray, peak_time: np.ndarray, mapping: Mapping, settings: Settings
) -> tuple[np.ndarray, int]:
    """Make one image as it is stored.

    Parameters
    ----------
    charge : (n_pixels,) array, photo-electrons
    peak_time : (n_pixels,) array, samples

    Returns
    -------
    array
        Shape `layout.image_shape`, configured dtype; charge in 0.01 photo-electrons, time in units
        of `settings.time_unit` samples.
    int
        Number of cells whose charge was too large for the type.
    """
    dtype = np.dtype(settings.dtype)
    lowest = 0.0 if dtype.kind == "u" else None

    def stored(
        values: np.ndarray, kind: str, scale: float, low: float | None
    ) -> tuple[np.ndarray, int]:
        if mapping.cells is not None:  # round before mapping: a camera has fewer pixels than cells
            numbers, too_large = quantise(values, scale, dtype, low)
            return mapping.image(numbers), too_large
        numbers, too_large = quantise(mapping.flat(values, kind), scale, dtype, low)
        return numbers.reshape(mapping.shape), too_large

    scaled, saturated = stored(charge, "charge", 1 / layout.CHARGE_UNIT_PE, 0.0)
    channels = []
    for name in layout.CHANNELS[settings.image_mode]:
        if name == "charge":
            channels.append(scaled)
        elif name == "time":
            channels.append(stored(peak_time, "time", 1 / settings.time_unit, lowest)[0])
        else:
            channels.append(np.zeros_like(scaled))
    axis = 0 if settings.dim_order == "channels_first" else -1
    image = channels[0][np.newaxis] if axis == 0 else channels[0][..., np.newaxis]
    if len(channels) > 1:
        image = np.stack(channels, axis)
    if settings.scale_factor > 1 and len(mapping.shape) == 2:
        first = 1 if axis == 0 else 0
        image = image.repeat(settings.scale_factor, first).repeat(settings.scale_factor, first + 1)
    return image, saturated


class SelectedArray:
    """The selected telescopes of a file, with what is computed once for all its events.

    Parameters
    ----------
    simtel : SimtelFile
    settings : Settings

    Attributes
    ----------
    telescopes : list of Telescope
        In the order of tel_map.
    mappings : dict
        Telescope id -> Mapping.
    types : list of str
        Telescope types, each once.

    Raises
    ------
    DataError
        If the description of the array is damaged or has no selected telescope.
    """

    def __init__(self, simtel: SimtelFile, settings: Settings) -> None:
        self._simtel, self._settings = simtel, settings
        self.mappings: dict[int, Mapping] = {}
        where = str(simtel.path)
        try:
            described = guarded(lambda: describe_array(simtel), "array description")
            typed = with_types(described, settings.types)
            self.telescopes = select_telescopes(typed, settings.type_mode)
            for telescope in self.telescopes:
                camera = telescope.camera
                where = f"{simtel.path}: camera {camera.name}"
                _check_times_fit(camera.n_samples, settings)
                method = mapping_method(telescope, settings.mapping)
                key = (camera.fingerprint, method, settings.derotate)
                if key not in _mappings:
                    x, y = camera.pixel_x, camera.pixel_y
                    if settings.derotate:
                        x, y = (
                            v.to_value("m") for v in (camera.geometry.pix_x, camera.geometry.pix_y)
                        )
                    make = partial(camera_mapping, x, y, method)
                    _mappings[key] = guarded(make, "pixel positions")
                self.mappings[telescope.tel_id] = _mappings[key]
        except (Corrupt, DataError) as error:
            raise DataError(f"{where}: {error}") from error
        self.by_id = {t.tel_id: t for t in self.telescopes}
        self.types = list(dict.fromkeys(t.camera.telescope_type for t in self.telescopes))
        self._calibrators: dict[int, Calibrator] = {}

    def images(self, event: Event) -> tuple[dict[int, np.ndarray], int]:
        """Images of an event that pass the image cuts, as stored.

        Returns
        -------
        dict
            Telescope id -> image.
        int
            Saturated cells in them.
        """
        images, saturated = {}, 0
        for tel_id, adc in event.telescopes.items():
            telescope = self.by_id[tel_id]
            if tel_id not in self._calibrators:
                make = partial(Calibrator, telescope)
                self._calibrators[tel_id] = guarded(make, f"telescope {tel_id}")
            if tel_id not in self._simtel.monitoring:
                raise Corrupt(f"telescope {tel_id}: no pedestals or gains before its data")
            charge, peak_time = self._calibrators[tel_id](adc, self._simtel.monitoring[tel_id])
            if not passes_cuts(charge, telescope, self._settings):
                continue
            samples = peak_time * np.float32(telescope.camera.sampling_rate_ghz)
            images[tel_id], n = stored_image(charge, samples, self.mappings[tel_id], self._settings)
            saturated += n
        return images, saturated


def _check_times_fit(n_samples: int, settings: Settings) -> None:
    """Refuse a type that is too small for the peak times of a camera."""
    dtype, largest = np.dtype(settings.dtype), n_samples / settings.time_unit
    has_time = "time" in layout.CHANNELS[settings.image_mode]
    if has_time and dtype.kind != "f" and largest > np.iinfo(dtype).max:
        raise DataError(
            f"its {n_samples} samples are up to {largest:.0f} times [image] time_unit, too large "
            f"for {dtype} (expected at most {np.iinfo(dtype).max}). Raise time_unit, or use dtype "
            "uint32."
        )


def passes_cuts(charge: np.ndarray, telescope: Telescope, settings: Settings) -> bool:
    """Whether an image passes the cuts on charge and leakage, with ctapipe's cleaning."""
    if settings.min_intensity <= 0 and settings.max_leakage >= 1:
        return True
    from ctapipe.image import leakage_parameters, tailcuts_clean

    geometry = telescope.camera.geometry
    mask = tailcuts_clean(
        geometry,
        charge,
        picture_thresh=settings.picture_threshold,
        boundary_thresh=settings.boundary_threshold,
    )
    if not mask.any() or float(charge[mask].sum()) < settings.min_intensity:
        return False
    leakage = leakage_parameters(geometry, charge, mask).intensity_width_2
    return float(leakage) <= settings.max_leakage
