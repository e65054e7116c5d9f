"""Charges and times against ctapipe's calibration of the real files, bit for bit."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import real_file

from image_extractor.calibrate import WINDOW_SHIFT, WINDOW_WIDTH, Calibrator, integration_correction
from image_extractor.instrument import describe_array
from image_extractor.simtel import ADC_SAMPLES, Corrupt, RawObject, SimtelFile


@pytest.mark.parametrize(
    ("key", "n_images"), [("gamma", 42), ("sst", 129), ("proton", None), ("calib", 7)]
)
def test_every_pixel_of_every_telescope_event_equals_ctapipe(key, n_images, dl1):
    reference, _ = dl1(key, calibration=key == "calib")
    compared = 0
    with SimtelFile(real_file(key)) as simtel:
        telescopes = describe_array(simtel)
        calibrators = {t: Calibrator(d) for t, d in telescopes.items()}
        for event, (event_id, images, _) in zip(
            simtel.events(calibration=True), reference, strict=True
        ):
            assert event.event_id == event_id or key == "calib"
            assert event.telescopes.keys() == images.keys()
            for tel_id, adc in event.telescopes.items():
                charge, peak_time = calibrators[tel_id](adc, simtel.monitoring[tel_id])
                np.testing.assert_array_equal(charge, images[tel_id][0])
                np.testing.assert_array_equal(peak_time, images[tel_id][1])
                compared += 1
    assert compared == (n_images or sum(len(images) for _, images, _ in reference)) > 0


@pytest.mark.parametrize("key", ["gamma", "sst", "proton", "calib"])
def test_the_integration_correction_equals_ctapipes(key):
    from ctapipe.image.extractor import integration_correction as theirs

    with SimtelFile(real_file(key)) as simtel:
        for telescope in describe_array(simtel).values():
            camera = telescope.camera
            arguments = (
                camera.reference_pulse,
                camera.reference_step_ns,
                1 / camera.sampling_rate_ghz,
            )
            ours = integration_correction(*arguments, WINDOW_WIDTH, WINDOW_SHIFT)
            np.testing.assert_array_equal(ours, theirs(*arguments, WINDOW_WIDTH, WINDOW_SHIFT))


def test_decoded_samples_equal_eventios():
    n = 0
    with SimtelFile(real_file("proton")) as simtel:
        telescopes = describe_array(simtel)
        for event in simtel.events():
            for tel_id, adc in event.telescopes.items():
                if adc.type == ADC_SAMPLES:  # some cameras have sums only
                    ours = Calibrator(telescopes[tel_id])._samples(adc)
                    np.testing.assert_array_equal(ours, adc.parse())
                    n += 1
    assert n > 30


@pytest.mark.parametrize("keep", [0, 5, 8, 9, 500, -8])
def test_truncated_waveforms_are_refused(keep):
    with SimtelFile(real_file("proton")) as simtel:
        telescopes = describe_array(simtel)
        event = next(simtel.events())
        tel_id, adc = next(iter(event.telescopes.items()))
        cut = RawObject(adc.type, adc.id, adc.header, adc.payload[:keep])
        with pytest.raises(Corrupt, match=f"telescope {tel_id}"):
            Calibrator(telescopes[tel_id])(cut, simtel.monitoring[tel_id])


def test_gains_of_another_camera_are_refused():
    with SimtelFile(real_file("proton")) as simtel:
        telescopes = describe_array(simtel)
        tel_id, adc = next(iter(next(simtel.events()).telescopes.items()))
        monitoring = simtel.monitoring[tel_id]
        values = monitoring.refresh()
        values["calib"] = values["calib"][:, :-5]
        with pytest.raises(
            Corrupt, match=f"telescope {tel_id}: .* do not fit pedestals and gains of shapes"
        ):
            Calibrator(telescopes[tel_id])(adc, monitoring)


def test_disabled_pixels_get_the_mean_of_their_neighbours():
    with SimtelFile(real_file("proton")) as simtel:
        telescopes = describe_array(simtel)
        tel_id, adc = next(iter(next(simtel.events()).telescopes.items()))
        telescope = replace(telescopes[tel_id], disabled_pixels=np.array([5, 6, 7, 700, 900, 1200]))
        charge, _ = Calibrator(telescope)(adc, simtel.monitoring[tel_id])
        for pixel in telescope.disabled_pixels:
            near = telescope.camera.geometry.neighbors[pixel]
            good = [n for n in near if n not in telescope.disabled_pixels]
            assert charge[pixel] == pytest.approx(charge[good].mean(), rel=1e-5)
