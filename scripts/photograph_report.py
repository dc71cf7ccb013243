"""Make examples/report.webp, the picture in the README: the report that examples/evaluate.py writes.

It needs the packages of ``pip install -e ".[test]"`` and a Chromium that is called ``chromium``.

    python examples/evaluate.py && python scripts/photograph_report.py
"""

import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

REPORT = Path("results/evaluate/report.html")
PICTURE = Path(__file__).parents[1] / "examples" / "report.webp"
WINDOW = {"width": 1000, "height": 812}


def main() -> None:
    """Open the report, and save what the window shows of it."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport=WINDOW, color_scheme="light")
        page.goto(REPORT.absolute().as_uri())
        page.wait_for_load_state("load")
        screenshot = page.screenshot()
        browser.close()
    Image.open(io.BytesIO(screenshot)).save(PICTURE, quality=80)
    print(f"Saved {PICTURE}, {PICTURE.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
