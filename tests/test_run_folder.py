from __future__ import annotations

import json
import os

import mock_cubes
import numpy as np
import pytest
import torch

import data_io
import run_folder
import utils
from labels import class_middles
from recipe import Recipe
from run_folder import ModelCard
from samples import PatchSpec
from utils import DataError

CARD = ModelCard(
    recipe=Recipe("run", 2, {"seed": 0, "bands": [0, 5], "cube": {}}, {"split": "aa"}),
    spec=PatchSpec("logOH", bands=(0, 5)),
    class_names=list("abcdef"),
    class_counts=[1, 2, 3, 4, 5, 6],
    class_values=[8.3, 8.4, 8.5, 8.6, 8.7, 8.8],
    label_median=8.5,
    network={"bands": 5},
    parameters=7,
    split_dir="hard",
    data_dir="/data",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return mock_cubes.make_data_dir(tmp_path_factory.mktemp("data"), mock_cubes.PLATEIFUS[:4])


@pytest.fixture
def run_dir(root, tmp_path):
    """What a run with a finished epoch has written, without training."""
    run = tmp_path / "run"
    run_folder.start(run, root, "hard", is_pca=True)
    utils.write_json(run / "config.json", {"label_task": "", "patch_norm": "", "split_dir": ""})
    run_folder.write_best(run, CARD, {"w": torch.arange(6.0).reshape(2, 3).T})
    run_folder.write_checkpoint(run, {"model": {}}, [{"epoch": 1}])
    return run


def test_model_card_survives_its_file(run_dir):
    assert ModelCard.read(run_dir) == CARD
    np.testing.assert_array_equal(CARD.dex_values, CARD.class_values)


def of_version_1(path):
    return path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 1}))


def without_spec(path):
    content = json.loads(path.read_text())
    del content["spec"]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.json", os.unlink, r"no model\.json\. Expected the folder of a training run"),
        ("model.json", of_version_1, r"ssftt-model version 1, this code needs .* version 2"),
        ("model.json", without_spec, r"model\.json: damaged"),
        ("model.json", lambda path: path.write_text("[1]"), r"model\.json: damaged"),
        ("model.json", lambda path: os.truncate(path, 99), r"model\.json: damaged"),
        ("best.safetensors", os.unlink, r"no best\.safetensors\. Expected .* a finished epoch"),
        ("best.safetensors", lambda path: os.truncate(path, 9), r"best\.safetensors: not readable"),
        ("stats.h5", os.unlink, r"stats\.h5 is missing"),
        ("split/val.csv", os.unlink, r"split/val\.csv is missing"),
    ],
)
def test_incomplete_or_damaged_model_is_refused_in_one_line(run_dir, name, damage, message):
    assert run_folder.read_model(run_dir).card == CARD
    damage(run_dir / name)
    with pytest.raises(DataError, match=message) as caught:
        run_folder.read_model(run_dir)
    assert "\n" not in str(caught.value)


def test_damaged_checkpoint_is_refused_and_no_code_in_one_is_executed(run_dir, tmp_path):
    class Harmful:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    def half(path):
        os.truncate(path, 50)

    assert run_folder.read_checkpoint(run_dir) == {"model": {}}
    for damage in (half, lambda path: torch.save(Harmful(), path), os.unlink):
        damage(run_dir / "last.pt")
        with pytest.raises(DataError, match=r"last\.pt: not a readable checkpoint"):
            run_folder.read_checkpoint(run_dir)
    assert not (tmp_path / "executed").exists()


def test_class_values_are_means_of_training_labels_or_middles_of_classes_without_any():
    labels = {2: np.array([8.41, 8.43], np.float32), 5: np.array([8.7], np.float32)}
    expected = class_middles(6)
    expected[[2, 5]] = [8.42, 8.7]
    found = run_folder.training_class_values(labels, PatchSpec("logOH"))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert run_folder.training_class_values({}, PatchSpec("BPT")) is None


def test_new_run_removes_all_results_of_the_old_one_and_copies_split_and_statistics(root, run_dir):
    for name in ("test", "maps", "figures"):
        (run_dir / name).mkdir()
        (run_dir / name / "old.txt").touch()
    (run_dir / "baseline.safetensors").touch()
    (run_dir / "notes.txt").write_text("mine")
    run_folder.check_replaceable(run_dir)
    run_folder.start(run_dir, root, "hard", is_pca=True)
    left = {str(p.relative_to(run_dir)) for p in run_dir.rglob("*") if p.is_file()}
    copies = {"split/train.csv", "split/val.csv", "split/test.csv", "stats.h5"}
    assert left == {"environment.json", "notes.txt", *copies}
    for name in ("train.csv", "val.csv", "test.csv"):
        ours = run_dir / "split" / name
        assert ours.read_bytes() == (utils.split_path(root, "hard") / name).read_bytes()


def test_galaxies_know_their_part_and_the_weights_their_epoch(root, run_dir):
    """A stop may come between writing the weights and the card that describes them."""
    best = {"epoch": 3, "val_accuracy": 0.5}
    weights = {"w": torch.ones(2)}
    run_folder.write_tensors(run_dir / "best.safetensors", weights, {"best": json.dumps(best)})
    saved = run_folder.read_model(run_dir)
    assert saved.card.best == best
    assert torch.equal(saved.weights["w"], weights["w"])
    parts, _ = data_io.read_split(utils.split_path(root, "hard"))
    assert saved.parts == {m: part for part, table in parts.items() for m in table["mangaid"]}


def test_others_may_read_the_weights(tmp_path):
    mask = os.umask(0o022)
    try:
        run_folder.write_best(tmp_path, CARD, {"w": torch.ones(2)})
    finally:
        os.umask(mask)
    for name in ("best.safetensors", "model.json"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o644


def test_environment_names_what_a_run_depended_on(monkeypatch, tmp_path):
    found = json.loads(json.dumps(run_folder.environment()))
    assert found["packages"]["torch"] == torch.__version__
    assert found["packages"]["numpy"] == np.__version__
    assert {"python", "platform", "git", "command", "version"} <= set(found)
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "run_folder.py"))  # no checkout
    assert run_folder.git_state() == {"commit": None, "dirty": None}


def test_data_folder_is_the_flag_then_the_runs_own_then_the_default(
    root, run_dir, tmp_path, monkeypatch
):
    monkeypatch.setenv("MANGA_DATA_DIR", str(tmp_path))
    assert run_folder.run_data_dir(run_dir) == tmp_path  # the run's own, /data, is not there
    content = {**json.loads((run_dir / "model.json").read_text()), "data_dir": str(root)}
    utils.write_json(run_dir / "model.json", content)
    assert run_folder.run_data_dir(run_dir) == root
    assert run_folder.run_data_dir(run_dir, run_dir) == run_dir
