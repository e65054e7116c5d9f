"""The array that a simtel file describes: telescopes, optics, cameras; and selecting from it.

Telescopes are identified by what the file says of them (names in its metadata, else ctapipe's table
of optics and cameras), never by the number of pixels alone: LSTCam and NectarCam both have 1855. In
recent productions each telescope has a camera name of its own (MSTN-01). Cameras with equal pixels
and optics are one type all the same, known by the name that ctapipe's table has for it.
Identical cameras are built once, so that an array of 126 telescopes opens in a tenth of a second.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import astropy.units as u
import numpy as np
from astropy.coordinates import Angle
from ctapipe.coordinates import CameraFrame
from ctapipe.instrument import CameraGeometry
from ctapipe.instrument.guess import guess_telescope, type_from_mirror_area, unknown_telescope

from .errors import DataError
from .settings import selections
from .simtel import SimtelFile

# Telescope types that `type_mode` may name; ALL takes them in this order.
TYPES = ("SST", "SCT", "LST", "MST")


@dataclass(frozen=True, eq=False)
class Camera:
    """One type of camera with its optics, as the file describes it.

    Attributes
    ----------
    name : str
        In the file.
    kind : str
        Name in ctapipe's table, by pixel number, focal length and mirrors; else `name`.
    pixel_x, pixel_y : (n_pixels,) array, m
        As in the file, before ctapipe's derotation.
    rotation_deg : float
        Angle by which these positions must be turned counter-clockwise to be in the camera frame.
    fingerprint : str
        Equal for cameras with equal pixels (to 0.01 mm), rotation, sampling and optics.
    geometry : ctapipe CameraGeometry
        Derotated. Its neighbours are those used in ctapipe's calibration.
    reference_pulse : (n_channels, n) array
        Single photo-electron pulse shape, sampled every `reference_step_ns`.
    """

    name: str
    kind: str
    optics: str
    telescope_type: str
    n_pixels: int
    n_channels: int
    n_samples: int
    pixel_x: np.ndarray
    pixel_y: np.ndarray
    rotation_deg: float
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
    geometries: dict[str, CameraGeometry] = {}
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
            cameras[key] = _camera(parts, named, geometries)
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


def _camera(
    parts: dict[str, Any], named: tuple[str, str] | None, geometries: dict[str, CameraGeometry]
) -> Camera:
    """Describe a camera; equal cameras share one geometry in `geometries`, by fingerprint."""
    settings, pixels = parts["camera_settings"], parts["pixel_settings"]
    organization = parts["camera_organization"]
    n_pixels = int(settings["n_pixels"])
    focal_length = u.Quantity(settings["focal_length"], u.m)
    mirror_area = u.Quantity(settings["mirror_area"], u.m**2)
    try:
        guess = guess_telescope(n_pixels, focal_length, settings["n_mirrors"])
    except ValueError:
        guess = None
    if named is not None:
        optics_name, camera_name = named
        size = type_from_mirror_area(mirror_area)
    else:
        assumed = guess or unknown_telescope(mirror_area, n_pixels)
        optics_name, camera_name, size = assumed.name, assumed.camera_name, assumed.type
    kind = guess.camera_name if guess else camera_name
    pixel_x = np.array(settings["pixel_x"], np.float64)
    pixel_y = np.array(settings["pixel_y"], np.float64)
    time_slice = float(np.asarray(pixels["time_slice"], np.float64))
    rotation_deg = float(np.degrees(settings["cam_rot"]))
    optics = (
        focal_length.value,
        mirror_area.value,
        settings["n_mirrors"],
        rotation_deg,
        time_slice,
    )
    rounded = np.round([pixel_x, pixel_y], 5) + 0.0  # -0 becomes 0
    digest = hashlib.sha256(rounded.tobytes())
    digest.update(repr((kind, [round(float(v), 3) for v in optics])).encode())
    fingerprint = digest.hexdigest()[:16]
    if fingerprint not in geometries:
        geometries[fingerprint] = _geometry(settings, kind, focal_length)
    return Camera(
        name=camera_name,
        kind=kind,
        optics=optics_name,
        telescope_type=_telescope_type(str(getattr(size, "value", size)), kind, n_pixels),
        n_pixels=n_pixels,
        n_channels=int(organization["n_gains"]),
        n_samples=int(pixels["sum_bins"]),
        pixel_x=pixel_x,
        pixel_y=pixel_y,
        rotation_deg=rotation_deg,
        geometry=geometries[fingerprint],
        sampling_rate_ghz=float(u.Quantity(1.0 / np.float64(time_slice), u.GHz).to_value(u.GHz)),
        reference_pulse=np.asarray(pixels["ref_shape"], np.float64),
        reference_step_ns=float(pixels["ref_step"]),
        focal_length_m=float(settings["focal_length"]),
        effective_focal_length_m=float(settings.get("effective_focal_length", np.nan)),
        mirror_area_m2=float(settings["mirror_area"]),
        fingerprint=fingerprint,
    )


def _geometry(settings: dict[str, Any], name: str, focal_length: u.Quantity) -> CameraGeometry:
    try:
        shape, rotation = CameraGeometry.simtel_shape_to_type(settings["pixel_shape"][0])
    except ValueError:  # prod2 files omit the shape; like ctapipe, assume hexagons
        shape, rotation = "hexagon", Angle("0d")
    return CameraGeometry(
        name,
        pix_id=np.arange(int(settings["n_pixels"])),
        pix_x=u.Quantity(settings["pixel_x"], u.m),
        pix_y=u.Quantity(settings["pixel_y"], u.m),
        pix_area=u.Quantity(settings["pixel_area"], u.m**2),
        pix_type=shape,
        pix_rotation=rotation,
        cam_rotation=-Angle(settings["cam_rot"], u.rad),
        apply_derotation=True,
        frame=CameraFrame(focal_length=focal_length),
    )


def _telescope_type(size: str, camera_name: str, n_pixels: int) -> str:
    """Type by ctapipe's size: LST, MST or SST; the dual-mirror MST is SCT, as historically."""
    is_sct = camera_name.upper().startswith("SCT") or n_pixels == 11328
    return "SCT" if size == "MST" and is_sct else size


def is_named(telescope: Telescope, item: str) -> bool:
    """Whether `item` names a telescope, see `select_telescopes`; upper and lower case are equal."""
    ids = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
    if ids:
        return int(ids[1]) <= telescope.tel_id <= int(ids[2] or ids[1])
    camera, item = telescope.camera, item.upper()
    names = [camera.telescope_type]
    if item not in TYPES:
        names += [camera.name, camera.kind, camera.optics]
    return item == "ALL" or any(fnmatchcase(name.upper(), item) for name in names)


def with_types(telescopes: dict[int, Telescope], types: str) -> dict[int, Telescope]:
    """Give telescopes the types that [telescope] types states; the first item that fits decides.

    Raises
    ------
    DataError
        If an item names no telescope of the array.
    """
    changed = dict(telescopes)
    for item, kind in reversed(selections(types)):
        found = [t for t in telescopes.values() if is_named(t, item)]
        if not found:
            raise _not_there(item, telescopes, "types")
        for t in found:
            changed[t.tel_id] = replace(t, camera=replace(t.camera, telescope_type=kind))
    return changed


def mapping_method(telescope: Telescope, mapping: str) -> str:
    """Return the method that [image] mapping states for a telescope: the first item that names it,
    else the one without telescopes, else auto.
    """
    items = selections(mapping)
    own = [method for item, method in items if item and is_named(telescope, item)]
    return [*own, *(method for item, method in items if not item), "auto"][0]


def select_telescopes(telescopes: dict[int, Telescope], type_mode: str) -> list[Telescope]:
    """Select the telescopes that `type_mode` names, item by item, each in the order of the file.

    Parameters
    ----------
    type_mode : str
        Items joined by "+", each a type (SST, SCT, LST, MST, ALL), a camera or optics name
        (NectarCam, CHEC, 1M; that of the file, or the usual one of this geometry), a pattern of
        these names ("MSTN-*"), a telescope id or a range of ids ("7", "5-12").

    Raises
    ------
    DataError
        If an item names no telescope of the array.
    """
    chosen: dict[int, Telescope] = {}
    for item in (part.strip() for part in type_mode.split("+")):
        found = [t for t in telescopes.values() if is_named(t, item)]
        if not found:
            raise _not_there(item, telescopes, "type_mode")
        if item.upper() == "ALL":  # the types in their order, then others
            kinds = [*TYPES, *(t.camera.telescope_type for t in found)]
            found.sort(key=lambda t: kinds.index(t.camera.telescope_type))
        chosen |= {t.tel_id: t for t in found if t.tel_id not in chosen}
    return list(chosen.values())


def _not_there(item: str, telescopes: dict[int, Telescope], key: str) -> DataError:
    return DataError(
        f"no telescope {item!r} in the array ({describe_types(telescopes)}). "
        f"Change [telescope] {key}."
    )


def describe_types(telescopes: dict[int, Telescope]) -> str:
    """Count telescopes by type and camera: "4 LST LSTCam, 15 MST NectarCam (MSTN-01, ...)"."""
    names: dict[str, list[str]] = {}
    for telescope in telescopes.values():
        camera = telescope.camera
        names.setdefault(f"{camera.telescope_type} {camera.kind}", []).append(camera.name)
    found = []
    for kind, listed in names.items():
        own = [name for name in dict.fromkeys(listed) if name != kind.partition(" ")[2]]
        shown = ", ".join(own[:3]) + (", ..." if len(own) > 3 else "")
        found.append(f"{len(listed)} {kind}{f' ({shown})' if own else ''}")
    return ", ".join(found)
