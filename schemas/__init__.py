"""What both sides must agree on: models, the codec, key names, scripts, how to connect, errors."""

from rollpool.schemas.commands import Ack, AckState, Command
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
from rollpool.schemas.policies import Policy
from rollpool.schemas.results import OUTCOMES, FinishReason, Group, Outcome, Sample, VersionSpan
from rollpool.schemas.staleness import StalenessRule
from rollpool.schemas.status import WorkerState, WorkerStatus

__all__ = [
    "GROUP",
    "LANES",
    "OUTCOMES",
    "Ack",
    "AckState",
    "BacklogFull",
    "Command",
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
    "StalenessRule",
    "VersionSpan",
    "WorkerState",
    "WorkerStatus",
]
