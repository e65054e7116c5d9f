"""Read a data set as ctapipe reads a simtel file: an EventSource with DL1 images and true values.

Reads   HDF5 files written by image_extractor.py whose images have one cell per pixel (mapping
        square, axial or none).
Writes  nothing.

    from image_extractor.ctapipe_source import DatasetSource
    for event in DatasetSource("dataset.h5"):
        print(event.index.event_id, event.dl1.tel.keys())

Thus the algorithms of ctapipe work on data sets: ImageProcessor, ShowerProcessor, DataWriter. The
charges are those stored: rounded to 0.01 photo-electrons and not negative, unless the type is
float32. What a data set does not have (pulse shapes, mirrors, times of events) is NaN, 0 or EPOCH.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import astropy.units as u
import numpy as np
from astropy.coordinates import EarthLocation
from astropy.time import Time
from ctapipe.containers import (
    ArrayEventContainer,
    CoordinateFrameType,
    DL1CameraContainer,
    EventIndexContainer,
    EventType,
    ObservationBlockContainer,
    ObservationBlockState,
    ObservingMode,
    PointingMode,
    SchedulingBlockContainer,
    SchedulingBlockType,
    SimulatedCameraContainer,
    SimulatedEventContainer,
    SimulatedShowerContainer,
    SimulationConfigContainer,
    TelescopeImpactParameterContainer,
    TelescopePointingContainer,
    TelescopeTriggerContainer,
    TriggerContainer,
)
from ctapipe.coordinates import CameraFrame, shower_impact_distance
from ctapipe.instrument import (
    CameraDescription,
    CameraGeometry,
    CameraReadout,
    OpticsDescription,
    ReflectorShape,
    SizeType,
    SubarrayDescription,
    TelescopeDescription,
)
from ctapipe.io import DataLevel, EventSource
from traitlets import Unicode

from . import layout
from .errors import DataError
from .reader import Events

EPOCH = Time("2000-01-01T00:00:00", scale="tai")
SIZES = {"SCT": SizeType.MST, **{s.value: s for s in SizeType}}


class DatasetSource(EventSource):
    """The events of a data set, in its order.

    Parameters
    ----------
    input_url : str or Path
    part : str, optional
        Part of a split file, e.g. "Training"; by default all events.
    max_events, allowed_tels
        As in every EventSource.

    Raises
    ------
    DataError
        If pixels share cells, or different events have equal run and event numbers, by which
        ctapipe's tables tell events apart.
    """

    part = Unicode(None, allow_none=True, help="part of a split file").tag(config=True)

    def __init__(self, input_url: Any = None, config: Any = None, parent: Any = None, **kw: Any):
        super().__init__(input_url=input_url, config=config, parent=parent, **kw)
        path = Path(self.input_url)
        self.data = Events(path, self.part)
        with layout.open_layout(path) as h5:
            self._attrs, self._runs = layout.check_schema(h5), layout.runs_table(h5)
            self._telescopes = layout.tel_table(h5)
            keys = {row["camera"].decode() for row in self._telescopes}
            cameras = {key: layout.camera_pixels(h5, key) for key in keys}
        self._cameras = {key: (pixels, attrs) for key, (pixels, _, attrs) in cameras.items()}
        self._cells = {key: _cells(path, *camera) for key, camera in cameras.items()}
        numbers = self.data.events[["run_number", "event_number"]]
        values, counts = np.unique(numbers, return_counts=True)
        if (counts > 1).any():
            run, event = values[counts > 1][0].tolist()
            raise DataError(
                f"{path}: different events have the numbers run {run} event {event} (expected one, "
                "because ctapipe knows events by these numbers). Extract each production to a "
                "file of its own."
            )

    @staticmethod
    def is_compatible(file_path: Any) -> bool:
        try:
            layout.open_layout(file_path).close()
        except DataError:
            return False
        return True

    def close(self) -> None:
        self.data.close()

    def __exit__(self, *_: Any) -> None:
        self.close()

    @property
    def is_simulation(self) -> bool:
        return True

    @property
    def datalevels(self) -> tuple[DataLevel, ...]:
        return (DataLevel.DL1_IMAGES,)

    @cached_property
    def _whole_subarray(self) -> SubarrayDescription:
        positions, descriptions = {}, {}
        for row in self._telescopes:
            tel_id, key = int(row["tel_id"]), row["camera"].decode()
            positions[tel_id] = np.array([row["tel_x"], row["tel_y"], row["tel_z"]]) * u.m
            descriptions[tel_id] = _description(row, *self._cameras[key])
        location = EarthLocation.from_geodetic(0 * u.deg, 0 * u.deg)  # not in a data set
        return SubarrayDescription("data set", positions, descriptions, location)

    @cached_property
    def _subarray(self) -> SubarrayDescription:
        whole = self._whole_subarray
        return whole.select_subarray(self.allowed_tels) if self.allowed_tels else whole

    @property
    def subarray(self) -> SubarrayDescription:
        return self._subarray

    @property
    def observation_blocks(self) -> dict[int, ObservationBlockContainer]:
        return {
            number: ObservationBlockContainer(
                obs_id=np.uint64(number),
                sb_id=np.uint64(number),
                producer_id="simulation",
                state=ObservationBlockState.COMPLETED_SUCCEDED,
                subarray_pointing_lon=run["direction"][0] * u.rad,
                subarray_pointing_lat=run["direction"][1] * u.rad,
                subarray_pointing_frame=CoordinateFrameType.ALTAZ,
                actual_start_time=EPOCH,
                scheduled_start_time=EPOCH,
            )
            for number, run in self._by_number().items()
        }

    @property
    def scheduling_blocks(self) -> dict[int, SchedulingBlockContainer]:
        return {
            number: SchedulingBlockContainer(
                sb_id=np.uint64(number),
                sb_type=SchedulingBlockType.OBSERVATION,
                producer_id="simulation",
                observing_mode=ObservingMode.UNKNOWN,
                pointing_mode=PointingMode.DRIFT,
            )
            for number in self._by_number()
        }

    @property
    def simulation_config(self) -> dict[int, SimulationConfigContainer]:
        return {
            number: SimulationConfigContainer(
                run_number=number,
                energy_range_min=run["energy_range"][0] * u.TeV,
                energy_range_max=run["energy_range"][1] * u.TeV,
                spectral_index=float(run["spectral_index"]),
                n_showers=int(run["n_showers"]),
                shower_reuse=int(run["shower_reuse"]),
                diffuse=bool(run["diffuse"]),
                min_viewcone_radius=run["viewcone"][0] * u.deg,
                max_viewcone_radius=run["viewcone"][1] * u.deg,
                min_scatter_range=run["core_range"][0] * u.m,
                max_scatter_range=run["core_range"][1] * u.m,
                atmosphere=int(run["atmosphere"]),
                min_az=run["direction"][0] * u.rad,
                max_az=run["direction"][0] * u.rad,
                min_alt=run["direction"][1] * u.rad,
                max_alt=run["direction"][1] * u.rad,
            )
            for number, run in self._by_number().items()
        }

    def _by_number(self) -> dict[int, np.void]:
        """Rows of Runs, one per run number."""
        return {int(run["run_number"]): run for run in reversed(self._runs)}

    def _generator(self) -> Iterator[ArrayEventContainer]:
        scale = int(self._attrs["scale_factor"])
        keys = {int(t["tel_id"]): t["camera"].decode() for t in self._telescopes}
        count = 0
        for number, event in enumerate(self.data.events):
            sample, images = self.data[number], {}
            for tel_id, image in zip(sample["tel_ids"], sample["images"], strict=True):
                if tel_id not in self.subarray.tel:
                    continue
                small = image[:, ::scale, ::scale] if image.ndim == 3 else image
                in_pixels = small.reshape(len(image), -1)[:, self._cells[keys[tel_id]]]
                values = dict(zip(self.data.channels, in_pixels, strict=True))
                rate = float(self._cameras[keys[tel_id]][1]["sampling_rate_ghz"])
                unknown = np.full(in_pixels.shape[1], np.nan, np.float32)
                time = values["time"] / np.float32(rate) if "time" in values else unknown
                images[tel_id] = (values["charge"], time)
            if images:
                yield self._event(event, images, count)
                count += 1

    def _event(
        self, event: np.void, images: dict[int, tuple[np.ndarray, np.ndarray]], count: int
    ) -> ArrayEventContainer:
        shower = SimulatedShowerContainer(
            energy=event["mc_energy"] * u.TeV,
            alt=event["alt"] * u.rad,
            az=event["az"] * u.rad,
            core_x=event["core_x"] * u.m,
            core_y=event["core_y"] * u.m,
            h_first_int=event["h_first_int"] * u.m,
            shower_primary_id=int(event["primary_id"]),
        )
        made = ArrayEventContainer(
            simulation=SimulatedEventContainer(shower=shower),
            index=EventIndexContainer(
                obs_id=int(event["run_number"]), event_id=int(event["event_number"])
            ),
            count=count,
            trigger=TriggerContainer(
                event_type=EventType.SUBARRAY,
                time=EPOCH,
                tels_with_trigger=np.array(list(images), np.int16),
            ),
        )
        azimuth, altitude = event["pointing"].astype(float) * u.rad
        made.monitoring.pointing.array_azimuth = azimuth
        made.monitoring.pointing.array_altitude = altitude
        made.monitoring.pointing.array_ra = made.monitoring.pointing.array_dec = np.nan * u.rad
        distances = shower_impact_distance(shower_geom=shower, subarray=self.subarray)
        for tel_id, (charge, time) in images.items():
            made.trigger.tel[tel_id] = TelescopeTriggerContainer(
                time=EPOCH, n_trigger_pixels=-1, trigger_pixels=None
            )
            made.dl1.tel[tel_id] = DL1CameraContainer(image=charge, peak_time=time, is_valid=True)
            made.simulation.tel[tel_id] = SimulatedCameraContainer(
                impact=TelescopeImpactParameterContainer(
                    distance=distances[self.subarray.tel_index_array[tel_id]],
                    distance_uncert=0 * u.m,
                    prefix="true_impact",
                )
            )
            made.monitoring.tel[tel_id].pointing = TelescopePointingContainer(
                azimuth=azimuth, altitude=altitude
            )
        return made


def _cells(path: Path, pixels: np.ndarray, matrix: np.ndarray, attrs: dict) -> np.ndarray:
    """Cell of each pixel, (n_pixels,). Raises DataError if pixels share cells."""
    cells = np.zeros(len(pixels), np.int64)
    cells[matrix["pixel"]] = matrix["cell"]
    if len(matrix) != len(pixels) or np.unique(cells).size != cells.size:
        raise DataError(
            f"{path}: camera {attrs['name']} was mapped by {attrs['mapping']}, so that its pixels "
            "cannot be had back (expected square, axial or none). Extract the data with mapping "
            "auto."
        )
    return cells


def _description(row: np.void, pixels: np.ndarray, attrs: dict[str, Any]) -> TelescopeDescription:
    equivalent, effective = (
        float(attrs[name]) * u.m for name in ("focal_length_m", "effective_focal_length_m")
    )
    geometry = CameraGeometry(
        attrs["name"],
        pix_id=np.arange(len(pixels)),
        pix_x=pixels["derotated_x"] * u.m,
        pix_y=pixels["derotated_y"] * u.m,
        pix_area=pixels["area"] * u.m**2,
        pix_type=attrs["pixel_type"],
        pix_rotation=float(attrs.get("pixel_rotation_deg", 0.0)) * u.deg,
        frame=CameraFrame(focal_length=equivalent),
    )
    rate, n_samples = float(attrs["sampling_rate_ghz"]), int(attrs["n_samples"])
    readout = CameraReadout(
        attrs["name"],
        sampling_rate=rate * u.GHz,
        reference_pulse_shape=np.zeros((1, 1)),  # NaN would make an array differ from itself
        reference_pulse_sample_width=1 / rate * u.ns,
        n_channels=1,
        n_pixels=len(pixels),
        n_samples=n_samples,
    )
    name = row["optics"].decode()
    optics = OpticsDescription(
        name=name,
        size_type=SIZES.get(row["tel_type"].decode(), SizeType.UNKNOWN),
        n_mirrors=0,
        equivalent_focal_length=equivalent,
        effective_focal_length=effective,
        mirror_area=float(row["mirror_area"]) * u.m**2,
        n_mirror_tiles=0,
        reflector_shape=ReflectorShape.UNKNOWN,
    )
    camera = CameraDescription(attrs["name"], geometry, readout)
    return TelescopeDescription(name, optics, camera)
