"""Write a data set of simulated toy showers: gammas and protons, several telescopes, true values.

Reads   the camera of a real file (by default FlashCam of calib_events, see sample_files.py).
Writes  a data set like those of image_extractor.py, mapped, with charge and time. Run 1 has the
        gammas, run 2 the protons.

This is a toy. It shows that a data set, a split and a training work, and what leaks; how well a
network separates real gammas from real protons it cannot show. What is in it:

* Every shower is used several times with another core position, as in CORSIKA.
* Energies follow E^-2; directions are uniform within VIEWCONE_DEG of the pointing.
* Gammas: one electromagnetic cascade, which begins after 9/7 radiation lengths on average and has
  its maximum at ln(E/E_c) + 0.5 radiation lengths (Heitler), with the width of Greisen's profile
  near the maximum, sqrt(1.5 ln(E/E_c)) radiation lengths.
* Protons: a fraction of the energy, 0.4 on average, in some cascades of random energies, each of
  which leaves the axis under an angle p_T / p and begins deeper by interaction lengths. They give
  wider, longer and broken images. Muons add rings and arcs.
* An image is the sum of ctapipe's toy models: SkewedGaussian for cascades (computed here, several
  times faster; a test compares them) and RingGaussian for muons, at the place, length, width and
  time gradient that follow from geometry; PHOTONS per m2 and TeV within the light pool of 120 m,
  beyond it exponentially fewer; Poisson noise of the night sky; a trigger of three neighbouring
  pixels. No magnetic field, no electronics, no aberrations, no clouds.

    python scripts/mock_showers.py mock.h5 --showers 300 --uses 20 --split-by shower
"""

import argparse
import multiprocessing
import os
import sys
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import astropy.units as u
import numpy as np
import sample_files
from ctapipe.image.toymodel import RingGaussian
from isal import isal_zlib
from scipy.special import ndtr
from tqdm import tqdm

from image_extractor import __version__, layout
from image_extractor.errors import DataError
from image_extractor.finishing import finish
from image_extractor.images import stored_image
from image_extractor.instrument import Camera, Telescope, describe_array, select_telescopes
from image_extractor.mapping import camera_mapping
from image_extractor.reader import unit_vector
from image_extractor.settings import EnergyBins, Settings
from image_extractor.simtel import SimtelFile
from image_extractor.transaction import OutputTransaction
from image_extractor.writer import Writer

GAMMA, PROTON = 0, 101
POINTING = (0.0, np.radians(70.0))  # azimuth, altitude
VIEWCONE_DEG = 3.0
ENERGY_TEV = {GAMMA: (0.1, 10.0), PROTON: (0.4, 40.0)}  # protons give less light
CORE_RADIUS_M = 200.0
SPACING_M = 120.0  # of the four telescopes, at the corners of a square
GROUND_M = 2150.0  # above sea level
SCALE_HEIGHT_M, ATMOSPHERE = 8000.0, 1030.0  # isothermal; vertical depth at sea level, g/cm2
RADIATION_LENGTH, CRITICAL_TEV = 37.1, 85e-6  # air, g/cm2; PDG, Atomic and nuclear properties
INTERACTION_LENGTH = 80.0  # protons of TeV in air, g/cm2
PT_TEV = 0.35e-3  # transverse momentum of a neutral pion, which makes one cascade
PHOTONS = 100.0  # Cherenkov photons on the ground per m2 and TeV, 300 to 600 nm
POOL_M, POOL_FALL_M = 120.0, 80.0
EFFICIENCY = 0.12  # photo-electrons per photon
LATERAL_M, PSF_DEG = 15.0, 0.04  # rms of a cascade; of the optics
SKEWNESS = 0.3
LIGHT_SPREAD = 0.1  # of ln(light) from shower to shower
NIGHT_SKY_PE = 1.0  # mean per pixel
FAINTEST_PE = 50  # of a triggered image
MUONS = 0.15  # mean number per proton image
C_M_PER_NS = 0.299792458
Images = dict[int, tuple[np.ndarray, np.ndarray]]  # of charges and peak times


@dataclass(frozen=True)
class Cascade:
    """An electromagnetic cascade of a shower.

    Attributes
    ----------
    light_tev : float
        Energy of a gamma that gives as much light.
    depth_max, spread : float, g/cm2
        Slant depth of the maximum, and rms of the profile.
    direction : (3,) array
        Where it comes from, in the ground frame.
    """

    light_tev: float
    depth_max: float
    spread: float
    direction: np.ndarray


@dataclass(frozen=True)
class Shower:
    """A simulated shower; `h_first` is the height of the first interaction above the ground, m."""

    number: int
    primary: int
    energy_tev: float
    az: float
    alt: float
    h_first: float
    cascades: list[Cascade]


def axes(az: float, alt: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make unit vectors: forward, to larger altitude and to larger azimuth."""
    side = np.array([-np.sin(az), -np.cos(az), 0.0])
    return unit_vector(az, alt), unit_vector(az, alt + np.pi / 2), side


def turned(direction: np.ndarray, angle: float, position_angle: float) -> np.ndarray:
    """Direction at an angle (rad) from another one."""
    az, alt = -np.arctan2(direction[1], direction[0]), np.arcsin(direction[2])
    forward, up, side = axes(az, alt)
    off = np.cos(position_angle) * up + np.sin(position_angle) * side
    return np.cos(angle) * forward + np.sin(angle) * off


def height(depth: float, cos_zenith: float) -> float:
    """Height above the ground (m), at least 100 m, of a slant depth (g/cm2)."""
    above_sea = SCALE_HEIGHT_M * np.log(ATMOSPHERE / (depth * cos_zenith))
    return max(100.0, float(above_sea) - GROUND_M)


def cascade(tev: float, begin: float, direction: np.ndarray, light: float) -> Cascade:
    """Make the cascade of an energy that begins at a depth."""
    lengths = np.log(max(tev / CRITICAL_TEV, 10.0))
    depth_max = begin + RADIATION_LENGTH * (lengths + 0.5)
    return Cascade(tev * light, depth_max, RADIATION_LENGTH * np.sqrt(1.5 * lengths), direction)


def simulate(number: int, primary: int, rng: np.random.Generator) -> Shower:
    """Draw a shower."""
    low, high = ENERGY_TEV[primary]
    tev = 1 / (1 / low - rng.random() * (1 / low - 1 / high))  # E^-2
    angle = np.radians(VIEWCONE_DEG) * np.sqrt(rng.random())
    axis = turned(unit_vector(*POINTING), angle, rng.uniform(0, 2 * np.pi))
    light = np.exp(rng.normal(0, LIGHT_SPREAD))
    mean_free_path = 9 / 7 * RADIATION_LENGTH if primary == GAMMA else INTERACTION_LENGTH
    first = rng.exponential(mean_free_path) + 1.0
    cascades = []
    if primary == GAMMA:
        cascades.append(cascade(tev, first, axis, light))
    else:
        n = 1 + rng.poisson(2 + np.log10(tev))
        for share in rng.beta(2, 3) * rng.dirichlet(np.full(n, 0.7)):
            part = max(float(share) * tev, 1e-4)
            leaving = min(rng.rayleigh(PT_TEV) / part, np.radians(2.0))
            direction = turned(axis, leaving, rng.uniform(0, 2 * np.pi))
            begin = first + rng.exponential(INTERACTION_LENGTH)
            cascades.append(cascade(part, begin, direction, light))
    az, alt = -np.arctan2(axis[1], axis[0]) % (2 * np.pi), np.arcsin(axis[2])
    return Shower(number, primary, tev, az, alt, height(first, axis[2]), cascades)


def normal(x: np.ndarray, sigma: float) -> np.ndarray:
    """Density of a normal distribution around 0."""
    return np.exp(-0.5 * (x / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))


def skew_normal(x: np.ndarray, sigma: float) -> np.ndarray:
    """Density of a skew normal distribution (Azzalini 1985) with mean 0 and skewness SKEWNESS."""
    ratio = (2 * SKEWNESS / (4 - np.pi)) ** (2 / 3)
    delta2 = np.pi / 2 * ratio / (1 + ratio)
    scale = sigma / np.sqrt(1 - 2 * delta2 / np.pi)
    z = x + scale * np.sqrt(2 * delta2 / np.pi)
    return 2 * normal(z, scale) * ndtr(np.sqrt(delta2 / (1 - delta2)) * z / scale)


@dataclass(frozen=True)
class View:
    """A cascade in a camera, in photo-electrons, m, rad, ns, ns/m; `psi` points to its end."""

    intensity: float
    middle: np.ndarray
    psi: float
    length: float
    width: float
    time: float
    gradient: float


class ToyTelescope:
    """Makes images of showers as one telescope of POINTING sees them."""

    def __init__(self, telescope: Telescope) -> None:
        self.camera = telescope.camera
        self.position = np.array(telescope.position)
        self.axes = axes(*POINTING)
        geometry = self.camera.geometry
        self.pixels = np.array([geometry.pix_x.to_value("m"), geometry.pix_y.to_value("m")])
        self.area = geometry.pix_area.to_value("m2")
        self.neighbors = geometry.neighbor_matrix_sparse.astype(int)

    def place(self, direction: np.ndarray) -> np.ndarray:
        """Image (2,) of a direction in the camera frame, m."""
        forward, up, side = self.axes
        plane = np.array([direction @ up, direction @ side]) / (direction @ forward)
        return self.camera.focal_length_m * plane

    def _view(self, shower: Shower, part: Cascade, core: np.ndarray) -> View:
        """Project a cascade to the camera."""
        axis = unit_vector(shower.az, shower.alt)
        first = core + axis * shower.h_first / axis[2]
        depths = part.depth_max + part.spread * np.array([-1.0, 0.0, 1.0])
        heights = [height(max(d, 1.0), part.direction[2]) for d in depths]
        along = part.direction / part.direction[2]
        points = [first + along * (h - shower.h_first) for h in heights]
        seen = [p - self.position for p in points]
        above, middle, below = (self.place(p / np.linalg.norm(p)) for p in seen)
        early, time, late = (
            float(np.linalg.norm(p - first) + np.linalg.norm(s)) / C_M_PER_NS
            for p, s in zip(points, seen, strict=True)
        )
        camera, distance = self.camera, float(np.linalg.norm(seen[1]))
        width = camera.focal_length_m * np.hypot(LATERAL_M / distance, np.radians(PSF_DEG))
        half = max(float(np.linalg.norm(below - above)) / 2, 1e-6)
        impact = np.linalg.norm(np.cross(seen[1], part.direction))
        pool = np.exp(-max(0.0, impact - POOL_M) / POOL_FALL_M)
        return View(
            intensity=PHOTONS * part.light_tev * pool * camera.mirror_area_m2 * EFFICIENCY,
            middle=middle,
            psi=float(np.arctan2(*(below - above)[::-1])),
            length=float(np.hypot(half, width)),
            width=float(width),
            time=time,
            gradient=(late - early) / (2 * half),
        )

    def _cascade(self, view: View) -> tuple[np.ndarray, np.ndarray]:
        """Compute expected photo-electrons and arrival times (ns) of a cascade, per pixel."""
        x, y = self.pixels - view.middle[:, None]
        along = np.cos(view.psi) * x + np.sin(view.psi) * y
        across = np.cos(view.psi) * y - np.sin(view.psi) * x
        density = skew_normal(along, view.length) * normal(across, view.width)
        return view.intensity * self.area * density, view.time + view.gradient * along

    def _muon(self, shower: Shower, rng: np.random.Generator) -> np.ndarray:
        """Compute expected photo-electrons of a muon that hits the ground near the mirror."""
        focal = self.camera.focal_length_m
        axis = unit_vector(shower.az, shower.alt)
        centre = self.place(turned(axis, np.radians(rng.rayleigh(0.7)), rng.uniform(0, 2 * np.pi)))
        radius, sigma = np.radians(rng.uniform(0.7, 1.25)), np.radians(0.05)
        ring = RingGaussian(
            *(centre * u.m),
            radius=focal * radius * u.m,
            sigma=focal * sigma * u.m,
            rho=rng.uniform(0, 3),
            phi0=rng.uniform(-180, 180) * u.deg,
        )
        return ring.expected_signal(self.camera.geometry, rng.uniform(100, 1000))

    def image(
        self, shower: Shower, core: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Charges (p.e.) and peak times (samples) per pixel; None if it does not trigger."""
        views = [self._view(shower, part, core) for part in shower.cascades]
        if sum(view.intensity for view in views) < FAINTEST_PE / 2:
            return None
        parts = [self._cascade(view) for view in views]
        expected = np.sum([n for n, _ in parts], axis=0)
        total = max(float(expected.sum()), 1e-12)
        weighted = np.sum([n * time for n, time in parts], axis=0)
        time = weighted / np.maximum(expected, 1e-12)
        time -= weighted.sum() / total  # the trigger centres the image in its window
        for _ in range(rng.poisson(MUONS) if shower.primary == PROTON else 0):
            ring = self._muon(shower, rng)
            arrival = rng.normal(-5, 3)  # ns; muons are ahead of the light from above
            time = (time * expected + arrival * ring) / np.maximum(expected + ring, 1e-12)
            expected = expected + ring
        signal = rng.poisson(expected)
        charge = signal + rng.poisson(NIGHT_SKY_PE, signal.size) - NIGHT_SKY_PE
        above = charge > 5
        if not (above & (self.neighbors @ above >= 2)).any() or signal.sum() < FAINTEST_PE:
            return None
        rate, n_samples = self.camera.sampling_rate_ghz, self.camera.n_samples
        jitter = rng.normal(0, 1, signal.size) / np.sqrt(np.maximum(signal, 1))
        samples = np.where(
            signal >= 2,
            n_samples / 2 + rate * (time + jitter),
            rng.uniform(0, n_samples, signal.size),
        )
        return charge.astype(np.float32), np.clip(samples, 0, n_samples - 1).astype(np.float32)


def array_of(camera: Camera) -> list[Telescope]:
    """Four telescopes with one type of camera, at the corners of a square."""
    corners = [
        (x, y) for x in (-SPACING_M / 2, SPACING_M / 2) for y in (-SPACING_M / 2, SPACING_M / 2)
    ]
    no_pixel = np.zeros(0, np.int64)
    return [Telescope(i, (x, y, 0.0), camera, no_pixel) for i, (x, y) in enumerate(corners, 1)]


def camera_named(name: str, path: Path | None = None) -> Camera:
    """Camera of a simtel file; by default of calib_events, which has one of each type."""
    with SimtelFile(path or sample_files.fetch() / "calib_events.simtel.gz") as simtel:
        return select_telescopes(describe_array(simtel), name)[0].camera


def events_of(
    shower: Shower, uses: int, toys: dict[int, ToyTelescope], seed: list[int]
) -> list[tuple[int, np.ndarray, Images]]:
    """Use a shower several times; return those uses that two telescopes see.

    Returns
    -------
    list of (number of the use, core (3,) in m, images by telescope)
    """
    rng, found = np.random.default_rng([*seed, shower.number]), []
    for use in range(uses):
        r, angle = CORE_RADIUS_M * np.sqrt(rng.random()), rng.uniform(0, 2 * np.pi)
        core = np.array([r * np.cos(angle), r * np.sin(angle), 0.0])
        images = {t: toy.image(shower, core, rng) for t, toy in toys.items()}
        kept = {t: image for t, image in images.items() if image is not None}
        if len(kept) >= 2:
            found.append((use, core, kept))
    return found


def row_of(shower: Shower, use: int, core: np.ndarray, run: int) -> dict:
    """Values of an event, as image_extractor.py stores them."""
    return {
        "event_number": 100 * shower.number + use,
        "run_number": run,
        "gamma_hadron_label": shower.primary,
        "core_x": core[0],
        "core_y": core[1],
        "h_first_int": shower.h_first + GROUND_M,
        "mc_energy": shower.energy_tev,
        "az": shower.az,
        "alt": shower.alt,
        "reconstructed_energy": np.nan,
        "primary_id": shower.primary,
        "shower_number": shower.number,
    }


def write(
    out: Path, camera: Camera, n_showers: int, uses: int, seed: int, jobs: int, **arrangement
) -> None:
    """Simulate and write a data set; `arrangement` has the options of `finishing.finish`.

    The result does not depend on the number of processes, `jobs`.
    """
    telescopes = array_of(camera)
    mapping = camera_mapping(camera.pixel_x, camera.pixel_y)
    mappings = {t.tel_id: mapping for t in telescopes}
    settings = Settings(
        storage_mode="mapped",
        image_mode="PIXELS_TIMING_2C",
        scale_factor=1,
        energy_bins=EnergyBins(min=-2.0, max=2.0, bin_size=4.0),
    )
    attributes = {
        "ctapipe_version": version("ctapipe"),
        "eventio_version": version("eventio"),
        "command": " ".join(sys.argv),
        "energy_bin_source": "mc_energy",
        "cuts_source": "",
    }
    toys = {t.tel_id: ToyTelescope(t) for t in telescopes}
    transaction = OutputTransaction(out, append=False)
    pool, writer = multiprocessing.get_context("spawn").Pool(jobs), None
    try:
        writer = Writer(
            transaction.path, settings, telescopes, mappings, "gzip", POINTING, attributes
        )
        for run, primary in enumerate((GAMMA, PROTON), 1):
            rng = np.random.default_rng([seed, run])
            showers = [simulate(i, primary, rng) for i in range(1, n_showers + 1)]
            name = "gammas" if primary == GAMMA else "protons"
            written = 0
            simulated = pool.imap(
                partial(events_of, uses=uses, toys=toys, seed=[seed, run]), showers
            )
            shown = tqdm(simulated, name, len(showers), unit=" showers", disable=None)
            for shower, events in zip(showers, shown, strict=True):
                for use, core, pixels in events:
                    images, content = {}, 0
                    for tel_id, (charge, samples) in pixels.items():
                        content = isal_zlib.crc32(charge, content)
                        images[tel_id], _ = stored_image(charge, samples, mapping, settings)
                    writer.add(0, row_of(shower, use, core, run), images, content)
                    written += 1
            row = np.zeros(1, layout.RUNS_DTYPE)
            values = {
                "file": f"toy {name}, seed {seed}, version {__version__}",
                "run_number": run,
                "events_read": written,
                "events_passed": written,
                "events_written": written,
                "complete": 1,
                "direction": POINTING,
                "energy_range": ENERGY_TEV[primary],
                "spectral_index": -2.0,
                "n_showers": n_showers,
                "shower_reuse": uses,
                "core_range": (0.0, CORE_RADIUS_M),
                "viewcone": (0.0, VIEWCONE_DEG),
                "diffuse": 1,
            }
            for key, value in values.items():
                row[key] = value
            writer.add_run(row)
            print(f"{name}: {written} of {n_showers * uses} events trigger")
        finish(writer, transaction, shuffle=True, seed=seed, **arrangement)
    finally:
        if writer is not None:
            writer.abandon()
        transaction.close()
        pool.terminate()


def main() -> int:
    """Read the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("output", type=Path, help="HDF5 file; replaced if it exists")
    add("--showers", type=int, default=300, help="of each of gammas and protons (default: 300)")
    add("--uses", type=int, default=20, help="of each shower, with other cores (default: 20)")
    add("--camera", default="FlashCam", help="name of the camera (default: FlashCam)")
    add("--camera-file", type=Path, help="simtel file that describes it (default: calib_events)")
    cores = len(os.sched_getaffinity(0))
    add("--jobs", type=int, default=cores, help="number of processes (default: all cores)")
    add("--seed", type=int, default=1, help="random seed (default: 1)")
    add(
        "--split-by",
        choices=layout.SPLIT_BY,
        help="split into Training, Validation and Test (0.6, 0.1, 0.3), as image_extractor.py does",
    )
    args = parser.parse_args()
    try:
        camera = camera_named(args.camera, args.camera_file)
        parts = {"Training": 0.6, "Validation": 0.1, "Test": 0.3} if args.split_by else None
        options = {"split": parts, "split_by": args.split_by or "shower"}
        write(args.output, camera, args.showers, args.uses, args.seed, args.jobs, **options)
    except (DataError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
