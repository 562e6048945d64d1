"""`concentrate demo`: the page in a real browser, and what it answers to others."""

import base64
import json
import signal
import socket
import urllib.error
import urllib.request
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


def test_an_image_that_is_dropped_is_answered_and_a_text_is_refused(browser, page):
    browser.get(page)
    drop = """
        const bytes = Uint8Array.from(atob(arguments[0]), (letter) => letter.charCodeAt(0));
        const data = new DataTransfer();
        data.items.add(new File([bytes], arguments[1]));
        const event = new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true});
        document.querySelector('#drop').dispatchEvent(event);
    """
    browser.execute_script(drop, base64.b64encode(draw_image("hammer", 2)).decode(), "hammer.png")
    wait_for_answer(browser)
    assert text(browser, "#headline .best") == "Hammer"
    browser.execute_script("document.querySelector('#took').textContent = ''")
    browser.execute_script(drop, base64.b64encode(b"no image").decode(), "<b>notes</b>.txt")
    wait_for_answer(browser)
    assert "cannot be decoded" in text(browser, "#headline")
    assert browser.find_elements("css selector", "article") == []
    assert "<b>notes</b>.txt" in text(browser, "#took"), "a name is shown as it is"


def _wait_for_text(browser, selector: str, expected: str) -> str:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 30).until(lambda _: expected in text(browser, selector))
    return text(browser, selector)


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
