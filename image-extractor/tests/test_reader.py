"""Reading data sets for training: values against ctapipe's, parts, several files, workers."""

import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import PACKAGE, decompressed, extract, other_production, real_file
from test_extract import cells

from image_extractor import layout
from image_extractor.errors import DataError
from image_extractor.reader import Events, Images, offset_deg


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Protons, and the same as gammas of 1.5 times the energy, each split."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "g.simtel").write_bytes(other_production(decompressed(real_file("proton")), 0, 1.5))
    options = dict(split={"Training": 0.5, "Validation": 0.5}, dtype="uint32")
    extract("proton", folder / "p.h5", **options)
    extract(folder / "g.simtel", folder / "g.h5", storage_mode="all", **options)
    return [folder / "p.h5", folder / "g.h5"]


def test_images_and_labels_equal_ctapipes(files, dl1):
    from astropy import units as u
    from ctapipe.coordinates import impact_distance

    reference, subarray = dl1("proton")
    where = cells("proton")
    for telescopes in ("LST", "FlashCam"):
        data = Images(files[:1], telescopes=telescopes)
        assert data.channels == ("charge", "time")
        expected = {
            (event_id, t): (image, shower)
            for event_id, images, shower in reference
            for t, image in images.items()
            if str(subarray.tel[t].camera) == (telescopes if telescopes != "LST" else "LSTCam")
        }
        assert len(data) == len(expected) > 1
        for sample in data:
            event = data.events[sample["event"]]
            tel_id = sample["tel_id"]
            (charge, time), shower = expected.pop((int(event["event_number"]), tel_id))
            index, shape, rate = where[tel_id]
            assert sample["image"].shape == (2, *shape)
            pixels = sample["image"].reshape(2, -1)[:, index]
            np.testing.assert_allclose(pixels[0], np.clip(charge, 0, None), atol=0.00501)
            np.testing.assert_allclose(pixels[1], np.clip(time * rate, 0, None), atol=0.00501)
            assert sample["particle"] == 0
            assert 10 ** float(sample["log_energy"]) == pytest.approx(shower.energy.to_value("TeV"))
            distance = impact_distance(
                [shower.core_x.to_value("m"), shower.core_y.to_value("m"), 0],
                np.ravel(
                    [
                        np.cos(shower.alt) * np.cos(shower.az),
                        -np.cos(shower.alt) * np.sin(shower.az),
                        np.sin(shower.alt),
                    ]
                ),
                subarray.positions[tel_id].to_value(u.m)[None],
            )
            assert sample["impact"] == pytest.approx(float(np.ravel(distance)[0]), rel=1e-4)
        assert not expected


def test_directions_are_offsets_from_the_pointing():
    from astropy.coordinates import AltAz, SkyCoord

    rng = np.random.default_rng(0)
    assert offset_deg(1.0, 1.2, 1.0, 1.2).tolist() == pytest.approx([0, 0], abs=1e-5)
    assert offset_deg(1.0, 1.2001, 1.0, 1.2)[0] > 0 < offset_deg(1.0001, 1.2, 1.0, 1.2)[1]
    for _ in range(20):
        az, alt = rng.uniform(0, 6), rng.uniform(0.5, 1.5)
        az2, alt2 = az + rng.normal(0, 0.05), alt + rng.normal(0, 0.05)
        a, b = (SkyCoord(x, y, unit="rad", frame=AltAz()) for x, y in ((az, alt), (az2, alt2)))
        distance = np.hypot(*offset_deg(az2, alt2, az, alt))
        assert np.radians(distance) == pytest.approx(np.tan(a.separation(b).rad), rel=1e-4)


def test_parts_of_several_files_share_no_shower_and_lose_no_image(files, dl1):
    whole = Events(files)
    parts = [Events(files, part) for part in ("Training", "Validation")]
    assert len(whole) == sum(map(len, parts)) == 12
    showers = [set(p.events["shower"].tolist()) for p in parts]
    assert not showers[0] & showers[1]
    assert np.bincount(whole.particles()).tolist() == [6, 6]
    assert sum(len(s["images"]) for s in whole) == 2 * sum(len(e[1]) for e in dl1("proton")[0])
    gammas = [s for s in whole if s["particle"]]
    protons = [s for s in whole if not s["particle"]]
    number = {s["event"]: int(whole.events["event_number"][s["event"]]) for s in whole}
    for gamma in gammas:  # stored in the other storage mode, from the same waveforms
        (proton,) = [p for p in protons if number[p["event"]] == number[gamma["event"]]]
        assert gamma["tel_ids"] == proton["tel_ids"]
        assert gamma["log_energy"] - proton["log_energy"] == pytest.approx(np.log10(1.5), abs=1e-5)
        for a, b in zip(gamma["images"], proton["images"], strict=True):
            np.testing.assert_array_equal(a, b)


def test_wrong_parts_telescopes_and_shapes_are_named(files, tmp_path):
    with pytest.raises(DataError, match=r"no part 'Test' \(expected one of Events_Training, "):
        Images(files, "Test")
    with pytest.raises(DataError, match=r"no telescope 'SCT' \(expected one of LST LSTCam, MST "):
        Images(files, telescopes="SCT")
    with pytest.raises(DataError, match=r"images of the shapes \(2, 55, 55\), \(2, "):
        Images(files)
    extract("proton", tmp_path / "c.h5", image_mode="PIXELS_1C")
    with pytest.raises(DataError, match="expected the same in all files"):
        Images([files[0], tmp_path / "c.h5"], telescopes="LST")


def test_a_pickled_reader_reads_the_same(files):
    data = Images(files, telescopes="LST", transform=_log)
    first = data[0]["image"]
    again = pickle.loads(pickle.dumps(data))
    assert again._open == {}
    np.testing.assert_array_equal(again[0]["image"], first)
    assert first.max() < 10
    data.close()
    np.testing.assert_array_equal(data[0]["image"], first)
    with pytest.raises(IndexError):
        data[len(data)]


def _log(sample):
    return {**sample, "image": np.log1p(sample["image"])}


def test_reading_needs_neither_ctapipe_nor_torch(files):
    code = (
        "import sys; from image_extractor.reader import Images; Images(sys.argv[1], "
        "telescopes='LST')[0]; print(sorted({'ctapipe', 'torch', 'astropy', 'numba', 'scipy'}"
        " & sys.modules.keys()))"
    )
    words = [sys.executable, "-c", code, str(files[0])]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_batches_of_images_and_events(files):
    torch = pytest.importorskip("torch", reason="torch is absent: pip install '.[torch]'")
    from image_extractor.torch_reader import class_weights, loader

    images = Images(files, telescopes="LST")
    seen = [b["event"] for b in loader(images, 4)]
    assert sorted(torch.cat(seen).tolist()) == sorted(s["event"] for s in images)
    batches = list(loader(images, 4, shuffle=False, workers=2))
    stacked = torch.cat([b["image"] for b in batches])
    np.testing.assert_array_equal(stacked.numpy(), [s["image"] for s in images])
    assert batches[0]["image"].dtype == torch.float32
    few = Images(files, telescopes="LST")
    few._images = few._images[
        [*np.flatnonzero(few.particles())[:1], *np.flatnonzero(few.particles() == 0)]
    ]
    weights = class_weights(few)
    assert (weights * torch.bincount(torch.tensor(few.particles()))).tolist() == [len(few) / 2] * 2
    drawn = [b["particle"] for _ in range(40) for b in loader(few, 8, balanced=True, seed=_)]
    assert 0.4 < torch.cat(drawn).double().mean() < 0.6
    events = Events(files)
    (batch,) = loader(events, len(events), shuffle=False)
    for i, sample in enumerate(events):
        n = len(sample["images"])
        assert batch["mask"][i].tolist() == [k < n for k in range(batch["mask"].shape[1])]
        for k, image in enumerate(sample["images"]):
            x, y = image.shape[1:]
            np.testing.assert_array_equal(batch["images"][i, k, :, :x, :y], image)
        assert not batch["images"][i, n:].any()


def test_the_reading_examples_of_the_readme(files, monkeypatch):
    """Its lines train a classifier, and weigh the events of a file."""
    pytest.importorskip("torch", reason="torch is absent: pip install '.[torch]'")
    text = (PACKAGE / "README.md").read_text()
    training, weighting = re.findall(
        r"```python\n(from image_extractor\.reader.*?)```", text, re.DOTALL
    )
    monkeypatch.chdir(files[0].parent)
    names = {}
    for code, path, name in (
        (training, files[0], "dataset.h5"),
        (weighting, files[1], "gammas.h5"),
    ):
        shutil.copy(path, name)
        exec(code, names)
    assert float(names["loss"].detach()) > 0
    assert len(names["weight"]) == len(names["gammas"])
    assert (names["weight"] > 0).all()
    assert names["area"].shape == (2,)


def test_every_event_has_its_source(files):
    for path in files:
        with layout.open_layout(path) as h5:
            index, runs = layout.index_table(h5), layout.runs_table(h5)
        assert np.bincount(index["source"]).tolist() == runs["events_written"].tolist() == [6]
