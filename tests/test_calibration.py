"""The threshold keeps its promise, and the figures of a verifier are what they say."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eval.verifier_metrics import Draft, Scored, accuracy_loss, keeps, known_cuts, measure, reliability, valid_cuts
from train.calibration import NEVER, calibrate, empirical, prompts_needed, smallest, thresholds
from train.verifier_training import survival_loss


def scored(confidences, valid, number=0, round=0, target_right=True):
    k = len(valid)
    draft = Draft([1], list(range(k)), list(range(1, k + 1)), True, list(valid), target_right, number, round)
    return Scored(draft, [float(torch.tensor(c)) for c in confidences])


def simulated(rng, prompts, skill=1.5, rounds=3):
    """Verdicts on the drafts of some prompts: validity is lost once; confidences follow it with noise.

    After a draft that goes wrong comes another one, so that a prompt takes several risks.
    """
    found = []
    for number in range(prompts):
        for index in range(rounds):
            k = rng.integers(3, 9)
            first = rng.integers(0, k) if rng.random() < 0.4 else k
            ok = np.arange(k) < first
            noisy = 1 / (1 + np.exp(-(skill * (2 * ok - 1) + rng.normal(size=k))))
            found.append(scored(noisy.tolist(), ok.tolist(), number, index))
            if first == k:
                break
    return found


@pytest.mark.parametrize("policy", ["first_fail", "longest", "whole"])
def test_the_expected_loss_stays_under_the_promise(policy):
    """Conformal risk control bounds the mean over calibration sets of the loss of a fresh prompt."""
    rng = np.random.default_rng(0)
    max_accuracy_loss, realised = 0.05, []
    for _ in range(200):
        threshold = calibrate(simulated(rng, 100), max_accuracy_loss, policy)
        realised.append(accuracy_loss(simulated(rng, 150), threshold, policy))
    error = np.std(realised) / math.sqrt(len(realised))
    assert np.mean(realised) <= max_accuracy_loss + 2 * error
    assert np.mean(realised) > max_accuracy_loss / 3  # and it is not kept by accepting nothing


def test_drafts_of_one_prompt_are_one_risk():
    """Counted draft by draft, the same data would promise more than they keep."""
    rng = np.random.default_rng(1)
    max_accuracy_loss, realised = 0.05, []
    for _ in range(100):
        data = simulated(rng, 100)
        apart = [
            scored(one.confidences, one.draft.valid, number=i) for i, one in enumerate(data)
        ]  # each draft as if it were a prompt
        realised.append(accuracy_loss(simulated(rng, 150), calibrate(apart, max_accuracy_loss)))
    assert np.mean(realised) > max_accuracy_loss + 2 * np.std(realised) / math.sqrt(len(realised))


@given(
    seed=st.integers(0, 10**6),
    max_accuracy_loss=st.floats(0.02, 0.5),
    policy=st.sampled_from(["first_fail", "longest", "whole"]),
)
def test_the_threshold_is_the_smallest_that_keeps_the_promise_or_one_as_good_as_free(seed, max_accuracy_loss, policy):
    data = simulated(np.random.default_rng(seed), 50)
    least, threshold = smallest(data, max_accuracy_loss, policy), calibrate(data, max_accuracy_loss, policy)
    bound = lambda t: (accuracy_loss(data, t, policy) * 50 + 1) / 51
    cuts = lambda one, t: min(keeps(one, t, policy), valid_cuts(one.draft.valid))
    tokens = lambda t: sum([0, *one.draft.ends][cuts(one, t)] for one in data)  # rightly accepted
    if least <= 1:
        assert bound(least) <= max_accuracy_loss + 1e-9
    if policy == "first_fail" and 0 < least <= 1:
        assert bound(least - 1e-6) > max_accuracy_loss
    assert threshold >= least
    assert tokens(threshold) >= 0.998 * tokens(least)
    above = [c for one in data for c in one.confidences if c > threshold]
    if above and tokens(least):
        assert tokens(min(above)) < 0.998 * tokens(least)
    if policy == "first_fail":
        assert accuracy_loss(data, empirical(data, max_accuracy_loss)) <= max_accuracy_loss + 1e-9


def test_too_few_prompts_accept_nothing():
    right = lambda n: [scored([0.99], [True], number=i) for i in range(n)]
    assert calibrate(right(98), 0.01) == NEVER
    assert smallest(right(99), 0.01) == 0.0
    assert calibrate(right(99), 0.01) == pytest.approx(0.99)
    assert prompts_needed(0.01) == 99
    assert calibrate([scored([1.0], [False], number=i) for i in range(200)], 0.01) == NEVER


def test_nothing_is_lost_where_the_target_is_wrong_by_itself():
    data = [scored([0.9], [False], number=i, target_right=False) for i in range(200)]
    assert smallest(data, 0.01) == 0.0


def test_figures_leave_out_what_the_target_gets_wrong_too():
    """But for the tokens accepted: those drafts are met as well."""
    drafts = [([0.9, 0.7], [True, True]), ([0.8, 0.2], [True, False]), ([0.6], [True])]
    data = [scored(*draft, number=number) for number, draft in enumerate(drafts)]
    lost = scored([0.95, 0.9], [True, False], target_right=False)
    figures, alone = measure([*data, lost], 0.5), measure(data, 0.5)
    for key in ("auc", "false_accept_rate", "false_reject_rate", "first_error_f1", "ece", "accuracy_loss"):
        assert figures[key] == alone[key], key
    assert figures["accepted_fraction"] == pytest.approx((2 + 1 + 1 + 2) / 7)
    assert alone["accepted_fraction"] == pytest.approx(4 / 5)
    # kept are 2, 1 and 1 of 2, 2 and 1 tokens, so the residuals from 4/5 are 0.4, -0.6 and 0.2
    assert alone["accepted_error"] == pytest.approx(math.sqrt(0.56 * 3 / 2) / 5)
    twice = measure([*data, *data], 0.5)  # the same prompts again say nothing new
    assert twice["accepted_error"] == pytest.approx(alone["accepted_error"])
    assert alone["mean_confidence"] == pytest.approx((0.9 + 0.7 + 0.8 + 0.2 + 0.6) / 5)
    assert measure(data, 0.5, "whole")["mean_confidence"] == pytest.approx((0.7 + 0.2 + 0.6) / 3)
    assert all(math.isnan(measure([lost], 0.5)[key]) for key in ("auc", "ece"))


def test_a_verifier_that_tells_right_from_wrong_is_not_let_down_to_what_may_be_lost():
    data = [scored([0.9, 0.8], [True, True], number=i) for i in range(297)]
    data += [scored([0.9, 0.8, c], [True, True, False], number=int(10000 * c)) for c in (0.1, 0.2, 0.3)]
    assert smallest(data, 0.01) == pytest.approx(0.1)  # two of three hundred may be lost
    assert calibrate(data, 0.01) == pytest.approx(0.8)  # what is wrongly accepted is no loss to give up


def test_the_policies_meet_the_drafts_that_they_will_meet():
    """The whole draft or nothing is asked once a prompt; so is every draft that the target does not hand back."""
    data = [scored([0.9], [True], number=i) for i in range(99)]
    data += [scored([0.8], [False], number=i, round=1) for i in range(99)]
    assert thresholds(data, 0.01, "segment")["first_fail"] > 0.8
    assert thresholds(data, 0.01, "segment")["whole"] == pytest.approx(0.9)
    assert thresholds(data, 0.01, "never")["first_fail"] == pytest.approx(0.9)


def test_figures_count_cuts_up_to_the_first_invalid_one():
    data = [
        scored([0.9, 0.9, 0.05, 0.9], [True, True, False, False], number=0),
        scored([0.9, 0.15], [True, True], number=1),
    ]
    figures = measure(data, 0.5)
    assert figures["false_accept_rate"] == 0
    assert figures["false_reject_rate"] == pytest.approx(1 / 4)
    assert figures["auc"] == 1
    assert figures["accepted_fraction"] == pytest.approx(3 / 6)
    assert figures["oracle_accepted_fraction"] == pytest.approx(4 / 6)
    assert figures["accuracy_loss"] == 0
    assert figures["first_error_f1"] == 0  # the wrong draft's error is found, the right draft is suspected
    assert measure(data, 0.1)["first_error_f1"] == 1
    everything = measure(data, 0.0)
    assert everything["accuracy_loss"] == 0.5
    assert everything["false_accept_rate"] == 1


def test_the_calibration_error_is_the_gap_between_confidence_and_truth():
    data = [scored([0.95] * 4, [True] * 4, number=i) for i in range(3)]
    data += [scored([0.95], [False], number=9)]
    figures = measure(data, 0.5)
    assert figures["ece"] == pytest.approx(0.95 - 12 / 13)
    sure = np.array([0.05, 0.15, 0.15, 1.0])
    bins = reliability(sure, np.array([False, True, False, True]))
    assert [share for share, _, _ in bins] == [0.25, 0.5, 0.25]
    assert [true for _, _, true in bins] == [0, 0.5, 1]


def test_the_whole_draft_is_kept_by_its_last_cut():
    one = scored([0.1, 0.9], [True, True])
    assert keeps(one, 0.5, "whole") == 2
    assert keeps(one, 0.95, "whole") == 0
    assert keeps(one, 0.5) == 0
    assert keeps(one, 0.5, "longest") == 2


@pytest.mark.parametrize(
    ("valid", "first", "known"),
    [([True, True], 2, 2), ([True, False, False], 1, 2), ([False], 0, 1), ([True, False, True, True], 1, 2)],
)
def test_cuts_are_known_up_to_the_first_invalid_one(valid, first, known):
    """Whatever is valid again after it: labels of every prefix may say so, where the target mended an error."""
    assert valid_cuts(valid) == first
    assert known_cuts(valid) == known


def test_what_is_valid_again_after_an_error_counts_for_nobody():
    figures = measure([scored([0.9, 0.1, 0.9], [True, False, True])], 0.5)
    assert figures["oracle_accepted_fraction"] == pytest.approx(1 / 3)
    assert figures["false_reject_rate"] == 0
    assert np.isnan(figures["first_error_f1"]) or figures["first_error_f1"] == 0  # no right draft to spare


def test_the_loss_is_the_likelihood_of_where_the_draft_fails():
    hazards = torch.tensor([0.1, 0.5, 2.0])
    survive = torch.exp(-hazards)
    expected = -torch.log(survive[0]) - torch.log(1 - survive[1])
    torch.testing.assert_close(survival_loss(hazards, [True, False, False]), expected)
    torch.testing.assert_close(survival_loss(hazards, [True, True, True]), -torch.log(survive).sum())
    torch.testing.assert_close(survival_loss(hazards, [True, False, True]), expected)
    doubled = -torch.log(survive[0]) - 2 * torch.log(1 - survive[1])
    torch.testing.assert_close(survival_loss(hazards, [True, False, False], 2.0), doubled)
