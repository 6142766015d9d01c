"""DeepSeek in Miniature: the package that the notebooks build, one module a chapter."""
