"""Summarise the demo's evaluations in one table and one JSON file.

Reads   results/demo/{logOH_hard,logOH_easy,BPT_hard}/test/metrics.json (written by eval_fns.py).
Writes  results/demo/summary.json with flat keys such as logOH.hard_accuracy; prints the table.

    python demo_summary.py --results results/demo --seconds 120
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

import data_io
import utils
from utils import DataError

RUNS = ("logOH_hard", "logOH_easy", "BPT_hard")


@dataclass(frozen=True)
class Config:
    """Summarise the demo's evaluations in one table and one JSON file."""

    results: Path = Path("results/demo")
    """Folder that holds the demo's runs."""
    data_dir: Path | None = None
    """Data folder; default $MANGA_DATA_DIR, else ./data/manga."""
    seconds: float | None = None
    """Wall time of the demo so far in seconds, to be recorded."""
    debug: bool = False
    """Show tracebacks."""


def read_metrics(run_dir: Path) -> dict[str, Any]:
    """Read the metrics of a run on its test part."""
    path = run_dir / "test" / "metrics.json"
    if not path.is_file():
        raise DataError(
            f"{path}: no such file. Expected the metrics of a run on its test part. Write them "
            f"with eval_fns.py --run-dir {run_dir} --part test."
        )
    return json.loads(path.read_text())


def summarise(root: Path, results: Path, seconds: float | None) -> dict[str, Any]:
    """Flat summary of the demo: amount of data, and scores of the runs."""
    found = {name: read_metrics(results / name) for name in RUNS}
    logoh, easy, bpt = (found[name] for name in RUNS)
    maps = utils.label_maps(root, "logOH")
    parts, _ = data_io.read_split(results / "logOH_hard" / "split")
    patches = int(pd.concat(parts.values())["n_labelled"].sum())
    return {
        "galaxies": len(maps),
        "patches": patches,
        "test_galaxies": logoh["galaxies"],
        "logOH.hard_accuracy": logoh["accuracy"],
        "logOH.hard_accuracy_interval": logoh["intervals"]["accuracy"],
        "logOH.easy_accuracy": easy["accuracy"],
        "logOH.majority_accuracy": logoh["majority_accuracy"],
        "logOH.spectrum_accuracy": logoh["spectrum_accuracy"],
        "logOH.mae_dex": logoh["mae_dex"],
        "logOH.constant_mae_dex": logoh["constant_mae_dex"],
        "BPT.hard_accuracy": bpt["accuracy"],
        "BPT.hard_accuracy_interval": bpt["intervals"]["accuracy"],
        "BPT.majority_accuracy": bpt["majority_accuracy"],
        "BPT.spectrum_accuracy": bpt["spectrum_accuracy"],
        "seconds": seconds,
        "version": utils.VERSION,
        "created_utc": utils.utc_now(),
    }


def table(summary: dict[str, Any]) -> str:
    """Format the summary as a text table."""

    def interval(task: str) -> str:
        low, high = summary[f"{task}.hard_accuracy_interval"]
        return f"{low:.3f}-{high:.3f}"

    def row(*cells: str) -> str:
        return f"{cells[0]:<34}" + "".join(f"{c:>14}" for c in cells[1:])

    s = summary
    lines = [
        row("held-out galaxies (hard split)", "metallicity", "BPT class"),
        row("  SSFTT accuracy", *(f"{s[f'{t}.hard_accuracy']:.3f}" for t in ("logOH", "BPT"))),
        row("    95 % interval over galaxies", interval("logOH"), interval("BPT")),
        row(
            "  majority-class accuracy",
            *(f"{s[f'{t}.majority_accuracy']:.3f}" for t in ("logOH", "BPT")),
        ),
        row(
            "  linear model of one spectrum",
            *(f"{s[f'{t}.spectrum_accuracy']:.3f}" for t in ("logOH", "BPT")),
        ),
        row("  mean absolute error (dex)", f"{s['logOH.mae_dex']:.3f}", "-"),
        row("    of a constant prediction", f"{s['logOH.constant_mae_dex']:.3f}", "-"),
        row("held-out spaxels (easy split)", "", ""),
        row("  SSFTT accuracy", f"{s['logOH.easy_accuracy']:.3f}", "-"),
    ]
    return "\n".join(lines)


def main(config: Config) -> int:
    """Write the summary as JSON, print it as a table; return the exit code."""
    summary = summarise(utils.data_dir(config.data_dir), config.results, config.seconds)
    path = config.results / "summary.json"
    utils.write_json(path, summary)
    print(f"\n{summary['galaxies']} galaxies, {summary['patches']} labelled patches\n")
    print(table(summary))
    figures = utils.files_in(config.results, "*/figures/*.png")
    print("\nLook at:", *(f"  {p}" for p in [*figures, path]), sep="\n")
    return utils.EXIT_DONE


if __name__ == "__main__":
    utils.run_command(main, Config, __doc__)
