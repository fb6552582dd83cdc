"""The threshold keeps its promise, and the figures of a verifier are what they say."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eval.judged import Judged, known_cuts, measure_kind
from parse.answer import accept
from parse.verifiers import Evidence, Likelihood, ProbeHead
from train.verifier import NEVER, calibrate, survival_loss


def drafts(rng, n, skill=1.5):
    """Simulated verdicts: validity is lost once; confidences follow it with noise."""
    scores, labels = [], []
    for _ in range(n):
        k = rng.integers(3, 9)
        first = rng.integers(0, k) if rng.random() < 0.4 else k
        ok = np.arange(k) < first
        labels.append(ok.tolist())
        scores.append((1 / (1 + np.exp(-(skill * (2 * ok - 1) + rng.normal(size=k))))).tolist())
    return scores, labels


def lost(scores, labels, threshold):
    ends = [accept(s, threshold) for s in scores]
    return [k > 0 and not ok[k - 1] for k, ok in zip(ends, labels, strict=True)]


def test_the_expected_loss_stays_under_the_promise():
    """Conformal risk control bounds the mean over calibration sets of the loss on fresh prompts."""
    rng = np.random.default_rng(0)
    promise, realised = 0.05, []
    for _ in range(300):
        scores, labels = drafts(rng, 120)
        threshold = calibrate(scores, labels, promise)
        realised.append(np.mean(lost(*drafts(rng, 200), threshold)))
    assert np.mean(realised) <= promise + 2 * np.std(realised) / math.sqrt(len(realised))
    assert np.mean(realised) > promise / 3  # and it is not kept by accepting nothing


@given(
    seed=st.integers(0, 10**6),
    promise=st.floats(0.02, 0.5),
    policy=st.sampled_from(["first_fail", "longest"]),
)
def test_the_threshold_is_the_smallest_that_keeps_the_promise_on_its_data(seed, promise, policy):
    scores, labels = drafts(np.random.default_rng(seed), 60)
    threshold = calibrate(scores, labels, promise, policy)

    def bound(t):
        ends = [accept(s, t, policy) for s in scores]
        losses = sum(k > 0 and not ok[k - 1] for k, ok in zip(ends, labels, strict=True))
        return (losses + 1) / (len(scores) + 1)

    if threshold <= 1:
        assert bound(threshold) <= promise + 1e-9
    if policy == "first_fail" and 0 < threshold <= 1:
        assert bound(threshold - 1e-6) > promise


def test_too_few_prompts_accept_nothing():
    assert calibrate([[0.99]] * 50, [[True]] * 50, 0.01) == NEVER
    assert calibrate([[0.99]] * 99, [[True]] * 99, 0.01) == 0.0
    assert calibrate([[1.0]] * 200, [[False]] * 200, 0.01) == NEVER


def judged(log_probs, ends, valid):
    zeros = torch.zeros(len(log_probs))
    states = torch.zeros(ends[-1], 2)
    return Judged(Evidence(ends, torch.tensor(log_probs), zeros, zeros, states, None), valid)


def test_figures_count_cuts_up_to_the_first_invalid_one():
    data = [
        judged([-0.1, -0.1, -3.0, -0.1], [1, 2, 3, 4], [True, True, False, False]),
        judged([-0.1, -2.0], [1, 2], [True, True]),
    ]
    figures = measure_kind(Likelihood("lowest", "segment"), data, 0.5, "first_fail")
    assert figures["false_accept_rate"] == 0
    assert figures["false_reject_rate"] == pytest.approx(1 / 4)
    assert figures["auc"] == 1
    assert figures["accepted_fraction"] == pytest.approx(3 / 6)
    assert figures["oracle_accepted_fraction"] == pytest.approx(4 / 6)
    assert figures["accuracy_loss"] == 0
    everything = measure_kind(Likelihood("lowest", "segment"), data, 0.0, "first_fail")
    assert everything["accuracy_loss"] == 0.5
    assert everything["false_accept_rate"] == 1


@pytest.mark.parametrize(("valid", "known"), [([True, True], 2), ([True, False, False], 2), ([False], 1)])
def test_known_cuts(valid, known):
    assert known_cuts(valid) == known


def test_the_loss_is_the_likelihood_of_where_the_draft_fails():
    torch.manual_seed(0)
    head = ProbeHead(2).eval()
    item = judged([-0.1, -0.2, -0.3, -0.4], [1, 2, 4], [True, False, False])
    columns = torch.stack([item.evidence.log_prob, torch.zeros(4), torch.zeros(4), torch.zeros(4)], -1)
    chance = torch.sigmoid(-head(torch.zeros(4, 2), columns))
    expected = -torch.log(chance[0]) - torch.log(1 - chance[1])
    torch.testing.assert_close(survival_loss(head, item), expected, rtol=1e-4, atol=1e-5)
    right = judged([-0.1, -0.2], [1, 2], [True, True])
    chance = torch.sigmoid(-head(torch.zeros(2, 2), columns[:2]))
    torch.testing.assert_close(survival_loss(head, right), -torch.log(chance).sum(), rtol=1e-4, atol=1e-5)
