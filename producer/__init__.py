"""The trainer's side: enqueue prompts, collect groups, publish policies, and resume after a crash.

`RolloutPool` is the way in, `AsyncRolloutPool` its twin for asyncio code.
"""

from rollpool.producer.batch import AsyncBatch
from rollpool.producer.blocking import Batch, RolloutPool
from rollpool.producer.checkpoint_folder import CheckpointFolder
from rollpool.producer.pack import PackedBatch, pack
from rollpool.producer.params import HfTensors, ParamsSink, hf_tensors
from rollpool.producer.pool import AsyncRolloutPool
from rollpool.producer.report import BatchReport, Lengths
from rollpool.producer.shared import enqueue_prompts
from rollpool.schemas import (
    BacklogFull,
    Group,
    InvalidPrompt,
    NotPermitted,
    Policy,
    PolicyRejected,
    PolicyUnknown,
    PoolTimeout,
    RollpoolError,
    Sample,
    SamplingParams,
    SchemaMismatch,
    SettingsError,
    StalenessRule,
    VersionSpan,
)

__all__ = [
    "AsyncBatch",
    "AsyncRolloutPool",
    "BacklogFull",
    "Batch",
    "BatchReport",
    "CheckpointFolder",
    "Group",
    "HfTensors",
    "InvalidPrompt",
    "Lengths",
    "NotPermitted",
    "PackedBatch",
    "ParamsSink",
    "Policy",
    "PolicyRejected",
    "PolicyUnknown",
    "PoolTimeout",
    "RolloutPool",
    "RollpoolError",
    "Sample",
    "SamplingParams",
    "SchemaMismatch",
    "SettingsError",
    "StalenessRule",
    "VersionSpan",
    "enqueue_prompts",
    "hf_tensors",
    "pack",
]
