"""A model of `transformers` on this machine: loading, forward passes, caches, token loops, compilation."""
