"""The report's page in a real browser: filtered, sorted and played, against what the report says in JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

METRIC = "frame consistency"


@pytest.fixture
def page(evaluated: Path, opened: Any) -> Any:
    return opened((evaluated / "report" / "index.html").as_uri())


@pytest.fixture
def edits(evaluated: Path) -> list[dict[str, Any]]:
    """Rows as the JSON has them: one an edit and method."""
    return json.loads((evaluated / "report" / "report.json").read_text())["edits"]


def cards(page: Any) -> list[tuple[str, str]]:
    """Video and edit of each card, in the order in which they are shown."""
    tags = page.locator(".card header .tag:last-child").all_text_contents()
    assert page.locator("#count").text_content() == f"{len(tags)} of 4 edits"
    return [tuple(tag.split(" · ")) for tag in tags]


def by_value(edits: list[dict[str, Any]], of: str, minus: str | None = None) -> list[tuple[str, str]]:
    """Edits from the highest value down."""
    values: dict[tuple[str, str], float] = {}
    for row in edits:
        sign = 1 if row["method"] == of else -1 if row["method"] == minus else 0
        key = row["video"], row["edit"]
        values[key] = values.get(key, 0.0) + sign * row["values"][METRIC]
    assert len(set(values.values())) == 4, "ties would hide an order"
    return sorted(values, key=lambda key: -values[key])


def test_filters_leave_what_they_say(page: Any) -> None:
    every = [("one", "cat"), ("one", "dog"), ("two", "cat"), ("two", "dog")]
    assert cards(page) == every
    page.locator("#category").select_option("style")
    assert cards(page) == [("one", "dog"), ("two", "dog")]
    page.locator("#video").select_option("two")
    assert cards(page) == [("two", "dog")]
    page.locator("#category").select_option("all")
    page.locator("#words").press_sequentially("CAT a")
    assert cards(page) == [("two", "cat")]
    page.locator("#words").fill("nothing of that name")
    assert cards(page) == []
    page.locator("#words").fill("")
    page.locator("#video").select_option("all")
    assert cards(page) == every


def test_edits_are_sorted_by_any_methods_figures_and_by_differences(page: Any, edits: list[dict[str, Any]]) -> None:
    page.locator("#metric").select_option(METRIC)
    for of in ("ours", "third"):
        page.locator("#of").select_option(of)
        assert cards(page) == by_value(edits, of)
    page.locator("#minus").select_option("other")
    assert cards(page) == by_value(edits, "third", "other")
    page.get_by_role("button", name="high first").click()
    assert cards(page) == by_value(edits, "third", "other")[::-1]
    page.locator("#category").select_option("subject")
    assert cards(page) == [key for key in by_value(edits, "third", "other")[::-1] if key[1] == "cat"]
    page.get_by_role("button", name="low first").click()
    page.locator("#metric").select_option("the suite's order")
    assert cards(page) == [("one", "cat"), ("two", "cat")]


def test_every_player_plays_and_stops(page: Any) -> None:
    card = page.locator(".card").first
    card.scroll_into_view_if_needed()
    assert card.locator("video").count() == 4, "the source and three methods"
    state = "[...document.querySelector('.card').querySelectorAll('video')].every(v => v.readyState >= 2 && {})"
    page.wait_for_function(state.format("!v.paused && v.videoWidth === 64"))
    page.get_by_role("button", name="pause").click()
    page.wait_for_function(state.format("v.paused"))
    page.get_by_role("button", name="play").click()
    page.wait_for_function(state.format("!v.paused"))
    card.locator("video").first.click()
    assert card.locator("video").first.evaluate("v => v.paused")


def test_tables_and_texts_are_the_reports(page: Any, edits: list[dict[str, Any]]) -> None:
    cells = page.locator("#paper tbody tr").first.locator("td").all_text_contents()
    ours = [row["values"][METRIC] for row in edits if row["method"] == "ours"]
    assert cells[:2] == ["ours", "4"] and cells[2].startswith(f"{sum(ours) / 4:.3f}")
    assert page.locator(".card h3").all_text_contents()[:2] == ["a cat", 'a "dog" <b>&']
    page.locator("summary").first.click()
    page.wait_for_function("document.querySelector('details img').naturalWidth > 200")
