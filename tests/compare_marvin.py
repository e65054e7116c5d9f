"""Compare label maps with marvin, the survey's own tool, galaxy by galaxy: `make test-marvin`.

Runs in an environment of its own (requirements-marvin.txt), on simulated MAPS of DR17 and, if it is
there, on the whole MAPS file of a real galaxy. For each galaxy:

* `process_map` is given the `marvin.tools.Maps` itself;
* the spaxels that have all four lines at S/N > 3, the star-forming ones and the AGN have to be the
  same as those of `Maps.get_bpt` in the [N II] diagram;
* composites have to lie between the same two curves. marvin's own mask of composites is smaller:
  it demands that they be star-forming in the [S II] and [O I] diagrams as well;
* the logarithmic ratios N2 and O3N2 have to agree to 1e-5 dex, more than float32 rounds;
* `ModelCube` has to read the LOGCUBE, with the arrays that we read.

The real file is of an unreleased version of the DAP (2.2.3dev), which marvin refuses: the header of
a copy says 2.2.1, the version of DR15.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from astropy.io import fits

import archive_files
import data_io
import fits_utils
import labels

with warnings.catch_warnings():  # of a missing drpall, which is not needed here
    warnings.simplefilter("ignore")
    from marvin.tools import Maps, ModelCube
    from marvin.utils.dap.bpt import kewley_comp_nii, kewley_sf_nii

REAL = (
    Path(__file__).parents[2] / "shared/data/manga/manga-7815-3702-MAPS-HYB10-GAU-MILESHC.fits.gz"
)
MIN_SNR = 3.0


def compare(maps: Maps, folder: Path) -> list[str]:
    """List what differs between our label map and marvin's; print the counts."""
    target = folder / "BPT" / f"{maps.plateifu}.npy"
    fits_utils.process_map(maps, target, "BPT", fits_utils.LabelOptions())
    ours = data_io.read_labels(target)
    masks = maps.get_bpt(snr_min=MIN_SNR, show_plot=False, return_figure=False)
    line_maps, _, _ = archive_files.read_line_maps(Path(maps.filename), labels.BPT_LINES)
    marvins = {}
    for name, above, below in (("N2", "nii_6585", "ha_6564"), ("O3", "oiii_5008", "hb_4862")):
        flux = [maps[f"emline_gflux_{line}"].value for line in (above, below)]
        with np.errstate(all="ignore"):
            marvins[name] = np.log10(flux[0] / flux[1])
    x, y = marvins["N2"], marvins["O3"]
    labelled = ours != labels.LABEL_NONE
    between = (y > kewley_sf_nii(x)) & (y < kewley_comp_nii(x)) & (x < 0.05)
    checks = {
        "spaxels with four lines": (~masks["invalid"]["nii"], labelled),
        "star-forming": (masks["sf"]["nii"], ours == labels.SF),
        "AGN": (masks["agn"]["nii"], ours == labels.AGN),
        "composite": (between & labelled, ours == labels.COMPOSITE),
    }
    marvin_composites = masks["comp"]["nii"]
    differ = [name for name, (theirs, own) in checks.items() if not np.array_equal(theirs, own)]
    if not (ours == labels.COMPOSITE)[marvin_composites].all():
        differ.append("marvin's own composites")
    ratios = {"N2": x, "O3N2": y - x}
    errors = [
        np.abs(labels.log_ratio(line_maps, name)[0] - theirs) for name, theirs in ratios.items()
    ]
    error = np.max(errors, axis=0)[labelled].max(initial=0)
    if not error < 1e-5:
        differ.append(f"N2 or O3N2, by {error:.1g} dex")
    counts = ", ".join(f"{name} {int(own.sum())}" for name, (_, own) in checks.items())
    print(
        f"{maps.plateifu}: {counts} (marvin's composites, also by [S II] and [O I]: "
        f"{int(marvin_composites.sum())}); N2 and O3N2 within {error:.1g} dex; "
        f"{'differs: ' + '; '.join(differ) if differ else 'all equal'}"
    )
    return differ


def compare_cube(path: Path) -> list[str]:
    """List what marvin reads otherwise than it stands in a LOGCUBE."""
    cube = ModelCube(filename=str(path), release="DR17")
    with fits.open(path) as hdus:
        wave, flux = hdus["WAVE"].data, hdus["FLUX"].data
    is_same = {
        "wavelengths": np.array_equal(cube.binned_flux.wavelength.value, wave),
        "flux": np.array_equal(cube.binned_flux.value, flux),
    }
    return [f"{path.name}: {name}" for name, same in is_same.items() if not same]


def main(data_dir: Path) -> int:
    """Compare every MAPS file of a data folder, and the real one; return the exit code."""
    simulated = sorted(data_dir.glob("raw/*/*/*-MAPS-*.fits.gz"))
    if not simulated:
        print(f"error: {data_dir}: no MAPS files in raw/. Simulate some with mock_manga.py")
        return 2
    differ: list[str] = []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in simulated:
            differ += compare(Maps(filename=str(path), release="DR17"), Path(folder))
            differ += compare_cube(Path(str(path).replace("-MAPS-", "-LOGCUBE-")))
        if REAL.is_file():
            copy = Path(folder) / REAL.name
            with fits.open(REAL) as hdus:
                hdus[0].header["VERSDAP"] = "2.2.1"
                hdus.writeto(copy, checksum=True)
            differ += compare(Maps(filename=str(copy), release="DR15"), Path(folder))
        else:
            print(f"not compared: {REAL.name}, which is not there")
    print(f"{len(differ)} differences" + "".join(f"\n  {d}" for d in differ))
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
