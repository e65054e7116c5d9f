"""Write simulated galaxies in the format of the DAP's DR17 files: HDUs, cards, checksums, gzip.

Writes  raw/<plate>/<ifu>/manga-<plateifu>-{LOGCUBE,MAPS}-<daptype>.fits.gz.

A LOGCUBE has 13 HDUs, a MAPS file 64. Names, order and comments of the cards, channel names, units
and the cards that link a quantity to its errors and mask (ERRDATA, QUALDATA, SCIDATA) follow the
SDSS DR17 data model pages mangaModelCube and mangaMaps. Pixels come from a `Galaxy`; cards that a
simulation cannot fill (exposures, versions) carry typical values. Cubes are (band, y, x), maps
(y, x) or (channel, y, x).

    >>> write_gzipped_fits(path, maps_hdus(galaxy))
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils import atomic_path, raw_dir

import numpy as np
from astropy.io import fits
from isal import igzip

from fits_stream import FITS_BLOCK
from mock.physics import (
    C_KMS,
    DEADFIBER,
    DONOTUSE,
    EMLINES,
    FITFAILED,
    FORESTAR,
    LOWCOV,
    MATHERROR,
    N_BANDS,
    NEARBOUND,
    NOCOV,
    NOVALUE,
    SPAXEL_ARCSEC,
    SPEC_ARTIFACT,
    SPEC_FITIGNORED,
    SPEC_FLUXINVALID,
    SPEC_FORESTAR,
    SPEC_IGNORED,
    SPEC_IVARINVALID,
    SPEC_NOMODEL,
    Galaxy,
    angular_distance_mpc_h,
    elliptical_coordinates,
    instrument_sigma_kms,
    sky_offsets,
    to_image,
    wave_grid,
)

Card = tuple[str, Any, str]

STAMP = "2020-12-25T13:18:00"
"""Time in the comments of CHECKSUM and DATASUM: constant, so that a seed gives identical files."""

AUTHOR = "K Westfall <westfall@ucolick.org> & SDSS-IV Data Group"
FLUX_UNIT = "1E-17 erg/s/cm^2/ang/spaxel"
LINE_UNIT = "1E-17 erg/s/cm^2/spaxel"

MOMENT_CHANNELS = ("OIId-3728", *list(EMLINES)[1:])
"""Channels of EMLINE_SFLUX and EMLINE_SEW: the first is the sum of the [OII] doublet."""

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

MAX_V_ERROR_KMS = 30.0
"""Largest velocity error at which a line fit counts as free of its bounds (NEARBOUND beyond)."""

MAPS_ONLY = frozenset(
    "ELMKEY ELMMINSN MOMDB ELMREBIN SIKEY SIMINSN SIFWHM ABSDB BHDDB SICORR SIREBIN SNRGMED "
    "SNRGRING SNRRMED SNRRRING SNRIMED SNRIRING SNRZMED SNRZRING".split()
)


def raw_file(data_dir: Path, plateifu: str, form: str, daptype: str) -> Path:
    """Path of a galaxy's LOGCUBE or MAPS file, named as in the archive."""
    return raw_dir(data_dir, plateifu) / f"manga-{plateifu}-{form}-{daptype}.fits.gz"


@functools.cache
def primary_cards() -> fits.Header:
    """Primary header of a MAPS file, card by card; a LOGCUBE has all cards but MAPS_ONLY."""
    return fits.Header.fromtextfile(Path(__file__).with_name("primary_header.txt"))


def primary_hdu(form: str, values: Mapping[str, Any]) -> fits.PrimaryHDU:
    """Primary HDU of a LOGCUBE or MAPS file.

    Parameters
    ----------
    form : {"LOGCUBE", "MAPS"}
    values : dict
        Cards that depend on the galaxy (PLATEIFU, SCINPVEL, ...); others keep typical values.

    Raises
    ------
    KeyError
        If `values` names a card that the files do not have.
    """
    set_here = {"DAPFRMT": form, "MASKNAME": mask_name(form), **values}
    unknown = set_here.keys() - primary_cards().keys()
    if unknown:
        raise KeyError(f"{', '.join(sorted(unknown))}: no such card in a DR17 {form} file.")
    hdu = fits.PrimaryHDU()
    for key, value, comment in primary_cards().cards:
        if form == "MAPS" or key not in MAPS_ONLY:
            hdu.header[key] = (set_here.get(key, value), comment)
    if form == "LOGCUBE":
        artefacts = hdu.header.cards["ARTDB"]
        del hdu.header["ARTDB"]
        hdu.header.insert("ELFMINSN", artefacts, after=True)
    hdu.add_checksum(when=STAMP)
    return hdu


def mask_name(form: str) -> str:
    """Name of the set of mask bits in a LOGCUBE or MAPS file (sdssMaskbits.par)."""
    return "MANGA_DAPSPECMASK" if form == "LOGCUBE" else "MANGA_DAPPIXMASK"


def wcs_cards(ra: float, dec: float, size: int, kind: str) -> list[Card]:
    """World coordinates of an image or cube.

    Parameters
    ----------
    ra, dec : float
        Centre of the bundle, degrees J2000.
    size : int
        Spaxels per side; the centre is pixel size/2, counted from 0.
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
    """Cards that name the channels and their units: C01, U01, ... (C1, U1, ... below ten)."""
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
        World coordinates; empty for the vectors WAVE and REDCORR, which have no further cards.
    mask_set : str
        MASKNAME.
    channels : list of cards
        From `channel_cards`.
    unit : str
        BUNIT of the quantity; role "ERROR" writes the unit of its inverse variance.
    data_class : {"IMAGE", "CUBE"}
        HDUCLAS1.
    role : {"DATA", "ERROR", "QUALITY"}
        HDUCLAS2; sets HDUCLAS3.
    partners : dict
        Values of SCIDATA, ERRDATA and QUALDATA.
    extra : list of cards
        Inserted after MASKNAME.
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
    """HDUs of a quantity: data, <name>_IVAR and <name>_MASK, each with cards naming the others.

    Parameters
    ----------
    name : str
    data, ivar : float32 arrays
        ivar may be None.
    mask : int32 array or None
    wcs : list of cards
    channels : three lists of cards
        Channel cards of data, ivar and mask.
    **cards
        unit and data_class of `image_hdu`.
    """
    of_role = {
        "DATA": (name, data),
        "ERROR": (f"{name}_IVAR", ivar),
        "QUALITY": (f"{name}_MASK", mask),
    }
    links = dict(zip(of_role, ("SCIDATA", "ERRDATA", "QUALDATA"), strict=True))
    out = []
    for (role, (own, array)), named in zip(of_role.items(), channels, strict=True):
        if array is None:
            continue
        partners = {
            links[other]: extension
            for other, (extension, values) in of_role.items()
            if other != role and values is not None
        }
        used = {k: v for k, v in cards.items() if (role, k) != ("QUALITY", "unit")}
        out.append(image_hdu(own, array, wcs, channels=named, role=role, partners=partners, **used))
    return out


def write_gzipped_fits(
    path: Path, hdus: Iterable[fits.PrimaryHDU | fits.ImageHDU], level: int = 1
) -> None:
    """Write HDUs one by one into a .fits.gz, whole or not at all.

    The same HDUs give the same bytes: the gzip header holds neither a name nor a time. Each HDU is
    released before the next is requested, so that a generator of HDUs needs little memory.

    Parameters
    ----------
    path : Path
    hdus : iterable of HDU
    level : int
        Compression level of igzip, 0 to 3.
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
                out.write(data.reshape(-1).view(np.uint8).data)
                out.write(bytes(-data.nbytes % FITS_BLOCK))


# HDUs of the two files


def _bin_ids(galaxy: Galaxy) -> np.ndarray:
    """Bin numbers (5, y, x) int32: one spaxel per bin, -1 where there is no bin."""
    if galaxy.scene.bin_ids is not None:
        return galaxy.scene.bin_ids
    ids = np.where(galaxy.binned, np.cumsum(galaxy.binned) - 1, -1)
    return np.repeat(to_image(galaxy.scene, ids, -1, "i4")[None], 5, axis=0)


def logcube_hdus(galaxy: Galaxy) -> Iterator[fits.PrimaryHDU | fits.ImageHDU]:
    """Yield the 13 HDUs of a DAP LOGCUBE, one after the other.

    Outside the field of view, and in spaxels that are in no bin, FLUX, IVAR and the models are 0
    and flagged. The models are reddened by the Milky Way, like FLUX. STELLAR ends at 7409 Angstrom
    (rest frame), where the MILES templates of the DAP end.
    """
    scene = galaxy.scene
    n_bins = int(galaxy.binned.sum())
    cards = {"NBINS": n_bins, "NSCMOD": n_bins, "NELMOD": n_bins} | scene.cards
    ra, dec = cards["IFURA"], cards["IFUDEC"]
    wcs = wcs_cards(ra, dec, scene.size, "spectral")
    bits = scene.bits[scene.ys, scene.xs]
    shown = galaxy.binned | ((bits & FORESTAR) > 0)
    outside = SPEC_IGNORED | SPEC_FLUXINVALID | SPEC_IVARINVALID
    red = (1 / galaxy.redcorr[:, None]).astype(np.float32)
    wave = wave_grid()

    def cube(name: str, data: np.ndarray, fill: float = 0, **more: Any) -> fits.ImageHDU:
        values = np.where(shown if data.dtype == np.float32 else True, data, data.dtype.type(0))
        image = to_image(scene, values, fill, data.dtype.str)
        return image_hdu(name, image, wcs, mask_set="MANGA_DAPSPECMASK", **more)

    def mask(name: str, values: np.ndarray, partners: dict[str, str]) -> fits.ImageHDU:
        image = to_image(scene, values, fill_bits[name], "i2")
        return image_hdu(
            name, image, wcs, mask_set="MANGA_DAPSPECMASK", role="QUALITY", partners=partners
        )

    fill_bits = {"MASK": outside, "MODEL_MASK": SPEC_NOMODEL | SPEC_FITIGNORED}
    fill_bits["STELLAR_MASK"] = fill_bits["MODEL_MASK"]
    unit: dict[str, Any] = {"unit": FLUX_UNIT}
    yield primary_hdu("LOGCUBE", cards)
    yield cube(
        "FLUX", galaxy.flux, **unit, partners={"ERRDATA": "FLUX_IVAR", "QUALDATA": "FLUX_MASK"}
    )
    yield cube(
        "IVAR", galaxy.ivar, **unit, role="ERROR", partners={"SCIDATA": "FLUX", "QUALDATA": "MASK"}
    )
    flag = np.where(galaxy.bad, outside, 0).astype(np.int16)
    flag |= np.where(
        galaxy.binned, 0, np.where(shown, SPEC_FORESTAR | SPEC_IGNORED, outside)
    ).astype(np.int16)
    yield mask("MASK", flag, {"SCIDATA": "FLUX", "ERRDATA": "IVAR"})
    lsf = (wave * instrument_sigma_kms(wave) / C_KMS).astype(np.float32)
    lsf_cube = np.broadcast_to(lsf[:, None], galaxy.flux.shape)
    yield cube(
        "LSF", lsf_cube, unit="angstrom", extra=[("DRPEXT", "LSFPRE", "Source ext from DRP file")]
    )
    yield image_hdu("WAVE", wave.astype(np.float32))
    yield image_hdu("REDCORR", galaxy.redcorr.astype(np.float32))
    model = (scene.fitted + galaxy.emline) * red * galaxy.binned
    yield cube("MODEL", model, **unit, partners={"QUALDATA": "MODEL_MASK"})
    unfit = np.int16(SPEC_NOMODEL | SPEC_FITIGNORED)
    flag = np.where(galaxy.bad, SPEC_FITIGNORED, 0).astype(np.int16)
    flag |= np.where(galaxy.binned, np.int16(0), unfit)
    flag[(wave > 5570) & (wave < 5586)] |= SPEC_ARTIFACT  # the brightest sky line
    yield mask("MODEL_MASK", flag, {"SCIDATA": "MODEL"})
    yield cube("EMLINE", galaxy.emline * red * galaxy.binned, **unit)
    beyond = wave > 7409 * (1 + scene.z)
    stellar = scene.fitted * red * galaxy.binned
    stellar[beyond] = 0
    yield cube("STELLAR", stellar, **unit, partners={"QUALDATA": "STELLAR_MASK"})
    flag[beyond] |= unfit
    yield mask("STELLAR_MASK", flag, {"SCIDATA": "STELLAR"})
    yield image_hdu(
        "BINID", _bin_ids(galaxy), wcs_cards(ra, dec, scene.size, "channel"),
        channels=channel_cards(BIN_CHANNELS), data_class="CUBE",
    )  # fmt: skip


def maps_hdus(galaxy: Galaxy) -> Iterator[fits.PrimaryHDU | fits.ImageHDU]:
    """Yield the 64 HDUs of a DAP MAPS file.

    Masked values are 0 with zero inverse variance. Simulated: coordinates, mean flux and S/N, bin
    numbers, stellar and gas kinematics, summed and Gaussian line fluxes and equivalent widths with
    their continua, instrumental widths, amplitudes, figures of merit. Spectral indices are all
    masked. EMLINE_TPLSIGMA holds the resolution of the MILES library, 2.54 Angstrom FWHM (Beifiori
    et al. 2011).
    """
    scene, fit = galaxy.scene, galaxy.fit
    names = list(EMLINES)
    rest = np.array(list(EMLINES.values()))
    n_bins = int(galaxy.binned.sum())
    cards = scene.cards | {"NBINS": n_bins, "NSCMOD": n_bins, "NELMOD": n_bins} | _ring_snr(galaxy)
    ra, dec = cards["IFURA"], cards["IFUDEC"]
    flat = wcs_cards(ra, dec, scene.size, "image")
    deep = wcs_cards(ra, dec, scene.size, "channel")
    east, north = sky_offsets(scene.size)
    r, azimuth = elliptical_coordinates(east, north, cards["ECOOPA"], 1 - cards["ECOOELL"])
    r_kpc = np.deg2rad(r / 3600) * angular_distance_mpc_h(scene.z) * 1e3
    ell = np.stack([r, r / cards["REFF"], r_kpc, azimuth]).astype("f4")
    sky = np.stack([east, north]).astype("f4")
    binned = to_image(scene, galaxy.binned, 0, "bool")

    def image(values: np.ndarray, used: np.ndarray | None = None) -> np.ndarray:
        keep = galaxy.binned if used is None else used
        return to_image(scene, np.where(keep, values, 0))

    base = scene.bits.copy()
    base[(base == 0) & ~binned] |= NOVALUE | DONOTUSE
    sky_ch = channel_cards(["On-sky X", "On-sky Y"])
    ell_ch = channel_cards(*zip(*ELL_CHANNELS, strict=True))
    line_ch = channel_cards(names)
    cube: dict[str, Any] = {"data_class": "CUBE"}
    unit: dict[str, Any] = {"unit": FLUX_UNIT}

    yield primary_hdu("MAPS", cards)
    yield image_hdu("SPX_SKYCOO", sky, deep, channels=sky_ch, unit="arcsec", **cube)
    yield image_hdu("SPX_ELLCOO", ell, deep, channels=ell_ch, **cube)
    every = np.ones(scene.ys.size, bool)
    mflux = image(galaxy.mflux, every), image(galaxy.mflux_ivar, every)
    yield from quantity_hdus("SPX_MFLUX", *mflux, None, flat, **unit)
    yield image_hdu("SPX_SNR", image(galaxy.snr, every), flat)
    yield image_hdu("BINID", _bin_ids(galaxy), deep, channels=channel_cards(BIN_CHANNELS), **cube)
    sky_ch = channel_cards(["Lum. weighted on-sky X", "Lum. weighted on-sky Y"])
    yield image_hdu("BIN_LWSKYCOO", sky * binned, deep, channels=sky_ch, unit="arcsec", **cube)
    ell_ch = channel_cards(*zip(*LW_ELL_CHANNELS, strict=True))
    yield image_hdu("BIN_LWELLCOO", ell * binned, deep, channels=ell_ch, **cube)
    area = (SPAXEL_ARCSEC**2 * binned).astype("f4")
    yield image_hdu("BIN_AREA", area, flat, unit="arcsec^2")
    yield image_hdu("BIN_FAREA", binned.astype("f4"), flat)
    mflux = image(galaxy.mflux), image(galaxy.mflux_ivar)
    yield from quantity_hdus("BIN_MFLUX", *mflux, base, flat, **unit)
    yield image_hdu("BIN_SNR", image(galaxy.snr), flat)

    for name, key in (("VEL", "star_v"), ("SIGMA", "star_sigma")):
        value, ivar = fit[key], 1 / fit[f"{key}_sd"] ** 2
        at_bound = galaxy.binned & (value <= 0) & (name == "SIGMA")  # the fit's lower bound is 0
        mask = base | to_image(scene, at_bound * (NEARBOUND | DONOTUSE), 0, "i4")
        if name == "SIGMA":
            value = np.maximum(value, 0)
        yield from quantity_hdus(
            f"STELLAR_{name}", image(value), image(ivar), mask, flat, unit="km/s"
        )
    corr = np.full((2, scene.ys.size), 33.0)
    yield image_hdu(
        "STELLAR_SIGMACORR", image(corr), deep, unit="km/s", **cube,
        channels=channel_cards(["resolution difference", "fit"]),
    )  # fmt: skip
    merit_ch = channel_cards(*zip(*FOM_CHANNELS, strict=True))
    merit = figures_of_merit(galaxy)
    yield image_hdu("STELLAR_FOM", image(merit), deep, channels=merit_ch, **cube)

    # emission lines
    line_bits = np.repeat(base[scene.ys, scene.xs][None], len(names), axis=0)
    moment_bits = line_bits.copy()
    off = np.all(~np.isfinite(fit["gflux_var"]), axis=1)[:, None] & galaxy.binned
    lost = ~np.isfinite(fit["gflux_var"]) & ~off & galaxy.binned
    line_bits[off] |= NOVALUE | DONOTUSE
    line_bits[lost] |= FITFAILED | DONOTUSE
    unsteady = (fit["v_var"] > MAX_V_ERROR_KMS**2) & galaxy.binned
    moment_bits[~np.isfinite(fit["sflux_var"]) & galaxy.binned] |= NOVALUE | DONOTUSE
    moment_bits[names.index("OII-3729")] |= NOVALUE | DONOTUSE  # part of channel OIId-3728
    good, moment_good = line_bits == 0, moment_bits == 0
    line_bits[:, unsteady] |= NEARBOUND | DONOTUSE  # values are kept, as the DAP does
    g_ivar = np.where(good, 1 / fit["gflux_var"], 0)
    s_ivar = np.where(moment_good, 1 / fit["sflux_var"], 0)
    # a line without measured flux has no width
    flat_line = good & (fit["gflux"] <= 0)
    width_bits = line_bits | flat_line * (MATHERROR | DONOTUSE)
    observed = rest[:, None] * (1 + scene.z)
    inst = instrument_sigma_kms(observed) * np.ones_like(scene.gas_v)
    gas_v = scene.gas_v + fit["v_error"]
    total = np.hypot(inst, scene.gas_sigma) + fit["s_error"]
    v_ivar = np.where(good, 1 / fit["v_var"], 0)
    cont = np.where(fit["cont"] > 0, fit["cont"], np.inf) * (1 + scene.z)
    channels = {False: line_ch, True: channel_cards(MOMENT_CHANNELS)}

    def lay_bits(values: np.ndarray) -> np.ndarray:
        out = np.repeat(base[None], len(names), axis=0)
        out[:, scene.ys, scene.xs] = values
        return out.astype("i4")

    def line_maps(
        name: str, value: np.ndarray, ivar: np.ndarray, flags: np.ndarray, **more: Any
    ) -> list[fits.ImageHDU]:
        ok = (flags & (NOCOV | LOWCOV | NOVALUE | FORESTAR | DEADFIBER | FITFAILED)) == 0
        named = [channels[name in ("EMLINE_SFLUX", "EMLINE_SEW")]] * 3
        return quantity_hdus(
            name, image(value, ok), image(ivar, ok), lay_bits(flags), deep, named, **more, **cube
        )

    def plain(name: str, value: np.ndarray, flags: np.ndarray, **more: Any) -> fits.ImageHDU:
        named = channels[name == "EMLINE_SEW_CNT"]
        return image_hdu(name, image(value, flags == 0), deep, channels=named, **more, **cube)

    per_cont2 = np.where(np.isfinite(cont), cont, 0) ** 2
    for kind, ivar, flags in (("S", s_ivar, moment_bits), ("G", g_ivar, line_bits)):
        flux = fit[f"{kind.lower()}flux"]
        yield from line_maps(f"EMLINE_{kind}FLUX", flux, ivar, flags, unit=LINE_UNIT)
        width, *errors = line_maps(
            f"EMLINE_{kind}EW", flux / cont, ivar * per_cont2, flags, unit="ang"
        )
        yield width
        yield plain(f"EMLINE_{kind}EW_CNT", fit["cont"], flags, **unit)
        yield from errors
    tied_v = np.broadcast_to(gas_v, inst.shape)
    yield from line_maps("EMLINE_GVEL", tied_v, v_ivar, line_bits, unit="km/s")
    yield from line_maps("EMLINE_GSIGMA", total, v_ivar, width_bits, unit="km/s")
    yield plain("EMLINE_INSTSIGMA", inst, line_bits, unit="km/s")
    tpl = 2.54 / 2.3548 / rest[:, None] * C_KMS * np.ones_like(scene.gas_v)  # MILES
    yield plain("EMLINE_TPLSIGMA", tpl, line_bits, unit="km/s")
    sigma_aa = observed * total / C_KMS
    amplitude = fit["gflux"] / (sigma_aa * np.sqrt(2 * np.pi))
    yield plain("EMLINE_GA", amplitude, line_bits, **unit)
    at = np.clip(np.searchsorted(wave_grid(), observed[:, 0]), 0, N_BANDS - 1)
    noise = galaxy.redcorr[at, None] / np.sqrt(np.maximum(galaxy.ivar[at], 1e-6))
    yield plain("EMLINE_GANR", amplitude / noise, line_bits)
    yield image_hdu("EMLINE_FOM", image(merit), deep, channels=merit_ch, **cube)
    yield plain("EMLINE_LFOM", np.repeat(merit[2][None], len(names), axis=0), line_bits)

    # spectral indices: not measured
    index_names, index_units = zip(*(s.split(":") for s in SPECTRAL_INDICES.split()), strict=True)
    none = np.zeros((len(index_names), scene.size, scene.size), "f4")
    flags = np.repeat((base | NOVALUE | DONOTUSE)[None], len(index_names), axis=0).astype("i4")
    units = channel_cards(index_names, index_units)
    ivar_units = channel_cards(index_names, [f"({u})^{{-2}}" if u else "" for u in index_units])
    bare = channel_cards(index_names)
    for name in ("SPECINDEX", "SPECINDEX_BF", "SPECINDEX_WGT"):
        yield from quantity_hdus(name, none, none, flags, deep, (units, ivar_units, bare), **cube)
        for part in ("CORR", "MODEL"):
            yield image_hdu(f"{name}_{part}", none, deep, channels=bare, **cube)


def figures_of_merit(galaxy: Galaxy) -> np.ndarray:
    """Figures of merit of the fit (9, spaxel), in the order of FOM_CHANNELS, on every 8th pixel."""
    model = ((galaxy.scene.fitted + galaxy.emline) / galaxy.redcorr[:, None])[::8]
    ivar = galaxy.ivar[::8]
    resid = np.where(ivar > 0, galaxy.flux[::8] - model, 0)
    frac = np.abs(resid) / np.maximum(model, 1e-6)
    chi = np.abs(resid) * np.sqrt(ivar)
    out = [np.sqrt((resid**2).mean(0)), np.sqrt((frac**2).mean(0)), (chi**2).mean(0)]
    for value in (frac, chi):
        out += [*np.percentile(value, (68, 99), axis=0), value.max(axis=0)]
    return np.array(out)


def _ring_snr(galaxy: Galaxy) -> dict[str, float]:
    """Median and summed S/N at 1 to 1.5 effective radii; g's value stands for all four bands."""
    scene = galaxy.scene
    east, north = sky_offsets(scene.size)
    r, _ = elliptical_coordinates(east, north, scene.cards["ECOOPA"], 1 - scene.cards["ECOOELL"])
    re = r[scene.ys, scene.xs] / scene.cards["REFF"]
    ring = galaxy.snr[galaxy.binned & (re > 1) & (re < 1.5)]
    median = float(np.median(ring)) if ring.size else 0.0
    total = float(np.sqrt((ring**2).sum()) / 1.9) if ring.size else 0.0  # 1.9: the covariance
    return {f"SNR{b}MED": median for b in "GRIZ"} | {f"SNR{b}RING": total for b in "GRIZ"}
