"""`python -m examples.grpo_tiny`: train through a real engine, each way that it can, and say what came of it.

Invariant: the last line is one JSON object, of measured numbers alone; a way that this engine cannot go is null.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from rollpool.ops.local.engine_settings import EngineLine
from rollpool.schemas import RollpoolError

from . import in_process
from .plot import draw
from .train import History, Plan, Score, Step, train
from .ways import WAYS, Way, line_of_engine, open_way

#: Exit status after Ctrl-C, as shells have it: 128 + SIGINT.
INTERRUPTED = 130

#: Policy updates of a whole run: by the staleness, since old tokens teach less; and of an adapter, which has fewer
#: weights to change.
STEPS = {"checkpoint": 12, "lora": 24, "in_process": 12}
STEPS_PER_STALENESS = 3

#: The short form shows a rise, and does not wait for the end of it. After 6 updates the reward was between 0.19 and
#: 0.29, too near to the start to be told from it each time. Many held-out prompts of one sample tell a mean better
#: than few of many.
SHORT = Plan(steps=8, held_out=256, held_out_samples=1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; its exit status."""
    asked = _parse(arguments)
    # What a service manager sends ends things in the same order as what a terminal sends.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    console = Console()
    try:
        summary = run(asked, console)
    except KeyboardInterrupt:
        print("interrupted; everything that was started has ended", file=sys.stderr)
        return INTERRUPTED
    except RollpoolError as error:
        print(f"grpo_tiny: {error}", file=sys.stderr)
        return 1
    if not asked.save:
        print(json.dumps(summary), flush=True)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.grpo_tiny", description=__doc__.partition(":")[2])
    parser.add_argument("--way", choices=[*WAYS, "all"], default="all", help="how hosts get new weights")
    parser.add_argument("--staleness", type=int, choices=range(5), default=0, help="versions a token may be behind")
    parser.add_argument("--steps", type=int, help="policy updates; by default as many as it takes")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and minibatches; the engine's is its own")
    parser.add_argument("--short", action="store_true", help=f"the checkpoint way alone, {SHORT.steps} updates")
    parser.add_argument("--plot", type=Path, default=Path("reward.png"), help="the picture to write")
    parser.add_argument("--save", type=Path, help="where `in_process` writes what it saw, for whoever started it")
    return parser.parse_args(arguments)


def run(asked: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Go each way; the last line."""
    begin, line = time.monotonic(), line_of_engine()
    console.print(f"engine: sglang-jax, {line}")
    histories: dict[str, History] = {}
    ways: Sequence[Way] = ("checkpoint",) if asked.short else WAYS if asked.way == "all" else (asked.way,)
    for way in ways:
        if history := _go(way, line, asked, console):
            histories[way] = history
    if asked.save and (history := histories.get("in_process")):
        in_process.save(history, asked.save)
    elif histories:
        console.print(f"wrote {draw(histories, asked.plot)}")
    return summary_of(histories, asked.staleness, time.monotonic() - begin)


def _go(way: Way, line: EngineLine, asked: argparse.Namespace, console: Console) -> History | None:
    """One way; None where this engine cannot go it."""
    if way != "checkpoint" and line != "main":
        console.print(f"{way}: left out, {line} has no way to do it")
        return None
    if way == "in_process" and not in_process.runs_here():
        told = ["--staleness", str(asked.staleness), "--seed", str(asked.seed)]
        return in_process.elsewhere([*told, *(["--steps", str(asked.steps)] if asked.steps else [])], console)
    plan = SHORT if asked.short else Plan(steps=STEPS[way] + STEPS_PER_STALENESS * asked.staleness)
    plan = replace(plan, steps=asked.steps or plan.steps)
    with ExitStack() as stack:
        opened = in_process.open_in_process() if way == "in_process" else open_way(way, line)
        with console.status(f"{way}: starting an engine"):
            pool, learner = stack.enter_context(opened)
        status = stack.enter_context(console.status(f"{way}: looking at the held-out prompts"))
        history = train(
            pool,
            learner,
            plan,
            staleness=asked.staleness,
            seed=asked.seed,
            show=_shower(way, plan, console, status.update),
        )
        status.update(f"{way}: ending the host")
    return history


def _shower(way: str, plan: Plan, console: Console, status: Callable[[str], None]) -> Callable[[Step | Score], None]:
    def show(seen: Step | Score) -> None:
        if isinstance(seen, Score):
            console.print(f"{way}: held-out reward of policy {seen.version}: {seen.mean:.3f} ± {seen.error:.3f}")
            return
        console.print(
            f"{way}: step {seen.number:2}/{plan.steps}  reward {seen.reward:.3f}  behind {seen.staleness:.2f} "
            f"(at most {seen.oldest})  {seen.tokens_per_second:.0f} tokens/s  {seen.seconds:.1f} s"
        )
        status(f"{way}: after step {seen.number} of {plan.steps}")

    return show


def summary_of(histories: dict[str, History], staleness: int, seconds: float) -> dict[str, Any]:
    """The last line; `ratio_max_error` is null where tokens are older than what is trained, and ratios no test."""
    errors = [history.ratio_errors for history in histories.values()] if staleness == 0 else []
    every = np.concatenate(errors) if errors else None
    ratios = np.concatenate([history.ratios for history in histories.values()]) if errors else None
    return {
        **{way: _figures(histories[way]) if way in histories else None for way in WAYS},
        "ratio_max_error": None if every is None else _round(every.max()),
        "ratio_p99_error": None if every is None else _round(np.quantile(every, 0.99)),
        "ratio_std": None if ratios is None else _round(ratios.std()),
        "staleness": staleness,
        "seconds": round(seconds, 1),
    }


def _figures(history: History) -> dict[str, float]:
    first, last = history.scores[0], history.scores[-1]
    return {
        "start": round(first.mean, 4),
        "end": round(last.mean, 4),
        "start_error": round(first.error, 4),
        "end_error": round(last.error, 4),
        "steps": len(history.steps),
        "seconds": round(sum(step.seconds for step in history.steps), 1),
        "oldest": max(step.oldest for step in history.steps),
    }


def _round(value: Any) -> float:
    """Three figures, and of what is no number infinity: that is not small."""
    return float(f"{float(np.nan_to_num(value, nan=np.inf)):.2e}")


if __name__ == "__main__":
    sys.exit(main())
