"""The study of raters: made of a real evaluation, answered in a real browser, counted by hand."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest

from tav_opt import cli, video
from tav_opt.suite import study as studies
from tav_opt.suite.rater_answers import Answers
from tav_opt.suite.tally import tally

QUESTIONS = list(studies.QUESTIONS)
VOTES = {
    "frame consistency": ["ooooo", "oooxx", "xxooo", "xxxxx"],
    "textual alignment": ["ooxxx", "oooox", "xxxxo", "xxxxx"],
}
"""For each of four pairs what five raters choose: o ours, x the other."""


@pytest.fixture
def run(evaluated: Path) -> Path:
    """Two videos of two edits each, by `ours`, `other` and `third`."""
    return evaluated


def made(run: Path, out: Path, *more: str, against: tuple[str, ...] = ("other",)) -> studies.Study:
    assert cli.main(["study", str(run), "--against", *against, "--out", str(out), *more]) == 0
    return studies.read(out)


def answered(study: studies.Study, rater: int, /, **more: Any) -> dict[str, Any]:
    """What the page would write for a rater of VOTES, who sees ours on the left."""
    answers = []
    for number, item in enumerate(study.items):
        ours = "a" if item.a == study.method else "b"
        for question in QUESTIONS:
            chosen = ours if VOTES[question][number][rater] == "o" else "ab".replace(ours, "")
            answers.append({"item": item.item, "question": question, "chosen": chosen, "left": ours})
    at = f"2024-01-01T00:0{rater}:00.000Z"
    return {"study": study.study, "rater": f"r{rater}", "token": f"{rater}f", "at": at, "answers": answers} | more


def saved(folder: Path, *files: dict[str, Any]) -> None:
    for number, content in enumerate(files):
        (folder / "answers" / f"{number}.json").write_text(json.dumps(content))


# What is made.


def test_a_study_is_the_same_again_and_says_nothing_of_methods(run: Path, tmp_path: Path) -> None:
    study = made(run, tmp_path / "study")
    page = (tmp_path / "study" / "page" / "index.html").read_text()
    assert len(study.items) == 4 and {item.other("ours") for item in study.items} == {"other"}
    assert not re.search(r"\bours\b|\bother\b|\bthird\b", page.split('id="data">')[1].split("</script>")[0])
    assert page.count("data:video/mp4;base64,") == 8
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//|@import|url\(["']?http""", page), "no network"
    assert made(run, tmp_path / "again").items == study.items
    other = made(run, tmp_path / "seed", "--seed", "1")
    assert other.study != study.study and [i.item for i in other.items] != [i.item for i in study.items]
    both = made(run, tmp_path / "both", against=("other", "third"))
    assert len(both.items) == 8 and sorted(item.other("ours") for item in both.items) == ["other"] * 4 + ["third"] * 4


def test_results_may_be_moved(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "moved")
    report = json.loads((tmp_path / "moved" / "report" / "report.json").read_text())
    assert all(edit["file"].startswith("units/edit/") for edit in report["edits"])
    assert made(tmp_path / "moved", tmp_path / "study").items == made(run, tmp_path / "again").items


def test_the_videos_are_the_edits_without_what_they_say_of_methods(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tav_opt.suite.media.EMBEDDED_BYTES", 0)
    study = made(run, tmp_path / "study")
    edits = json.loads((run / "report" / "report.json").read_text())["edits"]
    files = {(edit["method"], edit["video"], edit["edit"]): run / edit["file"] for edit in edits}
    videos = tmp_path / "study" / "page" / "videos"
    for item in study.items:
        for side in ("a", "b"):
            shown, edit = videos / f"{item.item}{side}.mp4", files[getattr(item, side), item.video, item.edit]
            assert (video.read(shown).frames == video.read(edit).frames).all()
            method = getattr(item, side).encode()
            assert b'"method"' in edit.read_bytes() and method not in shown.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--against", "nobody"], "no edit by 'nobody' is there: the evaluation has ours, other, third"),
        (["--against", "other", "--method", "me"], "no edit by 'me' is there"),
        (["--against", "ours"], "'ours' would be compared with itself"),
        (["--against", "other", "other"], "each method once"),
        (["--against"], "give one method or more"),
        (["--against", "other", "--raters", "4"], "raters 4: give an odd number"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    try:
        status = cli.main(["study", str(run), "--out", str(tmp_path / "study"), *arguments])
    except SystemExit as end:  # of tyro
        status = int(end.code or 0)
    error = capsys.readouterr().err
    assert status == 2 and words in error and error.count("\n") == 1, error
    assert not (tmp_path / "study").exists()


def test_another_study_is_not_overwritten(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = made(run, tmp_path / "study")
    saved(tmp_path / "study", answered(study, 0))
    made(run, tmp_path / "study")
    assert len(list((tmp_path / "study" / "answers").iterdir())) == 1, "answers stay"
    assert cli.main(["study", str(run), "--against", "third", "--out", str(tmp_path / "study")]) == 2
    assert "holds another study" in capsys.readouterr().err
    assert cli.main(["study", str(tmp_path), "--against", "third", "--out", str(tmp_path / "new")]) == 2
    assert "report.json does not exist" in capsys.readouterr().err


# What is counted.


def test_the_tally_is_that_by_hand(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = made(run, tmp_path / "study")
    saved(tmp_path / "study", *(answered(study, rater) for rater in range(5)))
    capsys.readouterr()
    assert cli.main(["study", "tally", str(tmp_path / "study")]) == 0
    table = capsys.readouterr().out
    found = json.loads((tmp_path / "study" / "tally.json").read_text())
    frames, text = found["preferences"]
    assert (frames["question"], frames["items"], frames["preferred"], frames["votes"]) == (
        QUESTIONS[0],
        4,
        3 / 4,
        11 / 20,
    )
    assert (text["preferred"], text["votes"]) == (1 / 4, 7 / 20)
    # Fleiss: pairs of raters that agree, 10 of 10, 4, 4 and 10; by chance (11/20)² + (9/20)² = 0.505.
    assert frames["kappa"] == pytest.approx(((1 + 0.4 + 0.4 + 1) / 4 - 0.505) / (1 - 0.505))
    assert frames["low"] <= 3 / 4 <= frames["high"] and found["raters"] == 5 and found["unfinished"] == 0
    assert found["left"] == pytest.approx((11 + 7) / 40), "ours was always on the left"
    assert "| other | frame consistency | 4 | 75.0% | " in table and "0.39" in table


def test_too_few_and_too_many_answers_are_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = made(run, tmp_path / "study")
    few = [answered(study, rater) for rater in range(4)]
    saved(tmp_path / "study", *few)
    assert cli.main(["study", "tally", str(tmp_path / "study")]) == 2
    assert "no item has the 5 answers that it takes: 4 raters have answered" in capsys.readouterr().err
    partly = answered(study, 4)
    partly["answers"] = partly["answers"][:2]
    late = answered(study, 0, rater="late", at="2025-01-01T00:00:00Z")
    found = tally(study, [Answers.model_validate(each) for each in (*few, partly, late)])
    assert found.unneeded == 2 and found.unfinished == 0 and found.preferences[0].items == 4
    found = tally(study, [Answers.model_validate(each) for each in (*few, partly)])
    assert found.unfinished == 3 and found.preferences[0].items == 1 and found.preferences[0].low is None
    assert found.preferences[0].kappa is None, "all five chose ours"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"study": "0" * 16}, "answers to study 0000000000000000, this one is"),
        ({"rater": ""}, "rater ''"),
        ({"at": "yesterday"}, "at 'yesterday' is no time"),
        ({"token": None}, "token 'None'"),
        ({"answers": [{"item": "ff", "question": QUESTIONS[0], "chosen": "a", "left": "a"}]}, "item 'ff' is not of"),
        ({"answers": [{"item": "ff", "question": "beauty", "chosen": "a", "left": "a"}]}, "question 'beauty'"),
        ({"more": 1}, "more '1'"),
    ],
)
def test_answers_that_make_no_sense_are_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], words: str
) -> None:
    study = made(run, tmp_path / "study")
    saved(tmp_path / "study", answered(study, 0, **change))
    capsys.readouterr()
    assert cli.main(["study", "tally", str(tmp_path / "study")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1, error


def test_a_rater_counts_once(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = made(run, tmp_path / "study")
    saved(tmp_path / "study", answered(study, 0), answered(study, 1, rater="r0"))
    assert cli.main(["study", "tally", str(tmp_path / "study")]) == 2
    assert "are both of rater 'r0': keep one" in capsys.readouterr().err
    twice = answered(study, 0)
    twice["answers"] += twice["answers"][:1]
    (tmp_path / "study" / "answers" / "1.json").unlink()
    saved(tmp_path / "study", twice)
    assert cli.main(["study", "tally", str(tmp_path / "study")]) == 2
    assert "answered twice" in capsys.readouterr().err


# In a browser.


def click_through(page: Any, study: studies.Study, rater: int) -> list[tuple[str, str]]:
    """Answers a whole study as VOTES says; returns each item with the side that was on the left."""
    page.get_by_label("Your name or initials").fill(f"r{rater}")
    page.get_by_role("button", name="Begin").click()
    seen = []
    for number in range(len(study.items)):
        assert page.locator("#number").text_content() == f"{number + 1} of {len(study.items)}"
        page.wait_for_function("[...document.querySelectorAll('video')].every(v => v.readyState >= 2 && !v.paused)")
        item = at(page, study)
        place = study.items.index(item)
        assert page.locator("#prompt").text_content() == item.prompt
        left = page.locator("video").first.get_attribute("data-side")
        seen.append((item.item, left))
        assert page.locator("#next").is_disabled(), "both questions are to be answered"
        for question, text in studies.QUESTIONS.items():
            wanted = study.method if VOTES[question][place][rater] == "o" else "other"
            word = "left" if getattr(item, left) == wanted else "right"
            page.get_by_role("group", name=text).get_by_label(f"the {word} one").check()
        page.locator("#next").click()
    return seen


def at(page: Any, study: studies.Study) -> studies.Item:
    """The pair that is shown; the page keeps its name where a rater does not see it."""
    name = page.evaluate("order[at].item")
    return next(item for item in study.items if item.item == name)


def test_five_raters_click_through_a_study_and_send_files(
    run: Path, tmp_path: Path, opened: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    study = made(run, tmp_path / "study")
    page_file = (tmp_path / "study" / "page" / "index.html").as_uri()
    orders, sides = set(), []
    for rater in range(5):
        page = opened(page_file)
        seen = click_through(page, study, rater)
        orders.add(tuple(item for item, _ in seen))
        sides.append(sorted(side for _, side in seen))
        with page.expect_download() as download:
            page.get_by_role("button", name="Save the answers as a file").click()
        assert download.value.suggested_filename == f"answers-r{rater}.json"
        download.value.save_as(tmp_path / "study" / "answers" / f"answers-r{rater}.json")
    assert len(orders) > 1, "every rater has an order of their own"
    assert sides == [["a", "a", "b", "b"]] * 5, "each video is as often on the left"
    assert cli.main(["study", "tally", str(tmp_path / "study")]) == 0
    frames, text = json.loads((tmp_path / "study" / "tally.json").read_text())["preferences"]
    assert (frames["preferred"], frames["votes"], text["preferred"], text["votes"]) == (3 / 4, 11 / 20, 1 / 4, 7 / 20)


def test_a_rater_may_go_back_and_come_back(run: Path, tmp_path: Path, opened: Any) -> None:
    made(run, tmp_path / "study")
    page = opened((tmp_path / "study" / "page" / "index.html").as_uri())
    begin = lambda: (page.locator("#rater").fill("me"), page.get_by_role("button", name="Begin").click())  # noqa: E731
    begin()
    first = page.evaluate("order.map(item => item.item)")
    for text in studies.QUESTIONS.values():
        page.get_by_role("group", name=text).get_by_label("the left one").check()
    page.locator("#next").click()
    page.reload()
    begin()
    assert page.locator("#number").text_content() == "2 of 4" and page.evaluate("order.map(item => item.item)") == first
    page.locator("#back").click()
    assert page.locator("#number").text_content() == "1 of 4" and page.locator(":checked").count() == 2


@pytest.fixture
def served(run: Path, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """`tav-opt study serve` as it is run: the study's folder and the server's address."""
    folder = tmp_path / "study"
    made(run, folder)
    code = "import sys; from tav_opt.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "study", "serve", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert line.startswith("study of 4 pairs: http://127.0.0.1:"), process.stderr.read()
        yield folder, line.split(": ")[1].strip()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (143, -signal.SIGTERM) and "Traceback" not in process.stderr.read()


def test_answers_are_sent_to_the_server(served: tuple[Path, str], opened: Any) -> None:
    folder, url = served
    study = studies.read(folder)
    page = opened(url)
    click_through(page, study, 0)
    page.get_by_text("Your answers have arrived").wait_for()
    (file,) = (folder / "answers").iterdir()
    sent = Answers.model_validate(json.loads(file.read_text()))
    assert sent.rater == "r0" and len(sent.answers) == 8
    page.get_by_role("button", name="Look at the answers again").click()
    for _ in study.items:
        page.locator("#next").click()
    page.get_by_text("Your answers have arrived").wait_for()
    other = opened(url)
    click_through(other, study, 0)
    other.get_by_text("r0 has answered already: if that was not you, take another name").wait_for()
    assert [file] == list((folder / "answers").iterdir())
    assert Answers.model_validate(json.loads(file.read_text())).token == sent.token


def test_the_server_gives_no_key_and_takes_no_nonsense(served: tuple[Path, str]) -> None:
    folder, url = served
    study = studies.read(folder)

    def status(path: str, body: bytes | None = None, kind: str = "application/json") -> tuple[int, str]:
        request = urllib.request.Request(url + path, data=body, headers={"content-type": kind})
        try:
            with urllib.request.urlopen(request) as got:
                return got.status, got.read().decode()
        except HTTPError as error:
            return error.code, error.read().decode()

    assert status("")[0] == 200
    for path in ("study.json", "../study.json", "%2e%2e/study.json", "answers/0.json"):
        assert status(path)[0] == 404
    good = json.dumps(answered(study, 0)).encode()
    assert status("answers", good, "text/plain")[0] == 415
    assert status("answers", b"{")[0] == status("answers", b"[" * 100_000)[0] == 400
    assert status("answers", b"[]")[0] == 400
    assert status("answers", json.dumps(answered(study, 0, study="ab")).encode())[0] == 400
    assert status("answers", b" " * (5 << 20))[0] == 413
    assert not list((folder / "answers").iterdir())
    assert status("answers", good) == (200, "taken") and status("answers", good)[0] == 200
    assert status("answers", json.dumps(answered(study, 1, rater="r0")).encode())[0] == 409
