"""Demonstrate the package: real files become data sets; toy showers train a network.

Reads   simtel files of eventio's source distribution, which sample_files.py downloads once.
Writes  to the given folder: HDF5 files of several arrays and storage modes, PNG pictures; mock.h5
        (toy showers), split by shower and by event; a run folder of train_cta.py for each of the
        two; summary.json.

A split by event puts uses of one shower on both sides. The last table shows what that does to the
scores: they are those of showers that were learned from.

    python scripts/demo.py ../results/demo-cta
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import sample_files

from image_extractor import cli
from image_extractor.errors import DataError

PACKAGE = Path(__file__).resolve().parents[1]
GAMMAS = "gamma_test.simtel.gz"
SST_GAMMAS = "gamma_20deg_0deg_run102___cta-prod4-sst-1m_desert-2150m-Paranal-sst-1m.simtel.gz"
CUT_OFF = "gamma_test_large_truncated.simtel.gz"  # LSTs, MSTs with FlashCam, SSTs with ASTRICam
SHOWERS, USES = 1000, 3
MAPPED = """\
storage_mode = mapped
[image]
mode = PIXELS_TIMING_2C
scale_factor = 1
dtype = uint32
mapping = {mapping}
[telescope]
type_mode = ALL
[energy_bins]
min = -2
max = 2
bin_size = 1
"""


def run(script: str, *words: str | Path | int) -> None:
    """Run a script of this folder in a process of its own."""
    print(f"\n$ python scripts/{script} {' '.join(map(str, words))}", flush=True)
    path = str(PACKAGE / "scripts" / script)
    subprocess.run([sys.executable, path, *map(str, words)], check=True)


def learn(out: Path) -> dict:
    """Simulate toy showers and train on both splits; return the scores by split."""
    mock, summaries = out / "mock.h5", {}
    (out / "parameters.npz").unlink(missing_ok=True)
    run("mock_showers.py", mock, "--showers", SHOWERS, "--uses", USES)
    parts = ["--shuffle", "--split", "--split-fractions", "Training=0.6,Validation=0.1,Test=0.3"]
    for by in ("shower", "event"):
        split = out / f"mock_by_{by}.h5"
        words = [str(mock), "--output", str(split), "--overwrite", *parts, "--split-by", by]
        if cli.main(["merge", *words]) or cli.main(["validate", str(split)]):
            raise DataError(f"{split}: not as expected. Report this.")
        # The events are the same, so that the second run finds the parameters of the first.
        kept = ["--parameters", out / "parameters.npz"]
        run("train_cta.py", split, "--run-dir", out / f"by_{by}", *kept)
        summaries[by] = json.loads((out / f"by_{by}" / "summary.json").read_text())
    return summaries


def leak_table(summaries: dict) -> str:
    """Format the scores of both splits side by side."""
    rows = {"": [f"split by {by}" for by in summaries]}
    rows["test events whose shower is in training"] = [
        f"{s['test_events_with_shower_in_training'] / s['events']['Test']:.0%}"
        for s in summaries.values()
    ]
    for score in ("AUC", "energy resolution"):
        for method in ("network", "Hillas, boosted"):
            values = [s[method][score.lower().replace(" ", "_")] for s in summaries.values()]
            rows[f"{score}, {method}"] = ["{:.3f} ({:.3f}-{:.3f})".format(*v) for v in values]
    return "\n".join(f"{name:42}{a:>22}{b:>22}" for name, (a, b) in rows.items())


def main(out: Path) -> int:
    """Run the demonstration; return the exit code."""
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    files = sample_files.fetch()
    jobs = [
        ("gammas_mapped", GAMMAS, MAPPED.format(mapping="auto"), []),
        (
            "gammas_all_sct",
            GAMMAS,
            (PACKAGE / "aux" / "test_pytables.config").read_text(),
            [str(PACKAGE / "aux" / "bins_cuts_dict.pkl"), "--shuffle", "--split"],
        ),
        ("sst_gammas_mapped", SST_GAMMAS, MAPPED.format(mapping="oversampling"), []),
        ("cut_off_mapped", CUT_OFF, MAPPED.format(mapping="rebin"), []),
    ]
    total: dict = dict.fromkeys(
        ("files", "events_read", "events_written", "images", "saturated_pixels"), 0
    )
    total["data_sets"] = []
    for name, source, config, options in jobs:
        config_path, h5, report = out / f"{name}.config", out / f"{name}.h5", out / f"{name}.json"
        config_path.write_text(config)
        report.unlink(missing_ok=True)
        print(f"\n{name}")
        # Exit code 1 is expected for files that are cut off.
        code = cli.main(
            [
                str(files / source),
                str(h5),
                str(config_path),
                *options,
                "--overwrite",
                "--summary",
                str(report),
            ]
        )
        if code > 1 or not report.exists() or cli.main(["validate", str(h5)]):
            return 1
        cli.main(["plot", str(h5), "--output", str(out / f"{name}.png")])
        summary = json.loads(report.read_text())
        for key in ("files", "events_read", "events_written", "images", "saturated_pixels"):
            total[key] += summary[key]
        total["data_sets"].append(
            {"name": name, **{k: v for k, v in summary.items() if k != "reports"}}
        )
        report.unlink()
    total["mock"] = learn(out)
    total["seconds"] = round(time.perf_counter() - started, 3)
    (out / "summary.json").write_text(json.dumps(total, indent=1) + "\n")
    print(f"\n{'data set':20}{'read':>6}{'written':>9}{'images':>8}{'saturated':>11}{'MB':>7}")
    for d in total["data_sets"]:
        print(
            f"{d['name']:20}{d['events_read']:6}{d['events_written']:9}{d['images']:8}"
            f"{d['saturated_pixels']:11}{d['bytes'] / 1e6:7.1f}"
        )
    print(
        "\nToy showers, which say nothing of real gammas and protons; 95 % intervals in brackets"
        f"\n{leak_table(total['mock'])}\n"
        "AUC: how often a gamma has a higher score than a proton. Energy resolution: half the\n"
        "range of E / true E that holds the middle 68 % of the gammas. Split by event, test\n"
        "events are other uses of showers that were learned from: their scores are too good."
    )
    print(
        f"\nDone in {total['seconds']:.0f} s. See {out}/*.png, {out}/by_shower/roc.png and\n"
        f"image-extractor inspect {out}/gammas_mapped.h5"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
