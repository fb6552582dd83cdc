"""The chat page of the server, in a real browser."""

import time

import httpx
import pytest

from parse import Engine
from parse.verifiers import Likelihood
from tests.http_server import PROMPT, Running


def sources_of(result):
    return [one.source if one.accepted else "cut" for one in result.segments]


@pytest.fixture
def running(target, draft, tokenizer):
    """At a threshold that keeps some of the draft, and not all."""
    engine = Engine(target, tokenizer, draft, tokenizer, Likelihood("mean", "segment"), segments=4, compile=False)
    confidences = [one.confidence for one in engine.generate(PROMPT, 40, threshold=0.0)[0].segments]
    mixed = lambda at: {*sources_of(engine.generate(PROMPT, 40, threshold=at)[0])} == {"draft", "cut", "target"}
    engine.verifier.threshold = next(filter(mixed, sorted(confidences)))
    one = Running(engine)
    yield one
    assert one.idle()
    one.close()


@pytest.fixture
def view(browser, running, request):
    width, scheme = getattr(request, "param", (1200, "light"))
    one = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    one.seen, one.wide = [], width
    one.on("console", lambda message: one.seen.append(message.text))
    one.on("pageerror", lambda error: one.seen.append(str(error)))
    one.on("request", lambda asked: asked.url.startswith(running.url) or one.seen.append(asked.url))
    one.goto(running.url)
    yield one
    assert one.seen == []  # no message, no error, nobody else asked
    one.close()


def ask(view, answers=1):
    """Type the prompt, send it by the keyboard, and wait for the answers."""
    view.locator("#prompt").fill(PROMPT)
    view.locator("#prompt").press("Enter")
    view.wait_for_function("n => !running && document.querySelectorAll('.answer').length === n", arg=answers)


@pytest.mark.parametrize(
    "view", [(1200, "light"), (1200, "dark"), (390, "light"), (390, "dark")], indirect=True, ids=str
)
def test_an_answer_is_shown_with_where_it_is_from(view, running):
    from axe_playwright_python.sync_playwright import Axe

    ask(view)
    expected = running.engine.generate(PROMPT, 40)[0]
    sources = sources_of(expected)
    shown = view.evaluate("[...document.querySelectorAll('.words span')].map(one => [one.textContent, one.className])")
    assert shown == [[one.text, source] for one, source in zip(expected.segments, sources, strict=True)]
    titles = view.evaluate("[...document.querySelectorAll('.words .draft')].map(one => one.title)")
    assert all(title.startswith("confidence 0.") or title == "confidence 1.000" for title in titles)
    share = expected.stats.accepted_tokens / expected.stats.draft_tokens
    assert view.locator("#share").text_content() == f"{round(100 * share)}%"
    assert view.evaluate("document.documentElement.scrollWidth") <= view.wide
    assert [one["id"] for one in Axe().run(view).response["violations"]] == []
    view.locator("#cuts").uncheck()
    assert view.locator(".cut:visible").count() == 0


def test_the_target_alone_stands_beside_it_and_settings_count(view, running):
    view.locator("#compare").check()
    view.locator("#calibrated").uncheck()
    view.locator("#horizon").fill("8")
    view.locator("#threshold").fill("0")
    ask(view, answers=2)
    draft, target = (running.engine.generate(PROMPT, 40, method=method)[0].text for method in ("draft", "target"))
    assert [one.text_content() for one in view.locator(".words").all()] == [draft, target]


def test_an_answer_can_be_stopped_and_the_next_one_comes(view, running):
    runner = running.engine.models["target"].runner
    forward = runner.forward
    runner.forward = lambda *them: time.sleep(0.3) or forward(*them)
    view.locator("#prompt").fill(PROMPT)
    view.locator("#send").click()
    view.locator("#stop").click()
    view.locator(".error").wait_for()
    assert view.locator(".error").text_content() == "stopped"
    assert view.evaluate("turns.length") == 0  # nothing was answered
    runner.forward = forward
    ask(view, answers=2)
    assert view.locator(".answer").last.locator(".words").text_content()


def test_what_was_written_before_a_stop_stays_in_the_conversation(view, running):
    runner = running.engine.models["target"].runner
    forward = runner.forward
    runner.forward = lambda *them: time.sleep(0.2) or forward(*them)
    view.locator("#calibrated").uncheck()
    view.locator("#threshold").fill("1")  # the target's own words, one at a time
    view.locator("#prompt").fill(PROMPT)
    view.locator("#send").click()
    view.wait_for_function("() => document.querySelector('.words')?.textContent")
    view.locator("#stop").click()
    view.wait_for_function("() => !running")
    runner.forward = forward
    said = view.evaluate("turns.map(turn => [turn.role, turn.content])")
    assert [role for role, _ in said] == ["user", "assistant"]
    kept = "[...document.querySelector('.words').childNodes].filter(one => one.className !== 'cut')"
    assert said[1][1] == view.evaluate(f"{kept}.map(one => one.textContent).join('')")


def test_a_refusal_is_shown(view, running):
    running.serving.closing = True
    ask(view)
    assert "about to stop" in view.locator(".error").text_content()
    view.locator("#again").click()
    assert view.evaluate("turns.length") == 0
    view.seen.clear()  # the browser itself notes the status


def test_a_browser_asks_for_the_key(target, tokenizer):
    running = Running(Engine(target, tokenizer, compile=False), api_key="secret")
    try:
        refused = httpx.get(running.url)
        assert (refused.status_code, refused.headers["www-authenticate"][:5]) == (401, "Basic")
        assert "<title>PARSE</title>" in httpx.get(running.url, auth=("", "secret")).text
        assert httpx.get(running.url, headers={"Authorization": "Basic ???"}).status_code == 401
    finally:
        running.close()
