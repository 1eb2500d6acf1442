"""What an adapter is: read from its two files, without its numbers.

Invariant: `adapter_facts` names everything in an adapter that is not plain LoRA (`W + scale * B @ A`), so that whoever
applies an adapter whose `oddities` are empty applies all of it.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rollpool.schemas import PolicyRejected
from rollpool.worker.sources.tensors import FLOATS, Tensor, layout

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

#: peft puts this before the names of the model's own modules.
_PREFIX = "base_model.model."

#: Modules of an adapter's file, and which of their matrices it is. peft stores an embedding's the other way round.
_PAIR = re.compile(r"(?P<module>.+)\.(?:lora_(?P<plain>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))")

#: peft saves these beside the adapter when it is on them, though it did not train them.
_SAVED_ALONG = re.compile(r"(?P<module>(?:.+\.)?(?:embed_tokens|lm_head|wte))\.(?:base_layer\.)?weight")

#: What of peft's config changes nothing in what the file's matrices mean: which modules were chosen, how it was
#: trained, where it came from. The last five are looked at by themselves.
_WITHOUT_EFFECT = frozenset(
    {
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "lora_dropout",
        "layers_to_transform",
        "layers_pattern",
        "megatron_core",
        "eva_config",
        "runtime_config",
        "qalora_group_size",
        "r",
        "lora_alpha",
        "use_rslora",
        "bias",
        "init_lora_weights",
    }
)

#: Ways to start the training that leave the base's weights as they were; the others move a part of them into the
#: adapter, so that it does not belong on the base any more.
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")

#: What some settings do, for whoever has to choose others.
_MEANING = {
    "use_dora": "DoRA scales each row by a learned magnitude",
    "rank_pattern": "ranks differ between modules",
    "alpha_pattern": "scales differ between modules",
    "modules_to_save": "whole modules were trained along",
    "trainable_token_indices": "rows of the embedding were trained along",
    "fan_in_fan_out": "matrices are stored transposed",
    "layer_replication": "layers are repeated",
    "alora_invocation_tokens": "it is active after certain tokens only",
    "target_parameters": "it is on parameters, not on modules",
    "lora_bias": "it has biases of its own",
}

#: What the engine puts adapters on; it passes over the rest of an adapter silently.
_ENGINE_MODULES = re.compile(
    r"(?:.+\.)?layers\.(?P<layer>\d+)\.(?:self_attn|mlp)\.(?P<name>(?:q|k|v|o|gate|up|down)_proj)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A module of the model that an adapter changes; shapes are those of the module's weight."""

    #: As in the base's files, less `.weight`.
    module: str
    #: Names of its two matrices in the adapter's file.
    a: str
    b: str
    rows: int
    columns: int
    #: True where `(B @ A)` is the change's transpose.
    transposed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFacts:
    """An adapter, less its numbers."""

    path: Path
    rank: int
    alpha: float
    #: True when the scale is `alpha / sqrt(rank)`, else it is `alpha / rank`.
    rslora: bool
    #: The same in each of them: patterns are among the oddities.
    targets: tuple[Target, ...]
    #: What it chose its modules by, as peft keeps it: names, or one pattern.
    target_modules: tuple[str, ...] | str | None
    #: Weights of the embeddings that peft saved along: file's name, module.
    saved_along: tuple[tuple[str, str], ...]
    #: The tensors of its file.
    tensors: Mapping[str, Tensor]
    #: Everything about it that is not plain LoRA, each in words.
    oddities: tuple[str, ...]

    @property
    def scale(self) -> float:
        """What `B @ A` is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def adapter_facts(path: str | Path) -> AdapterFacts:
    """Look at an adapter in peft's layout.

    Raises:
        PolicyRejected: it is not one, or cannot be read.
    """
    path = Path(path)
    config = _read_config(path)
    tensors = layout(_weights_file(path))
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise PolicyRejected(f"{path / CONFIG_FILE}: r is {rank!r}; it is the adapter's rank, a number from 1")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise PolicyRejected(f"{path / CONFIG_FILE}: lora_alpha is {alpha!r}; it must be a number")
    targets, saved_along, oddities = _sort_tensors(tensors, rank)
    if not targets and not oddities:
        raise PolicyRejected(f"{path / WEIGHTS_FILE} holds no LoRA matrix; publish what peft's save_pretrained wrote")
    chosen = config.get("target_modules")
    return AdapterFacts(
        path=path,
        rank=rank,
        alpha=float(alpha),
        rslora=bool(config.get("use_rslora")),
        targets=targets,
        target_modules=tuple(chosen) if isinstance(chosen, list) else chosen,
        saved_along=saved_along,
        tensors=tensors,
        oddities=(*_odd_settings(config), *oddities),
    )


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG_FILE
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise PolicyRejected(
            f"{path} has no {CONFIG_FILE}: publish the directory peft's save_pretrained wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise PolicyRejected(f"cannot read {file}: {error}; write the adapter anew") from error
    if not isinstance(config, dict) or str(config.get("peft_type", "")).upper() != "LORA":
        raise PolicyRejected(f"{file}: peft_type is not LORA; only LoRA adapters can be served")
    return config


def _weights_file(path: Path) -> Path:
    if not (path / WEIGHTS_FILE).is_file():
        raise PolicyRejected(f"{path} has no {WEIGHTS_FILE}: save the adapter with safe_serialization=True")
    return path / WEIGHTS_FILE


def _odd_settings(config: Mapping[str, Any]) -> Iterator[str]:
    """Settings that are set and not known to be without effect: those of later versions of peft are among them."""
    for name, value in sorted(config.items()):
        if name not in _WITHOUT_EFFECT and value:
            meaning = _MEANING.get(name, "what that does is not known here")
            yield f"{name}={_short(value)}: {meaning}"
    if config.get("bias", "none") not in ("none", None):
        yield f"bias={config['bias']}: biases were trained along"
    if (start := config.get("init_lora_weights")) not in _PLAIN_STARTS:
        yield (
            f"init_lora_weights={start}: the base's weights were changed before the training; save it with "
            "path_initial_model_for_weight_conversion"
        )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _sort_tensors(
    tensors: Mapping[str, Tensor], rank: int
) -> tuple[tuple[Target, ...], tuple[tuple[str, str], ...], list[str]]:
    """The pairs of matrices, what peft saved along, and what is odd about either."""
    pairs: dict[tuple[str, bool], dict[str, str]] = {}
    saved_along: list[tuple[str, str]] = []
    oddities: list[str] = []
    for name in sorted(tensors):
        inner = name.removeprefix(_PREFIX)
        if inner == name:
            oddities.append(f"{name}: its name does not begin with {_PREFIX}")
        elif pair := _PAIR.fullmatch(inner):
            side: Literal["A", "B"] | str = pair["plain"] or pair["embedding"]
            pairs.setdefault((pair["module"], pair["plain"] is None), {})[side] = name
        elif along := _SAVED_ALONG.fullmatch(inner):
            saved_along.append((name, along["module"]))
        else:
            oddities.append(f"{name}: not a matrix of plain LoRA")
    targets: list[Target] = []
    for (module, embedding), names in sorted(pairs.items()):
        if len(names) < 2:
            oddities.append(f"{module}: it has {'lora_A' if 'A' in names else 'lora_B'} alone")
        elif odd := _odd_pair(a := tensors[names["A"]], b := tensors[names["B"]], rank):
            oddities.append(f"{module}: {odd}")
        else:
            rows, columns = (a.shape[1], b.shape[0]) if embedding else (b.shape[0], a.shape[1])
            targets.append(
                Target(module=module, a=names["A"], b=names["B"], rows=rows, columns=columns, transposed=embedding)
            )
    return tuple(targets), tuple(saved_along), oddities


def _odd_pair(a: Tensor, b: Tensor, rank: int) -> str:
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        return f"lora_A {list(a.shape)} and lora_B {list(b.shape)} are no pair of matrices"
    if a.shape[0] != rank:
        return f"its rank is {a.shape[0]}, the config's r is {rank}"
    if unknown := {a.dtype, b.dtype} - FLOATS.keys():
        return f"it is stored as {', '.join(sorted(unknown))}; store it as float32, float16 or bfloat16"
    return ""


def check_for_engine(facts: AdapterFacts, *, max_rank: int | None = None, layers: int | None = None) -> list[str]:
    """What sglang-jax would pass over silently or cut when it serves the adapter by itself; empty: nothing.

    Which layers an adapter was trained on (`layers_to_transform`) is not among them: the engine goes by the file.

    Args:
        facts: the adapter's.
        max_rank: what the engine was launched with (`--max-lora-rank`); None: it takes any.
        layers: of the model it serves; None: not known.
    """
    return [*_passed_over(facts, max_rank), *_not_served(facts, layers)]


def _passed_over(facts: AdapterFacts, max_rank: int | None) -> Iterator[str]:
    yield from facts.oddities
    if facts.rslora:
        plain = facts.alpha * math.sqrt(facts.rank)
        yield (
            "use_rslora: the engine scales by alpha / r, not by alpha / sqrt(r); save it with use_rslora=false and "
            f"lora_alpha={plain:g}"
        )
    if max_rank is not None and facts.rank > max_rank:
        yield f"r={facts.rank}: the engine was launched for ranks up to {max_rank} and would cut it"
    if isinstance(facts.target_modules, str):
        yield f"target_modules={_short(facts.target_modules)}: the engine takes a list of names, not a pattern"
    elif facts.target_modules is None:
        yield "target_modules: the engine needs the list of names"
    for name, _ in facts.saved_along:
        yield f"{name}: the engine keeps the base's own"


def _not_served(facts: AdapterFacts, layers: int | None) -> Iterator[str]:
    seen: set[tuple[int, str]] = set()
    for target in facts.targets:
        served = None if target.transposed else _ENGINE_MODULES.fullmatch(target.module)
        if served is None:
            yield f"{target.module}: the engine has adapters on q, k, v, o, gate, up and down projections only"
            continue
        place = (int(served["layer"]), served["name"])
        if layers is not None and place[0] >= layers:
            yield f"{target.module}: the model has {layers} layers"
        if place in seen:
            yield f"{target.module}: the engine takes one {place[1]} a layer, and the adapter has more"
        seen.add(place)
