"""`concentrate demo`: the page in a real browser, and what it answers to others."""

import base64
import json
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from real_runs import LEAVES, Running, concentrate, draw_image, one_line
from serving_exports import write_export

from concentration.serving.web import MOST_BYTES


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    return write_export(tmp_path_factory.mktemp("demo") / "fruit and tools")


@pytest.fixture(scope="module")
def page(export) -> str:
    """The address of a page that is served."""
    directory = export.parent
    running = Running(("demo", f"export='{export}'", "port=0"), directory)
    running.wait_for(lambda: "http" in _read(directory, ".out"))
    yield _read(directory, ".out").partition(": open")[0]
    running.process.terminate()
    finished = running.wait()
    assert finished.code == 0, finished.err
    assert finished.err == "", "nothing is printed but the address"


def _read(directory: Path, suffix: str) -> str:
    return "".join(path.read_text() for path in directory.glob(f".*{suffix}"))


def wait_for_answer(browser) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 30).until(lambda driver: driver.execute_script(
        "return !document.body.classList.contains('busy') && document.querySelector('#took').textContent.includes('ms')"
    ))  # fmt: skip


def text(browser, selector: str) -> str:
    return browser.execute_script("return document.querySelector(arguments[0]).innerText", selector)


def test_an_image_that_is_chosen_is_answered_by_vertical(browser, page, tmp_path):
    (tmp_path / "lemon.png").write_bytes(draw_image("lemon", 1))
    browser.get(page)
    assert "10 classes in 2 verticals" in _wait_for_text(browser, "#about", "classes")
    browser.find_element("id", "file").send_keys(str(tmp_path / "lemon.png"))
    wait_for_answer(browser)
    assert text(browser, "#headline .best") == "Lemon"
    assert text(browser, "#headline .above") == "Fruit › Citrus"
    verticals = [article.get_attribute("data-vertical") for article in browser.find_elements("css selector", "article")]
    assert verticals == ["fruit", "tools"]
    assert "Citrus › Lemon" in text(browser, "article[data-vertical=fruit]")
    assert browser.get_log("browser") == [], "no script, style or picture was refused or missing"


def drop(browser, *files: tuple[str, bytes]) -> None:
    """Files by name and content, or a link where there are none."""
    script = """
        const data = new DataTransfer();
        for (const [name, content] of arguments[0]) {
            data.items.add(new File([Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0))], name));
        }
        if (!arguments[0].length) data.setData('text/uri-list', 'http://127.0.0.1/photo.jpg');
        const event = new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true});
        document.querySelector('#drop').dispatchEvent(event);
    """
    browser.execute_script(script, [(name, base64.b64encode(content).decode()) for name, content in files])


def test_an_image_that_is_dropped_is_answered_and_a_text_is_refused(browser, page):
    browser.get(page)
    drop(browser, ("hammer.png", draw_image("hammer", 2)))
    wait_for_answer(browser)
    assert text(browser, "#headline .best") == "Hammer"
    browser.execute_script("document.querySelector('#took').textContent = ''")
    drop(browser, ("<b>notes</b>.txt", b"no image"))
    wait_for_answer(browser)
    assert "cannot be decoded" in text(browser, "#headline")
    assert browser.find_elements("css selector", "article") == []
    assert "<b>notes</b>.txt" in text(browser, "#took"), "a name is shown as it is"


def test_of_several_images_it_is_said_that_the_first_is_answered(browser, page):
    browser.get(page)
    drop(browser, *((f"{label}.png", draw_image(label, 2)) for label in ("saw", "lemon", "hammer")))
    wait_for_answer(browser)
    assert text(browser, "#headline .best") == "Saw"
    assert text(browser, "#took").startswith("saw.png, the first of 3 · ")


def test_a_link_or_a_folder_that_is_dropped_is_told_as_that(browser, page, tmp_path):
    """Before, the answer to the image before it stayed, or the page asked whether anybody serves it."""
    browser.get(page)
    drop(browser, ("saw.png", draw_image("saw", 2)))
    wait_for_answer(browser)
    drop(browser)
    assert "That was no file" in text(browser, "#headline")
    assert browser.find_elements("css selector", "article") == []
    (tmp_path / "holiday").mkdir()
    place = browser.execute_script(
        "const box = document.querySelector('#drop').getBoundingClientRect(); return {x: box.x + 50, y: box.y + 50}"
    )
    data = {"items": [], "files": [str(tmp_path / "holiday")], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        browser.execute_cdp_cmd("Input.dispatchDragEvent", {"type": kind, **place, "data": data})
    assert "cannot be read: a folder, perhaps" in _wait_for_text(browser, "#headline", "read")
    assert text(browser, "#took") == "holiday"


def test_a_long_name_stays_beside_its_answer(browser, page):
    browser.get(page)
    drop(browser, (f"{'long' * 50}.png", draw_image("saw", 2)))
    wait_for_answer(browser)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def test_keys_and_screen_readers_find_where_an_image_is_chosen(browser, page):
    from selenium.webdriver.common.keys import Keys

    browser.get(page)
    browser.find_element("tag name", "body").send_keys(Keys.TAB)
    focused = browser.switch_to.active_element
    assert (focused.aria_role, focused.accessible_name) == ("button", "Choose an image, drop or paste one")
    lit = "return getComputedStyle(document.querySelector('#drop')).borderColor"
    accent = browser.execute_script("return getComputedStyle(document.documentElement).getPropertyValue('--accent')")
    expected = f"rgb({', '.join(str(int(accent.strip()[place : place + 2], 16)) for place in (1, 3, 5))})"
    _wait_until(browser, lambda: browser.execute_script(lit) == expected)


def _wait_for_text(browser, selector: str, expected: str) -> str:
    _wait_until(browser, lambda: expected in text(browser, selector))
    return text(browser, selector)


def _wait_until(browser, is_so: Callable[[], bool]) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 30).until(lambda _: is_so())


def ask(address: str, content: bytes | None = None, host: str | None = None) -> tuple[int, bytes]:
    request = urllib.request.Request(address, data=content, headers={"Host": host} if host else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_everything_that_the_page_needs_is_its_own(page):
    status, html = ask(page)
    assert status == 200
    for part in (html, ask(f"{page}/page.css")[1], ask(f"{page}/page.js")[1]):
        assert b"http" not in part


@pytest.mark.parametrize("label", LEAVES[:2])
def test_programs_may_ask_too(page, label):
    status, answer = ask(f"{page}/answer", draw_image(label, 3))
    assert status == 200
    assert label.title().encode() in answer


def test_what_is_no_image_or_comes_through_another_site_is_refused(page):
    assert ask(f"{page}/answer", b"no image")[0] == 415
    assert ask(f"{page}/answer", draw_image("saw", 1), host="evil.example")[0] == 400
    assert ask(f"{page}/../../etc/passwd")[0] == 404


def send_part(address: str, num_bytes: int) -> socket.socket:
    """A connection whose client has sent two bytes of an image, and not the rest."""
    host, _, port = address.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(f"POST /answer HTTP/1.1\r\nHost: {host}\r\nContent-Length: {num_bytes}\r\n\r\nab".encode())
    return connection


def test_an_image_that_is_too_large_is_refused_when_it_has_arrived(page):
    """However large: a browser that is not done sending when the answer comes would show none."""
    status, answer = ask(f"{page}/answer", bytes(MOST_BYTES + 2**22))
    assert (status, json.loads(answer)) == (413, {"error": "is larger than 64 MB"})
    assert ask(f"{page}/answer", bytes(MOST_BYTES))[0] == 415


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_quietly_though_clients_have_gone_or_stopped_in_the_middle(number, export):
    directory = export.parent / number.name
    directory.mkdir()
    running = Running(("demo", f"export='{export}'", "port=0"), directory)
    running.wait_for(lambda: "http" in _read(directory, ".out"))
    address = _read(directory, ".out").partition(": open")[0]
    send_part(address, 500).close()
    with send_part(address, 500):
        assert ask(f"{address}/answer", draw_image("saw", 1))[0] == 200
        running.send(number)
        finished = running.wait(timeout_seconds=30)
    assert (finished.code, finished.err) == (0, "")


def test_a_port_that_is_taken_is_one_line(page, export):
    port = page.rpartition(":")[2]
    message = one_line(concentrate("demo", f"export='{export}'", f"port={port}", directory=export.parent, code=2))
    assert f"port={port}: cannot listen there" in message
