"""The array that a simtel file describes: telescopes, optics, cameras; and selecting from it.

Telescopes are identified by what the file says of them (names in its metadata, else ctapipe's table
of optics and cameras), never by the number of pixels alone: LSTCam and NectarCam both have 1855.
Identical cameras are built once, so that an array of 126 telescopes opens in a tenth of a second.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

import astropy.units as u
import numpy as np
from astropy.coordinates import Angle
from ctapipe.coordinates import CameraFrame
from ctapipe.instrument import CameraGeometry
from ctapipe.instrument.guess import guess_telescope, type_from_mirror_area, unknown_telescope

from .errors import DataError
from .simtel import SimtelFile

# Telescope types that `type_mode` may name; ALL takes them in this order.
TYPES = ("SST", "SCT", "LST", "MST")


@dataclass(frozen=True, eq=False)
class Camera:
    """One type of camera with its optics, as the file describes it.

    Attributes
    ----------
    pixel_x, pixel_y : (n_pixels,) array, m
        As in the file, before ctapipe's derotation.
    geometry : ctapipe CameraGeometry
        Derotated. Its neighbours are those used in ctapipe's calibration.
    reference_pulse : (n_channels, n) array
        Single photo-electron pulse shape, sampled every `reference_step_ns`.
    """

    name: str
    optics: str
    telescope_type: str
    n_pixels: int
    n_channels: int
    n_samples: int
    pixel_x: np.ndarray
    pixel_y: np.ndarray
    geometry: CameraGeometry
    sampling_rate_ghz: float
    reference_pulse: np.ndarray
    reference_step_ns: float
    focal_length_m: float
    effective_focal_length_m: float
    mirror_area_m2: float
    fingerprint: str


@dataclass(frozen=True, eq=False)
class Telescope:
    """One telescope. Its position is in m in ctapipe's ground frame (x north, y west, z up)."""

    tel_id: int
    position: tuple[float, float, float]
    camera: Camera
    disabled_pixels: np.ndarray


def describe_array(simtel: SimtelFile) -> dict[int, Telescope]:
    """Telescopes of a file by id, in the file's order."""
    cameras: dict[tuple[Any, ...], Camera] = {}
    telescopes = {}
    tel_ids = simtel.header["tel_id"].tolist()
    for tel_id, parts in simtel.telescopes.items():
        if tel_id not in tel_ids:
            raise DataError(
                f"telescope {tel_id} is described but has no position (expected one in the run "
                "header). Leave the file out."
            )
        named = _named_telescope(simtel.meta.get(tel_id, {}))
        key = (
            id(parts["camera_settings"]),
            id(parts["pixel_settings"]),
            id(parts["camera_organization"]),
            named,
        )
        if key not in cameras:
            cameras[key] = _camera(parts, named)
        x, y, z = simtel.header["tel_pos"][tel_ids.index(tel_id)].tolist()
        telescopes[tel_id] = Telescope(
            tel_id, (x, y, z), cameras[key], np.array(parts["disabled_pixels"]["HV_disabled"])
        )
    return telescopes


def _named_telescope(meta: dict[bytes, bytes]) -> tuple[str, str] | None:
    """Optics and camera name in the metadata; like ctapipe, only if it has a mirror class, too."""
    optics, camera = meta.get(b"OPTICS_CONFIG_NAME"), meta.get(b"CAMERA_CONFIG_NAME")
    if optics is None or camera is None or b"MIRROR_CLASS" not in meta:
        return None
    return optics.decode("utf-8", "replace"), camera.decode("utf-8", "replace")


def _camera(parts: dict[str, Any], named: tuple[str, str] | None) -> Camera:
    settings, pixels = parts["camera_settings"], parts["pixel_settings"]
    organization = parts["camera_organization"]
    n_pixels = int(settings["n_pixels"])
    focal_length = u.Quantity(settings["focal_length"], u.m)
    mirror_area = u.Quantity(settings["mirror_area"], u.m**2)
    if named is not None:
        optics_name, camera_name = named
        size = type_from_mirror_area(mirror_area)
    else:
        try:
            guess = guess_telescope(n_pixels, focal_length, settings["n_mirrors"])
        except ValueError:
            guess = unknown_telescope(mirror_area, n_pixels)
        optics_name, camera_name, size = guess.name, guess.camera_name, guess.type
    try:
        shape, rotation = CameraGeometry.simtel_shape_to_type(settings["pixel_shape"][0])
    except ValueError:  # prod2 files omit the shape; like ctapipe, assume hexagons
        shape, rotation = "hexagon", Angle("0d")
    geometry = CameraGeometry(
        camera_name,
        pix_id=np.arange(n_pixels),
        pix_x=u.Quantity(settings["pixel_x"], u.m),
        pix_y=u.Quantity(settings["pixel_y"], u.m),
        pix_area=u.Quantity(settings["pixel_area"], u.m**2),
        pix_type=shape,
        pix_rotation=rotation,
        cam_rotation=-Angle(settings["cam_rot"], u.rad),
        apply_derotation=True,
        frame=CameraFrame(focal_length=focal_length),
    )
    pixel_x = np.array(settings["pixel_x"], np.float64)
    pixel_y = np.array(settings["pixel_y"], np.float64)
    time_slice = float(np.asarray(pixels["time_slice"], np.float64))
    digest = hashlib.sha256(pixel_x.tobytes() + pixel_y.tobytes())
    digest.update(
        repr((camera_name, optics_name, float(settings["focal_length"]), time_slice)).encode()
    )
    return Camera(
        name=camera_name,
        optics=optics_name,
        telescope_type=_telescope_type(str(getattr(size, "value", size)), camera_name, n_pixels),
        n_pixels=n_pixels,
        n_channels=int(organization["n_gains"]),
        n_samples=int(pixels["sum_bins"]),
        pixel_x=pixel_x,
        pixel_y=pixel_y,
        geometry=geometry,
        sampling_rate_ghz=float(u.Quantity(1.0 / np.float64(time_slice), u.GHz).to_value(u.GHz)),
        reference_pulse=np.asarray(pixels["ref_shape"], np.float64),
        reference_step_ns=float(pixels["ref_step"]),
        focal_length_m=float(settings["focal_length"]),
        effective_focal_length_m=float(settings.get("effective_focal_length", np.nan)),
        mirror_area_m2=float(settings["mirror_area"]),
        fingerprint=digest.hexdigest()[:16],
    )


def _telescope_type(size: str, camera_name: str, n_pixels: int) -> str:
    """Type by ctapipe's size: LST, MST or SST; the dual-mirror MST is SCT, as historically."""
    is_sct = camera_name.upper().startswith("SCT") or n_pixels == 11328
    return "SCT" if size == "MST" and is_sct else size


def select_telescopes(telescopes: dict[int, Telescope], type_mode: str) -> list[Telescope]:
    """Select the telescopes that `type_mode` names, item by item, each in the order of the file.

    Parameters
    ----------
    type_mode : str
        Items joined by "+", each a type (SST, SCT, LST, MST, ALL), a camera or optics name
        (NectarCam, CHEC, 1M), a telescope id or a range of ids ("7", "5-12").

    Raises
    ------
    DataError
        If an item names no telescope of the array.
    """
    chosen: dict[int, Telescope] = {}
    for item in (part.strip() for part in type_mode.split("+")):
        names = [name.upper() for name in (TYPES if item.upper() == "ALL" else (item,))]
        found = []
        ids = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
        if ids:
            first, last = int(ids[1]), int(ids[2] or ids[1])
            found = [t for t in telescopes.values() if first <= t.tel_id <= last]
        for name in names:
            found += [t for t in telescopes.values() if t.camera.telescope_type == name]
            if name not in TYPES:
                found += [
                    t
                    for t in telescopes.values()
                    if name in (t.camera.name.upper(), t.camera.optics.upper())
                ]
        if item.upper() == "ALL":
            found += list(telescopes.values())
        if not found:
            raise DataError(
                f"no telescope {item!r} in the array ({describe_types(telescopes)}). "
                "Change [telescope] type_mode."
            )
        chosen |= {t.tel_id: t for t in found if t.tel_id not in chosen}
    return list(chosen.values())


def describe_types(telescopes: dict[int, Telescope]) -> str:
    """Count telescopes by type and camera: "4 LST LSTCam, 15 MST FlashCam"."""
    counts: dict[str, int] = {}
    for telescope in telescopes.values():
        name = f"{telescope.camera.telescope_type} {telescope.camera.name}"
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{n} {name}" for name, n in counts.items())
