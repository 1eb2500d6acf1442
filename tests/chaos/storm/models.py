"""Who can have made a sample, told by models that have nothing to do with what served it.

Invariant: for a simulated engine the answer is certain; for a real one it is what a second implementation computes.
"""

from pathlib import Path
from typing import Any

import numpy as np

from rollpool.ops.local.reference import ReferenceModel
from rollpool.ops.sim import made_by_spans

#: Largest difference of a log-prob, in nats, as the engine tests allow it.
LOGPROB_ERROR = 0.05

#: Pieces of a sample of one version: in a storm one may be moved more often than elsewhere.
MOST_PIECES = 12


class Judges:
    """Every policy of a storm.

    Args:
        signatures: of simulated policies, by pool and version.
        checkpoints: of real ones, by pool and version.
    """

    def __init__(self, signatures: dict[str, dict[int, int]], checkpoints: dict[str, dict[int, Path]]) -> None:
        self._signatures = signatures
        self._checkpoints = checkpoints
        self._models: dict[Path, ReferenceModel] = {}

    def made_by(self, pool: str, prompt: list[int], sample: dict[str, Any]) -> bool:
        """Whether the policies that its spans name made this sample; never, when nobody published one of them."""
        if pool in self._checkpoints:
            return all(self._close(self._checkpoints[pool], span, prompt, sample) for span in sample["spans"])
        return made_by_spans(
            self._signatures.get(pool, {}),
            prompt,
            sample["ids"],
            sample["spans"],
            logprobs=sample["logprobs"],
            most_pieces=MOST_PIECES,
        )

    def _close(self, checkpoints: dict[int, Path], span: list[int], prompt: list[int], sample: dict[str, Any]) -> bool:
        version, start, end = span
        if (checkpoint := checkpoints.get(version)) is None:
            return False
        if checkpoint not in self._models:
            self._models[checkpoint] = ReferenceModel.from_checkpoint(checkpoint)
        ids = np.asarray(sample["ids"], np.int32)
        again = self._models[checkpoint].logprobs(np.asarray(prompt, np.int32), ids, temperature=1.0)
        told = np.asarray(sample["logprobs"], np.float32)
        return bool(np.abs(again - told)[start:end].max(initial=0.0) < LOGPROB_ERROR)
