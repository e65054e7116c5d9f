"""Downloads from a local server: resumed, checked in size and content, whole or absent."""

import gzip
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

import download_utils as du
import utils
from utils import DataError

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
            self.send_error(404)
            return
        asked, start = self.headers.get("Range"), 0
        if asked and self.ranges:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
        rest = content[start:]
        self.send_response(206 if asked and self.ranges else 200)
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
    server = ThreadingHTTPServer(("127.0.0.1", 0), Archive)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    Archive.base = f"http://127.0.0.1:{server.server_port}/sas"
    yield Archive
    server.shutdown()
    server.server_close()


def serve(archive, url, content=CONTENT):
    archive.files["/sas" + url.removeprefix(archive.base)] = content
    return url


def url_of(archive, content=CONTENT):
    return serve(archive, f"{archive.base}/a.fits.gz", content)


def test_urls_are_those_of_the_archive():
    base = "https://data.sdss.org/sas/dr17/manga/spectro"
    daptype = du.DEFAULT_DAPTYPE
    assert du.archive_url("LOGCUBE", "8485-1901", daptype) == (
        f"{base}/analysis/v3_1_1/3.1.0/{daptype}/8485/1901/"
        f"manga-8485-1901-LOGCUBE-{daptype}.fits.gz"
    )
    assert du.archive_url("DRPCUBE", "8485-1901", daptype) == (
        f"{base}/redux/v3_1_1/8485/stack/manga-8485-1901-LOGCUBE.fits.gz"
    )
    assert du.archive_url("dapall", None, daptype) == (
        f"{base}/analysis/v3_1_1/3.1.0/dapall-v3_1_1-3.1.0.fits"
    )


def test_whole_file_arrives(archive, tmp_path):
    path = tmp_path / "deep" / "a.fits.gz"
    assert du.fetch(url_of(archive), path) == len(CONTENT)
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]


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
    with pytest.raises(DataError, match="Run the same command again"):
        du.fetch(url_of(archive), path, retries=0)
    assert not path.exists()
    du.fetch(url_of(archive), path, retries=0)
    assert path.read_bytes() == CONTENT
    assert archive.log[-1][1] == "bytes=65536-"


@pytest.mark.parametrize("is_there", [False, True])
def test_a_file_needed_by_several_processes_is_fetched_once(archive, tmp_path, is_there):
    archive.pause_s = 0.5
    url, path = url_of(archive), tmp_path / "a.fits.gz"
    if is_there:
        path.write_bytes(b"old")  # as with --overwrite
    with ThreadPoolExecutor(3) as pool:
        sizes = list(pool.map(lambda _: du.fetch(url, path, retries=0), range(3)))
    assert sizes == [len(CONTENT)] * 3
    assert path.read_bytes() == CONTENT
    assert len(archive.log) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_waiting_processes_resume_a_download_that_failed_elsewhere(archive, tmp_path):
    archive.pause_s, archive.cuts = 0.5, [70_000]
    url, path = url_of(archive), tmp_path / "a.fits.gz"

    def fetch(_):
        try:
            return du.fetch(url, path, retries=0)
        except DataError:
            return "failed"

    with ThreadPoolExecutor(3) as pool:
        assert sorted(map(str, pool.map(fetch, range(3)))) == [str(len(CONTENT))] * 2 + ["failed"]
    assert path.read_bytes() == CONTENT
    assert [asked for _, asked in archive.log] == [None, "bytes=65536-"]


def test_server_without_ranges_starts_over(archive, tmp_path):
    archive.cuts, archive.ranges = [70_000], False
    path = tmp_path / "a.fits.gz"
    du.fetch(url_of(archive), path, pause_s=0)
    assert path.read_bytes() == CONTENT


def test_complete_part_needs_no_bytes(archive, tmp_path):
    path = tmp_path / "a.fits.gz"
    (tmp_path / ".a.fits.gz.part").write_bytes(CONTENT)
    du.fetch(url_of(archive), path)
    assert path.read_bytes() == CONTENT


def test_part_longer_than_the_file_is_discarded(archive, tmp_path):
    path = tmp_path / "a.fits.gz"
    (tmp_path / ".a.fits.gz.part").write_bytes(CONTENT + b"more")
    du.fetch(url_of(archive), path, pause_s=0)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", "empty file"), (CONTENT[:-9], "damaged"), (b"<html>", "damaged")],
)
def test_empty_or_damaged_content_is_never_renamed(archive, tmp_path, content, expected):
    with pytest.raises(DataError, match=expected):
        du.fetch(url_of(archive, content), tmp_path / "a.fits.gz")
    assert list(tmp_path.iterdir()) == []


def test_missing_file_is_requested_only_once(archive, tmp_path):
    with pytest.raises(DataError, match="not in the archive"):
        du.fetch(f"{archive.base}/b.fits.gz", tmp_path / "b.fits.gz")
    assert len(archive.log) == 1
    assert list(tmp_path.iterdir()) == []


def test_command_fetches_missing_files_and_continues_after_failures(archive, tmp_path):
    config = du.Config(
        plateifu=("8485-1901", "7443-12703"), data_dir=tmp_path, base_url=archive.base, jobs=1
    )
    for kind in ("MAPS", "LOGCUBE"):
        serve(archive, du.archive_url(kind, "8485-1901", config.daptype, archive.base))
    empty = utils.raw_dir(tmp_path, "8485-1901") / f"manga-8485-1901-MAPS-{config.daptype}.fits.gz"
    empty.parent.mkdir(parents=True)
    empty.touch()  # zero bytes count as missing
    assert du.main(config) == 1
    assert empty.read_bytes() == CONTENT
    assert utils.find_raw(tmp_path, "8485-1901", "LOGCUBE").read_bytes() == CONTENT
    assert "7443-12703" in (tmp_path / "raw" / "failed.csv").read_text()
    archive.log.clear()
    assert du.main(replace(config, plateifu=("8485-1901",))) == 0
    assert archive.log == []


def test_dry_run_lists_missing_files_among_them_an_empty_catalogue(archive, tmp_path, capsys):
    config = du.Config(catalogue=True, data_dir=tmp_path, base_url=archive.base, dry_run=True)
    url = du.archive_url("dapall", None, config.daptype, archive.base)
    serve(archive, url)
    path = du.local_path(tmp_path, url, None)
    path.parent.mkdir(parents=True)
    path.touch()
    assert du.main(config) == 0
    assert capsys.readouterr().out == f"{url} {path}\n"
    assert du.main(replace(config, dry_run=False)) == 0
    assert path.read_bytes() == CONTENT
    assert du.main(config) == 0
    assert capsys.readouterr().out == ""


def test_command_without_a_galaxy_is_refused(tmp_path):
    with pytest.raises(DataError, match="nothing to fetch"):
        du.main(du.Config(data_dir=tmp_path))
