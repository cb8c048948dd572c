"""A server that the real Hub client takes for the Hub: repositories, LFS, commits, branches, pull requests, faults.

Two ports of the loopback: the Hub, and the store that it redirects to for large files, as the real one does. State is
in memory and open to the tests. `plan` makes requests fail in a chosen way.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKENS = {"hf_write_token_of_me": ("me", "write"), "hf_read_token_of_me": ("me", "read")}
LFS_PATTERN = re.compile(r"\.(safetensors|onnx|gguf|bin|data|png)$")
"""What a model repository's .gitattributes keeps in LFS; pictures too, as Xet-backed repositories do."""
PAGE = 10
"""Entries of a tree on one page, few so that the client must turn pages."""
RELATIONS = ("finetune", "adapter", "merge", "quantized")
COLOURS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
LICENCES = {"apache-2.0", "mit", "gemma", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "cc-by-4.0", "other"}


@dataclass
class Fault:
    """A planned failure of the next `times` requests whose "METHOD /path" matches."""

    pattern: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    drop_after: int | None = None
    """Bytes of the request's (or, for a GET, the answer's) body after which the connection is cut."""
    after: bool = False
    """Do what was asked first, then fail: the answer is what gets lost."""
    delay: float = 0.0
    """Seconds before anything is done."""
    times: int = 1


@dataclass
class Repo:
    kind: str
    name: str
    private: bool
    commits: dict[str, dict[str, str]] = field(default_factory=dict)
    """Commit → path → hash of the blob."""
    refs: dict[str, str] = field(default_factory=dict)
    history: list[tuple[str, str, str]] = field(default_factory=list)
    """(ref, commit, message), oldest first."""
    sdk: str | None = None
    large: set[str] = field(default_factory=set)
    """SHA-256 of the large files that have arrived whole."""

    def commit(self, ref: str, tree: dict[str, str], message: str) -> str:
        seed = json.dumps([self.name, ref, len(self.history), sorted(tree.items())])
        sha = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[sha], self.refs[ref] = tree, sha
        self.history.append((ref, sha, message))
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)


class HubServer:
    """The state, and the two servers."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}
        """By git hash; for files in LFS by SHA-256."""
        self.requests: list[str] = []
        self.received = 0
        """Bytes of large files that arrived."""
        self.faults: list[Fault] = []
        self.between: Callable[[], object] | None = None
        """Done once, at the next question before a commit: what someone else does in the meantime."""
        self.lock = threading.RLock()
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, role)) for role in (Hub, Store)]
        self.url, self.store_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)

    def __enter__(self) -> HubServer:
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def plan(self, pattern: str, status: int = 0, **more: Any) -> None:
        self.faults.append(Fault(pattern, status, **more))

    def reset(self) -> None:
        """Forget faults, requests and counts; repositories stay."""
        self.between = None
        self.faults.clear()
        self.requests.clear()
        self.received = 0

    def repo(self, name: str, kind: str = "model") -> Repo:
        return self.repos[kind, name]

    def files(self, name: str, kind: str = "model", revision: str = "main") -> dict[str, bytes]:
        """What a repository holds, by path."""
        repo = self.repo(name, kind)
        return {path: self.blobs[oid] for path, oid in repo.commits[repo.refs[revision]].items()}

    def put(self, content: bytes, large: bool) -> str:
        oid = hashlib.sha256(content).hexdigest() if large else git_hash(content)
        self.blobs[oid] = content
        return oid


def is_large(oid: str) -> bool:
    """Whether a hash is one of a file in LFS: a SHA-256."""
    return len(oid) == 64


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def check_yaml(content: str) -> list[str]:
    """What the Hub's validate-yaml would complain about: the rules that cards of ours could break."""
    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    if not match:
        return []
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"YAML: {error}"]
    tags = data.get("tags", [])
    licence, colours = data.get("license", "other"), {data.get("colorFrom", "red"), data.get("colorTo", "red")}
    rules = {
        f'"license" must be one of {sorted(LICENCES)}': licence in LICENCES,
        '"license_name" needs "license: other"': "license_name" not in data or licence == "other",
        '"tags" must be an array of strings': isinstance(tags, list) and all(isinstance(tag, str) for tag in tags),
        '"base_model" must be the id of a model': re.fullmatch(r"[\w.-]+/[\w.-]+", str(data.get("base_model", "a/b"))),
        f'"base_model_relation" must be one of {RELATIONS}': data.get("base_model_relation", "merge") in RELATIONS,
        '"sdk_version" must be a version': re.fullmatch(r"\d+(\.\d+)+", str(data.get("sdk_version", "1.0"))),
        f'"colorFrom" and "colorTo" must be of {COLOURS}': colours <= set(COLOURS),
        '"short_description" must be at most 60 characters': len(data.get("short_description", "")) <= 60,
    }
    errors = [rule for rule, kept in rules.items() if not kept]
    for entry in data.get("model-index") or []:
        errors += _check_index(entry)
    return errors


def _check_index(entry: dict[str, Any]) -> list[str]:
    errors = [] if isinstance(entry.get("name"), str) else ['"model-index[].name" is required']
    for result in entry.get("results") or []:
        if not result.get("task", {}).get("type"):
            errors.append('"model-index[].results[].task.type" is required')
        if not {"name", "type"} <= set(result.get("dataset", {})):
            errors.append('"model-index[].results[].dataset" needs a name and a type')
        if not all(metric.get("type") and "value" in metric for metric in result.get("metrics") or [{}]):
            errors.append('"model-index[].results[].metrics[]" needs a type and a value')
    return errors


class RefusedError(Exception):
    def __init__(self, status: int, message: str = "", code: str = "", **body: Any) -> None:
        self.status, self.message, self.code, self.body = status, message, code, body


class _Base(BaseHTTPRequestHandler):
    """Reads a request, lets planned faults happen, and answers."""

    protocol_version = "HTTP/1.1"
    hub: HubServer
    routes: list[tuple[str, str, Callable[..., None]]] = []

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        what = f"{self.command} {unquote(parts.path)}"
        with self.hub.lock:
            self.hub.requests.append(f"{what} {self.headers.get('Range', '')}".strip())
            fault = next((f for f in self.hub.faults if f.times and re.search(f.pattern, what)), None)
            if fault:
                fault.times -= 1
        self.fault = fault
        if fault and fault.delay:
            time.sleep(fault.delay)
        if fault and fault.drop_after is not None and self.command != "GET":
            self.rfile.read(min(fault.drop_after, int(self.headers.get("Content-Length") or 0)))
            return self._cut()
        self.body = self._read()
        if fault and fault.status and not fault.after:
            return self.answer(fault.status, {"error": "planned"}, fault.headers)
        try:
            for method, pattern, action in self.routes:
                if self.command in method.split() and (match := re.fullmatch(pattern, parts.path)):
                    return action(self, *(unquote(group or "") for group in match.groups()))
            raise RefusedError(404, "No such address")
        except RefusedError as refused:
            headers = {"X-Error-Message": refused.message}
            if refused.code:
                headers["X-Error-Code"] = refused.code
            return self.answer(refused.status, {"error": refused.message, **refused.body}, headers)

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        if self.fault and self.fault.after:
            if not self.fault.status:
                return self._cut()
            status, data, self.fault = self.fault.status, b'{"error": "planned"}', None
        self.send_response(status)
        for key, value in {
            "Content-Length": str(len(data)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        if self.fault and self.fault.drop_after is not None:
            self.wfile.write(data[: self.fault.drop_after])
            self.wfile.flush()
            return self._cut()
        self.wfile.write(data)
        return None

    def content(self, data: bytes, headers: dict[str, str]) -> None:
        """Answer with a file, or with the range of it that was asked for."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
        if not asked:
            return self.answer(200, data, headers)
        first, last = int(asked[1]), int(asked[2] or len(data) - 1)
        if first >= len(data):
            return self.answer(416, b"", {**headers, "Content-Range": f"bytes */{len(data)}"})
        return self.answer(
            206,
            data[first : last + 1],
            {**headers, "Content-Range": f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"},
        )


class Store(_Base):
    """Where large files lie: no tokens, addresses that only the Hub gives out."""

    def put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise RefusedError(400, "The content is not what was announced")
        with self.hub.lock:
            self.hub.blobs[oid] = self.body
            self.hub.received += len(self.body)
        self.answer(200, b"", {"ETag": f'"{oid}"'})

    def get(self, oid: str) -> None:
        self.content(self.hub.blobs[oid], {"ETag": f'"{oid}"'})

    routes = [("PUT", r"/lfs/(\w+)", put), ("GET HEAD", r"/lfs/(\w+)", get)]


class Hub(_Base):
    """The Hub's own addresses."""

    def user(self) -> tuple[str, str] | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token:
            return None
        if token not in TOKENS:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return TOKENS[token]

    def need(self, name: str, right: str = "write") -> None:
        """Refuse whoever may not write there."""
        user = self.user()
        if user is None:
            raise RefusedError(401, "Invalid username or password.")
        if right == "write" and (user[1] != "write" or name.partition("/")[0] != user[0]):
            raise RefusedError(403, "You don't have the required permissions to perform this action")

    def find(self, kind: str, name: str) -> Repo:
        repo = self.hub.repos.get((kind, name))
        user = self.user()
        if repo is None or (repo.private and (user is None or user[0] != name.partition("/")[0])):
            raise RefusedError(404 if user else 401, "Repository not found", "RepoNotFound")
        return repo

    def at(self, repo: Repo, revision: str) -> str:
        sha = repo.resolve(revision)
        if sha is None:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    # -- repositories ---------------------------------------------------------------------------------------------

    def whoami(self) -> None:
        user = self.user()
        if user is None:
            raise RefusedError(401, "Invalid username or password.")
        self.answer(200, {"type": "user", "name": user[0], "orgs": []})

    def create(self) -> None:
        asked = json.loads(self.body)
        user = self.user()
        owner = asked.get("organization") or (user[0] if user else "")
        name, kind = f"{owner}/{asked['name']}", asked.get("type") or "model"
        self.need(name)
        url = f"{self.hub.url}/{'spaces/' if kind == 'space' else ''}{name}"
        with self.hub.lock:
            if (kind, name) in self.hub.repos:
                raise RefusedError(409, "You already created this repo", url=url)
            if kind == "space" and asked.get("sdk") not in ("gradio", "docker", "static"):
                raise RefusedError(400, "A Space needs an sdk")
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            repo = self.hub.repos[kind, name] = Repo(kind, name, private, sdk=asked.get("sdk"))
            repo.commit(
                "main", {".gitattributes": self.hub.put(b"*.safetensors filter=lfs\n", False)}, "initial commit"
            )
        self.answer(200, {"url": url, "name": name, "id": name})

    def info(self, kind: str, name: str, revision: str = "main") -> None:
        repo = self.find(kind, name)
        sha = self.at(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(repo.commits[sha])]
        self.answer(200, {"_id": "0" * 24, "id": name, "sha": sha, "private": repo.private, "siblings": siblings})

    def tree(self, kind: str, name: str, revision: str) -> None:
        repo = self.find(kind, name)
        sha = self.at(repo, revision)
        entries = [self.entry(path, oid) for path, oid in sorted(repo.commits[sha].items())]
        start = int(self.query.get("cursor", 0))
        headers = {}
        if start + PAGE < len(entries):
            address = f"{self.hub.url}/api/{kind}s/{name}/tree/{revision}?recursive=true&cursor={start + PAGE}"
            headers["Link"] = f'<{address}>; rel="next"'
        self.answer(200, entries[start : start + PAGE], headers)

    def entry(self, path: str, oid: str) -> dict[str, Any]:
        content = self.hub.blobs[oid]
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": oid}
        if is_large(oid):
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n".encode()
            entry |= {"oid": git_hash(pointer), "lfs": {"oid": oid, "size": len(content), "pointerSize": len(pointer)}}
        return entry

    def branch(self, kind: str, name: str, branch: str) -> None:
        repo = self.find(kind, name)
        self.need(name)
        with self.hub.lock:
            if branch in repo.refs:
                raise RefusedError(409, f"Reference refs/heads/{branch} already exists")
            repo.refs[branch] = self.at(repo, json.loads(self.body or b"{}").get("startingPoint") or "main")
        self.answer(200, {})

    # -- writing --------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        errors = check_yaml(json.loads(self.body)["content"])
        self.answer(400 if errors else 200, {"errors": [{"message": e} for e in errors], "warnings": []})

    def preupload(self, kind: str, name: str, revision: str) -> None:
        repo = self.find(kind, name)
        self.need(name, "read" if self.query.get("create_pr") else "write")
        tree = repo.commits[self.at(repo, revision)]
        if self.hub.between:
            self.hub.between()
            self.hub.between = None
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if LFS_PATTERN.search(file["path"]) else "regular",
                "shouldIgnore": False,
                **({"oid": tree[file["path"]]} if file["path"] in tree else {}),
            }
            for file in json.loads(self.body)["files"]
        ]
        self.answer(200, {"files": files})

    def batch(self, prefix: str, name: str) -> None:
        repo = self.find("space" if prefix else "model", name)
        if self.user() is None:
            raise RefusedError(401, "Invalid username or password.")
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            if wanted["oid"] not in repo.large:
                upload = {"href": f"{self.hub.store_url}/lfs/{wanted['oid']}"}
                verify = {"href": f"{self.hub.url}/verify/{repo.kind}/{name}"}
                wanted = {**wanted, "actions": {"upload": upload, "verify": verify}}
            objects.append(wanted)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def verify(self, kind: str, name: str) -> None:
        asked = json.loads(self.body)
        content = self.hub.blobs.get(asked["oid"])
        if content is None or len(content) != asked["size"]:
            raise RefusedError(404, "The object has not arrived")
        with self.hub.lock:
            self.find(kind, name).large.add(asked["oid"])
        self.answer(200, {})

    def commit(self, kind: str, name: str, revision: str) -> None:
        repo = self.find(kind, name)
        pull_request = self.query.get("create_pr") == "1"
        self.need(name, "read" if pull_request else "write")
        lines = [json.loads(line) for line in self.body.splitlines()]
        with self.hub.lock:
            head = self.at(repo, revision)
            header = lines[0]["value"]
            if not pull_request and header.get("parentCommit", head) != head:
                raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
            tree = dict(repo.commits[header.get("parentCommit", head)])
            for line in lines[1:]:
                self.apply(line["key"], line["value"], tree, repo)
            ref = revision
            if pull_request:
                ref = f"refs/pr/{1 + sum(r.startswith('refs/pr/') for r in repo.refs)}"
            sha = repo.commit(ref, tree, header["summary"])
        url = f"{self.hub.url}/{name}/discussions/{ref.rpartition('/')[2]}" if pull_request else None
        self.answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha, "pullRequestUrl": url})

    def apply(self, key: str, value: dict[str, Any], tree: dict[str, str], repo: Repo) -> None:
        if key == "file":
            tree[value["path"]] = self.hub.put(base64.b64decode(value["content"]), False)
        elif key == "lfsFile":
            if value["oid"] not in repo.large:
                raise RefusedError(400, f"LFS object {value['oid']} of {value['path']} is missing")
            tree[value["path"]] = value["oid"]
        elif key == "deletedFile":
            if tree.pop(value["path"], None) is None:
                raise RefusedError(404, "A file with this name doesn't exist", "EntryNotFound")
        else:
            raise RefusedError(400, f"Unknown operation {key}")

    # -- reading --------------------------------------------------------------------------------------------------

    def resolve(self, prefix: str, name: str, revision: str, path: str) -> None:
        repo = self.find("space" if prefix else "model", name)
        sha = self.at(repo, revision)
        oid = repo.commits[sha].get(path)
        if oid is None:
            raise RefusedError(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{oid}"'}
        if is_large(oid):
            size = str(len(self.hub.blobs[oid]))
            linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": size}
            return self.answer(302, b"", {**headers, **linked, "Location": f"{self.hub.store_url}/lfs/{oid}"})
        return self.content(self.hub.blobs[oid], headers)

    _REPO = r"/api/(model|space)s/([^/]+/[^/]+)"
    routes = [
        ("GET", r"/api/whoami-v2", whoami),
        ("POST", r"/api/repos/create", create),
        ("POST", r"/api/validate-yaml", validate),
        ("GET", _REPO, info),
        ("GET", _REPO + r"/revision/([^/]+)", info),
        ("GET", _REPO + r"/tree/([^/]+)", tree),
        ("POST", _REPO + r"/branch/([^/]+)", branch),
        ("POST", _REPO + r"/preupload/([^/]+)", preupload),
        ("POST", _REPO + r"/commit/([^/]+)", commit),
        ("POST", r"/(spaces/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", batch),
        ("POST", r"/verify/(model|space)/(.+)", verify),
        ("GET HEAD", r"/(spaces/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", resolve),
    ]


def _handler(server: HubServer, role: type[_Base]) -> type[_Base]:
    return type(role.__name__, (role,), {"hub": server})
