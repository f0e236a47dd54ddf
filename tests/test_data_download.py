"""Downloads, from a server on 127.0.0.1 that cuts connections, lies and refuses."""

import base64
import contextlib
import hashlib
import http.server
import json
import os
import shutil
import threading
import time
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
        if behave.get("slow_head"):
            with contextlib.suppress(OSError):
                for byte in b"HTTP/1.1 200 OK\r\nX: " + b"x" * 300:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.01)
            self.close_connection = True
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
        if behave.get("chunked"):
            self.send_header("Transfer-Encoding", "chunked")
            body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        elif not behave.get("no_length") and not behave.get("endless"):
            self.send_header("Content-Length", behave.get("length", str(len(body))))
        self.end_headers()
        with contextlib.suppress(OSError):  # the other side may have seen enough
            for byte in body[:1000] if behave.get("slow") else ():
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.01)
            self.wfile.write(body[: behave.get("cut", len(body))])
            while behave.get("endless"):
                self.wfile.write(CONTENT)
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


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_cut_connections_are_resumed(server, tmp_path, algorithm):
    server.behaviour = [{"cut": 30_000}, {"hang_up": True}, {"cut": 5_000}, {"status": 503}]
    path = download.fetch(source(server, algorithm=algorithm), tmp_path)
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
    """A part that is whole is kept without a request; one that is wrong is fetched again, once."""
    (tmp_path / "file.part").write_bytes(part)
    assert download.fetch(source(server), tmp_path).read_bytes() == CONTENT
    assert server.requests == ([] if part == CONTENT else [("/file", None)])


@pytest.mark.parametrize("part", [b"<html>a page</html>", b"?" * 50_000])
def test_a_wrong_part_does_not_spoil_the_download_for_good(server, tmp_path, part):
    """The end is fetched, the checksum fails, and the whole file comes again."""
    (tmp_path / "file.part").write_bytes(part)
    assert download.fetch(source(server), tmp_path).read_bytes() == CONTENT
    assert server.requests == [("/file", f"bytes={len(part)}-"), ("/file", None)]
    server.files["/file"] = b"?" + CONTENT[1:]  # now the server has it wrong too: no third time
    (tmp_path / "file").rename(tmp_path / "file.part")
    (tmp_path / "file.part").write_bytes(part)
    server.requests.clear()
    with pytest.raises(UserError, match="sha256 is"):
        download.fetch(source(server), tmp_path)
    assert server.requests == [("/file", f"bytes={len(part)}-"), ("/file", None)]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("bytes_served, message, requests", [
    (b"!" + CONTENT[1:], "sha256 is", 1), (CONTENT[:-1], "another file: '102399' bytes", 1),
    (CONTENT + b"x", "another file: '102401' bytes", 1),
    (b"<html>log in</html>", "another file: '19' bytes to come, not 102,400", 1)])
def test_wrong_bytes_are_not_kept(server, tmp_path, bytes_served, message, requests):
    """A page of another size, whatever its status, is not even read."""
    server.files["/file"] = bytes_served
    with pytest.raises(UserError, match=message):
        download.fetch(source(server), tmp_path)
    assert len(server.requests) == requests
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("how", ["no length", "chunked", "with its length"])
def test_a_wrong_page_at_the_first_address_does_not_hide_the_mirror(server, tmp_path, how):
    server.files["/parked"] = b"<html>this domain is for sale</html>"
    server.ranges = False  # such a server gives the page, whatever it is asked for
    behave = {"no length": {"no_length": True}, "chunked": {"chunked": True}}.get(how, {})
    tries = 2 if how == "no length" else 1  # a second look tells a short file from a cut one
    server.behaviour = [behave] * tries
    urls = [server.url + "/parked", server.url + "/file"]
    assert download.fetch(source(server, urls=urls), tmp_path).read_bytes() == CONTENT
    assert server.requests[tries:] == [("/file", None)]  # nothing was kept of that page
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("behave", [{"no_length": True}, {"length": "abc"}, {"length": "-5"},
                                    {"length": "1" * 5000}, {"endless": True}])
def test_lengths_that_are_none(server, tmp_path, behave):
    """What comes is read up to the documented size, and no further."""
    server.behaviour = [behave]
    fine = "length" not in behave
    try:
        assert download.fetch(source(server), tmp_path).read_bytes() == CONTENT and fine
    except UserError as e:
        assert "another file" in str(e) and len(str(e)) < 300 and not fine
    assert os.listdir(tmp_path) == ["file"] * fine


def test_a_byte_now_and_then_is_no_download(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "PATIENCE", 0.1)
    monkeypatch.setattr(download, "TRIES", 2)
    server.behaviour = [{"slow": True}] * 2
    with pytest.raises(UserError, match="slower than 1000 bytes per second, 2 times"):
        download.fetch(source(server), tmp_path)
    server.behaviour = [{"slow_head": True}] * 2
    with pytest.raises(UserError, match="no reply in 0.1 seconds, 2 times"):
        download.fetch(source(server), tmp_path)
    assert download.fetch(source(server), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_part_that_is_no_file(server, tmp_path, kind):
    (tmp_path / "mine").write_bytes(b"precious")
    if kind == "link":
        (tmp_path / "file.part").symlink_to(tmp_path / "mine")
    else:
        os.mkfifo(tmp_path / "file.part")
    assert download.fetch(source(server), tmp_path).read_bytes() == CONTENT
    assert (tmp_path / "mine").read_bytes() == b"precious"


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
        "metadata.csv", (f"{server.url}/get/metadata.csv",), len(metadata),
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


@pytest.mark.parametrize("answer", [
    b"<html>", b"[]", b'{"items": [{"name": "train/1.txt"}]}', b"{}", b"[" * 100_000,
    b'{"items": [{"name": "train/1.txt", "size": "1", "md5Hash": "AAAA"}]}',
    b'{"items": [], "nextPageToken": "again and again"}', b" " * 2_000_000])
def test_pg19_listing_that_is_none(bucket, tmp_path, answer, monkeypatch):
    monkeypatch.setattr(pg19, "MAX_PAGES", 20)
    monkeypatch.setattr(download, "MAX_LIST", 1_000_000)
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
