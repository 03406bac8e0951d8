"""Kill a training run at every write, rename and deletion it makes, resume it, and require the same bits.

    python tests/soak/kill_points.py                  # every point of five runs
    python tests/soak/kill_points.py --most 40        # a seeded choice of them

A point is a moment before an operation on the run's folder (Python's audit events: open for writing, rename, mkdir,
remove), before and after an fsync, or in the middle of a file (written, then cut to a random length). A forked child of
this process, which has done the imports, runs until its point and kills itself with SIGKILL. Then the folder is
checked: no saved checkpoint may be lost, beyond those that rotation removes. Last, another child resumes with
``resume_from_checkpoint="auto"``: its adapters, optimizer state and history must equal the uncut run's bit for bit.
``--random N`` also kills at N random moments.
"""

from __future__ import annotations

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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from conftest import adapted_model, adapters_of, chat_dataset, chat_rows, make_tokenizer, quiet_config, tiny_model
from soak_report import Report, main
from transformers import AutoModelForCausalLM

import phi3lora as p3
from phi3lora.adapters import adapter_file as files
from phi3lora.training.checkpoint import damage, newest_good_checkpoint

LIMIT = 2  # save_total_limit
RUN = {
    "max_steps": 8, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_strategy": "steps",
    "save_steps": 2, "save_total_limit": LIMIT, "eval_strategy": "steps", "eval_steps": 3, "weight_decay": 0.1,
    "lr_scheduler_type": "cosine", "warmup_steps": 2, "resume_from_checkpoint": "auto",
}  # fmt: skip
_EVENTS = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir"}


class Points:
    """Counts the points of this process under a folder and dies at one of them."""

    def __init__(self, folder: Path, die_at: int | None, seed: int = 0) -> None:
        self.folder, self.die_at, self.passed = str(folder), die_at, 0
        self.random = random.Random(seed)

    def install(self) -> None:
        """Count from now until this process ends: an audit hook cannot be removed."""
        sys.addaudithook(self._audit)
        torch.save = self._torn(torch.save, at=1)
        Path.write_text = self._torn(Path.write_text, at=0)
        Path.write_bytes = self._torn(Path.write_bytes, at=0)
        real = os.fsync

        def fsync(descriptor: int) -> None:
            self.count()
            real(descriptor)
            self.count()

        os.fsync = fsync

    def count(self, cut: Path | None = None) -> None:
        """Count a point, or die there, leaving the file ``cut`` partly written."""
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
            self.count()

    def _torn(self, real: Callable[..., Any], at: int) -> Callable[..., Any]:
        def write(*arguments: Any, **options: Any) -> Any:
            result = real(*arguments, **options)
            if str(arguments[at]).startswith(self.folder):
                self.count(Path(arguments[at]))
            return result

        return write


def train(
    folder: Path, saved: Path | None = None, stop_at: int | None = None, streamed: bool = False, **changes: Any
) -> dict[str, str]:
    """Train, or resume, and return digests of all that must be equal. Each save is noted in the file ``saved``."""

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
    """Return the chats as a stream of three windows; the run makes more than one pass over it."""
    return p3.ChatDataset.load(chat_rows(), make_tokenizer(), max_length=64, streaming=True, buffer_size=9)


def whole_run(folder: Path, saved: Path) -> None:
    """Train from nothing."""
    train(folder, saved)


def stream(folder: Path, saved: Path) -> None:
    """Train from nothing, on a stream."""
    train(folder, saved, streamed=True)


def rerun(folder: Path, saved: Path) -> None:
    """Go back to an earlier checkpoint: the newer ones are set aside."""
    train(folder, saved, resume_from_checkpoint=str(folder / "checkpoint-4"), save_total_limit=None)


def adapter_files(folder: Path, saved: Path) -> None:
    """Write adapter files over older ones."""
    for name in ("adapter.safetensors", "adapter.pt"):
        p3.save_adapter(adapted_model(seed=1), folder / name)


def exports(folder: Path, saved: Path, seed: int = 1) -> None:
    """Write an export with its card and a merged model over older ones."""
    model = adapted_model(seed=seed)
    p3.export_peft(model, folder / "peft", base_model="owner/base")
    p3.write_model_card(folder / "peft", base_model="owner/base", metrics={"seed": seed})
    p3.save_merged(model, None, folder / "merged", prompts=["Hello!"])


RUNS: dict[str, Callable[[Path, Path], None]] = {
    "whole run": whole_run, "stream": stream, "rerun": rerun, "adapter files": adapter_files, "exports": exports,
}  # fmt: skip


def prepare(name: str, folder: Path) -> None:
    """Write what is in the folder before the run that is killed."""
    folder.mkdir()
    if name == "rerun":
        train(folder, stop_at=6, save_total_limit=None)
    if name == "adapter files":
        for file in ("adapter.safetensors", "adapter.pt"):
            p3.save_adapter(adapted_model(seed=0), folder / file)
    if name == "exports":
        exports(folder, folder, seed=0)
        for kind in ("peft", "merged"):
            (folder / kind / "notes.txt").write_text("a user's")


def check_checkpoints(name: str, folder: Path, saved: int) -> None:
    """Check that no saved checkpoint is lost, beyond those that rotation removes; a rerun sets a newer one aside."""
    newest_good_checkpoint(folder)  # restores the name of a checkpoint whose replacement was cut short
    good = [path for path in folder.glob("checkpoint-*") if damage(path) is None]
    expected = 3 + saved if name == "rerun" else min(saved, LIMIT)
    assert len(good) >= expected, f"{len(good)} good checkpoints where {expected} were saved"


def count_saved(saved: Path) -> int:
    """Return how many checkpoints or files had been saved."""
    return len(set(saved.read_text().split())) if saved.exists() else 0


def check_adapter_files(folder: Path, returned: int = 0) -> None:
    """Check that each file is the old one or the new one, with its own settings, and that the next save cleans up.

    The first ``returned`` files must be new.
    """
    old, new = [_digest(adapters_of(adapted_model(seed=seed))) for seed in (0, 1)]
    for number, name in enumerate(("adapter.safetensors", "adapter.pt")):
        state, facts = files.read_adapter(folder / name)
        assert _digest(state) in ((new,) if number < returned else (old, new)), f"{name} is another one"
        assert facts is not None, f"{name} has no settings"
    adapter_files(folder, folder)
    assert {file.name for file in folder.iterdir()} == {"adapter.safetensors", "adapter.pt"}, "litter"


def check_exports(folder: Path) -> None:
    """Check that each folder is the old one or the new one, with a user's file, and that the next write cleans up."""
    models = [adapted_model(seed=seed) for seed in (0, 1)]
    base, merged = tiny_model(), AutoModelForCausalLM.from_pretrained(folder / "merged")
    p3.import_peft(base, folder / "peft")
    assert _digest(adapters_of(base)) in [_digest(adapters_of(model)) for model in models], "another adapter"
    ids = torch.arange(5, 25)[None]
    wants = [model(input_ids=ids).logits for model in models]
    assert any(torch.allclose(merged(input_ids=ids).logits, want, atol=1e-4) for want in wants), "another merged model"
    assert "## How to load it" in (folder / "peft" / "README.md").read_text()
    exports(folder, folder)
    for kind in ("peft", "merged"):
        assert (folder / kind / "notes.txt").read_text() == "a user's"
    assert {file.name for file in folder.iterdir()} == {"peft", "merged"}, "litter"


CHECKS = {"adapter files": check_adapter_files, "exports": check_exports}


def count_points(name: str, prepared: Path) -> int:
    """Return the number of points of a run."""
    with tempfile.TemporaryDirectory() as place:
        folder, out = Path(place) / "run", Path(place) / "count"
        shutil.copytree(prepared, folder)

        def child() -> None:
            points = Points(folder, None)
            points.install()
            RUNS[name](folder, Path(place) / "saved")
            out.write_text(str(points.passed))

        assert _wait(_fork(child), 120) == 0
        return int(out.read_text())


@dataclass(frozen=True, order=True)
class Job:
    """One death: of which run, and at which point or after how many seconds."""

    name: str
    point: int
    delay_s: float | None = None


def try_job(job: Job, prepared: Path, expected: dict[str, str]) -> str | None:
    """Let a child die, check its folder, and resume in another child; return what is wrong, or None."""
    with tempfile.TemporaryDirectory() as place:
        folder, saved, log = Path(place) / "run", Path(place) / "saved", Path(place) / "log"
        shutil.copytree(prepared, folder)

        def die() -> None:
            if job.delay_s is None:
                Points(folder, job.point, seed=job.point).install()
            RUNS[job.name](folder, saved)

        def resume() -> None:
            if job.name in CHECKS:
                return CHECKS[job.name](folder)
            check_checkpoints(job.name, folder, count_saved(saved))
            found = train(folder, streamed=job.name == "stream")
            wrong = [what for what in expected if found[what] != expected[what]]
            assert not wrong, f"{', '.join(wrong)} differ from the uncut run's"

        try:
            child = _fork(die, log)
            if job.delay_s is not None:
                time.sleep(job.delay_s)
                os.kill(child, signal.SIGKILL)
            status = _wait(child, 120)
            if status != -signal.SIGKILL and job.delay_s is None:
                return f"{job}: the run ended with {status}, not at its point: {_tail(log)}"
            return None if _wait(_fork(resume, log), 120) == 0 else f"{job}: {_tail(log)}"
        except TimeoutError:
            return f"{job}: hangs"


def run(most: int | None = None, randomly: int = 0, seed: int = 0, workers: int = 2) -> Report:
    """Try all points, or a seeded choice of ``most`` of them, and ``randomly`` many random moments."""
    report, started, choose = Report("kill points"), time.perf_counter(), random.Random(seed)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        whole, streamed = train(Path(place) / "run"), train(Path(place) / "stream", streamed=True)
        prepared = {name: Path(place) / f"prepared {name}" for name in RUNS}
        for name in RUNS:
            prepare(name, prepared[name])
        jobs = [Job(name, i) for name in RUNS for i in range(1, count_points(name, prepared[name]) + 1)]
        if most is not None and most < len(jobs):
            jobs = sorted(choose.sample(jobs, most))
        begun = time.perf_counter()
        train(Path(place) / "again")
        longest_s = 1.2 * (time.perf_counter() - begun)
        jobs += [Job("whole run", i, choose.uniform(0, longest_s)) for i in range(randomly)]

        def work(job: Job) -> str | None:
            return try_job(job, prepared[job.name], streamed if job.name == "stream" else whole)

        with ThreadPoolExecutor(workers) as pool:
            for job, wrong in zip(jobs, pool.map(work, jobs), strict=True):
                report.tried[job.name if job.delay_s is None else "random moments"] += 1
                if wrong:
                    report.lost.append(wrong)
    report.seconds = time.perf_counter() - started
    return report


def _fork(work: Callable[[], object], log: Path | None = None) -> int:
    """Start a child that does ``work`` and ends, its errors in ``log``."""
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
    """Return the exit status, negative for a signal; kill a child that runs past ``limit_s``."""
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


if __name__ == "__main__":
    numbers = {
        "most": (None, "a seeded choice of so many points; default: all"),
        "random": (100, "kills at random moments"),
    }
    sys.exit(main(lambda random, **more: run(randomly=random, **more), __doc__, **numbers))
