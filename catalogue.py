"""Read redshifts and identities of galaxies from the survey's catalogues, dapall and drpall."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits

from utils import DataError


def catalogue_row(path: Path, plateifu: str) -> dict[str, Any]:
    """Redshift and identity of a galaxy from the dapall or drpall catalogue.

    Returns
    -------
    dict with plateifu, mangaid, redshift

    Raises
    ------
    DataError
        If the catalogue does not hold the galaxy, or no redshift of it.
    """
    return catalogue_rows(path, (plateifu,))[plateifu]


def catalogue_rows(path: Path, plateifus: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Rows of a dapall or drpall catalogue by plateifu; all of them, or those asked for.

    The redshift is NSA_Z, else Z (in drpall nsa_z, else z); negative values mean none.

    Raises
    ------
    DataError
        If a galaxy asked for is not there.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"{path}: no such catalogue. Fetch it with download_utils.py --catalogue, or check "
            "--catalogue."
        )
    rows: dict[str, dict[str, Any]] = {}
    try:
        with fits.open(path) as hdus:
            for hdu in hdus[1:]:
                if not isinstance(hdu, fits.BinTableHDU):
                    continue
                names = {n.lower(): n for n in hdu.columns.names}
                if "plateifu" not in names:
                    continue
                z_names = [names[n] for n in ("nsa_z", "z") if n in names]
                columns = [hdu.data[names["plateifu"]], hdu.data[names["mangaid"]]]
                for i, (key, mangaid) in enumerate(zip(*columns, strict=True)):
                    key = key.strip()
                    if key in rows or (plateifus is not None and key not in plateifus):
                        continue
                    values = [float(hdu.data[n][i]) for n in z_names]
                    good = [v for v in values if np.isfinite(v) and v > -0.01]
                    rows[key] = {
                        "plateifu": key,
                        "mangaid": mangaid.strip(),
                        "redshift": good[0] if good else None,
                    }
    except (OSError, TypeError, ValueError) as error:  # what astropy makes of a file cut short
        raise DataError(
            f"{path}: not a readable catalogue ({error}). Fetch it again with download_utils.py "
            "--catalogue."
        ) from None
    for key in plateifus or ():
        if key not in rows:
            raise DataError(
                f"{path}: no galaxy {key} in the catalogue. Check --plateifu, or give --redshift."
            )
    return rows
