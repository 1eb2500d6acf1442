"""The command line of a simulated engine: what a worker passes to sglang-jax, and `--sim-…` flags of its own.

Invariant: what the real server's parser would refuse to start with, as a flag it does not know, is refused here too.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, get_args

#: A version by which the main line names itself when it is built without tags.
VERSION = "0.0.0.dev0+sim"

#: How an engine comes to an adapter: never; only at its launch, as the main line; or while it serves, as the main line
#: with our launcher.
LoraKind: TypeAlias = Literal["none", "launch", "runtime"]

#: Adapters in a batch, the base itself among them, where nobody says; as the main line.
_LORAS_PER_BATCH = 8

#: Tokens of the KV cache. It is never short here, so it is what a v4-8 might hold for a model of 8 billion weights.
_KV_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """How one simulated engine was started."""

    model_path: str
    host: str
    port: int
    device: str
    tp_size: int
    random_seed: int
    skip_server_warmup: bool
    log_level_http: str
    max_seq_len: int | None
    context_length: int | None
    page_size: int
    max_running_requests: int
    max_total_tokens: int
    api_key: str | None
    enable_lora: bool
    #: Path by name.
    lora_paths: dict[str, str]
    max_loras_per_batch: int
    max_lora_rank: int | None
    lora_target_modules: list[str] | None
    #: Time of a decode step, in milliseconds.
    sim_step_ms: float
    #: What each running request adds to it.
    sim_request_ms: float
    #: Time for each token of a prompt.
    sim_prompt_token_ms: float
    sim_median_tokens: float
    sim_sigma: float
    #: Seconds that loading the model takes.
    sim_start_s: float
    #: True when the weights can be changed while it serves.
    sim_hot_swap: bool
    sim_lora: LoraKind
    #: Seconds that loading new weights takes, while it serves on.
    sim_swap_s: float
    #: Seconds for which nothing is decoded while they are put in place.
    sim_stall_s: float

    @property
    def adapter_slots(self) -> int:
        """Adapters that it holds at most."""
        return self.max_loras_per_batch - 1 if self.enable_lora else 0

    def server_args(self) -> dict[str, Any]:
        """What `/get_server_info` repeats."""
        return {**asdict(self), "attention_backend": "native", "dp_size": 1}

    def scheduler_options(self) -> dict[str, Any]:
        """What the scheduler's process needs to know."""
        return {
            "max_running_requests": self.max_running_requests,
            "step_s": self.sim_step_ms / 1000,
            "request_s": self.sim_request_ms / 1000,
            "prompt_token_s": self.sim_prompt_token_ms / 1000,
        }


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Read a command line; ends the process, as the real server does, when it is wrong."""
    parser = argparse.ArgumentParser(prog="sim", description="A simulated sglang-jax server.", allow_abbrev=False)
    parser.add_argument("--model-path", required=True, help="directory made by make_sim_model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--random-seed", type=int, default=42)
    parser.add_argument("--skip-server-warmup", action="store_true")
    parser.add_argument("--log-level-http", default="info")
    parser.add_argument("--max-seq-len", type=int)
    parser.add_argument("--context-length", type=int)
    parser.add_argument("--page-size", type=int, default=1)
    parser.add_argument("--max-running-requests", type=_positive, default=16)
    parser.add_argument("--max-total-tokens", type=_positive, default=_KV_TOKENS)
    parser.add_argument("--api-key")
    if _kind_of_lora(argv) != "none":
        _add_lora(parser)
    parser.add_argument("--sim-step-ms", type=_positive_float, default=20.0)
    parser.add_argument("--sim-request-ms", type=_not_negative, default=0.01)
    parser.add_argument("--sim-prompt-token-ms", type=_not_negative, default=0.005)
    parser.add_argument("--sim-median-tokens", type=_positive_float, default=64.0)
    parser.add_argument("--sim-sigma", type=_not_negative, default=0.6)
    parser.add_argument("--sim-start-s", type=_not_negative, default=0.2)
    parser.add_argument("--sim-hot-swap", action="store_true")
    parser.add_argument("--sim-lora", choices=get_args(LoraKind), default="none")
    parser.add_argument("--sim-swap-s", type=_not_negative, default=0.1)
    parser.add_argument("--sim-stall-s", type=_not_negative, default=0.02)
    parser.set_defaults(enable_lora=False, lora_paths=[], max_loras_per_batch=_LORAS_PER_BATCH)
    parser.set_defaults(max_lora_rank=None, lora_target_modules=None)
    read = vars(parser.parse_args(argv))
    paths = dict(read["lora_paths"])
    return Arguments(**{**read, "lora_paths": paths, "enable_lora": read["enable_lora"] or bool(paths)})


def _kind_of_lora(argv: Sequence[str]) -> str:
    """Which flags there are: those of adapters are unknown to an engine that has none."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--sim-lora", default="none")
    return str(parser.parse_known_args(argv)[0].sim_lora)


def _add_lora(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--enable-lora", action="store_true")
    parser.add_argument("--lora-paths", nargs="*", type=_named_path)
    parser.add_argument("--max-loras-per-batch", type=_positive)
    parser.add_argument("--max-lora-rank", type=_positive)
    parser.add_argument("--lora-target-modules", nargs="*")


def _named_path(word: str) -> tuple[str, str]:
    """`NAME=PATH`, or a path, which is its own name."""
    name, equals, path = word.partition("=")
    return (name, path) if equals else (word, word)


def _positive(word: str) -> int:
    if (value := int(word)) < 1:
        raise argparse.ArgumentTypeError(f"{word} is not at least 1")
    return value


def _positive_float(word: str) -> float:
    if not (value := float(word)) > 0:
        raise argparse.ArgumentTypeError(f"{word} is not over 0")
    return value


def _not_negative(word: str) -> float:
    if not (value := float(word)) >= 0:
        raise argparse.ArgumentTypeError(f"{word} is under 0")
    return value
