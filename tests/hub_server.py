"""A stand-in of the hub's HTTP interface on this machine: models to fetch, and what is pushed."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


def commit_of(files):
    """The name of what a model's files are now."""
    digest = hashlib.sha1()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + files[name])
    return digest.hexdigest()


class Hub:
    """Serves models from memory; ``asked`` lists every request as ``METHOD path``.

    Attributes:
        models: names of files and bytes, by the models' names; ``commits`` keeps what each commit was.
        gated: names of models whose terms have to be accepted.
    """

    def __init__(self):
        self.models, self.commits, self.asked, self.gated, self.private = {}, {}, [], set(), {}
        self.refuses = False  # whoever writes
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                hub.serve(self)

            do_HEAD = do_POST = do_PUT = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def put(self, name, files):
        """Give a model these files; returns the commit."""
        self.models[name] = dict(files)
        commit = commit_of(files)
        self.commits[name, commit] = dict(files)
        return commit

    def put_folder(self, name, folder):
        return self.put(name, {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()})

    def serve(self, request):
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(request.path).path).strip("/")
        self.asked.append(f"{request.command} {path}")
        status, headers, answer = self.answer(request.command, path.split("/"), body)
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        request.send_response(status)
        kind = "application/octet-stream" if isinstance(answer, bytes) else "application/json"
        for key, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data)

    def answer(self, method, parts, body):
        """Status, headers and content of an answer."""
        if self.refuses and method == "POST":
            return 403, {}, {"error": "forbidden"}
        if parts[:2] == ["api", "whoami-v2"]:
            return 200, {}, {"name": "me", "type": "user", "orgs": [], "auth": {}}
        if parts == ["api", "validate-yaml"]:  # of a card
            return 200, {}, {"errors": [], "warnings": []}
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in self.models:
                return 409, {}, {"error": "exists", "url": f"{self.url}/{name}"}
            self.put(name, {})
            self.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
            return 200, {}, {"url": f"{self.url}/{name}", "name": name, "id": name}
        if parts[:2] == ["api", "models"]:
            return self.api("/".join(parts[2:4]), parts[4:], body)
        if parts[2:3] == ["resolve"]:
            return self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return 404, {}, {"error": f"no such thing: {'/'.join(parts)}"}

    def known(self, name, revision):
        """The commit and the files of a revision, or the answer that refuses it."""
        if name in self.gated:
            return None, (403, {"X-Error-Code": "GatedRepo"}, {"error": "accept its terms"})
        if name not in self.models:
            return None, (404, {"X-Error-Code": "RepoNotFound"}, {"error": "no such model"})
        commit = commit_of(self.models[name]) if revision == "main" else revision
        if (name, commit) not in self.commits:
            return None, (404, {"X-Error-Code": "RevisionNotFound"}, {"error": "no such revision"})
        return commit, self.commits[name, commit]

    def api(self, name, rest, body):
        action, revision = rest[0] if rest else "", rest[1] if len(rest) > 1 else "main"
        commit, files = self.known(name, revision)
        if commit is None:
            return files
        if action == "tree":
            listed = [{"type": "file", "path": path, "size": len(data), "oid": commit} for path, data in files.items()]
            return 200, {}, listed
        if action == "preupload":
            asked = json.loads(body)["files"]
            return (
                200,
                {},
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]},
            )
        if action == "commit":
            lines = [json.loads(line) for line in body.splitlines()]
            new = dict(files)
            for line in lines:
                if line["key"] == "file":
                    new[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            made = self.put(name, new)
            return 200, {}, {"commitUrl": f"{self.url}/{name}/commit/{made}", "commitOid": made, "success": True}
        siblings = [{"rfilename": path, "size": len(data)} for path, data in files.items()]
        return 200, {}, {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "private": False, "tags": []}

    def file(self, name, revision, path):
        commit, files = self.known(name, revision)
        if commit is None:
            return files
        if path not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, {"error": "no such file"}
        etag = hashlib.sha1(files[path]).hexdigest()
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}, files[path]
