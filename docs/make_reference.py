"""Write `settings.md` and `reference.md` beside this file from the code; with `--check`, tell whether they are stale.

Invariant: every worker setting and every public name is listed, and what is said of it stands in the code: the models'
fields with their `#:` comments, the docstrings, and the options of the command. Same code, same text, on every machine.
"""

import ast
import importlib
import inspect
import json
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import annotated_types
import typer.main
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rollpool.ops.cli.app import app
from rollpool.worker.engines.settings import EngineSettings
from rollpool.worker.settings import PREFIX, WorkerSettings

HERE = Path(__file__).parent
NOTE = "<!-- Written by docs/make_reference.py (`make docs`); do not edit. -->\n"

SETTINGS_HEAD = """
# Settings of a worker

A worker reads its settings from the environment, then from a TOML file, then takes the default. The file is
`rollpool.toml` in the directory the worker starts in, or what `ROLLPOOL_CONFIG` names. Keys of the file have the names
in the first column; those of the engine stand in a table `[engine]`. In the environment the engine's settings have two
underscores after `ENGINE`: `ROLLPOOL_ENGINE__TP_SIZE`. Lists and maps are given as JSON there:
`ROLLPOOL_ENGINE__EXTRA_ARGS='["--mem-fraction-static", "0.8"]'`.

A setting that does not exist or has a wrong value ends the worker at start, with a line that names it. The pool is no
setting of a worker: it is the argument of `rq worker`. How to set up a host:
[howto-many-tpu-vms.md](howto-many-tpu-vms.md).
"""

OTHER_VARIABLES = """
## Other variables

| variable | read by | meaning |
| --- | --- | --- |
| `ROLLPOOL_URL` | trainers, workers, `rollpool status` | Server of the pool. A worker without it takes the URL `rq worker` was given. |
| `ROLLPOOL_POOL` | trainers, `rollpool status`, `rollpool local` | Name of the pool; default `default`. A worker takes it as its argument. |
| `ROLLPOOL_RUN` | trainers | Name of the training run; default `default`. |
| `ROLLPOOL_CONFIG` | workers | The settings file; default `rollpool.toml`. |
| `ROLLPOOL_CACHE` | `rollpool local`, `rollpool demo`, tests | Where engines, models and JIT caches are kept; default `~/.cache/rollpool`. |
| `ROLLPOOL_LOCAL_ENGINE_PYTHON` | `rollpool local`, `rollpool demo`, tests | An engine's Python to use in place of the one they install. A worker does not read it: its own is `ROLLPOOL_ENGINE__PYTHON`. |
| `RQ_REDIS_URL`, `RQ_WORKER_CLASS` | `rq` | In place of its options `--url` and `--worker-class`. |
"""  # noqa: E501

REFERENCE_HEAD = """
# Reference

From the docstrings. For how things go together read the how-tos: [trainer](howto-trainer.md),
[TPU hosts](howto-many-tpu-vms.md), [inspecting a pool](howto-inspect-backlog.md). Settings of a worker:
[settings.md](settings.md).
"""

#: Modules of the public API, with a heading and the names that come first.
MODULES = {
    "rollpool.producer": ("The trainer's side", ("RolloutPool", "Batch", "enqueue_prompts", "pack", "PackedBatch")),
    "rollpool.schemas": ("The words both sides share", ("SamplingParams", "Group", "Sample", "VersionSpan", "Policy")),
    "rollpool.worker": ("The host's side", ()),
    "rollpool.ops": ("One process", ("local_pool", "split_devices", "LocalPool", "DeviceSplit")),
}


@dataclass(frozen=True)
class Field:
    """One field of a model or dataclass, as its source has it."""

    name: str
    kind: str
    default: str
    meaning: str


def fields_of(model: type[Any]) -> Iterator[Field]:
    """Fields in the order of the source, each with the `#:` comment above it."""
    source = inspect.getsource(model)
    lines = source.splitlines()
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield Field(node.target.id, ast.unparse(node.annotation), _default(node.value), _comment(lines, node))


def _comment(lines: list[str], node: ast.stmt) -> str:
    found: list[str] = []
    at = node.lineno - 2
    while at >= 0 and lines[at].strip().startswith("#:"):
        found.insert(0, lines[at].strip().removeprefix("#:").strip())
        at -= 1
    return " ".join(found)


def _default(value: ast.expr | None) -> str:
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "Field":
        given = {word.arg: ast.unparse(word.value) for word in value.keywords}
        return given.get("default", "")
    return "" if value is None else ast.unparse(value)


# Settings.


def settings_text() -> str:
    """The whole of `settings.md`."""
    worker = _settings_table(WorkerSettings, "", PREFIX)
    engine = _settings_table(EngineSettings, "engine.", f"{PREFIX}ENGINE__")
    return f"{NOTE}{SETTINGS_HEAD}\n## The worker\n\n{worker}\n\n## Its engine\n\n{engine}\n{OTHER_VARIABLES}"


def _settings_table(model: type[BaseModel], prefix: str, variable: str) -> str:
    rows = [
        (f"`{prefix}{each.name}`", f"`{variable}{each.name.upper()}`", _shown_default(model, each.name), _meaning(each))
        for each in fields_of(model)
        if each.name in model.model_fields and model.model_fields[each.name].annotation is not EngineSettings
    ]
    return _table(("setting", "variable", "default", "meaning"), rows)


def _meaning(field: Field) -> str:
    meaning = field.meaning
    if not meaning:
        raise SystemExit(f"{field.name} has no `#:` comment in the code; write one")
    return meaning


def _shown_default(model: type[BaseModel], name: str) -> str:
    info = model.model_fields[name]
    default = info.get_default(call_default_factory=True)
    if default == Path(sys.executable):
        shown = "the worker's own"
    elif default is None:
        shown = "none"
    elif isinstance(default, tuple | dict):
        shown = f"`{json.dumps(default)}`"
    else:
        shown = f"`{default}`"
    return shown + _limits(info)


def _limits(info: FieldInfo) -> str:
    signs = {annotated_types.Ge: "≥", annotated_types.Gt: ">", annotated_types.Le: "≤", annotated_types.Lt: "<"}
    found = [
        f"{sign} {getattr(limit, kind.__name__.lower()):g}"
        for limit in info.metadata
        for kind, sign in signs.items()
        if isinstance(limit, kind)
    ]
    return f" ({', '.join(found)})" if found else ""


# Reference.


def reference_text() -> str:
    """The whole of `reference.md`."""
    shown: set[str] = set()
    parts = [NOTE + REFERENCE_HEAD]
    for module_name, (heading, first) in MODULES.items():
        module = importlib.import_module(module_name)
        parts.append(f"## {heading}: `{module_name}`\n\n{_summary(module)}\n")
        own = [name for name in module.__all__ if name not in shown and not _is_elsewhere(module, name)]
        own.sort(key=lambda name: _rank(getattr(module, name)))
        for name in [*first, *(name for name in own if name not in first)]:
            shown.add(name)
            parts.append(_entry(name, getattr(module, name)))
        if elsewhere := [name for name in module.__all__ if _is_elsewhere(module, name)]:
            parts.append(f"Also handed on from `rollpool.schemas`: {', '.join(f'`{name}`' for name in elsewhere)}.\n")
    parts.append(_command_text())
    return "\n".join(parts)


def _rank(value: Any) -> int:
    """Classes and functions first, then what describes values, then errors."""
    if inspect.isclass(value):
        return 2 if issubclass(value, BaseException) else 0
    return 0 if inspect.isfunction(value) else 1


def _summary(module: ModuleType) -> str:
    return (module.__doc__ or "").strip()


def _is_elsewhere(module: ModuleType, name: str) -> bool:
    """True for what the trainer's side only hands on: it is listed with the words."""
    origin = getattr(getattr(module, name), "__module__", "") or ""
    return module.__name__ == "rollpool.producer" and origin.startswith("rollpool.schemas")


def _entry(name: str, value: Any) -> str:
    if inspect.isclass(value):
        return _class_text(name, value)
    if callable(value) and hasattr(value, "__doc__") and inspect.isfunction(value):
        return f"### `{name}`\n\n{_signature(value, name)}\n{_prose(value)}\n"
    return f"### `{name}`\n\n{_assigned(name)}\n"


def _assigned(name: str) -> str:
    """The words and the value of a constant or type alias, from the source that assigns it."""
    for module_name in sorted(sys.modules):
        if not module_name.startswith("rollpool.schemas."):
            continue
        source = inspect.getsource(sys.modules[module_name])
        for node in ast.parse(source).body:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            if isinstance(node, ast.Assign | ast.AnnAssign) and target and node.value and ast.unparse(target) == name:
                return f"{_comment(source.splitlines(), node)}\n\n`{ast.unparse(node.value)}`".strip()
    raise SystemExit(f"{name} is assigned in no module of rollpool.schemas")


def _class_text(name: str, value: type[Any]) -> str:
    parts = [f"### `{name}`\n\n{_prose(value)}\n"]
    if issubclass(value, BaseModel | tuple) or is_dataclass(value):
        rows = [
            (f"`{each.name}`", f"`{each.kind}`", f"`{each.default}`" if each.default else "", each.meaning)
            for each in fields_of(value)
            if each.name != "model_config"
        ]
        parts.append(_table(("field", "type", "default", "meaning"), rows) + "\n")
    elif _has_public_constructor(value):
        parts.append(f"{_signature(value.__init__, name)}\n{_prose(value.__init__)}\n")
    parts += [_member(name, key, member) for key, member in _public_members(value)]
    return "\n".join(parts)


def _has_public_constructor(value: type[Any]) -> bool:
    words: str = (vars(value)["__init__"].__doc__ if "__init__" in vars(value) else None) or ""
    return bool(words) and not _is_internal(words)


def _public_members(value: type[Any]) -> Iterator[tuple[str, Any]]:
    """What the class and its private bases of ours define, in the order of the source."""
    seen: set[str] = set()
    for owner in value.__mro__:
        ours = owner.__module__.startswith("rollpool.") and (owner is value or owner.__name__.startswith("_"))
        for key, member in vars(owner).items() if ours else ():
            function = _function_of(member)
            if key.startswith("_") or key in seen or function is None or not function.__doc__:
                continue
            if not _is_internal(function.__doc__):
                seen.add(key)
                yield key, member


def _is_internal(doc: str) -> bool:
    return "for the pool, not for users" in doc.lower()


def _function_of(member: Any) -> Any:
    if isinstance(member, property):
        return member.fget
    if isinstance(member, classmethod | staticmethod):
        return member.__func__
    return member if inspect.isfunction(member) else None


def _member(owner: str, key: str, member: Any) -> str:
    function = _function_of(member)
    name = f"{owner}.{key}"
    if isinstance(member, property):
        return f"#### `{name}`\n\n{_prose(function)}\n"
    text = _signature(function, name)
    if twin := _twin_with_the_same_words(owner, key, function):
        awaited = ", awaited" if inspect.iscoroutinefunction(function) else ""
        return f"#### `{name}`\n\n{text}\nAs [`{twin}`](#{_anchor(twin)}){awaited}.\n"
    return f"#### `{name}`\n\n{text}\n{_prose(function)}\n"


def _twin_with_the_same_words(owner: str, key: str, function: Any) -> str | None:
    """The blocking method an asyncio one shares its docstring with."""
    if not owner.startswith("Async"):
        return None
    blocking = owner.removeprefix("Async")
    twin = getattr(getattr(importlib.import_module("rollpool.producer"), blocking), key, None)
    same = twin is not None and inspect.getdoc(twin) == inspect.getdoc(function)
    return f"{blocking}.{key}" if same else None


def _anchor(heading: str) -> str:
    return "".join(letter for letter in heading.lower() if letter.isalnum() or letter in "-_")


def _signature(function: Any, name: str) -> str:
    """The call, from the source; a blocking twin has the parameters of the asyncio method it wraps."""
    original = inspect.unwrap(function)
    if original is function and not inspect.getsource(function).lstrip().startswith(("def", "async", "@")):
        return ""
    blocking = original is not function or name == "enqueue_prompts"
    if name == "enqueue_prompts":
        original = inspect.unwrap(importlib.import_module("rollpool.producer").RolloutPool.enqueue_prompts)
    node = ast.parse(textwrap.dedent(inspect.getsource(original))).body[0]
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    arguments = node.args
    if arguments.args and arguments.args[0].arg in ("self", "cls"):
        del arguments.args[0]
    returns = ast.unparse(node.returns) if node.returns and ast.unparse(node.returns) != "None" else ""
    if node.returns and isinstance(node.returns, ast.Constant) and node.returns.value:
        returns = str(node.returns.value)
    if blocking:
        returns = returns.replace("AsyncBatch", "Batch")
    awaited = "await " if isinstance(node, ast.AsyncFunctionDef) and not blocking else ""
    inside = ast.unparse(arguments)
    shown = f"{awaited}{name}({inside})" + (f" -> {returns}" if returns else "")
    if len(shown) > 100:
        listed = "".join(f"    {part},\n" for part in _split(inside))
        shown = f"{awaited}{name}(\n{listed})" + (f" -> {returns}" if returns else "")
    return f"```text\n{shown}\n```\n"


def _split(arguments: str) -> list[str]:
    """At the commas between arguments, not at those inside brackets."""
    parts, depth = [""], 0
    for letter in arguments:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _prose(value: Any) -> str:
    """A Google docstring as Markdown."""
    lines = (inspect.getdoc(value) or "").splitlines()
    text: list[str] = []
    section = ""
    for line in lines:
        if line in ("Args:", "Raises:", "Returns:"):
            section = line.removesuffix(":")
            text += [f"**{section}**", ""]
        elif line.startswith("    ") and section in ("Args", "Raises"):
            entry = line[4:]
            name, colon, words = entry.partition(": ")
            if entry.startswith(" ") or not colon:
                text.append("  " + entry.strip())
            else:
                text.append(f"- `{name}`: {words}")
        else:
            text.append(line.strip() if section else line)
    return "\n".join(text)


def _command_text() -> str:
    group: Any = typer.main.get_command(app)
    parts = ["## The command: `rollpool`\n", f"{group.help}\n"]
    for name, command in _commands("rollpool", group):
        parts.append(f"### `{name}`\n\n{command.help}\n")
        rows = [
            (_option_name(option), f"`{option.envvar}`" if option.envvar else "", _option_default(option), option.help)
            for option in command.params
            if option.name != "help"
        ]
        if rows:
            parts.append(_table(("option", "variable", "default", "meaning"), rows) + "\n")
    return "\n".join(parts)


def _commands(prefix: str, group: Any) -> Iterator[tuple[str, Any]]:
    """Every command with its whole name; those of a group of commands after it."""
    for name in sorted(group.commands):
        command = group.commands[name]
        yield f"{prefix} {name}", command
        if hasattr(command, "commands"):
            yield from _commands(f"{prefix} {name}", command)


def _option_name(option: Any) -> str:
    """An argument goes by its place in the line, and is shown in capitals."""
    return f"`{option.opts[0]}`" if option.opts[0].startswith("-") else f"`{option.opts[0].upper()}`"


def _option_default(option: Any) -> str:
    return "" if option.default is None or option.default is False else f"`{option.default}`"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines: list[Sequence[str]] = [heads, ["---"] * len(heads), *escaped]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> int:
    """Write both files, or compare them; the exit status."""
    stale = []
    for name, text in (("settings.md", settings_text()), ("reference.md", reference_text())):
        path = HERE / name
        if "--check" not in sys.argv[1:]:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
    if stale:
        print(f"stale: {', '.join(stale)}; write them again with `make docs`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
