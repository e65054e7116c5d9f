"""Make the dictionary of bins and cuts from EventDisplay's MSCW files.

Reads   MSCW ROOT files (tree `data`); the configuration ([preselection_cuts], [energy_bins]).
Writes  {(run_number, event_number): (bin_index, ErecS in TeV)} as .pkl, .json or .h5.

    prepare_cuts_dict.py "MSCW*.root" bins_cuts_dict.pkl --config settings.config

Files are read in slices. Cuts keep lower <= value < upper. A cut whose branches are missing in a
file (MCxoff and MCyoff exist only in simulations) stops the run unless both its bounds are None.
"""

from __future__ import annotations

import argparse
import glob
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .config import load_config
from .cuts import ROW, bin_indices, cuts_writer, event_keys
from .errors import DataError, UsageError
from .settings import Cut, Settings
from .transaction import cannot_write

TREE = "data"
ROWS_PER_SLICE = 200_000


def passes(columns: dict[str, np.ndarray], cuts: dict[str, Cut]) -> dict[str, np.ndarray]:
    """Apply each cut to the rows.

    Parameters
    ----------
    columns : dict
        Branch name -> (n,) array.
    cuts : dict
        Cut name -> Cut. Several columns of a cut are added in quadrature.

    Returns
    -------
    dict
        Cut name -> (n,) bool, whether the row passes. NaN passes no cut.
    """
    result = {}
    for name, cut in cuts.items():
        if len(cut.columns) == 1:
            value = columns[cut.columns[0]].astype(np.float64)
        else:
            value = np.sqrt(sum(columns[c].astype(np.float64) ** 2 for c in cut.columns))
        good = ~np.isnan(value)
        if cut.low is not None:
            good &= value >= cut.low
        if cut.high is not None:
            good &= value < cut.high
        result[name] = good
    return result


def read_slices(path: Path, branches: list[str]) -> Iterator[dict[str, np.ndarray]]:
    """Read the tree in slices, each {branch: array}. Raises DataError."""
    import uproot

    try:
        with uproot.open(path) as root:
            if TREE not in root:
                raise DataError(
                    f"{path}: no tree {TREE!r} (expected EventDisplay's MSCW output). "
                    "Check the files."
                )
            tree = root[TREE]
            missing = [b for b in branches if b not in tree.keys()]
            if missing:
                raise DataError(
                    f"{path}: no branch {', '.join(missing)} (expected EventDisplay's MSCW "
                    "output). Set the cuts on it to `None, None` to do without."
                )
            yield from tree.iterate(branches, step_size=ROWS_PER_SLICE, library="np")
    except DataError:
        raise
    # uproot has no error type of its own for files that are not ROOT files or are cut off.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"{path}: cannot be read as a ROOT file ({type(error).__name__}: {reason}). "
            "Check the files."
        ) from error


def prepare(files: list[Path], output: Path, settings: Settings) -> dict[str, Any]:
    """Write the dictionary and count events.

    Returns
    -------
    dict
        `files`, `events`, `passed`, `cuts` (cut -> events that pass it), `bins` (events per bin),
        `out_of_bins` (events that pass all cuts but are in no bin).

    Raises
    ------
    DataError
        If the input cannot be read or has an event twice. Nothing is written then.
    """
    cuts = {
        name: cut
        for name, cut in settings.preselection_cuts.items()
        if cut.low is not None or cut.high is not None
    }
    edges = settings.energy_bins.edges_tev()
    branches = sorted(
        {"runNumber", "eventNumber", "ErecS", *(c for cut in cuts.values() for c in cut.columns)}
    )
    counts: dict[str, Any] = {"files": len(files), "events": 0, "passed": 0, "out_of_bins": 0}
    counts["cuts"] = dict.fromkeys(cuts, 0)
    in_bins = np.zeros(len(edges) - 1, np.int64)
    seen = np.empty(0, np.uint64)
    description = {
        "energy_bins_tev": edges,
        "cuts": {n: [*c.columns, c.low, c.high] for n, c in cuts.items()},
        "sources": [p.name for p in files],
    }
    with cuts_writer(output, description) as write:
        for path in files:
            for columns in read_slices(path, branches):
                good = passes(columns, cuts)
                kept = np.ones(len(columns["ErecS"]), bool)
                for name, mask in good.items():
                    counts["cuts"][name] += int(mask.sum())
                    kept &= mask
                index = bin_indices(columns["ErecS"], edges)
                counts["events"] += kept.size
                counts["out_of_bins"] += int((kept & (index < 0)).sum())
                kept &= index >= 0
                rows = np.empty(int(kept.sum()), ROW)
                rows["run_number"] = columns["runNumber"][kept]
                rows["event_number"] = columns["eventNumber"][kept]
                rows["bin"], rows["energy"] = index[kept], columns["ErecS"][kept]
                unique, times = np.unique(event_keys(rows), return_counts=True)
                double = np.concatenate([unique[times > 1], unique[np.isin(unique, seen)]])
                if double.size:
                    run, event = divmod(int(double[0]), 1 << 32)
                    raise DataError(
                        f"{path}: run {run} event {event} occurs twice (expected each event "
                        "once). Give each file once."
                    )
                seen = np.concatenate([seen, unique])  # 8 bytes per event
                write(rows)
                counts["passed"] += rows.size
                in_bins += np.bincount(rows["bin"], minlength=in_bins.size)
    counts["bins"] = in_bins.tolist()
    return counts


def main(argv: list[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="prepare_cuts_dict.py",
        description="Make the dictionary of bins and cuts from MSCW files.",
    )
    parser.add_argument("mscw_files", help='a ROOT file, or a quoted pattern: "MSCW*.root"')
    parser.add_argument("output", type=Path, help="dictionary to write: .pkl, .json or .h5")
    parser.add_argument(
        "--config",
        type=Path,
        help="configuration with the cuts and energy bins (default: the default settings)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    args = parser.parse_args(argv)
    try:
        settings = load_config(args.config) if args.config else Settings()
        files = [Path(p) for p in sorted(glob.glob(args.mscw_files))]
        if not files:
            raise UsageError(f"{args.mscw_files}: no such file. Check the path.")
        if args.output.exists() and not args.overwrite:
            raise UsageError(f"{args.output}: exists already. Give --overwrite to replace it.")
        counts = prepare(files, args.output, settings)
    except DataError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except OSError as error:
        print(cannot_write(args.output, error), file=sys.stderr)
        return 1
    print(f"{counts['events']} events in {counts['files']} files")
    for name, number in counts["cuts"].items():
        print(f"  {name}: {number} events pass")
    print(
        f"{counts['passed']} events pass all cuts; {counts['out_of_bins']} more pass "
        "but are outside the energy bins"
    )
    for i, number in enumerate(counts["bins"]):
        low, high = settings.energy_bins.edges_tev()[i : i + 2]
        print(f"  bin {i} ({low:.4g} to {high:.4g} TeV): {number} events")
    print(f"written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
