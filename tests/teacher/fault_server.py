"""An OpenAI-compatible HTTP server on a real socket that answers wrongly on purpose.

    python tests/teacher/fault_server.py --log requests.jsonl --fault_rate 0.3

It prints its address, and logs a line a request: which prompt, and what it did. Which fault a
prompt's n-th request meets is a hash of both, so a run can be told again.
"""

import argparse
import asyncio
import collections
import contextlib
import hashlib
import json
import random
import re
import subprocess
import sys
from pathlib import Path

PASSING_FAULTS = (
    "429 with Retry-After", "429 without", "500", "dropped", "stalled", "truncated", "wrong JSON",
    "HTML", "empty choices",
)  # fmt: skip
STALL_SECS = 30.0


class FaultServer:
    """Answers each prompt after some of PASSING_FAULTS; a few prompts never, by their digest."""

    def __init__(self, log, fault_rate: float, delay_secs: float, retry_after: str):
        self._log, self._rate, self._delay = log, fault_rate, delay_secs
        self._retry_after = retry_after
        self._times: collections.Counter = collections.Counter()

    async def handle(self, reader, writer) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                path = head.split(b" ", 2)[1].decode()
                length = next(
                    int(line.split(b":")[1])
                    for line in head.split(b"\r\n")
                    if line.lower().startswith(b"content-length:")
                )
                body = json.loads(await reader.readexactly(length))
                if not await self._answer(path, body, head, writer):
                    break
        writer.close()

    async def _answer(self, path: str, body: dict, head: bytes, writer) -> bool:
        """Writes one response; False closes the connection."""
        prompt = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        digest = hashlib.sha256(prompt.encode()).hexdigest()
        self._times[digest] += 1
        rng = random.Random(f"{digest} {self._times[digest]}")
        await asyncio.sleep(rng.uniform(0, 2 * self._delay))
        fault = self._fault_of(digest, rng)
        is_done = await self._write(fault, path, body, prompt, head, writer)
        if self._log:
            row = {"prompt": digest, "did": fault or "ok"}
            self._log.write(json.dumps(row) + "\n")
            self._log.flush()
        return is_done

    def _fault_of(self, digest: str, rng: random.Random) -> str | None:
        if self._rate:
            lasting = int(digest[:6], 16) % 100
            if lasting == 0:
                return "400"
            if lasting == 1:
                return "content filter"
            if lasting == 2:
                return "403"
        return rng.choice(PASSING_FAULTS) if rng.random() < self._rate else None

    async def _write(self, fault, path, body, prompt, head, writer) -> bool:
        if fault == "dropped":
            return False
        if fault == "stalled":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
            await asyncio.sleep(STALL_SECS)
            return False
        if fault in ("429 with Retry-After", "429 without", "500", "400", "403"):
            extra = f"Retry-After: {self._retry_after}\r\n" if "with R" in fault else ""
            key = next((w for w in head.decode().split() if w.startswith("sk-")), "")
            error = {"error": {"message": f"no: {key}", "type": "fault"}}
            await _send(writer, fault[:3], json.dumps(error), extra)
            return True
        text = json.dumps(_response(path, body, prompt, fault))
        if fault == "wrong JSON":
            text = text[: len(text) // 2]
        if fault == "HTML":
            text = "<html>bad gateway</html>"
        if fault == "truncated":
            await _send(writer, "200", text, claimed=len(text) + 100)
            return False
        await _send(writer, "200", text)
        return True


def _response(path: str, body: dict, prompt: str, fault: str | None) -> dict:
    """What a teacher says: a made-up reason, and a label that its prompt decides or hints at."""
    said = hashlib.sha256(prompt.encode()).digest()
    label = ("entailment", "neutral", "contradiction")[said[0] % 3]
    hint = re.search(r"Hint: the answer is (\w+)", prompt)
    label = hint[1] if hint else label
    text = f"Reason {said.hex()[:8]} decides it. So the answer is {label}."
    choice = {"index": 0, "finish_reason": "stop"}
    if path.endswith("/chat/completions"):
        choice["message"] = {"role": "assistant", "content": text}
    else:
        choice["text"] = text
    if fault == "content filter":
        choice |= {"finish_reason": "content_filter", "message": {"content": None}}
    choices = [{**choice, "index": index} for index in range(body.get("n", 1))]
    return {
        "id": "x", "object": "chat.completion", "created": 1, "model": f"{body['model']}-0001",
        "choices": [] if fault == "empty choices" else choices,
        "usage": {"prompt_tokens": len(prompt) // 4, "completion_tokens": 12, "total_tokens": 0},
    }  # fmt: skip


async def _send(writer, status: str, text: str, extra: str = "", claimed: int | None = None):
    length = len(text.encode()) if claimed is None else claimed
    writer.write(
        f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{extra}"
        f"Content-Length: {length}\r\n\r\n{text}".encode()
    )
    await writer.drain()


@contextlib.contextmanager
def serving(log: Path | None = None, **options):
    """Runs a server in a process of its own; yields its base URL."""
    flags = [f"--{name}={value}" for name, value in options.items()]
    flags += [f"--log={log}"] if log else []
    command = [sys.executable, __file__, *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def read_log(path: Path) -> dict[str, collections.Counter]:
    """What was done, by prompt."""
    done: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for line in path.read_text().splitlines():
        row = json.loads(line)
        done[row["prompt"]][row["did"]] += 1
    return done


async def serve() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--log")
    parser.add_argument("--fault_rate", type=float, default=0.0)
    parser.add_argument("--delay_secs", type=float, default=0.0)
    parser.add_argument("--retry_after", default="0.05")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        log = args.log and stack.enter_context(Path(args.log).open("a"))
        server = FaultServer(log, args.fault_rate, args.delay_secs, args.retry_after)
        listening = await asyncio.start_server(server.handle, "127.0.0.1", 0)
        print(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1", flush=True)
        await listening.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve())
