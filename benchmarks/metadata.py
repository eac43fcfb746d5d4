"""What the rows of a results file say of where they come from."""

import subprocess
from pathlib import Path


def commit() -> str:
    """The revision, with a + where files differ from it; results do not count."""

    def git(*command: str) -> str:
        try:
            done = subprocess.run(
                ["git", "-C", str(Path(__file__).parent), *command], capture_output=True, text=True, check=False
            )
        except OSError:
            return ""
        return done.stdout.strip()

    revision = git("rev-parse", "--short", "HEAD")
    return revision + "+" * bool(git("status", "--porcelain", ":/", ":!results")) if revision else "unknown"
