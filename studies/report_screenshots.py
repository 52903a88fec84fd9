"""What does a report look like on a desk and on a phone, in light and in dark, and how long is it?

    blockprune report RUN... --out report.html
    python studies/report_screenshots.py report.html --out screenshots/

Writes PNGs of the page, its sections folded, at 1280 and 390 pixels of width, in both colour schemes, each of 256 colours. It needs
Chromium and the `dev` extra; about 10 seconds.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path
from typing import Literal

from PIL import Image
from playwright.sync_api import sync_playwright

WIDTHS = {"desk": 1280, "phone": 390}
HEIGHT = 900
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("--out", type=Path, default=Path("screenshots"))
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome"))
    parser.add_argument("--dry-run", action="store_true", help="print what would be pictured")
    args = parser.parse_args()
    if args.dry_run:
        print(f"{args.page} at {' and '.join(map(str, WIDTHS.values()))} pixels of width, {' and '.join(SCHEMES)}")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.chromium, args=["--no-sandbox"])
        for device, width in WIDTHS.items():
            for scheme in SCHEMES:
                page = browser.new_page(viewport={"width": width, "height": HEIGHT}, color_scheme=scheme)
                page.goto(args.page.resolve().as_uri())
                height = page.evaluate("document.documentElement.scrollHeight")
                print(f"{device}, {scheme}: {height / HEIGHT:.1f} screens of {width} x {HEIGHT} pixels")
                picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
                picture.quantize(256, dither=Image.Dither.NONE).save(args.out / f"{device}-{scheme}.png", optimize=True)
                page.close()
        browser.close()
    print(f"screenshots are in {args.out}")


if __name__ == "__main__":
    main()
