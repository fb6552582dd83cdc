"""The stages that make a draft and a verifier out of a recipe."""

import recipes  # noqa: F401  checks that `parse` is this project's package
