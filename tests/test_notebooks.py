"""The notebooks run from top to bottom as in a clean clone, and are kept without outputs."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

REPO = Path(__file__).resolve().parents[1]
NOTEBOOKS = ("demo.ipynb", "data_split_char.ipynb")
LESS = {"n_galaxies=28": "n_galaxies=12", "epochs=6": "epochs=1"}
"""The only changes before a notebook is run: fewer galaxies, and one epoch of training."""


@pytest.fixture(scope="module")
def clean_clone(tmp_path_factory):
    """An empty folder to run in; the second notebook finds the first one's galaxies."""
    return tmp_path_factory.mktemp("clone")


def execute(name: str, folder: Path, monkeypatch) -> str:
    """Run a notebook in a folder; return what it printed and showed, and its number of figures."""
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    text = (REPO / name).read_text()
    for usual, less in LESS.items():
        text = text.replace(usual, less)
    book = nbformat.reads(text, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(book, timeout=1800, startup_timeout=600, resources=resources)
    client.comm_open_handlers = {}  # its stand-in for widgets may block: jupyter/nbclient#312
    client.execute(env={**os.environ})
    outputs = [o for cell in book.cells if cell.cell_type == "code" for o in cell.outputs]
    figures = sum("image/png" in o.get("data", {}) for o in outputs)
    printed = "".join(o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs)
    return f"{printed}\nfigures: {figures}"


@pytest.mark.slow
def test_demo_notebook_runs_from_a_clean_clone(clean_clone, monkeypatch):
    monkeypatch.delenv("MANGA_DATA_DIR", raising=False)
    printed = execute("demo.ipynb", clean_clone, monkeypatch)
    for words in (
        "matched_filters for logOH: < 8.40",
        "in the run's test part",
        "  majority class",
    ):
        assert words in printed
    assert "figures: 6" in printed  # two of them of the widget
    assert (clean_clone / "results/demo/logOH_hard/test/metrics.json").is_file()


@pytest.mark.slow
def test_split_notebook_runs_on_a_given_data_folder(clean_clone, monkeypatch):
    root = clean_clone / "data" / "demo"
    monkeypatch.setenv("MANGA_DATA_DIR", str(root))
    printed = execute("data_split_char.ipynb", clean_clone, monkeypatch)
    assert "touch a training spaxel" in printed
    assert "figures: 2" in printed
    assert (root / "splits" / "notebook_hard" / "train.csv").is_file()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_kept_without_outputs(name):
    book = nbformat.read(REPO / name, as_version=4)
    nbformat.validate(book)
    for cell in book.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)
