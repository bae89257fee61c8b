"""The status page in a real browser, with a cluster behind it: by mouse, by keyboard, light and dark."""

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.head import free_port
from tests.support.browser import ENTER, SPACE, TAB, Browser
from tests.support.local import LocalCluster, local_cluster, settings_for
from tidemill import AsyncClient
from tidemill.core.settings import EmulatedSettings, LatencySettings, Settings, SloSettings, StatusPageSettings
from tidemill.core.telemetry import DecisionRecord

pytestmark = pytest.mark.timeout(180)
STREAMS = 6
DECISIONS = (
    DecisionRecord(1_793_000_000.0, "within_goals", (), (("prefill", 0.42), ("verify", 0.61))),
    DecisionRecord(1_793_000_031.0, "prefill_short", ("verify-1: verify -> prefill",), (("prefill", 1.31),)),
    DecisionRecord(1_793_000_092.0, "<b>not markup</b>", (), ()),
)


@dataclass(frozen=True, slots=True)
class Scene:
    url: str
    cluster: LocalCluster
    loop: asyncio.AbstractEventLoop
    stop: asyncio.Event


def settings() -> Settings:
    """Steps that take their time, and one class that asks for too much."""
    latency = LatencySettings(step_s=0.012, prefill_token_s=0.0002, decode_row_s=0.0015)
    made = settings_for(emulated=EmulatedSettings(target=latency, draft=LatencySettings(step_s=0.002)))
    goals = {
        "default": SloSettings(ttft_s=1.0, tpot_s=0.2),
        "chat": SloSettings(ttft_s=0.6, tpot_s=0.1),
        "hurried": SloSettings(ttft_s=0.3, tpot_s=0.011),
    }
    return made.model_copy(update={"slo": goals, "status_page": StatusPageSettings(port=free_port())})


async def serve(ready: "Future[Scene]") -> None:
    """A cluster under load until told to stop."""
    stop = asyncio.Event()

    async def load(client: AsyncClient, number: int, prompts: list[str]) -> None:
        turn = number
        while not stop.is_set():
            prompt = (prompts[turn % len(prompts)] * 4)[-1200:]
            await client.generate(prompt, max_tokens=8 + 8 * (turn % 5), slo=("default", "chat", "hurried")[turn % 3])
            turn += 5

    lines = (Path(__file__).parents[2] / "models" / "prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    async with local_cluster(settings()) as cluster, AsyncClient(cluster.address) as client:
        cluster.router.set_decisions(DECISIONS)
        async with asyncio.TaskGroup() as group:
            for number in range(STREAMS):
                group.create_task(load(client, number, prompts))
            ready.set_result(Scene(cluster.router.page_address, cluster, asyncio.get_running_loop(), stop))


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    ready: Future[Scene] = Future()
    thread = threading.Thread(target=lambda: asyncio.run(serve(ready)))
    thread.start()
    found = ready.result(60)
    yield found
    found.loop.call_soon_threadsafe(found.stop.set)
    thread.join(60)


@pytest.fixture
def browser(scene: Scene, tmp_path: Path) -> Iterator[Browser]:
    with Browser(tmp_path) as opened:
        opened.prefer("light")
        opened.open(scene.url)
        opened.wait_until(lambda: opened.text("#state") == "live", "the first picture")
        opened.wait_until(lambda: opened.ask("document.querySelectorAll('.class').length") == 3, "three classes")
        yield opened


def test_it_shows_the_cluster_and_asks_nobody_else(scene: Scene, browser: Browser) -> None:
    assert browser.text("#front") == f"tiny at {scene.cluster.address}"
    workers = browser.ask("[...document.querySelectorAll('.who')].map(each => each.textContent)")
    assert workers == ["prefill-0", "draft-0", "verify-0", "verify-1"]
    browser.wait_until(lambda: browser.text("#tokens") not in ("0", "-"), "tokens to flow")
    assert "chat" in browser.text("#classes")
    assert "<b>not markup</b>" in browser.text("#decisions"), "text is shown as text"
    assert not [entry for entry in browser.log("browser") if entry["level"] == "SEVERE"]
    events = [json.loads(entry["message"])["message"] for entry in browser.log("performance")]
    requests = [each["params"] for each in events if each["method"] == "Network.requestWillBeSent"]
    asked = {each["request"]["url"] for each in requests if each["documentURL"] == scene.url}
    assert {url for url in asked if not url.startswith("data:")} == {scene.url, f"{scene.url}status.json"}


def test_by_mouse(browser: Browser) -> None:
    browser.click("details summary")
    assert "Last step" in browser.text("details")
    before = browser.ask("shown.at")
    browser.wait_until(lambda: browser.ask("shown.at") > before, "another picture")
    assert browser.ask("document.querySelector('details').open"), "it stays open when the picture changes"
    browser.click("label.toggle")
    assert browser.ask("document.querySelectorAll('#decisions li').length") == 1
    browser.click("#pause")
    assert browser.text("#state") == "paused"
    browser.click("#pause")
    assert browser.text("#state") == "live"


def test_by_keyboard(browser: Browser) -> None:
    def focus() -> str:
        return str(browser.ask("(e => e.id || e.className || e.tagName)(document.activeElement)"))

    browser.press(TAB)
    assert focus() == "skip"
    browser.press(TAB)
    assert focus() == "pause"
    browser.press(ENTER)
    assert browser.text("#state") == "paused"
    browser.press("p")
    assert browser.text("#state") == "live"
    browser.press(TAB, TAB)
    assert focus() == "SUMMARY"
    browser.press(ENTER)
    assert browser.ask("document.activeElement.parentElement.open")
    before = browser.ask("shown.at")
    browser.wait_until(lambda: browser.ask("shown.at") > before, "another picture")
    assert focus() == "SUMMARY", "the focus stays where it was when the picture changes"
    browser.press("d")
    assert browser.ask("document.querySelectorAll('details[open]').length") == 4
    browser.press("d")
    assert browser.ask("document.querySelectorAll('details[open]').length") == 0
    browser.press(TAB, TAB, TAB, TAB)
    assert focus() == "only"
    browser.press(SPACE)
    assert browser.ask("document.querySelectorAll('#decisions li').length") == 1
    browser.press("c")
    assert browser.ask("document.querySelectorAll('#decisions li').length") == len(DECISIONS)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 420])
def test_light_and_dark_wide_and_narrow(browser: Browser, tmp_path: Path, scheme: str, width: int) -> None:
    browser.prefer(scheme, width)
    assert browser.ask("document.documentElement.scrollWidth") <= width, "nothing leaves the window"
    red, green, blue = browser.ask("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (red + green + blue > 384) is (scheme == "light")
    for selector in ("body", ".hint", ".sub", ".loads", "summary .tag", ".class .share", "h3"):
        assert browser.ask(CONTRAST % json.dumps(selector)) >= 4.5, selector
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000


# WCAG 2: contrast of an element's text with what is behind it.
CONTRAST = """(selector => {
  const numbers = color => color.match(/[\\d.]+/g).map(Number);
  const light = color => { const [r, g, b] = numbers(color).slice(0, 3).map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  let node = document.querySelector(selector), behind = node;
  while (numbers(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
  const pair = [light(getComputedStyle(node).color), light(getComputedStyle(behind).backgroundColor)];
  const [low, high] = pair.sort((a, b) => a - b);
  return (high + .05) / (low + .05);
})(%s)"""


def test_it_says_when_the_router_is_gone_and_comes_back(scene: Scene, browser: Browser) -> None:
    page = scene.cluster.router._page
    assert page is not None

    def on_loop(coroutine: object) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, scene.loop).result(20)  # type: ignore[arg-type]

    on_loop(page.stop())
    browser.wait_until(lambda: browser.text("#state") == "the router does not answer", "the loss to be seen")
    assert browser.text("#front").startswith("tiny"), "the last picture stays"
    on_loop(scene.cluster.router._serve_page(None))
    browser.wait_until(lambda: browser.text("#state") == "live", "the page to go on")
