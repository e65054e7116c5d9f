"""Extract images from simtel files into an HDF5 data set.

Reads   simtel files, a configuration, optionally a dictionary of bins and cuts.
Writes  one HDF5 file (layout.py), whole or not at all.

    from image_extractor import image_extractor
    with image_extractor.ImageExtractor("dataset.h5", telescope_type="LST") as extractor:
        extractor.process_data("gamma.simtel.gz", 50)

Outside a `with` block every `process_data` is a transaction of its own, so that the file is whole
after each call; inside one, all calls together are.
"""

from __future__ import annotations

import bisect
import contextlib
import logging
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tables
from numba import njit

from . import config, layout
from .calibrate import Calibrator
from .cuts import CutsTable
from .errors import DataError, UsageError
from .instrument import Telescope, describe_array, select_telescopes
from .mapping import Mapping as CameraMapping
from .mapping import camera_mapping
from .rearrangement import rearrange
from .settings import Settings
from .simtel import Corrupt, Event, SimtelFile, guarded
from .transaction import OutputTransaction
from .writer import Writer, verify

log = logging.getLogger(__name__)

GAMMA_ID = 0  # CORSIKA particle id as simtel files carry it; proton 101
DEFAULT_FRACTIONS = {"Training": 0.9, "Validation": 0.1, "Test": 0.0}


@dataclass
class FileReport:
    """What became of one input file.

    `events_read` counts triggered events; `events_passed` those in the dictionary, in an energy
    bin, with an image that passes; `events_written` those of them that were not in the output
    before.
    """

    file: str
    run_number: int = -1
    events_read: int = 0
    not_in_dictionary: int = 0
    no_selected_telescope: int = 0
    other_primary: int = 0
    outside_bins: int = 0
    failed_image_cuts: int = 0
    events_passed: int = 0
    duplicates: int = 0
    events_written: int = 0
    calibration_events: int = 0
    images: dict[str, int] = field(default_factory=dict)
    saturated_pixels: int = 0
    problem: str = ""
    failed: bool = False
    seconds: float = 0.0


@njit(cache=True)
def _quantise(values: np.ndarray, scale: float, low: float, high: float, out: np.ndarray) -> int:
    """Write rint(values * scale), clipped, to `out`; count those above `high`; NaN gives 0."""
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
    """Round values * scale into an integer type without wrapping; count what was too large.

    Parameters
    ----------
    values : (n,) array
        NaN becomes 0.
    lowest : float, optional
        Clip below at this (0 for charges); the type's least value by default.

    Returns
    -------
    (n,) array of dtype, int
        Stored numbers, and how many exceeded the type's largest. float32 is neither rounded nor
        clipped.
    """
    if dtype.kind == "f":
        return (values.astype(np.float64) * scale).astype(dtype), 0
    limits = np.iinfo(dtype)
    low = float(limits.min if lowest is None else lowest)
    out = np.empty(values.shape, dtype)
    return out, _quantise(values, scale, low, float(limits.max), out)


def stored_image(
    charge: np.ndarray, peak_time: np.ndarray, mapping: CameraMapping, settings: Settings
) -> tuple[np.ndarray, int]:
    """One image as the file stores it.

    Parameters
    ----------
    charge : (n_pixels,) array, photo-electrons
    peak_time : (n_pixels,) array, samples

    Returns
    -------
    array
        Shape `layout.image_shape`, configured dtype; charge in 0.01 photo-electrons, time in
        samples.
    int
        Cells whose charge did not fit.
    """
    dtype = np.dtype(settings.dtype)
    lowest = 0.0 if dtype.kind == "u" else None

    def stored(
        values: np.ndarray, kind: str, scale: float, low: float | None
    ) -> tuple[np.ndarray, int]:
        if mapping.cells is not None:  # rounding first touches fewer numbers
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
            channels.append(stored(peak_time, "time", 1.0, lowest)[0])
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


class _ImageCuts:
    """Cuts on a single image, with ctapipe's cleaning and leakage."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.is_open = settings.min_intensity <= 0 and settings.max_leakage >= 1

    def passes(self, charge: np.ndarray, telescope: Telescope) -> bool:
        if self.is_open:
            return True
        from ctapipe.image import leakage_parameters, tailcuts_clean

        settings, geometry = self.settings, telescope.camera.geometry
        mask = tailcuts_clean(
            geometry,
            charge,
            picture_thresh=settings.picture_threshold,
            boundary_thresh=settings.boundary_threshold,
        )
        if not mask.any() or float(charge[mask].sum()) < settings.min_intensity:
            return False
        return (
            float(leakage_parameters(geometry, charge, mask).intensity_width_2)
            <= settings.max_leakage
        )


class _Array:
    """The selected telescopes of a file with what is computed once for them; raises DataError."""

    def __init__(self, simtel: SimtelFile, settings: Settings) -> None:
        cache: dict[str, CameraMapping] = {}
        self.mappings: dict[int, CameraMapping] = {}
        where = str(simtel.path)
        try:
            described = guarded(lambda: describe_array(simtel), "array description")
            self.telescopes = select_telescopes(described, settings.type_mode)
            for telescope in self.telescopes:
                camera = telescope.camera
                where = f"{simtel.path}: camera {camera.name}"
                if camera.fingerprint not in cache:
                    make = partial(camera_mapping, camera.pixel_x, camera.pixel_y, settings.mapping)
                    cache[camera.fingerprint] = guarded(make, "pixel positions")
                self.mappings[telescope.tel_id] = cache[camera.fingerprint]
        except (Corrupt, DataError) as error:
            raise DataError(f"{where}: {error}") from error
        self.by_id = {t.tel_id: t for t in self.telescopes}
        self.kinds = list(dict.fromkeys(t.camera.telescope_type for t in self.telescopes))
        self.calibrators: dict[int, Calibrator] = {}

    def images(
        self, event: Event, simtel: SimtelFile, settings: Settings, cuts: _ImageCuts
    ) -> tuple[dict[int, np.ndarray], int]:
        """Make the stored images that pass the image cuts; count saturated cells in them."""
        images, saturated = {}, 0
        for tel_id, adc in event.telescopes.items():
            telescope = self.by_id[tel_id]
            if tel_id not in self.calibrators:
                self.calibrators[tel_id] = guarded(
                    partial(Calibrator, telescope), f"telescope {tel_id}"
                )
            if tel_id not in simtel.monitoring:
                raise Corrupt(f"telescope {tel_id}: no pedestals or gains before its data")
            charge, peak_time = self.calibrators[tel_id](adc, simtel.monitoring[tel_id])
            if not cuts.passes(charge, telescope):
                continue
            samples = peak_time * np.float32(telescope.camera.sampling_rate_ghz)
            images[tel_id], n = stored_image(charge, samples, self.mappings[tel_id], settings)
            saturated += n
        return images, saturated


class ImageExtractor:
    """Write the images of simtel files to an HDF5 data set.

    Parameters
    ----------
    output_path : str or Path
        Created, or appended to if it exists.
    bins_cuts_dict : dict or CutsTable, optional
        {(run_number, event_number): (bin_index, reconstructed energy in TeV)}; other events are
        skipped before calibration. Without it every event is kept and binned by its true energy.
    mode : str
        "gh_class" or "energy_recon".
    settings : Settings, optional
        As `config.load_config` gives them; the defaults otherwise.
    overwrite : bool
        Replace an existing output instead of appending to it.
    compression : str
        "gzip", "none", "blosc-lz4" or "blosc-zstd".
    shuffle, split, stratify, seed
        See `layout.rearrange`; done when the output is closed. `split` maps part names to
        fractions. `seed` is 0 or more.
    **options
        Fields of Settings, e.g. storage_mode, image_mode, scale_factor, type_mode (or
        telescope_type).

    Raises
    ------
    UsageError
        On settings that do not fit together.
    """

    def __init__(
        self,
        output_path: str | Path,
        bins_cuts_dict: Mapping[Any, Any] | CutsTable | None = None,
        mode: str | None = None,
        *,
        settings: Settings | None = None,
        overwrite: bool = False,
        compression: str = "gzip",
        shuffle: bool = False,
        split: dict[str, float] | None = None,
        stratify: bool = False,
        seed: int = 0,
        command: str = "",
        **options: Any,
    ) -> None:
        if "telescope_type" in options:
            options["type_mode"] = options.pop("telescope_type")
        if mode is not None:
            options["mode"] = mode
        unknown = set(options) - {f.name for f in fields(Settings)}
        if unknown:
            raise UsageError(f"ImageExtractor has no option {', '.join(sorted(unknown))}.")
        self.settings = config.checked(replace(settings or Settings(), **options))
        self.output_path = Path(output_path)
        self.cuts: CutsTable | None = None
        if bins_cuts_dict is not None and self.settings.use_pkl_dict:
            if not isinstance(bins_cuts_dict, CutsTable):
                bins_cuts_dict = CutsTable.from_dict(bins_cuts_dict)
            self.cuts = bins_cuts_dict
            _check_bins(self.cuts, self.settings)
        if compression not in layout.COMPRESSIONS:
            raise UsageError(
                f"compression {compression!r}: choose one of {', '.join(layout.COMPRESSIONS)}."
            )
        if not isinstance(seed, int) or seed < 0:
            raise UsageError(f"seed {seed!r}: must be a whole number, 0 or more.")
        if split and not (
            all(name.isidentifier() and 0 <= part <= 1 for name, part in split.items())
            and math.isclose(sum(split.values()), 1, abs_tol=1e-6)
        ):
            raise UsageError(f"split {split}: needs names and fractions that add up to 1.")
        self.overwrite, self.compression, self.command = overwrite, compression, command
        self.shuffle, self.split, self.stratify, self.seed = shuffle, split, stratify, seed
        self._has_committed = False
        self._per_event: list[int] = []  # of the last file, see _count_images
        self._image_cuts = _ImageCuts(self.settings)
        self._transaction: OutputTransaction | None = None
        self._writer: Writer | None = None
        self._in_block = False
        self._warned_direction = False

    def __enter__(self) -> ImageExtractor:
        self._begin()
        self._in_block = True
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._in_block = False
        self._end(commit=kind is None)

    def process_data(
        self,
        data_file: str | Path,
        max_events: int | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> FileReport:
        """Extract one simtel file.

        Parameters
        ----------
        data_file : str or Path
        max_events : int, optional
            Stop after this many events have passed, whether or not the output had them already.
        progress : callable, optional
            Called with the number of events read since the last call.

        Returns
        -------
        FileReport
            Its `problem` says why, if the file was incomplete.

        Raises
        ------
        DataError
            If nothing could be read from the file, or its array is not the output's. The output is
            as before.
        """
        with contextlib.nullcontext() if self._in_block else self, self._naming_output():
            return self._process(Path(data_file), max_events, progress)

    def process_files(
        self,
        data_files: list[Path],
        max_events: int | None = None,
        jobs: int = 1,
        progress: Callable[[int], Any] | None = None,
        file_done: Callable[[FileReport], Any] | None = None,
    ) -> list[FileReport]:
        """Extract many files in one transaction; unusable files are reported, the others go on.

        With `jobs` above 1, that many processes each extract whole files; the result is the same.
        """
        with self, self._naming_output():
            reports = []
            run = self._one_by_one if jobs <= 1 else self._in_parallel
            for report in run(data_files, max_events, jobs, progress):
                reports.append(report)
                if file_done:
                    file_done(report)
            if self._writer is None:
                raise DataError(
                    f"{self.output_path}: not written, none of the "
                    f"{len(data_files)} files could be used."
                )
        return reports

    @contextlib.contextmanager
    def _naming_output(self) -> Iterator[None]:
        """Turn errors of system and HDF5 into one line; input files' never get here."""
        try:
            yield
        except (OSError, tables.HDF5ExtError) as error:
            reason = (
                getattr(error, "strerror", None)
                or "HDF5 could not write: disk full, or quota reached?"
            )
            raise DataError(f"{self.output_path}: could not be written ({reason}).") from error

    def _one_by_one(
        self,
        files: list[Path],
        max_events: int | None,
        jobs: int,
        progress: Callable[[int], Any] | None,
    ) -> Iterator[FileReport]:
        for path in files:
            try:
                yield self._process(path, max_events, progress)
            except DataError as error:
                yield FileReport(str(path), problem=_without_path(error, path), failed=True)

    def _in_parallel(
        self,
        files: list[Path],
        max_events: int | None,
        jobs: int,
        progress: Callable[[int], Any] | None,
    ) -> Iterator[FileReport]:
        assert self._transaction is not None
        context = multiprocessing.get_context("spawn")
        others = set(multiprocessing.active_children())
        waiting: list[tuple[Path, Path, Future[tuple[FileReport, list[int]]]]] = []
        todo = [(path, self._transaction.part(f"{i:05d}")) for i, path in enumerate(files)]
        arguments = (self.settings, self.cuts, self.compression, self.command)
        with ProcessPoolExecutor(jobs, context, _start_worker, arguments) as pool:
            try:
                while todo or waiting:
                    while todo and len(waiting) < 2 * jobs:  # bounds the parts on the disk
                        path, part = todo.pop(0)
                        waiting.append(
                            (path, part, pool.submit(_extract_part, path, part, max_events))
                        )
                    path, part, future = waiting.pop(0)
                    report, per_event = future.result()
                    if not report.failed:
                        try:
                            self._merge(path, part, report, per_event)
                        except DataError as error:
                            report = FileReport(
                                str(path), problem=_without_path(error, path), failed=True
                            )
                    part.unlink(missing_ok=True)
                    if progress:
                        progress(report.events_read)
                    yield report
            except BrokenProcessPool as error:
                raise DataError(
                    f"{self.output_path}: not written, a worker process was killed "
                    "(out of memory?). Use fewer --jobs."
                ) from error
            except BaseException:
                # Leaving the block waits for the workers, which may have minutes to go.
                pool.shutdown(wait=False, cancel_futures=True)
                for child in set(multiprocessing.active_children()) - others:
                    child.terminate()
                raise

    def _merge(self, path: Path, part: Path, report: FileReport, per_event: list[int]) -> None:
        with SimtelFile(path) as simtel:
            array = _Array(simtel, self.settings)
            self._ensure_writer(simtel, array)
        assert self._writer is not None
        is_new = self._writer.merge(part)
        report.duplicates += int((~is_new).sum())
        report.events_written = int(is_new.sum())
        _count_images(report, array.kinds, per_event, is_new)
        self._say(report)

    def _begin(self) -> None:
        append = not self.overwrite or self._has_committed
        self._transaction = OutputTransaction(self.output_path, append)

    def _end(self, commit: bool) -> None:
        writer, transaction = self._writer, self._transaction
        self._writer = self._transaction = None
        assert transaction is not None
        try:
            if commit and writer is not None and (writer.is_changed or self.shuffle or self.split):
                with self._naming_output():
                    writer.close()
                    if self.shuffle or self.split:
                        rearrange(
                            transaction.path,
                            transaction.part("sorted"),
                            self.seed,
                            self.shuffle,
                            self.split,
                            self.stratify,
                        )
                    try:
                        verify(transaction.path, writer.written)
                    except DataError as error:
                        raise DataError(
                            f"{self.output_path}: could not be written ({error})"
                        ) from error
                    transaction.commit()
                    self._has_committed = True
        finally:
            if writer is not None:
                writer.abandon()
            transaction.close()

    def _ensure_writer(self, simtel: SimtelFile, array: _Array) -> Writer:
        azimuth, altitude = simtel.header["direction"]
        direction = (float(azimuth), float(altitude))
        if self._writer is None:
            assert self._transaction is not None
            attributes = {
                "ctapipe_version": version("ctapipe"),
                "eventio_version": version("eventio"),
                "command": self.command,
                "energy_bin_source": "dictionary" if self.cuts is not None else "mc_energy",
                "cuts_source": self.cuts.source if self.cuts is not None else "",
            }
            try:
                self._writer = Writer(
                    self._transaction.path,
                    self.settings,
                    array.telescopes,
                    array.mappings,
                    self.compression,
                    direction,
                    attributes,
                )
            except DataError as error:
                text = str(error).replace(str(self._transaction.path), str(self.output_path))
                raise DataError(f"{simtel.path}: {text}") from error
            self._direction = direction
        else:
            how = layout.difference(layout.array_identity(array.telescopes), self._writer.identity)
            if how:
                raise DataError(
                    f"{simtel.path}: another array than the output's: {how}. Not mixed in."
                )
        if not np.allclose(direction, self._direction, atol=1e-4) and not self._warned_direction:
            self._warned_direction = True
            log.warning(
                "%s points to another direction than the first file; "
                "Tel_Table has the first, Runs has each.",
                simtel.path.name,
            )
        return self._writer

    def _process(
        self, path: Path, max_events: int | None, progress: Callable[[int], Any] | None
    ) -> FileReport:
        started = time.perf_counter()
        report = FileReport(str(path))
        self._per_event = []
        with SimtelFile(path) as simtel:
            report.run_number = simtel.run_number
            array = _Array(simtel, self.settings)
            writer = self._ensure_writer(simtel, array)
            try:
                self._extract(simtel, array, writer, report, max_events, progress)
            except Corrupt as error:
                simtel.problem = str(error)
            _count_images(report, array.kinds, self._per_event)
            report.events_read = simtel.events_read
            report.calibration_events = simtel.calibration_events
            report.problem = simtel.problem
            report.seconds = time.perf_counter() - started
            writer.add_run(_runs_row(simtel, report))
        self._say(report)
        return report

    def _say(self, report: FileReport) -> None:
        if report.problem:
            log.warning(
                "%s: incomplete: %s. Its %d whole events were read.",
                report.file,
                report.problem,
                report.events_read,
            )
        elif not report.events_read:
            log.warning("%s: no event in it.", report.file)
        assert self._writer is not None
        if report.duplicates:
            log.warning(
                "%s: %d events of run %d are in the output already and were skipped.%s",
                report.file,
                report.duplicates,
                report.run_number,
                " They may come from a damaged file: make the output anew with --overwrite."
                if report.run_number in self._writer.incomplete
                else "",
            )

    def _extract(
        self,
        simtel: SimtelFile,
        array: _Array,
        writer: Writer,
        report: FileReport,
        max_events: int | None,
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Write the events of a file."""
        settings, cuts = self.settings, self.cuts
        edges = settings.bins.edges_tev()
        wanted = None if cuts is None else lambda run, event: cuts.get(run, event) is not None
        told = 0
        for event in simtel.events(array.by_id.keys(), wanted):
            if max_events is not None and report.events_passed >= max_events:
                return
            if progress and simtel.events_read - told >= 10:
                progress(simtel.events_read - told)
                told = simtel.events_read
            entry = None if cuts is None else cuts.get(event.run_number, event.event_id)
            if cuts is not None and entry is None:
                report.not_in_dictionary += 1
                continue
            if not event.telescopes:
                report.no_selected_telescope += 1
                continue
            is_gamma = event.shower["primary_id"] == GAMMA_ID
            if settings.mode == "energy_recon" and settings.gamma_only and not is_gamma:
                report.other_primary += 1
                continue
            if settings.mode == "gh_class" and entry is not None:
                energy_bin = entry[0]
            else:
                energy_bin = bisect.bisect_right(edges, event.shower["energy"]) - 1
            if not 0 <= energy_bin < len(edges) - 1:
                report.outside_bins += 1
                continue
            images, saturated = array.images(event, simtel, settings, self._image_cuts)
            if len(images) < settings.min_telescopes:
                report.failed_image_cuts += 1
                continue
            report.events_passed += 1
            if not writer.seen.add(event.run_number, event.event_id):
                report.duplicates += 1
                continue
            values = _event_values(event, entry)
            group = energy_bin
            if settings.mode == "energy_recon":
                values["energy_reconstruction_bin_label"], group = energy_bin, 0
            writer.add(group, values, images)
            report.events_written += 1
            kinds = [array.by_id[tel_id].camera.telescope_type for tel_id in images]
            self._per_event.extend([*map(kinds.count, array.kinds), saturated])
        if progress:
            progress(simtel.events_read - told)


def _event_values(event: Event, entry: tuple[int, float] | None) -> dict[str, Any]:
    """Columns of an event's row."""
    shower, mc = event.shower, event.mc
    return {
        "event_number": event.event_id,
        "run_number": event.run_number,
        # One byte, as historic; nuclei (helium 402, iron 5626) do not fit and are 255, see
        # primary_id.
        "gamma_hadron_label": min(max(shower["primary_id"], 0), 255)
        if shower["primary_id"] >= 0
        else 255,
        "core_x": mc["xcore"],
        "core_y": mc["ycore"],
        "h_first_int": shower["h_first_int"],
        "mc_energy": shower["energy"],
        "az": shower["azimuth"],
        "alt": shower["altitude"],
        "reconstructed_energy": np.nan if entry is None else entry[1],
        "primary_id": shower["primary_id"],
        "shower_number": shower["shower"],
    }


def _count_images(
    report: FileReport,
    kinds: list[str],
    per_event: list[int],
    chosen: np.ndarray | slice = slice(None),
) -> None:
    """Fill in images and saturated pixels from the numbers of each written event (or the chosen).

    `per_event` has len(kinds) + 1 numbers an event: images of each kind, saturated pixels.
    """
    numbers = np.array(per_event, np.int64).reshape(-1, len(kinds) + 1)[chosen]
    *images, report.saturated_pixels = numbers.sum(axis=0).tolist()
    report.images = {kind: n for kind, n in zip(kinds, images, strict=True) if n}


def _runs_row(simtel: SimtelFile, report: FileReport) -> np.ndarray:
    row = np.zeros(1, layout.RUNS_DTYPE)
    mc = simtel.mc_run_header
    values = {
        "file": simtel.path.name.encode()[-256:],
        "sha256": simtel.sha256.encode(),
        "run_number": report.run_number,
        "events_read": report.events_read,
        "events_passed": report.events_passed,
        "events_written": report.events_written,
        "duplicates": report.duplicates,
        "complete": not report.problem,
        "problem": report.problem.encode()[:256],
        "direction": simtel.header["direction"],
    }
    names = {
        "E_range": "energy_range",
        "spectral_index": "spectral_index",
        "n_showers": "n_showers",
        "n_use": "shower_reuse",
        "core_range": "core_range",
        "viewcone": "viewcone",
        "diffuse": "diffuse",
        "atmosphere": "atmosphere",
    }
    values |= {ours: mc[theirs] for theirs, ours in names.items() if theirs in mc}
    for name, value in values.items():
        row[name] = value
    return row


def _check_bins(cuts: CutsTable, settings: Settings) -> None:
    n_bins = settings.energy_bins.count()
    if settings.mode == "gh_class" and len(cuts) and int(cuts.bins.max()) >= n_bins:
        raise UsageError(
            f"{cuts.source}: has energy bin {int(cuts.bins.max())}, the configuration has {n_bins} "
            f"(0 to {n_bins - 1}). Make the dictionary with this configuration."
        )


def _without_path(error: Exception, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ")


_worker: dict[str, Any] = {}


def _start_worker(
    settings: Settings, cuts: CutsTable | None, compression: str, command: str
) -> None:
    _worker.update(settings=settings, bins_cuts_dict=cuts, compression=compression, command=command)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    logging.disable(logging.WARNING)  # it says it, too
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Leave no orphan behind when the parent is killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _extract_part(path: Path, part: Path, max_events: int | None) -> tuple[FileReport, list[int]]:
    """Extract one file to a part file, in a worker process; also give the numbers of each event."""
    extractor = ImageExtractor(part, overwrite=True, **_worker)
    try:
        return extractor.process_data(path, max_events), extractor._per_event
    except DataError as error:
        return FileReport(str(path), problem=_without_path(error, path), failed=True), []


def summary(reports: list[FileReport], output: Path, seconds: float) -> dict[str, Any]:
    """Totals of a run, as printed and as written by --summary."""
    images: dict[str, int] = {}
    for report in reports:
        for kind, n in report.images.items():
            images[kind] = images.get(kind, 0) + n
    total = {
        name: sum(getattr(r, name) for r in reports)
        for name in (
            "events_read",
            "events_passed",
            "events_written",
            "not_in_dictionary",
            "no_selected_telescope",
            "other_primary",
            "outside_bins",
            "failed_image_cuts",
            "duplicates",
            "calibration_events",
            "saturated_pixels",
        )
    }
    return {
        "output": output.name,
        "files": len(reports),
        "files_incomplete": sum(bool(r.problem) and not r.failed for r in reports),
        "files_failed": sum(r.failed for r in reports),
        **total,
        "images": sum(images.values()),
        "images_by_type": images,
        "seconds": round(seconds, 3),
        "bytes": output.stat().st_size if output.exists() else 0,
        "reports": [asdict(r) for r in reports],
    }
