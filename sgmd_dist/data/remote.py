"""Files that lie elsewhere: http(s) servers, object stores (s3, gs, hf, ... through fsspec) and the output of commands.

Every failure is one of three:
    RemoteFailure   (an OSError) may pass by itself: a lost connection, a server's 5xx, a stall, a command that failed
    RemoteRefused   (a UserError) will not: no such file, no access, a protocol whose package is missing
    RemoteMissing   a RemoteRefused for what is not there, or not for us: some stores answer 403 to both
Secrets in addresses (user:password@, ?signature) never reach a message: print `Remote`s, not their `url`.
"""

from __future__ import annotations

import os
import re
import selectors
import signal
import subprocess
import tempfile
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from sgmd_dist.data.format import CorruptSample

PIPE = "pipe:"
_CHUNK_BYTES = 4 * 2**20
_PIPE_BYTES = 2**20  # the most that Linux gives without privileges
_CONNECT_TIMEOUT_S = 20.0
_TRANSIENT_STATUS = (408, 425, 429)  # and all 5xx
_MISSING_STATUS = (401, 403, 404, 410)
_STORES = ("s3", "gs", "gcs", "hf")  # those with an extra of their own
_SECRET_WORDS = re.compile(
    r"(?P<option>(?:^|\s)(?:-H|--header|-u|--user|--oauth2-bearer)[ =]?)(?:'[^']*'|\"[^\"]*\"|\S+)"
    r"|(?P<name>(?i:[\w-]*(?:token|password|secret|key|signature|sig))=)[^\s&'\"]+"
)
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://[^\s'\"<>]+", re.IGNORECASE)
_QUERY = re.compile(r"\?[^\s'\")>]+")


class RemoteFailure(ConnectionError):
    """A file could not be brought this time; another attempt may succeed."""


class RemoteRefused(CorruptSample):
    """A file cannot be brought, and another attempt would not change that."""


class RemoteMissing(RemoteRefused):
    """There is no such file, or we may not have it."""


@dataclass(frozen=True, repr=False)
class Remote:
    """A file elsewhere. As text it is its address without secrets, for messages."""

    url: str

    def __str__(self) -> str:
        return redacted(self.url)

    __repr__ = __str__

    @property
    def is_pipe(self) -> bool:
        return self.url.startswith(PIPE)

    @property
    def name(self) -> str:
        """The file's name, without what else the address holds."""
        return "output" if self.is_pipe else _path_of(self.url).rpartition("/")[2]

    @property
    def is_shard(self) -> bool:
        """Whether the address names a tar (or a command that prints one), not a folder."""
        return self.is_pipe or _path_of(self.url).endswith(".tar")

    def sidecar(self) -> Remote:
        """`.../shard-000000.tar?sig` -> `.../shard-000000.index.json?sig`."""
        return self._with_path(lambda path: path.removesuffix(".tar") + ".index.json")

    def inside(self, name: str) -> Remote:
        """The file `name` in this folder."""
        return self._with_path(lambda path: f"{path.rstrip('/')}/{self._spelled(name)}")

    @property
    def parent(self) -> Remote:
        """The folder of this file."""
        return self._with_path(lambda path: path.rpartition("/")[0])

    def _spelled(self, name: str) -> str:
        return quote(name) if _is_http(self.url) else name

    def _with_path(self, change: Any) -> Remote:
        if not _is_http(self.url):  # a store's key may hold '?' and '#'
            scheme, _, path = self.url.partition("://")
            return Remote(f"{scheme}://{change(path)}")
        parts = urlsplit(self.url)
        return Remote(urlunsplit(parts._replace(path=change(parts.path))))


@dataclass(frozen=True)
class Stat:
    """What a server says of a file without sending it; None where it says nothing.

    Attributes:
        num_bytes: size.
        version: a text that changes when the content does.
    """

    num_bytes: int | None
    version: str | None


def is_remote(entry: str) -> bool:
    """Whether an entry of data.shards lies elsewhere. Raises `RemoteRefused` for `s3:bucket` and the like."""
    if entry.startswith(PIPE) or "://" in entry:
        return True
    scheme = entry.partition(":")[0]
    if ":" in entry and scheme in (*_STORES, "http", "https"):
        raise RemoteRefused(f"data.shards: '{redacted(entry)}': write {scheme}://")
    return False


def redacted(text: str) -> str:
    """A text for messages: an address, a command or an error, without the passwords and signatures in it."""
    text = _ADDRESS.sub(lambda found: _redacted_address(found[0]), text)
    if text.startswith(PIPE):
        text = _SECRET_WORDS.sub(lambda found: (found["option"] or found["name"]) + "***", text)
    return _QUERY.sub("?***", text)


def _redacted_address(address: str) -> str:
    scheme, _, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    path, mark, _ = path.partition("?")
    host, mark = host.rpartition("@")[2].partition("?")[0], mark or "?" * ("?" in host)
    return f"{scheme}://{host}{slash}{path}" + "?***" * bool(mark)


def stat(remote: Remote) -> Stat:
    """Size and version of a file; of a command's output nothing is known.

    Raises:
        RemoteMissing, RemoteRefused, RemoteFailure: see this file's head.
    """
    if remote.is_pipe:
        return Stat(None, None)
    return _http_stat(remote) if _is_http(remote.url) else _store_stat(remote)


def chunks(remote: Remote, timeout_s: float) -> Generator[bytes, None, None]:
    """A file's bytes in parts of some MB. A server or command that is silent for `timeout_s` has failed.

    Raises:
        RemoteMissing, RemoteRefused, RemoteFailure: see this file's head; a body that was cut short and a command
            whose exit status is not 0, be it in the middle of a pipeline, are failures.
    """
    if remote.is_pipe:
        return _pipe_chunks(remote, timeout_s)
    return _http_chunks(remote, timeout_s) if _is_http(remote.url) else _store_chunks(remote)


# ---------------------------------------------------------------------------------------------- http


def _is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def _path_of(url: str) -> str:
    return urlsplit(url).path if _is_http(url) else url


_per_thread = threading.local()  # a requests.Session is for one thread


def _session() -> Any:
    session, owner = getattr(_per_thread, "session", (None, None))
    if owner != os.getpid():  # connections do not survive a fork
        import requests

        session = requests.Session()
        session.headers["Accept-Encoding"] = "identity"  # a shard's bytes as they are stored
        _per_thread.session = session, os.getpid()
    return session


@contextmanager
def _http_errors(remote: Remote) -> Iterator[None]:
    import requests

    try:
        yield
    except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema) as error:
        raise RemoteRefused(f"{remote}: no valid address ({redacted(str(error))})") from None
    except (requests.RequestException, OSError) as error:
        if isinstance(error, RemoteFailure):
            raise
        # The original holds the whole address, query and all: it is not chained.
        raise RemoteFailure(f"{remote}: {_short(error)}") from None


def _http_stat(remote: Remote) -> Stat:
    with _http_errors(remote):
        answer = _session().head(remote.url, allow_redirects=True, timeout=(_CONNECT_TIMEOUT_S, _CONNECT_TIMEOUT_S))
    if answer.status_code in (404, 410) or _is_transient(answer.status_code):
        _check_status(remote, answer)
    if answer.status_code != 200:  # an address signed for GET refuses HEAD: GET will tell
        return Stat(None, None)
    length = answer.headers.get("Content-Length", "")
    version = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
    return Stat(int(length) if length.isdecimal() else None, version)


def _http_chunks(remote: Remote, timeout_s: float) -> Generator[bytes, None, None]:
    with _http_errors(remote):
        answer = _session().get(remote.url, stream=True, timeout=(min(_CONNECT_TIMEOUT_S, timeout_s), timeout_s))
        with answer:
            _check_status(remote, answer)
            yield from answer.iter_content(_CHUNK_BYTES)


def _is_transient(status: int) -> bool:
    return status >= 500 or status in _TRANSIENT_STATUS


def _check_status(remote: Remote, answer: Any) -> None:
    status = answer.status_code
    if status == 200:
        return
    said = f"{remote}: the server says {status} {answer.reason}"
    if _is_transient(status):
        raise RemoteFailure(said)
    if status in _MISSING_STATUS:
        raise RemoteMissing(f"{said}; check the address and who may read it")
    raise RemoteRefused(f"{said}, expected 200; check the address")


# ---------------------------------------------------------------------------------------------- object stores


def _file_system(remote: Remote) -> tuple[Any, str]:
    """The fsspec file system of an address and the address without its scheme."""
    import fsspec

    protocol = remote.url.partition("://")[0]
    try:
        return fsspec.filesystem(protocol, use_listings_cache=False), remote.url
    except ImportError as error:
        mend = "pip install 'sgmd_dist[cloud]'" if protocol in _STORES else _short(error)
        raise RemoteRefused(f"{remote}: {protocol}:// needs a package that is not installed; {mend}") from None
    except ValueError:
        known = "a path, pipe:, http(s)://, s3://, gs://, hf:// or another protocol of fsspec"
        raise RemoteRefused(f"{remote}: unknown protocol {protocol}://; expected {known}") from None


@contextmanager
def _store_errors(remote: Remote) -> Iterator[None]:
    try:
        yield
    except RemoteRefused:
        raise
    except FileNotFoundError:
        raise RemoteMissing(f"{remote}: no such file; check the address and who may read it") from None
    except PermissionError as error:
        raise RemoteMissing(f"{remote}: access denied ({_short(error)}); check your credentials") from None
    except Exception as error:  # stores raise what their clients raise, OSErrors or not
        if "Credential" in type(error).__name__ or "Auth" in type(error).__name__:
            raise RemoteRefused(f"{remote}: {_short(error)}; check your credentials") from None
        raise RemoteFailure(f"{remote}: {_short(error)}") from None


def _store_stat(remote: Remote) -> Stat:
    with _store_errors(remote):
        files, path = _file_system(remote)
        info = files.info(path)
        if info.get("type") == "directory":
            raise FileNotFoundError(path)
    names = ("ETag", "etag", "blob_id", "generation", "LastModified", "mtime", "updated", "created")
    version = next((str(info[name]) for name in names if info.get(name)), None)
    size = info.get("size")
    return Stat(None if size is None else int(size), version)


def _store_chunks(remote: Remote) -> Generator[bytes, None, None]:
    with _store_errors(remote):
        files, path = _file_system(remote)
        with files.open(path, "rb", block_size=_CHUNK_BYTES, cache_type="none") as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk


# ---------------------------------------------------------------------------------------------- commands


def _pipe_chunks(remote: Remote, timeout_s: float) -> Generator[bytes, None, None]:
    command = remote.url.removeprefix(PIPE)
    with tempfile.TemporaryFile() as said:
        # pipefail: bash would otherwise tell of the last command of a pipeline only.
        process = subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            start_new_session=True,  # a group of its own, that can be ended as one
            pipesize=_PIPE_BYTES,
        )
        assert process.stdout is not None
        status = None
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ)
                while True:
                    if not selector.select(timeout_s):
                        raise RemoteFailure(f"{remote}: the command was silent for {timeout_s:g} s{_last_words(said)}")
                    if not (chunk := os.read(process.stdout.fileno(), _PIPE_BYTES)):
                        break
                    yield chunk
            try:
                status = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                raise RemoteFailure(f"{remote}: the command closed its output but did not end") from None
            _check_exit(remote, status, said)
        finally:
            process.stdout.close()
            if status is None:  # not waited for, so that its number is still its own
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _check_exit(remote: Remote, status: int, said: Any) -> None:
    if status == 0:
        return
    failed = f"{remote}: the command ended with status {status}{_last_words(said)}"
    if status in (126, 127):
        raise RemoteRefused(f"{failed}; install the program or mend the command")
    raise RemoteFailure(failed)


def _last_words(said: Any) -> str:
    """The end of what a command wrote on stderr."""
    said.seek(max(0, said.seek(0, os.SEEK_END) - 2000))
    words = " ".join(said.read().decode(errors="replace").split())[-300:]
    return f" ({redacted(words)})" if words else ""


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {redacted(' '.join(str(error).split()))[:300]}"


def local_path_of(entry: str) -> str:
    """`file:///a%20b` -> `/a b`; any other entry as it is."""
    return unquote(urlsplit(entry).path) if entry.startswith("file://") else entry
