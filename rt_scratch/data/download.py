"""Fetching official files: size announced, resumed when broken, verified before use.

A file arrives as NAME.part and gets its name only when size and checksum are right. A broken
download keeps its .part, and the next one goes on from there.
"""

from __future__ import annotations

import http.client
import shutil
import sys
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


class Source(NamedTuple):
    """An official file."""

    name: str                # what it is called on disk
    urls: tuple[str, ...]    # addresses in the order to try them
    size: int | None         # bytes, where documented
    digest: str | None       # 'sha256:...' or 'md5:...', where documented


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
        with urllib.request.urlopen(_request(url), timeout=TIMEOUT) as reply:
            return reply.read()
    try:
        return _persistently(once)
    except _Failed as e:
        raise UserError(f"{url}: {e}") from e


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
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError,
                TimeoutError) as e:
            reason = f"the connection broke: {getattr(e, 'reason', None) or e}"
    raise _Failed(f"{reason}, {TRIES} times")


def _request(url, **headers):
    return urllib.request.Request(
        url, headers={"User-Agent": "rt_scratch", "Accept-Encoding": "identity", **headers})


def _fetch_from(url, source, path, quiet):
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    _persistently(lambda: _continue(url, source, part, quiet))
    if problem := _wrong(part, source):
        part.unlink()
        raise _Failed(problem)
    part.replace(path)


def _continue(url, source, part, quiet):
    """Fetch what is missing of `part`; ConnectionError when the server stopped too early."""
    have = part.stat().st_size if part.exists() else 0
    if source.size is not None and have == source.size:
        return
    try:
        reply = urllib.request.urlopen(
            _request(url, **({"Range": f"bytes={have}-"} if have else {})), timeout=TIMEOUT)
    except urllib.error.HTTPError as e:
        if e.code == 416 and have:  # the server has no more than this
            if source.digest is not None and _wrong(part, source) is None:
                return
            part.unlink()
            raise ConnectionError("the earlier part did not fit, starting again") from e
        raise
    with reply:
        if reply.status != 206 or f"bytes {have}-" not in reply.headers.get("Content-Range", ""):
            have = 0  # the whole file comes again
        length = reply.headers.get("Content-Length")
        total = source.size or (have + int(length) if length else None)
        if not quiet:
            _announce(url, part, have, total)
        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=source.name,
                   disable=True if quiet else None)
        with open(part, "ab" if have else "wb") as f, bar:
            while chunk := reply.read(CHUNK):
                f.write(chunk)
                have += len(chunk)
                bar.update(len(chunk))
    if total is not None and have < total:
        raise ConnectionError(f"the server stopped after {have:,} of {total:,} bytes")


def _announce(url, part, have, total):
    size = f"{total / 1e6:,.1f} MB" if total else "a file of unknown size"
    rest = f", {have / 1e6:,.1f} MB of it already here" if have else ""
    print(f"downloading {size}{rest} from {url} into {part.parent}", file=sys.stderr)
    check_space(part.parent, total - have if total else 0)


def _wrong(path, source):
    """What is wrong with a complete file, or None."""
    size = path.stat().st_size
    if source.size is not None and size != source.size:
        return f"{size:,} bytes, not {source.size:,}"
    if source.digest is not None:
        algorithm, _, wanted = source.digest.partition(":")
        digest = digest_of(path, algorithm)
        if digest != wanted:
            return f"its {algorithm} is {digest[:12]}..., not {wanted[:12]}..."
    return None
