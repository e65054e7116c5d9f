"""The commands together, on simulated galaxies: from FITS files to splits, as a user runs them."""

import ast
import csv
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from scipy.special import erf

import cube_patch_processing as patching
import cube_processing
import data_io
import fits_utils as fu
import hsi_proc_fns
import loops
import mock.physics
import mock_manga
import process_single_cube
import resample
import utils
from utils import LABEL_TASKS, DataError

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(p.name for p in ROOT.glob("*.py") if "utils.run_command(" in p.read_text())
LINES_FITTED = {
    "NII-6549": 6549.86,
    "Ha-6564": 6564.632,
    "NII-6585": 6585.27,
    "SII-6718": 6718.29,
    "SII-6732": 6732.67,
}
"""Vacuum wavelengths, Angstrom, as the DAP fits them."""
NEED_TORCH = {"run_SSFTT_training.py", "eval_fns.py", "map_galaxies.py", "pack_cubes.py"}


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    """Data folder with five simulated galaxies, processed by the command."""
    root = tmp_path_factory.mktemp("survey")
    mock_manga.simulate_survey(
        mock_manga.MockConfig(data_dir=root, n_galaxies=5, seed=1, bundles=(19,))
    )
    assert cube_processing.main(cube_processing.Config(data_dir=root, jobs=2)) == 0
    return root


@pytest.fixture
def one(survey, tmp_path):
    """Data folder of a test's own with one of the simulated galaxies, unprocessed."""
    plateifu = galaxies_of(survey)[0]
    shutil.copytree(utils.raw_dir(survey, plateifu), utils.raw_dir(tmp_path, plateifu))
    return tmp_path, plateifu


def galaxies_of(root):
    return sorted(p.stem for p in (root / "processed" / "cubes").glob("*/*.h5"))


def run_script(*words, cwd=ROOT):
    return subprocess.run(
        [sys.executable, str(ROOT / words[0]), *map(str, words[1:])],
        capture_output=True, text=True, cwd=cwd, check=False,
    )  # fmt: skip


def test_every_galaxy_has_cube_labels_and_a_place_in_the_splits(survey):
    galaxies = galaxies_of(survey)
    assert len(galaxies) == 5
    for plateifu in galaxies:
        cube = data_io.read_cube(utils.cube_path(survey, plateifu))
        assert cube.flux.shape == (34, 34, 2040)
        assert np.isfinite(cube.ivar).all()
        assert (cube.ivar[np.isnan(cube.flux)] == 0).all()
        for task in LABEL_TASKS:
            path = utils.label_path(survey, task, plateifu)
            assert data_io.read_labels(path).shape == (34, 34)
            assert path.with_suffix(".png").stat().st_size > 1000
    parts, meta = data_io.read_split(utils.split_path(survey, "hard_BPT"))
    assert meta["kind"] == "hard"
    assert set().union(*(t["plateifu"] for t in parts.values())) <= set(galaxies)


def test_running_again_does_nothing(survey):
    before = {p: p.stat().st_mtime_ns for p in (survey / "processed").rglob("*") if p.is_file()}
    assert cube_processing.main(cube_processing.Config(data_dir=survey, jobs=1)) == 0
    after = {p: p.stat().st_mtime_ns for p in (survey / "processed").rglob("*") if p.is_file()}
    assert before == after


def test_labels_agree_with_the_truth_within_their_uncertainty(survey):
    """12+log(O/H) from MAPS less the noiseless one, over the stated sigma: width about 1."""
    pulls, values = [], []
    for plateifu in galaxies_of(survey):
        path = utils.label_path(survey, "logOH", plateifu)
        labels, sigma = data_io.read_labels(path), data_io.read_label_error(path)
        truth, _ = mock_manga.read_truth(mock_manga.truth_path(survey, plateifu))
        good = np.isfinite(labels) & np.isfinite(truth["logoh_o3n2"])
        pulls.append(((labels - truth["logoh_o3n2"]) / sigma)[good])
        values.append(labels[good])
    pulls = np.concatenate(pulls)
    assert pulls.size > 500
    robust = np.subtract(*np.percentile(pulls, [84.135, 15.865])) / 2
    # neighbouring spaxels share noise, so these pulls count as some two hundred independent ones
    assert 0.85 < robust < 1.15
    assert 0.85 < pulls.std() < 1.15
    assert abs(np.median(pulls)) < 0.4
    assert np.std(np.concatenate(values)) > 0.03


def test_bpt_labels_agree_with_the_truth_as_often_as_they_say(survey):
    wrong, said = [], []
    for plateifu in galaxies_of(survey):
        path = utils.label_path(survey, "BPT", plateifu)
        labels, p_wrong = data_io.read_labels(path), data_io.read_label_error(path)
        truth, _ = mock_manga.read_truth(mock_manga.truth_path(survey, plateifu))
        good = (labels >= 0) & (truth["bpt"] >= 0)
        wrong.append((labels != truth["bpt"])[good])
        said.append(p_wrong[good])
    wrong, said = np.concatenate(wrong), np.concatenate(said)
    assert wrong.size > 500
    assert abs(wrong.mean() - said.mean()) < 0.02


@pytest.mark.parametrize("line", ["Ha-6564", "NII-6585", "SII-6718"])
def test_planted_line_fluxes_are_recovered_from_the_h5_cube(survey, line):
    """Lines' profiles fitted to the cube less its continuum, against the truth."""
    pulls = []
    for plateifu in galaxies_of(survey):
        cube = data_io.read_cube(utils.cube_path(survey, plateifu))
        truth, _ = mock_manga.read_truth(mock_manga.truth_path(survey, plateifu))
        z = cube.attrs["redshift"]
        continuum = planted_continuum(survey, plateifu, z)
        bright = truth[f"line_flux/{line}"] > 0.3
        bright &= np.isfinite(cube.flux).all(axis=2)
        for y, x in np.argwhere(bright)[::7]:
            residual = cube.flux[y, x] - continuum[y, x]
            pulls.append(fitted_pull(residual, cube.ivar[y, x], truth, line, y, x, z))
    pulls = np.array(pulls)
    assert pulls.size > 50
    assert abs(np.median(pulls)) < 0.35
    assert 0.75 < np.subtract(*np.percentile(pulls, [84.135, 15.865])) / 2 < 1.25


def to_h5_grid(spectra, z):
    """Mean flux density per H5 bin of (pixel, ...) spectra on the LOGCUBE grid, (bin, ...)."""
    edges = resample.log_edges(3.5589, 1e-4, len(spectra)) / (1 + z)
    _, bins = resample.target_grid(5000, 8000, 2040)
    matrix = resample.overlap_matrix(edges, bins)
    return (matrix @ spectra.reshape(len(spectra), -1)) / np.diff(bins)[:, None]


def planted_continuum(root, plateifu, z):
    """Noiseless stars of a simulated LOGCUBE (MODEL less EMLINE) on the H5 grid, (y, x, band)."""
    hdus = fu.read_hdus(utils.find_raw(root, plateifu, "LOGCUBE"), ("REDCORR", "MODEL", "EMLINE"))
    model, lines = (hdus[n].data.astype(float) for n in ("MODEL", "EMLINE"))
    stars = (model - lines) * hdus["REDCORR"].data[:, None, None] * (1 + z)
    return to_h5_grid(stars, z).T.reshape(*stars.shape[1:], -1)


def fitted_pull(residual, ivar, truth, line, y, x, z):
    """(fitted - planted) / sigma of one line, fitted together with its neighbours.

    The profiles are those of the instrument's pixels, moved to the bins like the data: a line is
    a little wider there than before.
    """
    edges = resample.log_edges(3.5589, 1e-4, 4563) / (1 + z)
    near = {n: w for n, w in LINES_FITTED.items() if abs(w - LINES_FITTED[line]) < 70}
    columns = []
    for wave in near.values():
        mean = wave * (1 + truth["gas_velocity"][y, x] / fu.C_KMS)
        instrument = mock.physics.instrument_sigma_kms(mean * (1 + z))
        sigma = mean * np.hypot(truth["gas_sigma"][y, x], instrument) / fu.C_KMS
        profile = np.diff(erf((edges - mean) / (np.sqrt(2) * sigma))) / 2
        columns.append(profile / np.diff(edges))
    design = to_h5_grid(np.stack(columns, axis=1), z)
    covariance = np.linalg.inv((design * ivar[:, None]).T @ design)
    fitted = covariance @ (design.T @ (ivar * residual))
    k = list(near).index(line)
    return (fitted[k] - truth[f"line_flux/{line}"][y, x]) / np.sqrt(covariance[k, k])


def test_patch_files_equal_patches_cut_from_the_cube(survey):
    plateifu = galaxies_of(survey)[0]
    config = patching.Config(
        data_dir=survey, plateifu=(plateifu,), patch_norms=("spectral", "global"), patch_size=5,
        label_tasks=("BPT",), jobs=1,
    )  # fmt: skip
    assert patching.main(config) == 0
    flux = data_io.read_cube(utils.cube_path(survey, plateifu)).flux
    labels = data_io.read_labels(utils.label_path(survey, "BPT", plateifu))
    for norm in config.patch_norms:
        path = utils.patch_path(survey, "BPT", norm, plateifu)
        patches, index, meta = data_io.read_patches(path)
        assert meta["patch_norm"] == norm
        normed = hsi_proc_fns.normalise(flux, norm)
        np.testing.assert_array_equal(labels[index["y"], index["x"]], index["label"])
        np.testing.assert_array_equal(patches[:, 2, 2], normed[index["y"], index["x"]])
        usable = hsi_proc_fns.usable_spaxels(flux)
        assert usable[index["y"], index["x"]].all()
        assert len(index) == (usable & (labels >= 0)).sum()
    with pytest.raises(DataError, match="--split-dir"):
        patching.patch_galaxy(
            survey, plateifu, "BPT", replace(config, patch_norms=("PCA",)), overwrite=True
        )


def test_patches_made_with_other_options_are_refused(survey):
    plateifu = galaxies_of(survey)[1]
    options = patching.PatchOptions(("global",), 3)
    assert patching.patch_galaxy(survey, plateifu, "BPT", options) == "written"
    assert patching.patch_galaxy(survey, plateifu, "BPT", options) == "up to date"
    with pytest.raises(DataError, match="another patch_size"):
        patching.patch_galaxy(survey, plateifu, "BPT", replace(options, patch_size=5))


def test_patches_of_cubes_or_labels_since_made_anew_are_refused(survey, tmp_path):
    plateifu = galaxies_of(survey)[1]
    options = patching.PatchOptions(("global",), 3)
    for kind in ("cubes", "labels"):
        shutil.copytree(survey / "processed" / kind, tmp_path / "processed" / kind)
    assert patching.patch_galaxy(tmp_path, plateifu, "BPT", options) == "written"
    label = utils.label_path(tmp_path, "BPT", plateifu)
    values, meta = data_io.read_labels(label), data_io.read_label_meta(label)
    data_io.write_labels(label, values, values, {**meta, "source_sha256": "of other MAPS"})
    with pytest.raises(DataError, match="made with another label"):
        patching.patch_galaxy(tmp_path, plateifu, "BPT", options)
    data_io.write_labels(label, values, values, meta)
    assert patching.patch_galaxy(tmp_path, plateifu, "BPT", options) == "up to date"
    with h5py.File(utils.cube_path(tmp_path, plateifu), "a") as f:
        made = json.loads(f.attrs["config_json"])
        f.attrs["config_json"] = json.dumps({**made, "deredden": False})
    with pytest.raises(DataError, match="made with another cube"):
        patching.patch_galaxy(tmp_path, plateifu, "BPT", options)


def test_galaxy_lists_that_name_none_are_refused(tmp_path):
    """Not taken for all galaxies."""
    path = tmp_path / "galaxies.txt"
    for text in ("# none yet\n", "", "mangaid,plateifu\n1-1\n"):
        path.write_text(text)
        choice = loops.GalaxyChoice(galaxy_list=path)
        with pytest.raises(DataError, match="names no galaxy"):
            loops.chosen_galaxies(choice, ["8000-1901"])


def test_loop_over_galaxies_goes_on_past_bad_files(survey, tmp_path):
    galaxies = galaxies_of(survey)
    shutil.copytree(survey / "raw", tmp_path / "raw")
    cut = utils.find_raw(tmp_path, galaxies[0], "LOGCUBE")
    cut.write_bytes(cut.read_bytes()[:100_000])
    utils.find_raw(tmp_path, galaxies[1], "MAPS").write_bytes(b"")
    utils.find_raw(tmp_path, galaxies[2], "MAPS").unlink()
    config = cube_processing.Config(data_dir=tmp_path, jobs=2, splits=False)
    assert cube_processing.main(config) == 1
    with (tmp_path / "processed" / "failed.csv").open() as f:
        failed = {row["plateifu"]: row["reason"] for row in csv.DictReader(f)}
    assert set(failed) == set(galaxies[:3])
    assert "cut short" in failed[galaxies[0]]
    assert "zero bytes" in failed[galaxies[1]]
    assert "no manga-" in failed[galaxies[2]]
    assert not utils.cube_path(tmp_path, galaxies[0]).exists()
    for plateifu in galaxies[3:]:
        assert utils.cube_path(tmp_path, plateifu).exists()
    assert not [p for p in (tmp_path / "processed").rglob(".*") if p.is_file()]


def test_single_galaxy_by_command(one):
    root, plateifu = one
    done = run_script("process_single_cube.py", "--plateifu", plateifu, "--data-dir", root)
    assert done.returncode == 0, done.stderr
    assert str(utils.cube_path(root, plateifu)) in done.stderr
    logcube = utils.find_raw(root, plateifu, "LOGCUBE")
    maps = utils.find_raw(root, plateifu, "MAPS")
    other = root / "elsewhere"
    done = run_script(
        "process_single_cube.py", "--fits", logcube, "--maps", maps, "--data-dir", other
    )
    assert done.returncode == 0, done.stderr
    a, b = (data_io.read_cube(utils.cube_path(r, plateifu)) for r in (root, other))
    np.testing.assert_array_equal(a.flux, b.flux)
    done = run_script("process_single_cube.py", "--fits", logcube, "--data-dir", root / "third")
    assert done.returncode == 0, done.stderr  # MAPS lies beside the LOGCUBE
    assert utils.label_path(root / "third", "BPT", plateifu).is_file()


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (("--plateifu", "1-100"), 1, "no plateifu"),
        (("--plateifu", "7000-1901"), 1, "no manga-7000-1901-LOGCUBE"),
        ((), 1, "no galaxy: give --plateifu"),
        (("--fits", "absent-8485-1901.fits"), 1, "absent-8485-1901.fits: no such file"),
        (("--plateifu", "7000-1901", "--nband", "3"), 2, "--nband"),
        (("--plateifu", "7000-1901", "--n-band", "x"), 2, "--n-band"),
        (("--config", "absent.json"), 2, "absent.json"),
    ],
)
def test_bad_command_line_is_one_line_and_its_exit_code(tmp_path, words, code, expected):
    done = run_script("process_single_cube.py", *words, "--data-dir", tmp_path)
    assert done.returncode == code
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    if code == 1:
        assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_maps_file_is_not_taken_for_a_logcube(one):
    root, plateifu = one
    maps = utils.find_raw(root, plateifu, "MAPS")
    config = process_single_cube.Config(fits=maps, data_dir=root)
    with pytest.raises(DataError, match="its name says MAPS, expected a LOGCUBE file"):
        process_single_cube.main(config)


def test_debug_shows_the_traceback(tmp_path):
    words = ("--plateifu", "7000-1901", "--data-dir", tmp_path, "--debug")
    assert "Traceback" in run_script("process_single_cube.py", *words).stderr


def test_real_maps_pass_the_whole_chain(shared_manga, tmp_path):
    source = shared_manga / "manga-7815-3702-MAPS-HYB10-GAU-MILESHC.fits.gz"
    mock_manga.main(mock_manga.MockConfig(data_dir=tmp_path, from_maps=source))
    config = cube_processing.Config(data_dir=tmp_path, splits=False, jobs=1)
    assert cube_processing.main(config) == 0
    labels = data_io.read_labels(utils.label_path(tmp_path, "BPT", "7815-3702"))
    assert np.bincount(labels[labels >= 0], minlength=3).tolist() == [575, 96, 0]
    cube = data_io.read_cube(utils.cube_path(tmp_path, "7815-3702"))
    assert cube.flux.shape == (42, 42, 2040)
    assert cube.attrs["redshift"] == pytest.approx(0.029382, abs=1e-6)
    usable = hsi_proc_fns.usable_spaxels(cube.flux)
    assert usable[labels >= 0].mean() > 0.95


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_without_torch_where_none_is_needed(script, tmp_path):
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{script!r}, '--help']; sys.path.insert(0, {str(ROOT)!r})\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    print('TORCH' if 'torch' in sys.modules else 'LIGHT', 'CODE', stop.code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert "CODE 0" in done.stdout, done.stderr
    assert "usage" in done.stdout
    if script not in NEED_TORCH:
        assert "LIGHT" in done.stdout
    assert list(tmp_path.iterdir()) == []


MODULES = {p.stem: p for p in sorted(ROOT.glob("*.py"))}
MODULES |= {f"mock.{p.stem}": p for p in sorted(ROOT.glob("mock/*.py"))}


def imports(path):
    """Names of all modules and packages that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return found | {name.split(".")[0] for name in found}


def test_modules_depend_on_each_other_in_one_direction():
    every = {module: imports(path) for module, path in MODULES.items()}
    graph = {module: names & set(every) for module, names in every.items()}
    order = []
    while len(order) < len(graph):
        free = sorted(m for m in graph if m not in order and graph[m] <= set(order))
        assert free, f"import cycle among {sorted(set(graph) - set(order))}"
        order += free
    assert graph["utils"] == set()
    assert graph["HSI_SSFTT"] <= {"utils"}
    assert "run_SSFTT_training" not in set().union(*graph.values())
    mocks = {m for m in graph if m.startswith("mock")}
    assert {m for m in graph if graph[m] & mocks} <= mocks
    for module in ("hsi_proc_fns", "data_io", "cube_patch_processing", "data_fns"):
        assert not every[module] & {"astropy", "fits_utils", "sdss_access"}, module


@pytest.mark.parametrize("path", MODULES.values(), ids=MODULES)
def test_importing_a_module_does_nothing(path):
    """Top level holds definitions and constants: no calls on their own, no loops, no files."""
    definitions = ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign
    allowed = (ast.Import, ast.ImportFrom, ast.If, *definitions)
    for node in ast.parse(path.read_text()).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert is_docstring or isinstance(node, allowed), f"{path.name}:{node.lineno}"
        if isinstance(node, ast.If):
            assert ast.unparse(node.test) in ("__name__ == '__main__'", "TYPE_CHECKING")


def test_saved_config_reproduces_a_command(one, tmp_path):
    root, plateifu = one
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"n_band": 50, "label_tasks": ["BPT"], "deredden": False}))
    words = ("--config", config, "--plateifu", plateifu, "--data-dir", root)
    done = run_script("process_single_cube.py", *words)
    assert done.returncode == 0, done.stderr
    cube = data_io.read_cube(utils.cube_path(root, plateifu))
    assert cube.wave.size == 50
    assert json.loads(cube.attrs["config_json"])["deredden"] is False
    assert not utils.label_path(root, "logOH", plateifu).exists()
