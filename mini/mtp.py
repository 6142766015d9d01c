"""Multi-token prediction (MTP): a second look ahead, to learn more from each text and to write two tokens a step.
Chapter 05.

A main model says what token comes next. An MTP module adds one layer for each depth k, which says what comes k + 1
tokens on; it reads what the layer before it made of position i, and is told the token that came in between:

    h'ᵏ_i = M_k [RMSNorm(hᵏ⁻¹_i) ; RMSNorm(Emb(t_{i+k}))],   hᵏ = TRM_k(h'ᵏ),   Pᵏ_{i+k+1} = OutHead(hᵏ_i)

DeepSeek-V3 (arXiv:2412.19437, equations 21-25). The depths follow one another, so each of them keeps the whole causal
chain (the heads of Gloeckle et al. 2024, arXiv:2404.19737, stand side by side). Embedding and output head are the main
model's own. Two details in which V3's released weights say more than its report:
* The report has "the representation given by the main model" for h⁰ and leaves its norm open. We take what the head
  reads, after the final norm, as vLLM and transformers do with V3's weights; each depth ends in a norm of its own
  (`shared_head.norm` in the checkpoint, whose names `enorm`, `hnorm` and `eh_proj` we use).
* vLLM and transformers set the embedding first and h second; here the order is the report's. To read V3's `eh_proj`,
  exchange its halves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from mini.model import Block, Cache, Config, Transformer
from mini.sample import check_request, full_length, stack_prompts


class Depth(nn.Module):
    """One depth: two norms, a projection of both vectors to one, a layer like the main model's last, a final norm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.hnorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.enorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.eh_proj = nn.Linear(2 * config.dim, config.dim, bias=False)
        self.block = Block(config, experts=config.n_routed_experts > 0)
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)

    def forward(
        self,
        h: Float[Tensor, "b t dim"],
        embedded: Float[Tensor, "b t dim"],
        cos: Float[Tensor, "t half"],
        sin: Float[Tensor, "t half"],
        cache: Cache | None = None,
    ) -> Float[Tensor, "b t dim"]:
        """hᵏ from hᵏ⁻¹ and the embedded tokens k places on; cos and sin are the rows of h's positions."""
        x = self.eh_proj(torch.cat((self.hnorm(h), self.enorm(embedded)), dim=-1))
        return self.norm(self.block(x, cos, sin, cache, None))


class MTP(nn.Module):
    """A main model and `n_depths` further depths of prediction; V3 has one. `layers[k - 1]` is depth k."""

    def __init__(self, model: Transformer, n_depths: int = 1) -> None:
        super().__init__()
        if n_depths < 1:
            raise ValueError(
                f"n_depths={n_depths} must be at least 1; without MTP, train the model by itself"
            )
        self.model = model
        self.layers = nn.ModuleList(Depth(model.config) for _ in range(n_depths))
        self.layers.to(model.embed.weight.device)
        for p in self.layers.parameters():
            if p.dim() > 1:  # as the main model's
                nn.init.normal_(p, std=0.5 * model.config.dim**-0.5)

    def forward(self, tokens: Int[Tensor, "b t"]) -> list[Float[Tensor, "b _ vocab"]]:
        """Logits of the main model and of each depth. Those of depth k at position i score token i + k + 1.

        Depth k has t - k positions, since it needs the token k places on. Raises ValueError if that leaves none.
        """
        t = tokens.shape[1]
        if t <= len(self.layers):
            raise ValueError(
                f"{t} tokens leave depth {len(self.layers)} nothing to read; give at least {len(self.layers) + 1}"
            )
        h = self.model.hidden(tokens)
        embedded = self.model.embed(tokens)
        logits = [self.model.logits(h)]
        for k, depth in enumerate(self.layers, start=1):
            h = depth(h[:, :-1], embedded[:, k:], self.model.cos[: t - k], self.model.sin[: t - k])
            logits.append(self.model.logits(h))
        return logits


def mtp_losses(mtp: MTP, tokens: Int[Tensor, "b n"]) -> list[Float[Tensor, ""]]:
    """The main model's cross entropy, then Lᵏ of each depth (equation 24), in nats, for rows of n = T + 1 tokens.

    Lᵏ is a sum of T - k surprises divided by T, as the report has it: a little less than their mean.
    """
    total = tokens[:, 1:].numel()
    return [
        F.cross_entropy(
            rearrange(logits, "b t v -> (b t) v"),
            rearrange(tokens[:, k + 1 :], "b t -> (b t)"),
            reduction="sum",
        )
        / total
        for k, logits in enumerate(mtp(tokens[:, :-1]))
    ]


def mtp_loss(weight: float = 0.3) -> Callable[[MTP, Tensor], Tensor]:
    """A loss for `train`: main + weight / D · Σ Lᵏ over the D depths (equation 25).

    `weight` is λ; V3 had 0.3 for the first 10 of its 14.8 trillion tokens, then 0.1. Goes together with balance for
    experts: `balanced(mtp_loss())`.
    """
    if not weight >= 0:
        raise ValueError(f"weight={weight} is below 0; use 0 to switch MTP off, V3's 0.3 or 0.1")

    def loss(mtp: MTP, tokens: Int[Tensor, "b n"]) -> Float[Tensor, ""]:
        main, *ahead = mtp_losses(mtp, tokens)
        return main + weight / len(ahead) * sum(ahead)

    return loss


@dataclass(frozen=True)
class Speculated:
    """What `speculate` wrote, and what it took."""

    tokens: Int[Tensor, "n"]
    steps: int  # passes of the main model, the one over the prompt included
    drafts: int  # tokens drafted
    accepted: int  # and how many of them were kept


def verify(
    p: Float[Tensor, "vocab"],
    q: Float[Tensor, "vocab"],
    draft: Int[Tensor, ""],
    generator: torch.Generator | None = None,
) -> Int[Tensor, ""]:
    """A token distributed as p, which is `draft` as often as possible, if `draft` is distributed as q.

    The draft is kept with probability min(1, p/q); otherwise the token is drawn from (p - q)⁺, scaled to sum to one:
    what q has too little of (Leviathan et al. 2022, arXiv:2211.17192, §2.3). It is kept in Σ min(p, q) of all cases.
    """
    if torch.rand((), generator=generator, device=p.device) * q[draft] < p[draft]:
        return draft
    rest = (p - q).clamp(min=0)
    # where p equals q but for rounding, a rejection is as good as impossible, and leaves nothing to draw from
    return torch.multinomial(rest if rest.any() else p, 1, generator=generator)[0]


def probabilities(logits: Float[Tensor, "*b vocab"], temperature: float) -> Float[Tensor, "*b vocab"]:
    """What `choose` draws from: softmax(logits / temperature), and at temperature 0 all on the best token."""
    if temperature == 0:
        return F.one_hot(logits.argmax(dim=-1), logits.shape[-1]).type_as(logits)
    return (logits / temperature).softmax(dim=-1)


@torch.inference_mode()
def speculate(
    mtp: MTP,
    prompt: Int[Tensor, "t"] | Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    end: int | None = None,
    generator: torch.Generator | None = None,
) -> Speculated:
    """Continue one prompt like `sample`, with the same distribution, in fewer passes of the main model.

    Depth 1 drafts a token. The main model reads the last token and the draft in one pass, which gives its own odds
    for the draft's place and for the place after; `verify` keeps the draft or replaces it. A kept draft is followed
    by a token drawn from the second odds: two tokens from one pass. After a rejection the draft is struck from the
    caches by setting their `length` back; depth 1 itself reads kept tokens alone. At temperature 0 the text is that
    of `sample`, except where rounding decides between two best tokens.

    One sequence only: the rows of a batch would keep different numbers of tokens, and their caches have one length.
    Raises ValueError for a prompt that is empty, not one row or outside the vocabulary, a temperature below 0, or a
    text longer than the model's max_seq_len.
    """
    model, depth = mtp.model, mtp.layers[0]
    if len(shape := list(torch.as_tensor(prompt).shape)) != 1:
        raise ValueError(
            f"prompt has the shape {shape}, but one sequence is continued at a time; give one list of tokens"
        )
    check_request(max_new_tokens, temperature)
    start, longest = len(prompt), full_length(model, len(prompt), max_new_tokens)
    text, _ = stack_prompts([torch.as_tensor(prompt).tolist()], model.config.vocab_size)
    text = F.pad(text, (0, max_new_tokens)).to(model.embed.weight.device)
    caches, depth_cache = model.new_cache(1, longest), depth.block.attn.new_cache(1, longest)
    length, steps, drafts, accepted = start, 0, 0, 0  # `length` tokens are settled;
    drafted = False  # the one after them may be a draft
    while length < longest:
        settled = length
        h = model.hidden(text[:, caches[0].length : length + drafted], caches)
        p = probabilities(model.logits(h[0, -1 - drafted :]), temperature)
        if drafted and (token := verify(p[0], q, text[0, length], generator)) != text[0, length]:
            h = h[:, :-1]
            for cache in caches:
                cache.length -= 1
        else:
            length, accepted = length + drafted, accepted + drafted
            token = torch.multinomial(p[-1], 1, generator=generator)[0]
        text[0, length] = token
        length, steps, drafts = length + 1, steps + 1, drafts + drafted
        if end is not None and (found := (text[0, settled:length] == end).nonzero()).numel():
            length = settled + int(found[0]) + 1
            break
        drafted = longest - length > 1  # a last token by itself has no use for a second
        if drafted:
            i, n = depth_cache.length, h.shape[1]
            embedded = model.embed(text[:, length - n : length])  # the token after each position of h
            ahead = depth(h, embedded, model.cos[i : i + n], model.sin[i : i + n], depth_cache)
            q = probabilities(model.logits(ahead[0, -1]), temperature)
            text[0, length] = torch.multinomial(q, 1, generator=generator)[0]
    return Speculated(text[0, start:length], steps, drafts, accepted)
