"""The report of the soak scripts that count what is lost, and their command line."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Report:
    """Numbers of cases tried by kind, and descriptions of those in which something was lost."""

    what: str
    tried: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        tried = ", ".join(f"{name} {count}" for name, count in self.tried.items())
        lines = [f"{self.what} {sum(self.tried.values())} ({tried}), lost {len(self.lost)}, {self.seconds:.0f} s"]
        return "\n".join(lines + self.lost[:5])


def main(run: Callable[..., Report], description: str | None, **options: tuple[int | None, str]) -> int:
    """Call ``run`` with the numbers of the command line, name -> default and help; return the exit status."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, text) in {**options, "seed": (0, ""), "workers": (2, "")}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    report = run(**vars(parser.parse_args()))
    print(report)
    return 1 if report.lost else 0
