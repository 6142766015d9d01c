"""Collect the claim cards of the executed notebooks: `python -m tools.claims` writes docs/CLAIMS.md."""

from mini.lab import ledger
from tools.chapters import ROOT, SOLUTIONS

LEDGER = ROOT / "docs" / "CLAIMS.md"


def collect() -> str:
    """What docs/CLAIMS.md should hold."""
    return ledger(SOLUTIONS.glob("*.ipynb"))


if __name__ == "__main__":
    LEDGER.parent.mkdir(exist_ok=True)
    LEDGER.write_text(collect(), encoding="utf-8", newline="\n")
    print(f"{LEDGER.relative_to(ROOT)} written")
