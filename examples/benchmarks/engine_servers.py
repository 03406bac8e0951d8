"""The engines that ``engines.py`` compares: their servers are started as commands and asked over HTTP."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

SERVER_START_S = 300
PLAIN_TOKEN = 40  # a letter

# Takes llama-server's own arguments and starts xllamacpp's server with them. It has no --override-kv, which changes how
# texts become tokens: the rows of the table ask with token ids, and the demo leaves that command out.
XLLAMACPP = """
import argparse, signal, xllamacpp
parser = argparse.ArgumentParser()
parser.add_argument("-m"); parser.add_argument("--lora"); parser.add_argument("-c", type=int, default=0)
parser.add_argument("--port", type=int); parser.add_argument("-ctk", default="f16"); parser.add_argument("-ctv")
parser.add_argument("-fa"); parser.add_argument("--override-kv", action="append")
options = parser.parse_args()
params = xllamacpp.CommonParams()
params.model.path, params.port, params.n_ctx = options.m, options.port, options.c
params.cpuparams.n_threads = 2
if options.fa == "off":
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
if options.ctk == "f32":
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
if options.lora:
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(options.lora, 1.0)]
server = xllamacpp.Server(params)
signal.pause()
"""


class Refused(Exception):
    """An engine would not load what was exported; the text says why."""


def post(url: str, body: dict[str, Any]) -> Any:
    """Send JSON and return what comes back, JSON or text."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            text = reply.read().decode()
    except urllib.error.HTTPError as error:
        raise Refused(error.read().decode()[:300]) from error
    return json.loads(text) if text.startswith(("{", "[")) else text


class LlamaCpp:
    """llama-server, or xllamacpp's server under the same arguments."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.bin, self.python = options.bin, options.python
        shows = "import xllamacpp; print('xllamacpp', xllamacpp.__version__)"
        self.version = [self.python, "-c", shows] if self.python else self.command("llama-server --version")

    def command(self, printed: str) -> list[str]:
        """Return the words that start a printed command."""
        words = shlex.split(printed)
        if self.python and words[0] == "llama-server":
            return [self.python, "-c", XLLAMACPP, *words[1:]]
        return [shutil.which(words[0], path=self.bin) or words[0], *words[1:]]

    def log_probabilities(self, url: str, model: str, ids: list[int], vocab_size: int) -> torch.Tensor:
        """Return the log-probability of every next token, -inf where none is given."""
        chosen = {"logit_bias": [[PLAIN_TOKEN, 1000.0]]}  # the probabilities are those before it; a marker is an error
        body = {"prompt": ids, "n_predict": 1, "n_probs": vocab_size, "temperature": 0, **chosen}
        reply = post(f"{url}/completion", body)
        result = torch.full((vocab_size,), -math.inf)
        for token in reply["completion_probabilities"][0]["top_logprobs"]:
            result[token["id"]] = token["logprob"]
        return result


class Vllm:
    """The vllm command."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.bin = options.bin
        self.version = [shutil.which("vllm", path=self.bin) or "vllm", "--version"]

    def command(self, printed: str) -> list[str]:
        """Return the words that start a printed command."""
        words = shlex.split(f"{printed} --gpu-memory-utilization 0.4")
        return [shutil.which(words[0], path=self.bin) or words[0], *words[1:]]

    def log_probabilities(self, url: str, model: str, ids: list[int], vocab_size: int) -> torch.Tensor:
        """Return the log-probability of every next token."""
        options = {"max_tokens": 1, "temperature": 0, "logprobs": vocab_size, "return_tokens_as_token_ids": True}
        reply = post(f"{url}/v1/completions", {"model": model, "prompt": ids, **options})
        result = torch.full((vocab_size,), -math.inf)
        for name, value in reply["choices"][0]["logprobs"]["top_logprobs"][0].items():
            result[int(name.removeprefix("token_id:"))] = value
        return result


@contextmanager
def serving(words: list[str], folder: Path) -> Iterator[str]:
    """Start a server on a free port; yield its address; stop it after the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen([*words, "--port", str(port)], stdout=file, stderr=file, start_new_session=True)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + SERVER_START_S
    try:
        while True:
            if process.poll() is not None or time.monotonic() > end:
                raise Refused(why_ended(log.read_text(errors="replace"), process.returncode))
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        yield url
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def why_ended(log: str, status: int | None) -> str:
    """Return the first error in a server's log, which is the cause of the others, or how the server ended."""
    lines = [line for line in log.splitlines() if not re.search(r"INFO|WARN|Warning", line)]
    for pattern in (r"\w+Error: .*", r".*(?:[Ee]rror|failed).*"):
        if found := next(filter(None, (re.search(pattern, line) for line in lines)), None):
            return found[0].strip()
    if status is None:
        return f"the server did not start in {SERVER_START_S} s"
    if status == -signal.SIGILL:
        return "the server ended by SIGILL: its build is for another processor; give another one as --bin"
    return f"the server ended with status {status}"
