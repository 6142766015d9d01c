from hypothesis import settings

import tools.typechecker  # noqa: F401  (pyproject names it as the checker of shapes; it must be loaded before mini)

# The same examples each time: a test that failed for one in ten thousand inputs would fail for a newcomer who changed
# nothing. New examples: `python -m tests.run code -- --hypothesis-profile=default`.
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")
