"""The classroom: exercises, claims, figures, controls. Recipes of trained models are in `mini.lab.recipes`."""

from mini.lab.check import CheckFailed, agree, check, progress
from mini.lab.claims import claim, ledger
from mini.lab.figures import PALETTE, mean_interval, show
from mini.lab.processes import launch
from mini.lab.study import study
from mini.lab.widgets import explore, predict, recall

__all__ = [
    "PALETTE",
    "CheckFailed",
    "agree",
    "check",
    "claim",
    "explore",
    "launch",
    "ledger",
    "mean_interval",
    "predict",
    "progress",
    "recall",
    "show",
    "study",
]
