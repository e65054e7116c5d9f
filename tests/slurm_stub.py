"""Stands in for Python in a simulated plan: the loop over galaxies is real, its work takes 1 ms.

A galaxy named in <data-dir>/broken.txt fails. Every other command only says that it ran.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def process_galaxy(plateifu: str, root: Path, **_: object) -> str:
    from utils import DataError

    time.sleep(0.001)
    if plateifu in (root / "broken.txt").read_text().split():
        raise DataError(f"{plateifu}: broken on purpose. Mend it.")
    done = root / "done" / plateifu
    if done.exists():
        return "up to date"
    done.touch()
    return "written"


if __name__ == "__main__":
    sys.argv.pop(0)
    if sys.argv[0] == "cube_processing.py":
        import utils

        import slurm_stub

        import cube_processing
        import process_single_cube

        process_single_cube.process_galaxy = slurm_stub.process_galaxy  # type: ignore[assignment]
        utils.run_command(cube_processing.main, cube_processing.Config, "Stub.")
    print("stub:", *sys.argv)
