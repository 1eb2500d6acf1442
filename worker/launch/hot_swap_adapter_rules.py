"""Which adapters the engine applies exactly as they were trained; pure but for reading the files.

Invariant: an adapter that passes is plain LoRA, `W + lora_alpha / r * B @ A` for each matrix it is on, on matrices the
engine applies it to, and of a rank it does not cut.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
    from rollpool.worker.launch.hot_swap_files import Tensor, read_json, read_tensors
    from rollpool.worker.launch.hot_swap_messages import Refused
else:
    from hot_swap_files import Tensor, read_json, read_tensors
    from hot_swap_messages import Refused

#: Settings of peft that change nothing in what the file's matrices mean; the last five are looked at by themselves.
#: Whatever else is set, the engine pays no heed to it.
_WITHOUT_EFFECT = frozenset(
    {
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "exclude_modules",
        "lora_dropout",
        "layers_to_transform",
        "layers_pattern",
        "megatron_core",
        "eva_config",
        "runtime_config",
        "qalora_group_size",
        "target_modules",
        "peft_type",
        "r",
        "lora_alpha",
        "init_lora_weights",
    }
)

#: Ways to start the training that leave the base's weights as they were.
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")

_NAME = re.compile(r"(?:base_model\.model\.)?model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.lora_([AB])\.weight")

_FLOATS = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class Limits:
    """What an engine was launched for.

    Attributes:
        modules: Rows and columns of each matrix it applies adapters to, by the module's name.
    """

    max_rank: int
    layers: int
    modules: Mapping[str, tuple[int, int]]


def check_adapter(folder: Path, limits: Limits) -> None:
    """See that the engine would apply all of an adapter.

    Raises:
        Refused: It would not, or the files are not whole; the message says what.
    """
    if not folder.is_dir():
        raise Refused(f"{folder} is no directory on this host")
    rank = check_config(read_json(folder / "adapter_config.json"), limits, str(folder))
    check_tensors(read_tensors(folder), rank, limits, str(folder))


def check_config(config: Mapping[str, Any], limits: Limits, where: str) -> int:
    """Check adapter_config.json.

    Returns:
        The rank.

    Raises:
        Refused: See `check_adapter`.
    """
    if str(config.get("peft_type", "")).lower() != "lora":
        raise Refused(f"{where} is not LoRA: its peft_type is {config.get('peft_type')!r}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise Refused(f"{where} has no rank and alpha: r={rank!r}, lora_alpha={alpha!r}")
    if rank > limits.max_rank:
        raise Refused(
            f"{where} has rank {rank}; this engine was launched for {limits.max_rank} at most and would cut it: "
            f"launch it with --max-lora-rank {rank}",
            restart_may_help=True,
        )
    if not isinstance(config.get("target_modules"), list):
        raise Refused(f"{where}: target_modules is {config.get('target_modules')!r}; the engine takes a list of names")
    if (start := config.get("init_lora_weights")) not in _PLAIN_STARTS:
        raise Refused(f"{where}: init_lora_weights={start!r} changed the base's weights before the training")
    odd = {key: value for key, value in config.items() if value and key not in _WITHOUT_EFFECT}
    if odd.get("bias") == "none":
        del odd["bias"]
    if odd:
        ignored = [f"{key}={value!r}" for key, value in sorted(odd.items())]
        raise Refused(f"{where} sets {', '.join(ignored)}, which the engine ignores: merge it into its base instead")
    return rank


def check_tensors(tensors: Mapping[str, Tensor], rank: int, limits: Limits, where: str) -> None:
    """Check the adapter's tensors.

    Raises:
        Refused: See `check_adapter`.
    """
    halves: dict[tuple[int, str], set[str]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or match[2] not in limits.modules:
            supported = ", ".join(sorted(limits.modules))
            raise Refused(f"{where}: the engine applies no {name}; it has adapters on {supported} alone")
        layer, module, half = int(match[1]), match[2], match[3]
        if layer >= limits.layers:
            raise Refused(f"{where}: {name} is of layer {layer}; the model has {limits.layers}")
        rows, columns = limits.modules[module]
        expected = (rank, columns) if half == "A" else (rows, rank)
        if tensor.shape != expected:
            raise Refused(f"{where}: {name} has shape {tensor.shape}; {expected} fits this model")
        if tensor.dtype not in _FLOATS:
            raise Refused(f"{where}: {name} is {tensor.dtype}, which the engine does not apply")
        halves.setdefault((layer, module), set()).add(half)
    for (layer, module), found in halves.items():
        if found != {"A", "B"}:
            raise Refused(f"{where}: {module} of layer {layer} has lora_{min(found)} alone")
    if not halves:
        raise Refused(f"{where} holds no tensor")
