"""Splits: whole galaxies by mangaid, stratified, seeded; easy ones say what they are."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import create_data_splits as cds
import create_easy_data_splits as easy
import data_io
import utils
from utils import DataError


def galaxies(n, seed=0, twins=0):
    rng = np.random.default_rng(seed)
    ids = [f"1-{i}" for i in range(n)] + [f"1-{i}" for i in range(twins)]
    return pd.DataFrame(
        {
            "plateifu": [f"{7000 + i}-{1901}" for i in range(n + twins)],
            "mangaid": ids,
            "n_labelled": rng.integers(20, 500, n + twins),
            "mean_label": rng.normal(8.45, 0.09, n + twins),
        }
    )


@given(n=st.integers(3, 80), twins=st.integers(0, 3), seed=st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_parts_are_disjoint_complete_and_of_their_size(n, twins, seed):
    table = galaxies(n, seed, twins)
    parts = cds.hard_split(table, (0.7, 0.15, 0.15), seed)
    data_io.check_split(parts, "hard", "here")
    together = sorted(p for t in parts.values() for p in t["plateifu"])
    assert together == sorted(table["plateifu"])
    for name, fraction in zip(utils.SPLIT_PARTS, (0.7, 0.15, 0.15), strict=True):
        count = parts[name]["mangaid"].nunique()
        assert count >= 1
        assert abs(count - fraction * n) <= 2


def test_same_seed_same_split_other_seed_another():
    table = galaxies(40)
    first, again, other = (cds.hard_split(table, (0.7, 0.15, 0.15), s) for s in (1, 1, 2))
    pd.testing.assert_frame_equal(first["test"], again["test"])
    assert set(first["test"]["plateifu"]) != set(other["test"]["plateifu"])


def test_stratified_parts_have_closer_means_than_random_ones():
    stratified, random = [], []
    for seed in range(30):
        table = galaxies(40, seed)
        means = [
            t["mean_label"].mean() for t in cds.hard_split(table, (0.7, 0.15, 0.15), seed).values()
        ]
        stratified.append(np.ptp(means))
        shuffled = table["mean_label"].sample(frac=1, random_state=seed).to_numpy()
        random.append(np.ptp([shuffled[:28].mean(), shuffled[28:34].mean(), shuffled[34:].mean()]))
    assert np.mean(stratified) < 0.5 * np.mean(random)


@pytest.mark.parametrize("fractions", [(0.7, 0.3, 0.0), (0.5, 0.1, 0.1), (1.2, -0.1, -0.1)])
def test_fractions_that_are_none_are_refused(fractions):
    with pytest.raises(DataError, match="summing to 1"):
        cds.hard_split(galaxies(10), fractions, 0)


@pytest.mark.parametrize("fractions", [(0.5, 0.2, 0.2), (0.9, 0.2, 0.2)])
def test_easy_fractions_that_are_none_are_refused(fractions):
    spaxels = {"7000-1901": (np.arange(9), np.arange(9))}
    with pytest.raises(DataError, match="summing to 1"):
        easy.easy_split(galaxies(1), spaxels, fractions, 0)


@pytest.mark.parametrize(("n", "fractions"), [(4, (0.05, 0.475, 0.475)), (3, (0.05, 0.05, 0.9))])
def test_fractions_that_leave_no_training_galaxy_are_refused(n, fractions):
    with pytest.raises(DataError, match=f"of {n} galaxies none is left for training"):
        cds.hard_split(galaxies(n), fractions, 0)


def test_split_replaced_half_way_is_refused(labelled, monkeypatch):
    """Parts of two splits may share no galaxy and still be wrong."""
    cds.main(cds.Config(data_dir=labelled, seed=1))
    real, seen = utils.atomic_path, []

    def stopped(path):
        seen.append(path)
        if len(seen) > 1:
            raise KeyboardInterrupt
        return real(path)

    monkeypatch.setattr(utils, "atomic_path", stopped)
    with pytest.raises(KeyboardInterrupt):
        cds.main(cds.Config(data_dir=labelled, seed=2, overwrite=True))
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"parts of different splits.*--overwrite"):
        data_io.read_split(utils.split_path(labelled, "hard_logOH"))
    assert cds.main(cds.Config(data_dir=labelled, seed=2, overwrite=True)) == 0


def test_critical_galaxies_can_be_left_out(labelled):
    path = utils.label_path(labelled, "logOH", "8003-1901")
    labels = data_io.read_labels(path)
    data_io.write_labels(path, labels, labels, {"mangaid": "1-3", "critical": True})
    for skip, n in ((False, 11), (True, 10)):
        table = cds.labelled_galaxies(labelled, "logOH", 20, skip)
        assert len(table) == n
        assert ("8003-1901" in set(table["plateifu"])) is not skip


def test_too_few_galaxies_are_refused():
    with pytest.raises(DataError, match="at least 3"):
        cds.hard_split(galaxies(2, twins=2), (0.7, 0.15, 0.15), 0)


@pytest.fixture
def labelled(tmp_path):
    """Data folder with label maps of 12 galaxies, two of them twins, one nearly without labels."""
    rng = np.random.default_rng(0)
    for i in range(12):
        labels = rng.normal(8.3 + 0.03 * i, 0.02, (8, 8)).astype("f4")
        labels[rng.random((8, 8)) < 0.2] = np.nan
        if i == 11:
            labels[1:] = np.nan
        name = f"{8000 + i}-1901"
        path = utils.label_path(tmp_path, "logOH", name)
        data_io.write_labels(path, labels, labels * 0, {"mangaid": f"1-{i % 10}"})
    return tmp_path


def test_command_writes_a_readable_split_and_leaves_out_the_unlabelled(labelled):
    config = cds.Config(data_dir=labelled, split_dir="hard", seed=4)
    assert cds.main(config) == 0
    parts, meta = data_io.read_split(utils.split_path(labelled, "hard"))
    assert (meta["kind"], meta["seed"], meta["label_task"]) == ("hard", 4, "logOH")
    together = pd.concat(parts.values())
    assert "8011-1901" not in set(together["plateifu"])
    assert len(together) == 11
    row = together.set_index("plateifu").loc["8003-1901"]
    labels = data_io.read_labels(utils.label_path(labelled, "logOH", "8003-1901"))
    counts = [int(((labels >= a) & (labels < b)).sum()) for a, b in [(8.40, 8.44), (8.44, 8.48)]]
    assert [row["class_1"], row["class_2"]] == counts
    assert row["n_labelled"] == np.isfinite(labels).sum()


def test_existing_split_is_not_changed_silently(labelled):
    cds.main(cds.Config(data_dir=labelled, seed=4))
    assert cds.main(cds.Config(data_dir=labelled, seed=4)) == 0
    with pytest.raises(DataError, match=r"another .*seed"):
        cds.main(cds.Config(data_dir=labelled, seed=5))
    assert cds.main(cds.Config(data_dir=labelled, seed=5, overwrite=True)) == 0


def test_no_labels_is_one_clear_line(tmp_path):
    with pytest.raises(DataError, match=r"no label maps of logOH\. Make them with cube_processing"):
        cds.main(cds.Config(data_dir=tmp_path))


def test_split_of_remade_labels_is_another_and_an_unchanged_one_is_left_alone(labelled):
    folder = utils.split_path(labelled, "easy_logOH")
    easy.main(easy.Config(data_dir=labelled))
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.csv")}
    easy.main(easy.Config(data_dir=labelled))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    path = utils.label_path(labelled, "logOH", "8003-1901")
    labels = data_io.read_labels(path)[::-1]  # as many labels, on other spaxels
    data_io.write_labels(path, labels, labels * 0, data_io.read_label_meta(path))
    with pytest.raises(DataError, match=r"another labels.*--overwrite"):
        easy.main(easy.Config(data_dir=labelled))
    assert easy.main(easy.Config(data_dir=labelled, overwrite=True)) == 0


def test_easy_split_shows_every_galaxy_on_both_sides_and_says_so(labelled, caplog):
    caplog.set_level(logging.INFO)
    assert easy.main(easy.Config(data_dir=labelled)) == 0
    assert "EASY split" in caplog.text
    folder = utils.split_path(labelled, "easy_logOH")
    parts, meta = data_io.read_split(folder)
    assert meta["kind"] == "easy"
    assert "EASY" in Path(folder / "test.csv").read_text()
    assert set(parts["train"]["plateifu"]) == set(parts["test"]["plateifu"])
    total = 0
    for name, fraction in zip(utils.SPLIT_PARTS, (0.7, 0.15, 0.15), strict=True):
        per_galaxy = parts[name].groupby("plateifu").size()
        labels = data_io.read_labels(utils.label_path(labelled, "logOH", "8003-1901"))
        assert abs(per_galaxy["8003-1901"] - fraction * np.isfinite(labels).sum()) <= 1
        total += per_galaxy["8003-1901"]
        ys, xs = (parts[name].query("plateifu == '8003-1901'")[k] for k in "yx")
        assert np.isfinite(labels[ys, xs]).all()
    assert total == np.isfinite(labels).sum()
