"""Toy showers and the training on them: geometry, labels, whole data sets, scores."""

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import astropy.units as u
import numpy as np
import pytest
from conftest import PACKAGE, all_images, real_file

from image_extractor import layout
from image_extractor.ctapipe_source import DatasetSource
from image_extractor.look import validate
from image_extractor.reader import Events, Images

sys.path.append(str(PACKAGE / "scripts"))
import mock_showers
import shower_parameters

ABSENT = "torch is absent: pip install '.[torch]'"
torch = pytest.importorskip("torch", reason=ABSENT)
torch_reader = pytest.importorskip("image_extractor.torch_reader", reason=ABSENT)
train_cta = pytest.importorskip("train_cta", reason=ABSENT)
SPLIT = {"Training": 0.5, "Validation": 0.2, "Test": 0.3}


@pytest.fixture(scope="module")
def camera():
    return mock_showers.camera_named("FlashCam", real_file("calib"))


@pytest.fixture(scope="module")
def mock(camera, tmp_path_factory):
    """Ten showers of each primary, used six times."""
    path = tmp_path_factory.mktemp("mock") / "mock.h5"
    mock_showers.write(path, camera, 10, 6, seed=3, jobs=2, split=SPLIT)
    return path


def test_a_mock_data_set_is_valid_and_its_showers_are_used_again(mock):
    assert validate(mock) == []
    with layout.open_layout(mock) as h5:
        index, runs = layout.index_table(h5), layout.runs_table(h5)
    assert runs["shower_reuse"].tolist() == [6, 6]
    assert runs["events_written"].sum() == len(index) > 40
    for run, primary in ((1, 0), (2, 101)):
        mine = index[index["run_number"] == run]
        assert set(mine["primary_id"]) == {primary}
        assert np.unique(mine["shower"]).size <= 10 < len(mine)
        low, high = mock_showers.ENERGY_TEV[primary]
        assert low <= mine["mc_energy"].min() < mine["mc_energy"].max() <= high


def test_the_seed_determines_a_mock_data_set_whatever_the_processes(camera, tmp_path):
    for name, seed, jobs in (("a", 1, 1), ("b", 1, 2), ("c", 2, 1)):
        mock_showers.write(tmp_path / f"{name}.h5", camera, 2, 3, seed=seed, jobs=jobs)
    sums = []
    for name in "abc":
        with layout.open_layout(tmp_path / f"{name}.h5") as h5:
            sums.append(layout.index_table(h5)["checksum"].tolist())
    assert sums[0] == sums[1] != sums[2]


def test_true_directions_and_cores_of_mock_gammas_are_reconstructed(mock):
    """By ctapipe's HillasReconstructor, which is independent of us, and by shower_parameters."""
    from ctapipe.image import ImageProcessor
    from ctapipe.reco import ShowerProcessor

    off = []
    with DatasetSource(mock) as source:
        process, reconstruct = ImageProcessor(source.subarray), ShowerProcessor(source.subarray)
        for event in source:
            shower = event.simulation.shower
            process(event)
            reconstruct(event)
            found = event.dl2.stereo.geometry["HillasReconstructor"]
            if found.is_valid and shower.shower_primary_id == 0:
                truth = (shower.alt.to_value("deg"), shower.az.to_value("deg"))
                alt, az = found.alt.to_value("deg"), found.az.to_value("deg")
                side = ((az - truth[1] + 180) % 360 - 180) * np.cos(np.radians(alt))
                x, y = found.core_x - shower.core_x, found.core_y - shower.core_y
                off.append((np.hypot(alt - truth[0], side), np.hypot(x, y).to_value("m")))
    assert len(off) > 20
    angle, distance = np.median(off, axis=0)
    assert angle < 0.15  # deg; a sign or axis that is wrong gives more than 1
    assert distance < 20  # m
    data, found = Events(mock), shower_parameters.compute(mock)
    assert list(map(tuple, found.numbers.tolist())) == (
        data.events[["run_number", "event_number"]].tolist()
    )
    gammas = np.flatnonzero(data.particles())
    truth = np.array([data[i]["direction"] for i in gammas])
    assert np.median(np.linalg.norm(found.direction[gammas] - truth, axis=1)) < 1.2 * angle
    impact = [s["impact"] for s in Images(mock) if s["particle"]]
    assert np.nanmedian(found.images[gammas][..., 1]) == pytest.approx(np.median(impact), rel=0.1)


def test_light_time_and_impact_follow_from_the_shower(mock, camera):
    rng = np.random.default_rng(0)
    toy = mock_showers.ToyTelescope(mock_showers.array_of(camera)[0])
    shower = mock_showers.simulate(1, mock_showers.GAMMA, rng)
    (part,) = shower.cascades
    views = [
        toy._view(shower, replace(part, light_tev=k * part.light_tev), np.zeros(3)) for k in (1, 2)
    ]
    assert views[1].intensity == pytest.approx(2 * views[0].intensity)
    assert views[0].length > views[0].width
    protons = [mock_showers.simulate(i, mock_showers.PROTON, rng) for i in range(50)]
    assert 2 < np.mean([len(p.cascades) for p in protons]) < 6
    data = Images(mock)
    assert max(s["impact"] for s in data) < mock_showers.CORE_RADIUS_M + mock_showers.SPACING_M
    assert len(data) == sum(len(images) for _, images in all_images(mock).values())


def test_a_cascade_is_the_skewed_gaussian_of_ctapipe(camera):
    from ctapipe.image.toymodel import SkewedGaussian, obtain_time_image

    toy = mock_showers.ToyTelescope(mock_showers.array_of(camera)[0])
    view = mock_showers.View(500.0, np.array([0.1, -0.3]), 2.0, 0.08, 0.03, 4.0, 20.0)
    charge, times = toy._cascade(view)
    (x, y), psi, geometry = view.middle * u.m, view.psi * u.rad, camera.geometry
    model = SkewedGaussian(x, y, view.length * u.m, view.width * u.m, psi, mock_showers.SKEWNESS)
    assert charge == pytest.approx(model.expected_signal(geometry, view.intensity), abs=1e-12)
    gradient, at_middle = view.gradient * u.ns / u.m, view.time * u.ns
    args = (geometry.pix_x, geometry.pix_y, x, y, psi, gradient, at_middle)
    assert times == pytest.approx(obtain_time_image(*args))


def test_training_writes_a_run_and_scores_the_test_events(mock, tmp_path, caplog):
    words = [str(mock), "--run-dir", str(tmp_path / "run"), "--epochs", "1", "--threads", "1"]
    summary = train_cta.main(train_cta.parsed(words))
    run = tmp_path / "run"
    for name in ("config.json", "environment.json", "log.txt", "metrics.csv", "network.pt"):
        assert (run / name).stat().st_size > 0
    for name in ("roc.png", "energy.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    assert json.loads((run / "summary.json").read_text())["events"] == summary["events"]
    rows = list(csv.DictReader((run / "events.csv").open()))
    assert len(rows) == summary["events"]["Test"] == len(Events(mock, "Test"))
    for name in ("network", "Hillas, boosted"):
        value, low, high = summary[name]["auc"]
        truth = np.array([int(r["particle"]) for r in rows])
        logit = np.array([float(r[f"{name} logit".replace(", ", " ")]) for r in rows])
        order = logit[truth == 1][:, None] - logit[truth == 0]  # AUC: pairs in the right order
        assert value == pytest.approx(np.mean(order > 0) + np.mean(order == 0) / 2, abs=1e-6)
        assert low <= value <= high
    assert summary["test_events_with_shower_in_training"] == 0
    assert "have their shower in Training" not in caplog.text


def test_a_split_by_event_is_reported_as_a_leak(camera, tmp_path, caplog):
    path = tmp_path / "leaky.h5"
    mock_showers.write(path, camera, 4, 6, seed=3, jobs=2, split=SPLIT, split_by="event")
    words = [str(path), "--run-dir", str(tmp_path / "run"), "--epochs", "1"]
    summary = train_cta.main(train_cta.parsed([*words, "--threads", "1"]))
    assert summary["test_events_with_shower_in_training"] > 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "test events have their shower in Training, too: the scores are too good" in log


def prepare(mock):
    """All events, with four parameters that are 1."""
    data = Events(mock)
    shapes = {"event_parameters": (4,), "image_parameters": (4, 4), "boosted": (2,)}
    ones = {name: np.ones((len(data), *shape)) for name, shape in shapes.items()}
    directions = np.array([sample["direction"] for sample in data])
    return train_cta.Prepared(data, train_cta.Lattice(mock), directions, ones)


def test_the_network_ignores_padding(mock):
    network, prepared = train_cta.ShowerNetwork(4, 4).eval(), prepare(mock)
    few = min(range(len(prepared)), key=lambda i: len(prepared[i]["images"]))
    many = max(range(len(prepared)), key=lambda i: len(prepared[i]["images"]))
    n = len(prepared[few]["images"])
    assert n < len(prepared[many]["images"])
    for head in network.heads:
        torch.nn.init.ones_(head[-1].weight)  # 0 before training
    tables = {k: torch.from_numpy(x[[few, many]]).float() for k, x in prepared.tables.items()}
    both = torch_reader.collate([prepared[few], prepared[many]]) | tables
    alone = {k: v[:1] for k, v in both.items()}
    alone |= {k: alone[k][:, :n] for k in ("mask", "images", "image_parameters")}
    with torch.no_grad():
        found = [network(b)[0][0] for b in (alone, both)]
    assert torch.allclose(*found, atol=1e-5)


def test_a_cut_out_points_from_its_centre_of_charge_to_the_direction(mock, camera):
    lattice = train_cta.Lattice(mock)
    spacing = np.degrees(0.05 / camera.focal_length_m)  # pixels of FlashCam: 5 cm
    assert np.linalg.norm(lattice.axes, axis=1) == pytest.approx(spacing, rel=0.02)
    image = np.zeros((2, 56, 56), np.float32)
    image[0, 25:28, 26:31] = 50  # p.e.
    image[0, 31, 28] = 60
    cells = np.argwhere(image[0])
    places, charge = cells @ lattice.axes + lattice.origin, image[0][tuple(cells.T)]
    centre = charge @ places / charge.sum()
    half = (train_cta.WINDOW - 1) / 2
    for angle in (0.0, 1.0, 4.0):
        along = np.array([np.cos(angle), np.sin(angle)])
        along, aside = (places - centre) @ along, (places - centre) @ [-along[1], along[0]]
        image[1][tuple(cells.T)] = 10 + 5 * aside  # samples
        direction = centre + 2 * np.array([np.cos(angle), np.sin(angle)])
        charges, times = lattice.cut_out(image, direction)
        pe = np.expm1(3 * charges)
        x, y = (np.indices(pe.shape) - half) * lattice.step
        assert pe.sum() == pytest.approx(charge.sum(), rel=0.1)
        for ours, true in ((x, along), (y, aside)):
            assert (pe * ours).sum() / pe.sum() == pytest.approx(0, abs=0.1 * spacing)
            skewness = (charge @ true**3) / charge.sum()  # tells the two sides apart
            assert (pe * ours**3).sum() / pe.sum() == pytest.approx(skewness, abs=0.1 * spacing)
        assert (pe * times * y).sum() / (pe * y * y).sum() == pytest.approx(1, rel=0.3)


def test_kept_events_are_the_same_and_end_at_the_limit(mock, monkeypatch):
    monkeypatch.setattr(train_cta, "KEPT_BYTES", 100_000)
    prepared = prepare(mock)
    first = [prepared[i]["images"][0].copy() for i in range(20)]
    assert 1 < len(prepared.kept) < 20
    assert all(np.array_equal(prepared[i]["images"][0], first[i]) for i in range(20))


def test_parameters_are_kept_for_later_runs(mock, tmp_path, monkeypatch):
    kept = tmp_path / "parameters.npz"
    events = {part: Events(mock, part) for part in train_cta.PARTS}
    first = shower_parameters.of_parts(mock, events, kept)
    monkeypatch.delattr(shower_parameters, "compute")
    again = shower_parameters.of_parts(mock, events, kept)
    for part, found in first.items():
        assert found.table().shape == (len(events[part]), 38)
        for name, values in vars(found).items():
            assert np.array_equal(values, getattr(again[part], name), equal_nan=True)
    for name in ("table", "images"):
        values = {p: f.table() if name == "table" else f.images for p, f in first.items()}
        scaled = train_cta.standardised(values)
        axes = tuple(range(scaled["Training"].ndim - 1))
        assert abs(scaled["Training"].mean(axes)).max() < 0.2
        assert all(np.isfinite(x).all() for x in scaled.values())


def test_reading_many_files_takes_little_memory(mock, tmp_path):
    """HDF5 would keep up to 16 MB of images of each telescope of each file."""
    for k in range(20):
        shutil.copy(mock, tmp_path / f"{k}.h5")
    code = """
import re, sys
from pathlib import Path
from image_extractor.reader import Images

def used():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1000

data = Images(sorted(Path(sys.argv[1]).glob("*.h5")))
for i in range(0, len(data), 20):
    data[i]
before = used()
print(sum(data[i]["image"].nbytes for i in range(len(data))) / 1e6, used() - before)
"""
    words = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    size, grown = map(float, done.stdout.split())
    assert size > 100  # MB
    assert grown < 20


def test_scores_of_known_results():
    rng = np.random.default_rng(0)
    bias, width = train_cta.bias_and_resolution(1.1 + 0.2 * rng.standard_normal(100_000))
    assert (bias, width) == pytest.approx((0.1, 0.2), abs=0.003)  # 68 % of a normal: one sigma
    logit = rng.normal(0, 2, 50_000)
    truth = (rng.random(logit.size) < 1 / (1 + np.exp(-logit))).astype(int)
    assert train_cta.temperature(3 * logit, truth) == pytest.approx(3, rel=0.05)
    showers = np.repeat(np.arange(50), 20)  # the uses of a shower are equal: 50, not 1000, values
    values = np.repeat(rng.normal(0, 1, 50), 20)
    mean, low, high = train_cta.interval(
        lambda weights: np.average(values, weights=weights), showers, 0
    )
    assert mean == pytest.approx(values.mean())
    assert (high - low) / 4 == pytest.approx(values.std() / np.sqrt(50), rel=0.2)
