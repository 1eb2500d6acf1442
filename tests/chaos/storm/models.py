"""Who can have made a sample, told by models that have nothing to do with what served it.

Invariant: for a simulated engine the answer is certain; for a real one it is what a second implementation computes.
"""

from pathlib import Path
from typing import Any

import numpy as np

from rollpool.ops.local.reference import ReferenceModel
from rollpool.ops.sim import made_by

#: Largest difference of a log-prob, in nats, as the engine tests allow it.
LOGPROB_ERROR = 0.05


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

    def made_by(self, pool: str, version: int, prompt: list[int], sample: dict[str, Any]) -> bool:
        """Whether policy `version` of a pool made this sample; never, when nobody published it."""
        if (checkpoint := self._checkpoints.get(pool, {}).get(version)) is not None:
            return self._close(checkpoint, prompt, sample)
        signature = self._signatures.get(pool, {}).get(version)
        return signature is not None and made_by(signature, prompt, sample["ids"])

    def _close(self, checkpoint: Path, prompt: list[int], sample: dict[str, Any]) -> bool:
        if checkpoint not in self._models:
            self._models[checkpoint] = ReferenceModel.from_checkpoint(checkpoint)
        ids = np.asarray(sample["ids"], np.int32)
        again = self._models[checkpoint].logprobs(np.asarray(prompt, np.int32), ids, temperature=1.0)
        return bool(np.abs(again - np.asarray(sample["logprobs"], np.float32)).max() < LOGPROB_ERROR)
