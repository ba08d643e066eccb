"""Which files of the package a reader of some calls opens: those whose functions run."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import vision_attn

ROOT = Path(vision_attn.__file__).parent


@contextmanager
def opened_files() -> Iterator[set[str]]:
    """Collect the files, by their paths in the package, whose functions run inside the `with` block."""
    found: set[str] = set()

    def note(frame: object, event: str, arg: object) -> None:
        code = frame.f_code  # type: ignore[attr-defined]
        if event == "call" and code.co_filename.startswith(f"{ROOT}/") and code.co_name != "<module>":
            found.add(str(Path(code.co_filename).relative_to(ROOT)))

    sys.setprofile(note)
    try:
        yield found
    finally:
        sys.setprofile(None)
