"""Classes of label values: edges, names, middles."""

from utils import DataError

import numpy as np
import pytest

from labels import LABEL_NONE, class_middles, class_names, label_classes, logoh_edges


@pytest.mark.parametrize(
    ("n_classes", "values", "expected"),
    [
        (6, [8.3, 8.40, 8.4399, 8.44, 8.9, np.nan], [0, 1, 1, 2, 5, LABEL_NONE]),
        (8, [8.3399, 8.34, 8.9], [0, 1, 7]),
    ],
)
def test_an_edge_belongs_to_the_class_above_it(n_classes, values, expected):
    np.testing.assert_array_equal(label_classes(np.array(values), "logOH", n_classes), expected)


@pytest.mark.parametrize("n_classes", [6, 8])
def test_every_metallicity_class_has_a_name_and_contains_its_middle(n_classes):
    middles = class_middles(n_classes)
    assert len(class_names("logOH", n_classes)) == n_classes == middles.size
    back = label_classes(middles, "logOH", n_classes)
    np.testing.assert_array_equal(back, np.arange(n_classes))


def test_bpt_labels_are_classes_already():
    labels = np.array([0, LABEL_NONE, 2], np.int16)
    np.testing.assert_array_equal(label_classes(labels, "BPT"), labels)
    assert class_names("BPT") == ("star-forming", "composite", "AGN")


def test_numbers_of_classes_without_a_scale_are_refused():
    with pytest.raises(DataError, match="7 metallicity classes: expected 6 or 8"):
        logoh_edges(7)
    with pytest.raises(DataError, match="BPT with 6 classes: expected 3"):
        class_names("BPT", 6)
