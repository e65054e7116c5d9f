from __future__ import annotations

import json

import numpy as np
import pytest

from recipe import Recipe, digest_of, file_digest, file_stamp, option_differences, require_alike
from utils import DataError

TODAY = Recipe(
    "statistics",
    2,
    {"n_components": 30, "bands": [0, 5], "cube": {"wave_min": 5000.0, "redshift": None}},
    {"cubes": "aa", "galaxies": "bb"},
)


def changed(**parts):
    return Recipe(**{**json.loads(TODAY.to_json()), **parts})


def test_digest_depends_on_content_and_not_on_the_order_of_names():
    turned = {
        name: dict(reversed(list(getattr(TODAY, name).items()))) for name in ("options", "inputs")
    }
    assert changed(**turned).digest == TODAY.digest
    others = [
        changed(product="cube"),
        changed(version=3),
        changed(options={**TODAY.options, "n_components": 31}),
        changed(options={**TODAY.options, "cube": {"wave_min": 5000.0, "redshift": 0.1}}),
        changed(inputs={"cubes": "aa", "galaxies": "cc"}),
    ]
    assert len({TODAY.digest, *(other.digest for other in others)}) == 6


def test_recipe_survives_json_whatever_python_types_its_options_had(tmp_path):
    made = Recipe("cube", 3, {"bands": (0, 5), "folder": tmp_path, "nested": {"grid": (1.0, 2.0)}})
    again = Recipe.from_json(made.to_json(), "x.h5")
    assert again == made
    assert again.digest == made.digest
    assert Recipe.from_json(json.loads(made.to_json()), "x.h5") == made
    assert "\n" not in made.to_json()


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({}, []),
        ({"product": "cube", "version": 1}, ["it is cube version 1"]),
        ({"version": 1, "options": {}}, ["it is statistics version 1"]),
        ({"inputs": {"cubes": "zz", "galaxies": "bb"}}, ["another cubes"]),
        ({"inputs": {}}, ["another cubes", "another galaxies"]),
        (
            {"options": {"cube": {"wave_min": 4800.0}, "bands": [0, 5], "snr": 2}},
            [
                "n_components=None (now 30)",
                "cube.wave_min=4800.0 (now 5000.0)",
                "snr=2 (now None)",
            ],
        ),
        (
            {"options": {**TODAY.options, "bands": list(range(9))}},
            ["bands=9 values (now [0, 5])"],
        ),
    ],
)
def test_differences_are_named_in_words(parts, words):
    assert TODAY.differences(changed(**parts)) == words


def test_output_of_another_recipe_is_refused_with_what_differs_and_what_to_do():
    TODAY.require(changed(), "stats.h5", "Rebuild it")
    made = changed(options={**TODAY.options, "n_components": 20}, inputs={"galaxies": "bb"})
    with pytest.raises(DataError) as caught:
        TODAY.require(made, "stats.h5", "Rebuild it")
    expected = "stats.h5: made with n_components=20 (now 30), another cubes. Rebuild it."
    assert str(caught.value) == expected


def test_products_are_used_together_only_if_they_share_their_options():
    of_galaxies = [
        Recipe("cube", 3, {"wave_min": 5000, "redshift": z}, {"LOGCUBE": str(z)})
        for z in (None, 0.1)
    ]
    assert of_galaxies[0].digest != of_galaxies[1].digest
    first, second = (recipe.shared for recipe in of_galaxies)
    require_alike(second, first, "b.h5", "that of a", "Rebuild it")
    with pytest.raises(DataError) as caught:
        require_alike({"wave_min": 4800}, first, "b.h5", "that of a", "Rebuild it")
    expected = "b.h5: made with wave_min=4800, that of a with wave_min=5000. Rebuild it."
    assert str(caught.value) == expected
    assert option_differences(first, second) == []


@pytest.mark.parametrize(
    "text", ["", "{", "null", "3", "[]", '"text"', "{}", '{"product": "cube"}', '{"colour": 1}']
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
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1}) != digest_of({"a": 1})

    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"content")
    other.write_bytes(b"content")
    assert file_digest(one) == file_digest(other)
    before = file_stamp(one)
    one.write_bytes(b"another content")
    assert file_digest(one) != file_digest(other)
    assert file_stamp(one) != before
