"""Read redshifts and identities of galaxies from the survey's catalogues, dapall and drpall."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import utils
from utils import DataError

import numpy as np
from astropy.io import fits

import fits_stream


def catalogue_row(path: Path, plateifu: str) -> dict[str, Any]:
    """Redshift and identity of one galaxy, which must be listed, as in `catalogue_rows`."""
    rows = catalogue_rows(path, plateifu)
    if plateifu not in rows:
        raise DataError(
            f"{path}: no galaxy {plateifu} in the catalogue. Check --plateifu, or give --redshift."
        )
    return rows[plateifu]


def catalogue_rows(path: Path, plateifu: str | None = None) -> dict[str, dict[str, Any]]:
    """Rows of a catalogue by plateifu, each with mangaid and redshift; all, or that of one galaxy.

    The redshift is NSA_Z, else Z (in drpall nsa_z, else z); None where neither is above -0.01.
    """
    rows, is_catalogue = dict[str, dict[str, Any]](), False
    remedy = "Fetch it with download_utils.py --catalogue --overwrite, or check --catalogue."
    with utils.reading(path, "a dapall or drpall catalogue", remedy):
        fits_stream.check_whole(path)
        with fits.open(path) as hdus:
            for hdu in (hdu for hdu in hdus[1:] if isinstance(hdu, fits.BinTableHDU)):
                names = {name.lower() for name in hdu.columns.names}
                if "plateifu" not in names:
                    continue
                table, is_catalogue = hdu.data, True
                redshift = np.full(len(table), np.nan)
                for name in ("z", "nsa_z"):  # the latter takes precedence
                    if name in names:
                        values = np.asarray(table[name], float)
                        redshift = np.where(values > -0.01, values, redshift)
                for key, mangaid, z in zip(
                    table["plateifu"], table["mangaid"], redshift.tolist(), strict=True
                ):
                    if plateifu in (None, key.strip()):
                        row = {
                            "mangaid": mangaid.strip(),
                            "redshift": z if np.isfinite(z) else None,
                        }
                        rows.setdefault(key.strip(), row)
    if not is_catalogue:
        raise DataError(
            f"{path}: no table with a column plateifu, expected a dapall or drpall catalogue. "
            "Check --catalogue."
        )
    return rows
