"""Weights to a spectrum and effective areas; pyirf is the independent reference."""

import astropy.units as u
import numpy as np
import pytest
from astropy.table import QTable
from conftest import extract, real_file

from image_extractor.errors import DataError
from image_extractor.reader import Events
from image_extractor.weights import Simulation, effective_area

EDGES = np.geomspace(0.01, 1000, 21)  # beyond the simulated range at both ends


@pytest.fixture(scope="module", params=[("sst", 0), ("proton", 101)])
def data(request, tmp_path_factory):
    """Events of a point source and of a diffuse simulation: energies, and what was simulated."""
    key, primary = request.param
    path = tmp_path_factory.mktemp("weights") / f"{key}.h5"
    assert not extract(key, path).problem
    return Events(path).events["mc_energy"], Simulation.of(path, primary)


def test_weights_and_areas_are_those_of_pyirf(data):
    pyirf = pytest.importorskip("pyirf", reason="pyirf is absent: pip install '.[test]'")
    from pyirf.irf import effective_area_per_energy
    from pyirf.simulations import SimulatedEventsInfo
    from pyirf.spectral import PowerLaw, calculate_event_weights

    assert pyirf.__version__
    tev, thrown = data
    info = SimulatedEventsInfo(
        n_showers=thrown.n_events,
        energy_min=thrown.energy_tev[0] * u.TeV,
        energy_max=thrown.energy_tev[1] * u.TeV,
        max_impact=thrown.radius_m * u.m,
        spectral_index=thrown.index,
        viewcone_min=thrown.viewcone_deg[0] * u.deg,
        viewcone_max=thrown.viewcone_deg[1] * u.deg,
    )
    unit = 1 / (u.TeV * u.s * u.m**2 * (u.sr if thrown.solid_angle_sr else 1))
    target = PowerLaw(3e-7 * unit, -2.6)
    theirs = calculate_event_weights(
        tev * u.TeV, target, PowerLaw.from_simulation(info, 50 * u.hour)
    )
    ours = thrown.weights(tev, lambda e: 3e-7 * e**-2.6, 50 * 3600)
    assert ours == pytest.approx(theirs, rel=1e-9)
    counts = info.calculate_n_showers_per_energy(EDGES * u.TeV)
    assert thrown.counts(EDGES) == pytest.approx(counts, rel=1e-9, abs=1e-9)
    expected = effective_area_per_energy(QTable({"true_energy": tev * u.TeV}), info, EDGES * u.TeV)
    area = effective_area(tev, EDGES, thrown)
    simulated = thrown.counts(EDGES) > 0
    assert area[simulated] == pytest.approx(expected.to_value("m2")[simulated], rel=1e-9)
    assert np.isnan(area[~simulated]).all()


def test_the_weights_of_all_simulated_events_add_up_to_the_flux_times_the_exposure(data):
    _, thrown = data
    edges = np.geomspace(*thrown.energy_tev, 2001)
    middle = np.sqrt(edges[1:] * edges[:-1])
    total = np.sum(thrown.counts(edges) * thrown.weights(middle, lambda e: 2.0 * e**-3, 7.0))
    low, high = thrown.energy_tev
    exposure = 7.0 * np.pi * thrown.radius_m**2
    if thrown.viewcone_deg[1]:
        exposure *= 2 * np.pi * (1 - np.cos(np.radians(thrown.viewcone_deg[1])))
    assert total == pytest.approx(exposure * (low**-2 - high**-2), rel=1e-4)
    assert thrown.counts([low / 2, high * 2]) == pytest.approx([thrown.n_events])


def test_files_that_were_not_read_to_their_end_are_refused(tmp_path):
    extract(real_file("sst"), tmp_path / "few.h5", max_events=3)
    with pytest.raises(DataError, match="was not read to its end"):
        Simulation.of(tmp_path / "few.h5", 0)
    with pytest.raises(DataError, match=r"no event of primary_id 101 \(it holds 0\)"):
        Simulation.of(tmp_path / "few.h5", 101)
