"""Runs of several processes in one test: forks that see the environment that torchrun gives."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable, Sequence
from typing import Any


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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
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


def _child(connection: Any, environment: dict[str, int], work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()}, MASTER_ADDR="127.0.0.1")
    try:
        outcome = work(*arguments), ""
    except BaseException as error:
        outcome = error, traceback.format_exc()
    connection.send_bytes(pickle.dumps(outcome))  # send() would share the memory of tensors
    connection.close()
