"""Downloads from a local server: resumed, checked in size and content, whole or absent."""

import gzip
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import utils
from utils import DataError

import numpy as np
import pytest

import download_utils as du

CONTENT = gzip.compress(np.random.default_rng(0).bytes(1_000_000))


class Archive(BaseHTTPRequestHandler):
    """Serves `files`; can be slow, cut answers short (`cuts`) or ignore ranges."""

    files: dict[str, bytes] = {}  # noqa: RUF012
    cuts: list[int] = []  # noqa: RUF012
    ranges = True
    pause_s = 0.0
    log: list[tuple[str, str | None]] = []  # noqa: RUF012

    def do_GET(self):
        self.log.append((self.path, self.headers.get("Range")))
        time.sleep(self.pause_s)
        content = self.files.get(self.path)
        if content is None:
            return self.send_error(404)
        asked, start = self.ranges and self.headers.get("Range"), 0
        if asked:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        rest, is_beyond = content[start:], start >= len(content) > 0
        self.send_response(416 if is_beyond else 206 if asked else 200)
        if is_beyond:
            self.send_header("Content-Range", f"bytes */{len(content)}")
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: self.cuts.pop()] if self.cuts else rest)
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def archive():
    Archive.files, Archive.cuts, Archive.ranges, Archive.log = {}, [], True, []
    Archive.pause_s = 0.0
    with ThreadingHTTPServer(("127.0.0.1", 0), Archive) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        Archive.base = f"http://127.0.0.1:{server.server_port}/sas"
        yield Archive
        server.shutdown()


def url_of(archive, content=CONTENT, url=None):
    """URL from which the archive now serves the content."""
    url = url or f"{archive.base}/a.fits.gz"
    archive.files["/sas" + url.removeprefix(archive.base)] = content
    return url


def test_urls_are_those_of_the_archive():
    base, daptype = "https://data.sdss.org/sas/dr17/manga/spectro", du.DEFAULT_DAPTYPE
    analysis = f"{base}/analysis/v3_1_1/3.1.0"
    logcube = f"{analysis}/{daptype}/8485/1901/manga-8485-1901-LOGCUBE-{daptype}.fits.gz"
    drp = f"{base}/redux/v3_1_1/8485/stack/manga-8485-1901-LOGCUBE.fits.gz"
    assert du.archive_url("LOGCUBE", "8485-1901", daptype) == logcube
    assert du.archive_url("DRPCUBE", "8485-1901", daptype) == drp
    assert du.archive_url("dapall", None, daptype) == f"{analysis}/dapall-v3_1_1-3.1.0.fits"


def test_broken_connection_is_resumed_where_it_stopped(archive, tmp_path):
    archive.cuts = [300_000, 400_000]  # used from the end
    path = tmp_path / "a.fits.gz"
    du.fetch(url_of(archive), path, pause_s=0)
    assert path.read_bytes() == CONTENT
    starts = [int(r.removeprefix("bytes=")[:-1]) for _, r in archive.log[1:]]
    assert archive.log[0][1] is None
    assert 400_000 - du.BLOCK <= starts[0] <= 400_000
    assert 700_000 - 2 * du.BLOCK <= starts[1] <= 700_000


def test_interrupted_download_is_resumed_by_the_next_command(archive, tmp_path):
    archive.cuts = [70_000]
    path = tmp_path / "a.fits.gz"
    with pytest.raises(DataError, match="run the same command again"):
        du.fetch(url_of(archive), path, retries=0)
    assert not path.exists()
    du.fetch(url_of(archive), path, retries=0)
    assert path.read_bytes() == CONTENT
    assert archive.log[-1][1] == "bytes=65536-"


@pytest.mark.parametrize("cuts", [[], [70_000]])
def test_a_file_needed_by_several_processes_is_fetched_once_and_resumed_by_those_who_wait(
    archive, tmp_path, cuts
):
    archive.pause_s, archive.cuts = 0.5, [*cuts]
    url, path = url_of(archive), tmp_path / "a.fits.gz"
    if not cuts:
        path.write_bytes(b"old")  # as with --overwrite

    def fetch(_):
        try:
            return du.fetch(url, path, retries=0)
        except DataError:
            return 0

    with ThreadPoolExecutor(3) as pool:
        sizes = sorted(pool.map(fetch, range(3)))
    assert sizes == [0 if cuts else len(CONTENT), len(CONTENT), len(CONTENT)]
    assert path.read_bytes() == CONTENT
    assert [asked for _, asked in archive.log] == [None, *["bytes=65536-" for _ in cuts]]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("part", "cuts", "ranges"),
    [
        (None, [], True),
        (None, [70_000], False),  # a server without ranges: from the beginning
        (CONTENT, [], True),
        (CONTENT + b"more", [], True),
    ],
)
def test_whole_file_arrives_whatever_there_is_of_it(archive, tmp_path, part, cuts, ranges):
    archive.cuts, archive.ranges = cuts, ranges
    path = tmp_path / "deep" / "a.fits.gz"
    path.parent.mkdir()
    if part:
        (path.parent / ".a.fits.gz.part").write_bytes(part)
    assert du.fetch(url_of(archive), path, pause_s=0) == len(CONTENT)
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty file"), (CONTENT[:-9], "damaged"), (b"<html>", "damaged"),
        (None, "not in the archive"),
    ],
)  # fmt: skip
def test_missing_or_damaged_file_is_requested_once_and_never_kept(
    archive, tmp_path, content, expected
):
    with pytest.raises(DataError, match=expected):
        du.fetch(url_of(archive, content), tmp_path / "a.fits.gz")
    assert len(archive.log) == 1
    assert list(tmp_path.iterdir()) == []


def test_command_fetches_missing_files_and_continues_after_failures(archive, tmp_path):
    one, config = "8485-1901", du.Config(data_dir=tmp_path, base_url=archive.base, jobs=1)
    for kind in ("MAPS", "LOGCUBE"):
        url_of(archive, url=du.archive_url(kind, one, config.daptype, archive.base))
    empty = utils.raw_dir(tmp_path, one) / f"manga-{one}-MAPS-{config.daptype}.fits.gz"
    empty.parent.mkdir(parents=True)
    empty.touch()  # zero bytes count as missing
    assert du.main(replace(config, plateifu=(one, "7443-12703"))) == 1
    for kind in ("MAPS", "LOGCUBE"):
        assert utils.find_raw(tmp_path, one, kind).read_bytes() == CONTENT
    assert "7443-12703" in (tmp_path / "raw" / "failed.csv").read_text()
    archive.log.clear()
    assert du.main(replace(config, plateifu=(one,))) == 0
    assert archive.log == []


def test_dry_run_lists_missing_files_among_them_an_empty_catalogue(archive, tmp_path, capsys):
    config = du.Config(catalogue=True, data_dir=tmp_path, base_url=archive.base)
    url = url_of(archive, url=du.archive_url("dapall", None, config.daptype, archive.base))
    path = du.local_path(tmp_path, url, None)
    path.parent.mkdir(parents=True)
    path.touch()
    for printed in (f"{url} {path}\n", ""):
        assert du.main(replace(config, dry_run=True)) == 0
        assert capsys.readouterr().out == printed
        assert du.main(config) == 0
        assert path.read_bytes() == CONTENT


def test_command_without_a_galaxy_is_refused(tmp_path):
    with pytest.raises(DataError, match="nothing to fetch"):
        du.main(du.Config(data_dir=tmp_path))
