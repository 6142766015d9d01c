"""The same weights give the same logits and the same greedy text as transformers' Llama."""

import pytest
import torch

from bench.llama import to_llama
from mini.model import Config, Transformer
from mini.sample import sample


@pytest.fixture(
    params=[dict(), dict(n_kv_heads=2), dict(n_kv_heads=1, tie_embeddings=False, rope_theta=500.0)]
)
def pair(request):
    torch.manual_seed(0)
    model = Transformer(
        Config(vocab_size=60, dim=48, n_layers=3, n_heads=4, inter_dim=80, max_seq_len=40, **request.param)
    ).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.1)
    return model, to_llama(model)


def test_logits(pair):
    model, llama = pair
    tokens = torch.randint(60, (3, 40))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), llama(tokens).logits, atol=1e-5, rtol=1e-5)


def test_gradients(pair):
    model, llama = pair
    tokens = torch.randint(60, (3, 20))
    model(tokens).square().mean().backward()
    llama(tokens).logits.square().mean().backward()
    torch.testing.assert_close(
        model.embed.weight.grad, llama.model.embed_tokens.weight.grad, atol=1e-5, rtol=1e-4
    )
    theirs = llama.model.layers[0].self_attn.q_proj.weight.grad
    torch.testing.assert_close(model.layers[0].attn.wqkv.weight.grad[:48], theirs, atol=1e-5, rtol=1e-4)


def test_greedy_text(pair):
    model, llama = pair
    prompts = torch.randint(60, (4, 5))
    ours = sample(model, prompts, 30, temperature=0).tokens
    theirs = llama.generate(prompts, max_new_tokens=30, do_sample=False, pad_token_id=0)[:, 5:]
    assert torch.equal(ours, theirs)
