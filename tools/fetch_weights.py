"""Fetch the weights of the networks behind FID, FD-DINOv2 and KID over CLIP, and verify them.

    python -m tools.fetch_weights                                    all, into torch hub's cache, where evaluation looks
    python -m tools.fetch_weights inception clip --weights_dir DIR   two of them, into a folder to carry elsewhere

A file that is there already is verified, not fetched. Where there is no network, `--weights_dir DIR` (WEIGHTS_DIR) of
evaluation and of prepare_ref.py finds what the folder has.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from util.errors import UserError
from util.evaluation.weights import WEIGHTS, hub_folder


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, or 2 if one of them is not there, which a sentence on stderr explains."""
    parser = argparse.ArgumentParser(
        "python -m tools.fetch_weights", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", metavar="network", help=f"any of {', '.join(WEIGHTS)} (default: all)")
    parser.add_argument("--weights_dir", type=Path, help="folder to fetch into (default: torch hub's cache)")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.networks if name not in WEIGHTS]:
        parser.error(f"there are no weights {unknown[0]!r}; choose from {', '.join(WEIGHTS)}")
    code = 0
    for name in args.networks or WEIGHTS:
        try:
            path, sha256 = WEIGHTS[name].fetch(args.weights_dir or hub_folder(), progress=sys.stderr.isatty())
            print(f"{path}\nsha256 {sha256}, {WEIGHTS[name].origin(sha256)}")
        except UserError as error:
            print(f"fetch_weights: error: {error}", file=sys.stderr)
            code = 2
    return code


if __name__ == "__main__":
    sys.exit(main())
