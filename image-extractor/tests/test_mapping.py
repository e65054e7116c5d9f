"""Mapped images against independent constructions from the pixel positions."""

import functools

import numpy as np
import pytest
from conftest import real_file
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree

from image_extractor.errors import DataError
from image_extractor.instrument import describe_array
from image_extractor.mapping import camera_mapping, lattice_neighbors
from image_extractor.settings import CONSERVING, MAPPINGS
from image_extractor.simtel import SimtelFile


@pytest.fixture(scope="module")
def cameras():
    found = {}
    for key in ("calib", "gamma"):
        with SimtelFile(real_file(key)) as simtel:
            for telescope in describe_array(simtel).values():
                found.setdefault((key, telescope.camera.name), telescope.camera)
    return found


def test_sct_is_the_rank_of_coordinates_for_all_11328_pixels(cameras):
    for key in ("gamma", "calib"):
        camera = cameras[key, "SCTCam"]
        charge = np.random.default_rng(0).uniform(1, 2, 11328)
        expected = np.zeros((120, 120))
        ix = np.unique(camera.pixel_x, return_inverse=True)[1]
        iy = np.unique(camera.pixel_y, return_inverse=True)[1]
        expected[ix, iy] = charge
        np.testing.assert_array_equal(
            camera_mapping(camera.pixel_x, camera.pixel_y).image(charge), expected
        )
        # The historic map: rows of 8 x 8 pixel modules.
        rows = [5, 9, 11, 13, 13, 15, 15, 15, 15, 15, 13, 13, 11, 9, 5]
        assert (expected > 0).sum(axis=1).reshape(15, 8).tolist() == [[8 * n] * 8 for n in rows]


def test_lattices_are_recognised(cameras):
    square = {"SCTCam", "CHEC", "ASTRICam"}
    for (_, name), camera in cameras.items():
        assert lattice_neighbors(camera.pixel_x, camera.pixel_y) == (4 if name in square else 6), (
            name
        )


def test_one_cell_methods_keep_neighbours_together(cameras):
    """Pixels are neighbours in the image if, and only if, they are neighbours in the camera."""
    offsets_of = {
        "square": {(0, 1), (1, 0)},
        "axial+": {(0, 1), (1, 0), (1, 1)},
        "axial-": {(0, 1), (1, 0), (1, -1)},
    }
    for (_, name), camera in cameras.items():
        mapping = camera_mapping(camera.pixel_x, camera.pixel_y)
        column, row = np.divmod(mapping.cells, mapping.shape[1])
        tree = cKDTree(np.c_[camera.pixel_x, camera.pixel_y])
        spacing = np.median(tree.query(tree.data, 2)[0][:, 1])
        pairs = tree.query_pairs(1.25 * spacing, output_type="ndarray")
        steps = set()
        for a, b in pairs:
            step = (int(column[b] - column[a]), int(row[b] - row[a]))
            steps.add(max(step, (-step[0], -step[1])))
        assert any(steps == wanted for wanted in offsets_of.values()), (name, steps)
        assert (mapping.method == "axial") == (len(steps) == 3)


@pytest.mark.parametrize("method", [m for m in MAPPINGS if m != "auto"])
def test_every_method_maps_every_camera(cameras, method):
    rng = np.random.default_rng(1)
    for (_, name), camera in cameras.items():
        if name == "SCTCam" and method in ("bilinear", "rebin"):
            continue  # two seconds each, and nothing that CHEC does not test
        is_square = lattice_neighbors(camera.pixel_x, camera.pixel_y) == 4
        if method == "square" and not is_square:
            with pytest.raises(DataError, match="square pixel lattice"):
                camera_mapping(camera.pixel_x, camera.pixel_y, method)
            continue
        mapping = camera_mapping(camera.pixel_x, camera.pixel_y, method)
        charge = rng.gamma(1, 5, camera.n_pixels)
        image = mapping.image(charge)
        assert image.shape == mapping.shape
        if method in CONSERVING:
            assert image.sum() == pytest.approx(charge.sum(), rel=1e-5)
            np.testing.assert_allclose(np.asarray(mapping.charge.sum(axis=0)).ravel(), 1, rtol=1e-5)
        time = mapping.image(np.full(camera.n_pixels, 7.0), "time")
        np.testing.assert_allclose(time[image > 0], 7, rtol=1e-5)  # a constant time stays constant


def test_nearest_gives_each_cell_the_pixel_that_covers_it(cameras):
    camera = cameras["calib", "FlashCam"]
    mapping = camera_mapping(camera.pixel_x, camera.pixel_y, "nearest")
    image = mapping.image(np.arange(1.0, camera.n_pixels + 1))
    spacing = 0.05
    pitch = spacing * np.sqrt(np.sqrt(3) / 2)
    centre = [(v.max() + v.min()) / 2 for v in (camera.pixel_x, camera.pixel_y)]
    for i in range(0, image.shape[0], 5):
        for j in range(0, image.shape[1], 5):
            x = centre[0] + (i - (image.shape[0] - 1) / 2) * pitch
            y = centre[1] + (j - (image.shape[1] - 1) / 2) * pitch
            distance = np.hypot(camera.pixel_x - x, camera.pixel_y - y)
            if image[i, j] > 0:
                assert distance[int(image[i, j]) - 1] == pytest.approx(distance.min(), abs=1e-4)
            else:
                assert distance.min() > spacing / np.sqrt(3) * 0.99


def test_bilinear_reproduces_a_linear_field(cameras):
    camera = cameras["calib", "LSTCam"]
    mapping = camera_mapping(camera.pixel_x, camera.pixel_y, "bilinear")
    inside = np.diff(mapping.charge.indptr).reshape(mapping.shape) > 0
    gradient = mapping.image(3 + 2 * camera.pixel_x - camera.pixel_y)
    column, row = np.meshgrid(*map(np.arange, mapping.shape), indexing="ij")
    design = np.c_[np.ones(inside.sum()), column[inside], row[inside]]
    fit, *_ = np.linalg.lstsq(design, gradient[inside], rcond=None)
    np.testing.assert_allclose(design @ fit, gradient[inside], atol=1e-4)
    pitch = 0.05 * np.sqrt(np.sqrt(3) / 2)
    np.testing.assert_allclose(fit[1:], [2 * pitch, -pitch], rtol=1e-3)


def test_oversampling_gives_four_equal_cells(cameras):
    camera = cameras["calib", "DigiCam"]
    mapping = camera_mapping(camera.pixel_x, camera.pixel_y, "oversampling")
    for pixel in (0, 600, 1295):
        charge = np.zeros(camera.n_pixels)
        charge[pixel] = 8.0
        image = mapping.image(charge)
        columns, rows = np.nonzero(image)
        assert image[columns, rows].tolist() == [2.0] * 4
        assert (np.ptp(columns), np.ptp(rows)) == (1, 1)


def test_a_rotated_lattice_is_aligned_with_the_axes(cameras):
    camera = cameras["calib", "FlashCam"]
    straight = camera_mapping(camera.pixel_x, camera.pixel_y, "axial")
    for degrees in (3.0, -7.0, 10.893):
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        x, y = c * camera.pixel_x - s * camera.pixel_y, s * camera.pixel_x + c * camera.pixel_y
        turned = camera_mapping(x, y, "axial")
        assert turned.shape == straight.shape
        assert np.unique(turned.cells).size == camera.n_pixels


@pytest.mark.parametrize("method", ["axial", "oversampling", "rebin"])
def test_the_file_states_the_angle_between_pictures_and_the_camera_frame(cameras, method):
    """The angle, and the position of each pixel, are those of the cells in the picture."""
    for key in (("calib", "LSTCam"), ("gamma", "NectarCam"), ("calib", "FlashCam")):
        camera = cameras[key]
        turn = np.exp(1j * np.radians(camera.rotation_deg))
        derotated = (camera.geometry.pix_x + 1j * camera.geometry.pix_y).to_value("m")
        raw = camera.pixel_x + 1j * camera.pixel_y
        np.testing.assert_allclose(turn * raw, derotated, atol=1e-6)
        for is_derotated in (False, True):
            used = derotated if is_derotated else raw
            mapping = camera_mapping(used.real, used.imag, method)
            angle = (0.0 if is_derotated else camera.rotation_deg) - mapping.turn_deg
            assert mapping.turn_deg == 0 or method != "rebin"
            # Derotated positions, turned back by the stated angle, lie along the picture's axes.
            along = derotated * np.exp(-1j * np.radians(angle))
            cells = np.stack(np.divmod(np.arange(np.prod(mapping.shape)), mapping.shape[1]))
            column, row = cells @ mapping.charge
            fits = [
                np.linalg.lstsq(np.c_[along.real, along.imag, np.ones(along.size)], v)[0][:2]
                for v in (column, row)
            ]
            tilt = [
                np.degrees(np.arctan2(fits[0][1], fits[0][0])),
                np.degrees(np.arctan2(-fits[1][0], fits[1][1])),
            ]
            # A sheared lattice keeps one axis.
            assert (min if method == "axial" else max)(np.abs(tilt)) < 0.3, (
                key,
                is_derotated,
                tilt,
            )


@settings(max_examples=25)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["axial", "oversampling", "rebin", "nearest", "bilinear"]),
)
def test_mapping_is_linear(cameras, seed, method):
    camera = cameras["calib", "DigiCam"]
    mapping = cached_mapping(camera, method)
    rng = np.random.default_rng(seed)
    a, b = rng.normal(0, 10, (2, camera.n_pixels))
    np.testing.assert_allclose(
        mapping.image(a + 2 * b), mapping.image(a) + 2 * mapping.image(b), atol=1e-4
    )


@functools.cache
def cached_mapping(camera, method):
    return camera_mapping(camera.pixel_x, camera.pixel_y, method)


def test_bad_methods_and_pixels_are_refused(cameras):
    camera = cameras["calib", "DigiCam"]
    with pytest.raises(DataError, match="'shifting': not a valid method"):
        camera_mapping(camera.pixel_x, camera.pixel_y, "shifting")
    rng = np.random.default_rng(2)
    with pytest.raises(DataError, match="lattice"):
        camera_mapping(rng.normal(size=200), rng.normal(size=200), "axial")
