"""Extract images from simtel files to an HDF5 data set, file by file or in several processes.

Reads   simtel files; settings and, optionally, a dictionary of bins and cuts are passed in.
Writes  one HDF5 file (layout.py), whole or not at all.

    from image_extractor import image_extractor
    with image_extractor.ImageExtractor("dataset.h5", telescope_type="LST") as extractor:
        extractor.process_data("gamma.simtel.gz", 50)

Outside a `with` block every call of `process_data` is a transaction of its own, so that the file is
whole after each; inside one, all calls together are one transaction.
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
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tables
from isal import isal_zlib

from . import config, layout
from .cuts import CutsTable
from .errors import DataError, UsageError
from .finishing import finish
from .images import SelectedArray
from .report import FileReport, runs_row
from .settings import Settings
from .simtel import Corrupt, Event, SimtelFile
from .transaction import OutputTransaction
from .writer import Writer

log = logging.getLogger(__name__)

GAMMA_ID = 0  # particle id in simtel files; a proton has 101


class ImageExtractor:
    """Write the images of simtel files to an HDF5 data set.

    Parameters
    ----------
    output_path : str or Path
        Created, or appended to if it exists.
    bins_cuts_dict : dict or CutsTable, optional
        {(run_number, event_number): (bin_index, reconstructed energy in TeV)}; other events are
        skipped before calibration. Without one, all events are kept and binned by true energy.
    mode : str
        "gh_class" or "energy_recon".
    type_mode, storage_mode : str
        Telescopes (also called tel_type_mode and telescope_type) and storage mode, as in the
        configuration. They may be the fourth and fifth argument, as historically.
    settings : Settings, optional
        E.g. from `config.load_config`; by default `Settings()`.
    overwrite : bool
        Replace an existing output instead of appending to it.
    compression : str
        "gzip", "none", "blosc-lz4" or "blosc-zstd".
    shuffle, split, split_by, stratify, seed
        See `rearrangement.rearrange`; done when the output is closed. `split` maps the names of
        the parts to fractions. `split_by` is "shower" or "event". `seed` is 0 or more.
    **options
        Other fields of Settings, e.g. image_mode, scale_factor.

    Raises
    ------
    UsageError
        If an option is unknown or not valid.
    """

    def __init__(
        self,
        output_path: str | Path,
        bins_cuts_dict: Mapping[Any, Any] | CutsTable | None = None,
        mode: str | None = None,
        type_mode: str | None = None,
        storage_mode: str | None = None,
        *,
        settings: Settings | None = None,
        overwrite: bool = False,
        compression: str = "gzip",
        shuffle: bool = False,
        split: dict[str, float] | None = None,
        split_by: str = "shower",
        stratify: bool = False,
        seed: int = 0,
        command: str = "",
        **options: Any,
    ) -> None:
        for name in ("telescope_type", "tel_type_mode"):
            type_mode = options.pop(name, type_mode)
        positional = {"mode": mode, "type_mode": type_mode, "storage_mode": storage_mode}
        options |= {name: value for name, value in positional.items() if value is not None}
        unknown = set(options) - {f.name for f in fields(Settings)}
        if unknown:
            raise UsageError(
                f"ImageExtractor has no option {', '.join(sorted(unknown))} (expected those of "
                "its signature and of Settings). Correct the name."
            )
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
                f"compression {compression!r}: not a valid value "
                f"(expected {' | '.join(layout.COMPRESSIONS)}). Choose one of these."
            )
        if not isinstance(seed, int) or seed < 0:
            raise UsageError(
                f"seed {seed!r}: not a valid seed (expected a whole number >= 0). Correct it."
            )
        if split and not (
            all(name.isidentifier() and 0 <= part <= 1 for name, part in split.items())
            and math.isclose(sum(split.values()), 1, abs_tol=1e-6)
        ):
            raise UsageError(
                f"split {split}: not a valid split (expected names with fractions from 0 to 1 "
                "that add up to 1). Correct it."
            )
        if split_by not in layout.SPLIT_BY:
            raise UsageError(
                f"split_by {split_by!r}: not a valid value "
                f"(expected {' | '.join(layout.SPLIT_BY)}). Choose one of these."
            )
        self.overwrite, self.compression, self.command = overwrite, compression, command
        self.shuffle, self.split, self.split_by = shuffle, split, split_by
        self.stratify, self.seed = stratify, seed
        self._has_committed = False
        self._per_event: list[int] = []  # of the last file, see FileReport.count_images
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
            Stop after this many events have passed, including those already in the output.
        progress : callable, optional
            Called with the number of events read since the last call.

        Returns
        -------
        FileReport
            With the reason in `problem` if the file was incomplete.

        Raises
        ------
        DataError
            If nothing can be read from the file or its array differs from the output's. The output
            stays as it was.
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
        """Extract many files in one transaction; those that cannot be used are reported.

        With `jobs` above 1, that many processes extract whole files each; the result is the same.
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
                    f"{self.output_path}: not written, because none of the "
                    f"{len(data_files)} input files could be used. Check the files."
                )
        return reports

    @contextlib.contextmanager
    def _naming_output(self) -> Iterator[None]:
        """Make one line of errors of the system and HDF5; all of them come from the output."""
        try:
            yield
        except (OSError, tables.HDF5ExtError) as error:
            reason = getattr(error, "strerror", None) or "an error in HDF5"
            raise DataError(
                f"{self.output_path}: could not be written ({reason}). "
                "Check the free space and the quota."
            ) from error

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
            except UsageError:
                raise
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
                    while todo and len(waiting) < 2 * jobs:  # limits the space taken by parts
                        path, part = todo.pop(0)
                        waiting.append(
                            (path, part, pool.submit(_extract_part, path, part, max_events))
                        )
                    path, part, future = waiting.pop(0)
                    report, per_event = future.result()
                    if not report.failed:
                        try:
                            self._merge(path, part, report, per_event)
                        except UsageError:
                            raise
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
                    f"{self.output_path}: not written, because a worker process was killed, "
                    "probably for lack of memory. Use fewer --jobs."
                ) from error
            except BaseException:
                # Leaving the block would wait for the workers, possibly for minutes.
                pool.shutdown(wait=False, cancel_futures=True)
                for child in set(multiprocessing.active_children()) - others:
                    child.terminate()
                raise

    def _merge(self, path: Path, part: Path, report: FileReport, per_event: list[int]) -> None:
        with SimtelFile(path) as simtel:
            array = SelectedArray(simtel, self.settings)
            self._ensure_writer(simtel, array)
        assert self._writer is not None
        is_new, is_other = self._writer.merge(part).T
        report.duplicates += int((~is_new).sum())
        report.events_written = int(is_new.sum())
        report.same_numbers = int(is_other.sum())
        report.count_images(array.types, per_event, is_new)
        self._log(report)

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
                    finish(
                        writer,
                        transaction,
                        self.shuffle,
                        self.split,
                        self.split_by,
                        self.stratify,
                        self.seed,
                    )
                    self._has_committed = True
        finally:
            if writer is not None:
                writer.abandon()
            transaction.close()

    def _ensure_writer(self, simtel: SimtelFile, array: SelectedArray) -> Writer:
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
                    f"{simtel.path}: another array than the output's: {how}. "
                    "Give another output for this file."
                )
        if not np.allclose(direction, self._direction, atol=1e-4) and not self._warned_direction:
            self._warned_direction = True
            log.warning(
                "%s: pointing differs from that of the first file. "
                "Tel_Table holds the first, Runs that of each file.",
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
            array = SelectedArray(simtel, self.settings)
            writer = self._ensure_writer(simtel, array)
            try:
                self._extract(simtel, array, writer, report, max_events, progress)
            except Corrupt as error:
                simtel.problem = str(error)
            report.count_images(array.types, self._per_event)
            report.events_read = simtel.events_read
            report.calibration_events = simtel.calibration_events
            report.problem = simtel.problem
            report.seconds = time.perf_counter() - started
            writer.add_run(runs_row(simtel, report))
        self._log(report)
        return report

    def _log(self, report: FileReport) -> None:
        if report.problem:
            log.warning(
                "%s: incomplete: %s. Its %d complete events were read.",
                report.file,
                report.problem,
                report.events_read,
            )
        elif not report.events_read:
            log.warning("%s: contains no events.", report.file)
        assert self._writer is not None
        if report.duplicates:
            log.warning(
                "%s: %d events of run %d are already in the output and were skipped.%s",
                report.file,
                report.duplicates,
                report.run_number,
                " They may come from a damaged file: extract them again with --overwrite."
                if report.run_number in self._writer.incomplete
                else "",
            )
        if report.same_numbers:
            log.warning(
                "%s: %d events of run %d have the run and event numbers of other events in the "
                "output and were kept beside them (primary_id, mc_energy and identity tell them "
                "apart).",
                report.file,
                report.same_numbers,
                report.run_number,
            )

    def _extract(
        self,
        simtel: SimtelFile,
        array: SelectedArray,
        writer: Writer,
        report: FileReport,
        max_events: int | None,
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Write the events of a file."""
        settings, cuts = self.settings, self.cuts
        edges = settings.bins.edges_tev()
        wanted = None if cuts is None else lambda run, event: cuts.get(run, event) is not None
        reported = 0
        for event in simtel.events(array.by_id.keys(), wanted):
            if max_events is not None and report.events_passed >= max_events:
                return
            if progress and simtel.events_read - reported >= 10:
                progress(simtel.events_read - reported)
                reported = simtel.events_read
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
            images, saturated = array.images(event)
            if len(images) < settings.min_telescopes:
                report.failed_image_cuts += 1
                continue
            report.events_passed += 1
            values = _event_values(event, entry)
            group = energy_bin
            if settings.mode == "energy_recon":
                values["energy_reconstruction_bin_label"], group = energy_bin, 0
            is_new, is_other = writer.add(group, values, images, _content(event))
            report.same_numbers += is_other
            if not is_new:
                report.duplicates += 1
                continue
            report.events_written += 1
            kinds = [array.by_id[tel_id].camera.telescope_type for tel_id in images]
            self._per_event.extend([*map(kinds.count, array.types), saturated])
        if progress:
            progress(simtel.events_read - reported)


def _content(event: Event) -> int:
    """CRC-32 of the raw data of the selected telescopes."""
    content = 0
    for tel_id in sorted(event.telescopes):
        content = isal_zlib.crc32(event.telescopes[tel_id].payload, content)
    return content


def _event_values(event: Event, entry: tuple[int, float] | None) -> dict[str, Any]:
    """Values of an event's row, without those of its images."""
    shower, mc = event.shower, event.mc
    primary = shower["primary_id"]
    return {
        "event_number": event.event_id,
        "run_number": event.run_number,
        # One byte, as in the historic layout. Nuclei (helium 402, iron 5626) and negative ids do
        # not fit and become 255; primary_id has them all.
        "gamma_hadron_label": primary if 0 <= primary <= 255 else 255,
        "core_x": mc["xcore"],
        "core_y": mc["ycore"],
        "h_first_int": shower["h_first_int"],
        "mc_energy": shower["energy"],
        "az": shower["azimuth"],
        "alt": shower["altitude"],
        "reconstructed_energy": np.nan if entry is None else entry[1],
        "primary_id": primary,
        "shower_number": shower["shower"],
    }


def _check_bins(cuts: CutsTable, settings: Settings) -> None:
    n_bins = settings.energy_bins.count()
    if settings.mode == "gh_class" and len(cuts) and int(cuts.bins.max()) >= n_bins:
        raise UsageError(
            f"{cuts.source}: has energy bin {int(cuts.bins.max())}, the configuration has {n_bins} "
            f"(expected 0 to {n_bins - 1}). Make the dictionary with this configuration."
        )


def _without_path(error: Exception, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ")


_worker: dict[str, Any] = {}


def _start_worker(
    settings: Settings, cuts: CutsTable | None, compression: str, command: str
) -> None:
    _worker.update(settings=settings, bins_cuts_dict=cuts, compression=compression, command=command)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    logging.disable(logging.WARNING)  # and logs for its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when its parent is killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _extract_part(path: Path, part: Path, max_events: int | None) -> tuple[FileReport, list[int]]:
    """Extract one file to a part file, in a worker process; also return each event's counts."""
    extractor = ImageExtractor(part, overwrite=True, **_worker)
    try:
        return extractor.process_data(path, max_events), extractor._per_event
    except UsageError:
        raise
    except DataError as error:
        return FileReport(str(path), problem=_without_path(error, path), failed=True), []
