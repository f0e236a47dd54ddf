"""Downloads, from a server on 127.0.0.1 that cuts connections, lies and refuses."""

import base64
import hashlib
import http.server
import json
import os
import shutil
import threading
import urllib.parse
from types import SimpleNamespace

import pytest

from rt_scratch.data import cifar10, download, enwik8, fetch, pg19
from rt_scratch.data import wikitext103 as wikitext
from rt_scratch.data.download import Source, get
from rt_scratch.errors import UserError

CONTENT = bytes(range(256)) * 400  # 102,400 bytes, every position tells


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        path, _, query = self.path.partition("?")
        wanted = self.headers.get("Range")
        server.requests.append((path, wanted))
        behave = server.behaviour.pop(0) if server.behaviour else {}
        if behave.get("hang_up"):
            self.close_connection = True
            return
        content = server.files.get(path)
        if callable(content):
            content = content(dict(urllib.parse.parse_qsl(query)))
        if status := behave.get("status") or (404 if content is None else None):
            self.send_error(status)
            return
        first = 0
        if wanted and server.ranges:
            first = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if first >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        body = content[first:]
        if not behave.get("no_length"):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: behave.get("cut", len(body))])
        self.close_connection = True

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 32  # several connections at once, none told to come back in a second


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, "WAIT", 0.001)
    monkeypatch.setattr(download, "CHUNK", 1000)
    with Server(("127.0.0.1", 0), Handler) as s:
        s.files, s.behaviour, s.requests, s.ranges = {"/file": CONTENT}, [], [], True
        s.url = f"http://127.0.0.1:{s.server_address[1]}"
        threading.Thread(target=s.serve_forever, args=(0.01,), daemon=True).start()
        yield s
        s.shutdown()


def source(server, path="/file", content=CONTENT, algorithm="sha256", **change):
    digest = f"{algorithm}:{hashlib.new(algorithm, content).hexdigest()}"
    return Source("file", (server.url + path,), len(content), digest)._replace(**change)


def test_plain_download_says_the_size_first(server, tmp_path, capsys):
    path = download.fetch(source(server), tmp_path / "new" / "folder")
    assert path.read_bytes() == CONTENT
    assert os.listdir(path.parent) == ["file"]
    assert "downloading 0.1 MB" in capsys.readouterr().err
    assert download.fetch(source(server), path.parent) == path
    assert len(server.requests) == 1  # the second time it is there and right
    assert "already here and right" in capsys.readouterr().err


@pytest.mark.parametrize("known", [dict(), dict(size=None), dict(digest=None),
                                   dict(size=None, digest=None)])
@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_cut_connections_are_resumed(server, tmp_path, known, algorithm):
    server.behaviour = [{"cut": 30_000}, {"hang_up": True}, {"cut": 5_000}, {"status": 503}]
    path = download.fetch(source(server, algorithm=algorithm, **known), tmp_path)
    assert path.read_bytes() == CONTENT
    assert os.listdir(tmp_path) == ["file"]
    assert [r for _, r in server.requests] == [
        None, "bytes=30000-", "bytes=30000-", "bytes=35000-", "bytes=35000-"]


def test_next_run_goes_on_from_the_part(server, tmp_path):
    server.behaviour = [{"cut": 10_000}] + [{"hang_up": True}] * (download.TRIES - 1)
    with pytest.raises(UserError, match=f"connection broke.*{download.TRIES} times"):
        download.fetch(source(server), tmp_path)
    assert os.listdir(tmp_path) == ["file.part"]
    server.requests.clear()
    assert download.fetch(source(server), tmp_path).read_bytes() == CONTENT
    assert server.requests == [("/file", "bytes=10000-")]


def test_server_without_ranges(server, tmp_path):
    server.ranges = False
    (tmp_path / "file.part").write_bytes(CONTENT[:10_000])
    assert download.fetch(source(server), tmp_path).read_bytes() == CONTENT
    server.behaviour = [{"cut": 60_000}, {"cut": 20_000}]
    (tmp_path / "file").unlink()
    assert download.fetch(source(server), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("part", [CONTENT, CONTENT + b"too much", b"?" * len(CONTENT), b""])
def test_odd_parts(server, tmp_path, part):
    """A part that is whole is kept without a request; one that is wrong is not kept at all."""
    (tmp_path / "file.part").write_bytes(part)
    wrong = part.startswith(b"?")
    if wrong:
        with pytest.raises(UserError, match="sha256 is"):
            download.fetch(source(server), tmp_path)
        assert os.listdir(tmp_path) == []
    assert download.fetch(source(server), tmp_path).read_bytes() == CONTENT
    assert len(server.requests) == {CONTENT: 0}.get(part, 2 if b"much" in part else 1)


def test_whole_part_of_unknown_size(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT)
    assert download.fetch(source(server, size=None), tmp_path).read_bytes() == CONTENT
    (tmp_path / "file").rename(tmp_path / "file.part")
    with open(tmp_path / "file.part", "ab") as f:
        f.write(b"too much")
    assert download.fetch(source(server, size=None), tmp_path).read_bytes() == CONTENT


def test_size_nobody_knows(server, tmp_path, capsys):
    server.behaviour = [{"no_length": True}]
    path = download.fetch(source(server, size=None), tmp_path)
    assert path.read_bytes() == CONTENT
    assert "unknown size" in capsys.readouterr().err


@pytest.mark.parametrize("bytes_served, message", [
    (b"!" + CONTENT[1:], "sha256 is"), (CONTENT[:-1], "server stopped|bytes, not"),
    (CONTENT + b"x", "bytes, not"), (b"<html>log in</html>", "server stopped|bytes, not")])
def test_wrong_bytes_are_not_kept(server, tmp_path, bytes_served, message):
    server.files["/file"] = bytes_served
    with pytest.raises(UserError, match=message):
        download.fetch(source(server), tmp_path)
    assert "file" not in os.listdir(tmp_path)
    server.files["/file"] = CONTENT  # whatever part was left does not spoil the next try for good
    try:
        assert download.fetch(source(server), tmp_path).read_bytes() == CONTENT
    except UserError:
        assert download.fetch(source(server), tmp_path).read_bytes() == CONTENT


def test_missing_file_is_not_asked_for_again(server, tmp_path):
    with pytest.raises(UserError, match="404") as e:
        download.fetch(source(server, path="/none"), tmp_path)
    assert "\n" not in str(e.value)
    assert server.requests == [("/none", None)]
    assert os.listdir(tmp_path) == []


def test_mirrors(server, tmp_path):
    server.files["/wrong"] = b"?" * len(CONTENT)
    urls = [server.url + p for p in ("/none", "/wrong", "/file")]
    assert download.fetch(source(server, urls=urls), tmp_path).read_bytes() == CONTENT
    assert [p for p, _ in server.requests] == ["/none", "/wrong", "/file"]


def test_nobody_listens(tmp_path, server, monkeypatch):
    url = "http://127.0.0.1:1/file"  # port 1: refused at once
    with pytest.raises(UserError, match="connection broke"):
        download.fetch(source(server, urls=(url,)), tmp_path)


def test_existing_file_that_is_wrong_is_left_alone(server, tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(UserError, match="4 bytes, not 102,400; remove it"):
        download.fetch(source(server), tmp_path)
    assert (tmp_path / "file").read_bytes() == b"mine"
    assert server.requests == []


def test_no_space(server, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda p: SimpleNamespace(free=50_000))
    with pytest.raises(UserError, match="no space left.*0.1 MB to come"):
        download.fetch(source(server), tmp_path)
    assert os.listdir(tmp_path) == []


def test_folder_that_cannot_be_made(server, tmp_path):
    (tmp_path / "taken").write_bytes(b"")
    with pytest.raises(UserError, match="taken"):
        download.fetch(source(server), tmp_path / "taken")


@pytest.mark.parametrize("module, name", [(enwik8, "enwik8"), (wikitext, "wikitext103"),
                                          (cifar10, "cifar10")])
def test_datasets_fetch_their_archive(server, tmp_path, monkeypatch, module, name):
    small = module.SOURCE._replace(urls=(f"{server.url}/file",), size=len(CONTENT),
                                   digest=f"sha256:{hashlib.sha256(CONTENT).hexdigest()}")
    monkeypatch.setattr(module, "SOURCE", small)
    fetch(name, tmp_path)
    assert (tmp_path / small.name).read_bytes() == CONTENT


def test_documented_checksums_are_whole():
    for s in (enwik8.SOURCE, wikitext.SOURCE, cifar10.SOURCE, pg19.METADATA):
        algorithm, _, digest = s.digest.partition(":")
        assert len(digest) == 2 * hashlib.new(algorithm).digest_size
        assert all(u.startswith(("http://", "https://")) for u in s.urls)


# ----------------------------------------------------------------------------- PG-19: many files

@pytest.fixture
def bucket(server, monkeypatch):
    books = {f"{split}/{i}.txt": f"book {i}\r\n".encode() * 50
             for split, ids in (("train", range(10, 25)), ("validation", [3]), ("test", [5, 6]))
             for i in ids}
    entries = [{"name": name, "size": str(len(text)),
                "md5Hash": base64.b64encode(hashlib.md5(text).digest()).decode()}
               for name, text in books.items()]
    entries.append({"name": "train/../../evil.txt", "size": "1", "md5Hash": "AA=="})
    entries.append({"name": "train/", "size": "0", "md5Hash": "AA=="})

    def listing(query):
        matching = [e for e in entries if e["name"].startswith(query["prefix"])]
        at = int(query.get("pageToken") or 0)
        page = {"items": matching[at : at + 4]}
        if at + 4 < len(matching):
            page["nextPageToken"] = str(at + 4)
        return json.dumps(page).encode()

    server.files = {"/list": listing, "/get/metadata.csv": b"10,A book,1900,address\n",
                    **{f"/get/{name}": text for name, text in books.items()}}
    monkeypatch.setattr(pg19, "LISTING", f"{server.url}/list")
    monkeypatch.setattr(pg19, "ADDRESS", f"{server.url}/get/")
    metadata = server.files["/get/metadata.csv"]
    monkeypatch.setattr(pg19, "METADATA", Source(
        "metadata.csv", (f"{server.url}/get/metadata.csv",), None,
        f"sha256:{hashlib.sha256(metadata).hexdigest()}"))
    server.books = books
    return server


def files_below(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes()
            for p in folder.rglob("*") if p.is_file()}


def test_pg19_books(bucket, tmp_path, capsys):
    fetch("pg19", tmp_path / "pg")
    want = {"metadata.csv": b"10,A book,1900,address\n", **bucket.books}
    assert files_below(tmp_path) == {f"pg/{name}": text for name, text in want.items()}
    assert "downloading 18 books" in capsys.readouterr().err
    bucket.requests.clear()
    (tmp_path / "pg" / "train" / "12.txt").unlink()
    fetch("pg19", tmp_path / "pg")
    assert [p for p, _ in bucket.requests if p.startswith("/get")] == ["/get/train/12.txt"]


def test_pg19_one_wrong_book(bucket, tmp_path):
    bucket.files["/get/test/5.txt"] = b"x" * len(bucket.files["/get/test/5.txt"])
    with pytest.raises(UserError, match="test/5.txt .*md5"):
        fetch("pg19", tmp_path)
    assert not (tmp_path / "test" / "5.txt").exists()
    bucket.files["/get/test/5.txt"] = bucket.books["test/5.txt"]
    fetch("pg19", tmp_path)
    assert files_below(tmp_path).keys() == {"metadata.csv", *bucket.books}


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b'{"items": [{"name": "train/1.txt"}]}',
                                    b"{}"])
def test_pg19_listing_that_is_none(bucket, tmp_path, answer):
    bucket.files["/list"] = answer
    with pytest.raises(UserError, match="list"):
        fetch("pg19", tmp_path)
    assert files_below(tmp_path) == {}


def test_pg19_no_space(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda p: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="no space left"):
        fetch("pg19", tmp_path)
    assert files_below(tmp_path) == {}


def test_get_tries_again(server):
    server.behaviour = [{"hang_up": True}, {"status": 500}, {"cut": 10}]
    assert get(f"{server.url}/file") == CONTENT
    with pytest.raises(UserError, match="404"):
        get(f"{server.url}/none")
