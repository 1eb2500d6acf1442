"""The repository's shape: what is on disk is what is packaged, and imports follow the arrows."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("schemas", "producer", "worker", "ops")

#: Who may import whom; schemas is the floor, ops the roof.
ARROWS = {
    "schemas": {"schemas"},
    "producer": {"producer", "schemas"},
    "worker": {"worker", "schemas"},
    "ops": {"ops", "producer", "worker", "schemas"},
}


def setuptools() -> dict[str, Any]:
    settings: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    return settings


def files_of(folder: str) -> Iterator[Path]:
    """What is there, but for what Python and the tools leave behind."""
    found = ((path, path.relative_to(ROOT).parts) for path in (ROOT / folder).rglob("*") if path.is_file())
    return (path for path, parts in found if not any(part.startswith((".", "__pycache__")) for part in parts))


def package_of(folder: Path) -> str:
    return ".".join(("rollpool", *folder.relative_to(ROOT).parts))


MODULES = sorted(path for folder in FOLDERS for path in files_of(folder) if path.suffix == ".py")


def test_every_folder_with_code_is_packaged() -> None:
    on_disk = {package_of(path.parent) for path in MODULES}
    assert sorted(setuptools()["packages"]) == sorted(on_disk)


def test_every_package_says_what_it_is() -> None:
    missing = [path.parent for path in MODULES if not (path.parent / "__init__.py").exists()]
    assert not missing


def test_every_data_file_is_packaged() -> None:
    patterns = setuptools()["package-data"]
    packages = {package: ROOT.joinpath(*package.split(".")[1:]) for package in setuptools()["packages"]}
    packed = {
        path
        for package, folder in packages.items()
        for pattern in (*patterns.get("*", ()), *patterns.get(package, ()))
        for path in folder.glob(pattern)
    }
    on_disk = {path for folder in FOLDERS for path in files_of(folder) if path.suffix not in (".py", ".pyc")}
    assert not on_disk - packed


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_package_is_typed(folder: str) -> None:
    assert (ROOT / folder / "py.typed").is_file()
    assert files(f"rollpool.{folder}").joinpath("py.typed").is_file()


@pytest.mark.parametrize("script", sorted((ROOT / "schemas" / "scripts").glob("*.lua")), ids=lambda path: path.stem)
def test_a_script_is_found_where_the_package_is_installed(script: Path) -> None:
    installed = files("rollpool.schemas.scripts").joinpath(script.name)
    assert installed.read_text(encoding="utf-8") == script.read_text(encoding="utf-8")


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


class AsAScript(ast.NodeTransformer):
    """Leaves out what only type checkers see, or whoever imports a module as part of this package."""

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        left_out = ast.unparse(node.test) in ("TYPE_CHECKING", "TYPE_CHECKING or __package__")
        return node.orelse if left_out else self.generic_visit(node)


def imports(tree: ast.AST) -> Iterator[str]:
    """Everything a module imports, wherever in it, as dotted names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path: Path) -> None:
    allowed = ARROWS[path.relative_to(ROOT).parts[0]]
    ours = {name.split(".")[1] for name in imports(parsed(path)) if name.startswith("rollpool.")}
    assert ours <= allowed


LAUNCH = sorted((ROOT / "worker" / "launch").glob("*.py"))


@pytest.mark.parametrize("path", LAUNCH, ids=lambda path: path.name)
def test_what_runs_in_the_engines_environment_needs_nothing_of_ours(path: Path) -> None:
    siblings = {script.stem for script in LAUNCH}
    needed = {name.split(".")[0] for name in imports(AsAScript().visit(parsed(path)))}
    # The others are there wherever sgl_jax is.
    assert needed <= sys.stdlib_module_names | siblings | {"sgl_jax", "jax", "flax", "numpy", "msgpack"}
