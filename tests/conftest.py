"""Shared fixtures: small FITS files with planted truth, and the folder of real files."""

import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import cut_real_files
import numpy as np
import pytest
from astropy.io import fits

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several test processes share the cores

N_WAVE = 4563
LINES = ("OII-3727", "OII-3729", "Hb-4862", "OIII-5008", "Ha-6564", "NII-6585")
CARDS = {"PLATEIFU": "8485-1901", "MANGAID": "1-209232", "DRP3QUAL": 0, "DAPQUAL": 0}
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
NO_GPU = pytest.StashKey[int]()
"""Number of tests that were left out for want of a GPU."""


def pytest_configure(config) -> None:
    """Make warnings of every module of ours errors."""
    root = Path(__file__).resolve().parents[1]
    for path in (*root.glob("*.py"), *root.glob("mock/*.py")):
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        config.addinivalue_line("filterwarnings", f"error:::{module}$")


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config, items) -> None:
    """Leave out the tests that need a GPU where there is none."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        items[:] = [item for item in items if item not in on_gpu]
        config.hook.pytest_deselected(items=on_gpu)
        config.stash[NO_GPU] = len(on_gpu)
        if hasattr(config, "workeroutput"):  # a process of pytest-xdist
            config.workeroutput["no_gpu"] = len(on_gpu)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    """Take over the count from a process of pytest-xdist: each collects every test."""
    node.config.stash[NO_GPU] = getattr(node, "workeroutput", {}).get("no_gpu", 0)


@pytest.hookimpl(trylast=True)  # at the very end
def pytest_terminal_summary(terminalreporter, config) -> None:
    """Say in one line per cause what was not tested."""
    skipped = terminalreporter.stats.get("skipped", [])
    causes = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    if n := config.stash.get(NO_GPU, 0):
        causes["no CUDA device"] = n
    if causes:
        terminalreporter.section("not tested")
    for cause, n in causes.most_common():
        terminalreporter.line(f"{n} test{'s' if n > 1 else ''}: {cause}")


@pytest.fixture(scope="session", autouse=True)
def heard_interrupts() -> None:
    """Hear Ctrl-C, which shells have their background jobs ignore."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_manga() -> Path:
    """Folder of whole real MaNGA files; skips where it is absent."""
    folder = SHARED / "manga"
    if not folder.is_dir():
        pytest.skip(f"whole real MaNGA files (their cuts are tested): no {folder}")
    return folder


@pytest.fixture(scope="session")
def real_maps() -> Path:
    """Cut of the MAPS file of the galaxy 7815-3702."""
    return cut_real_files.MAPS_CUT


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """Each device in turn."""
    return request.param


@pytest.fixture
def command(monkeypatch, capsys):
    """Function that runs a command in this process and returns its exit code and stderr."""
    import utils

    def run(main, config_class, *words) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["script.py", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            utils.run_command(main, config_class, "What it does.")
        return stop.value.code, capsys.readouterr().err

    return run


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """Data folder of eight small galaxies; only copies of it may be changed."""
    import mock_cubes

    return mock_cubes.make_data_dir(tmp_path_factory.mktemp("data"))


@pytest.fixture
def own_data(root, tmp_path) -> Path:
    """A copy of the data folder that a test may change."""
    return shutil.copytree(root, tmp_path / "data")


def train(root: Path, run_dir: Path, **options) -> Path:
    """Train briefly, on patches of 5 x 5 spaxels one by one; return the run's folder."""
    import run_SSFTT_training as script

    usual = {
        "network": "ssftt",
        "split_dir": "hard",
        "patch_size": 5,
        "cutout": 1,
        "packed_type": "float32",
    }
    usual |= {"batch_size": 64, "epochs": 3, "device": "cpu"}
    config = script.train_config(data_dir=root, run_dir=run_dir, **{**usual, **options})
    assert script.main(config) == 0
    return run_dir


@pytest.fixture(scope="session")
def trained_run(root, tmp_path_factory) -> Path:
    """A trained run; only copies of it may be changed."""
    return train(root, tmp_path_factory.mktemp("runs") / "logOH")


@pytest.fixture(scope="session")
def filters_run(root, tmp_path_factory) -> Path:
    """A trained run of matched filters; its model may not be changed."""
    options = {"network": "matched_filters", "packed_type": "float16", "epochs": 4, "cutout": 7}
    with pytest.MonkeyPatch.context() as patch:  # in these cubes no line follows the metallicity
        patch.setattr("line_fits.line_places", lambda wave: [])
        return train(root, tmp_path_factory.mktemp("runs") / "filters", **options)


@pytest.fixture
def own_run(trained_run, tmp_path) -> Path:
    """A copy of the trained run that a test may change."""
    return shutil.copytree(trained_run, tmp_path / "run")


def numbers_of(run_dir: Path):
    """Rows of a run's metrics.csv without the clock's columns."""
    import pandas as pd

    return pd.read_csv(run_dir / "metrics.csv").drop(columns=["seconds", "spaxels_per_s"])


def write_logcube(path: Path, flux, ivar, mask, drop=(), redcorr=None, wave=None, **cards) -> Path:
    """Write a DAP-like LOGCUBE from (band, y, x) arrays; a card of None is left out."""
    usual = {"SCINPVEL": 0.03 * 299792.458, "EBVGAL": 0.05, "DAPTYPE": "SPX-MILESHC-MASTARSSP"}
    cards = CARDS | usual | {"MASKNAME": "MANGA_DAPSPECMASK"} | cards
    primary = fits.PrimaryHDU()
    primary.header.update({key: value for key, value in cards.items() if value is not None})
    grid = 10 ** (3.5589 + 1e-4 * np.arange(N_WAVE)) if wave is None else wave
    arrays = {
        "FLUX": flux.astype(">f4"),
        "IVAR": ivar.astype(">f4"),
        "MASK": mask.astype(">i2"),
        "LSF": np.ones_like(flux, ">f4"),
        "WAVE": grid.astype(">f4"),
        "REDCORR": np.ones(N_WAVE, ">f4") if redcorr is None else redcorr.astype(">f4"),
        "MODEL": np.zeros_like(flux, ">f4"),
    }
    hdus = fits.HDUList([fits.ImageHDU(a, name=n) for n, a in arrays.items() if n not in drop])
    if "MASK" not in drop:
        hdus["MASK"].header["MASKNAME"] = "MANGA_DAPSPECMASK"
    path.parent.mkdir(parents=True, exist_ok=True)
    fits.HDUList([primary, *hdus]).writeto(path, overwrite=True)
    return path


def write_maps(path: Path, flux, ivar, mask, lines=LINES, **cards) -> Path:
    """Write a DAP-like MAPS with the HDUs that labels need, from dicts of (y, x) maps."""
    hdus = fits.HDUList([fits.PrimaryHDU()])
    hdus[0].header.update(CARDS | cards)
    for ending, dtype, maps in (("", ">f4", flux), ("_IVAR", ">f4", ivar), ("_MASK", ">i4", mask)):
        array = np.stack([maps[k] for k in lines]).astype(dtype)
        hdu = fits.ImageHDU(array, name=f"EMLINE_GFLUX{ending}")
        hdu.header.update({f"C{i:02d}": line for i, line in enumerate(lines, 1)})
        hdus.append(hdu)
    path.parent.mkdir(parents=True, exist_ok=True)
    hdus.writeto(path, overwrite=True)
    return path


def write_fits(folder: Path, plateifu: str) -> None:
    """Write LOGCUBE and MAPS of a galaxy of 3 x 4 spaxels."""
    rng, (ny, nx) = np.random.default_rng(0), (3, 4)
    flux = (1 + 0.3 * rng.random((N_WAVE, ny, nx))).astype("f4")
    ivar = (50 + 50 * rng.random(flux.shape)).astype("f4")
    logcube, maps_file = (folder / f"manga-{plateifu}-{k}-X.fits" for k in ("LOGCUBE", "MAPS"))
    write_logcube(logcube, flux, ivar, np.zeros(flux.shape, "i2"), PLATEIFU=plateifu)
    typical = dict(zip(LINES, (60, 80, 35, 30, 100, 30), strict=True))
    maps = {k: v * (1 + 0.1 * rng.random((ny, nx))) for k, v in typical.items()}
    ivars, masks = ({k: np.full((ny, nx), value) for k in LINES} for value in (4.0, 0))
    write_maps(maps_file, maps, ivars, masks, PLATEIFU=plateifu)
    with fits.open(maps_file, mode="append") as hdus:
        channels = {f"C{i:02d}": line for i, line in enumerate(LINES, 1)}
        for name, data in (
            ("EMLINE_GVEL", rng.normal(0, 80, (6, ny, nx)).astype(">f4")),
            ("EMLINE_GVEL_MASK", np.zeros((6, ny, nx), ">i4")),
        ):
            hdus.append(fits.ImageHDU(data, fits.Header(channels), name=name))


@pytest.fixture
def plain_arrays():
    """FLUX, IVAR, MASK of a 4 x 5 cube: positive spectra, all good."""
    rng = np.random.default_rng(0)
    flux = 1 + 0.3 * rng.random((N_WAVE, 4, 5))
    ivar = 50 + 50 * rng.random((N_WAVE, 4, 5))
    return flux.astype("f4"), ivar.astype("f4"), np.zeros((N_WAVE, 4, 5), "i2")


@pytest.fixture
def line_maps():
    """Fluxes, ivars and masks of bright H II spaxels in 4 x 5 maps."""
    rng = np.random.default_rng(1)
    typical = dict(zip(LINES, (60, 80, 35, 30, 100, 30), strict=True))
    flux = {k: v * (1 + 0.1 * rng.random((4, 5))) for k, v in typical.items()}
    ivar = {k: np.full((4, 5), 4.0) for k in LINES}
    mask = {k: np.zeros((4, 5), int) for k in LINES}
    return flux, ivar, mask
