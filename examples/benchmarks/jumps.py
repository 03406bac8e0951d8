"""Count what a reader of one training run has to visit: functions, files, and calls from one file to another.

    python examples/benchmarks/jumps.py              # a quiet run of two steps
    python examples/benchmarks/jumps.py --files      # also how often each file is entered from another

A profile hook counts the package's own functions during ``train()`` on the demo, in every thread. A call counts as a
jump if the nearest caller inside the package is in another file. The numbers depend on the code alone.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import phi3lora as p3

PACKAGE = Path(p3.__file__).parent


class Travel:
    """Functions called and jumps between files, recorded by :meth:`profile`."""

    def __init__(self) -> None:
        self.functions: set[tuple[str, str, int]] = set()
        self.jumps: Counter[str] = Counter()

    def profile(self, frame: FrameType, event: str, argument: Any) -> None:
        """Hook for ``sys.setprofile``."""
        name = frame.f_code.co_filename
        if event != "call" or not _is_ours(name) or frame.f_code.co_name.startswith("<"):  # lambdas, comprehensions
            return
        self.functions.add((name, frame.f_code.co_name, frame.f_code.co_firstlineno))
        caller = frame.f_back
        while caller is not None and not _is_ours(caller.f_code.co_filename):
            caller = caller.f_back
        if caller is not None and caller.f_code.co_filename != name:
            self.jumps[name] += 1


def _is_ours(filename: str) -> bool:
    return filename.startswith(f"{PACKAGE}/")


def measure() -> Travel:
    """Train the demo for two quiet steps and return what was called."""
    model, _, train_set, _ = p3.demo.load()
    p3.inject_lora(model, p3.LoraConfig(r=4))
    travel = Travel()
    with tempfile.TemporaryDirectory() as folder:
        config = p3.TrainingConfig(
            output_dir=folder, max_steps=2, per_device_train_batch_size=1, save_strategy="no", logging_strategy="no",
            log_level="error", disable_tqdm=True,
        )  # fmt: skip
        threading.setprofile(travel.profile)
        sys.setprofile(travel.profile)
        try:
            p3.train(model, train_set.select(range(8)), config)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
    return travel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", action="store_true", help="print the jumps into each file")
    options = parser.parse_args()
    travel = measure()
    files = {name for name, _, _ in travel.functions}
    print(f"{len(travel.functions)} functions in {len(files)} files, {travel.jumps.total()} calls from file to file")
    if options.files:
        for name, count in travel.jumps.most_common():
            print(f"{count:6}  {Path(name).relative_to(PACKAGE)}")


if __name__ == "__main__":
    main()
