"""Cut real files down to what the tests need; data/README.md has their sources and licences.

Reads   the folder of whole files given on the command line.
Writes  MAPS_CUT and SPECTRA_CUT, without dates.

    python tests/cut_real_files.py ../shared/data/manga
"""

import gzip
import io
import sys
from pathlib import Path

from astropy.io import fits

DATA = Path(__file__).parent / "data"
MAPS = "manga-7815-3702-MAPS-HYB10-GAU-MILESHC.fits.gz"
MAPS_CUT = DATA / "manga-7815-3702-MAPS-HYB10-GAU-MILESHC-cut.fits.gz"
SPECTRA = "mangadap_MaNGA_test_spectra.fits.gz"
SPECTRA_CUT = DATA / "mangadap_MaNGA_test_spectra-cut.fits.gz"

LINES = (
    "OII-3727", "OII-3729", "HeII-4687", "Hb-4862", "OIII-5008", "Ha-6564", "NII-6585", "SII-6718",
    "SII-6732",
)  # fmt: skip
PLAIN = (
    "SPX_MFLUX", "SPX_SNR", "BINID", "BIN_SNR", "STELLAR_VEL", "STELLAR_VEL_MASK", "STELLAR_SIGMA",
    "STELLAR_CONT_RCHI2",
)  # fmt: skip
BY_LINE = (
    "EMLINE_GFLUX", "EMLINE_GFLUX_IVAR", "EMLINE_GFLUX_MASK", "EMLINE_GEW", "EMLINE_GVEL",
    "EMLINE_GVEL_MASK", "EMLINE_GSIGMA", "EMLINE_GSIGMA_MASK", "EMLINE_INSTSIGMA",
)  # fmt: skip
KEPT = [0, 3, 7]
"""The spectra that are kept."""


def cut_maps(whole: fits.HDUList) -> fits.HDUList:
    """Keep the HDUs PLAIN and, of BY_LINE, the channels LINES; headers stay as they are."""
    cut = fits.HDUList([fits.PrimaryHDU(header=whole[0].header)])
    cut.extend(fits.ImageHDU(whole[name].data, whole[name].header) for name in PLAIN)
    for name in BY_LINE:
        header = whole[name].header.copy()
        channels = {line: card for card, line in header["C??"].items()}
        kept = [int(channels[line][1:]) - 1 for line in LINES]
        for number, card in enumerate(channels.values(), 1):
            if number <= len(LINES):
                header[card] = LINES[number - 1]
            else:
                del header[card]
        cut.append(fits.ImageHDU(whole[name].data[kept], header))
    return cut


def cut_spectra(whole: fits.HDUList) -> fits.HDUList:
    """Keep flux, ivar, mask and redshift of the spectra KEPT."""
    names = ("FLUX", "IVAR", "MASK", "Z")
    cut = [fits.ImageHDU(whole[name].data[KEPT], whole[name].header) for name in names]
    return fits.HDUList([fits.PrimaryHDU(header=whole[0].header), *cut])


def write(hdus: fits.HDUList, path: Path) -> None:
    """Write a gzipped FITS file without dates."""
    for hdu in hdus:
        for card in ("CHECKSUM", "DATASUM"):  # of the whole file
            hdu.header.remove(card, ignore_missing=True)
    hdus[0].header["HISTORY"] = "Cut for tests; source and licence: tests/data/README.md"
    plain = io.BytesIO()
    hdus.writeto(plain)
    path.write_bytes(gzip.compress(plain.getvalue(), 9, mtime=0))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with fits.open(folder / MAPS) as maps, fits.open(folder / SPECTRA) as spectra:
        write(cut_maps(maps), MAPS_CUT)
        write(cut_spectra(spectra), SPECTRA_CUT)
