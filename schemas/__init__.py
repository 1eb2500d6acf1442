"""What both sides must agree on: models, the codec, key names, scripts, how to connect, errors."""

from rollpool.schemas.commands import Ack, AckState, ChangeMode, ChangeWay, Command, CommandKind
from rollpool.schemas.errors import (
    BacklogFull,
    EngineUnavailable,
    InvalidPrompt,
    NotPermitted,
    PolicyRejected,
    PolicyUnknown,
    PoolTimeout,
    RollpoolError,
    SchemaMismatch,
    SettingsError,
)
from rollpool.schemas.jobs import LANES, Lane, Message, Prompt, PromptJob, SamplingParams
from rollpool.schemas.keys import GROUP, Keys
from rollpool.schemas.policies import CHECKPOINTS, Policy, SourceFile
from rollpool.schemas.results import OUTCOMES, FinishReason, Group, Outcome, Sample, VersionSpan
from rollpool.schemas.staleness import StalenessRule
from rollpool.schemas.status import WorkerState, WorkerStatus

__all__ = [
    "CHECKPOINTS",
    "GROUP",
    "LANES",
    "OUTCOMES",
    "Ack",
    "AckState",
    "BacklogFull",
    "ChangeMode",
    "ChangeWay",
    "Command",
    "CommandKind",
    "EngineUnavailable",
    "FinishReason",
    "Group",
    "InvalidPrompt",
    "Keys",
    "Lane",
    "Message",
    "NotPermitted",
    "Outcome",
    "Policy",
    "PolicyRejected",
    "PolicyUnknown",
    "PoolTimeout",
    "Prompt",
    "PromptJob",
    "RollpoolError",
    "Sample",
    "SamplingParams",
    "SchemaMismatch",
    "SettingsError",
    "SourceFile",
    "StalenessRule",
    "VersionSpan",
    "WorkerState",
    "WorkerStatus",
]
