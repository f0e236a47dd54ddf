"""Fetching official files: size announced, resumed when broken, verified before use.

A file arrives as NAME.part and gets its name only when size and checksum are right. A broken
download keeps its .part, and the next one goes on from there.
"""

from __future__ import annotations

import http.client
import queue
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from rt_scratch.data.cache import NO_SPACE
from rt_scratch.data.files import CHUNK, digest_of
from rt_scratch.errors import UserError

TRIES = 5           # connections per address; each goes on where the last one broke
WAIT = 1.0          # seconds before the second try, doubled each time
TIMEOUT = 30        # seconds without a byte
PATIENCE = 60       # seconds in which SLOWEST bytes per second must come
SLOWEST = 1000
MAX_LIST = 1 << 24  # bytes of a small reply


class Source(NamedTuple):
    """An official file."""

    name: str                # what it is called on disk
    urls: tuple[str, ...]    # addresses in the order to try them
    size: int | None         # bytes; None: not documented, see `with_size`
    digest: str | None       # "sha256:..." or "md5:...", where documented

    def origin(self) -> str:
        """What it is and where it comes from, in words."""
        return f"{self.name} ({self.size / 1e6:,.1f} MB) comes from {self.urls[0]}"


class _Failed(Exception):
    """An address did not give the file; the message says why."""


def fetch(source: Source, folder: Path, quiet: bool = False) -> Path:
    """`folder / source.name`, downloaded unless it is there and right.

    UserError when no address gives the right bytes, or the disk is full.
    """
    path = folder / source.name
    if path.is_file():
        if problem := _wrong(path, source):
            raise UserError(f"{path}: {problem}; remove it to fetch it again")
        if not quiet:
            print(f"{path}: already here and right", file=sys.stderr)
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        problems = []
        for url in source.urls:
            try:
                _fetch_from(url, source, path, quiet)
                return path
            except _Failed as e:
                problems.append(f"{url}: {e}")
    except OSError as e:
        if e.errno in NO_SPACE:
            raise UserError(f"no space left in {folder} for {source.name}; the part that came is "
                            "kept, and the next download goes on from there") from e
        raise UserError(f"{e.filename or folder}: {e.strerror or e}") from e
    raise UserError(f"{source.name} could not be downloaded ({'; '.join(problems)})")


def get(url: str) -> bytes:
    """A small reply, such as a list of files; tried again when the connection breaks."""
    def once():
        with _open(url) as reply:
            size = reply.length  # of the reply, where it says so
            text = b"".join(_pieces(reply, MAX_LIST if size is None else min(size, MAX_LIST)))
        if len(text) == MAX_LIST:
            raise _Failed(f"not the short list it should be: {MAX_LIST:,} bytes or more")
        if size is not None and len(text) < size:
            raise ConnectionError(f"the server stopped after {len(text):,} of {size:,} bytes")
        return text
    try:
        return _persistently(once)
    except _Failed as e:
        raise UserError(f"{url}: {e}") from e


def with_size(source: Source) -> Source:
    """A source of undocumented size with the size that the server names; UserError if it does not.
    """
    def once():
        with _open(source.urls[0]) as reply:
            return reply.length
    try:
        size = _persistently(once)
    except _Failed as e:
        raise UserError(f"{source.urls[0]}: {e}") from e
    if not size:
        raise UserError(f"{source.urls[0]}: the server does not say how large {source.name} is")
    return source._replace(size=size)


def check_space(folder: Path, size: int) -> None:
    """UserError unless `size` bytes more fit on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(f"no space left in {folder}: {size / 1e6:,.1f} MB to come, "
                        f"{free / 1e6:,.1f} MB free")


def _persistently(once):
    """The result of once(), called up to TRIES times while the connection or the server fails."""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(WAIT * 2 ** (attempt - 1))
        try:
            return once()
        except urllib.error.HTTPError as e:
            reason = f"the server says {e.code} {e.reason}"
            if e.code < 500 and e.code not in (408, 429):  # those may pass, others stay
                raise _Failed(reason) from e
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError,
                ValueError) as e:  # the last: redirected to what is no address
            reason = f"the connection broke: {getattr(e, 'reason', None) or e}"
    raise _Failed(f"{reason}, {TRIES} times")


def _open(url, **headers):
    """The reply, its head read; ConnectionError if that is not there after PATIENCE seconds: in a
    thread, because a byte now and then would keep the library waiting."""
    request = urllib.request.Request(
        url, headers={"User-Agent": "rt_scratch", "Accept-Encoding": "identity", **headers})
    came = queue.SimpleQueue()

    def ask():
        try:
            came.put((urllib.request.urlopen(request, timeout=TIMEOUT), None))
        except Exception as e:
            came.put((None, e))

    threading.Thread(target=ask, daemon=True).start()
    try:
        reply, error = came.get(timeout=PATIENCE)
    except queue.Empty:
        raise ConnectionError(f"no reply in {PATIENCE} seconds") from None
    if error:
        raise error
    return reply


def _fetch_from(url, source, path, quiet):
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    if part.is_symlink() or part.exists() and not part.is_file():
        part.unlink()  # what a link names is not ours to write to, and a pipe would wait for ever
    for again in (False, True):
        resumed = part.exists()
        _persistently(lambda: _continue(url, source, part, quiet))
        problem = _wrong(part, source)
        if problem is None:
            part.replace(path)
            return
        part.unlink()
        if again or not resumed:  # else the part from before may be what was wrong
            raise _Failed(problem)


def _continue(url, source, part, quiet):
    """Fetch what is missing of `part`; ConnectionError when the server stopped too early."""
    have = before = part.stat().st_size if part.exists() else 0
    if have >= source.size:
        return
    with _open(url, **({"Range": f"bytes={have}-"} if have else {})) as reply:
        if reply.status != 206 or f"bytes {have}-" not in reply.headers.get("Content-Range", ""):
            have = 0  # the whole file comes again
        length, whole = reply.headers.get("Content-Length"), have == 0
        if length not in (None, str(source.size - have)):
            raise _Failed(f"another file: {length!r:.30} bytes to come, not "
                          f"{source.size - have:,}")
        if not quiet:
            _announce(url, part, have, source.size)
        bar = tqdm(total=source.size, initial=have, unit="B", unit_scale=True, desc=source.name,
                   disable=True if quiet else None)
        with open(part, "ab" if have else "wb") as f, bar:
            for piece in _pieces(reply, source.size - have):
                f.write(piece)
                have += len(piece)
                bar.update(len(piece))
    if have < source.size:
        same = length is None and whole and have == before  # as short as the last time
        if same or reply.headers.get("Transfer-Encoding") == "chunked":  # which tells its end
            part.unlink()
            raise _Failed(f"another file: {have:,} bytes, not {source.size:,}")
        raise ConnectionError(f"the server stopped after {have:,} of {source.size:,} bytes")


def _pieces(reply, limit):
    """Pieces of a reply, up to `limit` bytes in all; ConnectionError if next to none come.

    Reads what is there, not a fixed size: a byte a second would never come to an end.
    """
    since, n = time.monotonic(), 0
    while limit:
        try:
            piece = reply.read1(min(CHUNK, limit))
        except OSError as e:  # also TLS; disks have errors of their own
            raise ConnectionError(e) from e
        if not piece:
            return
        limit, n = limit - len(piece), n + len(piece)
        yield piece
        if time.monotonic() - since > PATIENCE:
            if n < PATIENCE * SLOWEST:
                raise ConnectionError(f"slower than {SLOWEST} bytes per second")
            since, n = time.monotonic(), 0


def _announce(url, part, have, total):
    rest = f", {have / 1e6:,.1f} MB of it already here" if have else ""
    print(f"downloading {total / 1e6:,.1f} MB{rest} from {url} into {part.parent}",
          file=sys.stderr)
    check_space(part.parent, total - have)


def _wrong(path, source):
    """What is wrong with a complete file, or None."""
    size = path.stat().st_size
    if size != source.size:
        return f"{size:,} bytes, not {source.size:,}"
    if source.digest is None:  # none is documented
        return None
    algorithm, _, wanted = source.digest.partition(":")
    digest = digest_of(path, algorithm)
    if digest != wanted:
        return f"its {algorithm} is {digest[:12]}..., not {wanted[:12]}..."
    return None
