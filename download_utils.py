"""Fetch missing files of galaxies from the SDSS archive: resumable, size-checked.

Reads   the archive over HTTPS (public, no login); its paths come from sdss_access.
Writes  raw/<plate>/<ifu>/manga-<plateifu>-{LOGCUBE,MAPS}-<daptype>.fits.gz, and with --catalogue
        raw/dapall-*.fits.
A file is written beside its place as .<name>.part, its size compared with the server's and, if
gzipped, its checksum tested, and only then named. A stopped download goes on where it stopped; of
several processes that want the same file one fetches it and the others wait.

    python download_utils.py --plateifu 8485-1901 7443-12703
    python download_utils.py --galaxy-list galaxies.txt --jobs 4 --catalogue
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import loops
import utils
from utils import DataError

log = logging.getLogger(__name__)

RELEASE, DRP_VERSION, DAP_VERSION = "DR17", "v3_1_1", "3.1.0"
DEFAULT_DAPTYPE = "SPX-MILESHC-MASTARSSP"
ARCHIVE = "https://data.sdss.org/sas/"
BLOCK = 1 << 16
"""Bytes at a time; a broken connection loses at most one block."""
TIMEOUT_S = 60

FileKind = Literal["LOGCUBE", "MAPS", "DRPCUBE"]


@dataclass(frozen=True)
class Config(loops.GalaxyChoice):
    """Fetch missing files of galaxies from the SDSS archive."""

    plateifu: tuple[str, ...] = ()
    """Galaxies, e.g. 8485-1901."""
    kinds: tuple[FileKind, ...] = ("MAPS", "LOGCUBE")
    """Files to fetch: the DAP's maps, its model cube, the DRP's cube."""
    daptype: str = DEFAULT_DAPTYPE
    """DAP analysis."""
    catalogue: bool = False
    """Also fetch the dapall catalogue (redshifts, identities, quality of all galaxies)."""
    jobs: int = 2
    """Galaxies fetched at a time; please stay polite."""
    retries: int = 4
    """Further tries after a failed connection, with growing pauses."""
    base_url: str = ARCHIVE
    """Archive root, for mirrors."""
    dry_run: bool = False
    """Only list what is missing, with its URL."""
    overwrite: bool = False
    """Fetch again what is already there."""


def archive_url(kind: str, plateifu: str | None, daptype: str, base_url: str = ARCHIVE) -> str:
    """URL of a file in the archive.

    Parameters
    ----------
    kind : {"LOGCUBE", "MAPS", "DRPCUBE", "dapall"}
    plateifu : str or None
        None for the catalogue.
    daptype : str
    base_url : str
        Root that replaces the archive's.
    """
    from sdss_access.path import Path as SdssPath

    logging.getLogger("sdss_access").propagate = False  # its debug lines would fill our log
    versions = {"drpver": DRP_VERSION, "dapver": DAP_VERSION}
    paths = SdssPath(release=RELEASE)
    if kind == "dapall":
        location = paths.location("dapall", **versions)
    else:
        plate, ifu = utils.split_plateifu(str(plateifu))
        where = {**versions, "plate": plate, "ifu": ifu}
        if kind == "DRPCUBE":
            location = paths.location("mangacube", **where, wave="LOG")
        else:
            location = paths.location("mangadap", **where, mode=kind, daptype=daptype)
    return f"{base_url.rstrip('/')}/{location}"


def local_path(root: Path, url: str, plateifu: str | None) -> Path:
    """Place of an archive file in the data folder."""
    folder = utils.raw_dir(root, plateifu) if plateifu else Path(root) / "raw"
    return folder / url.rpartition("/")[2]


def missing_files(root: Path, plateifu: str | None, config: Config) -> list[tuple[str, Path]]:
    """URL and place of each file of a galaxy that is not there yet (or is empty).

    Without a galaxy: of the catalogue.
    """
    wanted = []
    for kind in config.kinds if plateifu else ("dapall",):
        url = archive_url(kind, plateifu, config.daptype, config.base_url)
        path = local_path(root, url, plateifu)
        if config.overwrite or not path.is_file() or path.stat().st_size == 0:
            wanted.append((url, path))
    return wanted


def fetch(url: str, path: Path, retries: int = 4, pause_s: float = 2.0) -> int:
    """Download one file, going on from an earlier part of it.

    Parameters
    ----------
    url : str
    path : Path
        Appears only when complete and checked.
    retries : int
        Further tries after a failed connection.
    pause_s : float
        Before the first of them; doubles each time.

    Returns
    -------
    int
        Bytes of the whole file.

    Raises
    ------
    DataError
        The server does not have the file, or what came is not what it said.
    """
    import requests

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    before = _inode(path)
    with _alone_with(part):
        if _inode(path) != before:  # another process fetched it while this one waited
            return path.stat().st_size
        for attempt in range(retries + 1):
            try:
                size = _fetch_rest(url, part)
                break
            except requests.RequestException as error:
                if attempt == retries:
                    raise DataError(
                        f"{url}: {error}. Run the same command again; it goes on where it stopped."
                    ) from None
                log.info("%s: %s; next try in %g s", path.name, error, pause_s * 2**attempt)
                time.sleep(pause_s * 2**attempt)
        try:
            _check_content(part, path.name)
        except DataError:
            part.unlink()
            raise
        utils.flush(part)
        part.replace(path)
    return size


@contextlib.contextmanager
def _alone_with(part: Path) -> Iterator[None]:
    """Hold the lock on a part file; other processes wait here. It does not stay if empty."""
    while True:
        with part.open("ab") as f:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(f, fcntl.LOCK_EX)
            if _inode(part) != os.fstat(f.fileno()).st_ino:
                continue  # named or removed by the process that this one waited for
            try:
                yield
            finally:
                if _inode(part) == os.fstat(f.fileno()).st_ino and part.stat().st_size == 0:
                    part.unlink()
            return


def _inode(path: Path) -> int | None:
    """Tell one file from another that takes its name; None if there is none."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _fetch_rest(url: str, part: Path) -> int:
    """Append to `part` what is missing of the file; return the file's size."""
    import requests

    have = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    headers["Accept-Encoding"] = "identity"  # a transparently unzipped .gz would change its size
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as answer:
        if answer.status_code == 416:  # nothing beyond what we have
            total = int(answer.headers.get("Content-Range", "*/-1").rpartition("/")[2])
            if total == have:
                return have
            os.truncate(part, 0)
            raise requests.ConnectionError(f"a part of {have} bytes, a file of {total}")
        if answer.status_code in (403, 404, 410):
            raise DataError(f"{url}: not in the archive (HTTP {answer.status_code}).")
        answer.raise_for_status()
        resumed = answer.status_code == 206
        length = answer.headers.get("Content-Length")
        expected = int(length) + (have if resumed else 0) if length else None
        with part.open("ab" if resumed else "wb") as f:
            for block in answer.iter_content(BLOCK):
                f.write(block)
    size = part.stat().st_size
    if expected is not None and size != expected:
        if size > expected:
            os.truncate(part, 0)
        raise requests.ConnectionError(f"{size} of {expected} bytes came")
    return size


def _check_content(path: Path, name: str) -> None:
    """Raise unless a downloaded file is not empty, and a .gz decompresses to its checksum."""
    from isal import igzip, isal_zlib

    if path.stat().st_size == 0:
        raise DataError(f"{name}: the server sent an empty file. Tell the archive's help desk.")
    if not name.endswith(".gz"):
        return
    try:
        with igzip.open(path) as f:
            while f.read(BLOCK):
                pass
    except (EOFError, OSError, isal_zlib.error) as error:  # type: ignore[misc]
        raise DataError(f"{name}: what came is damaged ({error}). Run again.") from None


def fetch_galaxy(plateifu: str, root: Path, config: Config) -> str:
    """Fetch a galaxy's missing files."""
    missing = missing_files(root, plateifu, config)
    for url, path in missing:
        size = fetch(url, path, config.retries)
        log.info("%s: %.1f MB", path.name, size / 1e6)
    return "fetched" if missing else "complete"


def main(config: Config) -> int:
    """Fetch, or list, what is missing."""
    root = utils.data_dir(config.data_dir)
    is_named = config.plateifu or config.galaxy_list
    if not is_named and not config.catalogue:
        raise DataError("nothing to fetch: give --plateifu, --galaxy-list or --catalogue.")
    names = loops.chosen_galaxies(config, []) if is_named else []
    catalogue = missing_files(root, None, config) if config.catalogue else []
    if config.dry_run:
        for url, path in itertools.chain(
            catalogue, *(missing_files(root, name, config) for name in names)
        ):
            print(url, path)
        return utils.EXIT_DONE
    for url, path in catalogue:
        log.info("%s: %.1f MB", path.name, fetch(url, path, config.retries) / 1e6)
    if not names:
        return utils.EXIT_DONE
    work = partial(fetch_galaxy, root=root, config=config)
    failed_csv = loops.failed_path(root / "raw", config.shard)
    outcome = loops.for_each_galaxy(work, names, "download", failed_csv, config.jobs)
    return loops.report(outcome, "download", root / "raw")


if __name__ == "__main__":
    utils.run_command(main, Config, __doc__)
