"""Claim cards and the ledger."""

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, writes

from mini.lab import claim, claims, ledger
from tools.chapters import SOLUTIONS
from tools.claims import STORY, counted, story


@pytest.fixture
def shown(monkeypatch):
    """What was displayed."""
    bundles = []
    monkeypatch.setattr(claims, "display", lambda data, raw: bundles.append(data))
    monkeypatch.delenv("MINI_STRICT", raising=False)
    return bundles


def card(shown, **changes) -> dict:
    given = {
        "source": "arXiv:2412.19437 §2",
        "measured": 57.125,
        "holds": True,
        "verdict": "derived",
        **changes,
    }
    claim("57× fewer numbers", **given)
    return shown[-1]


def test_card_carries_text_html_and_data(shown):
    bundle = card(shown, n=4096, seeds=3, interval=(55.2, 59.0), unit="times")
    assert bundle["text/plain"] == (
        "Claim: 57× fewer numbers [arXiv:2412.19437 §2]\n"
        "Measured: 57.1 times (n = 4,096, 3 seeds, 95% interval 55.2 to 59.0)\n"
        "Verdict: derived"
    )
    assert bundle[claims.MIME] == {
        "claim": "57× fewer numbers",
        "source": "arXiv:2412.19437 §2",
        "measured": "57.1 times",
        "evidence": "n = 4,096, 3 seeds",
        "interval": "55.2 to 59.0",
        "verdict": "derived",
        "holds": True,
    }


@pytest.mark.parametrize(
    ("measured", "interval", "said"),
    [
        (28.889, (24.58, 33.2), "28.9 (24.6 to 33.2)"),
        (0.09763, (0.07875, 0.1165), "0.098 (0.079 to 0.117)"),
        (-0.0004, (-0.031, 0.03), "0.000 (-0.031 to 0.030)"),
        (4321.4, (3210.4, 5432.4), "4,321 (3,210 to 5,432)"),
        (0.5, (0.5, 0.5), "0.5 (0.5 to 0.5)"),
        (7, (5.5, 8.5), "7.0 (5.5 to 8.5)"),
    ],
)
def test_an_interval_says_how_many_digits_mean_something(shown, measured, interval, said):
    made = card(shown, measured=measured, interval=interval)[claims.MIME]
    assert f"{made['measured']} ({made['interval']})" == said


def test_html_is_escaped(shown):
    claim("a < b & <script>", source="s", measured="<b>", holds=True, verdict="reproduced")
    assert "<script>" not in shown[0]["text/html"]
    assert "a &lt; b &amp; &lt;script&gt;" in shown[0]["text/html"]


def test_dollars_are_money_not_formulas(shown):
    claim("from $5 M to $500 M", source="s", measured=1, holds=True, verdict="derived")
    assert "from <span>$</span>5 M to <span>$</span>500 M" in shown[0]["text/html"]
    assert "from $5 M to $500 M" in shown[0]["text/plain"]


def test_what_does_not_hold_is_said_and_raises_in_strict_mode_only(shown, monkeypatch):
    assert "“derived” did not hold on this run" in card(shown, holds=False)["text/plain"]
    monkeypatch.setenv("MINI_STRICT", "1")
    with pytest.raises(AssertionError, match=r"not derived on this run: .*measured 57\.12"):
        card(shown, holds=False)
    assert shown[-1][claims.MIME]["holds"] is False


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"verdict": "confirmed"},
            "'confirmed' is none of reproduced, in direction, not at this scale, derived",
        ),
        ({"interval": (2, 1)}, r"\(2, 1\) is not \(low, high\)"),
    ],
)
def test_bad_cards_are_refused(shown, changes, words):
    with pytest.raises(ValueError, match=words):
        card(shown, **changes)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (671_026_419_200, "671,026,419,200"),
        (3.14159, "3.142"),
        (2_788_000.0, "2,788,000"),
        (5.576e6, "5,576,000"),
        (6.71e11, "6.710e+11"),
        (0.0, "0"),
        (0.00001, "1.000e-05"),
        (-0.25, "-0.25"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        ("about 1%", "about 1%"),
    ],
)
def test_numbers_are_for_people(value, text):
    assert claims.number(value) == text


def notebook(path, title, *cards):
    outputs = [new_output("display_data", {claims.MIME: c, "text/plain": "x"}) for c in cards]
    outputs.append(new_output("stream", text="other output"))
    nb = new_notebook(cells=[new_markdown_cell(f"# {title}\ntext"), new_code_cell("1", outputs=outputs)])
    path.write_text(writes(nb), encoding="utf-8")
    return path


def test_ledger_lists_by_chapter_and_counts(shown, tmp_path):
    good = card(shown, seeds=1)[claims.MIME] | {"claim": "a | b, $5"}
    bad = card(shown, holds=False)[claims.MIME]
    paths = [
        notebook(tmp_path / "01_b.ipynb", "01 · Two", good, bad),
        notebook(tmp_path / "00_a.ipynb", "00 · One"),
    ]
    text = ledger(paths)
    assert text.startswith("# Claims\n\n2 claims: 1 derived, 1 did not hold.\n")
    assert text.index("## 00 · One\n\nNo claims.") < text.index("## 01 · Two")
    assert "| a \\| b, \\$5 | arXiv:2412.19437 §2 | 57.12 | 1 seed |  | derived |" in text
    assert "|  | did not hold |" in text
    assert ledger(reversed(paths)) == text


def test_ledger_has_room_for_more_on_top(shown, tmp_path):
    path = notebook(tmp_path / "00_a.ipynb", "00 · One", card(shown)[claims.MIME])
    text = ledger([path], ["## The story", "", "told"])
    assert text.index("1 claim: 1 derived.") < text.index("\n\n## The story\n\ntold\n\n## 00 · One\n")


# --- the public story


@pytest.fixture
def two(shown, tmp_path):
    """A notebook with a claim that holds and one that does not."""
    good = card(shown, interval=(1, 2))[claims.MIME] | {"claim": "57 of a kind"}
    bad = card(shown, holds=False)[claims.MIME] | {"claim": "57 others"}
    return notebook(tmp_path / "03_a.ipynb", "03 · Attention", good, bad)


def test_story_takes_verdicts_and_numbers_from_the_cards(two):
    lines = story([two], {"It is | small": [("03", "of a kind"), ("03", "others")]})
    link = "[03 · Attention](../chapters/03_a.ipynb)"
    assert (
        lines[-2] == rf"| **It is \| small** | {link} | derived | 57 of a kind | 57.12; 95%: 1.00 to 2.00 |"
    )
    assert lines[-1] == f"|  | {link} | did not hold | 57 others | 57.12 |"


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (("03", "a third"), "'It is small': 0 claims of chapter 03 contain 'a third'"),
        (("03", "57"), "2 claims of chapter 03 contain '57'"),
        (("04", "of a kind"), "0 claims of chapter 04"),
    ],
)
def test_story_names_what_it_does_not_find(two, place, words):
    with pytest.raises(ValueError, match=words):
        story([two], {"It is small": [place]})


@pytest.mark.parametrize("said", STORY)
def test_each_row_of_the_story_points_to_claims_of_the_course(said):
    assert STORY[said]
    story(sorted(SOLUTIONS.glob("*.ipynb")), {said: STORY[said]})


def test_the_readme_says_how_many():
    claims = "# Claims\n\n3 claims: 3 derived.\n\nrest\n"
    assert counted("a\n\n1 claim: 1 derived.\n\nb\n", claims) == "a\n\n3 claims: 3 derived.\n\nb\n"
    with pytest.raises(ValueError, match="0 lines"):
        counted("nothing\n", claims)
