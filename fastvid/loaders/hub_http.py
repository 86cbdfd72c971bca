"""HTTP for the hub: answers of bounded size, few redirects and retries, and an end for a server that stalls.

Requests go through huggingface_hub's session, so its login, proxies, certificates and HF_HUB_OFFLINE apply. The session
is httpx's, or requests' (huggingface_hub before 1.0). Nothing here knows models or files.
"""

from __future__ import annotations

import contextlib
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

MAX_REDIRECTS = 5
TRIES = 4  # of a request; the waits between them are 1, 2 and 4 seconds, or what the hub asks for
LONGEST_WAIT = 10  # seconds that the hub may ask to wait
WINDOW = 15.0  # seconds in which all connections together must bring MIN_BYTES
MIN_BYTES = 15 << 10
CONNECTIONS = 4
PIECE = 1 << 16  # bytes
TIMEOUT = 10.0  # seconds without a byte, unless HF_HUB_DOWNLOAD_TIMEOUT says less
REDIRECTS, LATER = (301, 302, 303, 307, 308), (408, 429, 500, 502, 503, 504)
T = TypeVar("T")


class HubError(Exception):
    """A request failed. status: of HTTP, 0 without an answer; code: the hub's X-Error-Code; again: whether another
    attempt may help; wait: seconds that the hub asks to wait before it."""

    def __init__(
        self, message: str, status: int = 0, code: str = "", again: bool = False, wait: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.again, self.wait = status, code, again, wait


class Stopped(Exception):
    """The download has ended elsewhere: by an error, a stall or Ctrl-C."""


# ---------------------------------------------------------------- one request


def fetch(
    url: str, write: Callable[[bytes], Any], progress: Progress, limit: int, known: bool = True
) -> Mapping[str, str]:
    """Hand an answer's bytes to `write`; after a cut, go on from there. Returns the headers, names in lower case, each
    from the first answer of a chain of redirects that has it.

    Raises HubError, also for more than `limit` bytes; known=False: more than Content-Length says are too many as well,
    and `limit` holds only without that header.
    """
    done = attempt = 0
    while True:
        before = done
        try:
            with _open(url, done) as (headers, start, chunks):
                skip = done - start  # a server may ignore where to start
                if not known and start == 0 and re.fullmatch(r"\d{1,15}", headers.get("content-length", "")):
                    limit = int(headers["content-length"])
                for chunk in chunks:
                    fresh, skip = chunk[skip:], max(0, skip - len(chunk))
                    done += len(fresh)
                    if done > limit:
                        raise HubError(f"the answer has more than the {limit:,} bytes that are expected")
                    progress.add(len(chunk))
                    write(fresh)
                return headers
        except HubError as error:
            attempt = 0 if done > before else attempt + 1
            if not error.again or attempt >= TRIES or (error.wait or 0) > LONGEST_WAIT:
                raise
            _pause(error.wait or 2 ** max(0, attempt - 1), progress)


def _pause(seconds: float, progress: Progress) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        progress.check()
        time.sleep(0.05)


@contextlib.contextmanager
def _open(url: str, start: int) -> Iterator[tuple[dict[str, str], int, Iterator[bytes]]]:
    """(headers, first byte, chunks) of a successful answer, after redirects."""
    from huggingface_hub.utils import build_hf_headers

    sent = {**build_hf_headers(library_name="fastvid"), "Accept-Encoding": "identity"}
    if start:
        sent["Range"] = f"bytes={start}-"
    headers: dict[str, str] = {}
    for _ in range(MAX_REDIRECTS + 1):
        response = _send(url, sent)
        try:
            found = {name.lower(): value for name, value in response.headers.items()}
            headers = {**found, **headers, "content-encoding": found.get("content-encoding", "")}
            if response.status_code not in REDIRECTS:
                _check_status(response.status_code, found)
                yield headers, _first_byte(response.status_code, start, found), _chunks(response)
                return
        finally:
            response.close()
        target = urljoin(url, found.get("location", ""))
        _check_redirect(url, target)
        if urlsplit(target).netloc != urlsplit(url).netloc:
            sent = {name: value for name, value in sent.items() if name.lower() != "authorization"}
        url = target
    raise HubError(f"more than {MAX_REDIRECTS} redirects")


def _send(url: str, headers: dict[str, str]) -> Any:
    """The response of httpx or requests, of which only the headers are read."""
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils import get_session

    session: Any = get_session()
    timeout = min(TIMEOUT, constants.HF_HUB_DOWNLOAD_TIMEOUT)
    try:
        if hasattr(session, "build_request"):  # httpx
            request = session.build_request("GET", url, headers=headers, timeout=timeout)
            return session.send(request, stream=True, follow_redirects=False)
        return session.get(url, headers=headers, timeout=timeout, stream=True, allow_redirects=False)
    except OfflineModeIsEnabled as error:
        raise HubError(first_line(error)) from None
    except Exception as error:  # which types mean "no network" depends on the session's library
        raise HubError(first_line(error), again=True) from None


def _chunks(response: Any) -> Iterator[bytes]:
    try:
        yield from response.iter_raw() if hasattr(response, "iter_raw") else response.iter_content(PIECE)
    except Exception as error:  # see `_send`
        raise HubError(first_line(error), again=True) from None


def _check_status(status: int, headers: Mapping[str, str]) -> None:
    if status in (200, 206):
        if headers.get("content-encoding", "identity") not in ("", "identity"):
            raise HubError(f"the answer is compressed ({headers['content-encoding']:.40}), which was not asked for")
        return
    wait = headers.get("retry-after", "")
    seconds = min(float(wait), 1e9) if re.fullmatch(r"\d{1,300}", wait) else None
    said = headers.get("x-error-message", "")[:200]
    later = f"; it says to try again in {seconds:.0f} seconds" if seconds else ""
    raise HubError(
        f"the hub answers with status {status}{f' ({said})' if said else ''}{later}",
        *(status, headers.get("x-error-code", ""), status in LATER, seconds),
    )


def _first_byte(status: int, start: int, headers: Mapping[str, str]) -> int:
    if status == 200:
        return 0
    match = re.match(r"bytes (\d{1,18})-", headers.get("content-range", ""))
    if not match or int(match[1]) > start:
        raise HubError("the answer begins at another byte than was asked for")
    return int(match[1])


def _check_redirect(url: str, target: str) -> None:
    old, new = urlsplit(url).scheme, urlsplit(target).scheme
    if new not in ("http", "https") or (old == "https" and new == "http") or target == url:
        raise HubError(f"a redirect to {target:.200}, which is not followed")


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


# ---------------------------------------------------------------- several requests, watched


class Progress:
    """Counts received bytes over all connections, and ends them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.received, self.moved, self.stopped = 0, 0, False

    def add(self, count: int) -> None:
        """Count received bytes. Raises Stopped."""
        self.check()
        with self._lock:
            self.received += count
            self.moved += count

    def keep_alive(self) -> None:
        """Something has moved on that brings few bytes, such as a small file that is complete. Raises Stopped."""
        self.check()
        with self._lock:
            self.moved += MIN_BYTES

    def check(self) -> None:
        if self.stopped:
            raise Stopped


def run(jobs: Sequence[Callable[[Progress], T]], show: Callable[[int], Any], seconds: float | None = None) -> list[T]:
    """The results of the jobs, which run on a few threads; show: called often with the number of bytes received.

    The first error ends all. Raises HubError too if they bring less than MIN_BYTES in WINDOW, or take more than
    `seconds`. A thread that still waits for a server then is left behind: it writes nothing any more.
    """
    progress, results, left = Progress(), queue.Queue[tuple[int, Any]](), queue.SimpleQueue[int]()
    for number in range(len(jobs)):
        left.put(number)

    def work() -> None:
        with contextlib.suppress(queue.Empty, Stopped):
            while not progress.stopped:
                number = left.get_nowait()
                try:
                    results.put((number, (jobs[number](progress), None)))
                except BaseException as error:
                    results.put((number, (None, error)))
                    return

    threads = [
        threading.Thread(target=work, name="fastvid-download", daemon=True) for _ in range(min(CONNECTIONS, len(jobs)))
    ]
    try:
        for thread in threads:
            thread.start()
        return _collect(len(jobs), results, progress, show, seconds)
    finally:
        progress.stopped = True
        for thread in threads:
            thread.join(0.5)


def _collect(
    count: int,
    results: queue.Queue[tuple[int, Any]],
    progress: Progress,
    show: Callable[[int], Any],
    seconds: float | None,
) -> list[Any]:
    found: dict[int, Any] = {}
    start = window = time.monotonic()
    moved = 0
    while len(found) < count:
        with contextlib.suppress(queue.Empty):
            number, (value, error) = results.get(timeout=0.2)
            if error is not None:
                raise error
            found[number] = value
            progress.keep_alive()
        show(progress.received)
        now = time.monotonic()
        if seconds is not None and now > start + seconds:
            raise HubError(f"the answer is not there after {seconds:.0f} seconds")
        if progress.moved - moved >= MIN_BYTES:
            window, moved = now, progress.moved
        elif now > window + WINDOW:
            raise HubError(f"it sent {progress.moved - moved} bytes in {WINDOW:.0f} seconds")
    return [found[number] for number in range(count)]
