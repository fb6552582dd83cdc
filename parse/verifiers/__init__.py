"""Verifiers: how confident to be in each prefix of a draft. One file a kind; `base` says what they have in common."""

from parse.verifiers.adapter import Adapter
from parse.verifiers.base import PROVIDED, Calibration, Evidence, Labels, Needs, Verifier, label_scores
from parse.verifiers.folded import Folded
from parse.verifiers.likelihood import Divergence, Likelihood
from parse.verifiers.probe import Probe
from parse.verifiers.prompt import PromptVerifier

__all__ = [
    "PROVIDED",
    "Adapter",
    "Calibration",
    "Divergence",
    "Evidence",
    "Folded",
    "Labels",
    "Likelihood",
    "Needs",
    "Probe",
    "PromptVerifier",
    "Verifier",
    "label_scores",
]
