"""Scores against scikit-learn's, intervals against closed forms."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

import metrics


@settings(max_examples=60, deadline=None)
@given(
    n_classes=st.integers(2, 8),
    n=st.integers(1, 60),
    seed=st.integers(0, 999),
    narrow=st.booleans(),
    weighted=st.booleans(),
)
def test_scores_equal_scikit_learns(n_classes, n, seed, narrow, weighted):
    rng = np.random.default_rng(seed)
    truth = rng.integers(n_classes, size=n)
    guess = np.where(rng.random(n) < 0.5, truth, rng.integers(1 if narrow else n_classes, size=n))
    weight = rng.random(n) if weighted else None
    confusion, labels = metrics.confusion_matrix(truth, guess, n_classes, weight), range(n_classes)
    options = {"labels": labels, "sample_weight": weight}
    np.testing.assert_allclose(confusion, sk.confusion_matrix(truth, guess, **options))
    overall = metrics.overall_metrics(confusion)
    only = {"sample_weight": weight}
    assert overall["accuracy"] == pytest.approx(sk.accuracy_score(truth, guess, **only))
    assert overall["macro_f1"] == pytest.approx(sk.f1_score(truth, guess, average="macro", **only))
    if np.unique(np.concatenate([truth, guess])).size > 1:
        assert overall["kappa"] == pytest.approx(sk.cohen_kappa_score(truth, guess, **only))
    else:
        assert np.isnan(overall["kappa"])
    each = metrics.class_metrics(confusion)
    options |= {"average": None, "zero_division": 0}
    for name, score in (
        ("precision", sk.precision_score),
        ("recall", sk.recall_score),
        ("f1", sk.f1_score),
        ("iou", sk.jaccard_score),
    ):
        np.testing.assert_allclose(each[name], score(truth, guess, **options))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999))
def test_a_bin_counts_once_however_many_its_spaxels(seed):
    rng = np.random.default_rng(seed)
    n = 40
    each = pd.DataFrame(
        {
            "plateifu": [f"1-{i % 3}" for i in range(n)],
            "mangaid": [f"m{i % 3}" for i in range(n)],
            "bin": np.arange(n) // 3,  # one number means a bin in each galaxy
            "true": rng.integers(6, size=n),
            "predicted": rng.integers(6, size=n),
            "value": rng.normal(8.45, 0.1, n),
        }
    )
    spaxels = each.loc[rng.permutation(np.repeat(each.index, rng.integers(1, 6, n)))]
    model = list("abcdef"), [1, 2, 3, 4, 5, 6], 8.46
    wanted, confusion, per_class, per_galaxy = metrics.score_predictions(each, *model)
    spaxels = spaxels.assign(weight=metrics.bin_weights(spaxels))
    got = metrics.score_predictions(spaxels, *model)
    assert got[0].pop("bins") == wanted["spaxels"] == n
    assert got[0].pop("spaxels") == len(spaxels)
    low_high = got[0].pop("intervals"), wanted.pop("intervals")
    assert got[0] == pytest.approx({k: v for k, v in wanted.items() if k != "spaxels"})
    assert low_high[0].keys() == low_high[1].keys()
    for key in low_high[0]:
        assert low_high[0][key] == pytest.approx(low_high[1][key])
    np.testing.assert_allclose(got[1], confusion)
    pd.testing.assert_frame_equal(got[2], per_class)
    ours = got[3].set_index("plateifu").loc[per_galaxy["plateifu"]].reset_index()
    assert ours.pop("bins").tolist() == per_galaxy["spaxels"].tolist()
    shown = per_galaxy.columns.drop("spaxels").tolist()
    pd.testing.assert_frame_equal(ours[shown], per_galaxy[shown])


def test_undefined_scores_are_nan_not_zero():
    rows = {"plateifu": ["1-1", "1-1", "1-2"], "mangaid": ["a", "a", "b"]}
    frame = pd.DataFrame({**rows, "true": 2, "predicted": 2, "value": 8.46, "logoh": 8.46})
    overall, _, per_class, per_galaxy = metrics.score_predictions(
        frame, list("abcdef"), [1] * 6, 8.46
    )
    assert overall["accuracy"] == 1
    assert np.isnan(overall["kappa"])
    assert "kappa" not in overall["intervals"]
    assert np.isnan(per_galaxy["kappa"]).all()
    assert per_class["f1"].tolist()[2] == 1
    assert per_class["f1"].isna().sum() == 5
    assert per_class["f1"].mean() == overall["macro_f1"]


def test_bootstrap_draws_galaxies_not_spaxels():
    """Ten galaxies, half all right, half all wrong: sd of the mean is sqrt(0.25 / 10)."""
    galaxy = np.repeat(np.arange(10), 50)
    frame = pd.DataFrame({"mangaid": galaxy, "true": 1, "predicted": galaxy % 2})
    low, high = metrics.bootstrap_intervals(frame, 2)["accuracy"]
    assert (high - low) / (2 * 1.96) == pytest.approx(np.sqrt(0.25 / 10), rel=0.15)
    for low, high in metrics.bootstrap_intervals(frame[galaxy % 2 == 0], 2).values():
        assert low == pytest.approx(high)  # of galaxies that are all alike
    one = frame[frame["mangaid"] == 3]
    assert metrics.bootstrap_intervals(one, 2) == {}
