import json

import utils
from utils import DataError

import numpy as np
import pytest

from recipe import Recipe, digest_of, require_alike

OPTIONS = {"n_components": 30, "bands": [0, 5], "cube": {"wave_min": 5000.0, "redshift": None}}
INPUTS = {"cubes": "aa", "galaxies": "bb"}
TODAY = Recipe("statistics", 2, OPTIONS, INPUTS)


def changed(**parts):
    return Recipe(**{**json.loads(TODAY.to_json()), **parts})


def test_digest_depends_on_content_and_not_on_the_order_of_names():
    turned = (dict(reversed(part.items())) for part in (OPTIONS, INPUTS))
    assert Recipe("statistics", 2, *turned).digest == TODAY.digest
    others = [
        {"product": "cube"},
        {"version": 3},
        {"options": {**OPTIONS, "cube": {"wave_min": 5000.0, "redshift": 0.1}}},
        {"inputs": {**INPUTS, "cubes": "cc"}},
    ]
    assert len({TODAY.digest, *(changed(**parts).digest for parts in others)}) == 5


def test_recipe_survives_json_whatever_python_types_its_options_had(tmp_path):
    made = Recipe("cube", 3, {"bands": (0, 5), "folder": tmp_path, "nested": {"grid": (1.0, 2.0)}})
    for text in (made.to_json(), json.loads(made.to_json())):
        again = Recipe.from_json(text, "x.h5")
        assert again == made
        assert again.digest == made.digest


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({}, []),
        ({"product": "cube", "version": 1}, ["it is cube version 1"]),
        ({"version": 1, "options": {}}, ["it is statistics version 1"]),
        ({"inputs": {"cubes": "zz"}}, ["another cubes", "another galaxies"]),
        ({"options": {**OPTIONS, "bands": [0] * 9}}, ["bands=9 values (now [0, 5])"]),
        (
            {"options": {"cube": {"wave_min": 4800.0}, "bands": [0, 5], "snr": 2}},
            ["n_components=None (now 30)", "cube.wave_min=4800.0 (now 5000.0)", "snr=2 (now None)"],
        ),
    ],
)
def test_differences_are_named_in_words(parts, words):
    made = changed(**parts)
    assert TODAY.differences(made) == words
    if not words:
        return TODAY.require(made, "stats.h5", "Rebuild it")
    with pytest.raises(DataError) as caught:
        TODAY.require(made, "stats.h5", "Rebuild it")
    assert str(caught.value) == f"stats.h5: made with {', '.join(words)}. Rebuild it."


def test_products_are_used_together_only_if_they_share_their_options():
    one, other = (Recipe("cube", 3, {"grid": 5000, "redshift": z}, {"x": "y"}) for z in (None, 0.1))
    assert one.digest != other.digest
    require_alike(other.shared, one.shared, "b.h5", "that of a", "Rebuild it")
    message = r"^b\.h5: made with grid=4800 \(that of a: 5000\)\. Rebuild it\.$"
    with pytest.raises(DataError, match=message):
        require_alike({"grid": 4800}, one.shared, "b.h5", "that of a", "Rebuild it")


@pytest.mark.parametrize(
    "text", ["", "{", "null", "3", "[]", "{}", '{"product": "cube"}', '{"a":1}']
)
def test_damaged_recipe_is_one_line_that_names_the_file(text):
    with pytest.raises(DataError, match=r"^x\.h5: its recipe is damaged .* --overwrite\.$"):
        Recipe.from_json(text, "x.h5")


def test_digests_tell_type_shape_and_values_apart(tmp_path):
    zeros = np.zeros(6, np.float32)
    arrays = [zeros, zeros.astype(int), zeros.reshape(2, 3), zeros + 1, np.full(6, np.nan)]
    assert len({digest_of(a) for a in arrays}) == len(arrays)
    table = np.arange(6.0).reshape(2, 3)
    assert digest_of(np.asfortranarray(table)) == digest_of(table)
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"content")
    other.write_bytes(b"content")
    assert utils.file_digest(one) == utils.file_digest(other)
    before = utils.file_stamp(one)
    one.write_bytes(b"another content")
    assert utils.file_digest(one) != utils.file_digest(other)
    assert utils.file_stamp(one) != before
