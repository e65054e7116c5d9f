"""Fetch missing files of galaxies from the SDSS archive, resuming interrupted downloads.

Reads   the archive over HTTPS (public, no login), at the paths that sdss_access gives. Proxies
        ($HTTPS_PROXY) and ~/.netrc are respected.
Writes  raw/<plate>/<ifu>/manga-<plateifu>-{LOGCUBE,MAPS}-<daptype>.fits.gz; with --catalogue, and
        for --plate, --z and --n, raw/drpall-*.fits.

How much there is to fetch, and the free space, are said before. A file is downloaded as
.<name>.part in the same folder and renamed only after its size agrees with the server's, its
checksums (of gzip, CHECKSUM and DATASUM) are right, and its header names the galaxy. An interrupted
download resumes where it stopped, unless the file was replaced on the server. If several processes
need the same file, one fetches it and the others wait.

    python download_utils.py --plateifu 8485-1901 7443-12703
    python download_utils.py --galaxy-list galaxies.txt --jobs 4 --catalogue
    python download_utils.py --z 0.02 0.05 --n 100 --dry-run
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from email.utils import formatdate, parsedate_to_datetime
from functools import cache, partial
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
ASKED_FILES = 50
"""Most files whose size is asked for in advance; of more, the total is estimated from so many."""

FileKind = Literal["LOGCUBE", "MAPS", "DRPCUBE"]


@dataclass(frozen=True)
class Config(loops.GalaxyChoice):
    """Fetch missing files of galaxies from the SDSS archive."""

    plateifu: tuple[str, ...] = ()
    """Galaxies, e.g. 8485-1901."""
    plate: tuple[int, ...] = ()
    """Only galaxies of these plates; all of them, unless galaxies are named."""
    z: tuple[float, float] | None = None
    """Only galaxies between these redshifts of drpall; all of them, unless galaxies are named."""
    n: int | None = None
    """Only so many of the galaxies, chosen at random, always the same; fewer are part of more."""
    kinds: tuple[FileKind, ...] = ("MAPS", "LOGCUBE")
    """Files to fetch: the DAP's maps, the DAP's model cube, the DRP's cube."""
    daptype: str = DEFAULT_DAPTYPE
    """DAP analysis whose maps and model cube to fetch."""
    catalogue: bool = False
    """Also fetch the drpall catalogue (redshift, mangaid and quality of all galaxies)."""
    jobs: int = 2
    """Number of galaxies fetched at the same time; keep it small, the server is shared."""
    retries: int = 4
    """Number of further attempts after a failed connection, with growing pauses."""
    base_url: tuple[str, ...] = (ARCHIVE,)
    """Root URLs of the archive and of mirrors; each is tried if those before it fail."""
    dry_run: bool = False
    """Only list the URLs and paths of missing files, and their size. (For --plate, --z and --n the
    catalogue is fetched all the same.)"""
    overwrite: bool = False
    """Fetch existing files again."""


@cache
def _paths() -> Any:
    """Paths of the archive, by sdss_access."""
    os.environ.setdefault("SAS_BASE_DIR", tempfile.gettempdir())  # else it creates ~/sas
    before = logging.root.manager.disable
    logging.disable(max(before, logging.DEBUG))  # importing it logs
    from sdss_access.path import Path as SdssPath

    logging.disable(before)
    logging.getLogger("sdss_access").propagate = False  # its debug lines would fill our log
    return SdssPath(release=RELEASE)


def archive_path(kind: str, plateifu: str | None, daptype: str) -> str:
    """Path of a file in the archive, below its root.

    `kind` is a FileKind, or "drpall" for the catalogue, whose plateifu is None.
    """
    keys = {"drpver": DRP_VERSION, "dapver": DAP_VERSION, "wave": "LOG", "mode": kind}
    keys["daptype"] = daptype
    if plateifu:
        keys["plate"], keys["ifu"] = utils.split_plateifu(plateifu)
    name = {"drpall": "drpall", "DRPCUBE": "mangacube"}.get(kind, "mangadap")
    return _paths().location(name, **keys)


def wanted_files(root: Path, plateifu: str | None, config: Config) -> dict[Path, str]:
    """Files of a galaxy, and their paths in the archive; for plateifu None, of the catalogue."""
    folder = utils.raw_dir(root, plateifu) if plateifu else Path(root) / "raw"
    kinds: Sequence[str] = config.kinds if plateifu else ("drpall",)
    paths = [archive_path(kind, plateifu, config.daptype) for kind in kinds]
    return {folder / path.rpartition("/")[2]: path for path in paths}


def missing_files(root: Path, plateifu: str | None, config: Config) -> dict[Path, str]:
    """Leave out of `wanted_files` what is there and not empty; nothing with --overwrite."""
    return {
        file: path
        for file, path in wanted_files(root, plateifu, config).items()
        if config.overwrite or not file.is_file() or file.stat().st_size == 0
    }


def urls_of(path: str, base_urls: Sequence[str]) -> list[str]:
    """URLs of a path in the archive and in its mirrors."""
    return [f"{base.rstrip('/')}/{path}" for base in base_urls]


def choose_galaxies(root: Path, config: Config) -> list[str]:
    """Galaxies that are named, else all that have a redshift; of these, what the query leaves.

    For a query (--plate, --z, --n) the catalogue must be there.
    """
    named = bool(config.plateifu or config.galaxy_list)
    names = loops.chosen_galaxies(replace(config, shard=None), []) if named else []
    if config.plate or config.z or config.n is not None:
        from archive_files import catalogue_rows  # here: it needs astropy

        (catalogue,) = wanted_files(root, None, config)
        low, high = config.z or (-float("inf"), float("inf"))
        rows = catalogue_rows(catalogue)
        names = [
            name
            for name in names or sorted(rows)
            if (z := rows.get(name, {}).get("redshift")) is not None
            and low <= z <= high
            and (not config.plate or int(utils.split_plateifu(name)[0]) in config.plate)
        ]
        if not names:
            raise DataError(
                f"{catalogue}: lists no such galaxy with a redshift. Expected some for --plateifu, "
                "--galaxy-list, --plate and --z together; ask for less."
            )
        if config.n is not None:
            random.Random(0).shuffle(names)
            names = sorted(names[: config.n])
    return loops.shard_of(names, config.shard)


def fetch(urls: Sequence[str], path: Path, retries: int = 4, pause_s: float = 2.0) -> int:
    """Download one file, resuming an earlier download of it.

    `path` appears only when complete and checked. After a failed connection, up to `retries` more
    attempts are made, the first after `pause_s` seconds, a time that doubles for each of the next;
    then, or if the file is not there or damaged, the next of the URLs is tried. Returns the size of
    the whole file in bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    before = _inode(path)
    with _alone_with(part):
        if _inode(path) != before:  # another process fetched it while this one waited
            return path.stat().st_size
        for url in urls:
            try:
                _fetch_part(url, part, path.name, retries, pause_s)
                break
            except DataError as error:
                if url == urls[-1]:
                    raise
                log.warning(f"{error} Trying the next mirror.")
        os.utime(part)  # some clusters remove files by their age
        utils.flush(part)
        part.replace(path)
    return path.stat().st_size


def _fetch_part(url: str, part: Path, name: str, retries: int, pause_s: float) -> None:
    """Complete `part` from one URL, and check it; see `fetch`."""
    import requests

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
            log.info(f"{name}: {reason}; next attempt in {pause:g} s")
            time.sleep(pause)
    try:
        _check_content(part, name)
    except DataError:
        os.truncate(part, 0)
        raise


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
    """Append the missing bytes to `part`, whose time is that of the server's file (0: unknown)."""
    import requests

    have, stamp = part.stat().st_size, int(part.stat().st_mtime)
    headers = {"Accept-Encoding": "identity"}  # else a .gz may arrive unpacked
    if have:
        headers["Range"] = f"bytes={have}-"
        headers |= {"If-Range": formatdate(stamp, usegmt=True)} if stamp else {}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as answer:
        given = answer.headers.get("Content-Range", "")
        if answer.status_code == 416:  # the server has no bytes after those of `part`
            total = given.rpartition("/")[2]
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
        is_rest = answer.status_code == 206
        if is_rest and not given.startswith(f"bytes {have}-"):
            os.truncate(part, 0)
            raise requests.ConnectionError(f"the rest from {have} on was asked for, not {given}")
        length = answer.raw.length_remaining or 0  # None if the server does not say
        free = shutil.disk_usage(part.parent).free
        if length > min(free, MAX_SIZE):
            raise DataError(
                f"{url}: {length / 1e9:.2f} GB, expected at most {MAX_SIZE / 1e9:.2f}, and "
                f"{free / 1e9:.2f} GB are free. Check --base-url and the disk."
            )
        with part.open("ab" if is_rest else "wb") as f:
            _receive(answer, f, stamp if is_rest else _last_modified(answer))


def _last_modified(answer: Any) -> int:
    """Time of the server's file, seconds since 1970; 0 if it is unknown (RFC 9110, 8.8.2)."""
    try:
        return int(parsedate_to_datetime(answer.headers["Last-Modified"]).timestamp())
    except (KeyError, ValueError):
        return 0


def _receive(answer: Any, f: BinaryIO, stamp: int) -> None:
    """Write what the server sends, unless it is too slow, too much or less than it announced.

    The file always has the time `stamp`, by which the next attempt recognises its origin.
    """
    import requests
    import urllib3

    start, n, size = time.monotonic(), 0, f.tell()
    try:
        while block := answer.raw.read1(BLOCK):  # what is there; `read` would wait for all
            f.write(block)
            f.flush()
            os.utime(f.fileno(), (stamp, stamp))
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


def reachable(base_urls: Sequence[str]) -> tuple[str, ...]:
    """Leave out mirrors without a connection, once instead of for each file; one must be left."""
    import requests

    found, reason = [], ""
    for url in base_urls:
        try:
            requests.head(url, timeout=TIMEOUT_S)
            found.append(url)
        except requests.RequestException as error:
            reason = type(error).__name__
            log.debug("%s: no connection (%s)", url, reason)
    if not found:
        raise DataError(
            f"{', '.join(base_urls)}: no connection ({reason}), expected the archive. Check the "
            "network (on clusters, compute nodes often have none: use a login node) or --base-url."
        )
    return tuple(found)


def size_of(url: str) -> int | None:
    """Bytes of a file on the server; None if it does not say."""
    import requests

    headers = {"Accept-Encoding": "identity"}
    with contextlib.suppress(requests.RequestException):
        answer = requests.head(url, headers=headers, timeout=TIMEOUT_S, allow_redirects=True)
        length = answer.headers.get("Content-Length", "")
        return int(length) if answer.ok and length.isascii() and length.isdigit() else None
    return None


def announce(missing: dict[Path, str], root: Path, config: Config) -> None:
    """Log how many files and bytes are missing; a DataError if the disk has no space for them."""
    every = -(-len(missing) // ASKED_FILES)
    asked = [urls_of(path, config.base_url)[0] for path in list(missing.values())[::every]]
    with ThreadPoolExecutor(config.jobs) as pool:
        sizes = [size for size in pool.map(size_of, asked) if size is not None]
    total = sum(sizes) / max(len(sizes), 1) * len(missing)
    there = next(folder for folder in (root, *root.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    about = "" if len(sizes) == len(missing) else "about "
    size = f"{about}{total / 1e9:.2f} GB" if sizes else "of unknown size"
    log.info(
        f"{utils.counted(len(missing), 'file')} to fetch, {size}; {free / 1e9:.2f} GB are free"
    )
    if total > free:
        raise DataError(
            f"{root}: {total / 1e9:.2f} GB are to be fetched, but {free / 1e9:.2f} GB are free. "
            "Expected enough space; free some, ask for fewer galaxies (--n), or choose another "
            "--data-dir."
        )


def fetch_galaxy(plateifu: str | None, root: Path, config: Config) -> str:
    """Fetch a galaxy's missing files (None: the catalogue); return "fetched" or "complete"."""
    missing = missing_files(root, plateifu, config)
    for file, path in missing.items():
        size = fetch(urls_of(path, config.base_url), file, config.retries)
        log.info("%s: %.1f MB", file.name, size / 1e6)
    return "fetched" if missing else "complete"


def main(config: Config) -> int:
    """Fetch or list missing files; return the exit code."""
    root, galaxies = utils.data_dir(config.data_dir), list[str]()
    is_query = bool(config.plate or config.z or config.n is not None)
    if config.n is not None and config.n < 1:
        raise DataError(f"--n {config.n}: expected 1 or more galaxies.")
    if is_query:
        if missing_files(root, None, config):
            config = replace(config, base_url=reachable(config.base_url))
        fetch_galaxy(None, root, config)
    elif not (config.plateifu or config.galaxy_list or config.catalogue):
        raise DataError(
            "nothing to fetch. Give --plateifu, --galaxy-list, --plate, --z, --n or --catalogue."
        )
    if is_query or config.plateifu or config.galaxy_list:
        galaxies = choose_galaxies(root, config)
    wanted = [*([None] if config.catalogue and not is_query else []), *galaxies]
    missing = {f: path for name in wanted for f, path in missing_files(root, name, config).items()}
    if config.dry_run:
        for file, path in missing.items():
            print(urls_of(path, config.base_url)[0], file)
    if missing:
        config = replace(config, base_url=reachable(config.base_url))
        announce(missing, root, config)
    if config.dry_run:
        return utils.EXIT_DONE
    if None in wanted:
        fetch_galaxy(None, root, config)
    if not galaxies:
        return utils.EXIT_DONE
    work = partial(fetch_galaxy, root=root, config=config)
    failed_csv = loops.failed_path(root / "raw", config.shard)
    outcome = loops.for_each_galaxy(work, galaxies, "download", failed_csv, config.jobs)
    return loops.report(outcome, "download", root / "raw")


if __name__ == "__main__":
    utils.run_command(main, Config, __doc__)
