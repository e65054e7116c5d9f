"""The export to ctapipe's DL1, read by its TableLoader, against ctapipe's own DL1 of real files."""

import warnings

import astropy.units as u
import numpy as np
import pytest
from conftest import all_images, decompressed, extract, other_production, real_file
from ctapipe.instrument import SubarrayDescription

from image_extractor import cli
from image_extractor.ctapipe_source import DatasetSource
from image_extractor.errors import DataError
from image_extractor.exporting import export

UNITS = {}  # of the columns read last


def loaded(path, **options):
    """Telescope events by (event_id, tel_id), as TableLoader reads them."""
    from ctapipe.io import TableLoader

    with warnings.catch_warnings(), TableLoader(path, focal_length_choice="EQUIVALENT") as loader:
        warnings.simplefilter("ignore")
        found = {}
        for tel_id in loader.subarray.tel:
            try:
                table = loader.read_telescope_events([tel_id], **options)
            except Exception as error:  # ctapipe's NoSuchNodeError, of telescopes without events
                assert type(error).__name__ in ("NoSuchNodeError", "OSError"), error
                continue
            found.update({(int(r["event_id"]), int(r["tel_id"])): r for r in table})
            UNITS.update({n: getattr(table[n], "unit", None) for n in table.colnames})
        return found, loader.subarray


@pytest.mark.parametrize(
    ("key", "storage"), [("gamma", "mapped"), ("sst", "all"), ("proton", "mapped")]
)
def test_table_loader_reads_ctapipes_images_and_true_values(key, storage, dl1, tmp_path):
    reference, subarray = dl1(key)
    extract(
        key,
        tmp_path / "o.h5",
        dtype="float32",
        storage_mode=storage,
        scale_factor=1 + (key == "sst"),
    )
    assert export(tmp_path / "o.h5", tmp_path / "d.h5") == len(reference)
    found, array = loaded(tmp_path / "d.h5", dl1_images=True, simulated=True)
    expected = {(e, t): (*im, shower) for e, ims, shower in reference for t, im in ims.items()}
    assert found.keys() == expected.keys()
    for (event_id, tel_id), (charge, time, shower) in expected.items():
        row = found[event_id, tel_id]
        np.testing.assert_allclose(row["image"], charge, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(row["peak_time"], time, rtol=1e-6, atol=1e-5)
        assert row["true_energy"] == pytest.approx(shower.energy.to_value("TeV"))
        assert row["true_alt"] == pytest.approx(shower.alt.to_value("deg"), abs=1e-5)
        assert row["true_core_x"] == shower.core_x.to_value("m")
        ours, theirs = (s.tel[tel_id].camera.geometry for s in (array, subarray))
        for name in ("pix_x", "pix_y", "pix_area"):
            np.testing.assert_allclose(getattr(ours, name).value, getattr(theirs, name).value)
        assert (ours.neighbor_matrix != theirs.neighbor_matrix).sum() == 0
        assert u.isclose(ours.pix_rotation, theirs.pix_rotation, atol=1e-6 * u.deg)
    # What dl1-data-handler and ctapipe-merge ask of their files, and NaN in an array prevents.
    again = SubarrayDescription.from_hdf(tmp_path / "d.h5", focal_length_choice="EQUIVALENT")
    assert array == again


@pytest.mark.parametrize("key", ["gamma", "sst", "proton"])
def test_parameters_equal_ctapipes_for_every_telescope_event(key, tmp_path, monkeypatch):
    """ImageProcessor on the simtel file, against the export with --parameters."""
    from ctapipe import fitting

    def seeded(**options):  # ctapipe's fit of the times begins with random pixels
        return fitting.lts_linear_regression(**options, rng=np.random.default_rng(0))

    monkeypatch.setattr("ctapipe.image.timing.lts_linear_regression", seeded)
    from ctapipe.calib import CameraCalibrator
    from ctapipe.image import ImageProcessor
    from ctapipe.io import SimTelEventSource

    extract(key, tmp_path / "o.h5", dtype="float32")
    words = ["export", str(tmp_path / "o.h5"), "--output", str(tmp_path / "d.h5"), "--parameters"]
    assert cli.main(words) == 0
    found, _ = loaded(tmp_path / "d.h5", dl1_parameters=True, dl1_images=True)
    compared = 0
    with SimTelEventSource(real_file(key), focal_length_choice="EQUIVALENT") as source:
        calibrate, process = (C(source.subarray) for C in (CameraCalibrator, ImageProcessor))
        for event in source:
            calibrate(event)
            process(event)
            for tel_id, dl1 in event.dl1.tel.items():
                row = found[int(event.index.event_id), tel_id]
                np.testing.assert_array_equal(row["image_mask"], dl1.image_mask)
                is_small = dl1.image_mask.sum() < 10  # too few for a robust fit of the times
                for container in dl1.parameters.values():
                    for name, value in container.as_dict(add_prefix=True).items():
                        if is_small and name.startswith("timing"):
                            continue
                        if hasattr(value, "unit"):
                            value = value.to_value(UNITS[name])
                        np.testing.assert_allclose(row[name], value, 1e-3, 1e-4, err_msg=name)
                        compared += np.isfinite(value)
    assert compared > 40 * len(found) / 4


def test_a_part_is_exported_alone_and_the_source_is_found_by_ctapipe(tmp_path):
    from ctapipe.io import EventSource

    extract("sst", tmp_path / "o.h5", split={"A": 0.5, "B": 0.5})
    sizes = [export(tmp_path / "o.h5", tmp_path / f"{part}.h5", part) for part in ("A", "B")]
    assert sum(sizes) == 31
    assert min(sizes) > 5
    with EventSource(tmp_path / "o.h5") as source:
        assert isinstance(source, DatasetSource)
        assert sum(len(e.dl1.tel) for e in source) == sum(
            len(images) for _, images in all_images(tmp_path / "o.h5").values()
        )


def test_what_dl1_cannot_hold_is_refused(tmp_path):
    extract("proton", tmp_path / "o.h5", mapping="rebin", max_events=2)
    with pytest.raises(DataError, match=r"mapped by rebin, .* \(expected square, axial or none\)"):
        export(tmp_path / "o.h5", tmp_path / "d.h5")
    (tmp_path / "g.simtel").write_bytes(other_production(decompressed(real_file("proton")), 0))
    extract("proton", tmp_path / "p.h5")
    extract(tmp_path / "g.simtel", tmp_path / "p.h5")
    with pytest.raises(DataError, match=r"different events have the numbers run \d+ event \d+"):
        export(tmp_path / "p.h5", tmp_path / "d.h5")
    (tmp_path / "d.h5").write_text("mine")
    with pytest.raises(DataError, match=r"d\.h5: exists"):
        export(tmp_path / "o.h5", tmp_path / "d.h5")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.h5", "g.simtel", "o.h5", "p.h5"]
