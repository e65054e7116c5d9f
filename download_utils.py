"""Fetch missing files of galaxies from the SDSS archive, resuming interrupted downloads.

Reads   the archive over HTTPS (public, no login), at the paths that sdss_access gives.
Writes  raw/<plate>/<ifu>/manga-<plateifu>-{LOGCUBE,MAPS}-<daptype>.fits.gz, and with --catalogue
        raw/dapall-*.fits.

A file is downloaded as .<name>.part in the same folder and renamed only after its size agrees with
the server's, its checksums (of gzip, CHECKSUM and DATASUM) are right, and its header names the
galaxy. An interrupted download resumes where it stopped. If several processes need the same file,
one fetches it and the others wait.

    python download_utils.py --plateifu 8485-1901 7443-12703
    python download_utils.py --galaxy-list galaxies.txt --jobs 4 --catalogue
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal
from urllib.parse import urlsplit

import utils
from utils import DataError

import loops

log = logging.getLogger(__name__)

RELEASE, DRP_VERSION, DAP_VERSION = "DR17", "v3_1_1", "3.1.0"
DEFAULT_DAPTYPE = "SPX-MILESHC-MASTARSSP"
ARCHIVE = "https://data.sdss.org/sas/"
BLOCK = 1 << 16
"""Most bytes received at a time."""
TIMEOUT_S = 60
"""Seconds without an answer from the server after which a connection counts as failed."""
MIN_SPEED = 1000
"""Bytes/s, on average over TIMEOUT_S, below which a connection counts as failed."""
MAX_PAUSE_S = 600
"""Longest pause that a server's Retry-After is granted."""
MAX_SIZE = 2 << 30
"""Bytes of the largest file that is accepted; the largest of DR17 has 190 MB."""

FileKind = Literal["LOGCUBE", "MAPS", "DRPCUBE"]


@dataclass(frozen=True)
class Config(loops.GalaxyChoice):
    """Fetch missing files of galaxies from the SDSS archive."""

    plateifu: tuple[str, ...] = ()
    """Galaxies, e.g. 8485-1901."""
    kinds: tuple[FileKind, ...] = ("MAPS", "LOGCUBE")
    """Files to fetch: the DAP's maps, the DAP's model cube, the DRP's cube."""
    daptype: str = DEFAULT_DAPTYPE
    """DAP analysis whose maps and model cube to fetch."""
    catalogue: bool = False
    """Also fetch the dapall catalogue (redshift, mangaid and quality of all galaxies)."""
    jobs: int = 2
    """Number of galaxies fetched at the same time; keep it small, the server is shared."""
    retries: int = 4
    """Number of further attempts after a failed connection, with growing pauses."""
    base_url: str = ARCHIVE
    """Root URL of the archive; change it to use a mirror."""
    dry_run: bool = False
    """Only list the URLs and paths of missing files."""
    overwrite: bool = False
    """Fetch existing files again."""


def archive_url(kind: str, plateifu: str | None, daptype: str, base_url: str = ARCHIVE) -> str:
    """URL of a file in the archive, or in a mirror of it.

    `kind` is a FileKind, or "dapall" for the catalogue, whose plateifu is None.
    """
    os.environ.setdefault("SAS_BASE_DIR", tempfile.gettempdir())  # else it creates ~/sas
    before = logging.root.manager.disable
    logging.disable(max(before, logging.DEBUG))  # importing it logs
    from sdss_access.path import Path as SdssPath

    logging.disable(before)
    logging.getLogger("sdss_access").propagate = False  # its debug lines would fill our log
    keys = {"drpver": DRP_VERSION, "dapver": DAP_VERSION, "wave": "LOG", "mode": kind}
    keys["daptype"] = daptype
    if plateifu:
        keys["plate"], keys["ifu"] = utils.split_plateifu(plateifu)
    name = {"dapall": "dapall", "DRPCUBE": "mangacube"}.get(kind, "mangadap")
    return f"{base_url.rstrip('/')}/{SdssPath(release=RELEASE).location(name, **keys)}"


def missing_files(root: Path, plateifu: str | None, config: Config) -> list[tuple[str, Path]]:
    """URL and path of each file of a galaxy that is missing or empty.

    For plateifu None: of the catalogue. With --overwrite existing files count as missing.
    """
    wanted, folder = [], utils.raw_dir(root, plateifu) if plateifu else Path(root) / "raw"
    for kind in config.kinds if plateifu else ("dapall",):
        url = archive_url(kind, plateifu, config.daptype, config.base_url)
        path = folder / url.rpartition("/")[2]
        if config.overwrite or not path.is_file() or path.stat().st_size == 0:
            wanted.append((url, path))
    return wanted


def fetch(url: str, path: Path, retries: int = 4, pause_s: float = 2.0) -> int:
    """Download one file, resuming an earlier download of it.

    `path` appears only when complete and checked. After a failed connection, up to `retries` more
    attempts are made, the first after `pause_s` seconds, a time that doubles for each of the next.
    Returns the size of the whole file in bytes.
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
                _fetch_rest(url, part)
                break
            except requests.RequestException as error:
                is_ours = error.args and isinstance(error.args[0], str)  # else a nest of errors
                host = urlsplit(url).netloc
                reason = error if is_ours else f"no connection to {host} ({type(error).__name__})"
                if attempt == retries:
                    raise DataError(
                        f"{url}: {reason}, expected the file. Check the network (compute nodes "
                        "often have none) and run the same command again; it resumes the download."
                    ) from None
                pause = max(pause_s * 2**attempt, _asked_pause(error))
                log.info(f"{path.name}: {reason}; next attempt in {pause:g} s")
                time.sleep(pause)
        try:
            _check_content(part, path.name)
        except DataError:
            part.unlink()
            raise
        utils.flush(part)
        part.replace(path)
    return path.stat().st_size


def _asked_pause(error: Any) -> float:
    """Seconds that the server asks to wait, 0 if it does not say (RFC 9110, section 10.2.3)."""
    asked = error.response.headers.get("Retry-After", "") if error.response is not None else ""
    return min(float(asked), MAX_PAUSE_S) if asked.isascii() and asked.isdigit() else 0.0


@contextlib.contextmanager
def _alone_with(part: Path) -> Iterator[None]:
    """Hold the lock on a part file, for which other processes wait; remove the file if empty."""
    while True:
        with part.open("ab") as f:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(f, fcntl.LOCK_EX)
            if _inode(part) != os.fstat(f.fileno()).st_ino:
                continue  # renamed or removed by the process that this one waited for
            try:
                yield
            finally:
                if _inode(part) == os.fstat(f.fileno()).st_ino and part.stat().st_size == 0:
                    part.unlink()
            return


def _inode(path: Path) -> int | None:
    """Inode of a file, which changes when another file takes its name; None without a file."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _fetch_rest(url: str, part: Path) -> None:
    """Append the missing bytes to `part`."""
    import requests

    have = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    headers["Accept-Encoding"] = "identity"  # else a .gz may arrive unpacked
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as answer:
        if answer.status_code == 416:  # the server has no bytes after those of `part`
            total = answer.headers.get("Content-Range", "").rpartition("/")[2]
            if total == str(have):
                return
            os.truncate(part, 0)
            raise requests.ConnectionError(f"{have} bytes were received of a file of {total}")
        if answer.status_code in (403, 404, 410):
            raise DataError(
                f"{url}: not in the archive (HTTP {answer.status_code}). Expected a galaxy and "
                f"analysis of {RELEASE}; check --plateifu and --daptype."
            )
        answer.raise_for_status()
        length = answer.raw.length_remaining or 0  # None if the server does not say
        free = shutil.disk_usage(part.parent).free
        if length > min(free, MAX_SIZE):
            raise DataError(
                f"{url}: {length / 1e9:.2f} GB, expected at most {MAX_SIZE / 1e9:.2f}, and "
                f"{free / 1e9:.2f} GB are free. Check --base-url and the disk."
            )
        with part.open("ab" if answer.status_code == 206 else "wb") as f:
            _receive(answer, f)


def _receive(answer: Any, f: BinaryIO) -> None:
    """Write what the server sends, unless it is too slow, too much or less than it announced."""
    import requests
    import urllib3

    start, n, size = time.monotonic(), 0, f.tell()
    try:
        while block := answer.raw.read1(BLOCK):  # what is there; `read` would wait for all
            f.write(block)
            n, size = n + len(block), size + len(block)
            if size > MAX_SIZE:
                f.truncate(0)
                raise DataError(
                    f"{answer.url}: more than {MAX_SIZE / 1e9:.2f} GB, expected a file of a "
                    "galaxy. Check --base-url."
                )
            now = time.monotonic()
            if now - start > TIMEOUT_S:
                if n < MIN_SPEED * (now - start):
                    raise requests.ConnectionError(f"only {n} bytes in {now - start:.0f} s")
                start, n = now, 0
    except urllib3.exceptions.HTTPError:
        raise requests.ConnectionError(f"the connection broke after {size} bytes") from None


def _check_content(path: Path, name: str) -> None:
    """Raise a DataError unless a downloaded file is whole, and of the galaxy of its name."""
    import fits_stream  # here: it needs astropy

    if path.stat().st_size == 0:
        raise DataError(
            f"{name}: the server sent an empty file, expected a FITS file. Try again later; if "
            "it stays empty, report it to the archive's help desk."
        )
    try:
        header = fits_stream.check_whole(path)
    except DataError as error:
        reason = str(error).removeprefix(f"{path}: ").removesuffix(fits_stream.FETCH_AGAIN).strip()
        raise DataError(
            f"{name}: the received file is damaged, or no FITS file: {reason} Run the same command "
            "again; if that does not help, the server or a proxy sends something else."
        ) from None
    wanted, found = utils.PLATEIFU.search(name), str(header.get("PLATEIFU", "")).strip()
    if wanted and found not in ("", wanted[0]):
        raise DataError(
            f"{name}: the server sent the file of {found}, expected {wanted[0]}. Try again later, "
            "or report it to the archive's help desk."
        )


def check_connection(base_url: str) -> None:
    """Raise a DataError if the archive cannot be reached, once instead of for each galaxy."""
    import requests

    try:
        requests.head(base_url, timeout=TIMEOUT_S)
    except requests.RequestException as error:
        raise DataError(
            f"{base_url}: no connection ({type(error).__name__}), expected the archive. Check the "
            "network (on clusters, compute nodes often have none: use a login node) or --base-url."
        ) from None


def fetch_galaxy(plateifu: str | None, root: Path, config: Config) -> str:
    """Fetch a galaxy's missing files (None: the catalogue); return "fetched" or "complete"."""
    missing = missing_files(root, plateifu, config)
    for url, path in missing:
        log.info("%s: %.1f MB", path.name, fetch(url, path, config.retries) / 1e6)
    return "fetched" if missing else "complete"


def main(config: Config) -> int:
    """Fetch or list missing files; return the exit code."""
    root = utils.data_dir(config.data_dir)
    is_named = config.plateifu or config.galaxy_list
    if not is_named and not config.catalogue:
        raise DataError("nothing to fetch. Give --plateifu, --galaxy-list or --catalogue.")
    names = loops.chosen_galaxies(config, []) if is_named else []
    wanted = [*([None] if config.catalogue else []), *names]
    if config.dry_run:
        for name in wanted:
            for url, path in missing_files(root, name, config):
                print(url, path)
        return utils.EXIT_DONE
    if any(missing_files(root, name, config) for name in wanted):
        check_connection(config.base_url)
    if config.catalogue:
        fetch_galaxy(None, root, config)
    if not names:
        return utils.EXIT_DONE
    work = partial(fetch_galaxy, root=root, config=config)
    failed_csv = loops.failed_path(root / "raw", config.shard)
    outcome = loops.for_each_galaxy(work, names, "download", failed_csv, config.jobs)
    return loops.report(outcome, "download", root / "raw")


if __name__ == "__main__":
    utils.run_command(main, Config, __doc__)
