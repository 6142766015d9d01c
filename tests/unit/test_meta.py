import pytest
import torch
import torch.nn.functional as F

from mini.model import Transformer
from mini.reward import JUDGE, stack
from mini.spct import Meta, verdicts
from mini.train import Settings, train

GOOD, BAD = [[5, 6, 7], [8, 9], [8], [8, 9, 3]], [[8], [5, 6, 7], [9], [3, 3]]


def small() -> Meta:
    torch.manual_seed(0)
    return Meta(Transformer(JUDGE))


def test_it_knows_nothing_at_first():
    assert small()(stack(GOOD + BAD)).tolist() == [0.0, 0.0]


def test_fillers_are_not_read_and_the_order_of_texts_is():
    model = small()
    torch.nn.init.normal_(model.value[2].weight, generator=torch.Generator().manual_seed(0))
    alone, beside = model(stack(GOOD)), model(stack([*GOOD, *BAD, [1] * 20, [2], [3], [4]]))
    torch.testing.assert_close(alone, beside[:1])
    assert model(stack(GOOD[::-1])).item() != pytest.approx(alone.item(), abs=1e-4)


def test_loss_by_hand():
    model = small()
    torch.nn.init.normal_(model.value[2].weight, generator=torch.Generator().manual_seed(0))
    draw, loss = verdicts([GOOD, BAD], [True, False], seed=3, batch=6)
    rows = draw(0)
    assert rows.shape[0] == 24
    assert torch.equal(rows, draw(0))
    assert not torch.equal(rows, draw(1))
    right = rows[::4, 0].float()
    texts = [[t for t in row if t >= 0] for row in rows[:, 1:].tolist()]
    assert all(texts[4 * i : 4 * i + 4] == (GOOD if r else BAD) for i, r in enumerate(right.tolist()))
    expected = F.binary_cross_entropy_with_logits(model(rows[:, 1:]), right)
    torch.testing.assert_close(loss(model, rows), expected)


def test_it_learns_which_is_right():
    model = small()
    draw, loss = verdicts([GOOD, BAD], [True, False], batch=8)
    history = train(
        model, draw, Settings(steps=30, lr=1e-3, matrix_lr=0.0, warmup=2), loss=loss, progress=False
    )
    assert history[0]["loss"] == pytest.approx(0.693, abs=0.01)
    good, bad = model(stack(GOOD + BAD)).tolist()
    assert good > 1 > -1 > bad
