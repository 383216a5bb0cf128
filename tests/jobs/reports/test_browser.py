"""The page in headless Chromium, at the widths of a screen and of a telephone, light and dark."""

import shutil

import pytest

from hasten.jobs.cli.main import main
from tests.jobs.reports import folders

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for path in map(shutil.which, BROWSERS) if path), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed")

LOOKS = [(width, scheme) for width in (1280, 400) for scheme in ("light", "dark")]
# Contrast, as WCAG 2 has it, of every text with what is behind it: [ratio, text].
CONTRASTS = """() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const [r, g, b] = parts(colour).map((part) => part / 255)
      .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = getComputedStyle(each).backgroundColor;
      if ((parts(colour)[3] ?? 1) === 1) return colour;
    }
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text = walker.nextNode(); text; text = walker.nextNode()) {
    const element = text.parentElement;
    if (!text.data.trim() || element.closest("script, details:not([open]) > :not(summary)")) continue;
    const [one, other] = [light(getComputedStyle(element).color), light(behind(element))];
    found.push([(Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05), text.data.trim()]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A page with every section that there is: a sweep, runs that decode what it made, and a search."""
    folder = tmp_path_factory.mktemp("report")
    sweep = folders.sweep(folder / "sweep", ended=False)
    decoded = [
        folders.decode(folder / name, str(sweep / "points" / name / "model"), "union", speed)
        for name, speed in (("gptq-2", 90.0), ("gptq-4", 60.0))
    ]
    paths = map(str, [sweep, *decoded, folders.search(folder / "search")])
    assert main(["report", *paths, "--output", str(folder / "page")]) == 0
    return folder / "page/report.html"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER)
        yield browser
        browser.close()


@pytest.fixture(params=LOOKS, ids=lambda look: f"{look[0]}-{look[1]}")
def page(request, browser, report):
    """The page, open; what the browser complained about and what it asked for are its `complaints` and `requests`."""
    width, scheme = request.param
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.complaints, page.requests, page.scheme = [], [], scheme
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("request", lambda request: page.requests.append(request.url))
    page.goto(report.as_uri())
    yield page
    page.close()


def test_it_is_rendered_without_complaint_and_without_asking_for_anything(page, report):
    assert page.complaints == []
    assert {url for url in page.requests if not url.startswith("data:")} == {report.as_uri()}
    pictures = page.evaluate(
        "[...document.images].map((each) => [each.naturalWidth, each.getBoundingClientRect().width])"
    )
    assert len(pictures) == 9
    assert all(natural > 0 and shown > 300 for natural, shown in pictures)
    assert page.locator("h2").all_text_contents() == [
        *("compress: points", "decode: runs", "search: runs", "Failures", "quality against size"),
        *("quality against tokens per second", "bits per layer", "allocators", "acceptance by depth", "time share"),
    ]


def test_only_tables_are_wider_than_the_page_and_scroll_by_themselves(page):
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    outside = page.evaluate(
        """(width) => [...document.body.querySelectorAll("*")]
          .filter((each) => !each.closest(".scroll > *, caption") && each.getBoundingClientRect().right > width)
          .map((each) => each.outerHTML)""",
        width,
    )
    assert outside == []
    assert set(
        page.evaluate("[...document.querySelectorAll('.scroll')].map((e) => getComputedStyle(e).overflowX)")
    ) == {"auto"}


def test_texts_are_large_and_stand_out_from_what_is_behind_them(page):
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 100
    assert [text for ratio, text in contrasts if ratio < 4.5] == []  # WCAG 2, level AA
    sizes = page.evaluate(
        "[...document.querySelectorAll('p, td, th, figcaption')].map((e) => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 12


def test_pictures_have_the_colours_and_the_width_of_the_page(page):
    width, scheme = page.viewport_size["width"], page.scheme
    chosen = page.evaluate("[...document.images].map((each) => each.currentSrc)")
    query = "(max-width: 640px)" if width == 400 else None
    dark = "(prefers-color-scheme: dark)" if scheme == "dark" else None
    media = " and ".join(part for part in (query, dark) if part)
    wanted = page.evaluate(
        """(media) => [...document.querySelectorAll("picture")].map((each) => media
          ? each.querySelector(`source[media="${media}"]`).srcset : each.querySelector("img").src)""",
        media,
    )
    assert chosen == wanted


def test_a_click_on_a_heading_sorts_and_a_second_one_turns_the_order(page):
    def column(number):
        return page.locator(f"table >> nth=0 >> tbody tr td:nth-child({number})").all_inner_texts()

    assert column(1) == ["1", "2", "3", "4", "5", "6", "7"]
    size = page.get_by_role("button", name="size MiB").first
    size.click()
    assert column(7) == ["2", "2", "4", "4", "–", "–", "–"]
    size.click()
    assert column(7) == ["4", "4", "2", "2", "–", "–", "–"]
    assert page.locator("th[aria-sort]").first.get_attribute("aria-sort") == "descending"
    page.get_by_role("button", name="quantizer").first.click()
    assert column(4) == [*["gptq"] * 5, *["round_to_nearest"] * 2]
    page.get_by_role("button", name="mark").first.click()
    assert [each.split() for each in column(2)[:2]] == [["winner", "front"], ["front"]]
    assert page.complaints == []
