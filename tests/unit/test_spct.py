import random

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from mini import critique, reward, spct
from mini.critique import (
    CRITIQUE_TOKENS,
    Judgement,
    Principles,
    draw_principles,
    judge,
    marks,
    read_critique,
    read_principles,
    transcript,
    write_critique,
    write_principles,
)
from mini.grpo import Settings, grpo, token_logprobs
from mini.model import Transformer
from mini.reward import (
    CRITERIA,
    END,
    JUDGE,
    WORDS,
    Case,
    Query,
    cases,
    decode,
    draw_answer,
    draw_query,
    encode,
    facts,
    hidden_weights,
    strictly_best,
)
from mini.spct import (
    any_principles,
    audit,
    half_taught,
    imitate,
    lessons,
    rollout,
    rows,
    rule,
    select,
    stack,
    vote,
    written,
)
from mini.tasks import is_held_out
from mini.train import Settings as Training

from .test_reward import Says

BOSS = Query("boss", "quickly", 41, 33)
KIND, WRONG = ("dear", "=70", "=4", "surely"), ("so", "now", "hmm", "=60", "=4")
CASE = Case(BOSS, (KIND, WRONG))
PRINCIPLES = (("brief", 6), ("truth", 3))


def small_model(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(JUDGE).eval()


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def exact(case: Case, principles: Principles) -> Judgement:
    critiques = tuple(tuple(write_critique(case.query, answer, principles)) for answer in case.answers)
    return Judgement(tuple(write_principles(principles)), critiques)


# --- the form


def test_a_judgement_by_hand():
    judgement = exact(CASE, PRINCIPLES)
    assert judgement.principles == ("brief", "x6", "truth", "x3")
    assert " ".join(judgement.critiques[0]) == "brief four yes truth 70 70 4 4 yes 10/10 <eos>"
    assert " ".join(judgement.critiques[1]) == "brief five no truth 70 60 no 1/10 <eos>"
    assert judgement.scores == (10, 1)
    assert rule(CASE, judgement) == 1.0


@given(seed=st.integers(0, 10**6))
@hypothesis_settings(max_examples=80, deadline=None)
def test_what_is_written_right_is_read_right(seed):
    rng = random.Random(seed)
    query = draw_query(rng)
    answer, principles = draw_answer(rng, query), draw_principles(rng, (1,) * 5)
    assert read_principles(write_principles(principles)) == principles
    assert sum(w for _, w in principles) == 9
    critique = write_critique(query, answer, principles)
    assert len(critique) <= CRITIQUE_TOKENS
    found = read_critique(critique, [c for c, _ in principles])
    known = dict(zip(CRITERIA, facts(query, answer), strict=True))
    assert found.verdicts == tuple((c, known[c]) for c, _ in principles)
    assert found.score == 1 + sum(w for c, w in principles if known[c])
    whole = transcript(query, write_principles(principles), answer, critique)
    assert len(whole) <= JUDGE.max_seq_len


@given(seed=st.integers(0, 10**6), place=st.integers(0, 20), word=st.sampled_from(WORDS))
@hypothesis_settings(max_examples=200, deadline=None)
def test_a_word_of_another_kind_makes_a_critique_unreadable(seed, place, word):
    principles = draw_principles(random.Random(seed), (1,) * 5)
    critique = write_critique(BOSS, KIND, principles)
    place %= len(critique)
    before = critique[place]
    if before in (*reward.POLITE, *reward.SURE, "none", "since"):
        return  # evidence may be another word of its list
    critique[place] = word
    kinds = (reward.TENS, reward.DIGITS, reward.COUNTS, reward.SCORES, ("yes", "no"))
    fits = word == before or any(before in kind and word in kind for kind in kinds)
    assert (read_critique(critique, [criterion for criterion, _ in principles]) is not None) == fits


@pytest.mark.parametrize(
    "text",
    ["", "brief x6", "brief x6 truth x4", "brief x6 brief x3", "brief truth x6 x3", "boss x6 truth x3"],
)
def test_unreadable_principles(text):
    assert read_principles(text.split()) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "brief four yes truth 70 70 4 4 yes 10/10",
        "brief four yes 10/10 <eos>",
        "brief four yes truth 70 70 4 4 yes <eos>",
        "truth 70 70 4 4 yes brief four yes 10/10 <eos>",
        "brief four yes truth 70 70 4 4 yes 10/10 10/10 <eos>",
    ],
)
def test_an_unreadable_critique_spoils_the_judgement(text):
    fine = exact(CASE, PRINCIPLES)
    broken = Judgement(fine.principles, (fine.critiques[0], words(text)))
    assert broken.read() is None
    assert broken.scores == (0, 0)
    assert rule(CASE, broken) == -1.0


def test_principles_are_drawn_by_their_odds_and_the_first_weighs_more():
    rng = random.Random(0)
    drawn = [draw_principles(rng, (0, 0, 1, 3, 0)) for _ in range(400)]
    assert {frozenset((first, second)) for (first, _), (second, _) in drawn} == {
        frozenset(("steps", "polite"))
    }
    assert {w for (_, w), _ in drawn} == {5, 6, 7, 8}
    assert sum(first == "polite" for (first, _), _ in drawn) / 400 == pytest.approx(0.75, abs=0.08)
    seconds = [draw_principles(rng, (1, 0, 1, 9, 0))[1][0] for _ in range(400)]
    assert seconds.count("polite") < 0.3 * 400  # it mostly stands first
    assert seconds.count("truth") == pytest.approx(seconds.count("steps"), abs=60)


def test_demonstrations_follow_the_hidden_rule_by_half():
    expected = [w / 2 + 0.1 for w in hidden_weights("boss", "quickly")]
    assert half_taught(BOSS) == pytest.approx(expected)
    assert sum(half_taught(BOSS)) == pytest.approx(1)


def test_a_tie_is_wrong():
    tied = exact(Case(BOSS, (KIND, KIND)), PRINCIPLES)
    assert tied.scores == (10, 10)
    assert rule(CASE, tied) == -1.0


def test_the_worse_answer_on_top_is_wrong():
    fine = exact(CASE, PRINCIPLES)
    assert rule(CASE, Judgement(fine.principles, fine.critiques[::-1])) == -1.0


# --- what is learned from


def test_the_judge_is_taught_what_it_writes_alone():
    judgement = exact(CASE, PRINCIPLES)
    texts = stack(rows(CASE, judgement))
    principles, critiques = written(texts)
    for row, p, c, wanted in zip(texts, principles, critiques, judgement.critiques, strict=True):
        assert tuple(decode(row[1:][p].tolist())) == judgement.principles
        assert tuple(decode(row[1:][c].tolist())) == wanted


def test_imitation_weighs_principles_and_critiques_alike():
    texts = stack(rows(CASE, exact(CASE, PRINCIPLES)))
    principles, critiques = written(texts)
    logits = torch.randn(*texts[:, 1:].shape, JUDGE.vocab_size, generator=torch.Generator().manual_seed(0))
    surprise = -logits.log_softmax(-1).gather(-1, texts[:, 1:, None].clamp(min=0))[..., 0]
    expected = surprise[principles].mean() + surprise[critiques].mean()
    torch.testing.assert_close(imitate(Says(logits), texts), expected)


def test_lessons_are_right_and_some_state_no_principles():
    for odds in (any_principles, half_taught):
        texts = [decode(row) for row in lessons(60, 0, odds, plain=0.5).tolist()]
        plain = 0
        for words in texts:
            at = [words.index(mark) for mark in ("principles:", "answer:", "critique:")]
            stated, critique = words[at[0] + 1 : at[1]], words[at[2] + 1 :]
            plain += not stated
            numbers = [int(word[1:]) for word in words[2:6]]
            query = Query(words[0], words[1], sum(numbers[:2]), sum(numbers[2:]))
            assert not stated or read_principles(stated)
            known = dict(zip(CRITERIA, facts(query, words[at[1] + 1 : at[2]]), strict=True))
            assert all(met == known[c] for c, met in read_critique(critique).verdicts)
        assert 15 < plain < 45


def test_lessons_follow_from_their_seed_and_from_odds_that_see_the_query():
    def odds(query):
        return (0, 0, 0, 1, 1) if query.who == "boss" else (1, 1, 0, 0, 0)

    found = lessons(40, 0, odds)
    assert found.equal(lessons(40, 0, odds))
    assert not found.equal(lessons(40, 1, odds))
    for row in found.tolist():
        said = decode(row)
        stated = {criterion for criterion, _ in read_principles(said[7:11])}
        assert stated == ({"polite", "sure"} if said[0] == "boss" else {"truth", "brief"})


@pytest.mark.parametrize("principled", [True, False])
def test_each_arm_is_shown_demonstrations_of_its_own_kind(monkeypatch, principled):
    shown = []
    monkeypatch.setattr(spct, "train", lambda model, batch, *args, **options: shown.append(batch(0)) or [])
    spct.supervised(small_model(), principled=principled)
    assert ((shown[0][:, 7] != encode(["answer:"])[0]) == principled).all()


# --- judging


def test_all_answers_are_judged_under_the_same_principles():
    some = cases(3)
    drawn = judge(small_model(), some, 2, generator=torch.Generator().manual_seed(0))
    assert [len(own) for own in drawn] == [2, 2, 2]
    assert all(len(j.critiques) == 4 and len(j.principles) == 4 for own in drawn for j in own)
    assert marks(drawn).shape == (3, 2, 4)
    again = judge(small_model(), some, 2, generator=torch.Generator().manual_seed(0), batch=5)
    assert [[j.principles for j in own] for own in again] == [[j.principles for j in own] for own in drawn]


def test_principles_can_be_given_or_left_out():
    some = cases(2)
    given_ = judge(small_model(), some, 2, given=lambda case: PRINCIPLES)
    assert {j.principles for own in given_ for j in own} == {("brief", "x6", "truth", "x3")}
    assert {j.principles for own in judge(small_model(), some, principled=False) for j in own} == {()}


def test_principles_and_critiques_are_drawn_at_the_temperature_asked_for(monkeypatch):
    seen = []

    def spy(*args, temperature, **options):
        seen.append(temperature)
        return real(*args, temperature=temperature, **options)

    real = critique.sample
    monkeypatch.setattr(critique, "sample", spy)
    judge(small_model(), [CASE], temperature=0.3)
    assert seen == [0.3, 0.3]


def test_no_label_reaches_a_prompt(monkeypatch):
    """What the judge is asked is a function of the query and one answer."""
    seen = []

    def spy(model, prompts, *args, **kwargs):
        seen.extend(tuple(p) for p in prompts)
        return real(model, prompts, *args, **kwargs)

    real = critique.sample
    monkeypatch.setattr(critique, "sample", spy)
    judge(small_model(), [CASE], given=lambda case: PRINCIPLES)
    stated = write_principles(PRINCIPLES)
    assert seen == [tuple(transcript(BOSS, stated, answer)) for answer in CASE.answers]


# --- rejective fine-tuning


def test_selection_rejects_wrong_and_easy_and_hints_at_the_hopeless(monkeypatch):
    right, wrong = exact(CASE, PRINCIPLES), exact(CASE, PRINCIPLES)
    wrong = Judgement(wrong.principles, wrong.critiques[::-1])
    hint = exact(CASE, (("polite", 5), ("truth", 4)))
    drawn = {None: [[right] * 3, [right, wrong, right], [wrong] * 3], "hint": [[hint, wrong, hint]]}

    def fake(model, cases, k, *, given=None, **kwargs):
        assert k == 3
        return drawn["hint" if given else None]

    monkeypatch.setattr(spct, "judge", fake)
    kept = select(small_model(), [CASE] * 3, draws=3)
    assert (kept.easy, kept.never, kept.hinted) == (1, 1, 2)
    assert kept.right == pytest.approx(5 / 9)
    expected = [row for j in (right, right, hint, hint) for row in rows(CASE, j)]
    assert [[t for t in row if t >= 0] for row in kept.rows.tolist()] == expected


def test_nothing_right_is_said():
    with pytest.raises(ValueError, match="none was judged right"):
        select(small_model(), [CASE], draws=2)


# --- reinforcement learning


def test_principles_count_once_in_a_rollout():
    settings = Settings(G=2, max_new_tokens=CRITIQUE_TOKENS, average="batch", texts=4)
    some = cases(2)
    g = torch.Generator().manual_seed(0)
    found = rollout(
        small_model(), some, lambda case, j: float(case is some[0]), settings, end=END, generator=g
    )
    assert found.rewards.tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert len(found.rows) == 2 * 2 * 4
    principles, critiques = written(found.rows)
    first = torch.arange(16) % 4 == 0
    assert (found.mask == (critiques | (principles & first[:, None]))).all()
    assert (found.logprobs[~found.mask] == 0).all()
    assert (found.logprobs[found.mask] < 0).all()


def test_a_rollout_keeps_to_the_temperature_of_its_settings(monkeypatch):
    """Judgements are drawn at it, and their log-probabilities are those at it."""
    seen, model = [], small_model()

    def spy(*args, temperature, **options):
        seen.append(temperature)
        return judge(*args, temperature=temperature, **options)

    monkeypatch.setattr(spct, "judge", spy)
    settings = Settings(G=2, max_new_tokens=CRITIQUE_TOKENS, temperature=0.6, texts=4)
    found = rollout(model, cases(2), rule, settings, end=END, generator=torch.Generator().manual_seed(0))
    assert seen == [0.6]
    known = token_logprobs(model, found.rows, 0.6)[0].detach()
    torch.testing.assert_close(found.logprobs, known * found.mask)


def test_reinforcement_holds_to_a_copy_and_asks_new_questions_each_time(monkeypatch):
    """What `grpo` is given: a reference that does not learn along, and cases of the training part."""
    calls, model = [], small_model()
    monkeypatch.setattr(spct, "grpo", lambda *args, **options: calls.append((args, options)) or [])
    for seed in (0, 1):
        spct.reinforced(model, seed, principled=False, steps=3)
    ((learner, asked, paid, _, training), options), ((_, other, *_), _) = calls
    assert learner is model
    assert paid is rule
    assert training.steps == 3
    assert options["reference"] is not model
    assert all(map(torch.equal, options["reference"].parameters(), model.parameters()))
    assert options["draw"].keywords == {"principled": False}
    assert asked(0) == asked(0)
    assert len({str(found) for found in (asked(0), asked(1), other(0), other(1))}) == 4
    assert not any(is_held_out(f"{case.query.a} + {case.query.b}") for case in asked(0))


def test_reinforcement_learns_principles_from_the_verdict_alone():
    """Judgements with `truth` first are paid: after a few steps there are more of them."""
    model = small_model()
    some = cases(2)
    settings = Settings(G=16, max_new_tokens=CRITIQUE_TOKENS, average="batch", texts=4)
    training = Training(steps=12, lr=3e-3, matrix_lr=0.0, warmup=1, decay=0.0, weight_decay=0.0)

    def wants_truth(case, judgement):
        return float(judgement.principles[0] == "truth")

    def odds():
        prompt = torch.tensor([encode([*some[0].query.words, "principles:"])])
        return model(prompt)[0, -1].softmax(-1)[encode(["truth"])[0]].item()

    before = odds()
    history = grpo(
        model, lambda i: some, wants_truth, settings, training, end=END, draw=rollout, progress=False
    )
    assert odds() > 3 * before
    assert history[-1]["reward"] > history[0]["reward"]


# --- voting and auditing


def test_votes_by_hand():
    scores = torch.tensor([[[3.0, 2.0], [2.0, 4.0], [5.0, 1.0], [2.0, 2.0]]])
    assert vote(scores, [CASE], 4).tolist() == [1.0]  # 12 to 9
    assert vote(scores, [CASE], 1, repeats=4000)[0].item() == pytest.approx(0.5, abs=0.05)  # two of four
    quality = torch.tensor([[0.0, 9.0, 1.0, 8.0]])
    assert vote(scores, [CASE], 4, quality=quality).tolist() == [0.0]  # 4 to 6
    assert vote(scores, [CASE], 4, quality=-quality).tolist() == [1.0]
    assert vote(scores, [CASE], 4, quality=quality, keep=0.75).tolist() == [1.0]  # 9 to 7
    assert vote(scores[:, :1], [CASE], 1, quality=quality[:, :1]).tolist() == [1.0]  # one is always kept
    with pytest.raises(ValueError, match="k=5: there are 4"):
        vote(scores, [CASE], 5)


@given(seed=st.integers(0, 1000), k=st.integers(1, 6))
@hypothesis_settings(max_examples=30, deadline=None)
def test_equal_judgements_vote_as_one(seed, k):
    g = torch.Generator().manual_seed(seed)
    some = cases(5)
    one = torch.randint(1, 11, (5, 1, 4), generator=g).float()
    assert torch.equal(vote(one.expand(5, 6, 4), some, k), strictly_best(one, some)[:, 0].float())


def test_audit_counts_what_is_wrong():
    fine = exact(CASE, PRINCIPLES)
    slip = words("brief four no truth 70 70 4 4 yes 4/10 <eos>")
    sums = words("brief four yes truth 70 70 4 4 yes 7/10 <eos>")
    drawn = [[fine, Judgement(fine.principles, (slip, fine.critiques[1]))]]
    drawn[0] += [Judgement(fine.principles, (sums, fine.critiques[1])), Judgement(fine.principles, ((), ()))]
    found = audit([CASE], drawn)
    assert found["read"] == 0.75
    assert found["truth"] == 1.0
    assert found["brief"] == pytest.approx(5 / 6)
    assert found["checks"] == pytest.approx(11 / 12)
    assert found["summed"] == pytest.approx(5 / 6)
    assert found["ties"] == 0.0
    alike = Case(BOSS, (KIND, KIND, WRONG))
    assert audit([alike], [[exact(alike, PRINCIPLES)]])["ties"] == 1.0
