"""Make the files of aux/: two configurations and their dictionaries of bins and cuts.

Reads   simtel files, for the numbers and true energies of their events.
Writes  aux/test_pytables{,_1bin}.config (settings of the historic examples) and
        aux/bins_cuts_dict{,_1bin}.pkl, the dictionaries also as .json for people to read.

No EventDisplay analysis of these files exists. It is replaced by random numbers with a fixed seed:
reconstructed energies with a scatter of 15 % around the true ones, shape parameters of good events.
They are written to a ROOT file like EventDisplay's, which prepare_cuts_dict.py reads.

    python scripts/make_aux.py FILE.simtel.gz [FILE ...]
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import uproot

from image_extractor.config import as_text
from image_extractor.prepare_cuts_dict import TREE, prepare
from image_extractor.settings import EnergyBins, Settings
from image_extractor.simtel import SimtelFile

AUX = Path(__file__).resolve().parents[1] / "aux"
CONFIGURATIONS = {
    "": dict(
        storage_mode="all",
        type_mode="SCT",
        image_mode="PIXELS_TIMING_3C",
        scale_factor=2,
        energy_bins=EnergyBins(min=-1.0, max=0.5, bin_size=0.5),
    ),
    "_1bin": dict(
        storage_mode="mapped",
        type_mode="SCT",
        image_mode="PIXELS_1C",
        scale_factor=1,
        energy_bins=EnergyBins(min=-1.0, max=1.0, bin_size=2.0),
    ),
}


def mock_mscw(paths: list[Path], seed: int = 0) -> dict[str, np.ndarray]:
    """Draw columns of EventDisplay's tree `data` for the triggered events of simtel files."""
    rng = np.random.default_rng(seed)
    events = []
    for path in paths:
        with SimtelFile(path) as simtel:
            events += [
                (e.run_number, e.event_id, e.shower["energy"], len(e.telescopes))
                for e in simtel.events()
            ]
    run, number, energy, n_images = map(np.array, zip(*events, strict=True))
    n = len(events)
    return {
        "runNumber": run.astype(np.int32),
        "eventNumber": number.astype(np.int32),
        "MSCW": rng.normal(0, 0.5, n),
        "MSCL": rng.normal(0, 0.5, n),
        "EChi2S": rng.exponential(1.0, n),
        "ErecS": energy * rng.lognormal(0, 0.15, n),
        "EmissionHeight": rng.normal(10, 2, n).astype(np.float32),
        "MCxoff": rng.normal(0, 0.3, n),
        "MCyoff": rng.normal(0, 0.3, n),
        "NImages": np.maximum(n_images, 3).astype(np.int32),
        "dES": energy * 0.15,
    }


def main(paths: list[Path]) -> None:
    """Write all files of aux/."""
    AUX.mkdir(exist_ok=True)
    columns = mock_mscw(paths)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "made_up.mscw.root"
        with uproot.recreate(root) as f:
            f.mktree(TREE, {name: values.dtype for name, values in columns.items()})
            f[TREE].extend(columns)
        for suffix, options in CONFIGURATIONS.items():
            settings = Settings(**options)
            (AUX / f"test_pytables{suffix}.config").write_text(as_text(settings))
            for kind in (".json", ".pkl"):
                counts = prepare([root], AUX / f"bins_cuts_dict{suffix}{kind}", settings)
            print(
                f"{suffix or '3 bins'}: {counts['passed']} of {counts['events']} "
                f"events pass; per bin: {counts['bins']}"
            )


if __name__ == "__main__":
    main([Path(p) for p in sys.argv[1:]])
