"""A hub on localhost for the real clients of ModelScope and Hugging Face.

`LocalHub` answers the requests that `modelscope.snapshot_download`, `dataset_snapshot_download` and
`huggingface_hub.snapshot_download` make, from plain folders, and can cut, corrupt or refuse a file:

    with LocalHub() as hub:
        hub.add_model("DiffSynth-Studio/ImageMetrics", folder)
        subprocess.run([...], env={**os.environ, **hub.environment()})
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_DEFAULT_REVISIONS = {"master", "main"}
_EVIL = b"evil"


class LocalHub:
    """A small hub that serves folders as repositories.

    Attributes:
        requests: Every request as ``"GET /path?query"``, followed by its ``Range`` if it has one.
        delay: Seconds to wait before the bytes of a file, to make downloads overlap.
        stalls: How many times more the second half of a file is held back until the client gives up.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.delay = 0.0
        self.stalls = 0
        self._extra: dict[str, dict[str, object]] = {}
        self._repositories: dict[tuple[str, str], dict[str, Path]] = {}
        self._cuts: dict[str, int] = {}
        self._corrupt: set[str] = set()
        self._refused: dict[str, int] = {}

    def __enter__(self) -> LocalHub:
        hub = self

        class Handler(_Handler):
            def __init__(self, *args: object) -> None:
                self.hub = hub
                super().__init__(*args)  # type: ignore[arg-type]

        self._home = tempfile.TemporaryDirectory(prefix="hub-")
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
        self._home.cleanup()

    def stop(self) -> None:
        """Close the port, so that every further connection is refused."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def add_model(self, name: str, folder: os.PathLike[str], revision: str | None = None) -> None:
        """Serve a folder as a model, for one revision or as the default one."""
        self._repositories.setdefault(("models", name), {})[revision or "main"] = Path(folder)

    def add_dataset(self, name: str, folder: os.PathLike[str], revision: str | None = None) -> None:
        """Serve a folder as a dataset, for one revision or as the default one."""
        self._repositories.setdefault(("datasets", name), {})[revision or "main"] = Path(folder)

    def remove_model(self, name: str) -> None:
        """Answer from now on that there is no such model."""
        del self._repositories["models", name]

    def cut_once(self, path: str, after_bytes: int) -> None:
        """Drop the connection after that many bytes, the next time this file is sent."""
        self._cuts[path] = after_bytes

    def corrupt(self, path: str) -> None:
        """Send wrong bytes for this file, while the listing keeps the right hash."""
        self._corrupt.add(path)

    def send_correctly(self, path: str) -> None:
        """Send the right bytes again of a file that was corrupted."""
        self._corrupt.discard(path)

    def list_also(self, path: object, **fields: object) -> None:
        """List one more file, of any name, whose bytes are ``b"evil"``.

        `fields` may have a wrong ``size``, ``sha256`` or ``type``, which are right by default.
        """
        self._extra[str(path)] = {"path": path, **fields}

    def list_no_more(self) -> None:
        """Take back what :meth:`list_also` added."""
        self._extra.clear()

    def refuse(self, path: str, status: int) -> None:
        """Answer requests for the bytes of this file with that HTTP status."""
        self._refused[path] = status

    def environment(self) -> dict[str, str]:
        """Return the variables that lead both clients here, and to no other host."""
        home = self._home.name
        return {
            "MODELSCOPE_ENDPOINT": self.url,
            "MODELSCOPE_CACHE": f"{home}/modelscope",
            "MODELSCOPE_HOME": f"{home}/modelscope_home",
            # No question about the region of the machine, and no long wait for a dead hub. The
            # client reads the number when it is imported, so it only holds in a new process.
            "MODELSCOPE_DOWNLOAD_INTRA_CLOUD": "false",
            "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1",
            "HF_ENDPOINT": self.url,
            "HF_HOME": f"{home}/huggingface",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def file_requests(self, path: str) -> list[str]:
        """Return the requests for the bytes of one file, whichever the client."""
        ends = (f"FilePath={path}", f"/{path}")
        requests = [request for request in self.requests if request.startswith("GET ")]
        return [request for request in requests if unquote(request).split(" ")[1].endswith(ends)]


class _Handler(BaseHTTPRequestHandler):
    """The requests of the clients, by the shape of their paths.

    HTTP/1.0 closes each connection, so that nothing is left of a hub that is stopped.
    """

    hub: LocalHub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        ranged = self.headers.get("Range")
        self.hub.requests.append(f"{self.command} {self.path}" + (f" {ranged}" if ranged else ""))
        url = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        parts = unquote(url.path).strip("/").split("/")
        if parts[:2] == ["api", "v1"]:
            self._modelscope(parts[2:], query)
        elif parts[0] == "api":
            self._huggingface(parts[1:], query)
        else:
            self._huggingface_file(parts)

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent: `LocalHub.requests` is the log."""

    # ModelScope: /api/v1/{models,datasets}/{owner}/{name}[/repo[/files|/tree]]

    def _modelscope(self, parts: list[str], query: dict[str, str]) -> None:
        if parts == ["repos", "internalAccelerationInfo"]:
            self._send_json({"Code": 200, "Data": {}, "Success": True})
            return
        kind, name, rest = parts[0], "/".join(parts[1:3]), parts[3:]
        folder = self._folder(kind, name, query.get("Revision", "master"))
        if folder is None:
            self._modelscope_missing(f"{kind} {name} does not exist")
        elif not rest:
            self._send_json({"Code": 200, "Data": {"Name": name}, "Success": True})
        elif rest == ["repo"]:
            if query["FilePath"] in [*_files(folder), *self.hub._extra]:
                self._send_file(folder, query["FilePath"], {})
            else:
                self._modelscope_missing(f"no file {query['FilePath']}")
        else:
            self._modelscope_listing(folder, query)

    def _modelscope_listing(self, folder: Path, query: dict[str, str]) -> None:
        root = query.get("Root", "").strip("/")
        if not (folder / root).is_dir():
            self._modelscope_missing(f"no folder {root}")
            return
        names = [name for name in _files(folder) if not root or name.startswith(root + "/")]
        if "PageNumber" in query:
            size = int(query["PageSize"])
            start = size * (int(query["PageNumber"]) - 1)
            names = names[start : start + size]
        entries = [
            {
                "Name": name.rpartition("/")[2],
                "Path": name,
                "Type": "blob",
                "Size": (folder / name).stat().st_size,
                "Sha256": _sha256(folder / name),
                "IsLFS": True,
            }
            for name in names
        ]
        for extra in self.hub._extra.values():
            fields = {"size": len(_EVIL), "sha256": hashlib.sha256(_EVIL).hexdigest(), **extra}
            entry = {name.capitalize(): value for name, value in fields.items()}
            entries.append({"Type": "blob", **entry})
        self._send_json({"Code": 200, "Data": {"Files": entries}, "Success": True})

    def _modelscope_missing(self, message: str) -> None:
        error = {"Code": 10010205001, "Message": message, "RequestId": "0", "Success": False}
        self._send_json(error, status=404)

    # Hugging Face: /api/{models,datasets}/{owner}/{name}[/revision/{r}|/tree/{r}], and the files
    # under [/datasets]/{owner}/{name}/resolve/{r}/{path}

    def _huggingface(self, parts: list[str], query: dict[str, str]) -> None:
        kind, name, rest = parts[0], "/".join(parts[1:3]), parts[3:]
        folder = self._huggingface_folder(kind, name, rest[1] if len(rest) > 1 else "main")
        if folder is None:
            return
        files = _files(folder)
        entries = [{"path": path, **_lfs_or_blob(folder / path)} for path in files]
        for extra in self.hub._extra.values():
            digest = extra.get("sha256", hashlib.sha256(_EVIL).hexdigest())
            size = extra.get("size", len(_EVIL))
            lfs = {"sha256": digest, "oid": digest, "size": size, "pointerSize": 134}
            entries.append({"path": extra["path"], "size": size, "oid": "0" * 40, "lfs": lfs})
        if rest[:1] == ["tree"]:
            self._send_json([{"type": "file", **entry} for entry in entries])
            return
        siblings = [
            {**entry, "rfilename": entry["path"], "blobId": entry["oid"]}
            if "blobs" in query
            else {"rfilename": entry["path"]}
            for entry in entries
        ]
        self._send_json({"id": name, "sha": _commit(folder), "siblings": siblings, "tags": []})

    def _huggingface_file(self, parts: list[str]) -> None:
        kind = "datasets" if parts[0] == "datasets" else "models"
        parts = parts[1:] if kind == "datasets" else parts
        if parts[2:3] != ["resolve"]:
            self._send_json({"error": "Not found"}, status=404)
            return
        folder = self._huggingface_folder(kind, "/".join(parts[:2]), parts[3])
        path = "/".join(parts[4:])
        if folder is None:
            return
        if path not in [*_files(folder), *self.hub._extra]:
            self._huggingface_missing("EntryNotFound")
            return
        known = _lfs_or_blob(folder / path) if path not in self.hub._extra else {}
        etag = f'"{known["lfs"]["oid"] if "lfs" in known else known.get("oid", "0" * 40)}"'
        headers = {"ETag": etag, "X-Linked-ETag": etag, "X-Repo-Commit": _commit(folder)}
        self._send_file(folder, path, headers)

    def _huggingface_folder(self, kind: str, name: str, revision: str) -> Path | None:
        folder = self._folder(kind, name, revision)
        if folder is None:
            known = (kind, name) in self.hub._repositories
            self._huggingface_missing("RevisionNotFound" if known else "RepoNotFound")
        return folder

    def _huggingface_missing(self, code: str) -> None:
        self._send_json({"error": code}, status=404, headers={"X-Error-Code": code})

    # Both

    def _folder(self, kind: str, name: str, revision: str) -> Path | None:
        revisions = self.hub._repositories.get((kind, name), {})
        if revision in _DEFAULT_REVISIONS:
            return revisions.get("main")
        commits = {_commit(folder): folder for folder in revisions.values()}
        return revisions.get(revision, commits.get(revision))

    def _send_json(
        self, value: object, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        body = json.dumps(value).encode()
        headers = {"Content-Type": "application/json", **(headers or {})}
        self._send_headers(status, {**headers, "Content-Length": str(len(body))})
        if self.command == "GET":
            self.wfile.write(body)

    def _send_file(self, folder: Path, path: str, headers: dict[str, str]) -> None:
        if path in self.hub._refused:
            words = "the hub is being repaired"
            self._send_json(
                {"Message": words, "error": words},
                self.hub._refused[path],
                {"X-Error-Message": words},
            )
            return
        content = _EVIL if path in self.hub._extra else (folder / path).read_bytes()
        if path in self.hub._corrupt:
            content = bytes(255 - byte for byte in content)
        total, start, status = len(content), 0, 200
        headers = {**headers, "Accept-Ranges": "bytes"}
        if ranged := self.headers.get("Range"):
            first, _, last = ranged.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or total - 1), total - 1)
            if start >= total:
                self._send_headers(416, {"Content-Range": f"bytes */{total}"})
                return
            content, status = content[start : end + 1], 206
            headers["Content-Range"] = f"bytes {start}-{end}/{total}"
        self._send_headers(status, {**headers, "Content-Length": str(len(content))})
        if self.command == "HEAD":
            return
        time.sleep(self.hub.delay)
        if self.hub.stalls > 0:
            self.hub.stalls -= 1
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.connection.settimeout(30)
            self.connection.recv(1)  # returns when the client has closed the connection
            return
        cut = self.hub._cuts.pop(path, None)
        self.wfile.write(content[:cut])

    def _send_headers(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def _files(folder: Path) -> list[str]:
    """Return the names of all files below a folder, with forward slashes."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return sorted(file.relative_to(folder).as_posix() for file in files)


def _lfs_or_blob(file: Path) -> dict[str, Any]:
    """Return what Hugging Face lists of a file: large ones by sha256, others by git's digest."""
    content = file.read_bytes()
    blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    if file.suffix != ".safetensors":
        return {"size": len(content), "oid": blob}
    digest = hashlib.sha256(content).hexdigest()
    lfs = {"sha256": digest, "oid": digest, "size": len(content), "pointerSize": 134}
    return {"size": len(content), "oid": hashlib.sha1(digest.encode()).hexdigest(), "lfs": lfs}


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _commit(folder: Path) -> str:
    """Return a commit hash that stands for what is in the folder."""
    content = "".join(f"{name}:{_sha256(folder / name)}\n" for name in _files(folder))
    return hashlib.sha1(content.encode()).hexdigest()
