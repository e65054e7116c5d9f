"""Header cards of the DAP's DR17 files, and a writer of gzipped FITS with real checksums.

What a LOGCUBE (13 HDUs) and a MAPS file (64 HDUs) hold beside their pixels: names, order and
comments of the cards, channel names, units, partners (ERRDATA, QUALDATA, SCIDATA), after the data
model pages mangaModelCube and mangaMaps of SDSS DR17. The values of the physics come from the
caller; cards that a mock cannot fill (exposure, seeing, versions) carry typical values.

    >>> cards = primary_cards("MAPS", {"PLATEIFU": "13001-1901", "SCINPVEL": 9000.0})
    >>> write_gzipped_fits(path, [primary_hdu(cards), image_hdu("SPX_SNR", snr, header)])
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from isal import igzip

from utils import atomic_path

Card = tuple[str, Any, str]

FITS_BLOCK = 2880
STAMP = "2020-12-25T13:18:00"
"""Time written beside CHECKSUM and DATASUM: fixed, so that the same seed gives the same bytes."""

AUTHOR = "K Westfall <westfall@ucolick.org> & SDSS-IV Data Group"
FLUX_UNIT = "1E-17 erg/s/cm^2/ang/spaxel"
LINE_UNIT = "1E-17 erg/s/cm^2/spaxel"

EMLINES: dict[str, float] = {
    "OII-3727": 3727.092,
    "OII-3729": 3729.875,
    "H12-3751": 3751.219,
    "H11-3771": 3771.704,
    "Hthe-3798": 3798.983,
    "Heta-3836": 3836.479,
    "NeIII-3869": 3869.86,
    "HeI-3889": 3889.749,
    "Hzet-3890": 3890.158,
    "NeIII-3968": 3968.59,
    "Heps-3971": 3971.202,
    "Hdel-4102": 4102.899,
    "Hgam-4341": 4341.691,
    "HeII-4687": 4687.015,
    "Hb-4862": 4862.691,
    "OIII-4960": 4960.295,
    "OIII-5008": 5008.240,
    "NI-5199": 5199.349,
    "NI-5201": 5201.705,
    "HeI-5877": 5877.243,
    "OI-6302": 6302.046,
    "OI-6365": 6365.535,
    "NII-6549": 6549.86,
    "Ha-6564": 6564.632,
    "NII-6585": 6585.271,
    "SII-6718": 6718.295,
    "SII-6732": 6732.674,
    "HeI-7067": 7067.144,
    "ArIII-7137": 7137.76,
    "ArIII-7753": 7753.24,
    "Peta-9017": 9017.384,
    "SIII-9071": 9071.1,
    "Pzet-9231": 9231.546,
    "SIII-9533": 9533.2,
    "Peps-9548": 9548.588,
}
"""The 35 channels of DR17's EMLINE_* HDUs in order, with their vacuum wavelengths in Angstrom
(NIST Atomic Spectra Database, the values of the DAP's line list ELPMPL11)."""

MOMENT_CHANNELS = ("OIId-3728", *list(EMLINES)[1:])
"""Channels of EMLINE_SFLUX and EMLINE_SEW: the [OII] doublet is summed as one."""

SPECTRAL_INDICES = (
    "CN1:mag CN2:mag Ca4227:ang G4300:ang Fe4383:ang Ca4455:ang Fe4531:ang C24668:ang Hb:ang "
    "Fe5015:ang Mg1:mag Mg2:mag Mgb:ang Fe5270:ang Fe5335:ang Fe5406:ang Fe5709:ang Fe5782:ang "
    "NaD:ang TiO1:mag TiO2:mag HDeltaA:ang HGammaA:ang HDeltaF:ang HGammaF:ang CaHK:ang CaII1:ang "
    "CaII2:ang CaII3:ang Pa17:ang Pa14:ang Pa12:ang MgICvD:ang NaICvD:ang MgIIR:ang FeHCvD:ang "
    "NaI:ang bTiO:mag aTiO:mag CaH1:mag CaH2:mag NaISDSS:ang TiO2SDSS:mag D4000: Dn4000: TiOCvD:"
)
"""The 46 channels of the SPECINDEX* HDUs, name:unit."""

BIN_CHANNELS = (
    "Binned spectra",
    "Stellar continua",
    "Em. line moments",
    "Em. line models",
    "Spectral indices",
)
ELL_CHANNELS = (
    ("Elliptical radius", "arcsec"),
    ("R/Re", ""),
    ("R h/kpc", "kpc/h"),
    ("Elliptical azimuth", "degrees"),
)
LW_ELL_CHANNELS = (
    ("Lum. weighted elliptical radius", "arcsec"),
    *ELL_CHANNELS[1:3],
    ("Lum. weighted elliptical azimuth", "degrees"),
)
FOM_CHANNELS = (
    ("rms", FLUX_UNIT),
    ("frms", ""),
    ("rchi2", ""),
    ("68th perc frac resid", ""),
    ("99th perc frac resid", ""),
    ("max frac resid", ""),
    ("68th perc per pix chi", ""),
    ("99th perc per pix chi", ""),
    ("max per pix chi", ""),
)

PRIMARY: tuple[Card, ...] = (
    ("AUTHOR", "K Westfall <westfall@ucolick.org>", ""),
    ("VERSDRP2", "v3_1_1", "MaNGA DRP version (2d processing)"),
    ("VERSDRP3", "v3_1_1", "MaNGA DRP Version (3d processing)"),
    ("VERSPLDS", "v5_1", "Platedesign Version"),
    ("VERSFLAT", "v1_33", "Specflat Version"),
    ("VERSCORE", "v1_9_1", "MaNGAcore Version"),
    ("VERSPRIM", "v2_9", "MaNGA Preimaging Version"),
    ("VERSUTIL", "v5_5_36", "Version of idlutils"),
    ("VERSIDL", "x86_64 linux unix linux 7.1.1 Aug 21 2009 64 64", "Version of IDL"),
    ("TELESCOP", "SDSS 2.5-M", "Sloan Digital Sky Survey"),
    ("INSTRUME", "MaNGA", "SDSS-IV MaNGA IFU"),
    ("SRVYMODE", "MaNGA dither", "Survey leading this observation and its mode"),
    ("PLATETYP", "APOGEE-2&MaNGA", "Type of plate (e.g. MaNGA, APOGEE-2&MANGA)"),
    ("OBJSYS", "ICRS", "The TCC objSys"),
    ("EQUINOX", 2000.0, ""),
    ("RADESYS", "FK5", ""),
    ("LAMPLIST", "lamphgcdne.dat", ""),
    ("TPLDATA", "BOSZ_3000-11000A.fits", ""),
    ("NEXP", 9, "Total number of exposures"),
    ("EXPTIME", 8100.87, "Total exposure time (seconds)"),
    ("BLUESN2", 18.6492, "Total SN2 in blue channel"),
    ("REDSN2", 39.4486, "Total SN2 in red channel"),
    ("AIRMSMIN", 1.03987, "Minimum airmass"),
    ("AIRMSMED", 1.04708, "Median airmass"),
    ("AIRMSMAX", 1.08221, "Maximum airmass"),
    ("SEEMIN", 1.17605, "Best guider seeing"),
    ("SEEMED", 1.30563, "Median guider seeing"),
    ("SEEMAX", 1.42456, "Worst guider seeing"),
    ("TRANSMIN", 0.80467, "Worst guider transparency"),
    ("TRANSMED", 0.831482, "Median guider transparency"),
    ("TRANSMAX", 0.839711, "Best guider transparency"),
    ("MJDMIN", 57132, "MJD of first exposure"),
    ("MJDMED", 57132, "MJD of median exposure"),
    ("MJDMAX", 57132, "MJD of last exposure"),
    ("DATE-OBS", "2015-04-20", "Date of median exposure"),
    ("MJDRED", 59186, "MJD of the reduction"),
    ("DATERED", "2020-12-03", "Date of the reduction"),
    ("MNGTARG1", 2336, "manga_target1 maskbit"),
    ("MNGTARG2", 0, "manga_target2 maskbit"),
    ("MNGTARG3", 0, "manga_target3 maskbit"),
    ("IFURA", 0.0, "IFU R.A. (J2000 deg.)"),
    ("IFUDEC", 0.0, "IFU Dec. (J2000 deg.)"),
    ("OBJRA", 0.0, "Object R.A. (J2000 deg.)"),
    ("OBJDEC", 0.0, "Object Dec. (J2000 deg.)"),
    ("CENRA", 0.0, "Plate center R.A. (J2000 deg.)"),
    ("CENDEC", 0.0, "Plate center Dec. (J2000 deg.)"),
    ("PLATEID", 0, "Current plate"),
    ("DESIGNID", 0, "Current design"),
    ("IFUDSGN", 0, "ifuDesign"),
    ("FRLPLUG", 29, "Plugged ferrule"),
    ("PLATEIFU", "", "PLATEID-ifuDesign"),
    ("CARTID", "3", "Cart(s) used"),
    ("HARNAME", "ma060", "Harness name(s)"),
    ("METFILE", "ma060-56887-3.par", "IFU metrology file(s)"),
    ("MANGAID", "", "MaNGA ID number"),
    ("CATIDNUM", "99", "Primary target input catalog"),
    ("PLTTARG", "plateTargets-99.par", "plateTarget reference file"),
    ("DRP3QUAL", 0, "DRP-3d quality bitmask"),
    ("IFUGLON", 0.0, "IFU Galactic longitude (deg)"),
    ("IFUGLAT", 0.0, "IFU Galactic latitude (deg)"),
    ("EBVGAL", 0.0, "Galactic reddening E(B-V)"),
    ("GFWHM", 2.5, "Reconstructed FWHM in g-band (arcsec)"),
    ("RFWHM", 2.5, "Reconstructed FWHM in r-band (arcsec)"),
    ("IFWHM", 2.5, "Reconstructed FWHM in i-band (arcsec)"),
    ("ZFWHM", 2.5, "Reconstructed FWHM in z-band (arcsec)"),
    ("CHECKSUM", "0" * 16, f"HDU checksum updated {STAMP}"),
    ("DATASUM", "0", f"data unit checksum updated {STAMP}"),
    ("MASKNAME", "", ""),
    ("VERSPY", "3.8.5", "Python version"),
    ("VERSNP", "1.19.4", "Numpy version"),
    ("VERSSCI", "1.5.4", "Scipy version"),
    ("VERSAST", "4.2", "Astropy version"),
    ("VERSPYDL", "0.7.0", "pydl version"),
    ("VERSPPXF", "7.4.3", "pPXF version"),
    ("VERSVBIN", "3.1.4", "VorBin version (if used)"),
    ("VERSDAP", "3.1.0", "MaNGA DAP version"),
    ("DAPTYPE", "", "DAP analysis method"),
    ("DAPFRMT", "", "DAP data file format"),
    ("RDXQAKEY", "SNRG", "Method keyword"),
    ("ECOOPA", 0.0, "Position angle for ellip. coo"),
    ("ECOOELL", 0.0, "Ellipticity (1-b/a) for ellip. coo"),
    ("BBWAVE", 4633.944856459669, "Covariance channel wavelength"),
    ("BBINDEX", 1071, "Covariance channel index"),
    ("REFF", 0.0, ""),
    ("BINKEY", "SPX", "Spectal binning method keyword"),
    ("BINMINSN", 1.0, "Minimum S/N of spectrum to include"),
    ("FSPCOV", 0.8, "Minimum required fraction of good pixels"),
    ("NBINS", 0, "Number of unique spatial bins"),
    ("BINTYPE", "None", "Binning method"),
    ("BINSNR", 1.0, "Voronoi binning minimum S/N"),
    ("BINCOV", "None", "Voronoi binning S/N covariance type"),
    ("STCKOP", "mean", "Stacking operation"),
    ("STCKVREG", "False", "Spectra shifted in velocity before stacked"),
    ("STCKCRMD", "none", "Stacking treatment of covariance"),
    ("STCKCRPR", "None", "Covariance parameter(s)"),
    ("GEXTLAW", "ODonnell", "Galactic extinction law"),
    ("RVGAL", 3.1, "Ratio of total to selective extinction, R(V)"),
    ("VSTEP", 69.02976447828435, "Velocity step per spectral channel."),
    ("SCKEY", "MILESHCMPL11", "Stellar-continuum model keyword"),
    ("SCMINSN", 1.0, "Minimum S/N of spectrum to include"),
    ("SCINPVEL", 0.0, "Initial guess velocity"),
    ("SCINPSIG", 100.0, "Initial guess velocity dispersion"),
    ("NSCMOD", 0, "Number of unique stellar-continuum models"),
    ("SCTYPE", "stellar_kinematics", ""),
    ("SCMETH", "ppxf", ""),
    ("PPXFTPLK", "MILESHC", "Template library key used with pPXF"),
    ("PPXFMODE", "nonzero_templates", "pPXF iteration mode"),
    ("PPXFBIAS", "None", "pPXF bias value"),
    ("PPXFAO", 8, "Additive order in pPXF"),
    ("PPXFMO", -1, "Multiplicative order in pPXF"),
    ("PPXFFAO", 8, "Additive order for filtered spectra"),
    ("PPXFFMO", 0, "Multiplicative order for filtered spectra"),
    ("PPXFMOM", 2, "Number of fitted LOSVD moments in pPXF"),
    ("PPXFRBOX", 100, "pPXF rejection boxcar"),
    ("PPXFFILT", 0, "pPXF number of filtering iterations"),
    ("ELMKEY", "EMOMMPL11", "Emission-line moments database keyword"),
    ("ELMMINSN", 0.0, "Minimum S/N of spectrum to include"),
    ("ARTDB", "BADSKY", "Artifact database keyword"),
    ("MOMDB", "ELBMPL9", "Emission-line moments database keyword"),
    ("ELFKEY", "EFITMPL11SSPDB", "Emission-line modeling method keyword"),
    ("ELMREBIN", False, "Bin IDs disconnected from SC binning"),
    ("ELFMINSN", 0.0, "Minimum S/N of spectrum to include"),
    ("EMLDB", "ELPMPL11", "Emission-line database keyword"),
    ("NELMOD", 0, "Number of unique emission-line models"),
    ("ELTYPE", "emission_line", ""),
    ("ELMETH", "sasuke", ""),
    ("ELREBIN", False, "Bin IDs disconnected from SC binning"),
    ("SIKEY", "INDXEN", "Spectral-index database keyword"),
    ("SIMINSN", 0.0, "Minimum S/N of spectrum to include"),
    ("SIFWHM", -1.0, "FWHM of index system resolution (ang)"),
    ("ABSDB", "EXTINDX", "Absorption-index database keyword"),
    ("BHDDB", "BHBASIC", "Bandhead-index database keyword"),
    ("SICORR", True, "Velocity dispersion corrections computed"),
    ("SIREBIN", False, "Bin IDs disconnected from SC binning"),
    ("SNRGMED", 0.0, "Median g-band SNR from 1-1.5 Re"),
    ("SNRGRING", 0.0, "g-band SNR in 1-1.5 Re bin"),
    ("SNRRMED", 0.0, "Median r-band SNR from 1-1.5 Re"),
    ("SNRRRING", 0.0, "r-band SNR in 1-1.5 Re bin"),
    ("SNRIMED", 0.0, "Median i-band SNR from 1-1.5 Re"),
    ("SNRIRING", 0.0, "i-band SNR in 1-1.5 Re bin"),
    ("SNRZMED", 0.0, "Median z-band SNR from 1-1.5 Re"),
    ("SNRZRING", 0.0, "z-band SNR in 1-1.5 Re bin"),
    ("DAPQUAL", 0, "DAP quality bitmask"),
)
"""Primary header of a MAPS file, card by card; a LOGCUBE has all but MAPS_ONLY."""

MAPS_ONLY = frozenset(
    "ELMKEY ELMMINSN MOMDB ELMREBIN SIKEY SIMINSN SIFWHM ABSDB BHDDB SICORR SIREBIN SNRGMED "
    "SNRGRING SNRRMED SNRRRING SNRIMED SNRIRING SNRZMED SNRZRING".split()
)


def primary_hdu(form: str, values: Mapping[str, Any]) -> fits.PrimaryHDU:
    """Primary HDU of a LOGCUBE or MAPS file.

    Parameters
    ----------
    form : {"LOGCUBE", "MAPS"}
    values : dict
        Cards that the galaxy sets (PLATEIFU, SCINPVEL, ...); others keep their typical value.

    Raises
    ------
    KeyError
        If `values` names a card that the files do not have.
    """
    set_here = {"DAPFRMT": form, "MASKNAME": mask_name(form), **values}
    unknown = set_here.keys() - {key for key, _, _ in PRIMARY}
    if unknown:
        raise KeyError(f"no such card in a DR17 {form}: {', '.join(sorted(unknown))}")
    hdu = fits.PrimaryHDU()
    for key, value, comment in PRIMARY:
        if form == "MAPS" or key not in MAPS_ONLY:
            hdu.header[key] = (set_here.get(key, value), comment)
    if form == "LOGCUBE":
        artefacts = hdu.header.cards["ARTDB"]
        del hdu.header["ARTDB"]
        hdu.header.insert("ELFMINSN", artefacts, after=True)
    hdu.add_checksum(when=STAMP)
    return hdu


def mask_name(form: str) -> str:
    """Name of the mask bit set of a file form (sdssMaskbits.par)."""
    return "MANGA_DAPSPECMASK" if form == "LOGCUBE" else "MANGA_DAPPIXMASK"


def wcs_cards(ra: float, dec: float, size: int, kind: str) -> list[Card]:
    """World coordinates of an image or cube.

    Parameters
    ----------
    ra, dec : float
        Centre of the bundle, degrees J2000.
    size : int
        Spaxels on a side; the centre is pixel size/2 counted from 0.
    kind : {"spectral", "channel", "image"}
        Third axis: logarithmic vacuum wavelength in m, a channel number, or none.
    """
    dims = (1, 2) if kind == "image" else (1, 2, 3)
    third = {
        "spectral": {"PC3_3": 8.33903304339e-11, "CRVAL3": 3.62159598486e-07},
        "channel": {"CRVAL3": 1.0},
        "image": {},
    }[kind]
    cards: list[Card] = [("WCSAXES", len(dims), "Number of coordinate axes")]
    for i in dims:
        pixel = 1.0 if i == 3 else size / 2 + 1
        cards.append((f"CRPIX{i}", pixel, "Pixel coordinate of reference point"))
    matrix = {"PC1_1": -0.000138889, "PC2_2": 0.000138889}
    if kind == "spectral":
        matrix["PC3_3"] = third["PC3_3"]
    cards += [(k, v, "Coordinate transformation matrix element") for k, v in matrix.items()]
    step = {1: "[deg] ", 2: "[deg] ", 3: "[m] " if kind == "spectral" else ""}
    cards += [(f"CDELT{i}", 1.0, f"{step[i]}Coordinate increment at reference point") for i in dims]
    units = {1: "deg", 2: "deg"} | ({3: "m"} if kind == "spectral" else {})
    cards += [(f"CUNIT{i}", u, "Units of coordinate increment and value") for i, u in units.items()]
    cards.append(("CTYPE1", "RA---TAN", "Right ascension, gnomonic projection"))
    cards.append(("CTYPE2", "DEC--TAN", "Declination, gnomonic projection"))
    if kind == "spectral":
        cards.append(("CTYPE3", "WAVE-LOG", "Vacuum wavelength"))
    elif kind == "channel":
        cards.append(("CTYPE3", "", "Undefined type"))
    cards.append(("CRVAL1", ra, "[deg] Coordinate value at reference point"))
    cards.append(("CRVAL2", dec, "[deg] Coordinate value at reference point"))
    if 3 in dims:
        cards.append(("CRVAL3", third["CRVAL3"], f"{step[3]}Coordinate value at reference point"))
    cards += [
        ("LONPOLE", 180.0, "[deg] Native longitude of celestial pole"),
        ("LATPOLE", dec, "[deg] Native latitude of celestial pole"),
        ("MJDREF", 0.0, "[d] MJD of fiducial time"),
        ("DATE-OBS", "2015-04-20", "Date of median exposure"),
        ("MJD-OBS", 57132.0, "[d] MJD for DATE-OBS"),
        ("RADESYS", "FK5", "Equatorial coordinate system"),
        ("EQUINOX", 2000.0, "[yr] Equinox of equatorial coordinates"),
    ]
    if kind == "channel":
        cards.append(("CUNIT3", "", "Undefined units"))
    return cards


def channel_cards(names: Sequence[str], units: Sequence[str] | None = None) -> list[Card]:
    """Cards C01, U01, .. (C1, U1, .. for fewer than ten channels) that name the channels."""
    digits = len(str(len(names)))
    cards: list[Card] = []
    for i, name in enumerate(names, 1):
        cards.append((f"C{i:0{digits}d}", name, f"Data in channel {i}"))
        if units is not None:
            cards.append((f"U{i:0{digits}d}", units[i - 1], f"Units of data in channel {i}"))
    return cards


def image_hdu(
    name: str,
    data: np.ndarray,
    wcs: Sequence[Card] = (),
    *,
    mask_set: str = "MANGA_DAPPIXMASK",
    channels: Sequence[Card] = (),
    unit: str = "",
    data_class: str = "IMAGE",
    role: str = "DATA",
    partners: Mapping[str, str] | None = None,
    extra: Sequence[Card] = (),
) -> fits.ImageHDU:
    """Image HDU with the cards of DR17 in their order, checksums included.

    Parameters
    ----------
    name : str
        EXTNAME.
    data : array
        float32, int32 or int16.
    wcs : list of cards
        Empty for the plain vectors WAVE and REDCORR, which have no other cards either.
    mask_set : str
        MASKNAME.
    channels : list of cards
    unit : str
        BUNIT; of an inverse variance the squared reciprocal is written.
    data_class : {"IMAGE", "CUBE"}
        HDUCLAS1.
    role : {"DATA", "ERROR", "QUALITY"}
        HDUCLAS2; sets HDUCLAS3.
    partners : dict
        SCIDATA, ERRDATA, QUALDATA as the real files have them.
    extra : list of cards
        After MASKNAME.
    """
    hdu = fits.ImageHDU(data)
    header = hdu.header
    cards: list[Card] = [*wcs]
    if wcs:
        cards += [("AUTHOR", AUTHOR, ""), ("MASKNAME", mask_set, ""), *extra, *channels]
        if unit:
            value = f"({unit})^{{-2}}" if role == "ERROR" else unit
            cards.append(("BUNIT", value, "Unit of pixel value"))
        cards.append(("HDUCLASS", "SDSS", "SDSS format class"))
        cards.append(("HDUCLAS1", data_class, "Data format"))
        cards.append(("HDUCLAS2", role, ""))
        if role == "ERROR":
            cards.append(("HDUCLAS3", "INVMSE", "Value is inverse mean-square error"))
        elif role == "QUALITY":
            bits = 8 * data.dtype.itemsize
            cards.append(("HDUCLAS3", f"FLAG{bits}BIT", f"{bits}-bit mask"))
        meaning = {
            "SCIDATA": "Associated data extension",
            "ERRDATA": "Associated inv. variance extension",
            "QUALDATA": "Associated quality extension",
        }
        cards += [(k, (partners or {})[k], c) for k, c in meaning.items() if k in (partners or {})]
    cards.append(("EXTNAME", name, "extension name"))
    for key, value, comment in cards:
        header[key] = (value, comment)
    hdu.add_checksum(when=STAMP)
    return hdu


def quantity_hdus(
    name: str,
    data: np.ndarray,
    ivar: np.ndarray | None,
    mask: np.ndarray | None,
    wcs: Sequence[Card],
    channels: Sequence[Sequence[Card]] = ((), (), ()),
    **cards: Any,
) -> list[fits.ImageHDU]:
    """HDUs of a quantity: data, <name>_IVAR and <name>_MASK, each naming its partners.

    Parameters
    ----------
    name : str
    data, ivar : float32 arrays
    mask : int32 array or None
    wcs : list of cards
    channels : cards of data, ivar and mask
    **cards
        unit, data_class for `image_hdu`.
    """
    err, qual = f"{name}_IVAR", f"{name}_MASK"
    quality = {"QUALDATA": qual} if mask is not None else {}
    out = []
    partners = ({"ERRDATA": err} if ivar is not None else {}) | quality
    out.append(image_hdu(name, data, wcs, channels=channels[0], partners=partners, **cards))
    if ivar is not None:
        partners = {"SCIDATA": name} | quality
        out.append(
            image_hdu(
                err, ivar, wcs, channels=channels[1], role="ERROR", partners=partners, **cards
            )
        )
    if mask is not None:
        partners = {"SCIDATA": name} | ({"ERRDATA": err} if ivar is not None else {})
        cards = {k: v for k, v in cards.items() if k != "unit"}
        out.append(
            image_hdu(
                qual, mask, wcs, channels=channels[2], role="QUALITY", partners=partners, **cards
            )
        )
    return out


def write_gzipped_fits(
    path: Path, hdus: Iterable[fits.PrimaryHDU | fits.ImageHDU], level: int = 1
) -> None:
    """Write HDUs one by one into a .fits.gz, whole or not at all.

    The same HDUs give the same bytes: the gzip header holds neither a name nor a time. An HDU is
    let go before the next one is asked for, so that a generator keeps the memory low.

    Parameters
    ----------
    path : Path
    hdus : iterable of HDU
    level : int
        igzip's compression level, 0 to 3.
    """
    with (
        atomic_path(path) as part,
        part.open("wb") as raw,
        igzip.IGzipFile(filename="", mode="wb", compresslevel=level, fileobj=raw, mtime=0) as out,
    ):
        for hdu in hdus:
            out.write(hdu.header.tostring().encode("ascii"))
            if hdu.data is not None:
                data = np.ascontiguousarray(hdu.data, hdu.data.dtype.newbyteorder(">"))
                out.write(memoryview(data).cast("B"))
                out.write(bytes(-data.nbytes % FITS_BLOCK))
