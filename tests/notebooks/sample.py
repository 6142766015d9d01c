# %% [markdown]
# # 99 · A sample chapter
# It follows every rule of the notebook contract, so that the tests can break each one.

# %%
import matplotlib.pyplot as plt
import torch
from ipywidgets import FloatSlider

from mini.lab import PALETTE, agree, check, claim, explore, predict, progress, recall, show

# %% tags=["nbval-ignore-output"]
predict("sample-sum", "What is the sum of the numbers from 1 to 100?")


# %%
def parabola(width=1.0):
    fig, ax = plt.subplots()
    x = torch.linspace(-3, 3, 50)
    ax.plot(x, x**2 / width, color=PALETTE["blue"])
    ax.set(xlabel="x, in metres", ylabel="height, in metres", title="It opens")
    return fig


show(parabola(), alt="A parabola that opens upwards from the origin")

# %% tags=["nbval-ignore-output"]
width = FloatSlider(1.0, min=0.5, max=4.0, description="width, in metres")
explore(parabola, alt="A parabola that opens upwards from the origin", width=width)

# %% [markdown]
# **Exercise 99.1.** Write the mean of the squares.
#
# <details><summary>Hint</summary>
#
# `x * x` squares each value.
# </details>


# %% exercise="99-1"
def mean_square(x):
    """The mean of the squares of x[n], one number."""
    ### BEGIN SOLUTION
    return (x * x).mean()
    ### END SOLUTION


# %% check="99-1"
with check("99.1", points=2):
    agree(
        mean_square,
        lambda x: x.pow(2).mean(),
        cases=[torch.tensor([1.0, 2.0, 4.0])],
        mistakes={
            "the square of the mean, not the mean of the squares": lambda x: x.mean() ** 2,
            "a sum, not a mean": lambda x: (x * x).sum(),
        },
    )

# %% tags=["nbval-ignore-output"]
total = sum(range(101))
recall("sample-sum", total)
claim(
    "The numbers from 1 to 100 add up to 5050",
    source="Gauss (1787)",
    measured=total,
    holds=total == 5050,
    verdict="derived",
)

# %%
progress()
