import warnings

import numpy as np
import pytest

from looktwice_adapters.bootstrap import PixelCurves, draw, intervals, mean_draws
from looktwice_adapters.metrics import pixel_metrics

LABELS = np.array([False, False, True, True, True])


def test_every_draw_has_as_many_of_each_class():
    seen = draw(LABELS, lambda chosen: {"anomalous": float(LABELS[chosen].sum())}, 50)
    assert set(seen["anomalous"]) == {3.0}


def test_an_interval_holds_the_middle_of_the_draws():
    low, high = intervals({"x": np.arange(1001.0)})["x"]
    assert (low, high) == pytest.approx((25, 975))


def test_a_figure_that_no_draw_has_gets_no_interval():
    assert intervals(draw(LABELS, lambda _: {"x": None}, 5)) == {}
    assert intervals(draw(LABELS, lambda _: {"x": 1.0}, 0)) == {}


def test_the_mean_is_drawn_over_the_products_that_have_the_figure():
    mean = mean_draws([{"x": np.array([0.0, 1.0])}, {"x": np.array([1.0, 1.0])}, {}])
    assert mean["x"].tolist() == [0.5, 1.0]


def test_a_mean_has_no_interval_where_a_draw_of_one_product_has_no_figure():
    mean = mean_draws([{"x": np.array([0.0, 1.0])}, {"x": np.array([np.nan, 1.0])}])
    assert intervals(mean) == {}


@pytest.mark.parametrize("drawn", [0, 1])
def test_curves_of_one_class_have_no_figure_and_warn_of_nothing(drawn):
    masks = [np.ones((4, 4), bool), np.zeros((4, 4), bool)]
    curves = PixelCurves.of(masks, [np.ones((4, 4), np.float32)] * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(list(curves.figures(np.array([drawn, drawn])).values())).all()


def test_the_same_seed_draws_the_same():
    def first(seed):
        return draw(LABELS, lambda chosen: {"x": float(chosen[0])}, 20, seed)["x"].tolist()

    assert first(1) == first(1) != first(2)


def test_curves_of_all_pictures_give_the_exact_pixel_figures():
    rng = np.random.default_rng(0)
    masks = [np.zeros((40, 50), bool) for _ in range(8)]
    for mask in masks[:5]:
        y, x = rng.integers(0, 30, 2)
        mask[y : y + 8, x : x + 6] = True
    maps = [(rng.random((40, 50)) + 0.4 * mask).astype(np.float32) for mask in masks]
    exact = pixel_metrics(masks, maps)
    assert PixelCurves.of(masks, maps).figures(np.arange(8)) == pytest.approx(exact, abs=0.005)


def test_a_picture_drawn_twice_counts_twice():
    masks = [np.eye(10, dtype=bool), np.eye(10, dtype=bool), np.zeros((10, 10), bool)]
    rng = np.random.default_rng(1)
    maps = [(rng.random((10, 10)) + bias).astype(np.float32) for bias in (0.8, 0, 0)]
    curves = PixelCurves.of(masks, maps)
    twice = curves.figures(np.array([0, 0, 2]))
    exact = pixel_metrics([masks[0], masks[0], masks[2]], [maps[0], maps[0], maps[2]])
    assert twice == pytest.approx(exact, abs=0.02)


def test_tiles_of_one_file_are_drawn_together():
    files = ["a", "b", "c", "c", "d"]
    seen = []
    draw(LABELS, lambda chosen: seen.append(chosen.tolist()) or {}, 50, files=files)
    assert all(drawn.count(2) == drawn.count(3) for drawn in seen)
    assert {drawn.count(2) + drawn.count(4) for drawn in seen} == {2}
    alone, named = (
        draw(LABELS, lambda chosen: {"x": float(chosen.sum())}, 20, files=names)["x"].tolist()
        for names in (None, list("abcde"))
    )
    assert alone == named
