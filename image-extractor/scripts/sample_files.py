"""Fetch the real simtel files of the demonstration and the tests, once.

Reads   the source distribution of eventio (MIT licence), which pip downloads (82 MB).
Writes  build/sample-files/: the files listed in FILES (37 MB), each with its checksum compared.

Does nothing if the files are there. Without a network one line says so, and the exit code is 1.

    python scripts/sample_files.py
"""

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from image_extractor.transaction import write_whole

FOLDER = Path(__file__).resolve().parents[1] / "build" / "sample-files"
REQUIREMENT = (
    "eventio==1.10.0 "
    "--hash=sha256:77ce08b5e6c84b2db73c8ed4faef15a56650d7fc9a71ee5fb3d5ab8d2b82fc10\n"
)
FILES = {  # SHA-256 of each
    "gamma_test.simtel.gz": "6f0c6dc0c84d854cb7ad92a5619ec02a1c34a1227277340c2a3bcf8e6ca933e3",
    "gamma_20deg_0deg_run102___cta-prod4-sst-1m_desert-2150m-Paranal-sst-1m.simtel.gz": (
        "50b24d120083e3c51067bc807a423a4b3c4abf8480ebb3fc0c06cbebc3dfd4c7"
    ),
    "calib_events.simtel.gz": "0554c5333bb6a1a23ef890e7c7c2ec4afcff8be318342e925dc0f71b9ebaf9b4",
    "camsettings_v6.simtel.zst": "83cb1ea018099365f1fbb41af977eff6d288acca7fb99829a76857e59e83b99f",
    "gamma_test_large_truncated.simtel.gz": (
        "a76357453074ff7909213a1acbbcb0167c4b1ab8000c638135b72d294f6e732f"
    ),
}


def is_whole(name: str) -> bool:
    """Whether a file is in FOLDER with the right content."""
    path = FOLDER / name
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == FILES[name]


def fetch() -> Path:
    """Make sure that FOLDER has all files, and return it.

    Raises
    ------
    OSError
        If pip cannot download them.
    """
    if all(map(is_whole, FILES)):
        return FOLDER
    print("downloading sample files: the source distribution of eventio 1.10.0 (82 MB)")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "wanted.txt").write_text(REQUIREMENT)
        words = "-m pip download --quiet --disable-pip-version-check --no-deps --require-hashes"
        options = ["--no-binary", "eventio", "--dest", name, "--requirement", name + "/wanted.txt"]
        done = subprocess.run(
            [sys.executable, *words.split(), *options], capture_output=True, text=True
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise OSError(
                f"the sample files could not be downloaded ({reason}). They are needed once; "
                "repeat the command with a network."
            )
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tarfile.open(next(folder.glob("eventio-*.tar.gz"))) as archive:
            for member in archive:
                path = Path(member.name)
                if path.parent.name == "resources" and path.name in FILES:
                    write_whole(FOLDER / path.name, archive.extractfile(member).read())
    damaged = [name for name in FILES if not is_whole(name)]
    if damaged:
        raise OSError(f"{', '.join(damaged)}: not as expected in eventio 1.10.0. Report this.")
    return FOLDER


if __name__ == "__main__":
    try:
        fetch()
    except OSError as error:
        sys.exit(str(error))
