"""Demonstrate the extraction of real files: data sets of both storage modes, summaries, pictures.

Reads   simtel files of eventio's source distribution, which sample_files.py downloads once.
Writes  to the given folder: HDF5 files of several arrays and storage modes, PNG pictures,
        summary.json.

    python scripts/demo.py ../results/demo-cta
"""

import json
import sys
import time
from pathlib import Path

import sample_files

from image_extractor import cli

PACKAGE = Path(__file__).resolve().parents[1]
GAMMAS = "gamma_test.simtel.gz"
SST_GAMMAS = "gamma_20deg_0deg_run102___cta-prod4-sst-1m_desert-2150m-Paranal-sst-1m.simtel.gz"
CUT_OFF = "gamma_test_large_truncated.simtel.gz"  # LSTs, MSTs with FlashCam, SSTs with ASTRICam
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
    total["seconds"] = round(time.perf_counter() - started, 3)
    (out / "summary.json").write_text(json.dumps(total, indent=1) + "\n")
    print(f"\n{'data set':20}{'read':>6}{'written':>9}{'images':>8}{'saturated':>11}{'MB':>7}")
    for d in total["data_sets"]:
        print(
            f"{d['name']:20}{d['events_read']:6}{d['events_written']:9}{d['images']:8}"
            f"{d['saturated_pixels']:11}{d['bytes'] / 1e6:7.1f}"
        )
    print(
        f"\nDone in {total['seconds']:.0f} s. See {out}/*.png, {out}/summary.json and\n"
        f"image-extractor inspect {out}/gammas_mapped.h5"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
