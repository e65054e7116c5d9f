import json
import os
from pathlib import Path

import utils
from utils import DataError

import pytest
import torch

import run_folder
from recipe import Recipe, sealed
from run_folder import ModelCard
from samples import PatchSpec

CARD = ModelCard(
    recipe=Recipe("run", 2, {"seed": 0, "bands": [0, 5], "cube": {}}, {"split": "aa"}),
    spec=PatchSpec("logOH", bands=(0, 5)),
    class_names=list("abcdef"),
    class_counts=[1, 2, 3, 4, 5, 6],
    class_values=[8.3, 8.4, 8.5, 8.6, 8.7, 8.8],
    label_median=8.5,
    network_name="ssftt",
    network={"bands": 5},
    parameters=7,
    split_dir="hard",
    data_dir="/data",
)


@pytest.fixture
def run_dir(root, tmp_path):
    """What a run with a finished epoch has written, without training."""
    run = tmp_path / "run"
    utils.write_json(run / "config.json", {"label_task": "", "patch_norm": "", "split_dir": ""})
    run_folder.start(run, root, "hard", is_pca=True)
    run_folder.write_best(run, CARD, {"w": torch.arange(6.0).reshape(2, 3).T})
    run_folder.write_checkpoint(run, {"model": {}}, [{"epoch": 1}])
    return run


def edited(**changes):
    def edit(path):
        content = json.loads(path.read_text()) | changes
        kept = {k: v for k, v in content.items() if v != "gone" and k != "checksum"}
        utils.write_json(path, sealed(kept))

    return edit


def other_bytes(path):
    content = bytearray(path.read_bytes())
    content[-20] ^= 1  # of the last weights; a text stays one
    path.write_bytes(content)


def half(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.json", os.unlink, r"no model\.json\. Expected the folder of a training run"),
        (
            "model.json",
            edited(schema_version=1),
            r"version 1, .* 6\. Retrain .* --config .* --over",
        ),
        ("model.json", edited(spec="gone"), r"model\.json: not readable"),
        ("model.json", edited(colour="red"), r"model\.json: not readable"),
        ("model.json", edited(recipe=[]), r"model\.json: its recipe is damaged"),
        ("model.json", half, r"model\.json: not readable"),
        ("best.safetensors", os.unlink, r"no best\.safetensors\. Expected .* a finished epoch"),
        (
            "best.safetensors",
            half,
            r"best\.safetensors: not readable",
        ),
        ("best.safetensors", other_bytes, r"best\.safetensors: not readable .*checksum"),
        ("model.json", other_bytes, r"model\.json: not readable"),
        ("stats.h5", os.unlink, r"stats\.h5 is missing"),
        ("split/val.csv", os.unlink, r"split/val\.csv is missing"),
    ],
)
def test_model_survives_its_files_and_damaged_ones_are_refused(run_dir, name, damage, message):
    card, weights, _, _ = run_folder.read_model(run_dir)
    assert card == CARD
    others_may = run_dir.joinpath("config.json").stat().st_mode
    assert (run_dir / "best.safetensors").stat().st_mode == others_may  # read the weights
    assert torch.equal(weights["w"], torch.arange(6.0).reshape(2, 3).T)
    damage(run_dir / name)
    with pytest.raises(DataError, match=message) as caught:
        run_folder.read_model(run_dir)
    assert "\n" not in str(caught.value)


def changed_tensor(path):
    """Change one bit in a tensor of a checkpoint, which torch itself does not notice."""
    torch.save({"model": torch.full((1000,), 1.5)}, path)
    content = path.read_bytes()
    at = content.index(torch.full((100,), 1.5).numpy().tobytes())
    path.write_bytes(content[:at] + b"\1" + content[at + 1 :])
    assert torch.load(path)["model"][0] != 1.5


def test_damaged_checkpoint_is_refused_and_no_code_in_one_is_executed(run_dir, tmp_path):
    class Harmful:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    assert run_folder.read_checkpoint(run_dir) == {"model": {}}
    for damage in (
        half,
        changed_tensor,
        lambda path: torch.save(Harmful(), path),
        os.unlink,
    ):
        damage(run_dir / "last.pt")
        with pytest.raises(DataError, match=r"last\.pt: (not readable|no such file)"):
            run_folder.read_checkpoint(run_dir)
    assert not (tmp_path / "executed").exists()


def test_new_run_keeps_nothing_of_the_old_one_and_copies_split_and_statistics(root, run_dir):
    for name in ("test/old.txt", "maps/old.txt", "figures/old.txt", "baseline.safetensors"):
        (run_dir / name).parent.mkdir(exist_ok=True)
        (run_dir / name).touch()
    (run_dir / "notes.txt").write_text("mine")
    assert run_folder.choose(run_dir, False, True, {}, "") == (run_dir, False)
    run_folder.start(run_dir, root, "hard", is_pca=True)
    left = {str(p.relative_to(run_dir)) for p in run_dir.rglob("*") if p.is_file()}
    copies = {f"split/{part}.csv" for part in utils.SPLIT_PARTS} | {"stats.h5"}
    assert left == {"config.json", "environment.json", "notes.txt", *copies}
    for name in copies:
        original = utils.split_path(root, "hard") / name.removeprefix("split/")
        assert (run_dir / name).read_bytes() == original.read_bytes()


def test_file_is_not_taken_for_the_folder_of_a_run(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(DataError, match=r"run: a file, expected a new folder or a run's"):
        run_folder.choose(tmp_path / "run", True, True, {}, "")


def test_environment_names_what_a_run_depended_on(monkeypatch, tmp_path):
    found = json.loads(json.dumps(run_folder.environment()))
    assert found["packages"]["torch"] == torch.__version__
    assert {"python", "platform", "git", "command", "version"} <= set(found)
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "run_folder.py"))  # no checkout
    assert run_folder.git_state() == {"commit": None, "dirty": None}


def test_data_folder_is_the_flag_then_the_environments_then_the_runs_own(
    root, run_dir, monkeypatch
):
    monkeypatch.delenv("MANGA_DATA_DIR", raising=False)
    assert run_folder.run_data_dir(run_dir) == Path("data/manga")  # the run's own is gone
    edited(data_dir=str(root))(run_dir / "model.json")
    assert run_folder.run_data_dir(run_dir) == root
    monkeypatch.setenv("MANGA_DATA_DIR", "elsewhere")
    assert run_folder.run_data_dir(run_dir) == Path("elsewhere")
    assert run_folder.run_data_dir(run_dir, run_dir) == run_dir
