"""What a suite's tables are made of: edits that compare, means and intervals, agreement; and what waits its turn."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tav_opt.config import InputError
from tav_opt.suite import results, scheduling
from tav_opt.suite.intervals import bootstrap_interval, fleiss_kappa
from tav_opt.suite.results import as_markdown, cells
from tav_opt.suite.rows import Row
from tav_opt.suite.waiting import Waiting


def row(method: str, edit: str, **values: float) -> Row:
    texts = {"category": "style", "caption": "a dog", "prompt": "a cat", "video": f"v-{edit}"}
    places = {"file": Path("edit.mp4"), "source": Path("source.mp4")}
    values = {name.replace("_", " "): value for name, value in values.items()}
    return Row(method=method, edit=edit, values=values, left_out={}, networks={}, **texts, **places)


def test_methods_compare_on_the_edits_for_which_all_have_a_value() -> None:
    """Motion fidelity is left out of one edit by one method: the other's mean must not count that edit either."""
    found = [
        row("ours", "a", frame_consistency=0.9, motion_fidelity=0.5),
        row("ours", "b", frame_consistency=0.9, motion_fidelity=0.1),
        row("other", "a", frame_consistency=0.8, motion_fidelity=0.4),
        row("other", "b", frame_consistency=0.8),
        row("still", "a", frame_consistency=0.7),
        row("still", "b", frame_consistency=0.7),
    ]
    table = cells(found)
    assert table["ours"]["motion fidelity"].mean == 0.5 and table["ours"]["motion fidelity"].edits == 1
    assert table["other"]["motion fidelity"].mean == 0.4 and "motion fidelity" not in table["still"]
    assert table["ours"]["frame consistency"].edits == 2
    told = as_markdown("x", table, ["frame consistency", "motion fidelity"])
    assert "| ours | 2 | **0.900** (0.900 … 0.900) | **0.500**, of 1 |" in told


def test_two_encoders_in_one_table_are_refused() -> None:
    found = [row("ours", "a", x=1.0), row("ours", "b", x=1.0)]
    found = [replace(each, networks={"encoder": name}) for each, name in zip(found, ("CLIP", "demo"), strict=True)]
    with pytest.raises(InputError, match="ours v-b b: encoder demo, other edits CLIP"):
        results.check_networks(found)


# Units in their turn.


def test_what_waits_is_taken_by_the_model_in_hand_and_given_up_with_what_it_needs() -> None:
    def unit(name: str, *needs: str, model: str = "") -> Any:
        return SimpleNamespace(id=name, needs=needs, model=model)

    first, second = unit("s1"), unit("s2")
    tuned = [unit("t1", "s1", model="video"), unit("t2", "s2", model="video")]
    inverted, edit = unit("i1", "s1", model="image"), unit("e1", "s1", "t1", model="video")
    measured = unit("m1", "s1", "e1")
    plan = [unit("s0"), first, tuned[0], inverted, edit, measured, second, tuned[1]]
    waiting = Waiting(plan, {"s0"}, lambda one: one.model)
    assert [waiting.take([]), waiting.take([]), waiting.take([])] == [first, second, None]
    waiting.end(second)
    waiting.end(first)
    assert waiting.take(["image"]) is inverted and waiting.take(["image"]) is tuned[0], "the first, where none is liked"
    assert waiting.give_up(tuned[0]) == [edit, measured] and waiting
    assert waiting.take(["video"]) is tuned[1] and not waiting


def test_time_left_counts_what_can_still_be_done() -> None:
    progress = scheduling.Progress(10, 2, Counter({"tune": 3, "edit": 4}), {"tune": [10.0, 20.0]})
    assert progress.seconds_left() is None, "no edit was ever timed"
    progress.seconds["edit"] = [2.0]
    assert progress.seconds_left() == (3 * 15 + 4 * 2) / 2


# Statistics.


def test_the_bootstrap_agrees_with_the_normal_approximation() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    low, high = bootstrap_interval([[value] for value in values])
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.03) and high == pytest.approx(
        values.mean() + half, abs=0.03
    )
    copies = bootstrap_interval([[value] * 4 for value in values])
    assert copies == pytest.approx((low, high), abs=0.03), "a video's four equal edits are one piece of evidence"


def test_kappa_is_that_of_fleiss_worked_example() -> None:
    """Ten items, fourteen raters, five answers (Fleiss 1971's table as textbooks have it): 0.210."""
    table = [
        [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
    ]  # fmt: skip
    assert fleiss_kappa(table) == pytest.approx(0.210, abs=5e-4)
    assert fleiss_kappa([[5, 0], [0, 5]]) == 1 and fleiss_kappa([[5, 0], [5, 0]]) is None
