"""examples/README.md names every example, and the targets of its links exist."""

from __future__ import annotations

import re
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_every_example_is_in_the_examples_page():
    page = (EXAMPLES / "README.md").read_text()
    for path in [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.ipynb"), *EXAMPLES.glob("benchmarks/*.py")]:
        assert path.name in page, f"{path.name} is not in examples/README.md"
    for link in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", page):
        assert (EXAMPLES / link).exists(), link
