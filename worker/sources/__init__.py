"""The sources of policies, on this host: fetched, verified, merged, within a budget of disk."""

from rollpool.worker.sources.adapter import AdapterFacts, adapter_facts, check_for_engine
from rollpool.worker.sources.merge import merge_adapter
from rollpool.worker.sources.stage import Stage
from rollpool.worker.sources.store import Sources

__all__ = ["AdapterFacts", "Sources", "Stage", "adapter_facts", "check_for_engine", "merge_adapter"]
