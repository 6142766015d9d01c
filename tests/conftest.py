import tools.typechecker  # noqa: F401  (pyproject names it as the checker of shapes; it must be loaded before mini)
