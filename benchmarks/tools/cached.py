"""Results of expensive, deterministic work, cached in the checkout's build/ by a hash of their inputs.

After build/ is deleted, the work is repeated with the same results.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parents[2]
Json = TypeVar("Json")


def cached(kind: str, depends_on: Iterable[Path | str], make: Callable[[], Json]) -> Json:
    """Result of `make`, or the cached result for the same inputs.

    Outside a checkout nothing is cached.

    Args:
        kind: folder in build/.
        depends_on: files, by their content, and texts: versions, settings.
        make: function without arguments that returns JSON values.
    """
    digest = hashlib.sha256()
    for part in depends_on:
        content = part.read_bytes() if isinstance(part, Path) else part.encode()
        # With its length, so that no two lists of parts have the same digest.
        digest.update(b"%d:" % len(content) + content)
    file = ROOT / "build" / kind / f"{digest.hexdigest()[:16]}.json"
    if file.exists():
        return json.loads(file.read_text())
    result = json.loads(json.dumps(make()))
    if (ROOT / "pyproject.toml").exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(result))
        # Atomic: another process may write the same file, or read it.
        partial.replace(file)
    return result
