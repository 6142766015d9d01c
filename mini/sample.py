"""Sampling: from a prompt to a text, one token at a time, many sequences at once. Chapter 02."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from mini.model import Transformer


@dataclass(frozen=True)
class Samples:
    """What was drawn. Past `lengths[b]`, row b holds -1 in `tokens` and 0 in `logprobs`."""

    tokens: Int[Tensor, "b n"]
    logprobs: Float[Tensor, "b n"]  # nats, under the model itself: before temperature and top-p
    lengths: Int[Tensor, "b"]  # tokens drawn, the end token included


def choose(
    logits: Float[Tensor, "b vocab"], temperature: float, top_p: float, generator: torch.Generator | None
) -> Int[Tensor, "b"]:
    """One token a row: the best at temperature 0, otherwise a draw from softmax(logits / temperature).

    top-p draws from the fewest tokens whose probability reaches p (Holtzman et al. 2019, arXiv:1904.09751).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs = (logits / temperature).softmax(dim=-1)
    if top_p < 1:
        ordered, index = probs.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered
        probs = torch.zeros_like(probs).scatter(1, index, ordered.masked_fill(before >= top_p, 0.0))
    return rearrange(torch.multinomial(probs, 1, generator=generator), "b 1 -> b")


def stack_prompts(prompts: Tensor | Sequence[Sequence[int]], vocab_size: int) -> tuple[Tensor, Tensor | None]:
    """Prompts as one [b, t] matrix, shorter ones filled on the left, and each row's number of filler slots."""
    rows = [torch.as_tensor(p, dtype=torch.long) for p in prompts]
    if not rows or any(r.dim() != 1 for r in rows):
        raise ValueError(
            "prompts must be a list of token lists or a [batch, time] tensor; wrap a single prompt in a list"
        )
    for i, r in enumerate(rows):
        if len(r) == 0:
            raise ValueError(f"prompt {i} is empty; give it at least one token")
        if r.min() < 0 or r.max() >= vocab_size:
            bad = r[(r < 0) | (r >= vocab_size)][0]
            raise ValueError(f"prompt {i} holds token {bad}, outside this model's vocabulary of {vocab_size}")
    width = max(map(len, rows))
    pad = torch.tensor([width - len(r) for r in rows])
    tokens = torch.stack([torch.cat((r.new_zeros(p), r)) for r, p in zip(rows, pad.tolist(), strict=True)])
    return tokens, pad if pad.any() else None


def check_request(max_new_tokens: int, temperature: float) -> None:
    """ValueError for a temperature below 0 (or NaN), or for no new token."""
    if not temperature >= 0:
        raise ValueError(
            f"temperature={temperature} is below 0; use 0 for the most likely token, 1 for the model's own odds"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")


def full_length(model: Transformer, t: int, max_new_tokens: int) -> int:
    """Positions of a prompt of t tokens with its new ones; ValueError past the model's max_seq_len."""
    longest = t + max_new_tokens
    if longest > model.config.max_seq_len:
        raise ValueError(
            f"a prompt of {t} tokens and {max_new_tokens} new ones make {longest}, past max_seq_len="
            f"{model.config.max_seq_len}; shorten the prompt or ask for at most {model.config.max_seq_len - t}"
        )
    return longest


@torch.inference_mode()
def sample(
    model: Transformer,
    prompts: Int[Tensor, "b t"] | Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    end: int | None = None,
    group: int = 1,
    generator: torch.Generator | None = None,
) -> Samples:
    """Continue every prompt by up to `max_new_tokens` tokens, stopping a row at the token `end`.

    With `group`, each prompt is continued that many times: it is read once, and its samples are next to one another
    in the result. Keys and values are cached, and rows that have ended are dropped from the batch as it runs. Raises
    ValueError for an empty prompt, a token outside the vocabulary, a temperature below 0, a top_p outside
    (0, 1], a group below 1, or a text longer than the model's max_seq_len.
    """
    check_request(max_new_tokens, temperature)
    if group < 1:
        raise ValueError(f"group={group} must be at least 1, the number of samples for each prompt")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} is outside (0, 1]; use 1 to allow every token")
    device = model.embed.weight.device
    tokens, pad = stack_prompts(prompts, model.config.vocab_size)
    n_prompts, t = tokens.shape
    b = n_prompts * group
    longest = full_length(model, t, max_new_tokens)
    tokens, pad = tokens.to(device), None if pad is None else pad.to(device)
    out = torch.full((b, max_new_tokens), -1, device=device)
    logprobs = torch.zeros(b, max_new_tokens, device=device)
    live: slice | Tensor = slice(None)  # which rows of the output the batch still holds
    ended = torch.zeros(b, dtype=torch.bool, device=device)
    cache = model.new_cache(n_prompts, longest)
    for i in range(max_new_tokens):
        logits = model.logits(model.hidden(tokens, cache, pad)[:, -1])
        if i == 0 and group > 1:  # the prompts are read; from here on, each sample is a row
            copies = torch.arange(n_prompts, device=device).repeat_interleave(group)
            logits, pad = logits[copies], None if pad is None else pad[copies]
            for layer in cache:
                layer.keep(copies)
        token = choose(logits, temperature, top_p, generator)
        tokens = rearrange(token, "b -> b 1")
        out[live, i] = token
        logprobs[live, i] = logits.log_softmax(dim=-1).gather(1, tokens)[:, 0]
        if end is not None:
            ended = ended | (token == end)
            if ended.all():
                break
            if ended.sum() * 4 >= len(ended):  # dropping copies the cache, so wait until it is worth it
                live, pad = torch.arange(b, device=device)[live][~ended], None if pad is None else pad[~ended]
                tokens = tokens[~ended]
                for layer in cache:
                    layer.keep(~ended)
                ended = ended[~ended]
    if end is not None:  # what an ended row still drew, until it was dropped
        past = (out == end).cumsum(dim=1) - (out == end).int() > 0
        out, logprobs = out.masked_fill(past, -1), logprobs.masked_fill(past, 0.0)
    return Samples(out, logprobs, (out >= 0).sum(dim=1))
