"""The page in a real browser: what a person can do with it, in light and dark, on a phone and on a desk.

Chromium and its driver come from Debian (`apt-get install chromium chromium-driver`); without them this is skipped.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import folders
import pytest

from spectreg_lab.page import report

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium drives the browser: pip install selenium")
By = pytest.importorskip("selenium.webdriver.common.by").By
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
HEADLESS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="no Chromium here: apt-get install chromium chromium-driver runs these"
    ),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def line(regime: str, method: str, seed: int, epoch: int) -> dict:
        sigma = {"features.0.weight": 1.0 + epoch, "classifier.weight": 2.0 + seed}
        return {"sigma": sigma, "train_loss": 1 / epoch, "test_loss": 2 / epoch, "learning_rate": 0.1}

    def measures(regime: str, method: str, seed: int) -> dict:
        return {"spectra": {f"features.{i}.weight": [2.0 / (k + 1) for k in range(8)] for i in range(5)}}

    folder = tmp_path_factory.mktemp("page")
    return report.write(folders.write_study(folder / "study", line=line, measures=measures))


@contextmanager
def browser(width: int = 1400, dark: bool = False) -> Iterator:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in HEADLESS.split():
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def wide(page: Path) -> Iterator:
    with browser() as driver:
        driver.get(page.as_uri())
        yield driver


def shown(driver, method: str) -> list[bool]:
    curves = driver.find_elements(By.CSS_SELECTOR, f'svg [data-method="{method}"]')
    return [curve.value_of_css_property("display") != "none" for curve in curves]


def test_nothing_is_asked_of_a_network_and_the_console_stays_silent(wide, page):
    log = "\n".join(entry["message"] for entry in wide.get_log("performance"))
    asked = {part.split('"')[0] for part in log.split('"url":"')[1:]}
    assert {url for url in asked if not url.startswith(("data:", "about:", "chrome"))} <= {page.as_uri()}
    assert wide.get_log("browser") == []


def test_a_legend_hides_its_method_in_every_figure_and_shows_it_again(wide):
    buttons = wide.find_elements(By.CSS_SELECTOR, '.legend button[data-method="spectral"]')
    assert len(buttons) > 1
    assert all(shown(wide, "spectral"))
    wide.execute_script("arguments[0].click()", buttons[0])
    assert not any(shown(wide, "spectral"))
    assert all(shown(wide, "decay"))
    assert {button.get_attribute("aria-pressed") for button in buttons} == {"false"}
    wide.execute_script("arguments[0].click()", buttons[-1])
    assert all(shown(wide, "spectral"))


def test_every_link_of_the_contents_lands_on_its_heading(wide):
    for link in wide.find_elements(By.CSS_SELECTOR, "nav a"):
        target = link.get_attribute("href").partition("#")[2]
        wide.execute_script("document.documentElement.style.scrollBehavior = 'auto'; arguments[0].click()", link)
        top = wide.execute_script("return document.getElementById(arguments[0]).getBoundingClientRect().top", target)
        end = wide.execute_script("return innerHeight + scrollY >= document.documentElement.scrollHeight - 2")
        assert end or -5 <= top <= 100, target


def test_a_table_sorts_by_the_column_that_is_clicked_and_back(wide):
    table = wide.find_element(By.CSS_SELECTOR, "#verdicts table, #table1 table")
    head = table.find_elements(By.CSS_SELECTOR, "thead th")[1]
    button = head.find_element(By.TAG_NAME, "button")
    orders = []
    for _ in range(2):
        wide.execute_script("arguments[0].click()", button)
        rows = table.find_elements(By.CSS_SELECTOR, "tbody tr")
        orders.append([row.get_property("cells")[1].get_property("firstChild")["textContent"] for row in rows])
        assert head.get_attribute("aria-sort")
    assert orders[0] == sorted(orders[0])
    assert orders[1] == sorted(orders[1], reverse=True)


def test_legends_and_tables_can_be_reached_and_used_by_the_keyboard_alone(wide):
    wide.execute_script("document.querySelector('.legend button').focus()")
    focused = wide.switch_to.active_element
    method = focused.get_attribute("data-method")
    focused.send_keys(Keys.SPACE)
    assert not any(shown(wide, method))
    focused.send_keys(Keys.SPACE)
    assert all(shown(wide, method))
    assert wide.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    reachable = "button, a[href], summary, [tabindex='0']"
    assert wide.execute_script(
        "return [...document.querySelectorAll(arguments[0])].every((e) => e.tabIndex === 0)", reachable
    )


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_fits_its_width_and_its_words_stand_out_from_the_paper(page, width, dark):
    with browser(width, dark) as driver:
        driver.get(page.as_uri())
        wider = driver.execute_script("return document.documentElement.scrollWidth - innerWidth")
        assert wider <= 0
        paper, ink = (
            driver.execute_script(f"return getComputedStyle(document.body).{name}")
            for name in ("backgroundColor", "color")
        )
        assert (luminance(paper) < luminance(ink)) == dark
        text = driver.find_element(By.CSS_SELECTOR, "figure svg text")
        assert contrast(luminance(text.value_of_css_property("fill")), luminance(paper)) > 4.5


def test_nothing_but_the_pages_own_style_stands_before_the_first_paint(wide):
    assert not wide.find_elements(By.CSS_SELECTOR, "head script, head link, img")
    assert wide.execute_script("return document.body.lastElementChild.tagName") == "SCRIPT"


def luminance(colour: str) -> float:
    """WCAG's relative luminance of a CSS colour."""
    channels = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: float, b: float) -> float:
    return (max(a, b) + 0.05) / (min(a, b) + 0.05)
