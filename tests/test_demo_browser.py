"""The page in a real browser: headless Chromium against the real command; and the reports."""

import base64
import json
import re
import shutil
from contextlib import ExitStack
from urllib.parse import parse_qs, urlsplit

import pytest
from demo_shop import CHANGED, MAX_BYTES, PRODUCTS, QUIET
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.ui import WebDriverWait

from jobs.config_file import read_config
from jobs.errors import GateError
from jobs.evaluate import evaluate
from jobs.refresh import refresh
from jobs.reindex import reindex
from jobs.train import train

KEPT = PRODUCTS - CHANGED
PACKAGES = {"chromium": "chromium", "chromedriver": "chromium-driver"}
PHOTOS, TOP = 5, 5
LEAST_CONTRAST = 4.5  # WCAG 2.2, AA
CONTRAST = """
const rgb = (text) => (text.match(/[\\d.]+/g) ?? [0, 0, 0, 0]).map(Number);
const light = (c) => c.slice(0, 3).map((v) => v / 255)
  .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, n) => sum + v * [0.2126, 0.7152, 0.0722][n], 0);
const ground = (e) => {
  for (; e; e = e.parentElement) {
    const c = rgb(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c;
  }
  return [255, 255, 255];
};
const low = [];
for (const e of document.querySelectorAll("body *")) {
  const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  const unseen = ["SCRIPT", "NOSCRIPT", "OPTION"].includes(e.tagName) || !e.checkVisibility();
  if (!own || unseen) continue;
  const style = getComputedStyle(e);
  const [a, b] = [light(rgb(e instanceof SVGElement ? style.fill : style.color)), light(ground(e))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < arguments[0]) low.push([e.tagName, e.className, e.textContent.slice(0, 30), ratio]);
}
return low;
"""
OPEN_ALL = "for (const one of document.querySelectorAll('details')) one.open = true"
WIDTHS = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
PRODUCTS_SHOWN = """
return [...document.querySelectorAll("#results ol")].map(
  (list) => [...list.querySelectorAll("article")].map((one) => one.dataset.product));
"""
FILTER_SHOWN = """
const [columns, done] = arguments;
import("/filters.js").then(({ Filters }) => {
  const make = (tag) => document.createElement(tag);
  const [list, chooser, button] = ["div", "select", "button"].map(make);
  const filters = new Filters(list, chooser, button, () => {});
  filters.columns = columns;
  filters.set([]);
  const order = [...chooser.options].map((option) => option.value);
  filters.set(columns.map(({ column }) => ({ column })));
  done([order, [...list.querySelectorAll("label")].map((label) => label.textContent)]);
});
"""
GIVE = """
const [kind, name, type, encoded] = arguments;
const bytes = Uint8Array.from(atob(encoded), (c) => c.charCodeAt(0));
const held = new DataTransfer();
held.items.add(new File([bytes], name, { type }));
const named = kind === "paste" ? { clipboardData: held } : { dataTransfer: held };
const Kind = kind === "paste" ? ClipboardEvent : DragEvent;
document.body.dispatchEvent(new Kind(kind, { bubbles: true, cancelable: true, ...named }));
"""


def start_browser():
    paths = {name: shutil.which(name) for name in PACKAGES}
    missing = [PACKAGES[name] for name, path in paths.items() if path is None]
    if missing:
        pytest.fail(f"the page is tested in Chromium: install Debian's {' and '.join(missing)}")
    options = webdriver.ChromeOptions()
    options.binary_location = paths["chromium"]
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu"):
        options.add_argument(f"--{argument}")
    options.add_argument("--window-size=1280,900")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=paths["chromedriver"])
    return webdriver.Chrome(options=options, service=service)


class Browser:
    """A browser on one page, with what a person does there."""

    def __init__(self, driver, address):
        self.driver, self.address = driver, address

    def open(self, query=""):
        self.driver.get(self.address + query)
        self.wait(lambda: self.text("releases"))

    def wait(self, condition):
        ignored = [StaleElementReferenceException]  # of the page before
        return WebDriverWait(self.driver, 20, 0.05, ignored).until(lambda _: condition())

    def id(self, name):
        return self.driver.find_element(By.ID, name)

    def text(self, name):
        return self.id(name).text

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def settle(self):
        """Wait for an answer, and return what the page says of it."""
        busy = "return document.getElementById('results').getAttribute('aria-busy')"
        self.wait(lambda: self.driver.execute_script(busy) is None)
        return self.wait(lambda: self.text("status") or self.text("error"))

    def products(self, answer=0):
        found = self.driver.execute_script(PRODUCTS_SHOWN)
        return found[answer] if found else []

    def say(self, words):
        self.id("text").clear()
        self.id("text").send_keys(words, Keys.ENTER)
        return self.settle()

    def upload(self, path):
        self.id("photo").send_keys(str(path))
        return self.settle()

    def give(self, kind, path):
        """Paste or drop a file."""
        content = base64.b64encode(path.read_bytes()).decode()
        self.driver.execute_script(GIVE, kind, path.name, "image/jpeg", content)
        return self.settle()

    def add_filter(self, column):
        Select(self.id("add-filter")).select_by_value(column)
        self.id("add").click()
        return self.all("#filters fieldset")[-1]

    @property
    def focused(self):
        return self.driver.switch_to.active_element

    def press(self, *keys):
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    def emulate(self, **media):
        """Set `width` in px, or `scheme`."""
        if "width" in media:
            metrics = {"width": media["width"], "height": 800, "deviceScaleFactor": 1}
            self.driver.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride", metrics | {"mobile": False}
            )
        if "scheme" in media:
            scheme = {"name": "prefers-color-scheme", "value": media["scheme"]}
            self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


@pytest.fixture(scope="module")
def driver():
    found = start_browser()
    yield found
    found.quit()


@pytest.fixture(scope="module")
def addresses(demo_shop):
    """The page of release 2, and of release 2 beside release 1."""
    with ExitStack() as stack:
        served = [
            stack.enter_context(demo_shop.serve("--quiet", *options))
            for options in ((), ("--compare", "1"))
        ]
        yield [address for address, _ in served]


@pytest.fixture
def browser(driver, addresses):
    found = Browser(driver, addresses[0])
    found.emulate(width=1280, scheme="light")
    found.open()
    driver.get_log("browser")
    yield found
    lines = [one["message"] for one in driver.get_log("browser")]
    assert [one for one in lines if "Failed to load resource" not in one] == []


@pytest.fixture
def compared(driver, addresses):
    found = Browser(driver, addresses[1])
    found.emulate(width=1280, scheme="light")
    found.open()
    return found


def test_a_street_photo_finds_its_product(browser, demo_shop):
    """Held-out photos of a trained encoder; one alone may be hard."""
    hits = []
    for photo, product in demo_shop.queries[:PHOTOS]:
        said = browser.upload(photo)
        assert said.startswith("12 products in ")
        hits.append(product in browser.products()[:TOP])
    assert len(hits) == PHOTOS
    assert sum(hits) > PHOTOS / 2, hits
    assert browser.id("preview").is_displayed()
    assert browser.text("photo-name") == photo.name
    best = browser.all("article")[0]
    row = demo_shop.rows[best.get_attribute("data-product")]
    picture = best.find_element(By.TAG_NAME, "img")
    assert picture.get_attribute("alt") == row["title"]
    assert best.find_element(By.TAG_NAME, "h3").text == row["title"]
    browser.wait(lambda: int(picture.get_property("naturalWidth")) > 1)
    assert f"{row['price']:.2f}" in best.text
    browser.id("remove-photo").click()
    assert browser.focused.get_attribute("id") == "photo"
    assert browser.products() == []
    assert not browser.id("preview").is_displayed()


def test_bad_uploads_are_refused_in_words(browser, demo_shop, tmp_path):
    words = tmp_path / "words.jpg"
    words.write_text("no picture, just words")
    large = tmp_path / "large.jpg"
    large.write_bytes(bytes(MAX_BYTES + 1))
    wide = tmp_path / "wide.png"
    Image.new("RGB", (1200, 1000), "teal").save(wide)
    assert browser.upload(words).startswith("This file is not a picture. These are read: JPEG,")
    assert not browser.id("preview").is_displayed()
    assert browser.upload(large) == ("This photo is too large: it has 0.3 MB, the limit is 0.3 MB.")
    assert "too many pixels: 1200 x 1000 px" in browser.upload(wide)
    assert browser.products() == []
    assert browser.id("error").get_attribute("role") == "alert"
    assert "products in" in browser.upload(demo_shop.queries[0][0])
    assert browser.text("error") == ""


def test_words_are_searched_and_kept_in_the_address(browser):
    assert browser.text("status") == "Search by a photo, words, or both."
    assert browser.say("red mug").startswith("12 products in ")
    first = browser.products()
    kept = browser.driver.current_url
    assert parse_qs(urlsplit(kept).query) == {"q": ["red mug"]}
    browser.say("blue lamp")
    second = browser.products()
    assert second != first
    browser.driver.back()
    browser.wait(lambda: browser.products() == first)
    assert browser.id("text").get_property("value") == "red mug"
    browser.driver.refresh()
    browser.wait(lambda: browser.products() == first)
    Select(browser.id("field")).select_by_value("text")
    browser.wait(lambda: "field=text" in browser.driver.current_url)
    browser.settle()
    browser.id("count").clear()
    browser.id("count").send_keys("3", Keys.ENTER)
    browser.wait(lambda: len(browser.products()) == 3)
    browser.id("text").clear()
    browser.id("go").click()
    assert browser.settle() == "Give a photo, words, or both."
    assert browser.focused.get_attribute("id") == "text"


def test_the_weight_is_for_photo_and_words_together(browser, demo_shop):
    weight = browser.id("weight")
    assert not weight.is_enabled()
    browser.upload(demo_shop.queries[0][0])
    assert not weight.is_enabled()
    alone = browser.products()
    browser.say("a lamp")
    assert weight.is_enabled()
    assert weight.get_attribute("aria-valuetext") == "50 % photo, 50 % words"
    weight.send_keys(Keys.END)
    browser.wait(lambda: browser.text("weight-words") == "100 % photo, 0 % words")
    browser.settle()
    browser.wait(lambda: browser.products() == alone)


def test_filters_narrow_the_products(browser, demo_shop):
    rows = {name: demo_shop.rows[name] for name in demo_shop.ids[1]}
    color = rows[min(rows)]["color"]
    browser.say("mug")
    box = browser.add_filter("color")
    assert browser.focused.get_attribute("type") == "checkbox"
    next(one for one in box.find_elements(By.TAG_NAME, "label") if one.text == color).click()
    expected = {name for name, row in rows.items() if row["color"] == color}
    browser.wait(lambda: set(browser.products()) == expected)
    browser.add_filter("price")
    browser.press("0.01", Keys.TAB, "0.02", Keys.ENTER)
    browser.wait(lambda: browser.text("status") == "No product found that passes the filters.")
    kept = json.loads(parse_qs(urlsplit(browser.driver.current_url).query)["filters"][0])
    assert kept == [
        {"column": "color", "values": [color]},
        {"column": "price", "from": 0.01, "to": 0.02},
    ]
    browser.driver.refresh()
    browser.wait(lambda: browser.text("status") == "No product found that passes the filters.")
    browser.all(".filter > button")[1].click()
    browser.wait(lambda: set(browser.products()) == expected)
    assert browser.focused.get_attribute("id") == "add-filter"


def test_filters_begin_with_the_price_and_name_every_value(browser):
    columns = [
        {"column": "product_id", "kind": "contains"},
        {"column": "size", "kind": "values", "values": ["", " ", "L", False]},
        {"column": "stock", "kind": "range", "low": 0, "high": 9},
        {"column": "price", "kind": "range", "low": 0, "high": 9},
    ]
    order, labels = browser.driver.execute_async_script(FILTER_SHOWN, columns)
    assert order == ["price", "stock", "size", "product_id"]
    assert labels[1:5] == ["(empty)", "(spaces)", "L", "no"]
    assert Select(browser.id("add-filter")).first_selected_option.text == "price"


def test_more_like_this(browser, demo_shop):
    browser.say("mug")
    first = browser.products()[0]
    title = demo_shop.rows[first]["title"]
    browser.all("article button")[0].click()
    browser.settle()
    browser.wait(lambda: first not in browser.products())
    assert len(browser.products()) == 12
    assert browser.text("like-words") == f"Products like “{title}”"
    assert browser.id("text").get_property("value") == ""
    assert browser.focused.get_attribute("id") == "results-title"
    shown = browser.products()
    browser.driver.refresh()
    browser.wait(lambda: browser.products() == shown)
    assert browser.text("like-words") == f"Products like “{title}”"
    browser.id("remove-like").click()
    assert browser.products() == []
    assert browser.focused.get_attribute("id") == "text"


def test_two_releases_stand_side_by_side(compared, demo_shop):
    compared.id("count").clear()
    compared.id("count").send_keys("30")
    said = compared.say("mug")
    assert said.startswith(f"{KEPT - CHANGED} of the first {KEPT} products are in both, in ")
    assert [one.text for one in compared.all("#results section h3")] == ["release 2", "release 1"]
    newer, older = compared.products(0), compared.products(1)
    assert (set(newer), set(older)) == (demo_shop.ids[1], demo_shop.ids[0])
    for side, (mine, other) in enumerate(((newer, older), (older, newer))):
        column = compared.all("#results section")[side]
        marks = [one.text for one in column.find_elements(By.CSS_SELECTOR, ".mark")]
        gone, word = ("new here", "was") if side == 0 else ("gone", "now")
        ends = {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd"}
        for place, (product, mark) in enumerate(zip(mine, marks, strict=True), 1):
            there = other.index(product) + 1 if product in other else None
            expected = f"{word} {there}{ends.get(there, 'th')}"
            same = "same place" if there == place else expected
            assert mark == (gone if there is None else same)
    left, right = (one.rect for one in compared.all("#results section"))
    assert left["x"] + left["width"] <= right["x"]
    compared.emulate(width=360)
    left, right = (one.rect for one in compared.all("#results section"))
    assert left["y"] + left["height"] <= right["y"]


def test_the_keyboard_is_enough(browser):
    for _ in range(30):
        if browser.focused.get_attribute("id") == "text":
            break
        browser.press(Keys.TAB)
    assert browser.focused.get_attribute("id") == "text"
    browser.press("red mug", Keys.ENTER)
    assert "products in" in browser.settle()
    first = browser.products()[0]
    seen = []
    for _ in range(60):
        browser.press(Keys.TAB)
        seen.append(browser.focused.get_attribute("id"))
        outline = browser.focused.value_of_css_property("outline-style")
        covered = browser.focused.get_attribute("type") == "file"  # its label has the outline
        assert outline != "none" or covered, seen
        if browser.focused.text == "More like this":
            break
    assert {"field", "count", "add-filter", "add", "go"} <= set(seen)
    browser.press(Keys.ENTER)
    browser.wait(lambda: first not in browser.products() and browser.products())
    browser.press(Keys.TAB)
    browser.press(Keys.ENTER)  # "Remove"
    assert browser.focused.get_attribute("id") == "text"


def test_the_skip_link_keeps_a_photos_products(browser, demo_shop):
    browser.upload(demo_shop.queries[0][0])
    shown = browser.products()
    assert shown
    skip = browser.all("a.skip")[0]
    browser.driver.execute_script("arguments[0].focus()", skip)
    browser.press(Keys.ENTER)
    browser.wait(lambda: browser.focused.get_attribute("id") == "results")
    assert urlsplit(browser.driver.current_url).fragment == "results"
    assert browser.products() == shown
    assert browser.id("preview").is_displayed()
    browser.driver.back()
    browser.wait(lambda: not urlsplit(browser.driver.current_url).fragment)
    assert browser.products() == shown


def test_a_page_without_its_server_keeps_the_question(driver, addresses, demo_shop):
    browser = Browser(driver, addresses[0])
    driver.execute_cdp_cmd("Network.enable", {})
    driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*/api/release"]})
    try:
        driver.get(addresses[0])
        browser.wait(lambda: browser.text("error").startswith("The server doesn't answer."))
        browser.id("text").send_keys("red mug")
    finally:
        driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": []})
    photo = demo_shop.queries[0][0]
    assert "products in" in browser.upload(photo)
    assert browser.text("photo-name") == photo.name
    assert browser.id("text").get_property("value") == "red mug"
    assert browser.id("weight").is_enabled()
    assert len(browser.products()) == 12


def test_photos_are_pasted_and_dropped(browser, demo_shop):
    (pasted, _), (dropped, _) = demo_shop.queries[:2]
    assert "products in" in browser.give("paste", pasted)
    assert browser.text("photo-name") == pasted.name
    shown = browser.products()
    assert "products in" in browser.give("drop", dropped)
    assert browser.text("photo-name") == dropped.name
    assert browser.products() != shown


@pytest.mark.parametrize("page", ["browser", "compared"])
def test_a_narrow_page_needs_no_sideways_scrolling(page, request, demo_shop):
    found = request.getfixturevalue(page)
    found.emulate(width=360)
    found.upload(demo_shop.queries[0][0])
    found.add_filter("category")
    found.add_filter("price")
    found.say("a lamp with a very-long-word-that-nobody-would-ever-write-in-a-search-for-products")
    found.all("summary")[0].click()
    assert found.products()
    needed, there = found.driver.execute_script(WIDTHS)
    assert needed <= there <= 360
    for one in found.all("main *"):
        if one.is_displayed():
            assert one.rect["x"] >= 0
            assert one.rect["x"] + one.rect["width"] <= 361, one.get_attribute("outerHTML")[:200]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("page", ["browser", "compared"])
def test_everything_has_a_name_and_contrast(page, scheme, request, demo_shop):
    found = request.getfixturevalue(page)
    found.emulate(scheme=scheme)
    found.upload(demo_shop.queries[0][0])
    for column in ("category", "price", "title"):
        found.add_filter(column)
    found.say("a lamp")
    found.all("summary")[0].click()
    assert found.driver.execute_script(CONTRAST, LEAST_CONTRAST) == []
    ground = found.driver.find_element(By.TAG_NAME, "body").value_of_css_property("background")
    dark = ground.startswith("rgb(23, 24, 22)")
    assert dark == (scheme == "dark")
    controls = found.all("input, select, button, img, section, form, fieldset, [role=region]")
    assert len(controls) > 20
    unnamed = [one.get_attribute("outerHTML") for one in controls
               if one.is_displayed() and not one.accessible_name]  # fmt: skip
    assert unnamed == []
    assert found.id("photo").accessible_name == "Choose a photo"
    assert found.id("camera").get_attribute("capture") == "environment"
    ids = [one.get_attribute("id") for one in found.all("[id]")]
    assert len(ids) == len(set(ids))


def test_a_server_that_is_gone_is_told(driver, demo_shop):
    with demo_shop.serve("--quiet") as (address, running):
        browser = Browser(driver, address)
        browser.open()
        running.kill()
        running.wait()
        said = browser.say("mug")
        assert said == "The server doesn't answer. Is vitrine demo still running?"


@pytest.fixture(scope="module")
def reports(demo_shop, tmp_path_factory):
    """Reports of each command, of a run with nothing to do, and of one that the gate stopped."""
    folder = tmp_path_factory.mktemp("reports")
    shutil.copytree(demo_shop.folder / "store", folder / "store")

    def read(name, *more):
        return read_config(demo_shop.folder / name, [f"store={folder / 'store'}", *more])

    queries = f"evaluate.queries={demo_shop.catalog / 'queries.parquet'}"
    evaluate(read("job.yaml", queries), QUIET)
    train(read("start.yaml", "train.steps=4", "train.validate_every=2"), folder / "encoder", QUIET)
    refresh(read("job.yaml"), QUIET)
    with pytest.raises(GateError):
        reindex(read("start.yaml", queries, "gate.min_recall_at_10=1"), QUIET)
    logs = sorted((folder / "store" / "runs").glob("*/log.jsonl"))
    commands = [json.loads(log.read_text().partition("\n")[0])["command"] for log in logs]
    assert set(commands) == {"refresh", "reindex", "evaluate", "train"}
    found = [log.with_name("report.html") for log in logs]
    texts = "".join(report.read_text(encoding="utf-8") for report in found)
    assert "Nothing to do" in texts
    assert "Nothing published." in texts
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_reports_can_be_read_in_either_scheme_and_on_a_phone(driver, reports, scheme):
    for report in reports:
        found = Browser(driver, report.as_uri())
        found.emulate(width=1280, scheme=scheme)
        driver.get(found.address)
        driver.execute_script(OPEN_ALL)
        assert driver.execute_script(CONTRAST, LEAST_CONTRAST) == [], report
        ground = driver.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")
        is_dark = sum(map(int, re.findall(r"\d+", ground)[:3])) < 3 * 128
        assert is_dark == (scheme == "dark"), report
        found.emulate(width=360)
        needed, there = driver.execute_script(WIDTHS)
        assert needed <= there <= 360, report
