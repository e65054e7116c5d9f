"""Compare simulated galaxies with real MaNGA files, quantity by quantity.

Reads   --real: the DAP MAPS of 7815-3702 and the real spectra of the DAP's test data;
        --data-dir: LOGCUBE and MAPS of simulated galaxies; without it, galaxies are simulated.
Writes  results/bench/mock_realism.json.

Each row is measured from files, by the same code for real and simulated ones, and says whether the
median of the simulated galaxies lies in the range of the real values. Where only one real value is
at hand the range is that value within 15 %, for correlations within 0.1, or the range in RANGES,
which includes a second real galaxy. Spectra are (band,), maps (y, x); wavelengths in vacuum
Angstrom.

    python benchmarks/mock_realism.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring
import utils
from utils import DataError

import numpy as np

import mock_manga
from archive_files import line_channels

REAL = measuring.ROOT.parent / "shared" / "data" / "manga"
REAL_MAPS = "manga-7815-3702-MAPS-HYB10-GAU-MILESHC.fits.gz"
REAL_SPECTRA = (
    "mangadap_MaNGA_test_spectra.fits.gz",
    "mangadap_MaNGA_multicomp_test_spectra.fits.gz",
)
C_KMS = 299792.458
WAVE = 10 ** (3.5589 + 1e-4 * np.arange(4563))
"""Wavelengths of the cubes' pixels."""
BPT = ("Hb-4862", "OIII-5008", "Ha-6564", "NII-6585")
LABEL_SNR = 10.0
"""S/N of all four BPT lines of the spaxels whose line ratios are compared."""
MIN_SPAXELS = 50
"""Fewer spaxels than these give no value."""
SKY_AA = (
    7242.7, 7279.5, 7319.8, 7343.4, 7719.7, 7753.5, 7796.5, 7825.3, 7856.0, 7915.9, 7967.1, 7996.5,
    8029.7, 8290.9, 8348.3, 8402.3, 8433.3, 8468.4, 8770.0, 8830.8, 8890.0, 8922.8, 8961.9, 9005.3,
    9317.5, 9379.9, 9442.8, 9479.8, 9506.0, 9569.7, 9702.9, 9723.0, 9794.9, 9876.4, 9917.4, 9949.5,
    10016.1, 10085.6, 10127.4,
)  # fmt: skip
"""Telluric emission lines above 7000 Angstrom, vacuum."""
RANGES = {
    "scatter about N2": (0.020, 0.030),
    "[SII] 6718/6732": (1.42, 1.48),
    "gas dispersion": (31.0, 42.0),
    "gas minus stellar velocity": (7.0, 12.0),
    "correlation of O3N2 and N2": (0.10, 0.59),
}
"""Ranges that include values of a second real galaxy, whose file is not at hand."""
TOLERANCE, CORRELATION_TOLERANCE = 0.15, 0.1
"""Half width of the range about a single real value: relative, and of correlations absolute."""

Values = dict[str, float]


@dataclass(frozen=True)
class Config(measuring.Options):
    """Compare simulated galaxies with real MaNGA files, quantity by quantity."""

    real: Path = REAL
    """Folder of the real files."""
    data_dir: Path | None = None
    """Data folder of simulated galaxies; default: some are simulated in a temporary folder."""
    n_galaxies: int = 16
    """Number of galaxies to simulate."""
    bundle: int = 37
    """Fibres in their bundles; the real MAPS file has 37."""
    seed: int = 1
    """Random seed of the galaxies."""


# Maps


def _scatter(x: np.ndarray) -> float:
    """Estimate the standard deviation by the median absolute deviation."""
    return float(1.4826 * np.median(np.abs(x - np.median(x))))


def _lag(values: np.ndarray, distance: int) -> float:
    """Correlation of a map with itself at a distance along y and x; NaN spaxels are left out."""
    centred = values - np.nanmean(values)
    pairs = [
        (centred[distance:], centred[:-distance]),
        (centred[:, distance:], centred[:, :-distance]),
    ]
    product = np.concatenate([(a * b).ravel() for a, b in pairs])
    return float(np.nanmean(product) / np.nanmean(centred**2))


def _local(values: np.ndarray, scale: float = 4.0) -> np.ndarray:
    """Map less its mean over a Gaussian of this scale in spaxels; NaN spaxels are left out."""
    from scipy.ndimage import gaussian_filter

    seen = np.isfinite(values)
    weight = gaussian_filter(seen.astype(float), scale)
    mean = gaussian_filter(np.where(seen, values, 0), scale) / np.maximum(weight, 1e-9)
    return values - mean


def maps_values(path: Path) -> Values:
    """Measure what a MAPS file holds; values that it does not allow are absent."""
    from astropy.io import fits

    with fits.open(path) as f:
        rows = line_channels(f["EMLINE_GFLUX"].header, BPT, path)
        flux, ivar = (f[f"EMLINE_GFLUX{x}"].data.astype(float) for x in ("", "_IVAR"))
        bad = f["EMLINE_GFLUX_MASK"].data != 0
        ha = rows["Ha-6564"]
        sigma = f["EMLINE_GSIGMA"].data[ha].astype(float)
        sigma_bad = f["EMLINE_GSIGMA_MASK"].data[ha] != 0
        instrument = f["EMLINE_INSTSIGMA"].data[ha].astype(float)
        slip = f["EMLINE_GVEL"].data[ha].astype(float) - f["STELLAR_VEL"].data
        star_good = f["STELLAR_VEL_MASK"].data == 0
        snr, mflux = f["BIN_SNR"].data, f["SPX_MFLUX"].data
        spx_snr = f["SPX_SNR"].data
        r_eff_spaxels = f[0].header["REFF"] / 0.5
        # its name, and where the reduced chi2 stands, changed in DR17
        rchi2 = f["STELLAR_FOM"].data[2] if "STELLAR_FOM" in f else f["STELLAR_CONT_RCHI2"].data
    s2n = {k: np.where(bad[i], 0, flux[i] * np.sqrt(ivar[i])) for k, i in rows.items()}
    with np.errstate(all="ignore"):
        n2 = np.log10(flux[rows["NII-6585"]] / flux[ha])
        o3 = np.log10(flux[rows["OIII-5008"]] / flux[rows["Hb-4862"]])
        logoh = 8.533 - 0.214 * (o3 - n2)  # Marino et al. (2013), eq. 2
        forming = (n2 < 0.05) & (o3 < 0.61 / (n2 - 0.05) + 1.3)  # Kauffmann et al. (2003), eq. 1
        doublet = flux[rows["SII-6718"]] / flux[rows["SII-6732"]]
        e_n2, e_o3 = (
            np.hypot(1 / s2n[a], 1 / s2n[b]) / np.log(10)
            for a, b in (("NII-6585", "Ha-6564"), ("OIII-5008", "Hb-4862"))
        )
    out: Values = {}
    good = np.all([s2n[k] > LABEL_SNR for k in BPT], axis=0) & forming
    residual = np.full(n2.shape, np.nan)
    if good.sum() >= MIN_SPAXELS:
        slope, offset = np.polyfit(n2[good], logoh[good], 1)
        residual[good] = logoh[good] - slope * n2[good] - offset
        noise2 = (0.214 * e_o3[good]) ** 2 + ((0.214 - slope) * e_n2[good]) ** 2
        excess = residual[good].var() - noise2.mean()
        out["scatter about N2"] = float(np.sqrt(max(excess, 0)))
        out["correlation of O3N2 and N2"] = float(np.corrcoef(n2[good], logoh[good])[0, 1])
        near = max(round(0.4 * r_eff_spaxels), 1)
        out["correlation of this scatter at 0.4 Re"] = _lag(residual, near)
    pair = (s2n["SII-6718"] > LABEL_SNR) & (s2n["SII-6732"] > LABEL_SNR) & forming
    if pair.sum() >= MIN_SPAXELS:
        out["[SII] 6718/6732"] = float(np.median(doublet[pair]))
    bright = (s2n["Ha-6564"] > LABEL_SNR) & ~sigma_bad
    if bright.sum() >= MIN_SPAXELS:
        width2 = np.maximum(sigma**2 - instrument**2, 0)
        out["gas dispersion"] = float(np.sqrt(np.median(width2[bright])))
        both = bright & star_good & (snr > 10)
        if both.sum() >= MIN_SPAXELS:
            out["gas minus stellar velocity"] = float(slip[both].std())
    middle = np.abs(mflux / 0.1 - 1) < 0.2
    if middle.sum() >= MIN_SPAXELS // 2:
        out["g-band S/N at 0.1"] = float(np.median(spx_snr[middle] / mflux[middle])) * 0.1
        hb = rows["Hb-4862"]
        here = middle & ~bad[hb]
        out["error of Hb at 0.1"] = float(np.median(ivar[hb][here] ** -0.5))
    # a line that is not there shows the noise; the DAP's fluxes are at least 0
    empty = np.where(s2n["HeII-4687"] > 0, s2n["HeII-4687"].clip(0, 4), np.nan)
    for distance in (1, 2, 3):
        out[f"noise correlation at {distance} spaxel(s)"] = _lag(_local(empty), distance)
    low, high = (snr > 5) & (snr < 12) & star_good, (snr > 25) & star_good
    if min(low.sum(), high.sum()) >= MIN_SPAXELS // 2:
        extra = np.maximum(rchi2[high] - np.median(rchi2[low]), 0)
        out["misfit of the continuum"] = float(np.median(np.sqrt(extra) / snr[high]))
    return out


# Spectra


def _mean(wave: np.ndarray, flux: np.ndarray, ivar: np.ndarray, low: float, high: float) -> float:
    """Mean of the good pixels of a band; NaN without any."""
    here = (wave > low) & (wave < high) & (ivar > 0)
    return float(flux[here].mean()) if here.any() else np.nan


def _width(
    wave: np.ndarray,
    flux: np.ndarray,
    ivar: np.ndarray,
    band: tuple[float, float],
    sides: Sequence[tuple[float, float]],
) -> float:
    """Equivalent width in Angstrom of absorption below a line between two continuum bands."""
    levels = [_mean(wave, flux, ivar, *side) for side in sides]
    here = (wave > band[0]) & (wave < band[1]) & (ivar > 0)
    line = np.interp(wave[here], [np.mean(side) for side in sides], levels)
    return float(np.sum((1 - flux[here] / line) * np.gradient(wave[here])))


def star_values(z: float, flux: np.ndarray, ivar: np.ndarray) -> Values:
    """Dn4000 (Balogh et al. 1999), colours and TiO of a spectrum, at rest wavelengths."""
    wave = WAVE / (1 + z)
    f_nu = flux * WAVE**2

    def colour(centre: float) -> float:
        return _mean(wave, flux, ivar, centre - 50, centre + 50) / _mean(
            wave, flux, ivar, 5450, 5550
        )

    return {
        "Dn4000": _mean(wave, f_nu, ivar, 4000, 4100) / _mean(wave, f_nu, ivar, 3850, 3950),
        "f4200/f5500": colour(4200),
        "f7500/f5500": colour(7500),
        "f8700/f5500": colour(8700),
        "TiO 7130": _width(wave, flux, ivar, (7070, 7230), ((7000, 7050), (7240, 7300))),
        "TiO 6230": _width(wave, flux, ivar, (6191, 6273), ((6068, 6143), (6374, 6416))),
    }


def second_differences(flux: np.ndarray, ivar: np.ndarray) -> np.ndarray:
    """Second differences of a spectrum over their stated error; NaN beside lost pixels."""
    with np.errstate(divide="ignore"):
        var = 1 / ivar
    error = np.sqrt(var[:-2] + 4 * var[1:-1] + var[2:])
    out = np.full(flux.shape, np.nan)
    out[1:-1] = (flux[:-2] - 2 * flux[1:-1] + flux[2:]) / error
    out[~np.isfinite(out) | np.r_[True, np.isinf(error), True]] = np.nan
    return out


def noise_values(flux: np.ndarray, ivar: np.ndarray) -> Values:
    """Noise of a spectrum against the stated one, by second differences."""
    chi = second_differences(flux, ivar)
    seen = np.isfinite(chi)
    blue, red = seen & (WAVE > 3800) & (WAVE < 8500), seen & (WAVE > 8500) & (WAVE < 10200)
    at_lines = [chi[seen & (np.abs(WAVE - line) < 6)] for line in SKY_AA]
    rms = [float(np.sqrt(np.mean(x**2))) for x in at_lines if x.size > 5]
    return {
        "chi below 8500": _scatter(chi[blue]),
        "chi above 8500": _scatter(chi[red]),
        "beyond 4 sigma above 8500": float(np.mean(np.abs(chi[red]) > 4) * 100),
        "chi at sky lines, median": float(np.median(rms)),
        "chi at sky lines, 95 %": float(np.percentile(rms, 95)),
    }


def pixel_correlation(flux: np.ndarray, ivar: np.ndarray) -> Values:
    """Correlation of neighbouring pixels of a faint spectrum, 5600 to 8500 Angstrom."""
    from scipy.ndimage import gaussian_filter1d, median_filter

    here = (ivar > 0) & (WAVE > 5600) & (WAVE < 8500)
    chi = (flux - gaussian_filter1d(median_filter(flux, 41), 5)) * np.sqrt(ivar)
    chi = np.where(here, np.clip(chi, -4, 4), np.nan)
    return {
        f"correlation at {d} pixel(s)": float(np.nanmean(chi[d:] * chi[:-d]) / np.nanmean(chi**2))
        for d in (1, 2)
    }


@dataclass(frozen=True)
class Spectrum:
    """A spectrum at redshift z with its stated inverse variances; (band,) each."""

    name: str
    z: float
    flux: np.ndarray
    ivar: np.ndarray

    @property
    def snr(self) -> float:
        """Median S/N per pixel."""
        return float(np.median(self.flux * np.sqrt(self.ivar)))


def real_spectra(folder: Path) -> list[Spectrum]:
    """Real spectra of the DAP's test data."""
    from astropy.io import fits

    out: list[Spectrum] = []
    for name in REAL_SPECTRA:
        with fits.open(folder / name) as f:
            flux, ivar, z = (f[k].data.astype(float) for k in ("FLUX", "IVAR", "Z"))
        out += [Spectrum(f"real {len(out) + i}", z[i], flux[i], ivar[i]) for i in range(z.size)]
    return out


def mock_spectra(cube: Path, maps: Path) -> list[Spectrum]:
    """Read some spectra of a simulated galaxy: two means, the central spaxel and faint ones.

    The means are over 5 x 5 spaxels in the centre and 3 x 3 outside. Their ivar neglects that
    neighbours are correlated: use them for colours only.
    """
    from astropy.io import fits

    with fits.open(maps) as f:
        snr = np.where(f["BINID"].data[0] >= 0, f["SPX_SNR"].data, 0)
    with fits.open(cube) as f:
        z, name = f[0].header["SCINPVEL"] / C_KMS, f[0].header["PLATEIFU"]
        flux, ivar = f["FLUX"].data, f["IVAR"].data
    mid, out = flux.shape[1] // 2, list[Spectrum]()
    for part, y, half in (("centre", mid, 2), ("outside", mid + 7, 1)):
        box = np.s_[:, y - half : y + half + 1, mid - half : mid + half + 1]
        whole = (ivar[box] > 0).all(axis=(1, 2))
        mean_ivar = np.where(whole, (2 * half + 1) ** 2 * ivar[:, y, mid], 0).astype(float)
        mean = flux[box].mean(axis=(1, 2)).astype(float)
        out.append(Spectrum(f"{name} {part}", z, mean, mean_ivar))
    faint = np.argwhere((snr > 1) & (snr < 2))
    for y, x in [(mid, mid), *faint[:: max(len(faint) // 3, 1)][:3]]:
        own = (a[:, y, x].astype(float) for a in (flux, ivar))
        out.append(Spectrum(f"{name} {y},{x}", z, *own))
    return out


def spectra_values(spectra: Sequence[Spectrum], kind: str) -> dict[str, list[float]]:
    """Values of spectra by quantity: colours of star-forming ones, noise, pixel correlation.

    Parameters
    ----------
    kind : {"real", "mock"}
        Real spectra serve for everything; of simulated galaxies means give colours, single spaxels
        the noise.
    """
    out: dict[str, list[float]] = {}

    def add(values: Values, suffix: str = "") -> None:
        for name, value in values.items():
            if np.isfinite(value):
                out.setdefault(name + suffix, []).append(value)

    for s in spectra:
        mean = s.name.endswith(("centre", "outside"))
        if s.snr > 8 and (kind == "real" or mean):
            stars = star_values(s.z, s.flux, s.ivar)
            age = stars.pop("Dn4000")
            if 1.30 < age < 1.55:
                add(stars, ", Dn4000 1.30-1.55")
            elif 1.65 < age < 2.0:
                add(stars, ", Dn4000 1.65-2.00")
        if not mean:
            add(noise_values(s.flux, s.ivar))
            if s.snr < 3:
                add(pixel_correlation(s.flux, s.ivar))
    return out


# The table


def compare(real: dict[str, list[float]], mock: dict[str, list[float]]) -> list[dict[str, Any]]:
    """One row per quantity that both have: values, range of the real ones, verdict."""
    rows = []
    for name in real:
        values = np.array(mock.get(name, []))
        low, high = RANGES.get(name, (min(real[name]), max(real[name])))
        if low == high:
            half = CORRELATION_TOLERANCE if "correlation" in name else TOLERANCE * abs(low)
            low, high = low - half, high + half
        row: dict[str, Any] = {"name": name, "real": real[name], "range": [low, high]}
        if values.size:
            median = float(np.median(values))
            spread = np.percentile(values, (10, 90)).tolist()
            row |= {"mock": median, "mock_10_90": spread, "n_mock": values.size}
            row["in_range"] = bool(low <= median <= high)
        rows.append(row)
    return rows


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print real and simulated values side by side."""
    print(f"{'quantity':<44}{'mock median (10-90 %)':>27}{'real (range)':>27}  within")
    for row in rows:
        low, high = row["range"]
        n, real = len(row["real"]), f"{np.median(row['real']):.3g}"
        wanted = f"{real} of {n} ({low:.3g} to {high:.3g})"
        if "mock" in row:
            spread = "{:.3g} to {:.3g}".format(*row["mock_10_90"])
            ours, verdict = f"{row['mock']:.3g} ({spread})", "yes" if row["in_range"] else "NO"
        else:
            ours, verdict = "not measured", "-"
        print(f"{row['name']:<44}{ours:>27}{wanted:>27}  {verdict}")


def measure(config: Config, data_dir: Path) -> list[dict[str, Any]]:
    """Measure the real files and the simulated galaxies of a data folder."""
    real_maps = maps_values(config.real / REAL_MAPS)
    real = {name: [value] for name, value in real_maps.items()}
    real |= spectra_values(real_spectra(config.real), "real")
    mock: dict[str, list[float]] = {}
    for maps in utils.files_in(data_dir / "raw", "*/*/*-MAPS-*.fits.gz"):
        spectra = mock_spectra(Path(str(maps).replace("-MAPS-", "-LOGCUBE-")), maps)
        found = {k: [v] for k, v in maps_values(maps).items()} | spectra_values(spectra, "mock")
        for name, more in found.items():
            mock.setdefault(name, []).extend(more)
    if not mock:
        raise DataError(
            f"{data_dir}: no MAPS files below raw/. Expected simulated galaxies. Make some with "
            "mock_manga.py."
        )
    return compare(real, mock)


def main(config: Config) -> int:
    """Print the table and write it as JSON; return the exit code."""
    absent = [n for n in (REAL_MAPS, *REAL_SPECTRA) if not (config.real / n).is_file()]
    if absent:
        print(f"skipped: no {absent[0]} in {config.real} (give the folder with --real)")
        return utils.EXIT_DONE
    with tempfile.TemporaryDirectory() as temporary:
        seconds = None
        data_dir = config.data_dir
        if data_dir is None:
            data_dir = Path(temporary)
            survey = mock_manga.MockConfig(
                data_dir=data_dir,
                n_galaxies=config.n_galaxies,
                seed=config.seed,
                bundles=(config.bundle,),
            )
            run: Callable[[], object] = lambda: mock_manga.simulate_survey(survey)  # noqa: E731
            seconds = measuring.timed(run) / config.n_galaxies
        rows = measure(config, data_dir)
    print_table(rows)
    if seconds is not None:
        print(f"simulated and written in {seconds:.2f} s per galaxy of {config.bundle} fibres")
    out = config.results / "mock_realism.json"
    utils.write_json(out, {"rows": rows, "seconds_per_galaxy": seconds})
    return utils.EXIT_DONE


if __name__ == "__main__":
    utils.run_command(main, Config, __doc__)
