"""Puzzles, their verifier, the documents about them, and the anatomy of a trace."""

import random
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mini import tasks
from mini.model import Transformer
from mini.tasks import (
    OPERATORS,
    PATHS,
    TAGS,
    WORDS,
    Marks,
    Task,
    answers,
    document,
    puzzles,
    read,
    search,
    sheet,
    values,
    verify,
)

PROMPT = (
    "6 a1 b1 c7 =7"  # 6 - 1 - 1 - 7 = -3, whose last digit on the clock of ten is 7; nothing else gives 7
)
RIGHT = "<think> a- A5 b- B4 c- C7 ok </think> <answer> a- b- c- </answer> <eos>"
seeds = st.integers(0, 10**6)
prompts = st.sampled_from(puzzles().prompts)


def test_values_are_worked_from_left_to_right_in_last_digits():
    assert values(PROMPT, "---") == [5, 4, 7]
    assert values("6 a1 b1 c7 =9", "+**") == [7, 7, 9]


def test_every_puzzle_has_exactly_one_answer():
    for prompt in random.Random(0).sample(puzzles().prompts, 200):
        assert sum(verify_path(prompt, path) for path in PATHS) == 1


def verify_path(prompt, path):
    words = " ".join(f"{gap}{op}" for gap, op in zip("abc", path, strict=True))
    return verify(prompt, f"<think> no </think> <answer> {words} </answer> <eos>").accuracy


def test_train_and_held_out_are_disjoint_by_hash_and_all_there_is():
    task = puzzles()
    assert not set(task.train) & set(task.held_out)
    assert sorted(task.train + task.held_out) == sorted(task.prompts)
    assert all(zlib.crc32(prompt.encode()) % 5 == 0 for prompt in task.held_out)


@pytest.mark.parametrize(
    ("response", "marks"),
    [
        (RIGHT, Marks(1.0, 1.0)),
        ("<think> </think> <answer> a- b- c- </answer> <eos>", Marks(1.0, 1.0)),
        (RIGHT.replace("a- b- c- <", "a+ b- c- <"), Marks(0.0, 1.0)),
        (RIGHT.removesuffix(" <eos>"), Marks(0.0, 0.0)),
        (RIGHT.removeprefix("<think> "), Marks(0.0, 0.0)),
        (RIGHT.replace("c- <", "<"), Marks(0.0, 0.0)),
        # a word of prompts where an operator belongs
        (RIGHT.replace("a- b- c- <", "a5 b- c- <"), Marks(0.0, 0.0)),
        (RIGHT.replace("ok", "<think>"), Marks(0.0, 0.0)),
        ("no " + RIGHT, Marks(0.0, 0.0)),
        ("", Marks(0.0, 0.0)),
    ],
)
def test_the_verifier_by_hand(response, marks):
    assert verify(PROMPT, response) == marks


@given(st.data())
@settings(max_examples=300)
def test_nothing_that_a_model_can_write_stops_the_verifier_or_the_reader(data):
    words = st.sampled_from(WORDS)
    think = data.draw(st.lists(words, max_size=12))
    gaps = data.draw(st.tuples(*(st.sampled_from([w for w in WORDS if w[0] == gap]) for gap in "abc")))
    response = " ".join(("<think>", *think, "</think>", "<answer>", *gaps, "</answer>", "<eos>"))
    marks = verify(PROMPT, response)
    plain = not set(think) & set(TAGS)
    assert marks.format == float(plain and all(word[1] in OPERATORS for word in gaps))
    read(PROMPT, response)


def test_a_search_shares_what_it_can_and_tries_every_path_once():
    attempts = list(search("6 a1 b1 c7 =7", ("-", "-", "+")))
    assert [" ".join(words) for words, _, _ in attempts[:3]] == [
        "a- A5 b- B4 c+ C1 no",
        "c- C7 ok",
        "c* C8 no",
    ]
    assert " ".join(attempts[3][0]) == "b* B5 c+ C2 no"
    assert sorted(path for _, path, _ in attempts) == sorted(PATHS)


@given(prompts, seeds)
def test_who_never_gives_up_is_right_and_faithful(prompt, seed):
    written = document(prompt, random.Random(seed), thorough=1.0)
    trace = read(prompt, written)
    assert verify(prompt, written) == Marks(1.0, 1.0)
    assert len(written.split()) <= tasks.NEW_TOKENS
    assert trace.faithful
    assert trace.retries == trace.refused == trace.attempts - 1
    assert trace.slips == trace.misjudged == trace.repeated == 0


@given(prompts, seeds)
def test_no_document_has_a_slip_and_without_retries_it_has_one_attempt(prompt, seed):
    written = document(prompt, random.Random(seed), go_on=0.0, thorough=0.0)
    trace = read(prompt, written)
    assert (trace.steps, trace.attempts, trace.slips, trace.misjudged, trace.retries) == (3, 1, 0, 0, 0)
    assert verify(prompt, written).accuracy == trace.first == trace.faithful


@given(prompts, seeds, st.data())
def test_a_corrupted_step_is_a_slip_and_the_trace_is_not_faithful(prompt, seed, data):
    words = document(prompt, random.Random(seed), thorough=1.0).split()
    last = max(i for i, word in enumerate(words) if word[0] == "C")  # the result that ended the search
    wrong = data.draw(st.sampled_from([d for d in "0123456789" if d != words[last][1]]))
    words[last] = f"C{wrong}"
    trace = read(prompt, " ".join(words))
    assert trace.slips == 1
    assert trace.misjudged == 1
    assert not trace.faithful
    assert verify(prompt, " ".join(words)).accuracy == 1  # a right answer can follow a wrong trace


@given(prompts, seeds)
def test_another_answer_than_the_one_found_is_wrong_and_unfaithful(prompt, seed):
    written = document(prompt, random.Random(seed), thorough=1.0)
    start = written.index("<answer>") + 10
    other = written[:start] + {"+": "-", "-": "*", "*": "+"}[written[start]] + written[start + 1 :]
    assert verify(prompt, other) == Marks(0.0, 1.0)
    assert not read(prompt, other).faithful


def test_the_anatomy_of_a_bad_trace():
    bad = "<think> a- A5 b- B4 c+ C1 no c+ C2 ok a* A9 c- </think> <answer> a- b- c+ </answer> <eos>"
    trace = read(PROMPT, bad)
    assert trace.steps == 6
    assert trace.slips == 3
    assert trace.attempts == 3
    assert trace.repeated == 1
    assert trace.misjudged == 2  # ok for C2, and no verdict for the last
    assert (trace.refused, trace.retries) == (1, 1)
    assert not trace.faithful
    assert not trace.first


@given(prompts, seeds)
def test_exercise_sheets_are_true(prompt, seed):
    words = sheet(prompt, random.Random(seed)).split()[6:]
    due = dict(zip("abc", (int(word[-1]) for word in prompt.split()[1:-1]), strict=True))
    for i, word in enumerate(words):
        if word[0] in due:
            value, result = int(words[i - 1][-1]), int(words[i + 1][-1])
            assert result == tasks.OPERATORS[word[1]](value, due[word[0]])
            if word[0] == "c":
                assert words[i + 2] == ("ok" if result == int(prompt[-1]) else "no")


@given(st.lists(prompts, min_size=1, max_size=4))
def test_encode_and_decode_are_inverse(texts):
    task = puzzles()
    rows = task.encode([*texts, RIGHT])
    assert task.decode(rows) == [*texts, RIGHT]
    assert (rows[0] >= 0).sum() == 5


def test_an_unknown_word_is_named():
    with pytest.raises(ValueError, match="'d7' is not a word"):
        puzzles().encode(["6 a1 b1 d7 =7"])


def test_prompts_and_rewards_for_grpo():
    task = puzzles()
    ask = task.ask(3, seed=1)
    assert ask(5) == ask(5) != ask(6)
    assert ask(5) != task.ask(3, seed=2)(5)
    assert all(task.decode(torch.tensor([p]))[0] in set(task.train) for p in ask(5))
    tokens = [task.encode([text])[0].tolist() for text in (PROMPT, RIGHT)]
    assert task.reward(0.1)(*tokens) == pytest.approx(1.1)
    assert task.reward(0.1)(tokens[0], tokens[1][:-1]) == 0


def test_a_task_from_elsewhere_fits():
    task = Task(
        ["1 + 1", "2 + 2"], ["1", "2", "4", "+", "<eos>"], lambda p, r: Marks(float(r == "4 <eos>"), 1.0), 2
    )
    assert task.reward(0.0)([1, 3, 1], [2, 4]) == 1.0
    assert len(task.train) + len(task.held_out) == 2


def test_lessons_follow_from_seed_and_place_and_hold_no_held_out_puzzle():
    task, batch = puzzles(), tasks.lessons(seed=3)
    assert torch.equal(batch(9), tasks.lessons(seed=3)(9))
    assert not torch.equal(batch(9)[:, :5], batch(10)[:, :5])
    held_out = set(task.held_out)
    for text in task.decode(batch(0)):
        words = text.removeprefix("sheet ").split()
        assert " ".join(words[:5]) not in held_out


def test_lessons_have_the_share_of_sheets_and_the_writers_that_are_asked_for():
    task = puzzles()

    def traces(**shares):
        texts = [text for i in range(8) for text in task.decode(tasks.lessons(**shares)(i))]
        sheets = [text for text in texts if text.startswith("sheet")]
        found = [read(text[:13], text[14:]) for text in texts if text not in sheets]
        return len(sheets), found

    assert traces(sheets=1.0)[1] == []
    sheets, half = traces(sheets=0.0, go_on=0.0, thorough=0.5)  # who goes on at all does not give up
    assert sheets == 0
    assert all(trace.attempts == 1 or trace.faithful for trace in half)
    assert any(trace.retries for trace in half)
    sheets, found = traces(sheets=0.3, go_on=0.0, thorough=0.0)
    assert sheets / 256 == pytest.approx(0.3, abs=0.1)
    assert all(trace.attempts == 1 for trace in found)


def test_a_base_reads_the_documents_of_its_writers(monkeypatch):
    """Without going on and thoroughness, no document has a second attempt: chapter 10's control."""
    given = []
    monkeypatch.setattr(tasks, "train", lambda model, batch, *args, **options: given.append(batch(3)) or [])
    for thorough in (0.0, 1.0):
        tasks.pretrained(seed=4, go_on=0.0, thorough=thorough)
        assert given[-1].equal(tasks.lessons(4, go_on=0.0, thorough=thorough)(3))


def test_imitation_counts_what_follows_the_prompt_and_each_token_alike():
    torch.manual_seed(0)
    model, task = Transformer(tasks.REASONER), puzzles()
    rows = task.encode([f"{PROMPT} {RIGHT}", f"{PROMPT} <think>"])
    logp = model(rows[:, :-1].clamp(min=0)).log_softmax(-1)
    by_hand = -sum(
        logp[r, t - 1, rows[r, t]] for r in range(2) for t in range(5, rows.shape[1]) if rows[r, t] >= 0
    )
    torch.testing.assert_close(tasks.imitation(model, rows), by_hand / (15 * 2))


def test_summary_of_answers():
    found = tasks.Answers(
        [PROMPT] * 2,
        [RIGHT, "<think> a+ A7 b+ B8 c+ C5 no </think> <answer> a+ b+ c+ </answer> <eos>"],
        [Marks(1.0, 1.0), Marks(0.0, 1.0)],
        [read(PROMPT, RIGHT), read(PROMPT, "<think> a+ A7 b+ B8 c+ C5 no </think>")],
    ).summary()
    assert found["accuracy"] == 0.5
    assert found["format"] == 1.0
    assert found["attempts"] == 1.0
    assert found["retries"] == 0.0
    assert found["first"] == 0.5
    assert found["faithful"] == 1.0
    assert found["length"] == 15
    assert (found["slips"], found["misjudged"]) == (0.0, 0.0)
    bad = "<think> a- A5 b- B4 c+ C1 no c+ C2 ok a* A9 c- </think> <answer> a- b- c+ </answer> <eos>"
    worse = tasks.Answers([PROMPT], [bad], [verify(PROMPT, bad)], [read(PROMPT, bad)]).summary()
    assert (worse["slips"], worse["misjudged"], worse["retries"]) == (3 / 6, 2 / 3, 1.0)


def test_answers_are_of_held_out_puzzles_and_follow_from_the_seed():
    torch.manual_seed(0)
    model = Transformer(tasks.REASONER)
    one, again = answers(model, 3, seed=1), answers(model, 3, seed=1)
    assert one.responses == again.responses
    assert set(one.prompts) <= set(puzzles().held_out)
    greedy = [answers(model, one.prompts, temperature=0, seed=seed).responses for seed in (1, 2)]
    assert greedy[0] == greedy[1] != one.responses
