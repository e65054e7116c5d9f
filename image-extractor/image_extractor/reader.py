"""Read data sets for training: one or many files, image by image or event by event.

Reads   HDF5 files written by image_extractor.py, with numpy and PyTables alone.
Writes  nothing.

    from image_extractor.reader import Events, Images
    images = Images("dataset.h5", part="Training", telescopes="LST")
    sample = images[0]  # {"image": (channel, x, y), "particle": 0 or 1, "log_energy": ...}

Both classes are sequences, as PyTorch's DataLoader expects (see torch_reader.py). Only labels and
row numbers, about 100 bytes per event and 16 per image, are held in memory; each image is read when
it is asked for. A pickled object, e.g. in a worker process, opens the files again.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import tables

from . import layout
from .errors import DataError

GAMMA_ID = 0
LABELS = ("primary_id", "mc_energy", "az", "alt", "core_x", "core_y", "h_first_int")
EVENT_DTYPE = np.dtype(
    [
        ("file", "u2"),
        ("table", "u2"),
        ("row", "u4"),
        ("run_number", "u4"),
        ("event_number", "u4"),
        ("shower", "u8"),
        ("pointing", "f4", (2,)),
        *((name, "i4" if name == "primary_id" else "f8") for name in LABELS),
    ]
)
IMAGE_DTYPE = np.dtype([("event", "u4"), ("slot", "u2"), ("row", "u4")])
Sample = dict[str, Any]


class _Reader:
    """What Images and Events share: the files, the list of events and of their images.

    Attributes
    ----------
    events : (n_events,) array of EVENT_DTYPE
        Labels of the events that have an image of a selected telescope.
    channels : tuple of str
        "charge" (photo-electrons) and, if stored, "time" (samples).
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        part: str | None = None,
        telescopes: str | None = None,
        transform: Callable[[Sample], Sample] | None = None,
    ) -> None:
        self.paths = [Path(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]
        self.transform = transform
        self._open: dict[int, tables.File] = {}
        weakref.finalize(self, _close, self._open)  # also at exit, before PyTables warns
        self._nodes: dict[tuple[int, int, int], tuple[tables.Leaf, str]] = {}
        self._tables: list[list[str]] = []  # of each file
        self._telescopes: list[np.ndarray] = []
        self._attrs: list[dict[str, Any]] = []
        events, images = [np.zeros(0, EVENT_DTYPE)], [np.zeros(0, IMAGE_DTYPE)]
        for number, path in enumerate(self.paths):
            with layout.open_layout(path) as h5:
                self._add_file(h5, number, part, telescopes, events, images)
        self.events, self._images = np.concatenate(events), np.concatenate(images)
        channels = {str(a["channels"]) for a in self._attrs}
        if len(channels) != 1:
            raise DataError(
                f"{', '.join(map(str, self.paths))}: have the channels {' and '.join(channels)} "
                "(expected the same in all files). Extract them with one configuration."
            )
        self.channels = tuple(name for name in json.loads(channels.pop()) if name != "zero")
        labels = self.events
        self._log_energy = np.log10(labels["mc_energy"]).astype(np.float32)
        self._direction = offset_deg(labels["az"], labels["alt"], *labels["pointing"].T)
        self._core = np.stack([labels["core_x"], labels["core_y"]], -1).astype(np.float32)
        self._particle = (labels["primary_id"] == GAMMA_ID).astype(np.int64)

    def _add_file(
        self,
        h5: tables.File,
        number: int,
        part: str | None,
        telescopes: str | None,
        events: list[np.ndarray],
        images: list[np.ndarray],
    ) -> None:
        attrs = layout.check_schema(h5)
        names, index = json.loads(str(attrs["parts"])), layout.index_table(h5)
        runs, tels = layout.runs_table(h5), layout.tel_table(h5)
        if part is not None and layout.part_name(part) not in names:
            raise DataError(
                f"{h5.filename}: has no part {part!r} (expected one of {', '.join(names)}). "
                "Split it with --split, or leave `part` out."
            )
        slots = np.flatnonzero([_is_named(t, telescopes) for t in tels])
        if not slots.size:
            kinds = sorted({f"{t['tel_type'].decode()} {t['name'].decode()}" for t in tels})
            raise DataError(
                f"{h5.filename}: has no telescope {telescopes!r} (expected one of "
                f"{', '.join(kinds)}). Change `telescopes`."
            )
        self._tables.append([])
        self._telescopes.append(tels)
        self._attrs.append(attrs)
        for table in layout.event_tables(h5):
            if part is not None and table.name != layout.part_name(part):
                continue
            entries = index[
                (index["group"] == layout.group_number(table))
                & (index["part"] == names.index(table.name))
            ]
            found = np.zeros(len(entries), EVENT_DTYPE)
            found["file"], found["table"] = number, len(self._tables[-1])
            found["row"] = np.arange(len(entries))
            found["pointing"] = runs["direction"][entries["source"]]
            for name in ("run_number", "event_number", "shower"):
                found[name] = entries[name]
            rows_of = np.full((len(entries), len(tels)), -1, np.int64)
            step = max(1, layout.BATCH_BYTES // 4 // table.rowsize)
            for start in range(0, len(entries), step):
                rows = table.read(start, start + step)
                here = slice(start, start + len(rows))
                for name in LABELS:
                    found[name][here] = rows[name]
                if "tel_map" in table.colnames:
                    rows_of[here] = rows["tel_map"]
                else:
                    rows_of[here] = np.where(rows["trig_list"], 0, -1)
            event, slot = np.nonzero(rows_of[:, slots] >= 0)
            kept, event = np.unique(event, return_inverse=True)
            own = np.zeros(event.size, IMAGE_DTYPE)
            own["event"] = event + sum(map(len, events))
            own["slot"] = slots[slot]
            own["row"] = rows_of[kept[event], slots[slot]]
            self._tables[-1].append(table._v_pathname)
            events.append(found[kept])
            images.append(own)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_nodes": {}}

    def close(self) -> None:
        """Close the files; reading opens them again."""
        _close(self._open)
        self._nodes.clear()

    def _node(self, file: int, table: int, slot: int) -> tuple[tables.Leaf, str]:
        """Node that has the images of a telescope, and their column in it, if any."""
        key = (file, table, slot)
        if key not in self._nodes:
            path = self._tables[file][table]
            name = f"T{self._telescopes[file]['tel_id'][slot]}"
            is_mapped = self._attrs[file]["storage_mode"] == "mapped"
            if file not in self._open:
                # A chunk is an image: nothing to keep, and HDF5 would keep 16 MB of each telescope.
                cache = {"chunk_cache_size": 0} if is_mapped else {}
                self._open[file] = layout.open_layout(self.paths[file], **cache)
            if is_mapped:
                path, name = f"{path.rpartition('/')[0]}/{name}", ""
            self._nodes[key] = self._open[file].get_node(path), name
        return self._nodes[key]

    def _image(self, image: np.void) -> np.ndarray:
        """Read one image: (channel, x, y), or (channel, pixel), float32."""
        event = self.events[image["event"]]
        file, attrs = int(event["file"]), self._attrs[event["file"]]
        try:
            node, column = self._node(file, int(event["table"]), int(image["slot"]))
            stored = node[int(event["row"])][column] if column else node[int(image["row"])]
        except (tables.HDF5ExtError, tables.NodeError, IndexError) as error:
            raise DataError(
                f"{self.paths[file]}: damaged: an image of event {event['event_number']} cannot be "
                "read (expected one per telescope in tel_map). Extract the data again."
            ) from error
        if attrs["dim_order"] != "channels_first":
            stored = stored.transpose(-1, *range(stored.ndim - 1))
        read = stored[: len(self.channels)].astype(np.float32, order="C")  # zeros come last
        for channel, name in zip(read, ("charge_unit_pe", "time_unit_samples"), strict=False):
            channel *= np.float32(attrs[name])
        return read

    def _labels(self, number: int) -> Sample:
        return {
            "particle": int(self._particle[number]),
            "log_energy": self._log_energy[number],
            "direction": self._direction[number],
            "core": self._core[number],
            "pointing": self.events["pointing"][number],
        }

    def _finished(self, sample: Sample) -> Sample:
        return sample if self.transform is None else self.transform(sample)

    def _positions(self, images: np.ndarray) -> np.ndarray:
        """Positions (n, 3) of the telescopes of images, m."""
        columns, files = ("tel_x", "tel_y", "tel_z"), self.events["file"][images["event"]]
        positions = np.zeros((len(images), 3))
        for file in np.unique(files):
            of_file = files == file
            telescopes = self._telescopes[file][images["slot"][of_file]]
            positions[of_file] = np.stack([telescopes[name] for name in columns], -1)
        return positions


class Images(_Reader):
    """The images of a data set, one by one.

    Parameters
    ----------
    paths : path or list of paths
    part : str, optional
        Part of a split file, e.g. "Training"; by default all events.
    telescopes : str, optional
        A type or camera name, or a pattern of these (LST, MSTN-*). By default all telescopes, which
        must have images of one shape.
    transform : callable, optional
        Sample -> sample.

    Raises
    ------
    DataError
        If a file has no such part or telescope, or the files have images of several shapes.

    Notes
    -----
    A sample has `image` (channel, x, y) float32, in photo-electrons and samples; `particle`, 1 for
    gammas, else 0; `log_energy`, log10 of the true energy in TeV; `direction` (2,), see
    `offset_deg`; `core` (2,), m; `pointing` (azimuth, altitude), rad; `impact`, distance of the
    telescope from the shower axis, m; `tel_id`; and `event`, its number in `events`.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        part: str | None = None,
        telescopes: str | None = None,
        transform: Callable[[Sample], Sample] | None = None,
    ) -> None:
        super().__init__(paths, part, telescopes, transform)
        shapes = set()
        for file in np.unique(self.events["file"]):
            of_file = self.events["file"][self._images["event"]] == file
            for slot in np.unique(self._images["slot"][of_file]):
                chosen = np.flatnonzero(of_file & (self._images["slot"] == slot))[0]
                shapes.add(self._image(self._images[chosen]).shape)
        if len(shapes) > 1:
            raise DataError(
                f"the telescopes have images of the shapes {', '.join(map(str, sorted(shapes)))} "
                "(expected one). Select a type by `telescopes`."
            )
        events = self.events[self._images["event"]]
        core = np.stack([events["core_x"], events["core_y"], np.zeros(len(events))], -1)
        away = np.cross(
            self._positions(self._images) - core, unit_vector(events["az"], events["alt"])
        )
        self._impact = np.linalg.norm(away, axis=-1).astype(np.float32)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, number: int) -> Sample:
        image = self._images[number]
        event = int(image["event"])
        sample = {
            "image": self._image(image),
            **self._labels(event),
            "impact": self._impact[number],
            "tel_id": int(self._telescopes[self.events["file"][event]]["tel_id"][image["slot"]]),
            "event": event,
        }
        return self._finished(sample)

    def events_of_images(self) -> np.ndarray:
        """Return the number in `events` of every image, (n_images,) int64."""
        return self._images["event"].astype(np.int64)

    def particles(self) -> np.ndarray:
        """Return `particle` of every image, (n_images,) int64, without reading images."""
        return self._particle[self.events_of_images()]


class Events(_Reader):
    """The events of a data set, each with the images of all its selected telescopes.

    Parameters and errors are those of `Images`, except that shapes may differ.

    Notes
    -----
    A sample has `images`, a list of (channel, x, y) arrays in the order of Tel_Table; `tel_ids`;
    `positions` (n_images, 3), of the telescopes, m; `event`; and the labels of an image except
    `impact`.
    """

    def __len__(self) -> int:
        return len(self.events)

    def __getitem__(self, number: int) -> Sample:
        number = range(len(self))[number]
        first, last = np.searchsorted(self._images["event"], [number, number + 1])
        images = self._images[first:last]
        telescopes = self._telescopes[self.events["file"][number]]
        sample = {
            "images": [self._image(image) for image in images],
            "tel_ids": telescopes["tel_id"][images["slot"]].tolist(),
            "positions": self._positions(images).astype(np.float32),
            **self._labels(number),
            "event": number,
        }
        return self._finished(sample)

    def particles(self) -> np.ndarray:
        """Return `particle` of every event, (n_events,) int64, without reading images."""
        return self._particle


def _close(files: dict[int, tables.File]) -> None:
    while files:
        files.popitem()[1].close()


def _is_named(telescope: np.void, item: str | None) -> bool:
    names = [telescope[n].decode() for n in ("tel_type", "name", "optics", "camera")]
    names[3] = names[3].rpartition("_")[0]  # without the digits of its geometry
    return item is None or any(fnmatchcase(n.upper(), item.upper()) for n in names)


def unit_vector(az: Any, alt: Any) -> np.ndarray:
    """Direction (..., 3) in the ground frame (x north, y west, z up); azimuth N to E, rad."""
    vector = [np.cos(alt) * np.cos(az), -np.cos(alt) * np.sin(az), np.sin(alt)]
    return np.stack(vector, -1)


def offset_deg(az: Any, alt: Any, pointing_az: Any, pointing_alt: Any) -> np.ndarray:
    """Direction relative to the pointing, in the plane tangent to it.

    Parameters
    ----------
    az, alt, pointing_az, pointing_alt : float or (n,) array, rad

    Returns
    -------
    (..., 2) float32 array, deg
        Towards larger altitude and larger azimuth (gnomonic projection, as in a camera).
    """
    v, forward = unit_vector(az, alt), unit_vector(pointing_az, pointing_alt)
    up = unit_vector(pointing_az, pointing_alt + np.pi / 2)
    side = unit_vector(pointing_az + np.pi / 2, np.zeros_like(pointing_alt))
    along = np.stack([(v * axis).sum(-1) for axis in (up, side)], -1)
    return np.degrees(along / (v * forward).sum(-1)[..., np.newaxis]).astype(np.float32)
