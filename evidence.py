"""Evidence: which wavelengths decided what a network of matched filters says of each spaxel.

Reads   a run folder of run_SSFTT_training.py; processed/cubes/<plate>/<plateifu>.h5.
Writes  <run_dir>/evidence/<plateifu>.fits, the share of each wavelength bin in the answers;
        <run_dir>/figures/<plateifu>_evidence.png.
Layout: docs/data_formats.md#evidence. Prints for each galaxy the weight of the emission lines, and
how far the answers move when bins are deleted, that is, replaced by the continuum.

An answer (12+log(O/H) in dex, or the logarithm of the probability of the predicted class) is
compared with that for line-free spectra: the same brightness, errors and continuum colours, but
nothing above or below the continuum. The difference is divided among the bins by integrated
gradients (Sundararajan, Taly & Yan 2017, Proc. ICML 70, 3319): added up over the bins, the shares
give the difference. Shares of neighbouring spaxels count for the spaxel that is answered for.

    python evidence.py --run-dir runs/demo --plateifu 8485-1901
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import utils
from utils import DataError

import numpy as np
import torch
import torch.nn.functional as F
from astropy.io import fits
from matplotlib.figure import Figure
from torch import Tensor

import baselines
import diagrams
import inference
import labels
import line_fits
import run_folder
import vis_fns
from inference import TrainedModel
from line_fits import LINES
from matched_filter_net import MatchedFilterNet, SpaxelSums, Spectra, neighbours, split
from pack_cubes import NormalisedCube
from recipe import Recipe

log = logging.getLogger(__name__)

EVIDENCE_VERSION = 2
STEPS = 24
"""Steps on the path from the line-free to the observed spectra."""
PATH_BEND = 6.0
"""The steps are even in asinh(sinh(PATH_BEND) t), as answers follow the logarithms of lines."""
SPAXELS_AT_ONCE = 512
WINDOW_AA = 10.0
"""Bins this near to a line, and to no other line nearer, count as the line's."""
ZOOMS = 3
"""Groups of lines that are drawn larger."""
LARGEST_MISS = 0.1
"""Deviation of the sums of shares, over the sums of their absolute values, above which to warn."""


@dataclass(frozen=True)
class Config:
    """Find the wavelengths that decided the predictions for galaxies."""

    run_dir: Path
    """Folder of a training run of matched filters."""
    plateifu: tuple[str, ...]
    """Galaxies, each of which needs a cube."""
    data_dir: Path | None = None
    """Data folder; default $MANGA_DATA_DIR, else the run's, else ./data/manga."""
    per_spaxel: bool = False
    """Also write the share of every bin for every spaxel: as large as a cube."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    debug: bool = False
    """Show the traceback of an error."""


# Attribution


class Evidence(NamedTuple):
    """What decided the answers for Q usable spaxels, in the order of the flattened map."""

    shares: np.ndarray
    """(Q, band) float32: of the difference between answer and line-free answer."""
    answer: np.ndarray
    """(Q,) 12+log(O/H) in dex, or the logarithm of the probability of the predicted class."""
    line_free: np.ndarray
    """(Q,) the same, of line-free spectra."""


def explain(model: MatchedFilterNet, spectra: Spectra) -> Evidence:
    """Divide the answers for a galaxy among the bins of its spectra.

    Filters are linear, so gradients need only be followed back to what the filters measured; the
    path is the same as that of the spectra.

    Parameters
    ----------
    model : MatchedFilterNet
        In evaluation mode.
    spectra : Spectra
        (y, x, band or colour), on the model's device. Weights of unusable spaxels are 0.
    """
    usable = (spectra.weight > 0).any(-1)
    place = usable.flatten().cumsum(0) - 1
    near = neighbours(usable[None], model.config.window)[usable.flatten()]
    near = torch.where(near < 0, near, place[near])
    residual, weight, colour = (part[usable].float() for part in spectra)
    with torch.no_grad():
        full = model.measure(residual, weight, colour)
        free = model.measure(torch.zeros_like(residual), weight, colour)
    gradient, answer, line_free = mean_gradient(model, full, free, colour, near)
    bins, shares = model.profiles.any(1), torch.zeros_like(residual)
    with torch.no_grad():
        signal, filters = (residual * weight)[:, bins], model.profiles[bins].T
        for rows in blocks_of(near):
            shares[rows, bins] = sum(
                F.embedding(near[rows, k].clamp(min=0), signal) * (gradient[rows, k] @ filters)
                for k in range(near.shape[1])
            )
    return Evidence(*(part.cpu().numpy() for part in (shares, answer, line_free)))


def blocks_of(rows: Tensor) -> list[slice]:
    """Divide rows into blocks of SPAXELS_AT_ONCE."""
    return [slice(k, k + SPAXELS_AT_ONCE) for k in range(0, len(rows), SPAXELS_AT_ONCE)]


def mean_gradient(
    model: MatchedFilterNet, full: SpaxelSums, free: SpaxelSums, colour: Tensor, near: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean gradient of each answer by what the filters measured in each neighbour, along the path.

    Parameters
    ----------
    model : MatchedFilterNet
    full, free : SpaxelSums
        Of Q spaxels as observed and line-free.
    colour : (Q, colour)
    near : (Q, P*P) int64
        Rows of the spaxels around each, itself in the middle; -1 where there is none.

    Returns
    -------
    gradient : (Q, P*P, filter)
        0 where there is no neighbour.
    answer, line_free : (Q,)
        At the ends of the path.

    Notes
    -----
    Of each step, the gradient by the features is that in its middle, but the slope of the features
    is the mean over it: features stop at a largest deviation, and slopes in the middle would miss
    where.
    """
    middle, some, is_there = near.shape[1] // 2, near.clamp(min=0), near >= 0
    with torch.no_grad():
        predicted = model.answer(model.features(full, near, near[:, middle])).argmax(1)

    def inputs(rows: slice, sums: SpaxelSums, keys: Tensor) -> list[Tensor]:
        around = (F.embedding(some[rows], part) for part in (sums.n, keys))
        return [sums.features[rows], *around]

    def answers(rows: slice, own: Tensor, n: Tensor, keys: Tensor) -> Tensor:
        d, level = (F.embedding(some[rows], part) for part in (full.d, full.level[:, None]))
        out = model.answer(model.combine(own, n, d, level, keys, is_there[rows]))
        if not model.config.classes:
            return model.in_units(out)[0]
        return out.log_softmax(1).gather(1, predicted[rows, None])[:, 0]

    with torch.no_grad():
        ends = []
        for sums in (full, free):
            keys = model.key(sums.features)
            ends.append(torch.cat([answers(r, *inputs(r, sums, keys)) for r in blocks_of(near)]))
    gradient = full.n.new_zeros(*near.shape, full.n.shape[1])
    of_keys_to_features = model.key.weight.detach()[:, : 2 * full.n.shape[1]]
    heights = np.sinh(PATH_BEND * np.linspace(0, 1, 2 * STEPS + 1)) / np.sinh(PATH_BEND)
    after = free
    for low, half, high in zip(heights[:-1:2], heights[1::2], heights[2::2], strict=True):
        with torch.no_grad():
            before = after
            here, after = (
                model.sums(torch.lerp(free.n, full.n, t), full.d, colour, full.level)
                for t in (half, high)
            )
            keys = model.key(here.features)
            # each filter has two features, of its own sum alone
            moved = (after.n - before.n).repeat(1, 2)
            slopes = (after.features - before.features)[:, : moved.shape[1]] / moved
            slopes[moved == 0] = 0
        for rows in blocks_of(near):
            parts = [part.requires_grad_() for part in inputs(rows, here, keys)]
            of_own, of_n, of_keys = torch.autograd.grad(answers(rows, *parts).sum(), parts)
            of_features = of_keys @ of_keys_to_features
            of_features[:, middle] += of_own[:, : moved.shape[1]]
            first, second = (of_features * F.embedding(some[rows], slopes)).chunk(2, -1)
            gradient[rows] += (high - low) * (of_n + first + second)
    return gradient * is_there[..., None], ends[0], ends[1]


# Lines


def bins_of_lines(wave: np.ndarray) -> dict[str, np.ndarray]:
    """Find the bins of each known emission line in range, by wavelength (band,) in Angstrom."""
    names = [name for name, w in LINES.items() if wave[0] < w < wave[-1]]
    distance = np.abs(wave[:, None] - [LINES[name] for name in names])
    nearest, is_near = distance.argmin(1), distance.min(1) < WINDOW_AA
    return {name: np.flatnonzero(is_near & (nearest == k)) for k, name in enumerate(names)}


def defining_lines(label_task: str, diagnostic: str | None = None) -> set[str]:
    """Name the lines that decide a label, and those in a fixed ratio to them.

    `diagnostic` is that of metallicities; of labels that do not say how they were made, no line is
    known to decide.
    """
    names = set(labels.BPT_LINES)
    if label_task == "logOH":
        ratio = labels.RATIOS[labels.CALIBRATIONS[diagnostic].ratio] if diagnostic else {}
        names = {line for group in ratio for line in group.split("+")}
    doublets = [set(lines) for group in line_fits.GROUPS for lines in group.values()]
    return names.union(*(doublet for doublet in doublets if doublet & names))


def answers_without(
    trained: TrainedModel, cube: NormalisedCube, bins: Sequence[int] | np.ndarray
) -> np.ndarray:
    """12+log(O/H) (dex), or probabilities of the classes, of (Q,) spaxels after a deletion.

    In the deleted bins, the spectra of all spaxels are replaced by their continuum.
    """
    values = cube.values.copy()
    values[..., bins] = 0  # the residual, which comes first
    found = inference.map_answer(trained, values)
    return (found.probabilities if found.value is None else found.value)[cube.usable]


@dataclass
class Report:
    """The evidence of a galaxy in numbers.

    Attributes
    ----------
    weight : dict of line -> float
        Fraction of the weight: of the mean over spaxels of the shares' absolute values.
    share : dict of line -> float
        Mean over spaxels of the signed shares.
    defining, out_of_range : list of str
        Lines that decide the label, in the range of the cubes and outside it.
    bins : int
        Number of their bins.
    moved, moved_by_others : float
        Mean change of the answers after the deletion of these bins, and of as many others that
        are drawn at random. Of a probability, half the sum over the classes.
    difference, size : float
        Mean over spaxels of the absolute difference between answer and line-free answer, and of
        the sum of the shares' absolute values.
    miss, largest_miss : float
        Mean and largest deviation of the sum of a spaxel's shares from that difference.
    unit, moved_unit : str
        Of shares, difference and deviations; of `moved`.
    seconds, map_seconds : float
        From the cube to the evidence, and to the map alone.
    """

    weight: dict[str, float]
    share: dict[str, float]
    defining: list[str]
    out_of_range: list[str]
    bins: int
    moved: float
    moved_by_others: float
    difference: float
    size: float
    miss: float
    largest_miss: float
    unit: str
    moved_unit: str
    seconds: float = 0.0
    map_seconds: float = 0.0

    @property
    def decisive(self) -> float:
        """Fraction of the weight that the lines have that decide the label."""
        return sum(self.weight[name] for name in self.defining)

    @property
    def incomplete(self) -> float:
        """Mean deviation of the sums of shares, as a fraction of `size`."""
        return self.miss / max(self.size, 1e-30)

    def __str__(self) -> str:
        """Lay out the numbers in lines."""
        lines = [f"  {'line':<12}{'weight':>8}{f'mean share ({self.unit})':>32}"]
        for name in sorted(self.weight, key=lambda name: -self.weight[name]):
            mark = " *" if name in self.defining else ""
            lines.append(f"  {name + mark:<12}{self.weight[name]:>8.1%}{self.share[name]:>32.4f}")
        absent = f"; out of range: {', '.join(self.out_of_range)}" if self.out_of_range else ""
        return "\n".join(
            [
                *lines,
                f"  *: decides the label; together {self.decisive:.1%} of the weight, in "
                f"{utils.counted(self.bins, 'bin')}{absent}",
                f"  without these bins the answers move by {self.moved:.4f} ({self.moved_unit}), "
                f"without as many others by {self.moved_by_others:.4f}",
                f"  answers differ from line-free ones by {self.difference:.4f} ({self.unit}) on "
                f"average, the sums of shares from that",
                f"  by {self.miss:.4f} on average, {self.incomplete:.1%} of the shares' absolute "
                f"sum, and by {self.largest_miss:.4f} at most",
                f"  {self.seconds:.1f} s, "
                f"{self.seconds / max(self.map_seconds, 1e-9):.1f} times as long as the map",
            ]
        )


def examine(
    trained: TrainedModel, cube: NormalisedCube, wave: np.ndarray, evidence: Evidence
) -> Report:
    """Weigh the lines in a galaxy's evidence, and delete them.

    `wave` (band,) holds vacuum rest wavelengths in Angstrom.
    """
    strength, mean = np.abs(evidence.shares).mean(0), evidence.shares.mean(0)
    of_lines = bins_of_lines(wave)
    diagnostic = trained.card.recipe.options["labels"].get("diagnostic")
    wanted = defining_lines(trained.spec.label_task, diagnostic)
    defining = [name for name in of_lines if name in wanted]
    bins = np.concatenate([of_lines[name] for name in defining] or [np.zeros(0, int)])
    rest = np.setdiff1d(np.arange(wave.size), bins)
    others = np.random.default_rng(0).permutation(rest)[: bins.size]
    before = answers_without(trained, cube, [])

    def moved(deleted: np.ndarray) -> float:
        change = np.abs(answers_without(trained, cube, deleted) - before)
        return float(change.mean() if change.ndim == 1 else change.sum(1).mean() / 2)

    difference = evidence.answer - evidence.line_free
    miss, learns_dex = np.abs(evidence.shares.sum(1) - difference), before.ndim == 1
    return Report(
        {name: float(strength[at].sum() / strength.sum()) for name, at in of_lines.items()},
        {name: float(mean[at].sum()) for name, at in of_lines.items()},
        defining,
        sorted(wanted.difference(of_lines)),
        bins.size,
        moved(bins),
        moved(others),
        float(np.abs(difference).mean()),
        float(np.abs(evidence.shares).sum(1).mean()),
        float(miss.mean()),
        float(miss.max()),
        "dex" if learns_dex else "log probability",
        "dex" if learns_dex else "probability",
    )


# Output


def evidence_figure(
    wave: np.ndarray, evidence: Evidence, residual: np.ndarray, report: Report, plateifu: str
) -> Figure:
    """Make the figure: weight of every bin, and shares around the lines that count most.

    Parameters
    ----------
    wave : (band,) vacuum rest Angstrom
    evidence : Evidence
    residual : (band,)
        Mean spectrum above the continuum, over the mean flux.
    report : Report
    plateifu : str
    """
    strength, mean = np.abs(evidence.shares).mean(0), evidence.shares.mean(0)
    groups = [[name for lines in group.values() for name in lines] for group in line_fits.GROUPS]
    groups = [[name for name in names if name in report.weight] for names in groups]
    groups = [names for names in groups if names]
    groups.sort(key=lambda names: -sum(report.weight[n] for n in names))
    groups = groups[:ZOOMS]
    figure = Figure(figsize=(11, 7), layout="constrained")
    grid = figure.add_gridspec(2, ZOOMS)
    top = figure.add_subplot(grid[0, :])
    bars = top.bar(wave, strength, width=3 * np.gradient(wave), color=diagrams.MODEL_COLOUR)
    top.set(xlim=(wave[0], wave[-1]), ylabel=f"mean |share| of a bin\n({report.unit})")
    top.set_xlabel("rest wavelength in vacuum (Angstrom)")
    deciding, absent = (
        ", ".join(map(diagrams.line_title, names))
        for names in (report.defining, report.out_of_range)
    )
    top.set_title(
        f"{plateifu}: {report.decisive:.0%} of the weight in lines that decide the label"
        f" ({deciding or 'none in range'})"
        + (f"\ndeciding too, but out of the cubes' range: {absent}" if absent else ""),
        pad=55,
        fontsize=11,
    )
    diagrams.mark_lines(top, wave[0], wave[-1])
    for k, names in enumerate(groups):
        waves = [LINES[name] for name in names]
        low = max(wave[0], min(waves) - 2 * WINDOW_AA)
        high = min(wave[-1], max(waves) + 2 * WINDOW_AA)
        seen, ax = (wave >= low) & (wave <= high), figure.add_subplot(grid[1, k])
        ax.bar(wave[seen], mean[seen], width=np.gradient(wave)[seen], color=diagrams.MODEL_COLOUR)
        ax.axhline(0, color=diagrams.LINE_GREY, lw=0.6)
        ax.set(xlim=(low, high), xlabel="rest wavelength (Angstrom)")
        ax.set_ylabel(f"mean share of a bin\n({report.unit})" if k == 0 else "")
        diagrams.mark_lines(ax, low, high)
        lines = ax.twinx()
        (curve,) = lines.plot(wave[seen], residual[seen], color=diagrams.OTHER_COLOUR, lw=0.9)
        lines.tick_params(colors=diagrams.OTHER_COLOUR, labelsize=8)
        if k == len(groups) - 1:
            lines.set_ylabel("flux above the continuum\n/ mean flux", color=diagrams.OTHER_COLOUR)
            handles, words = (bars[0], curve), ("share of a bin in the answers", "mean spectrum")
            figure.legend(handles, words, loc="outside lower center", ncols=2, frameon=False)
    return figure


def write_evidence(
    path: Path, cube: NormalisedCube, wave: np.ndarray, evidence: Evidence, report: Report,
    cards: dict[str, Any], per_spaxel: bool,
) -> None:  # fmt: skip
    """Write a galaxy's evidence as FITS, whole or not at all; `cards` go in the primary header."""
    primary = fits.PrimaryHDU()
    primary.header.update(
        {
            "ORIGIN": ("MaNGA SSFTT", "software project"),
            "CREATOR": (f"evidence.py {utils.VERSION}", "command and version"),
            "DATE": (utils.utc_now().rstrip("Z"), "UTC"),
            **cards,
            "SPAXELS": (len(evidence.answer), "with a prediction"),
            "DECISIVE": (report.decisive, "weight of lines that decide the label"),
            "MOVED": (report.moved, "mean change of the answers without them"),
            "MOVEDOTH": (report.moved_by_others, "without as many other bins"),
            "INCOMPL": (report.incomplete, "mean miss of sums / sum|shares|"),
            "MAXMISS": (report.largest_miss, "largest miss of a sum of shares"),
        }
    )
    unit = "dex" if report.unit == "dex" else None  # logarithms of probabilities have none
    columns = [
        fits.Column("WAVELENGTH", "D", "Angstrom", array=wave),
        fits.Column("SHARE", "E", unit, array=evidence.shares.mean(0)),
        fits.Column("WEIGHT", "E", unit, array=np.abs(evidence.shares).mean(0)),
    ]
    hdus = fits.HDUList([primary, fits.BinTableHDU.from_columns(columns, name="BINS")])
    if per_spaxel:
        image = np.full((wave.size, *cube.usable.shape), np.nan, np.float32)
        image[:, cube.usable] = evidence.shares.T
        sky = fits.Header.fromstring(cube.attrs.get("wcs_header", ""), sep="\n")
        hdus.append(fits.ImageHDU(image, sky, "SHARES"))
        hdus["SHARES"].header["BUNIT"] = unit or ""
    with utils.atomic_path(path) as part:
        hdus.writeto(part, overwrite=True, checksum=True)


def explain_galaxy(trained: TrainedModel, path: Path) -> tuple[NormalisedCube, Evidence, Report]:
    """Read a cube, find the evidence of its predictions, and weigh it.

    Raises
    ------
    DataError
        If the cube is unreadable, made otherwise than the training's, or without a usable spaxel.
    """
    network = trained.network
    assert isinstance(network, MatchedFilterNet)
    start = time.perf_counter()
    cube = inference.read_cube_for(trained, path)
    read = time.perf_counter()
    if not cube.usable.any():
        raise DataError(f"{path}: no usable spaxel, expected some. Choose another galaxy.")
    inference.map_answer(trained, cube.values)
    mapped = time.perf_counter()
    values = torch.from_numpy(cube.values).to(trained.device)
    evidence = explain(network, split(values))
    end = time.perf_counter()
    wave = baselines.wave_of(trained.card.recipe.options["cube"])
    report = examine(trained, cube, wave, evidence)
    report.map_seconds, report.seconds = mapped - start, end - mapped + read - start
    return cube, evidence, report


def main(config: Config) -> int:
    """Find, print, write and draw the evidence of the requested galaxies."""
    trained = inference.load_model(config.run_dir, config.device)
    if not isinstance(trained.network, MatchedFilterNet):
        raise DataError(
            f"{config.run_dir}: a run of {trained.card.network_name}, expected matched filters, "
            "whose evidence can be found. Use another run, or train with --network matched_filters."
        )
    root = run_folder.run_data_dir(config.run_dir, config.data_dir)
    weights = utils.file_digest(config.run_dir / run_folder.WEIGHTS_FILE)
    code = utils.EXIT_DONE
    for plateifu in config.plateifu:
        try:
            cube, evidence, report = explain_galaxy(trained, utils.cube_path(root, plateifu))
        except DataError as error:
            log.error("%s: %s", plateifu, error)
            code = utils.EXIT_DATA
            continue
        wave = baselines.wave_of(trained.card.recipe.options["cube"])
        print(f"{plateifu}: {utils.counted(len(evidence.answer), 'spaxel')}\n{report}")
        if report.incomplete > LARGEST_MISS:
            log.warning(
                "%s: the sums of shares miss the differences of the answers by %.0f%% of the "
                "shares' absolute sum: do not trust the weights",
                plateifu,
                100 * report.incomplete,
            )
        out = config.run_dir / run_folder.EVIDENCE_FOLDER / f"{plateifu}.fits"
        inputs = {"weights": weights, "cube": cube.recipe.digest}
        recipe = Recipe("evidence", EVIDENCE_VERSION, {"per_spaxel": config.per_spaxel}, inputs)
        cards = {
            "PLATEIFU": (plateifu, "galaxy"),
            "RUN": (run_folder.card_name(config.run_dir), "folder of the training run"),
            "NEPOCH": (trained.card.best["epoch"], "training epoch of the weights"),
            "RECIPE": recipe.digest,
            "TASK": (trained.spec.label_task, "label that was learned"),
        }
        write_evidence(out, cube, wave, evidence, report, cards, config.per_spaxel)
        log.info("%s", out)
        residual = cube.values[cube.usable][:, : wave.size].mean(0)
        figure = evidence_figure(wave, evidence, residual, report, plateifu)
        folder = config.run_dir / run_folder.FIGURES_FOLDER
        vis_fns.save(figure, folder / f"{plateifu}_evidence.png")
    return code


if __name__ == "__main__":
    utils.run_command(main, Config, __doc__)
