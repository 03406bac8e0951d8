"""Kill a training run at every write, rename and deletion it makes, go on, and ask for the same bits.

    python tests/soak/kill_points.py                  # every point of four runs
    python tests/soak/kill_points.py --most 40        # a seeded choice of them

A point is a moment before an operation on the run's folder (Python's audit events: open for writing, rename, mkdir,
remove), before and after an fsync, or in the middle of a file (written, cut to a random length). A forked child of this
process, which has paid for the imports, runs until its point and kills itself with SIGKILL. Before anything else the
folder is looked at: no checkpoint that was saved may be lost, beyond those that rotation takes. Then another child
resumes with ``resume_from_checkpoint="auto"``: its adapters, optimizer state and history must be the uncut run's, bit
for bit. ``--random N`` kills at N random moments instead of at points.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from conftest import adapted_model, adapters_of, chat_dataset, chat_rows, make_tokenizer, quiet_config

import phi3lora as p3
from phi3lora.adapters import adapter_file as files
from phi3lora.training.checkpoint import checkpoints, damage, newest_good_checkpoint

LIMIT = 2  # save_total_limit
RUN = {
    "max_steps": 8, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_strategy": "steps",
    "save_steps": 2, "save_total_limit": LIMIT, "eval_strategy": "steps", "eval_steps": 3, "weight_decay": 0.1,
    "lr_scheduler_type": "cosine", "warmup_steps": 2, "resume_from_checkpoint": "auto",
}  # fmt: skip
_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}


@dataclass
class Report:
    """What was tried, and what went wrong."""

    tried: dict[str, int] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        tried = ", ".join(f"{name} {count}" for name, count in self.tried.items())
        lines = [f"kill points {sum(self.tried.values())} ({tried}), lost {len(self.lost)}, {self.seconds:.0f} s"]
        return "\n".join(lines + self.lost[:5])


class Points:
    """Counts the points of this process under a folder; dies at one of them."""

    def __init__(self, folder: Path, die_at: int | None, seed: int = 0) -> None:
        self.folder, self.die_at, self.passed = str(folder), die_at, 0
        self.random = random.Random(seed)

    def install(self) -> None:
        """For the rest of this process: an audit hook cannot be taken off."""
        sys.addaudithook(self._audit)
        torch.save = self._torn(torch.save, at=1)
        files.save_file = self._torn(files.save_file, at=1)
        Path.write_text = self._torn(Path.write_text, at=0)
        real = os.fsync

        def fsync(descriptor: int) -> None:
            self.passing()
            real(descriptor)
            self.passing()

        os.fsync = fsync

    def passing(self, cut: Path | None = None) -> None:
        """One point; ``cut``: the file that is to be half there."""
        self.passed += 1
        if self.passed == self.die_at:
            if cut is not None:
                os.truncate(cut, self.random.randrange(cut.stat().st_size + 1))
            os.kill(os.getpid(), signal.SIGKILL)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _EVENTS or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        at = os.fsdecode(arguments[0])
        writes = event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes and (at.startswith(self.folder) or not os.path.isabs(at)):  # rmtree has names relative to a folder
            self.passing()

    def _torn(self, real: Callable[..., Any], at: int) -> Callable[..., Any]:
        def write(*arguments: Any, **options: Any) -> Any:
            result = real(*arguments, **options)
            if str(arguments[at]).startswith(self.folder):
                self.passing(Path(arguments[at]))
            return result

        return write


def train(
    folder: Path, saved: Path | None = None, stop_at: int | None = None, streamed: bool = False, **changes: Any
) -> dict[str, str]:
    """The run, or the rest of it; digests of all that must be equal. Each save is noted in the file ``saved``."""

    class Note(p3.Callback):
        def on_save(self, state: Any, path: Path) -> None:
            if saved is not None:
                with open(saved, "a") as file:
                    file.write(f"{state.global_step}\n")

        def on_step_end(self, state: Any) -> None:
            state.should_stop = state.global_step == stop_at

    model = adapted_model(lora_dropout=0.1)
    torch.manual_seed(7)
    config = quiet_config(folder, **{**RUN, **changes})
    data = chat_stream() if streamed else chat_dataset()
    result = p3.train(model, data, config, eval_dataset=chat_dataset(5), callbacks=[Note()])
    history = [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in result.history]
    written = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in written] == history
    optimizer = torch.load(folder / f"checkpoint-{result.global_step}" / "optimizer.pt", weights_only=True)
    moments = {f"{i}.{n}": torch.as_tensor(v) for i, s in optimizer["state"].items() for n, v in s.items()}
    return {
        "adapters": _digest(adapters_of(model)),
        "moments": _digest(moments),
        "history": hashlib.sha256(json.dumps(history).encode()).hexdigest(),
    }


def chat_stream() -> p3.ChatStream:
    """The same chats in three windows, of which the run trains more than one pass."""
    return p3.ChatDataset.load(chat_rows(), make_tokenizer(), max_length=64, streaming=True, buffer_size=9)


def whole_run(folder: Path, saved: Path) -> None:
    """From nothing."""
    train(folder, saved)


def stream(folder: Path, saved: Path) -> None:
    """From nothing, on a stream."""
    train(folder, saved, streamed=True)


def rerun(folder: Path, saved: Path) -> None:
    """Over its own checkpoints: each is replaced by one of the same step."""
    train(folder, saved, resume_from_checkpoint=str(folder / "checkpoint-4"), save_total_limit=None)


def adapter_files(folder: Path, saved: Path) -> None:
    """Adapter files over older ones."""
    for name in ("adapter.safetensors", "adapter.pt"):
        p3.save_adapter(adapted_model(seed=1), folder / name)


def prepare(name: str, folder: Path) -> None:
    """What is there before the run that is killed."""
    folder.mkdir()
    if name == "rerun":
        train(folder, stop_at=6, save_total_limit=None)
    if name == "adapter files":
        for file in ("adapter.safetensors", "adapter.pt"):
            p3.save_adapter(adapted_model(seed=0), folder / file)


RUNS: dict[str, Callable[[Path, Path], None]] = {
    "whole run": whole_run, "stream": stream, "rerun": rerun, "adapter files": adapter_files,
}  # fmt: skip


def check_checkpoints(name: str, folder: Path, saved: Path) -> None:
    """No checkpoint is lost that was there and that rotation did not take."""
    noted = saved.read_text().split() if saved.exists() else []
    newest_good_checkpoint(folder)  # which gives a cut replacement its name back
    good = [path for path in checkpoints(folder) if damage(path) is None]
    expected = 3 + ("8" in noted) if name == "rerun" else min(len(noted), LIMIT)
    assert len(good) >= expected, f"{len(good)} good checkpoints where {expected} were saved"


def check_adapter_files(folder: Path) -> None:
    """Each is the old one or the new one, and says how it is built or nothing at all."""
    sides = [_digest(adapters_of(adapted_model(seed=seed))) for seed in (0, 1)]
    for name in ("adapter.safetensors", "adapter.pt"):
        state, facts = files.read_adapter(folder / name)
        assert _digest(state) in sides, f"{name} is neither the old nor the new one"
        assert facts is not None or name == "adapter.pt"
    p3.save_adapter(adapted_model(seed=1), folder / "adapter.pt")  # and it can be written again
    assert files.read_adapter(folder / "adapter.pt")[1] is not None


def count_points(name: str) -> int:
    """How many points a run has."""
    with tempfile.TemporaryDirectory() as place:
        folder, out = Path(place) / "run", Path(place) / "count"
        prepare(name, folder)

        def child() -> None:
            points = Points(folder, None)
            points.install()
            RUNS[name](folder, Path(place) / "saved")
            out.write_text(str(points.passed))

        assert _wait(_fork(child), 120) == 0
        return int(out.read_text())


def try_point(name: str, point: int, expected: dict[str, str], delay_s: float | None = None) -> str | None:
    """Die at a point (or after ``delay_s``), look, go on; what is wrong, or None."""
    with tempfile.TemporaryDirectory() as place:
        folder, saved, log = Path(place) / "run", Path(place) / "saved", Path(place) / "log"
        try:
            _prepared(name, folder)

            def dies() -> None:
                if delay_s is None:
                    Points(folder, point, seed=point).install()
                RUNS[name](folder, saved)

            child = _fork(dies, log)
            if delay_s is not None:
                time.sleep(delay_s)
                os.kill(child, signal.SIGKILL)
            status = _wait(child, 120)
            if status != -signal.SIGKILL and delay_s is None:
                return f"{name}, point {point}: the run ended with {status} and not at its point: {_tail(log)}"

            def goes_on() -> None:
                if name == "adapter files":
                    check_adapter_files(folder)
                    return
                check_checkpoints(name, folder, saved)
                found = train(folder, streamed=name == "stream")
                wrong = [what for what in expected if found[what] != expected[what]]
                assert not wrong, f"{', '.join(wrong)} are not the uncut run's"

            status = _wait(_fork(goes_on, log), 120)
            return None if status == 0 else f"{name}, point {point} (delay {delay_s}): {_tail(log)}"
        except TimeoutError:
            return f"{name}, point {point} (delay {delay_s}): hangs"


def run(most: int | None = None, randomly: int = 0, seed: int = 0, workers: int = 2) -> Report:
    """Try all points, or a seeded choice of ``most`` of them, and ``randomly`` many random moments."""
    report, started, choose = Report(), time.perf_counter(), random.Random(seed)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        whole, streamed = train(Path(place) / "run"), train(Path(place) / "stream", streamed=True)
        expected = {name: streamed if name == "stream" else whole for name in RUNS}
        jobs: list[tuple[str, int, float | None]] = []
        for name in RUNS:
            jobs += [(name, point, None) for point in range(1, count_points(name) + 1)]
        if most is not None and most < len(jobs):
            jobs = sorted(choose.sample(jobs, most))
        begun = time.perf_counter()
        train(Path(place) / "again")
        longest = 1.2 * (time.perf_counter() - begun)
        jobs += [("whole run", i, choose.uniform(0, longest)) for i in range(randomly)]
        _PREPARED.clear()
        for name in RUNS:
            _PREPARED[name] = Path(place) / f"prepared {name}"
            prepare(name, _PREPARED[name])
        with ThreadPoolExecutor(workers) as pool:
            for job, wrong in zip(jobs, pool.map(lambda job: try_point(*_arguments(job, expected)), jobs), strict=True):
                kind = job[0] if job[2] is None else "random moments"
                report.tried[kind] = report.tried.get(kind, 0) + 1
                if wrong:
                    report.lost.append(wrong)
    report.seconds = time.perf_counter() - started
    return report


_PREPARED: dict[str, Path] = {}


def _arguments(job: tuple[str, int, float | None], expected: dict[str, dict[str, str]]) -> tuple[Any, ...]:
    name, point, delay = job
    return name, point, expected[name], delay


def _prepared(name: str, folder: Path) -> None:
    shutil.copytree(_PREPARED[name], folder)


def _fork(work: Callable[[], object], log: Path | None = None) -> int:
    """A child that does ``work`` and ends, its errors in ``log``."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        if log is not None:
            sys.stdout = sys.stderr = log.open("w")
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _wait(child: int, limit_s: float) -> int:
    """The exit status, negative for a signal."""
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError


def _tail(log: Path) -> str:
    return log.read_text(errors="replace").strip()[-300:] if log.exists() else ""


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, help="a seeded choice of so many points; default: all")
    parser.add_argument("--random", type=int, default=100, help="kills at random moments")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    report = run(options.most, options.random, options.seed, options.workers)
    print(report)
    return 1 if report.lost else 0


if __name__ == "__main__":
    sys.exit(main())
