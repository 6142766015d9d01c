import functools
from collections import Counter

import torch

from mini.critique import (
    CRITIQUE_TOKENS,
    follow,
    judge,
    judge_fast,
    read_principles,
    transcript,
    write_critique,
)
from mini.distill import deal
from mini.grpo import token_logprobs
from mini.model import Transformer
from mini.reward import END, JUDGE, Query, cases, encode, stack
from mini.spct import any_principles, imitate, lessons, rows
from mini.train import Settings as Training
from mini.train import train

PRINCIPLES = (("brief", 6), ("truth", 3))


@functools.cache
def half_taught_judge() -> Transformer:
    """One that follows the draft here and there: both ways of going on are used."""
    torch.manual_seed(0)
    model = Transformer(JUDGE)
    settings = Training(steps=60, lr=5e-3, warmup=2)
    train(model, deal(lessons(1000, 0, any_principles), 32, 0), settings, loss=imitate, progress=False)
    return model.eval()


def test_the_form_is_that_of_judge():
    some = cases(3)
    model = half_taught_judge()
    drawn, logprobs = judge_fast(model, some, 5, generator=torch.Generator().manual_seed(0))
    again, _ = judge_fast(model, some, 5, generator=torch.Generator().manual_seed(0))
    assert drawn == again
    assert [len(own) for own in drawn] == [5, 5, 5]
    assert all(len(j.critiques) == 4 and len(j.principles) == 4 for own in drawn for j in own)
    assert all(1 <= len(c) <= CRITIQUE_TOKENS for own in drawn for j in own for c in j.critiques)
    assert all(
        c.index("<eos>") == len(c) - 1 for own in drawn for j in own for c in j.critiques if "<eos>" in c
    )
    texts = stack([rows(case, j)[0] for case, own in zip(some, drawn, strict=True) for j in own])
    known = token_logprobs(model, texts)[0][:, 6:10].sum(dim=1).view(3, 5)
    torch.testing.assert_close(logprobs, known.detach(), atol=1e-4, rtol=1e-4)


def test_the_first_words_come_as_often_as_the_judge_says():
    """Frequencies of a critique's first two words against the judge's own probabilities of them."""
    model, query, answer = (
        half_taught_judge(),
        Query("boss", "quickly", 41, 33),
        ("dear", "=70", "=4", "surely"),
    )
    text = (query, ("brief", "x6", "truth", "x3"), answer)
    n = 8_000
    drawn = follow(model, [text], [n], torch.Generator().manual_seed(0))[0]
    prompt = transcript(*text)
    odds = model(torch.tensor([prompt]))[0, -1].softmax(-1)
    found = torch.bincount(torch.tensor([tokens[0] for tokens in drawn]), minlength=JUDGE.vocab_size) / n
    draft = encode(write_critique(query, answer, read_principles(text[1])))
    assert 0.05 < odds[draft[0]] < 0.999
    assert (found - odds).abs().max() < 4 * 0.5 / n**0.5
    second = model(torch.tensor([[*prompt, draft[0]]]))[0, -1].softmax(-1)
    on = [tokens[1] for tokens in drawn if len(tokens) > 1]
    found = torch.bincount(torch.tensor(on), minlength=JUDGE.vocab_size) / len(on)
    assert (found - second).abs().max() < 4 * 0.5 / len(on) ** 0.5


def test_whole_critiques_come_as_often_as_from_judge():
    model, some = half_taught_judge(), cases(1)
    slow = judge(model, some, 800, given=lambda _: PRINCIPLES, generator=torch.Generator().manual_seed(0))[0]
    fast = judge_fast(
        model, some, 800, given=lambda _: PRINCIPLES, generator=torch.Generator().manual_seed(0)
    )[0][0]
    for j in range(4):
        x, y = (Counter(own.critiques[j][-4:] for own in drawn) for drawn in (slow, fast))
        often = [words for words in x | y if x[words] + y[words] >= 10]
        assert len(often) > 3
        chi = sum((x[w] - y[w]) ** 2 / (x[w] + y[w]) for w in often)
        assert chi < len(often) + 5 * (2 * len(often)) ** 0.5


def test_slips_do_not_come_together():
    """Each answer's critique is drawn apart: that one leaves its draft says nothing about the next."""
    model, case = half_taught_judge(), cases(1)[0]
    g = torch.Generator().manual_seed(1)
    drawn = judge_fast(model, [case], 1500, given=lambda _: PRINCIPLES, generator=g)[0][0]
    drafts = [write_critique(case.query, a, PRINCIPLES) for a in case.answers]
    same = [[c[:1] == tuple(d[:1]) for c, d in zip(j.critiques, drafts, strict=True)] for j in drawn]
    follows = torch.tensor(same).double()
    share = follows.mean(dim=0)
    i, j = share.sub(0.5).abs().argsort()[:2].tolist()
    assert 0.03 < share[i] < 0.97
    assert 0.03 < share[j] < 0.97
    assert abs((follows[:, i] * follows[:, j]).mean() - share[i] * share[j]) < 4 * 0.25 / 1500**0.5


def test_a_draft_is_left_for_another_word():
    model, query = half_taught_judge(), Query("boss", "quickly", 41, 33)
    text = (query, ("brief", "x6", "truth", "x3"), ("dear", "=70", "=4", "surely"))
    draft = encode(write_critique(query, text[2], read_principles(text[1])))
    for tokens in follow(model, [text], [50], torch.Generator().manual_seed(0))[0]:
        upto = len(tokens) - 1
        assert tokens == draft or (tokens[:upto] == draft[:upto] and tokens[upto] != draft[upto])
    assert draft[-1] == END
    assert follow(model, [(query, ("boss",) * 4, text[2])], [2], None) == [[[], []]]
