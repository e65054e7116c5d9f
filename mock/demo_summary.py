"""Summarise the demo's evaluations in one table and one JSON file.

Reads   results/demo/{logOH_hard,logOH_easy,BPT_hard,logOH_ssftt}/test/metrics.json (written by
        eval_fns.py) and results/demo/logOH_hard/maps/galaxies.csv (by map_galaxies.py).
Writes  results/demo/summary.json with flat keys such as logOH.hard_accuracy; prints the table.

    python -m mock.demo_summary --results results/demo --seconds 120
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import utils
from utils import DataError

import numpy as np
import pandas as pd

import data_io
from intervals import LEVEL


@dataclass(frozen=True)
class Config:
    """Summarise the demo's evaluations in one table and one JSON file."""

    results: Path = Path("results/demo")
    """Folder that holds the demo's runs."""
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


def summarise(results: Path, seconds: float | None) -> dict[str, Any]:
    """Flat summary of the demo: amount of data, and scores of the runs."""
    hard = {task: read_metrics(results / f"{task}_hard") for task in ("logOH", "BPT")}
    easy, ssftt = (read_metrics(results / f"logOH_{name}") for name in ("easy", "ssftt"))
    parts, _ = data_io.read_split(results / "logOH_hard" / "split")
    observed = pd.read_csv(results / "logOH_hard" / "maps" / "galaxies.csv")
    summary = {
        "galaxies": observed["mangaid"].nunique(),
        "observations": len(observed),
        "patches": sum(int(table["n_labelled"].sum()) for table in parts.values()),
        "test_galaxies": hard["logOH"]["galaxies"],
        "logOH.easy_accuracy": easy["accuracy"],
        "logOH.easy_mae_dex": easy["mae_dex"],
        "logOH.mae_dex_interval": hard["logOH"]["intervals"]["mae_dex"],
        "logOH.coverage": hard["logOH"]["coverage"][str(LEVEL)],
        "logOH.ssftt_accuracy": ssftt["accuracy"],
        "logOH.ssftt_mae_dex": ssftt["mae_dex"],
    }
    for name in ("mae_dex", "baseline_mae_dex", "constant_mae_dex"):
        summary[f"logOH.{name}"] = hard["logOH"][name]
    for task, found in hard.items():
        summary[f"{task}.hard_accuracy"] = found["accuracy"]
        summary[f"{task}.hard_accuracy_interval"] = found["intervals"]["accuracy"]
        for baseline in ("majority_accuracy", "baseline_accuracy"):
            summary[f"{task}.{baseline}"] = found[baseline]
    made = {"version": utils.VERSION, "created_utc": utils.utc_now()}
    return {**summary, "seconds": seconds, **made}


ROWS = (  # words, key of the metallicity, key of the BPT class
    ("held-out galaxies (hard split)", "metallicity", "BPT class"),
    ("  accuracy", "hard_accuracy", "hard_accuracy"),
    ("    95 % interval over galaxies", "hard_accuracy_interval", "hard_accuracy_interval"),
    ("    of line ratios of one spectrum", "baseline_accuracy", "baseline_accuracy"),
    ("    of the majority class", "majority_accuracy", "majority_accuracy"),
    ("    of SSFTT", "ssftt_accuracy", "-"),
    ("  mean absolute error (dex)", "mae_dex", "-"),
    ("    95 % interval over galaxies", "mae_dex_interval", "-"),
    ("    of line ratios of one spectrum", "baseline_mae_dex", "-"),
    ("    of a constant prediction", "constant_mae_dex", "-"),
    ("    of SSFTT", "ssftt_mae_dex", "-"),
    (f"  labels in {LEVEL:.0%} intervals", "coverage", "-"),
    ("held-out spaxels (easy split)", "", ""),
    ("  accuracy", "easy_accuracy", "-"),
    ("  mean absolute error (dex)", "easy_mae_dex", "-"),
)


def table(summary: dict[str, Any]) -> str:
    """Format the summary as a text table."""

    def cell(key: str, word: str) -> str:
        value = summary.get(key, word)
        return value if value is word else "-".join(f"{v:.3f}" for v in np.atleast_1d(value))

    return "\n".join(
        f"{words:<36}{cell(f'logOH.{left}', left):>14}{cell(f'BPT.{right}', right):>14}".rstrip()
        for words, left, right in ROWS
    )


def main(config: Config) -> int:
    """Write the summary as JSON, print it as a table; return the exit code."""
    summary = summarise(config.results, config.seconds)
    path = config.results / "summary.json"
    utils.write_json(path, summary)
    count = f"{summary['observations']} observations of {summary['galaxies']} galaxies"
    print(f"\n{count}, {summary['patches']} spaxels with a metallicity\n")
    print(table(summary))
    figures = utils.files_in(config.results, "*/figures/*.png")
    print("\nLook at:", *(f"  {p}" for p in [*figures, path]), sep="\n")
    print('\nNext: a galaxy of your own, see "Your first galaxy" in README.md.')
    return utils.EXIT_DONE


if __name__ == "__main__":
    utils.run_command(main, Config, __doc__)
