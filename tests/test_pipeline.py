"""The commands together, on simulated galaxies: from FITS files to figures, as a user runs them."""

import ast
import csv
import json
import runpy
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from functools import partial
from pathlib import Path

import utils
from utils import LABEL_TASKS, DataError

import numpy as np
import pytest
import real_galaxy
from astropy.io import fits
from scipy.special import erf

import cube_patch_processing as patching
import cube_processing
import data_io
import eval_fns
import evidence
import hsi_proc_fns
import inference
import map_galaxies
import mock.galaxy
import mock.physics
import mock.survey
import mock.truth
import mock_manga
import process_single_cube
import resample
import run_SSFTT_training
import vis_fns

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
C_KMS = 299_792.458
LINES_FITTED = {
    "NII-6549": 6549.86, "Ha-6564": 6564.632, "NII-6585": 6585.27, "SII-6718": 6718.29,
    "SII-6732": 6732.67,
}  # fmt: skip
"""Vacuum wavelengths, Angstrom, as the DAP fits them."""
MODULES = {p.stem: p for p in sorted(ROOT.glob("*.py"))}
MODULES |= {f"mock.{p.stem}": p for p in sorted(ROOT.glob("mock/*.py"))}
SCRIPTS = [p for p in sorted(ROOT.glob("*.py")) if "utils.run_command(" in p.read_text()]
BENCHMARKS = [
    p for p in sorted(ROOT.glob("benchmarks/*.py")) if "utils.run_command" in p.read_text()
]
AS_PLANTED = {"remove_gas_velocity": False}
NEED_TORCH = [
    p for p in SCRIPTS if p.stem in ("run_SSFTT_training", "eval_fns", "evidence", "map_galaxies")
]


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    """Data folder with five simulated galaxies, processed by the command."""
    root = tmp_path_factory.mktemp("survey")
    mock_manga.main(mock_manga.MockConfig(data_dir=root, n_galaxies=5, seed=1, bundles=(19,)))
    assert cube_processing.main(cube_processing.Config(data_dir=root, jobs=2, **AS_PLANTED)) == 0
    return root


def galaxies_of(root):
    return sorted(p.stem for p in utils.processed_cubes(root))


def truth_of(root, plateifu):
    """Maps that were planted."""
    return mock.truth.read_truth(mock.truth.truth_path(root, plateifu))[0]


def labels_and_truth(root, task, name):
    """Label map, its error and the planted map of every galaxy."""
    for plateifu in galaxies_of(root):
        path = utils.label_path(root, task, plateifu)
        labels, error = data_io.read_labels(path), data_io.read_label_error(path)
        yield labels, error, truth_of(root, plateifu)[name]


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
    parts, recipe = data_io.read_split(utils.split_path(survey, "hard_BPT"))
    assert recipe.options["kind"] == "hard"
    assert set().union(*(t["plateifu"] for t in parts.values())) <= set(galaxies)


@pytest.fixture(scope="module")
def trained(survey, tmp_path_factory):
    """A run of one epoch of the default network; only copies of it may be changed."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    config = run_SSFTT_training.train_config(data_dir=survey, run_dir=run_dir, epochs=1)
    assert run_SSFTT_training.main(config) == 0
    return run_dir


def test_default_commands_lead_from_cubes_to_figures(survey, trained, tmp_path, monkeypatch):
    run_dir = shutil.copytree(trained, tmp_path / "run")
    assert eval_fns.main(eval_fns.EvalConfig(run_dir)) == 0
    assert map_galaxies.main(map_galaxies.Config(run_dir=run_dir)) == 0
    assert vis_fns.main(vis_fns.VisConfig(run_dir, (galaxies_of(survey)[0],))) == 0
    scores = json.loads((run_dir / "test" / "metrics.json").read_text())
    assert 0 <= scores["accuracy"] <= 1
    assert len(list((run_dir / "maps").glob("*.fits"))) == 5
    assert len(list((run_dir / "figures").glob("*.png"))) >= 5
    plateifu = galaxies_of(survey)[0]
    config = process_single_cube.Config(
        fits=utils.find_raw(survey, plateifu, "LOGCUBE"), data_dir=tmp_path, like_run=run_dir
    )
    assert config.remove_gas_velocity  # unlike the training cubes
    assert process_single_cube.main(config) == 0
    assert process_single_cube.main(replace(config, data_dir=None)) == 0  # the run's, up to date
    inference.predict_cube(run_dir, utils.cube_path(tmp_path, plateifu))
    assert evidence.main(evidence.Config(run_dir, (plateifu,))) == 0
    found = fits.getheader(run_dir / "evidence" / f"{plateifu}.fits")
    assert found["DECISIVE"] > 0.6
    assert found["MOVED"] > 3 * found["MOVEDOTH"]
    readme = (ROOT / "README.md").read_text().partition("## In Python\n\n")[2].partition("\n\n")[0]
    lines = textwrap.dedent(readme).replace("results/demo/logOH_hard", str(run_dir))
    lines = lines.replace("data/demo", str(survey)).replace("13001-1901", plateifu)
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    assert (tmp_path / "map.png").stat().st_size > 10_000


def test_a_real_galaxy_is_mapped_by_a_model_of_simulated_ones(trained, real_maps, tmp_path):
    run_dir = shutil.copytree(trained, tmp_path / "run")
    config = real_galaxy.Config(run_dir, tmp_path / "data", real_maps, results=tmp_path)
    with pytest.raises(DataError, match="expected the scores of the run's test part"):
        real_galaxy.main(config)
    assert eval_fns.main(eval_fns.EvalConfig(run_dir)) == 0
    assert real_galaxy.main(config) == 0
    found = json.loads((tmp_path / "7815-3702.json").read_text())
    cube = utils.cube_path(tmp_path / "data", "7815-3702")
    prediction = inference.predict_cube(run_dir, cube)
    labels = data_io.read_labels(utils.label_path(tmp_path / "data", "logOH", "7815-3702"))
    known = np.isfinite(labels) & prediction.usable
    assert found["labelled"] == known.sum() > 500
    error = np.abs(prediction.logoh - labels)[known]
    assert found["rows"][0]["ours"] == pytest.approx(error.mean())
    held = error <= (prediction.upper - prediction.lower)[known] / 2
    assert found["held"] == pytest.approx(held.mean(), abs=2 / known.sum())
    assert (tmp_path / "7815-3702.png").stat().st_size > 10_000


def test_running_again_does_nothing(survey):
    def times():
        return {p: p.stat().st_mtime_ns for p in (survey / "processed").rglob("*") if p.is_file()}

    before = times()
    assert cube_processing.main(cube_processing.Config(data_dir=survey, jobs=1, **AS_PLANTED)) == 0
    assert times() == before


def test_labels_agree_with_the_truth_within_their_uncertainty(survey):
    """(12+log(O/H) from MAPS - noiseless value) / stated sigma: its width is about 1."""
    pulls, values = [], []
    for labels, sigma, truth in labels_and_truth(survey, "logOH", "logoh_o3n2"):
        good = np.isfinite(labels) & np.isfinite(truth)
        pulls.append(((labels - truth) / sigma)[good])
        values.append(labels[good])
    pulls = np.concatenate(pulls)
    assert pulls.size > 500
    robust = np.subtract(*np.percentile(pulls, [84.135, 15.865])) / 2
    # neighbouring spaxels share noise: these pulls are worth about 200 independent ones
    assert 0.85 < robust < 1.15
    assert 0.85 < pulls.std() < 1.15
    assert abs(np.median(pulls)) < 0.4
    assert np.std(np.concatenate(values)) > 0.03


def test_bpt_labels_agree_with_the_truth_as_often_as_stated(survey):
    wrong, stated = [], []
    for labels, p_wrong, truth in labels_and_truth(survey, "BPT", "bpt"):
        good = (labels >= 0) & (truth >= 0)
        wrong.append((labels != truth)[good])
        stated.append(p_wrong[good])
    wrong, stated = np.concatenate(wrong), np.concatenate(stated)
    assert wrong.size > 500
    assert abs(wrong.mean() - stated.mean()) < 0.02


def test_planted_line_fluxes_are_recovered_from_the_h5_cube(survey):
    """Line profiles fitted to the cube minus its continuum, compared with the truth."""
    pulls = {"Ha-6564": [], "NII-6585": [], "SII-6718": []}
    for plateifu in galaxies_of(survey):
        cube = data_io.read_cube(utils.cube_path(survey, plateifu))
        truth = truth_of(survey, plateifu)
        z = cube.attrs["redshift"]
        lines = cube.flux - planted_continuum(survey, plateifu, z)
        for line, found in pulls.items():
            bright = (truth[f"line_flux/{line}"] > 0.3) & np.isfinite(lines).all(axis=2)
            for y, x in np.argwhere(bright)[::7]:
                found.append(fitted_pull(lines[y, x], cube.ivar[y, x], truth, line, y, x, z))
    for found in map(np.array, pulls.values()):
        assert found.size > 50
        # neighbours share their noise, so a galaxy counts as few independent values
        assert abs(np.median(found)) < 0.6
        # neighbouring pixels are correlated, and sky lines leave more than the stated errors
        assert 0.75 < np.subtract(*np.percentile(found, [84.135, 15.865])) / 2 < 1.4


def to_h5_grid(spectra, z):
    """Mean flux density per H5 bin of (pixel, ...) spectra on the LOGCUBE grid, (bin, ...)."""
    edges = resample.log_edges(3.5589, 1e-4, len(spectra)) / (1 + z)
    _, bins = resample.target_grid(5000, 8000, 2040)
    matrix = resample.overlap_matrix(edges, bins)
    return (matrix @ spectra.reshape(len(spectra), -1)) / np.diff(bins)[:, None]


def planted_continuum(root, plateifu, z):
    """Noiseless stars of a simulated galaxy on the H5 grid, (y, x, band).

    From its parameters: in the LOGCUBE, MODEL - EMLINE is a fit, which errs by about 1 %.
    """
    drawn = {p.plateifu: p for p in mock.survey.simulated_galaxies(root)}
    scene = mock.galaxy.build_scene(drawn[plateifu])
    stars = mock.physics.to_image(scene, scene.stellar) * (1 + z)
    return to_h5_grid(stars, z).T.reshape(*stars.shape[1:], -1)


def fitted_pull(residual, ivar, truth, line, y, x, z):
    """(fitted - planted) / sigma of one line, fitted together with its neighbours.

    The profiles are integrated over the instrument's pixels and then resampled like the data,
    which widens the lines a little.
    """
    edges = resample.log_edges(3.5589, 1e-4, 4563) / (1 + z)
    near = {n: w for n, w in LINES_FITTED.items() if abs(w - LINES_FITTED[line]) < 70}
    columns = []
    for wave in near.values():
        mean = wave * (1 + truth["gas_velocity"][y, x] / C_KMS)
        instrument = mock.physics.instrument_sigma_kms(mean * (1 + z))
        sigma = mean * np.hypot(truth["gas_sigma"][y, x], instrument) / C_KMS
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
    for outcome in ("written", "up to date"):
        assert patching.patch_galaxy(survey, plateifu, "BPT", config) == outcome
    assert patching.main(config) == 0
    with pytest.raises(DataError, match=r"made with patch_size=5 \(now 3\)"):
        patching.patch_galaxy(survey, plateifu, "BPT", replace(config, patch_size=3))
    flux = data_io.read_cube(utils.cube_path(survey, plateifu)).flux
    labels = data_io.read_labels(utils.label_path(survey, "BPT", plateifu))
    usable = hsi_proc_fns.usable_spaxels(flux)
    for norm in config.patch_norms:
        path = utils.patch_path(survey, "BPT", norm, plateifu)
        patches, index, recipe = data_io.read_patches(path)
        assert recipe.options["patch_norm"] == norm
        normalised = hsi_proc_fns.normalise(flux, norm)
        np.testing.assert_array_equal(labels[index["y"], index["x"]], index["label"])
        np.testing.assert_array_equal(patches[:, 2, 2], normalised[index["y"], index["x"]])
        assert usable[index["y"], index["x"]].all()
        assert len(index) == (usable & (labels >= 0)).sum()
    with pytest.raises(DataError, match="--split-dir"):
        patching.stats_for(survey, replace(config, patch_norms=("PCA",)))


def test_patch_files_larger_than_allowed_are_refused_and_the_estimate_holds(survey):
    shutil.rmtree(survey / "processed" / "patches", ignore_errors=True)
    galaxy, norms = galaxies_of(survey)[0], ("global", "spectral")
    config = partial(patching.Config, data_dir=survey, plateifu=(galaxy,), patch_norms=norms)
    config = partial(config, label_tasks=("BPT",), patch_size=3)
    estimate = patching.bytes_to_write(survey, config(), [galaxy], None)
    with pytest.raises(DataError, match=r"would take 0\.\d\d GB, expected at most --max-gb 0\.001"):
        patching.main(config(max_gb=0.001))
    assert patching.main(config()) == 0
    written = [utils.patch_path(survey, "BPT", norm, galaxy).stat().st_size for norm in norms]
    assert 0.9 * estimate < sum(written) < 1.01 * estimate  # unusable spaxels; headers
    assert patching.bytes_to_write(survey, config(), [galaxy], None) == 0
    shutil.rmtree(survey / "processed" / "patches")
    shared = {"data_dir": survey, "label_tasks": ("BPT",), "patch_norms": norms, "patch_size": 3}
    shared |= AS_PLANTED
    another = galaxies_of(survey)[1]
    one = process_single_cube.Config(plateifu=galaxy, **shared)
    many = cube_processing.Config(plateifu=(another,), jobs=1, splits=False, **shared)
    for script, options, name in (
        (process_single_cube, one, galaxy),
        (cube_processing, many, another),
    ):
        with pytest.raises(DataError, match=r"expected at most --max-gb 0\.001"):
            script.main(replace(options, max_gb=0.001))
        assert not (survey / "processed" / "patches").exists()
        assert script.main(options) == 0
        found = sorted(p.name for p in (survey / "processed" / "patches").glob("BPT/*/*"))
        assert found == [name, name]
        shutil.rmtree(survey / "processed" / "patches")


def test_loop_over_galaxies_continues_past_bad_files(survey, tmp_path):
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
    assert sorted(failed) == galaxies[:3]
    for reason, found in zip(
        ("cut short", "zero bytes", "no manga-"), failed.values(), strict=True
    ):
        assert reason in found
    made = {p.stem for p in utils.processed_cubes(tmp_path)}
    assert made & set(galaxies) >= set(galaxies[3:])
    assert galaxies[0] not in made
    assert not [p for p in (tmp_path / "processed").rglob(".*") if p.is_file()]


def test_one_galaxy_by_name_or_by_files(survey, tmp_path, caplog):
    caplog.set_level("INFO")
    plateifu, cubes = galaxies_of(survey)[0], []
    files = {"fits": utils.find_raw(survey, plateifu, "LOGCUBE")}
    shutil.copytree(utils.raw_dir(survey, plateifu), utils.raw_dir(tmp_path, plateifu))
    both = {**files, "maps": utils.find_raw(survey, plateifu, "MAPS")}
    for i, choice in enumerate(({"plateifu": plateifu}, files, both)):
        target = tmp_path / str(i) if i else tmp_path  # without --maps, MAPS lies beside --fits
        assert process_single_cube.main(process_single_cube.Config(**choice, data_dir=target)) == 0
        label = utils.label_path(target, "BPT", plateifu)
        n = (data_io.read_labels(label) >= 0).sum()
        assert f"BPT labels of {n} spaxels: {label}" in caplog.text
        cubes.append(data_io.read_cube(utils.cube_path(target, plateifu)).flux)
    np.testing.assert_array_equal(cubes[1:], [cubes[0]] * 2)
    other = utils.find_raw(survey, galaxies_of(survey)[1], "MAPS")
    wrong = process_single_cube.Config(**files, maps=other, data_dir=tmp_path / "4")
    with pytest.raises(DataError, match=r"a file of galaxy .*Check --maps"):
        process_single_cube.main(wrong)
    assert not utils.processed_cubes(tmp_path / "4")
    config = process_single_cube.Config(
        maps=both["maps"], labels_only=True, data_dir=tmp_path / "3"
    )
    assert process_single_cube.main(config) == 0
    labels = (utils.label_path(root, "logOH", plateifu) for root in (tmp_path, tmp_path / "3"))
    np.testing.assert_array_equal(*map(data_io.read_labels, labels))
    assert not utils.processed_cubes(tmp_path / "3")


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (("--plateifu", "1-100"), 1, "'1-100' is not a valid plateifu"),
        (("--plateifu", "7000-1901"), 1, "no manga-7000-1901-LOGCUBE"),
        ((), 1, "no galaxy given. Expected --plateifu"),
        (("--fits", "absent-8485-1901.fits"), 1, "absent-8485-1901.fits: no such file"),
        (("--fits", "manga-8485-1901-MAPS-X.fits"), 1, "MAPS file by its name, expected a LOGCUBE"),
        (("--fits", "README.md"), 1, "README.md: not a FITS file"),
        (("--labels-only", "--plateifu", "7000-1901", "--redshift", "0.1"), 1, "no --redshift"),
        (("--plateifu", "7000-1901", "--min-snr", "-1"), 1, "--min-snr -1: expected 0 or more"),
        (("--plateifu", "7000-1901", "--min-snr", "nan"), 1, "--min-snr nan: expected 0 or more"),
        (("--plateifu", "7000-1901", "--patch-size", "0"), 2, "--patch-size 0: expected 1 or more"),
        (("--plateifu", "7000-1901", "--nband", "3"), 2, "--nband"),
        (("--plateifu", "7000-1901", "--n-band", "x"), 2, "--n-band"),
        (("--config", "absent.json"), 2, "absent.json"),
        (("--plateifu", "7000-1901", "--debug"), 1, "Traceback"),
    ],
)
def test_bad_command_line_is_one_line_and_its_exit_code(
    tmp_path, monkeypatch, command, words, code, expected
):
    data = tmp_path / "data"
    monkeypatch.chdir(tmp_path)
    Path("manga-8485-1901-MAPS-X.fits").touch()
    Path("README.md").write_text("# not a FITS file\n" * 300)
    words = *words, "--data-dir", data
    found, said = command(process_single_cube.main, process_single_cube.Config, *words)
    assert found == code
    assert expected in said
    assert ("Traceback" in said) == ("--debug" in words)
    assert "--debug" in words or said.count("\n") == 1
    assert not data.exists()


def test_real_maps_pass_the_whole_chain(real_maps, tmp_path):
    mock_manga.main(mock_manga.MockConfig(data_dir=tmp_path, from_maps=real_maps))
    config = cube_processing.Config(data_dir=tmp_path, splits=False, jobs=1)
    assert cube_processing.main(config) == 0
    labels = data_io.read_labels(utils.label_path(tmp_path, "BPT", "7815-3702"))
    assert np.bincount(labels[labels >= 0], minlength=3).tolist() == [575, 96, 0]
    cube = data_io.read_cube(utils.cube_path(tmp_path, "7815-3702"))
    assert cube.flux.shape == (42, 42, 2040)
    assert cube.attrs["redshift"] == pytest.approx(0.029382, abs=1e-6)
    usable = hsi_proc_fns.usable_spaxels(cube.flux)
    assert usable[labels >= 0].mean() > 0.95


@pytest.mark.parametrize("script", sorted({*SCRIPTS} - {*NEED_TORCH}), ids=lambda p: p.stem)
def test_scripts_that_need_no_torch_answer_help_without_it(script, tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(script), "--help"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert "usage" in done.stdout
    loaded = {line.split()[-1] for line in done.stderr.splitlines()}
    assert "utils" in loaded
    assert "torch" not in loaded
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", [*NEED_TORCH, *BENCHMARKS], ids=lambda p: p.stem)
def test_other_scripts_answer_help(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    assert stop.value.code == 0
    assert "usage" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


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
    users = {m: graph[m] & mocks for m in set(graph) - mocks if graph[m] & mocks}
    assert users == {"vis_fns": {"mock.truth"}}  # figures show the truth beside a prediction
    layouts = ("recipe", "h5_files", "data_io")
    for module in (
        "hsi_proc_fns",
        *layouts,
        "cube_patch_processing",
        "samples",
        "batches",
        "data_fns",
    ):
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
            environment = "sys.version_info < (3, 11) or not importlib.util.find_spec('tyro')"
            known = ("__name__ == '__main__'", "TYPE_CHECKING", environment)
            assert ast.unparse(node.test) in known
