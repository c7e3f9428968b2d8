"""A hub at the HTTP edge: it keeps what it is sent, and answers as the real one does."""

import base64
import http.server
import json
import threading

import yaml

TOKEN = "hf_" + "a" * 34


class Hub:
    """A running server and what it holds: repositories by name, with their files."""

    def __init__(self):
        self.repositories = {}
        self.asked = []
        self.objects = {}
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler_of(self))
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def add(self, name, private=True, files=()):
        self.repositories[name] = {"private": private, "files": dict.fromkeys(files, b"old")}

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def handler_of(hub):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            hub.asked.append(("GET", self.path))
            path = self.path.partition("?")[0]
            if path == "/api/whoami-v2":
                return self.whoami()
            if path.startswith("/api/models/"):
                return self.repository(path.removeprefix("/api/models/"))
            return self.answer({}, 404)

        def do_PUT(self):
            hub.asked.append(("PUT", self.path))
            hub.objects[self.path.rpartition("/")[2]] = self.body()
            self.answer({})

        def do_POST(self):
            hub.asked.append(("POST", self.path))
            body = self.body()
            if self.path == "/api/validate-yaml":
                return self.validate(json.loads(body))
            if not self.is_known():
                return self.answer({"error": "Invalid credentials"}, 401)
            if self.path == "/api/repos/create":
                return self.create(json.loads(body))
            if "/preupload/" in self.path:
                return self.preupload(json.loads(body))
            if self.path.endswith("/info/lfs/objects/batch"):
                return self.batch(json.loads(body))
            return self.commit(body)

        def is_known(self):
            return self.headers.get("authorization") == f"Bearer {TOKEN}"

        def whoami(self):
            if not self.is_known():
                return self.answer({"error": "Invalid credentials in Authorization header"}, 401)
            return self.answer({"type": "user", "name": "ada", "orgs": []})

        def validate(self, asked):
            head = yaml.safe_load(asked["content"].split("---\n")[1])
            if head.get("license") not in (None, "mit", "apache-2.0"):
                return self.answer({"error": f"license {head['license']} is not allowed"}, 400)
            return self.answer({"errors": [], "warnings": []})

        def repository(self, name):
            found = hub.repositories.get(name)
            if found is None:
                return self.answer(
                    {"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"}
                )
            files = [{"rfilename": one} for one in found["files"]]
            return self.answer({"id": name, "private": found["private"], "siblings": files})

        def create(self, asked):
            name = f"{asked.get('organization') or 'ada'}/{asked['name']}"
            hub.add(name, asked.get("private", False) or asked.get("visibility") == "private")
            return self.answer({"url": f"{hub.endpoint}/{name}"})

        def preupload(self, asked):
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for one in asked["files"]
            ]
            return self.answer({"files": modes})

        def batch(self, asked):
            objects = [
                one | {"actions": {"upload": {"href": f"{hub.endpoint}/objects/{one['oid']}"}}}
                for one in asked["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})

        def commit(self, body):
            name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            files = hub.repositories[name]["files"]
            for line in body.decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = hub.objects[value["oid"]]
            url = f"{hub.endpoint}/{name}/commit/abc"
            return self.answer({"commitUrl": url, "commitOid": "abc", "success": True})

        def body(self):
            return self.rfile.read(int(self.headers.get("content-length") or 0))

        def answer(self, content, status=200, headers=None):
            text = json.dumps(content).encode()
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args):
            pass

    return Handler
