"""The engine's environment is made once, whole, and by one; what goes wrong with it says what to do.

In place of `venv` and pip there is a shell script that notes how it was called; the code that runs it is the real one.
"""

import multiprocessing as mp
import re
import subprocess
import sys
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from waiting import LONG, until_blocking

from rollpool.ops.local import engine_env
from rollpool.ops.local.engine_env import CACHE_ENV, PYTHON_ENV, cache_dir, ensure_engine_env, environment_name
from rollpool.schemas import RollpoolError

#: The Python of an environment: `$0` is its path, two folders up is the environment, beside which the test leaves
#: what it is to do. `first-install` runs at the first installation of the engine.
PYTHON = r"""#!/bin/sh
root=$(dirname "$(dirname "$(dirname "$0")")")
echo "$@" >> "$root/calls"
case "$*" in
    *"-m pip install sglang-jax"*)
        echo "Collecting sglang-jax==0.0.1.post1"
        if [ -f "$root/hold" ]; then
            echo "  Downloading https://index/libtpu-0.0.17-py3-none-any.whl (132.1 MB)"
            echo $$ > "$root/held"
            while [ -f "$root/hold" ]; do sleep 0.02; done
        fi
        if [ -f "$root/fail" ]; then cat "$root/fail"; exit 7; fi ;;
    *"--force-reinstall --no-deps msgpack"*) if [ ! -f "$root/beyond-repair" ]; then rm -f "$root/clash"; fi ;;
    *"import msgpack"*) test ! -f "$root/clash" ;;
esac
"""


def fake_create(folder: Path) -> None:
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    with (folder.parent / "created").open("a") as created:
        created.write("once\n")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_env, "_create", fake_create)
    monkeypatch.delenv(PYTHON_ENV, raising=False)
    monkeypatch.delenv(CACHE_ENV, raising=False)


def installs(root: Path) -> int:
    return (root / "calls").read_text().count("pip install sglang-jax")


def quiet(line: str) -> None:
    del line


def test_it_is_made_once_and_found_from_then_on(tmp_path: Path) -> None:
    said: list[str] = []
    python = ensure_engine_env(tmp_path, echo=said.append)
    assert python == tmp_path / environment_name() / "bin" / "python"
    assert len(said) == 2, said
    assert str(tmp_path) in said[0]
    assert engine_env.REQUIREMENT in said[0]
    assert "ready" in said[1]
    assert ensure_engine_env(tmp_path, echo=said.append) == python
    assert len(said) == 2, "nothing is said where nothing is done"
    assert installs(tmp_path) == 1


def test_a_half_made_environment_is_made_again_from_nothing(tmp_path: Path) -> None:
    (tmp_path / "fail").write_text("ERROR: No space left on device\n")
    with pytest.raises(RollpoolError):
        ensure_engine_env(tmp_path, echo=quiet)
    leftover = tmp_path / environment_name() / "leftover"
    leftover.touch()
    (tmp_path / "fail").unlink()
    assert ensure_engine_env(tmp_path, echo=quiet).exists()
    assert not leftover.exists()
    assert installs(tmp_path) == 2


def test_an_environment_whose_interpreter_is_gone_is_made_again(tmp_path: Path) -> None:
    python = ensure_engine_env(tmp_path, echo=quiet)
    python.unlink()
    python.symlink_to(tmp_path / "removed-python")
    assert ensure_engine_env(tmp_path, echo=quiet).exists()
    assert installs(tmp_path) == 2


def test_a_caller_waits_while_another_thread_makes_it(tmp_path: Path) -> None:
    (tmp_path / "hold").touch()
    said: list[str] = []
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(ensure_engine_env, tmp_path, echo=quiet)
        try:
            until_blocking((tmp_path / "held").exists, "the first installs")
            second = threads.submit(ensure_engine_env, tmp_path, echo=said.append)
            until_blocking(lambda: said, "the second says that it waits")
            assert "waiting" in said[0]
            assert not second.done()
        finally:
            (tmp_path / "hold").unlink()
        assert first.result(LONG) == second.result(LONG)
    assert installs(tmp_path) == 1


def _ensure(root: Path) -> None:
    engine_env._create = fake_create  # a spawned process has no fixtures
    ensure_engine_env(root, echo=lambda line: print(line, file=sys.stderr))


def test_processes_that_start_together_make_one(tmp_path: Path) -> None:
    (tmp_path / "hold").touch()
    context = mp.get_context("spawn")
    callers = [context.Process(target=_ensure, args=(tmp_path,)) for _ in range(3)]
    for caller in callers:
        caller.start()
    try:
        until_blocking((tmp_path / "held").exists, "one of them installs")
        (tmp_path / "hold").unlink()
        for caller in callers:
            caller.join(LONG)
        assert [caller.exitcode for caller in callers] == [0, 0, 0]
        assert (tmp_path / "created").read_text().split() == ["once"]
        assert installs(tmp_path) == 1
    finally:
        for caller in callers:
            caller.kill()
            caller.join()
            caller.close()


def test_a_maker_that_is_killed_is_followed_by_the_next_caller(tmp_path: Path) -> None:
    (tmp_path / "hold").touch()
    maker = mp.get_context("spawn").Process(target=_ensure, args=(tmp_path,))
    maker.start()
    until_blocking((tmp_path / "held").exists, "it installs")
    maker.kill()
    maker.join()
    maker.close()
    (tmp_path / "hold").unlink()
    assert ensure_engine_env(tmp_path, echo=quiet).exists()
    assert installs(tmp_path) == 2


def test_an_interrupt_ends_pip_before_the_lock_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hold").touch()
    monkeypatch.setattr(engine_env, "HEARTBEAT_S", 0.01)

    def interrupt(line: str) -> None:
        if "downloading" in line and (tmp_path / "held").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_engine_env(tmp_path, echo=interrupt)
    assert not psutil.pid_exists(int((tmp_path / "held").read_text()))
    (tmp_path / "hold").unlink()
    assert ensure_engine_env(tmp_path, echo=quiet).exists()


def test_a_python_that_is_given_is_taken_and_nothing_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tmp_path / "python"
    given.touch()
    monkeypatch.setenv(PYTHON_ENV, str(given))
    assert ensure_engine_env(tmp_path / "root", echo=pytest.fail) == given
    assert not (tmp_path / "root").exists()


def test_a_given_python_that_is_not_there_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PYTHON_ENV, str(tmp_path / "absent"))
    with pytest.raises(RollpoolError, match=rf"{PYTHON_ENV}={re.escape(str(tmp_path / 'absent'))} is no file"):
        ensure_engine_env(tmp_path / "root", echo=quiet)
    assert not (tmp_path / "root").exists()


def test_pip_that_fails_is_told_with_its_last_words_and_what_to_do(tmp_path: Path) -> None:
    noise = "".join(f"line {number}\n" for number in range(100))
    (tmp_path / "fail").write_text(f"{noise}ERROR: No matching distribution found for sglang-jax\n")
    with pytest.raises(RollpoolError, match="status 7") as raised:
        ensure_engine_env(tmp_path, echo=quiet)
    told = str(raised.value)
    assert "No matching distribution" in told
    assert "line 99" in told
    assert "line 5\n" not in told, "the end, not all of it"
    for advice in ("PIP_INDEX_URL", "disk free", PYTHON_ENV):
        assert advice in told


def test_a_clash_of_msgpack_is_mended(tmp_path: Path) -> None:
    (tmp_path / "clash").touch()
    ensure_engine_env(tmp_path, echo=quiet)
    calls = (tmp_path / "calls").read_text()
    removed = calls.index("pip uninstall -y msgpack-python")
    assert calls.index("pip install --force-reinstall --no-deps msgpack") > removed
    assert calls.rindex("import msgpack") > removed, "the repair was looked at"


def test_msgpack_beyond_repair_is_an_error_and_no_environment(tmp_path: Path) -> None:
    (tmp_path / "clash").touch()
    (tmp_path / "beyond-repair").touch()
    for _ in range(2):
        with pytest.raises(RollpoolError, match=r"msgpack .*remove that folder"):
            ensure_engine_env(tmp_path, echo=quiet)
    assert installs(tmp_path) == 2


def test_the_check_of_msgpack_is_not_led_astray_by_the_callers_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "msgpack.py").write_text("raise SystemExit(1)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert engine_env._msgpack_works(Path(sys.executable))


def test_while_pip_works_a_line_now_and_then_says_on_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hold").touch()
    monkeypatch.setattr(engine_env, "HEARTBEAT_S", 0.01)
    said: list[str] = []

    def listen(line: str) -> None:
        said.append(line)
        if "downloading libtpu (132.1 MB)" in line:
            (tmp_path / "hold").unlink(missing_ok=True)

    ensure_engine_env(tmp_path, echo=listen)
    beats = said[1:-1]
    assert beats
    assert all(re.match(r"  \d+ s: (starting pip|collecting|downloading)", line) for line in beats), beats


@pytest.mark.parametrize(
    ("line", "doing"),
    [
        ("Collecting sglang-jax==0.0.1.post1", "collecting sglang-jax==0.0.1.post1"),
        ("Collecting jax<0.7 (from sglang-jax)", "collecting jax<0.7"),
        ("  Downloading jaxlib-0.6.2-cp311-cp311-manylinux2014_x86_64.whl (89.9 MB)", "downloading jaxlib (89.9 MB)"),
        ("  Downloading x-1.tar.gz", "downloading x"),
        ("  Building wheel for msgpack-python (setup.py): started", "building wheel for msgpack-python"),
        ("Installing collected packages: a, b, c", "installing 3 packages"),
        ("Requirement already satisfied: a", None),
        ("", None),
    ],
)
def test_steps_of_pip_are_told_in_a_few_words(line: str, doing: str | None) -> None:
    said = engine_env._doing(line + "\n")
    assert said == doing or (doing is not None and (said or "").startswith(doing))


def test_a_folder_that_takes_nothing_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RollpoolError, match=rf"set {CACHE_ENV} to a folder"):
        ensure_engine_env(tmp_path / "file", echo=quiet)


def test_a_python_that_cannot_make_environments_says_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.delenv(PYTHON_ENV, raising=False)

    def no_ensurepip(self: object, folder: Path) -> None:
        raise subprocess.CalledProcessError(1, [sys.executable, "-m", "ensurepip"])

    monkeypatch.setattr(venv.EnvBuilder, "create", no_ensurepip)
    with pytest.raises(RollpoolError, match=r"python3-venv.*or set ROLLPOOL_LOCAL_ENGINE_PYTHON"):
        ensure_engine_env(tmp_path, echo=quiet)


def test_the_cache_is_absolute_and_where_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "rollpool"
    monkeypatch.setenv(CACHE_ENV, "~/other")
    assert cache_dir() == tmp_path / "other"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(CACHE_ENV, "relative")
    assert cache_dir() == tmp_path / "relative"
