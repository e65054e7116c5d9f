"""What became of the input files: a report per file, totals of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import layout
from .simtel import SimtelFile

# Counts of a FileReport with their names in the summary, in its order.
COUNTS = {
    "events_read": "events read",
    "not_in_dictionary": "not in the dictionary",
    "no_selected_telescope": "no selected telescope",
    "other_primary": "not gammas",
    "outside_bins": "outside the energy bins",
    "failed_image_cuts": "failed image cuts",
    "events_passed": "events passed",
    "duplicates": "already in the output",
    "same_numbers": "with the numbers of others, kept",
    "events_written": "events written",
    "saturated_pixels": "saturated pixels",
    "calibration_events": "calibration events skipped",
}
# Why events did not pass.
REASONS = (
    "not_in_dictionary",
    "no_selected_telescope",
    "other_primary",
    "outside_bins",
    "failed_image_cuts",
)
ALWAYS_SHOWN = ("events_read", "events_passed", "events_written", "saturated_pixels")
# Columns of Runs -> keys of eventio's MCRunHeader.
MC_COLUMNS = {
    "energy_range": "E_range",
    "spectral_index": "spectral_index",
    "n_showers": "n_showers",
    "shower_reuse": "n_use",
    "core_range": "core_range",
    "viewcone": "viewcone",
    "diffuse": "diffuse",
    "atmosphere": "atmosphere",
}


@dataclass
class FileReport:
    """What became of one input file.

    `events_read` counts triggered events; `events_passed` those in the dictionary and in an energy
    bin with enough images that pass the cuts; `events_written` those of them that were not yet in
    the output, `same_numbers` those of the latter beside another event with the same run and event
    numbers. `problem` says why the file is incomplete or, if `failed`, why it was left out.
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
    same_numbers: int = 0
    events_written: int = 0
    calibration_events: int = 0
    images: dict[str, int] = field(default_factory=dict)
    saturated_pixels: int = 0
    problem: str = ""
    failed: bool = False
    seconds: float = 0.0

    def count_images(
        self, types: list[str], per_event: list[int], chosen: np.ndarray | slice = slice(None)
    ) -> None:
        """Set images and saturated_pixels to the totals of all written events, or of the chosen.

        Parameters
        ----------
        types : list of str
            Telescope types.
        per_event : list of int
            len(types) + 1 numbers per event: images of each type, saturated pixels.
        chosen : (n_events,) bool array, optional
        """
        numbers = np.array(per_event, np.int64).reshape(-1, len(types) + 1)[chosen]
        *images, self.saturated_pixels = numbers.sum(axis=0).tolist()
        self.images = {kind: n for kind, n in zip(types, images, strict=True) if n}


def runs_row(simtel: SimtelFile, report: FileReport) -> np.ndarray:
    """Row of the table Runs for one input file, shape (1,)."""
    row = np.zeros(1, layout.RUNS_DTYPE)
    counts = ("run_number", "events_read", "events_passed", "events_written", "duplicates")
    mc = simtel.mc_run_header
    values = {
        "file": simtel.path.name.encode()[-256:],
        "sha256": simtel.sha256.encode(),
        **{name: getattr(report, name) for name in counts},
        "complete": not report.problem,
        "problem": report.problem.encode()[:256],
        "direction": simtel.header["direction"],
        **{ours: mc[theirs] for ours, theirs in MC_COLUMNS.items() if theirs in mc},
    }
    for name, value in values.items():
        row[name] = value
    return row


def summary(reports: list[FileReport], output: Path, seconds: float) -> dict[str, Any]:
    """Totals of a run, as written by --summary."""
    images: dict[str, int] = {}
    for report in reports:
        for kind, n in report.images.items():
            images[kind] = images.get(kind, 0) + n
    return {
        "output": output.name,
        "files": len(reports),
        "files_incomplete": sum(bool(r.problem) and not r.failed for r in reports),
        "files_failed": sum(r.failed for r in reports),
        **{name: sum(getattr(r, name) for r in reports) for name in COUNTS},
        "images": sum(images.values()),
        "images_by_type": images,
        "seconds": round(seconds, 3),
        "bytes": output.stat().st_size if output.exists() else 0,
        "reports": [asdict(r) for r in reports],
    }


def summary_text(summary: dict[str, Any], unit: float, dtype: str) -> str:
    """Format the summary as text, as printed at the end of a run."""
    files = f"{summary['files_incomplete']} incomplete, {summary['files_failed']} left out"
    by_type = ", ".join(f"{n} {kind}" for kind, n in summary["images_by_type"].items())
    lines = [("files", f"{summary['files']} ({files})")]
    for name, words in COUNTS.items():
        if name == "saturated_pixels":
            lines.append(("images", f"{summary['images']} ({by_type})"))
            words_for_type = f"charge too large for {dtype} at {unit} p.e."
            lines.append((words, f"{summary[name]} ({words_for_type})"))
        elif summary[name] or name in ALWAYS_SHOWN:
            lines.append((words, summary[name]))
    lines += [
        ("seconds", f"{summary['seconds']:.1f}"),
        ("size", f"{summary['bytes'] / 1e6:.1f} MB"),
        ("output", summary["output"]),
    ]
    return "\n".join(f"{name:>28}  {value}" for name, value in lines)
