"""A picture of what training saw.

Invariant: every point is one step's or one look's own figure; nothing is smoothed.
"""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .task import DIGITS
from .train import FIRST, History


def draw(histories: Mapping[str, History], file: Path) -> Path:
    """Reward, staleness and tokens per second by step, one line a way, as a PNG."""
    figure = Figure(figsize=(7, 8), layout="constrained")
    FigureCanvasAgg(figure)
    reward, staleness, speed = figure.subplots(3, 1, sharex=True)
    for name, history in histories.items():
        steps = [step.number for step in history.steps]
        (line,) = reward.plot(steps, [step.reward for step in history.steps], alpha=0.4, label=f"{name}: training")
        reward.errorbar(
            [score.version - FIRST for score in history.scores],
            [score.mean for score in history.scores],
            yerr=[score.error for score in history.scores],
            color=line.get_color(),
            marker="o",
            capsize=3,
            label=f"{name}: held out, with standard error",
        )
        staleness.plot(steps, [step.staleness for step in history.steps], marker=".", label=name)
        speed.plot(steps, [step.tokens_per_second for step in history.steps], marker=".", label=name)
    reward.axhline(1 / DIGITS, color="grey", linestyle=":", label="any answer that ignores the prompt")
    reward.set_ylabel("mean reward")
    staleness.set_ylabel("versions behind, mean")
    speed.set_ylabel("tokens/s, whole step")
    speed.set_xlabel("policy updates")
    reward.set_ylim(0, 1)
    staleness.set_ylim(bottom=-0.1)
    speed.set_ylim(bottom=0)
    reward.legend(fontsize="small")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    return file
