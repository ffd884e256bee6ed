"""Downloads the pinned files of data sets, resumes interrupted downloads, and installs files only if they are right.

The command is `python -m experiments.data fetch task=…`. A file is written under a temporary name, checked
by its git id (experiments/data/pinned.py) and by the number and fields of its rows, and renamed. The hub's own files
have no such id: their revision is part of the URL. An existing file is checked and never replaced.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from experiments.data import hub
from experiments.data.pinned import not_pinned
from experiments.data.rows import how, local_file, read_records, read_split
from experiments.data.sources import SOURCES, Split
from experiments.errors import UserError

SECONDS = 20.0  # time limit for a server to answer, and for each next `SLOWEST` bytes
SLOWEST = 1024
RESUMED = 5  # how often a broken connection is resumed, if each brought some bytes
HUB = "https://huggingface.co"


class WrongFile(UserError):
    """One file is unavailable or wrong; the other files are still fetched."""


class _Broke(Exception):
    """A connection ended or stalled before the file was complete."""


def fetch(splits: list[tuple[str, str]], data_root: str | None, seconds: float = SECONDS) -> int:
    """Put the files of these data sets under the data root, with one line for each. Returns 1 if a file is missing.

    Args:
        seconds: how long a server may take between two pieces of data.
    """
    if not data_root:
        raise UserError("fetch: no folder to put files into: set DIABLO_DATA_ROOT or give --data-root FOLDER")
    root, status = Path(data_root), 0
    files: dict[str, list[tuple[str, str]]] = {}  # several data sets may share a file
    for name, split in splits:
        if name == "arith":
            print("arith: generated, there is nothing to fetch")
        else:
            files.setdefault(SOURCES[name][split].file, []).append((name, split))
    for held in files.values():
        try:
            print(_take(held, root, seconds), flush=True)
        except WrongFile as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            status = 1
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(
                f"{error.filename or root}: {reason}: fix that, or give another folder with --data-root; downloaded "
                "parts are kept, and the same command resumes"
            ) from None
    return status


def _take(held: list[tuple[str, str]], root: Path, seconds: float) -> str:
    """Fetch one file that contains these data sets, and return one line about it."""
    part, names = SOURCES[held[0][0]][held[0][1]], ", ".join(f"{name} {split}" for name, split in held)
    there = local_file(part, root)
    if there is not None:
        if problem := _problem(part, held, there):
            raise WrongFile(f"{names}: {there} exists but is not right: {problem}: move it away to fetch it")
        return f"{names}: {there} is already here"
    if part.how:
        raise WrongFile(f"{names}: {how(part)}")
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"{names}: no {part.file} in {root}, and HF_HUB_OFFLINE is set: unset it to fetch what is missing"
        )
    target = root / part.file
    if part.url.endswith(".gz") and not part.rebuild:
        target = target.with_name(f"{target.name}.gz")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _aside(target.parent, part.url) as (file, partial):
        resumed = file.tell() > 0
        _download(part.url, file, seconds)
        made, problem = _made(part, held, partial)
        if problem and resumed:  # the earlier part was not from this file
            file.truncate(0)
            _download(part.url, file, seconds)
            made, problem = _made(part, held, partial)
        if problem:
            partial.unlink()
            raise WrongFile(f"{names}: {part.url} has changed: {problem}: nothing was installed")
        size = made.stat().st_size
        with made.open("rb") as whole:
            os.fsync(whole.fileno())
        made.replace(target)
        partial.unlink(missing_ok=True)
    return f"{names}: fetched {target} ({size / 1e6:,.1f} MB)"


@contextmanager
def _aside(folder: Path, url: str) -> Generator[tuple[IO[bytes], Path], None, None]:
    """Open the partial download of `url` next to its target, at its end, locked for this process."""
    partial = folder / f".partial-{hashlib.sha256(url.encode()).hexdigest()[:8]}-{Path(url).name}"
    with partial.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = partial.exists() and os.path.samestat(partial.stat(), os.fstat(file.fileno()))
        except BlockingIOError:
            mine = False
        if not mine:
            raise UserError(f"{partial}: another process is fetching this file: wait for it")
        try:
            yield file, partial
        finally:
            if file.tell() == 0:
                partial.unlink(missing_ok=True)


def _made(part: Split, held: list[tuple[str, str]], partial: Path) -> tuple[Path, str | None]:
    """Return the file to install, and its problem, if any."""
    if part.rebuild is None:
        return partial, _problem(part, held, partial)
    made, seen = partial.with_name(f"{partial.name}.json"), dict[str, dict[str, Any]]()
    try:
        for _, record in read_records(partial, None):  # a question has one record per option
            seen.setdefault(json.dumps(record["doc"], sort_keys=True), part.rebuild(record))
    except UserError as error:
        return made, str(error)
    except (KeyError, TypeError, ValueError) as error:
        return made, f"its records have another format ({type(error).__name__}: {error})"
    made.write_text(json.dumps(list(seen.values()), indent=4), encoding="utf-8")
    problem = _problem(part, held, made)
    if problem:
        made.unlink()
    return made, problem


def _problem(part: Split, held: list[tuple[str, str]], path: Path) -> str | None:
    """Return the problem of a complete file, if any."""
    if problem := not_pinned(part.file, path):
        return problem
    try:
        for name, split in held:
            read_split(name, split, path)
    except UserError as error:
        return str(error)
    return None


def _download(url: str, file: IO[bytes], seconds: float) -> None:
    """Append the rest of `url` to `file`. UserError if there is no answer, or if connections keep breaking."""
    for left in reversed(range(RESUMED + 1)):
        before = file.seek(0, os.SEEK_END)
        try:
            _append(url, file, before, seconds)
            file.flush()
            return
        except _Broke as broke:
            file.flush()
            size = os.fstat(file.fileno()).st_size
            if size <= before or not left:
                raise UserError(f"{url}: {broke} after {size:,} bytes: the same command resumes") from None


def _append(url: str, file: IO[bytes], start: int, seconds: float) -> None:
    import httpx2  # the client of huggingface_hub, whose session has the user's proxies and certificates
    from huggingface_hub import constants, get_session, get_token
    from tqdm import tqdm

    headers = {"Accept-Encoding": "identity"}  # a range of a compressed response is not a range of the file
    if start:
        headers["Range"] = f"bytes={start}-"
    if of_hub := url.startswith(f"{HUB}/"):
        url = constants.ENDPOINT + url.removeprefix(HUB)
        if token := get_token():
            headers["Authorization"] = f"Bearer {token}"
    client = get_session()
    request = client.build_request("GET", url, headers=headers, timeout=seconds)
    try:
        response = hub.within(seconds, lambda: client.send(request, stream=True, follow_redirects=True))
    except (httpx2.TransportError, httpx2.TooManyRedirects, TimeoutError) as error:
        silent = isinstance(error, TimeoutError | httpx2.TimeoutException)  # whichever clock was first
        reason = f"no answer within {seconds:g} seconds" if silent else str(error) or type(error).__name__
        raise UserError(f"{url} cannot be reached ({reason}): connect, then run the same command to resume") from None
    try:
        if response.status_code in (401, 403) and of_hub:
            raise WrongFile(f"{url}: no access ({response.status_code}): request it on the hub, then `hf auth login`")
        if not _continues(response, url, file, start):
            return
        length = response.headers.get("Content-Length", "")
        left = int(length) if length.isdigit() else None
        _check_room(file, left)
        since, counted = time.monotonic(), 0
        with tqdm(total=left, unit="B", unit_scale=True, desc=Path(url).name, leave=False, disable=None) as bar:
            for chunk in response.iter_raw():
                file.write(chunk)
                bar.update(len(chunk))
                counted += len(chunk)
                if counted >= SLOWEST:
                    since, counted = time.monotonic(), 0
                elif time.monotonic() - since > seconds:
                    raise _Broke(f"the connection is too slow ({counted} bytes in {seconds:g} seconds)")
    except httpx2.TimeoutException:
        raise _Broke(f"the server is silent for {seconds:g} seconds") from None
    except httpx2.TransportError as error:
        raise _Broke(f"the connection broke ({str(error) or type(error).__name__})") from None
    finally:
        response.close()


def _continues(response: Any, url: str, file: IO[bytes], start: int) -> bool:
    """Return whether the response's bytes belong at the end of `file`; empties it if they are the whole file."""
    code = response.status_code
    if code == 416:
        return False  # nothing is missing, or the local part is longer than the file: the content check decides
    if code == 200:
        if start:
            file.truncate(0)
        return True
    if code == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        return True
    if code in (404, 410):
        raise WrongFile(f"{url}: the file no longer exists ({code}): get it elsewhere, it is checked when it is read")
    raise UserError(f"{url}: the server answers {code} {response.reason_phrase}: run the same command later to resume")


def _check_room(file: IO[bytes], left: int | None) -> None:
    free = shutil.disk_usage(Path(file.name).parent).free
    if left is not None and left > free:
        raise OSError(errno.ENOSPC, f"{left / 1e6:,.1f} MB are missing and {free / 1e6:,.1f} MB are free", file.name)
