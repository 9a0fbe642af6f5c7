"""The page in headless Chromium: nothing of a run is executed, keys work, a phone can show it, it opens at once.

Skipped without chromium, its driver and selenium (`apt-get install chromium chromium-driver; pip install selenium`).
"""

import shutil
import time

import pytest
from run_samples import make_run

from advgame.report.command import write_report

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")


@pytest.fixture(scope="module")
def chromium():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    run, other = make_run(root), make_run(root, "other <i>", steps=8, noise=2)
    return {
        "one": write_report([run], root / "one.html", quiet=True),
        "two": write_report([run, other], root / "two.html", quiet=True),
    }


class View:
    """A page that has been opened, and short ways to ask it."""

    def __init__(self, driver, path, width=1300, height=900, dark=False):
        self.driver = driver
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        driver.get("about:blank")
        driver.get_log("browser")
        start = time.perf_counter()
        driver.get(f"file://{path}")
        self.wait("document.documentElement.dataset.ready")
        self.seconds = time.perf_counter() - start

    def __call__(self, script):
        return self.driver.execute_script(f"return {script}")

    def wait(self, script, seconds=20):
        end = time.perf_counter() + seconds
        while not self(script):
            assert time.perf_counter() < end, f"never true: {script}"
            time.sleep(0.02)

    def keys(self, *keys):
        actions = webdriver.ActionChains(self.driver)
        for key in keys:
            actions.send_keys(key)
        actions.perform()

    def set(self, label, value):
        self.driver.execute_script(
            "const e = document.querySelector(`[aria-label='${arguments[0]}']`); e.value = arguments[1];"
            "e.dispatchEvent(new Event('input')); e.dispatchEvent(new Event('change'));",
            label,
            value,
        )

    @property
    def status(self):
        return self("document.querySelector('.status').textContent")

    @property
    def complaints(self):
        return self.driver.get_log("browser")


def test_opens_at_once_and_nothing_of_a_run_runs(chromium, files):
    view = View(chromium, files["one"])
    print(f"opened in {view.seconds:.2f} s")
    assert view.seconds < 5, "under 1 s on a quiet machine"
    view("document.querySelector('.filters input[type=checkbox]').click()")
    view.wait("document.querySelector('.detail').textContent.includes('window.pwned')")
    view("[...document.querySelectorAll('details')].forEach(one => { one.open = true })")
    assert view("window.pwned") is None
    assert view("document.querySelectorAll('main img, main script, main .detail b').length") == 0
    assert "<b>pages</b>" in view("document.querySelector('.controlled em').textContent")
    assert view.complaints == []


def test_injected_markup_would_not_run_either(chromium, files):
    view = View(chromium, files["one"])
    view("document.body.insertAdjacentHTML('beforeend', '<img src=x: onerror=\"window.pwned=3\">')")
    view.wait("document.images[0].complete")
    time.sleep(0.2)
    assert view("window.pwned") is None
    assert any("Content Security Policy" in one["message"] for one in view.complaints)


def test_keys(chromium, files):
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    view = View(chromium, files["one"])
    selected = "document.querySelector('.row[aria-selected=true]').getAttribute('aria-posinset')"
    view.keys("j", "j", "k", "j")
    assert view(selected) == "3"
    assert view("document.activeElement.getAttribute('aria-activedescendant')") == "tree-row-2"
    view.wait("document.querySelector('.detail h3').textContent.includes('tree 2')")
    view.keys(keys.ENTER)
    view.wait("document.activeElement.tagName === 'H3'")
    assert view("location.hash") == "#tree=0.2"
    view.keys(keys.ESCAPE)
    assert view("document.activeElement.className") == "list"
    view.keys("/")
    assert view("document.activeElement.type") == "search"
    view.keys("on 3 at 7")
    view.wait("document.querySelector('.status').textContent.startsWith('1 of 72')")
    view.keys(keys.ESCAPE, keys.ESCAPE)
    assert view.status == "72 of 72 trees"
    view.keys(keys.END)
    assert view(selected) == "72"


def test_filters(chromium, files):
    view = View(chromium, files["two"])
    assert view.status == "120 of 120 trees"
    view.set("Run", "1")
    assert view.status == "48 of 120 trees"
    view.set("Category", "1")
    assert view.status == "24 of 120 trees"
    view.set("From step", "2")
    view.set("To step", "3")
    assert view.status == "6 of 120 trees"
    view.set("Outcome", str(1 << 4))
    unfaithful = int(view.status.split()[0])
    assert view("document.querySelectorAll('.row').length") == unfaithful
    view("document.querySelector('.filters button').click()")
    view.set("Order", "newest")
    view.wait("document.querySelector('.detail h3').textContent.includes('tree')")
    view("document.querySelector('.run input').click()")
    assert view.status == "48 of 120 trees"
    assert view("document.querySelectorAll('.chart[hidden]').length") >= 4, "what shows the hidden run alone"
    view.set("Order", "step")
    view.set("Search text", "nothing has this")
    view.wait("document.querySelector('.status').textContent.startsWith('0 of')")
    assert "No tree matches" in view("document.querySelector('.detail').textContent")
    assert view.complaints == []


def test_harmful_text_is_folded_until_asked_for(chromium, files):
    view = View(chromium, files["one"])
    view.wait("document.querySelector('.row .preview').textContent.startsWith('folded')")
    folds = "document.querySelectorAll('.detail .fold').length"
    assert view(folds) > 4
    assert view("[...document.querySelectorAll('.detail .fold')].some(one => one.open)") is False
    view.keys("f")
    view.wait(f"{folds} === 0")
    view.keys("f")
    view.wait(f"{folds} > 4")


def test_a_step_of_a_chart_leads_to_its_trees(chromium, files):
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    view = View(chromium, files["one"])
    view("document.querySelector('#rewards').scrollIntoView({behavior: 'instant'})")
    view.wait("document.querySelector('#rewards .frame svg')")
    view("document.querySelector('#rewards .frame svg').focus()")
    view.keys(keys.ARROW_RIGHT, keys.ARROW_RIGHT, keys.ARROW_RIGHT)
    assert view("document.activeElement.querySelector('.strong').textContent") == "step 2"
    view.keys(keys.ENTER)
    assert view.status == "6 of 72 trees"


def test_a_link_to_a_tree(chromium, files):
    view = View(chromium, f"{files['one']}#tree=0.40")
    view.wait("document.querySelector('.detail h3').textContent.includes('Step 6, tree 4')")


def test_a_phone(chromium, files):
    view = View(chromium, files["two"], width=390, height=844)
    assert view("document.documentElement.scrollWidth") <= 390
    view("document.querySelector('#trees').scrollIntoView({behavior: 'instant'})")
    assert view("getComputedStyle(document.querySelector('.detail')).display") == "none"
    view("document.querySelectorAll('.row')[1].click()")
    view.wait("document.querySelector('.detail').classList.contains('entered')")
    assert view("document.querySelector('.detail').clientWidth") == 390
    assert view("document.querySelector('.detail').scrollWidth") <= 390
    view("document.querySelector('.back').click()")
    assert view("getComputedStyle(document.querySelector('.detail')).display") == "none"


def test_dark_and_light(chromium, files):
    def brightness(dark):
        view = View(chromium, files["one"], dark=dark)
        colour = view("getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in colour.strip("rgb()").split(","))

    assert brightness(dark=False) > 600
    assert brightness(dark=True) < 150


def test_everything_has_a_name(chromium, files):
    view = View(chromium, files["two"], height=20000)
    charts = view("document.querySelectorAll('.frame').length")
    view.wait(f"document.querySelectorAll('.frame svg').length === {charts}")
    assert charts > 20
    named = (
        "e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.labels?.length || e.textContent.trim()"
    )
    kinds = "input, select, button, a, [role=img], [role=listbox], section"
    nameless = f"[...document.querySelectorAll('{kinds}')].filter(e => !({named})).map(e => e.outerHTML.slice(0, 90))"
    assert view(nameless) == []
    assert view.complaints == []
