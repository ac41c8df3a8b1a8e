"""Named sets come whole and with the right checksum from a server of the test's own, or not at all."""

import hashlib
import http.server
import threading

import numpy as np
import pytest
from test_cli import command

from probae.data.datasets import downloads
from probae.data.datasets.downloads import DOWNLOADS, Download, Published
from probae.data.datasets.named import CORRELATIONS, SETS
from probae.datasets import download, load

ROWS = "\n".join(["rownames,Q1,Q2,Q3,Q4,Q5", *(f"{i},{i % 2},1,0,{i // 2 % 2},1" for i in range(1000))]).encode()
BITS = [np.random.default_rng(i).integers(0, 2, (4, 11)) for i in range(3)]
TEXTS = ["".join(",".join(map(str, row)) + "\n" for row in part).encode() for part in BITS]
CONTENT = {"/lsat7.csv": ROWS, "/cut": ROWS, **{f"/{i}.data": text for i, text in enumerate(TEXTS)}}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        content = CONTENT.get(self.path)
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if self.path == "/cut" else content)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def place(monkeypatch, url, total):
    monkeypatch.setitem(DOWNLOADS, "item_response/lsat7.csv", Download((Published(url, total),)))


def test_a_set_is_downloaded_once_and_is_read_then(server, tmp_path, monkeypatch):
    place(monkeypatch, f"{server}/lsat7.csv", sha256(ROWS))
    code, out, err = command("data", "lsat7", "--download", "--to", tmp_path / "new")
    assert code == 0, err
    assert f"export PROBAE_DATA={tmp_path}/new" in out
    assert load("lsat7", root=tmp_path / "new").train.shape == (600, 5)
    assert [path.name for path in (tmp_path / "new" / "item_response").iterdir()] == ["lsat7.csv"]
    place(monkeypatch, f"{server}/nowhere", "0")
    assert download("lsat7", root=tmp_path / "new") == (tmp_path / "new" / "item_response" / "lsat7.csv",)


def test_text_is_stored_as_bits(server, tmp_path, monkeypatch):
    urls = [f"{server}/{i}.data" for i in range(3)]
    monkeypatch.setitem(DOWNLOADS, "bits.npz", downloads._text_to_bits(urls, [sha256(text) for text in TEXTS], 11))
    found = np.load(downloads.fetch("bits.npz", tmp_path))
    for name, part in zip(("train", "valid", "test"), BITS, strict=True):
        assert np.array_equal(np.unpackbits(found[name], axis=1, count=11), part)


@pytest.mark.parametrize(
    ("path", "total", "message"),
    [
        ("/lsat7.csv", "0" * 64, "expected a file with the SHA-256 0000"),
        ("/nowhere", "0" * 64, "the server answered 404"),
        ("/cut", sha256(ROWS), "the connection was cut"),
        (None, sha256(ROWS), "is there a network"),
    ],
)
def test_what_does_not_come_whole_is_one_line_and_leaves_no_file(path, total, message, server, tmp_path, monkeypatch):
    place(monkeypatch, "http://127.0.0.1:9/lsat7.csv" if path is None else server + path, total)
    code, out, err = command("data", "lsat7", "--download", "--to", tmp_path / "new")
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written_to_is_one_line(server, tmp_path, monkeypatch):
    place(monkeypatch, f"{server}/lsat7.csv", sha256(ROWS))
    (tmp_path / "file").touch()
    code, _, err = command("data", "lsat7", "--download", "--to", tmp_path / "file" / "new")
    assert code == 2
    assert "cannot write there" in err.splitlines()[-1]


def test_a_set_that_cannot_be_fetched_says_where_it_is_from(tmp_path):
    code, _, err = command("data", "holzinger_swineford", "--download", "--to", tmp_path)
    assert code == 2
    assert "not published in a form that can be fetched" in err
    assert "lavaan" in err


def test_the_error_for_a_missing_set_names_the_command_that_downloads_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="probae data nltcs --download"):
        load("nltcs", root=tmp_path)


def test_every_address_is_fixed_to_a_commit_or_an_archive_and_every_file_belongs_to_a_set():
    files = {file for entry in (*SETS.values(), *CORRELATIONS.values()) for file in entry.files}
    assert set(DOWNLOADS) <= files
    assert files - set(DOWNLOADS) == {"psychometrics/HolzingerSwineford1939.csv", "bsds300/bsds300_grey.npz"}
    for source in DOWNLOADS.values():
        for published in source.published:
            commit = any(len(part) == 40 for part in published.url.split("/"))
            assert commit or published.url.startswith("https://ossci-datasets.s3.amazonaws.com/mnist/")
            assert len(bytes.fromhex(published.sha256)) == 32
