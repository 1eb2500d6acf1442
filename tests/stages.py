"""What `make test` runs, stage by stage, with the seconds each took.

Invariant: it ends with status 0 only when every stage passed; types and the smoke test look at the wheel, installed
where no source of this checkout is on the path, since that is what users get.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
SITE = ROOT / "build" / "wheel-site"
PACKAGES = ("rollpool.schemas", "rollpool.producer", "rollpool.worker", "rollpool.ops")

#: Imports every public name from the wheel, and tells where it was found.
SMOKE = """
import importlib, pathlib, sys
for name in sys.argv[2:]:
    module = importlib.import_module(name)
    assert pathlib.Path(module.__file__).is_relative_to(sys.argv[1]), module.__file__
    assert (pathlib.Path(module.__file__).parent / "py.typed").is_file(), name
    for public in getattr(module, "__all__", ()):
        getattr(module, public)
from rollpool.ops.cli.app import app
from rollpool.schemas.scripts.base import Script
Script("settle")
"""


def run(*command: str | Path, path: Path | None = None) -> None:
    """Run one command of this environment; raises CalledProcessError when it fails."""
    env = None if path is None else {"PATH": str(Path(sys.executable).parent), "PYTHONPATH": str(path)}
    subprocess.run([str(part) for part in command], cwd=ROOT if path is None else path, env=env, check=True)


def lint() -> None:
    """Style, and formatting."""
    run(sys.executable, "-m", "ruff", "check", ".")
    run(sys.executable, "-m", "ruff", "format", "--check", ".")


def wheel() -> None:
    """Build the wheel, install it alone, and import all of it."""
    for leftover in (ROOT / "dist", SITE, ROOT / "build" / "lib"):
        shutil.rmtree(leftover, ignore_errors=True)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", ".")
    (built,) = (ROOT / "dist").glob("*.whl")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", SITE, built)
    run(sys.executable, "-c", SMOKE, SITE, *PACKAGES, path=SITE)


def types() -> None:
    """Types of the installed wheel, and of what uses it."""
    config = ("--config-file", ROOT / "pyproject.toml")
    run(sys.executable, "-m", "mypy", *config, *(part for name in PACKAGES for part in ("-p", name)), path=SITE)
    # A test's signature says nothing that its name and its fixtures do not; what is inside is checked all the same.
    lenient = ("--allow-untyped-defs", "--allow-untyped-calls", "--allow-incomplete-defs")
    users = (ROOT / "tests", ROOT / "benchmarks", ROOT / "examples", ROOT / "docs")
    run(sys.executable, "-m", "mypy", *config, *lenient, *users, path=SITE)


def tests() -> None:
    """All tests; they start their own servers and engines."""
    # The independent model beside busy engines: ten times slower with a thread for each core.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    run(sys.executable, "-m", "pytest", "--durations=8")


STAGES: dict[str, Callable[[], None]] = {"lint": lint, "wheel": wheel, "types": types, "tests": tests}


def main() -> int:
    """Run the stages named, or all."""
    took: dict[str, float] = {}
    for name in sys.argv[1:] or STAGES:
        begin = time.monotonic()
        print(f"--- {name}", flush=True)
        try:
            STAGES[name]()
        except subprocess.CalledProcessError as error:
            print(f"--- {name} failed with status {error.returncode}", file=sys.stderr)
            return 1
        took[name] = time.monotonic() - begin
    print("--- seconds: " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in took.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
