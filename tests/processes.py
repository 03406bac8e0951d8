"""Runs of several processes in one test: forks that see the environment that torchrun gives, and torchrun itself."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import random
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parent


def in_processes(
    count: int,
    work: Callable[..., Any],
    *arguments: Any,
    errors: bool = False,
    ranks: Sequence[int] | None = None,
    limit_s: float = 300,
) -> list[Any]:
    """Return ``work(*arguments)`` of ``count`` processes, by rank; or of some ``ranks``, without awaiting the others.

    A process that raises ends with its error: the first one is raised here, or with ``errors`` returned in its place.
    A process that is killed has the value None.
    """
    port = free_port()
    context = multiprocessing.get_context("fork")  # torch and transformers are imported already
    found = []
    for rank in range(count):
        ours, theirs = context.Pipe(duplex=False)
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
        process = context.Process(target=_child, args=(theirs, environment, work, arguments))
        process.start()
        theirs.close()
        found.append((process, ours))
    values: list[Any] = []
    try:
        for _, ours in found if ranks is None else [found[rank] for rank in ranks]:
            assert ours.poll(limit_s), f"process {len(values)} of {count} has not ended after {limit_s} s"
            try:
                value, trace = pickle.loads(ours.recv_bytes())
            except EOFError:
                value, trace = None, ""
            if isinstance(value, BaseException) and not errors:
                raise AssertionError(f"process {len(values)} of {count}: {trace}") from value
            values.append(value)
    finally:
        for process, _ in found:
            process.kill()
            process.join()
    return values


def free_port() -> int:
    """Return a port below those that Linux gives out, so that no other connection takes it before rank 0 listens."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def _child(connection: Any, environment: dict[str, int], work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)  # renews torch's pool, which does not survive a fork; threads that do it at once fail
    try:
        outcome = work(*arguments), ""
    except BaseException as error:
        outcome = error, traceback.format_exc()
    connection.send_bytes(pickle.dumps(outcome))  # send() would share the memory of tensors
    connection.close()


def torchrun(count: int, script: Path, restarts: int = 0, limit_s: float = 300) -> tuple[int, str]:
    """Run a script under torchrun; return the exit status and what torchrun and the processes printed.

    The script begins with ``from processes import say``: a process that has not ended ``limit_s`` after that prints
    where it hangs, and ends.
    """
    paths = map(str, (TESTS.parent, TESTS, TESTS / "training", os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), _LIMIT: str(limit_s)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command += [f"--max-restarts={restarts}", "--monitor-interval=0.1", str(script)]
    log = script.with_suffix(".log")
    with log.open("w") as output:
        job = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            status = job.wait((restarts + 1) * limit_s + 60)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"torchrun does not end:\n{log.read_text()}") from None
        finally:
            job.kill()
            job.wait()
    text = log.read_text()
    assert "Timeout (" not in text, f"a process hangs:\n{text}"
    return status, text


def say(phase: str) -> None:
    """Print what a process under torchrun does now, with the time."""
    start, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
    print(f"{time.strftime('%X')} start {start}, rank {rank}: {phase}", flush=True)


_LIMIT = "PHI3LORA_TEST_LIMIT_S"
if _LIMIT in os.environ:
    faulthandler.dump_traceback_later(float(os.environ[_LIMIT]), exit=True)
    say("begins")
