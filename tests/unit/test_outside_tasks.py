"""Questions from elsewhere through the interface of `mini.tasks`: by hand, and from reasoning-gym where it is there.

reasoning-gym cannot stand in pyproject.toml: it wants tabulate 0.9, and the package with Shakespeare's plays an older
one, which serves both. CONTRIBUTING.md says how to install it.
"""

import pytest
import torch

from mini.grpo import Settings, grpo
from mini.model import Config, Transformer
from mini.tasks import Marks, Task, from_entries, spell, unspell
from mini.train import Settings as Training

ENTRIES = [{"question": f"{a} + {b} =", "answer": str(a + b)} for a in range(9) for b in range(9)]


def exactly(answer: str, entry: dict) -> float:
    return 1.0 if answer == entry["answer"] else 0.05 if answer.isdigit() else 0.0


def respond(answer: str) -> str:
    return f"<answer> {spell(answer)} </answer> <eos>"


@pytest.fixture(scope="module")
def sums() -> Task:
    return from_entries(ENTRIES, exactly, new_tokens=8)


@pytest.mark.parametrize(
    ("response", "marks"),
    [
        (respond("12"), Marks(1, 1)),
        ("<think> 1 0 + 2 </think> " + respond("12"), Marks(1, 1)),
        (respond("13"), Marks(0, 1)),  # the verifier's 0.05 for a try is no right answer
        ("<answer> </answer> <eos>", Marks(0, 0)),
        (respond("12") + " <eos>", Marks(0, 0)),
        ("<answer> 1 2 </answer>", Marks(0, 0)),
        ("<answer> 1 2 <answer> </answer> <eos>", Marks(0, 0)),
        ("1 2 <eos>", Marks(0, 0)),
    ],
)
def test_answers_are_marked_by_the_scorer_and_by_their_form(sums, response, marks):
    assert sums.verify(spell("7 + 5 ="), response) == marks


def test_every_letter_is_a_word_and_prompts_are_split_by_their_text(sums):
    assert sums.decode(sums.encode([spell("7 + 5 =")])) == ["7 ␣ + ␣ 5 ␣ ="]
    assert unspell(spell("a b\n\tc")) == "a b\n\tc"
    assert {*sums.train, *sums.held_out} == {*sums.prompts}
    assert not {*sums.train} & {*sums.held_out}


def test_a_question_that_comes_twice_is_refused():
    with pytest.raises(ValueError, match=r"'0 \+ 0 =' comes twice"):
        from_entries([*ENTRIES, ENTRIES[0]], exactly, 8)


@pytest.mark.parametrize("name", ["chain_sum", "gcd", "number_sequence", "letter_counting"])
def test_a_data_set_of_reasoning_gym_is_a_task(name):
    gym = pytest.importorskip(
        "reasoning_gym", reason="an outside check; CONTRIBUTING.md says how to install it"
    )
    data = gym.create_dataset(name, size=40, seed=0)
    entries = list({entry["question"]: entry for entry in data}.values())
    task = from_entries(entries, data.score_answer, new_tokens=12)
    for prompt, entry in zip(task.prompts, entries, strict=True):
        assert task.verify(prompt, respond(entry["answer"])) == Marks(1, 1)
        assert task.verify(prompt, respond(entry["answer"] + "7")) == Marks(0, 1)
        assert task.verify(prompt, spell(entry["answer"])) == Marks(0, 0)

    torch.manual_seed(0)
    model = Transformer(Config(vocab_size=len(task.words), dim=16, n_layers=1, n_heads=2, inter_dim=32))
    settings = Settings(G=4, max_new_tokens=task.new_tokens)
    history = grpo(
        model, task.ask(4), task.reward(), settings, Training(steps=2), end=task.end, progress=False
    )
    assert len(history) == 2
    assert all(0 <= row["reward"] <= 1.1 for row in history)
