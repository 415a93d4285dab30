"""The threshold: what is promised of false alarms is kept, and what cannot be is not promised."""

import numpy as np
import pytest

from looktwice_adapters.threshold import NormalScores, Threshold, outliers

PRIOR = NormalScores(mean=0.0, between=1.0, deviation=1.0, degrees=3.0)


def fit(scores, rate=0.05, **more):
    return Threshold.fit(scores, rate, prior=PRIOR, **more)


@pytest.mark.parametrize(
    ("count", "rate", "promised"),
    [(19, 0.05, 0.05), (18, 0.05, 1 / 19), (9, 0.1, 0.1), (3, 0.05, 0.25), (0, 0.05, 1.0)],
)
def test_n_pictures_promise_no_better_than_one_in_n_and_one(count, rate, promised):
    assert fit(np.arange(count), rate).promised_rate == pytest.approx(promised)


@pytest.mark.parametrize(
    ("references", "calibration", "guaranteed"),
    [
        (19, 0, 0.1),  # jackknife+
        (9, 19, 0.05),  # calibration pictures alone are counted: split conformal
        (1, 0, 1.0),
        (3, 3, 2 / 7),  # both are: the safe reading
        (0, 3, 0.25),  # one reference has no score of its own
    ],
)
def test_leave_one_out_guarantees_twice_what_it_promises(references, calibration, guaranteed):
    threshold = fit(np.arange(references), calibration=np.arange(calibration))
    assert threshold.guaranteed_rate == pytest.approx(guaranteed)


def test_p_value_counts_the_good_ones_that_score_at_least_as_high():
    threshold = fit([1, 2, 3, 4])
    assert [threshold.p_value(score) for score in (0, 2.5, 4, 5)] == [1.0, 0.6, 0.4, 0.2]
    assert fit([]).p_value(5) is None


@pytest.mark.parametrize("count", [19, 20, 39, 45, 100])
@pytest.mark.parametrize("rate", [0.05, 0.1])
def test_verdict_and_p_value_say_the_same_where_there_are_enough(count, rate):
    rng = np.random.default_rng(count)
    threshold = fit(rng.normal(size=count), rate)
    for score in np.concatenate((rng.normal(size=300), threshold.scores)):
        flagged = threshold.p_value(score) <= rate + 1e-9
        assert (threshold.verdict(score) == "anomalous") == flagged


def test_a_score_at_a_references_threshold_is_as_common_as_its_p_value_says():
    threshold = fit(np.arange(19.0))
    assert threshold.p_value(threshold.value) == pytest.approx(0.1)
    assert threshold.verdict(threshold.value) == "normal"


def test_with_few_pictures_what_is_unlike_all_of_them_is_undecided_before_it_is_anomalous():
    threshold = fit([0.0, 0.3, -0.2])
    verdicts = [threshold.verdict(score) for score in (-1, 0.3, 0.31, threshold.value + 1e-6, 99)]
    assert verdicts == ["normal", "normal", "undecided", "anomalous", "anomalous"]
    assert threshold.value > 0.31


def test_a_single_reference_decides_by_the_checkpoints_own_prior():
    threshold = fit([])
    assert threshold.verdict(0.0) == "normal"
    assert threshold.verdict(50.0) == "anomalous"


def test_a_single_reference_allows_for_products_unlike_the_few_that_were_measured():
    """Of 5,000 new products, by four that mean and deviation were measured on."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(5000, 5))
    known, new = means[:, :4], means[:, 4] + rng.normal(0, 0.1, 5000)
    limits = [
        NormalScores(one.mean(), one.std(ddof=1), 4, deviation=0.1).limit((), 0.05) for one in known
    ]
    assert np.mean(new > limits) == pytest.approx(0.05, abs=0.01)


def test_good_pictures_alone_never_make_a_threshold_that_calls_all_defective():
    for count in range(40):
        scores = np.random.default_rng(count).normal(size=count)
        threshold = fit(scores)
        flagged = [threshold.verdict(score) == "anomalous" for score in scores]
        assert sum(flagged) <= 0.05 * count


def test_extra_good_pictures_count_alone_where_they_are_enough():
    calibration = np.linspace(0, 1, 19)
    threshold = fit([100.0, 200.0], calibration=calibration)
    assert threshold.scores == tuple(calibration)
    assert fit([100.0], calibration=calibration[:3]).scores == (*calibration[:3], 100.0)


def test_known_defects_lower_the_estimate_but_not_below_the_good_ones():
    scores = [0.0, 0.1, -0.1]
    alone, near = fit(scores), fit(scores, defects=[0.5, 0.7])
    assert near.value == pytest.approx((0.1 + 0.6) / 2)
    assert near.value < alone.value
    assert fit(scores, defects=[-5.0]).value == pytest.approx(0.1)
    many = np.arange(19.0)
    assert fit(many, defects=[0.0]).value == fit(many).value  # a promise that is kept stays


def test_a_quiet_defect_beside_one_reference_leaves_the_threshold_where_good_parts_are():
    assert fit([], defects=[-5.0]).value == PRIOR.mean
    assert PRIOR.mean < fit([], defects=[2.0]).value < fit([]).value


@pytest.mark.parametrize("rate", [0.05, 0.1])
def test_leave_one_out_keeps_its_promise_on_new_good_pictures(rate):
    """Nearest-neighbour scores, as the bank's are: false alarms among 60 new ones, 200 products."""
    rng = np.random.default_rng(0)
    alarms = []
    for _ in range(200):
        references, new = rng.normal(size=(20, 3)), rng.normal(size=(60, 3))
        to = np.linalg.norm(references[:, None] - references[None], axis=-1)
        np.fill_diagonal(to, np.inf)
        threshold = fit(to.min(1), rate)
        scores = np.linalg.norm(new[:, None] - references[None], axis=-1).min(1)
        alarms.append(np.mean([threshold.verdict(score) == "anomalous" for score in scores]))
    assert np.mean(alarms) <= rate + 0.01
    assert np.mean(alarms) >= rate / 3


def test_a_score_far_above_the_others_is_an_outlier():
    assert outliers([1.0, 1.1, 0.9, 5.0], 0.1) == [3]
    assert outliers([1.0, 1.1, 0.9, 1.3], 0.1) == []
    assert outliers([1.0, 9.0], 0.1) == []  # of two nobody knows which is the odd one
