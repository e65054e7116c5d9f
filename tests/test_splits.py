"""Splits: whole galaxies by mangaid, stratified, seeded; easy ones say what they are."""

import logging
from functools import partial

import utils
from utils import DataError

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import create_data_splits as cds
import create_easy_data_splits as easy
import data_io
from recipe import DIGEST_LENGTH, Recipe, digest_of

FRACTIONS = (0.7, 0.15, 0.15)
ONE = "8003-1901"


def galaxies(n, seed=0, twins=0):
    means = np.random.default_rng(seed).normal(8.45, 0.09, n + twins)
    names = [f"{7000 + i}-1901" for i in range(n + twins)]
    mangaids = [f"1-{i}" for i in (*range(n), *range(twins))]
    return pd.DataFrame({"plateifu": names, "mangaid": mangaids, "mean_label": means})


@given(n=st.integers(3, 80), twins=st.integers(0, 3), seed=st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_parts_are_disjoint_complete_and_of_their_size(n, twins, seed):
    table = galaxies(n, seed, twins)
    parts = cds.split_galaxies(table, FRACTIONS, seed)
    data_io.check_split(parts, "hard", "here")
    together = sorted(p for t in parts.values() for p in t["plateifu"])
    assert together == sorted(table["plateifu"])
    again, other = (cds.split_galaxies(table, FRACTIONS, s)["test"] for s in (seed, seed + 1))
    pd.testing.assert_frame_equal(parts["test"], again)
    assert n < 40 or set(again["plateifu"]) != set(other["plateifu"])
    for name, fraction in zip(utils.SPLIT_PARTS, FRACTIONS, strict=True):
        count = parts[name]["mangaid"].nunique()
        assert count >= 1
        assert abs(count - fraction * n) <= 2


def test_stratified_parts_have_closer_means_than_random_ones():
    stratified, random = [], []
    for seed in range(30):
        table = galaxies(40, seed)
        parts = cds.split_galaxies(table, FRACTIONS, seed)
        stratified.append(np.ptp([t["mean_label"].mean() for t in parts.values()]))
        shuffled = table["mean_label"].sample(frac=1, random_state=seed).to_numpy()
        random.append(np.ptp([part.mean() for part in np.split(shuffled, (28, 34))]))
    assert np.mean(stratified) < 0.5 * np.mean(random)


@pytest.mark.parametrize(
    ("n", "twins", "fractions", "message"),
    [
        (4, 0, (0.05, 0.475, 0.475), "no galaxy of 4 is left for training"),
        (3, 0, (0.05, 0.05, 0.9), "no galaxy of 3 is left for training"),
        (2, 2, FRACTIONS, "2 galaxies: .* at least 3"),
    ],
)
def test_impossible_parts_are_refused(n, twins, fractions, message):
    table = galaxies(n, twins=twins)
    with pytest.raises(DataError, match=message):
        cds.split_galaxies(table, fractions, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            ({"fractions": f}, "--fractions .*: expected three positive numbers summing to 1")
            for f in ((0.7, 0.3, 0.0), (0.5, 0.1, 0.1), (1.2, -0.1, -0.1), (0.9, 0.2, 0.2))
        ),
        ({"min_labelled": 0}, "--min-labelled 0: expected 1 or more"),
        ({"split_dir": "a/b"}, "--split-dir 'a/b': expected the name of a folder"),
    ],
)
@pytest.mark.parametrize("script", [cds, easy])
def test_wrong_options_are_refused_before_anything_is_read(tmp_path, script, options, message):
    with pytest.raises(DataError, match=message):
        script.main(script.Config(data_dir=tmp_path, **options))


def write_labels(root, name, labels, **about):
    recipe = Recipe("labels", data_io.LABEL_VERSION, {"label_task": "logOH"}, {"MAPS": name})
    path = utils.label_path(root, "logOH", name)
    data_io.write_labels(path, labels, labels * 0, recipe, about)


def read_labels(root, name=ONE):
    return data_io.read_labels(utils.label_path(root, "logOH", name))


@pytest.fixture
def labelled(tmp_path):
    """Data folder with label maps of 12 galaxies, two of them twins, one nearly without labels."""
    rng = np.random.default_rng(0)
    for i in range(12):
        labels = rng.normal(8.3 + 0.03 * i, 0.02, (8, 8)).astype("f4")
        labels[rng.random((8, 8)) < 0.2] = np.nan
        if i == 11:
            labels[1:] = np.nan
        write_labels(tmp_path, f"{8000 + i}-1901", labels, mangaid=f"1-{i % 10}")
    return tmp_path


def test_command_writes_a_readable_split_and_leaves_out_the_unlabelled(labelled):
    assert cds.main(cds.Config(data_dir=labelled, split_dir="hard", seed=4)) == 0
    parts, recipe = data_io.read_split(utils.split_path(labelled, "hard"))
    found = [recipe.options[k] for k in ("kind", "seed", "label_task")]
    assert found == ["hard", 4, "logOH"]
    together = pd.concat(parts.values()).set_index("plateifu")
    assert "8011-1901" not in together.index
    assert len(together) == 11
    row, labels = together.loc[ONE], read_labels(labelled)
    counts = [int(((labels >= a) & (labels < b)).sum()) for a, b in [(8.40, 8.44), (8.44, 8.48)]]
    assert [row["class_1"], row["class_2"]] == counts
    assert row["n_labelled"] == np.isfinite(labels).sum()
    assert row["label_digest"] == digest_of(labels)[:DIGEST_LENGTH]


def test_critical_galaxies_can_be_left_out(labelled):
    write_labels(labelled, ONE, read_labels(labelled), mangaid="1-3", critical=True)
    for skip, n in ((False, 11), (True, 10)):
        found = set(cds.labelled_galaxies(labelled, "logOH", 20, skip)["plateifu"])
        assert (len(found), ONE in found) == (n, not skip)


@pytest.mark.parametrize("script", [cds, easy])
def test_galaxies_outside_a_list_do_not_change_the_split(labelled, script, tmp_path):
    config = partial(script.Config, "logOH", data_dir=labelled, split_dir="some")
    names = [path.stem for path in utils.label_maps(labelled, "logOH")]
    listed = tmp_path / "galaxies.txt"
    listed.write_text("\n".join(names[:-4]))
    assert script.main(config(galaxy_list=listed)) == 0
    parts, _ = data_io.read_split(utils.split_path(labelled, "some"))
    assert set().union(*(t["plateifu"] for t in parts.values())) == set(names[:-4])
    with pytest.raises(DataError, match="another set of label maps"):
        script.main(config())
    for name in names[-4:]:
        utils.label_path(labelled, "logOH", name).unlink()
    assert script.main(config()) == 0  # the same split: up to date
    listed.write_text("9999-1901")
    with pytest.raises(DataError, match=r"no label maps of logOH for the galaxies of .*galaxies"):
        script.main(config(galaxy_list=listed))


@pytest.mark.parametrize("script", [cds, easy])
def test_split_of_other_options_or_labels_replaces_none_unasked(labelled, script):
    folder = utils.split_path(labelled, f"{'hard' if script is cds else 'easy'}_logOH")
    script.main(script.Config(data_dir=labelled))
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.csv")}
    script.main(script.Config(data_dir=labelled))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with pytest.raises(DataError, match=r"made with seed=0 \(now 5\).*--overwrite"):
        script.main(script.Config(data_dir=labelled, seed=5))
    write_labels(labelled, ONE, read_labels(labelled)[::-1], mangaid="1-3")  # on other spaxels
    with pytest.raises(DataError, match=r"another set of label maps.*--overwrite"):
        script.main(script.Config(data_dir=labelled))
    assert script.main(script.Config(data_dir=labelled, overwrite=True)) == 0


def test_easy_split_shows_every_galaxy_on_both_sides_and_says_so(labelled, caplog):
    caplog.set_level(logging.INFO)
    assert easy.main(easy.Config(data_dir=labelled)) == 0
    assert "EASY split" in caplog.text
    folder = utils.split_path(labelled, "easy_logOH")
    parts, recipe = data_io.read_split(folder)
    assert recipe.options["kind"] == "easy"
    header = (folder / "test.csv").read_text()
    assert '"kind": "easy"' in header
    assert '# warning: "EASY split' in header
    assert set(parts["train"]["plateifu"]) == set(parts["test"]["plateifu"])
    labels = read_labels(labelled)
    count, total = np.isfinite(labels).sum(), 0
    for name, fraction in zip(utils.SPLIT_PARTS, FRACTIONS, strict=True):
        spaxels = parts[name].query("plateifu == @ONE")
        assert abs(len(spaxels) - fraction * count) <= 1
        assert np.isfinite(labels[spaxels["y"], spaxels["x"]]).all()
        total += len(spaxels)
    assert total == count
