"""The end-to-end evaluation: methods, metrics and the report."""

import recipes  # noqa: F401  checks that `parse` is this project's package
