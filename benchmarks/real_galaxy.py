"""How well a model that learned from simulated galaxies maps a real one.

The LOGCUBE of the real galaxy is synthesised from its MAPS file (mock_manga.py --from-maps): field,
lines, velocities and S/N are real, the stars and the noise simulated. Its labels are those of the
real MAPS. The network's error against them is compared with its error on the simulated test
galaxies of its run.

Reads   a run folder that learned metallicities and was evaluated on its test part (eval_fns.py);
        --maps: a MAPS file.
Writes  --work-dir: the galaxy's cube and labels; results/real-galaxy/<plateifu>.{json,png}.

    python benchmarks/real_galaxy.py --run-dir runs/a --work-dir work
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import measuring
import utils
from utils import DataError

import mock_realism
import numpy as np
from matplotlib.figure import Figure

import baselines
import inference
import process_single_cube
import run_folder
import sky_maps
import vis_fns
from mock.from_maps import resynthesise


@dataclass(frozen=True)
class Config:
    """Map a real galaxy with a model that learned from simulated ones."""

    run_dir: Path
    """Folder of a training run that learned metallicities."""
    work_dir: Path
    """Data folder for the galaxy."""
    maps: Path = mock_realism.REAL / mock_realism.REAL_MAPS
    """Real MAPS file."""
    seed: int = 1
    """Random seed of the noise and the stars."""
    results: Path = measuring.ROOT / "results" / "real-galaxy"
    """Folder of the numbers and the figure."""
    debug: bool = False
    """Show the traceback of an error."""


def main(config: Config) -> int:
    """Make the galaxy, map it, compare, draw."""
    evaluation = config.run_dir / "test" / run_folder.RESULT_FILE
    if not evaluation.is_file():
        raise DataError(
            f"{evaluation}: no such file, expected the scores of the run's test part. Run "
            f"eval_fns.py --run-dir {config.run_dir}."
        )
    scores = json.loads(evaluation.read_text())
    logcube, *_ = resynthesise(config.work_dir, config.maps, config.seed)
    plateifu = utils.plateifu_of(logcube)
    made = process_single_cube.Config(
        plateifu=plateifu, data_dir=config.work_dir, like_run=config.run_dir
    )
    process_single_cube.main(made)
    trained = inference.load_model(config.run_dir)
    path = utils.cube_path(config.work_dir, plateifu)
    prediction = inference.predict_cube(trained, path)
    cube = inference.read_cube_for(trained, path)
    label_path = utils.label_path(config.work_dir, "logOH", plateifu)
    labels = inference.read_labels_for(trained, label_path, cube.usable)
    weights, _ = run_folder.read_tensors(config.run_dir / run_folder.BASELINE_FILE)
    ratios = np.full(labels.shape, np.nan)
    wave = baselines.wave_of(trained.card.recipe.options["cube"])
    guess = baselines.apply(weights, cube.values[cube.usable], trained.spec, wave)
    ratios[cube.usable] = guess.logoh
    known = np.isfinite(labels) & cube.usable
    assert prediction.logoh is not None
    assert prediction.lower is not None
    assert prediction.upper is not None
    errors = {"network": prediction.logoh - labels, "line ratios": ratios - labels}
    mocks = {"network": scores["mae_dex"], "line ratios": scores["baseline_mae_dex"]}
    held = (prediction.lower <= labels) & (labels <= prediction.upper)
    rows = [
        measuring.make_row(
            f"MAE, {name}", float(np.abs(error[known]).mean()), mocks[name], "dex",
            "the same on simulated test galaxies", median_error=float(np.median(error[known])),
        )
        for name, error in errors.items()
    ]  # fmt: skip
    spaxels = utils.counted(int(known.sum()), "labelled spaxel")
    print(f"{plateifu}: {spaxels}, {held[known].mean():.1%} of them in their 90 % intervals")
    measuring.print_rows(rows)
    for row in rows:
        print(f"{row['name']}: median error {row['median_error']:+.4f} dex")
    figure = Figure(figsize=(19, 4.2), layout="constrained")
    axes, sky = figure.subplots(1, 4), sky_maps.sky_of(prediction)
    limits = tuple(np.nanquantile(labels[known], (0.01, 0.99)))
    maps = {
        f"{plateifu}: label (real MAPS)": np.where(known, labels, np.nan),
        "line ratios of the spectrum": ratios,
        "network": prediction.logoh,
    }
    for ax, (title, values) in zip(axes, maps.items(), strict=False):
        sky_maps.plot_value_map(ax, values, sky, "12+log(O/H) (dex)", title, limits)
    sky_maps.mark_distrusted(axes[2], prediction)
    sky_maps.plot_difference(axes[3], prediction, np.where(known, labels, np.nan))
    vis_fns.save(figure, config.results / f"{plateifu}.png")
    measuring.write_rows(
        config.results / f"{plateifu}.json", rows, labelled=int(known.sum()),
        held=float(held[known].mean()), config=utils.config_dict(config),
    )  # fmt: skip
    return utils.EXIT_DONE


if __name__ == "__main__":
    utils.run_command(main, Config, __doc__)
