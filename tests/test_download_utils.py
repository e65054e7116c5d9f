"""Downloads from a local server: resumed, checked in size and content, whole or absent."""

import gzip
import io
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import utils
from utils import DataError

import numpy as np
import pytest
from astropy.io import fits

import download_utils as du


def fits_file(plateifu="8485-1901", checksum=True) -> bytes:
    """A file of 1 MB with the cards that the archive's files have."""
    data = np.frombuffer(np.random.default_rng(0).bytes(1_000_000), "u1")
    cards = fits.Header({"PLATEIFU": plateifu}) if plateifu else None
    hdus = fits.HDUList([fits.PrimaryHDU(header=cards), fits.ImageHDU(data, name="FLUX")])
    with io.BytesIO() as f:
        hdus.writeto(f, checksum=checksum)
        return f.getvalue()


PLAIN = fits_file(None)
CONTENT = gzip.compress(fits_file(), mtime=0)
HTML = b"<html>Please sign in</html>"


class Archive(BaseHTTPRequestHandler):
    """Serves `files`; can be slow, cut answers short (`cuts`), ignore ranges, or send nonsense."""

    files: dict[str, bytes] = {}  # noqa: RUF012
    cuts: list[int] = []  # noqa: RUF012
    ranges = True
    pause_s = 0.0
    busy: list[str] = []  # noqa: RUF012
    """Answer 503 with these Retry-After first."""
    length: str | None = None
    """Content-Length instead of the right one; "": none."""
    total = ""
    """Total size in an answer 416, instead of the right one."""
    step = 0
    """Bytes sent every 10 ms; 0: all at once."""
    log: list[tuple[str, str | None]] = []  # noqa: RUF012

    def do_GET(self):
        self.log.append((self.path, self.headers.get("Range")))
        time.sleep(self.pause_s)
        content = self.files.get(self.path)
        if content is None:
            return self.send_error(404)
        if self.busy:
            self.send_response(503)
            self.send_header("Retry-After", self.busy.pop())
            self.end_headers()
            return None
        asked, start = self.ranges and self.headers.get("Range"), 0
        if asked:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        rest, is_beyond = content[start:], start >= len(content) > 0
        self.send_response(416 if is_beyond else 206 if asked else 200)
        if is_beyond:
            self.send_header("Content-Range", f"bytes */{self.total or len(content)}")
        if self.length != "":
            self.send_header("Content-Length", self.length or str(len(rest)))
        self.end_headers()
        rest = rest[: self.cuts.pop()] if self.cuts else rest
        for i in range(0, len(rest), self.step or len(rest) or 1):
            self.wfile.write(rest[i : i + (self.step or len(rest))])
            self.wfile.flush()
            time.sleep(0.01 if self.step else 0)
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def archive():
    Archive.files, Archive.cuts, Archive.ranges, Archive.log = {}, [], True, []
    Archive.pause_s, Archive.busy, Archive.length = 0.0, [], None
    Archive.total, Archive.step = "", 0
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
    assert starts == [400_000, 700_000]


def test_interrupted_download_is_resumed_by_the_next_command(archive, tmp_path):
    archive.cuts = [70_000]
    path = tmp_path / "a.fits.gz"
    with pytest.raises(DataError, match="run the same command again"):
        du.fetch(url_of(archive), path, retries=0)
    assert not path.exists()
    du.fetch(url_of(archive), path, retries=0)
    assert path.read_bytes() == CONTENT
    assert archive.log[-1][1] == "bytes=70000-"


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
    assert [asked for _, asked in archive.log] == [None, *["bytes=70000-" for _ in cuts]]
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
        (b"", "empty file"), (CONTENT[:-9], "damaged"), (HTML, "expected to begin with SIMPLE"),
        (gzip.compress(HTML, mtime=0), "expected to begin with SIMPLE"),
        (None, "not in the archive"),
        (PLAIN[:-5760], "cut short inside FLUX"), (PLAIN[:500_000], "cut short inside FLUX"),
        (fits_file(checksum=False) + PLAIN[900_000:], "no header where one should be"),
        (PLAIN[:400_000] + PLAIN[500_000:600_000] + PLAIN[500_000:], "FLUX is damaged"),
        (fits_file("8485-1902"), "the server sent the file of 8485-1902, expected 8485-1901"),
    ],
    ids=itertools.count(),
)  # fmt: skip
def test_missing_or_damaged_file_is_requested_once_and_never_kept(
    archive, tmp_path, content, expected
):
    with pytest.raises(DataError, match=expected) as refused:
        du.fetch(url_of(archive, content), tmp_path / "manga-8485-1901-MAPS.fits.gz")
    assert "\n" not in str(refused.value)
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
    path = tmp_path / "raw" / "dapall-v3_1_1-3.1.0.fits"
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


@pytest.mark.parametrize("length", ["", "abc", "-5", "1e6"])
def test_a_content_length_that_is_none_does_not_matter(archive, tmp_path, length):
    archive.length = length
    assert du.fetch(url_of(archive), tmp_path / "a.fits.gz", retries=0) == len(CONTENT)


@pytest.mark.parametrize("total", ["*", "", "abc", "5"])
def test_a_part_that_the_server_knows_nothing_of_is_fetched_again(archive, tmp_path, total):
    archive.total, path = total, tmp_path / "a.fits.gz"
    (tmp_path / ".a.fits.gz.part").write_bytes(CONTENT + b"more")
    assert du.fetch(url_of(archive), path, retries=1, pause_s=0) == len(CONTENT)
    assert path.read_bytes() == CONTENT


def test_a_busy_server_is_left_alone_for_as_long_as_it_asks(archive, tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(du.time, "sleep", pauses.append)
    archive.busy = ["x", "9999999", "17"]  # used from the end
    du.fetch(url_of(archive), tmp_path / "a.fits.gz", pause_s=1)
    assert [p for p in pauses if p >= 1] == [17, du.MAX_PAUSE_S, 4]


def test_a_server_that_drips_counts_as_failed_and_is_resumed(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(du, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(du, "MIN_SPEED", 50_000)
    archive.step = 100  # 10 kB/s
    with pytest.raises(DataError, match=r"only \d+ bytes in [01] s.*resumes the download"):
        du.fetch(url_of(archive), tmp_path / "a.fits.gz", retries=1, pause_s=0)
    assert archive.log[0][1] is None
    assert archive.log[1][1] is not None
    archive.step = 0
    assert du.fetch(url_of(archive), tmp_path / "a.fits.gz", retries=0) == len(CONTENT)


@pytest.mark.parametrize("length", [None, ""])
def test_a_file_that_is_too_large_is_not_kept(archive, tmp_path, monkeypatch, length):
    monkeypatch.setattr(du, "MAX_SIZE", 500_000)
    archive.length = length
    with pytest.raises(DataError, match=r"GB, expected "):
        du.fetch(url_of(archive), tmp_path / "a.fits.gz", pause_s=0)
    assert len(archive.log) == 1
    assert not list(tmp_path.iterdir())
