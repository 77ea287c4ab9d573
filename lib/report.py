"""Draw the table, figures and page of a finished run again: `python -m lib.report out`."""

import sys
from pathlib import Path

from lib.extension import find
from lib.io import BadInput


def main(argv) -> int:
    try:
        print(find("write_page", "beyond.page")(Path(argv[-1] if argv else "out")))
    except BadInput as e:
        print(f"lib.report: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
