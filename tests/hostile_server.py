"""An OpenAI-compatible endpoint in a thread, whose answers a test writes."""

import contextlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def answering(answer: Callable[[dict, str], tuple[int, str]]) -> Iterator[str]:
    """Serves `answer(body, Authorization) -> (status, JSON text)`; yields the base URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, text = answer(body, self.headers["Authorization"])
            data = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_):
            pass  # a client that gave up

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def completion(text: str, raw: str | None = None, **more) -> str:
    """A response with one choice; `raw` is its text as JSON, where it is to be spelt otherwise."""
    mark = "@text@"
    response = {
        "model": "m",
        "choices": [{"message": {"content": mark}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4},
    } | more
    return json.dumps(response).replace(json.dumps(mark), raw or json.dumps(text))
