"""Names on the Hugging Face hub, against a small server that answers as the hub does."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest
from test_hub import folder_of

pytest.importorskip("huggingface_hub")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LOAD = """
import sys, garrulax as gx
for name in sys.argv[1:]:
    try:
        print(gx.load(name).config.width)
    except FileNotFoundError as error:
        print(error)
"""


@pytest.fixture
def hub(tmp_path):
    """The address of a server of one repository, org/name, and the paths that it was asked for."""
    folder = folder_of("llama_gqa", tmp_path / "repository")
    for extra in ("pytorch_model.bin", "consolidated.safetensors", "picture.png", "README.md", "run.py"):
        (folder / extra).write_bytes(b"x")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            path = self.path.split("?")[0]
            files = [f for f in sorted(folder.rglob("*")) if f.is_file()]
            if path == "/api/models/org/name/revision/main":
                names = [{"rfilename": str(f.relative_to(folder))} for f in files]
                return self.json({"id": "org/name", "sha": COMMIT, "siblings": names})
            if path == f"/api/models/org/name/tree/{COMMIT}":
                sizes = [(str(f.relative_to(folder)), f.stat().st_size) for f in files]
                return self.json([{"type": "file", "path": f, "size": n, "oid": "0" * 40} for f, n in sizes])
            name = path.rsplit("/", 1)[-1]
            if path == f"/org/name/resolve/{COMMIT}/{name}" and (folder / name).is_file():
                content = (folder / name).read_bytes()
                etag = f'"{hashlib.sha1(content).hexdigest()}"'
                return self.answer(200, content, {"ETag": etag, "X-Repo-Commit": COMMIT})
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET

        def json(self, content):
            self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def answer(self, code, content, headers):
            self.send_response(code)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def load(names, home, **environment):
    environment = {**os.environ, "HF_HOME": str(home), "JAX_PLATFORMS": "cpu", **environment}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *names], env=environment, capture_output=True, text=True, cwd=home, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_only_what_a_model_needs_is_fetched_and_the_cache_serves_offline(hub, tmp_path):
    address, asked = hub
    home = tmp_path / "home"
    home.mkdir()
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    online = load(["org/name", "org/absent"], home, HF_ENDPOINT=address, HF_HUB_OFFLINE="0", PYTHONPATH=here)
    assert online[0] == "32"
    assert online[1].startswith("there is no folder org/absent: check the path. ")
    assert "the hub did not give it: " in online[1]
    fetched = {path.rsplit("/", 1)[-1] for path in asked if "/resolve/" in path}
    assert fetched == {"config.json", "model.safetensors"}

    asked.clear()
    offline = load(["org/name", "org/other"], home, HF_ENDPOINT=address, HF_HUB_OFFLINE="1", PYTHONPATH=here)
    assert offline[0] == "32"
    assert "there is no folder org/other" in offline[1]
    assert "run `hf download org/other` where there is one and give the folder" in offline[1]
    assert not asked
    link = next(home.glob("hub/models--org--name/snapshots/*/model.safetensors"))
    assert link.is_symlink()  # into the cache's blobs: a link that is followed
