"""Causal language models: directories on disk, conversations as token ids, attention over ragged batches.

Import what is needed from its own file (`chat`, `load`, `init`, `attention`): this package itself loads nothing heavy.
"""
