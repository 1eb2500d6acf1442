"""A tiny random Qwen3 checkpoint that both engine lines load offline, on eight CPU devices.

Invariant: a directory that this module hands out is complete and is a function of its parameters alone:
the same seed gives the same bytes in every process, two seeds give two policies that are easy to tell apart.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

Weights = dict[str, npt.NDArray[np.float32]]

# Raised whenever the same parameters would give other files, so that an old directory is not taken for new.
_FORMAT = 1

VOCAB_SIZE = 512
HIDDEN_SIZE = 256
INTERMEDIATE_SIZE = 512
NUM_LAYERS = 2
# The engine's kernels pad heads to multiples of 128, and 0.0.1.post1 fails at tp=8 with one KV head a device.
HEAD_DIM = 128
NUM_HEADS = 16
NUM_KV_HEADS = 16
MAX_POSITIONS = 1024
RMS_NORM_EPS = 1e-6
# Lower than Qwen3's million: over so short a context more of the rotary pairs turn by a visible angle.
ROPE_THETA = 10_000.0

# The last ids of the vocabulary. Qwen3 too has one token that ends a turn and another that pads.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
EOS_TOKEN = "<|im_end|>"
PAD_TOKEN = "<|pad|>"
EOS_TOKEN_ID = VOCAB_SIZE - len(SPECIAL_TOKENS) + SPECIAL_TOKENS.index(EOS_TOKEN)
PAD_TOKEN_ID = VOCAB_SIZE - len(SPECIAL_TOKENS) + SPECIAL_TOKENS.index(PAD_TOKEN)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Spread of the logits, in nats. At 2.0 a next-token distribution has some 60 likely tokens of the 512: not
# uniform, so that seeds and temperatures tell, and not so peaked that samples repeat one another.
DEFAULT_SCALE = 2.0


def make_tiny_model(path: Path, *, seed: int, scale: float = DEFAULT_SCALE) -> Path:
    """Write the checkpoint of one seed, or find it already written.

    Args:
        path: The directory to make. Its parent is made too.
        seed: Which weights. Equal seeds give equal files.
        scale: Standard deviation of the logits; larger is more peaked.

    Returns:
        `path`, holding config.json, generation_config.json, model.safetensors, tokenizer.json and
        tokenizer_config.json under their Hugging Face names.

    Raises:
        FileExistsError: `path` holds something else: another seed, another scale, or not such a model.
    """
    stamp = {"format": _FORMAT, "seed": seed, "scale": scale}

    def write(directory: Path) -> None:
        _write_checkpoint(directory, seed=seed, scale=scale)

    return complete_directory(path, stamp, write, what="a tiny model")


def complete_directory(path: Path, stamp: dict[str, Any], write: Callable[[Path], None], *, what: str) -> Path:
    """Make a directory whole or not at all, or find it made from the same parameters.

    Args:
        path: The directory. Its parent is made too.
        stamp: The parameters; kept in the directory, by which it is known again.
        write: Writes the files into an empty directory.
        what: It is, in words: `a tiny model`.

    Raises:
        FileExistsError: `path` holds something else, or the same of other parameters.
    """
    path = Path(path)
    if _is_made(path, stamp, what):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        write(temporary)
        _flush(temporary)
        write_json(temporary / stamp_name(what), stamp)
        temporary.chmod(0o755)
        _rename_or_find(temporary, path, stamp, what)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def stamp_name(what: str) -> str:
    """The file that the parameters of `a tiny model` and the like are in."""
    return f"rollpool_{what.removeprefix('a ').replace(' ', '_')}.json"


def _is_made(path: Path, stamp: dict[str, Any], what: str) -> bool:
    """Tell whether `path` is what was made with this stamp; raise if it is anything else."""
    if not path.exists():
        return False
    try:
        found = json.loads((path / stamp_name(what)).read_text())
    except (OSError, ValueError):
        found = None
    if found == stamp:
        return True
    if path.is_dir() and not any(path.iterdir()):
        return False  # An empty directory may be renamed over.
    holds = f"{what} of {found}" if found else f"something that is not {what}"
    raise FileExistsError(f"{path} already holds {holds}; wanted {stamp}. Name another directory or remove it.")


def _rename_or_find(temporary: Path, path: Path, stamp: dict[str, Any], what: str) -> None:
    """Put the finished directory in place, unless another process was first with the same."""
    try:
        temporary.rename(path)
    except OSError:
        if not _is_made(path, stamp, what):
            raise


def _flush(directory: Path) -> None:
    for file in directory.iterdir():
        file.chmod(0o644)  # safetensors makes its file private; the engine may run as another user.
        with file.open("rb") as written:
            os.fsync(written.fileno())  # Else a crash of the machine could leave a complete name and no bytes.


def _write_checkpoint(directory: Path, *, seed: int, scale: float) -> None:
    save_file(dict(_draw_weights(seed, scale)), directory / "model.safetensors", metadata={"format": "pt"})
    write_json(directory / "config.json", _model_config())
    write_json(directory / "generation_config.json", _generation_config())
    tiny_tokenizer().save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", _tokenizer_config())


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write an object as people read it."""
    file.write_text(json.dumps(value, indent=2) + "\n")


def _draw_weights(seed: int, scale: float) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Yield each tensor under its Hugging Face name, in an order that belongs to the format.

    Projections keep their input's size (deviation 1/sqrt(fan-in)), so that attention and MLP change the
    residual as much as the embedding gave it: then each logit depends on the whole prefix. Norm weights vary
    about a mean, so that a norm left out, or applied in the wrong place, shows.
    """
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, deviation: float) -> npt.NDArray[np.float32]:
        return as_bfloat16(rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(deviation))

    def norm(size: int, mean: float) -> npt.NDArray[np.float32]:
        return as_bfloat16(rng.uniform(0.5 * mean, 1.5 * mean, size).astype(np.float32))

    yield "model.embed_tokens.weight", matrix(VOCAB_SIZE, HIDDEN_SIZE, 1.0)
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", norm(HIDDEN_SIZE, 1.0)
        for name, heads in (("q", NUM_HEADS), ("k", NUM_KV_HEADS), ("v", NUM_KV_HEADS)):
            rows = heads * HEAD_DIM
            yield f"{prefix}.self_attn.{name}_proj.weight", matrix(rows, HIDDEN_SIZE, HIDDEN_SIZE**-0.5)
        # Attention scores have a deviation of about the product of the two means: 2 makes a head look at a few
        # tokens, neither at all alike nor at one.
        yield f"{prefix}.self_attn.q_norm.weight", norm(HEAD_DIM, 1.4)
        yield f"{prefix}.self_attn.k_norm.weight", norm(HEAD_DIM, 1.4)
        fan_in = NUM_HEADS * HEAD_DIM
        # The average over tokens and SiLU each make their branch smaller: 2 makes up for it.
        yield f"{prefix}.self_attn.o_proj.weight", matrix(HIDDEN_SIZE, fan_in, 2 * fan_in**-0.5)
        yield f"{prefix}.post_attention_layernorm.weight", norm(HIDDEN_SIZE, 1.0)
        for name in ("gate", "up"):
            yield (
                f"{prefix}.mlp.{name}_proj.weight",
                matrix(INTERMEDIATE_SIZE, HIDDEN_SIZE, HIDDEN_SIZE**-0.5),
            )
        down = 2 * INTERMEDIATE_SIZE**-0.5
        yield f"{prefix}.mlp.down_proj.weight", matrix(HIDDEN_SIZE, INTERMEDIATE_SIZE, down)
    yield "model.norm.weight", norm(HIDDEN_SIZE, 1.0)
    head = matrix(VOCAB_SIZE, HIDDEN_SIZE, scale * HIDDEN_SIZE**-0.5)
    # A row of zeros gives a logit of zero, well below what is sampled: special tokens stay rare.
    head[VOCAB_SIZE - len(SPECIAL_TOKENS) :] = 0.0
    yield "lm_head.weight", head


def as_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Round to what bfloat16 can hold, keeping float32: an engine that loads in either sees the same weights."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)  # To nearest, ties to even.
    return rounded.view(np.float32)


def _model_config() -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": VOCAB_SIZE - len(SPECIAL_TOKENS),
        "eos_token_id": EOS_TOKEN_ID,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": HIDDEN_SIZE,
        "initializer_range": 0.02,
        "intermediate_size": INTERMEDIATE_SIZE,
        "max_position_embeddings": MAX_POSITIONS,
        "max_window_layers": NUM_LAYERS,
        "model_type": "qwen3",
        "num_attention_heads": NUM_HEADS,
        "num_hidden_layers": NUM_LAYERS,
        "num_key_value_heads": NUM_KV_HEADS,
        "pad_token_id": PAD_TOKEN_ID,
        "rms_norm_eps": RMS_NORM_EPS,
        "rope_scaling": None,
        "rope_theta": ROPE_THETA,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": VOCAB_SIZE,
    }


def _generation_config() -> dict[str, Any]:
    return {"do_sample": True, "eos_token_id": [EOS_TOKEN_ID], "pad_token_id": PAD_TOKEN_ID}


def _tokenizer_config() -> dict[str, Any]:
    return {
        "added_tokens_decoder": {
            str(VOCAB_SIZE - len(SPECIAL_TOKENS) + index): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for index, token in enumerate(SPECIAL_TOKENS)
        },
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS_TOKEN,
        "model_max_length": MAX_POSITIONS,
        "pad_token": PAD_TOKEN,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def tiny_tokenizer() -> Tokenizer:
    """Make the tokenizer: the 256 bytes, pairs of letters up to the vocabulary's size, the special tokens.

    Every text encodes and every id decodes, so random weights may sample anything.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _letter_pairs(VOCAB_SIZE - len(alphabet) - len(SPECIAL_TOKENS))
    tokens = [*alphabet, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def _letter_pairs(count: int) -> list[tuple[str, str]]:
    """List the merges: pairs of a vowel and another letter, and a space (`Ġ`) before a letter, then the rest."""
    letters, vowels = "abcdefghijklmnopqrstuvwxyz", "aeiouy"
    frequent = [("Ġ", letter) for letter in letters]
    frequent += [(vowel, letter) for vowel in vowels for letter in letters]
    frequent += [(letter, vowel) for letter in letters if letter not in vowels for vowel in vowels]
    return frequent[:count]
