"""A real JupyterLab, started as `make lab` starts it, driven through a real Chromium as a learner would.

Skipped where Chromium is not there, unless MINI_BROWSER=required. Screenshots land in tests/artifacts/browser: of each
chapter as it opens and as the test ends, and with MINI_SCREENSHOTS=1 of all of it.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from playwright.sync_api import Error as PlaywrightError

from tools.start import ROOT, copy_chapters, lab_command, lab_environment

pytestmark = pytest.mark.browser

CHAPTERS = sorted(path.stem for path in (ROOT / "chapters").glob("*.ipynb"))
ARTIFACTS = ROOT / "tests" / "artifacts" / "browser"
LAB_LOG = ARTIFACTS / f"lab-{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}.log"  # two may run side by side
HERE = {"127.0.0.1", "localhost"}
# Chromium's own chatter (updates, sync, look-ups) is not the course's; without it any outside request is ours.
QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-gpu", "--disable-quic"]
QUIET += ["--disable-sync", "--no-first-run"]


def find_chromium() -> str | None:
    names = [os.environ.get("MINI_CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome", "chrome"]
    return next(filter(None, map(shutil.which, filter(None, names))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = find_chromium()
    if chromium is None:
        reason = (
            "no Chromium on PATH; install it (Debian: apt install chromium) or set MINI_CHROMIUM to its path"
        )
        if os.environ.get("MINI_BROWSER") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    with sync_playwright() as playwright:
        args = [*QUIET, *(["--no-sandbox"] if root else [])]
        browser = playwright.chromium.launch(executable_path=chromium, args=args)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def outside() -> Iterator[tuple[str, list[str]]]:
    """A proxy that goes nowhere and remembers who asked: the first line of each request to another machine."""
    listener = socket.create_server(("127.0.0.1", 0))
    asked: list[str] = []

    def listen() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(2)
                asked.append(connection.recv(4096).decode(errors="replace").split("\r\n")[0])

    threading.Thread(target=listen, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked
    listener.close()


@pytest.fixture(scope="module")
def lab(outside: tuple[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running JupyterLab, with its token, on a fresh learner's my/."""
    folder = tmp_path_factory.mktemp("learner")
    copies = copy_chapters(ROOT / "chapters", folder / "my")
    proxy, _ = outside
    environment = lab_environment(dict(os.environ)) | {
        "HOME": str(folder),  # no settings or caches of whoever runs the tests
        "MINI_HOME": os.environ.get("MINI_HOME", str(folder / "mini")),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "HTTP_PROXY": proxy,
        "HTTPS_PROXY": proxy,
        "ALL_PROXY": proxy,
        "NO_PROXY": "127.0.0.1,localhost",
    }
    command = lab_command(copies[0], ["--no-browser", "--port=0"])
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    with LAB_LOG.open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield wait_for_server(server, folder / "runtime")
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture
def page(browser: Browser, chapter: str) -> Iterator[Page]:
    """An empty tab. What it shows at the end, of a failure too, is kept."""
    context = browser.new_context(viewport={"width": 1400, "height": 900}, reduced_motion="reduce")
    page = context.new_page()
    yield page
    page.screenshot(path=ARTIFACTS / f"{chapter}-last.png")
    context.close()


def wait_for_server(server: subprocess.Popen, runtime: Path, seconds: float = 60) -> str:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.poll() is None:
        for path in runtime.glob("jpserver-*.json"):
            facts = json.loads(path.read_text())
            assert facts["token"], "the server runs without a token"
            try:
                socket.create_connection(("127.0.0.1", facts["port"]), timeout=1).close()
            except OSError:
                continue
            return f"http://127.0.0.1:{facts['port']}/lab/workspaces/{{0}}/tree/{{0}}.ipynb?token={facts['token']}"
        time.sleep(0.1)
    pytest.fail(f"JupyterLab did not start within {seconds} s; see {ARTIFACTS / 'lab.log'}")


def run_all(page: Page, seconds: float) -> None:
    """Run > Run All Cells, then wait until every cell has been waited for, [*], and none is any more."""
    waiting = page.locator(".jp-Notebook .jp-CodeCell .jp-InputArea-prompt", has_text="*")
    page.locator(".lm-MenuBar-item", has_text=re.compile("^Run$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Run All Cells$")).click()
    try:
        waiting.last.wait_for(timeout=10_000)
        expect(waiting).to_have_count(0, timeout=1000 * seconds)
        page.get_by_text("| Idle").wait_for(timeout=10_000)
    except (AssertionError, PlaywrightError):
        # pytest shows the error itself, with the counts over time, above this
        pytest.fail(diagnosis(page), pytrace=False)


def diagnosis(page: Page) -> str:
    """Which cells still wait, what the status bar says of the kernel, and the last lines of the server's log."""
    cells = page.locator(".jp-Notebook .jp-CodeCell").filter(
        has=page.locator(".jp-InputArea-prompt", has_text="*")
    )
    first = [cell.locator(".cm-line").first.inner_text() for cell in cells.all()]
    status = page.locator("#jp-main-statusbar").inner_text().split("\n")
    log = LAB_LOG.read_text(errors="replace").splitlines()[-20:]
    lines = [f"{len(first)} cells still wait:", *first, "", "status bar: " + " · ".join(filter(None, status))]
    return "\n".join([*lines, "", "the end of the server's log:", *log])


def scroll_through(page: Page, chapter: str, at_most: int = 40) -> None:
    """Show every screenful, top to bottom, and keep it if MINI_SCREENSHOTS=1."""
    scroller = page.locator(".jp-Notebook .jp-WindowedPanel-outer")
    height = scroller.evaluate("element => element.clientHeight")
    keep = os.environ.get("MINI_SCREENSHOTS") == "1"
    for number in range(at_most):
        scroller.evaluate(f"element => element.scrollTo(0, {number * height})")
        page.wait_for_timeout(250 if keep else 50)
        if keep:
            page.screenshot(path=ARTIFACTS / f"{chapter}-{number:02d}.png")
        if scroller.evaluate(
            "element => element.scrollTop + element.clientHeight >= element.scrollHeight - 2"
        ):
            return


def move(box: Locator, page: Page) -> float:
    """Move the first slider one step to the right (or left, at the end); seconds until what it shows changed."""
    slider, shown = box.locator(".noUi-handle").first, box.locator(".widget-html-content").last
    slider.scroll_into_view_if_needed()
    before = shown.inner_html()
    value, largest = (float(slider.get_attribute(name)) for name in ("aria-valuenow", "aria-valuemax"))
    for _ in range(10):  # a notebook that still lays out what was scrolled to can take the focus away again
        slider.focus()
        started = time.monotonic()
        page.keyboard.press("ArrowLeft" if value >= largest else "ArrowRight")
        if float(slider.get_attribute("aria-valuenow")) != value:
            break
        page.wait_for_timeout(500)
    else:
        pytest.fail("the slider does not move")
    while shown.inner_html() == before:
        assert time.monotonic() - started < 10, "the slider moved and nothing changed"
        page.wait_for_timeout(10)
    return time.monotonic() - started


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_runs_in_the_browser(chapter, page, lab, outside):
    errors: list[str] = []
    requests: list[str] = []
    cut: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.on("websocket", lambda socket: requests.append(socket.url))
    page.on("websocket", lambda socket: socket.on("close", lambda socket: cut.append(socket.url)))

    page.goto(lab.format(chapter))
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=60_000)
    page.get_by_text("| Idle").wait_for(timeout=60_000)  # the kernel, in the status bar
    page.screenshot(path=ARTIFACTS / f"{chapter}-opened.png")
    run_all(page, seconds=300)
    scroll_through(page, chapter)

    notebook = page.locator(".jp-Notebook")
    # Lab 4.6 gives an error the type of standard error, where progress bars and warnings may write, too
    failed = notebook.locator(".jp-OutputArea-output", has_text="Traceback (most recent call last)")
    assert failed.count() == 0, failed.first.inner_text()
    numbers = notebook.locator(".jp-CodeCell .jp-InputArea-prompt").all_text_contents()
    assert all(re.search(r"\d", number) for number in numbers), f"not all cells were run: {numbers}"
    boxes = notebook.locator(".mini-explore").filter(has=page.locator(".noUi-handle")).all()
    assert boxes, "the chapter has no slider to move"
    for box in boxes:
        seconds = move(box, page)
        print(f"{chapter}: the picture changed {1000 * seconds:.0f} ms after the slider moved")

    menus = page.locator(".lm-MenuBar-item").all_inner_texts()
    assert "nbgrader" not in " ".join(menus).lower()
    assert page.locator("[title*=nbgrader i], [title*=assignment i], [title*=jupytext i]").count() == 0
    assert page.locator(".jp-toast-button, .Toastify__toast").count() == 0, "a pop-up greets the learner"

    strangers = [url for url in requests if urlsplit(url).scheme not in ("data", "blob")]
    strangers = [url for url in strangers if urlsplit(url).hostname not in HERE]
    assert strangers == [], "the page asked another machine"
    assert outside[1] == [], "the server or a kernel asked another machine"
    assert [url for url in cut if "/api/kernels/" in url] == [], "the link to a kernel was cut"
    assert errors == [], "errors in the browser's console"
