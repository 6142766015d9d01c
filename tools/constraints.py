"""Write constraints.txt: the exact versions of what is installed beside this Python.

Run as `python -m tools.constraints` in an environment that the tests pass in.
"""

import re
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_OURS = {"pip", "setuptools", "wheel", "deepseek-in-miniature"}
HEADER = """\
# Exact versions that the tests pass with; every install here uses this file (pip install -c constraints.txt).
# Made by `make constraints`. A constraint installs nothing: a line for another platform is harmless.
"""


def lines() -> list[str]:
    """`name==version` for each installed distribution, sorted, without local parts such as torch's `+cpu`."""
    found = {}
    for distribution in distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
        if name not in NOT_OURS:
            found[name] = distribution.version.split("+")[0]
    return [f"{name}=={version}" for name, version in sorted(found.items())]


if __name__ == "__main__":
    (ROOT / "constraints.txt").write_text(HEADER + "\n".join(lines()) + "\n", encoding="utf-8")
