"""A Hub on 127.0.0.1 for tests: enough of its HTTP API for the real client, transformers and the `hf` command.

    with LoopbackHub(folder) as hub:
        subprocess.run(..., env={**os.environ, **hub.environment(home)})

The client freezes its environment when it is imported, so everything that talks to this Hub is a child process. Commits are kept in
memory, contents on disk; a Space's name begins with `spaces/`. Large files travel by LFS (`xet=False`) or by hf_xet's own file-backed store (`xet=True`).

`hub.faults` holds what goes wrong, each once or `times`: `{"method", "path", ...}`, a regular expression for the path, and one of
`status` (answer so, with `headers`), `cut` (close the connection after so many bytes of the body), `lose_answer` (do it, but close the
connection) and `before` (call a function first, then go on). `hub.requests` lists what was asked.
"""

import base64
import hashlib
import json
import re
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


LARGE = (".safetensors", ".bin", ".pt", ".parquet", ".png", ".jpg")
TOKENS = {"hf_loopbackwriter": ("user", "write"), "hf_loopbackreader": ("reader", "read")}


@dataclass
class Blob:
    """One file of a commit: git's hash of its content (or of its LFS pointer), and the SHA-256 of a large one."""

    oid: str
    size: int
    sha256: str | None = None


@dataclass
class Commit:
    sha: str
    parent: str | None
    title: str
    files: dict[str, Blob]


@dataclass
class Repository:
    private: bool
    refs: dict[str, str] = field(default_factory=dict)  # branches and pull requests
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, Blob], title: str) -> str:
        parent = self.refs.get(ref)
        sha = hashlib.sha1(f"{parent}{title}{time.time_ns()}{sorted(files)}".encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent, title, files)
        self.refs[ref] = sha
        return sha

    def history(self, ref: str = "main") -> list[str]:
        """Titles, the newest first."""
        titles, sha = [], self.refs[ref]
        while sha:
            titles.append(self.commits[sha].title)
            sha = self.commits[sha].parent
        return titles


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None):
        self.status, self.message, self.headers = (
            status,
            message,
            {**(headers or {}), **({"X-Error-Code": code} if code else {})},
        )


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def card_errors(text: str) -> list[str]:
    """A small part of what the Hub checks of a README.md."""
    match = re.match(r"^---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    if not match:
        return []
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"invalid YAML: {error}"]
    kinds = {"license": str, "pipeline_tag": str, "library_name": str, "tags": list, "model-index": list}
    wrong = [name for name, kind in kinds.items() if name in data and not isinstance(data[name], kind)]
    return [f'"{name}" must be a {kinds[name].__name__}' for name in wrong]


class LoopbackHub:
    """The server, in a thread; `repositories` can be looked into and changed by a test."""

    def __init__(self, folder: Path, xet: bool = False, part_size: int | None = None):
        self.folder, self.xet, self.part_size = Path(folder).resolve(), xet, part_size
        for name in ("git", "lfs", "xet"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[dict] = []
        self.faults: list[dict] = []
        self.lock = threading.RLock()
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path, token: str | None = "hf_loopbackwriter", **more: str) -> dict[str, str]:
        """What a child process needs to take this for the Hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "0" if self.xet else "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            **({"HF_TOKEN": token} if token else {}),
            **more,
        }

    def create(self, name: str, private: bool = True) -> Repository:
        repository = Repository(private)
        self.repositories[name] = repository
        repository.commit("main", {".gitattributes": self.store(b"*.safetensors filter=lfs\n")}, "initial commit")
        return repository

    def store(self, content: bytes) -> Blob:
        oid = git_hash(content)
        (self.folder / "git" / oid).write_bytes(content)
        return Blob(oid, len(content))

    def files(self, name: str, ref: str = "main") -> dict[str, Blob]:
        repository = self.repositories[name]
        return repository.commits[repository.refs[ref]].files

    def content(self, blob: Blob) -> bytes:
        return (self.folder / ("lfs" if blob.sha256 else "git") / (blob.sha256 or blob.oid)).read_bytes()

    def asked(self, method: str, path: str) -> list[dict]:
        """The requests of a method whose path holds a regular expression."""
        return [r for r in self.requests if r["method"] == method and re.search(path, r["path"])]

    def has_large(self, sha256: str) -> bool:
        return (self.folder / "lfs" / sha256).is_file() or (self.xet and sha256 in self.xet_hashes())

    def xet_hashes(self) -> dict[str, str]:
        """SHA-256 -> Xet hash, from the shard files of hf_xet's file-backed store.

        A shard is a header of 48 bytes, then file entries of 48 bytes each: a hash, flags, a count of segments; verification entries
        and one with the SHA-256 follow as the flags say; 32 bytes of 0xff end them.
        """

        def hexadecimal(raw: bytes) -> str:
            return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))

        found = {}
        for file in (self.folder / "xet").rglob("*.mdb"):
            data, place = file.read_bytes(), 48
            while place + 48 <= len(data) and (name := data[place : place + 32]) != b"\xff" * 32:
                flags, segments = struct.unpack_from("<II", data, place + 32)
                place += 48 * (1 + segments * (2 if flags >> 31 & 1 else 1))
                if flags >> 30 & 1:
                    found[hexadecimal(data[place : place + 32])] = hexadecimal(name)
                    place += 48
        return found


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    hub: LoopbackHub

    def log_message(self, *_) -> None:
        pass

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        self.parts = [unquote(part) for part in url.path.split("/") if part]
        entry = {"method": self.command, "path": self.path, "status": 0, "token": self.headers.get("Authorization")}
        with self.hub.lock:
            self.hub.requests.append(entry)
            fault = self._fault()
        try:
            if fault and "cut" in fault:
                self.rfile.read(min(fault["cut"], int(self.headers.get("Content-Length") or 0)))
                self.close_connection = True
                self.connection.close()
                return
            self.body = self._read_body()
            entry["bytes"] = len(self.body)
            if fault and "before" in fault:
                fault["before"]()
            if fault and "status" in fault:
                raise Refused(fault["status"], "a fault of the test", headers=fault.get("headers"))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip()
            if token and token not in TOKENS and self.parts[:1] != ["large"]:
                raise Refused(401, "Invalid credentials in Authorization header")
            self.user, self.role = TOKENS.get(token, (None, None))
            status, data, headers = self._route()
            if fault and fault.get("lose_answer"):
                self.close_connection = True
                self.connection.close()
                return
        except Refused as refusal:
            status, data = refusal.status, {"error": refusal.message}
            headers = {**refusal.headers, "X-Error-Message": refusal.message.replace("\n", " ")}
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
            return
        entry["status"] = status
        self._reply(status, data, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def _fault(self) -> dict | None:
        for fault in self.hub.faults:
            if fault.get("times", 1) > 0 and fault["method"] == self.command and re.search(fault["path"], self.path):
                fault["times"] = fault.get("times", 1) - 1
                return fault
        return None

    def _read_body(self) -> bytes:
        if "chunked" not in (self.headers.get("Transfer-Encoding") or "").lower():
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _reply(self, status: int, data, headers: dict) -> None:
        is_json = not isinstance(data, bytes)
        content = json.dumps(data).encode() if is_json else data
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json" if is_json else "application/octet-stream")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _route(self) -> tuple[int, object, dict]:
        parts, method = self.parts, self.command
        if parts == ["api", "whoami-v2"]:
            if self.user is None:
                raise Refused(401, "Invalid username or password.")
            token = {"accessToken": {"displayName": "test", "role": self.role}, "type": "access_token"}
            return 200, {"type": "user", "name": self.user, "fullname": self.user, "orgs": [], "auth": token}, {}
        if parts == ["api", "validate-yaml"]:
            errors = card_errors(json.loads(self.body)["content"])
            return (400 if errors else 200), {"errors": [{"message": e} for e in errors], "warnings": []}, {}
        if parts == ["api", "repos", "create"]:
            return self._create()
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            return self._api("/".join(parts[2:4]), parts[4:], method)
        if parts[:2] == ["api", "spaces"] and len(parts) >= 4:
            return self._api("/".join(parts[1:4]), parts[4:], method)
        if parts[:1] == ["spaces"] and len(parts) >= 6 and parts[3] in ("resolve", "raw"):
            return self._resolve("/".join(parts[:3]), parts[4], "/".join(parts[5:]))
        if parts[:1] == ["large"]:
            return self._download_large(parts[1])
        if parts[:1] == ["upload"]:
            return self._upload(parts[1], parts[2] if len(parts) > 2 else None)
        if parts[-4:] == ["info", "lfs", "objects", "batch"]:
            self._repository("/".join(parts[:-4]).removesuffix(".git"), write=True)
            return self._batch()
        if len(parts) >= 5 and parts[2] in ("resolve", "raw"):
            return self._resolve(f"{parts[0]}/{parts[1]}", parts[3], "/".join(parts[4:]))
        raise Refused(404, f"{method} {self.path} is not part of this Hub")

    # Repositories

    def _repository(self, name: str, write: bool = False) -> Repository:
        repository = self.hub.repositories.get(name)
        owner = name.split("/")[-2]
        if repository is None or (repository.private and self.user != owner):
            raise Refused(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write:
            self._must_write(owner)
        return repository

    def _must_write(self, namespace: str) -> None:
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        if self.role != "write" or self.user != namespace:
            raise Refused(403, f"You don't have the rights to write under the namespace {namespace!r}")

    def _commit_of(self, repository: Repository, revision: str) -> Commit:
        sha = repository.refs.get(revision) or repository.tags.get(revision) or revision
        if sha not in repository.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository.commits[sha]

    def _create(self) -> tuple[int, object, dict]:
        wanted = json.loads(self.body)
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        namespace = wanted.get("organization") or self.user
        self._must_write(namespace)
        name = f"{namespace}/{wanted['name']}"
        if wanted.get("type") == "space":
            if wanted.get("sdk") not in ("gradio", "docker", "static"):
                raise Refused(400, "A Space needs an sdk")
            name = f"spaces/{name}"
        answer = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        with self.hub.lock:
            if name in self.hub.repositories:
                return 409, {"error": "You already created this model repo", **answer}, {}
            self.hub.create(name, wanted.get("visibility") == "private" or bool(wanted.get("private")))
        return 200, answer, {}

    def _api(self, name: str, rest: list[str], method: str) -> tuple[int, object, dict]:
        head = rest[0] if rest else "revision"
        revision = rest[1] if len(rest) > 1 else "main"
        if method == "GET" and head == "revision":
            return 200, self._info(name, self._commit_of(self._repository(name), revision)), {}
        if method == "GET" and head == "tree":
            return self._tree(self._commit_of(self._repository(name), revision), "/".join(rest[2:]))
        if method == "GET" and head == "refs":
            return 200, self._refs(self._repository(name)), {}
        if head in ("xet-read-token", "xet-write-token"):
            self._repository(name, write=head == "xet-write-token")
            store, until = f"local://{self.hub.folder / 'xet'}", int(time.time()) + 3600
            headers = {"X-Xet-Cas-Url": store, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(until)}
            return 200, {"accessToken": "xet", "exp": until, "casUrl": store}, headers
        proposes = bool(self.query.get("create_pr"))
        repository = self._repository(name, write=not proposes)
        if method == "POST" and head == "preupload":
            return self._preupload(self._commit_of(repository, revision))
        if method == "POST" and head == "commit":
            return self._commit(name, repository, revision, proposes)
        if method == "POST" and head in ("branch", "tag"):
            wanted = json.loads(self.body or b"{}")
            table, new = (repository.refs, revision) if head == "branch" else (repository.tags, wanted["tag"])
            if new in table:
                raise Refused(409, f"Reference already exists: {new}")
            table[new] = self._commit_of(
                repository, wanted.get("startingPoint", "main") if head == "branch" else revision
            ).sha
            return 200, {}, {}
        raise Refused(404, f"{method} {self.path} is not part of this Hub")

    # Reading

    def _entry(self, path: str, blob: Blob) -> dict:
        entry = {"type": "file", "path": path, "size": blob.size, "oid": blob.oid}
        if blob.sha256:
            size = len(pointer(blob.sha256, blob.size))
            entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": size}
            if self.hub.xet:
                entry["xetHash"] = self.hub.xet_hashes().get(blob.sha256)
        return entry

    def _tree(self, commit: Commit, prefix: str) -> tuple[int, object, dict]:
        files = {path: blob for path, blob in commit.files.items() if not prefix or path.startswith(f"{prefix}/")}
        folders = {path.rsplit("/", 1)[0] for path in files if "/" in path}
        found = [
            {"type": "directory", "path": path, "size": 0, "oid": git_hash(path.encode())} for path in sorted(folders)
        ]
        return 200, [*found, *(self._entry(path, blob) for path, blob in sorted(files.items()))], {}

    def _info(self, name: str, commit: Commit) -> dict:
        repository = self.hub.repositories[name]
        siblings = []
        for path, blob in sorted(commit.files.items()):
            sibling = {"rfilename": path, "size": blob.size, "blobId": blob.oid}
            if blob.sha256:
                sibling["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": 130}
            siblings.append(sibling)
        return {
            "_id": "0",
            "id": name,
            "modelId": name,
            "sha": commit.sha,
            "private": repository.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": siblings,
            "spaces": [],
            "pipeline_tag": "image-text-to-text",
            "library_name": "transformers",
        }

    def _refs(self, repository: Repository) -> dict:
        def ref(name: str, kind: str, sha: str) -> dict:
            return {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha}

        branches = [ref(n, "heads", sha) for n, sha in repository.refs.items() if not n.startswith("refs/")]
        return {
            "branches": branches,
            "tags": [ref(n, "tags", sha) for n, sha in repository.tags.items()],
            "converts": [],
        }

    def _resolve(self, name: str, revision: str, path: str) -> tuple[int, object, dict]:
        commit = self._commit_of(self._repository(name), revision)
        blob, headers = commit.files.get(path), {"X-Repo-Commit": commit.sha}
        if blob is None:
            raise Refused(404, "Entry not found", "EntryNotFound", headers)
        if blob.sha256 is None:
            return 200, self.hub.content(blob), {**headers, "ETag": f'"{blob.oid}"'}
        headers |= {"X-Linked-Size": str(blob.size), "X-Linked-ETag": f'"{blob.sha256}"', "ETag": f'"{blob.oid}"'}
        if self.hub.xet and (xet_hash := self.hub.xet_hashes().get(blob.sha256)):
            headers["X-Xet-Hash"] = xet_hash
            headers["Link"] = f'<{self.hub.url}/api/models/{name}/xet-read-token/{commit.sha}>; rel="xet-auth"'
        # Another origin, as the Hub's storage is: the token must not follow.
        headers["Location"] = f"http://localhost:{self.server.server_port}/large/{blob.sha256}"
        return 302, b"", headers

    def _download_large(self, sha256: str) -> tuple[int, object, dict]:
        file = self.hub.folder / "lfs" / sha256
        if not file.is_file():
            raise Refused(404, "not here")
        content = file.read_bytes()
        headers = {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"}
        wanted = re.match(r"bytes=(\d+)-(\d*)$", self.headers.get("Range") or "")
        if not wanted or int(wanted[1]) >= len(content):
            return 200, content, headers
        first, last = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
        return 206, content[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}

    # Writing

    def _preupload(self, commit: Commit) -> tuple[int, object, dict]:
        files = []
        for wanted in json.loads(self.body)["files"]:
            is_large = wanted["path"].endswith(LARGE) or b"\0" in base64.b64decode(wanted.get("sample") or "")
            known = commit.files.get(wanted["path"])
            files.append(
                {
                    "path": wanted["path"],
                    "uploadMode": "lfs" if is_large else "regular",
                    "shouldIgnore": False,
                    "oid": (known.sha256 or known.oid) if known else None,
                }
            )
        return 200, {"files": files, "commitOid": commit.sha}, {}

    def _batch(self) -> tuple[int, object, dict]:
        wanted, objects = json.loads(self.body), []
        for item in wanted["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if not self.hub.has_large(item["oid"]):
                href = f"{self.hub.url}/upload/{item['oid']}"
                upload: dict = {"href": href}
                if self.hub.part_size and item["size"] > self.hub.part_size and "multipart" in wanted["transfers"]:
                    count = -(-item["size"] // self.hub.part_size)
                    upload["header"] = {"chunk_size": str(self.hub.part_size)}
                    upload["header"] |= {str(part): f"{href}/{part}" for part in range(1, count + 1)}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{href}/verify"}}
            objects.append(answer)
        return 200, {"transfer": "basic", "objects": objects}, {}

    def _upload(self, sha256: str, part: str | None) -> tuple[int, object, dict]:
        file = self.hub.folder / "lfs" / sha256
        if part == "verify":
            if not file.is_file() or file.stat().st_size != json.loads(self.body)["size"]:
                raise Refused(404, "object missing or of another size")
            return 200, {}, {}
        if part is not None:
            file.with_suffix(f".part{int(part)}").write_bytes(self.body)
            return 200, b"", {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'}
        content = self.body
        if self.command == "POST":
            numbers = [item["partNumber"] for item in json.loads(self.body)["parts"]]
            content = b"".join(file.with_suffix(f".part{number}").read_bytes() for number in numbers)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise Refused(400, "another SHA-256")
        unfinished = file.with_suffix(f".{threading.get_ident()}")
        unfinished.write_bytes(content)
        unfinished.replace(file)
        return 200, {}, {}

    def _commit(self, name: str, repository: Repository, revision: str, proposes: bool) -> tuple[int, object, dict]:
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self.hub.lock:
            base = self._commit_of(repository, revision)
            if header.get("parentCommit") and header["parentCommit"] != base.sha:
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            files = dict(base.files)
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    content = base64.b64decode(value["content"])
                    if value["path"] == "README.md" and (errors := card_errors(content.decode())):
                        raise Refused(400, f"Invalid metadata in README.md: {errors}")
                    files[value["path"]] = self.hub.store(content)
                elif line["key"] == "lfsFile":
                    if not self.hub.has_large(value["oid"]):
                        raise Refused(400, f"{value['path']}: never uploaded")
                    blob = Blob(git_hash(pointer(value["oid"], value["size"])), value["size"], value["oid"])
                    files[value["path"]] = blob
                elif line["key"] == "deletedFile" and files.pop(value["path"], None) is None:
                    raise Refused(404, f"no file {value['path']}", "EntryNotFound")
            ref, answer = revision, {"success": True, "hookOutput": ""}
            if proposes:
                ref = f"refs/pr/{1 + sum(r.startswith('refs/pr/') for r in repository.refs)}"
                repository.refs[ref] = base.sha
                answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{ref.split('/')[-1]}"
            sha = repository.commit(ref, files, header["summary"])
        return 200, {**answer, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"}, {}
