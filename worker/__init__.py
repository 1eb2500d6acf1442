"""The TPU host's side: the RQ worker class, pulling, engines, policy changes, settling."""

from rollpool.worker.engines.in_process import InProcessEngine
from rollpool.worker.engines.in_process_owner import InProcessSettings
from rollpool.worker.rq_worker import RolloutWorker

__all__ = ["InProcessEngine", "InProcessSettings", "RolloutWorker"]
