"""Repack a wheel without some of its files."""

import argparse
import re
import zipfile
from pathlib import Path

from nightshift.core.stage import run_main


def main(wheel: Path, folder: Path, pattern: str) -> None:
    """Write the wheel to a folder without the files that match the pattern, and their RECORD entries."""
    unwanted = re.compile(pattern)
    with (
        zipfile.ZipFile(wheel) as old,
        zipfile.ZipFile(folder / wheel.name, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new,
    ):
        for item in old.infolist():
            if unwanted.search(item.filename):
                continue
            data = old.read(item)
            if item.filename.endswith(".dist-info/RECORD"):
                lines = data.decode().splitlines(keepends=True)
                data = "".join(one for one in lines if not unwanted.search(one.partition(",")[0])).encode()
            new.writestr(item, data)


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("wheel", type=Path, help="wheel to repack")
    parser.add_argument("folder", type=Path, help="output folder of the smaller wheel")
    parser.add_argument("pattern", help="regular expression for the paths of files to leave out")


if __name__ == "__main__":
    run_main(main, declare)
