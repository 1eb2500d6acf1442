"""Make `peft-merge.safetensors`: adapters that peft trained, saved and merged itself, which our merge is held to.

Run it where torch, transformers and peft are; the file says which versions made it:

    python tests/unit/golden/make_peft_golden.py

A tiny Qwen3 gets one adapter after another: with the plain scale on all projections, with the scale of rslora, in
bfloat16, and on the embedding and the head. Each is saved by `save_pretrained` and merged by `merge_and_unload`.
Kept are the matrices that changed, the adapter's files as peft wrote them, and the merged matrices, by the names

    CASE/base/NAME   CASE/adapter/NAME   CASE/merged/NAME

with each adapter_config.json in the file's metadata.
"""

import json
import tempfile
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).with_name("peft-merge.safetensors")

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

CASES = {
    "plain": (peft.LoraConfig(r=2, lora_alpha=3, target_modules=PROJECTIONS), torch.float32),
    "rslora": (
        peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "down_proj"]),
        torch.float32,
    ),
    "bfloat16": (peft.LoraConfig(r=2, lora_alpha=4, target_modules=["k_proj", "up_proj"]), torch.bfloat16),
    "ends": (peft.LoraConfig(r=2, lora_alpha=2, target_modules=["embed_tokens", "lm_head", "v_proj"]), torch.float32),
}


def tiny() -> transformers.Qwen3ForCausalLM:
    """A Qwen3 of one layer, small enough to keep."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=12, hidden_size=8, intermediate_size=10, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, max_position_embeddings=16, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.Qwen3ForCausalLM(config)


def case(config: peft.LoraConfig, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], str]:
    """All matrices of one case by name, and its adapter's config."""
    model = tiny().to(dtype)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_" in name:  # peft begins with a change of zero
                value.normal_(std=0.5)
    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)
        adapter = load_file(Path(folder) / "adapter_model.safetensors")
        settings = (Path(folder) / "adapter_config.json").read_text()
    merged = adapted.merge_and_unload().state_dict()
    changed = [name for name in base if not torch.equal(base[name], merged[name])]
    found = {f"adapter/{name}": value for name, value in adapter.items()}
    found |= {f"base/{name}": base[name] for name in changed}
    found |= {f"merged/{name}": merged[name] for name in changed}
    return found, settings


def main() -> None:
    """Write the file."""
    tensors: dict[str, torch.Tensor] = {}
    notes = {
        "made_with": f"peft {peft.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    }
    for name, (config, dtype) in CASES.items():
        found, settings = case(config, dtype)
        tensors |= {f"{name}/{key}": value.contiguous().clone() for key, value in found.items()}
        notes[name] = json.dumps(json.loads(settings), sort_keys=True)
    save_file(tensors, GOLDEN, metadata=notes)


if __name__ == "__main__":
    main()
