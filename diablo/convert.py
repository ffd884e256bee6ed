"""Converts the authors' checkpoints (ziyangjoy/DiaBlo, `adapter.chkpt`) to our adapters, and back.

python -m diablo.convert adapter.chkpt OUT --base meta-llama/Llama-2-7b-hf
python -m diablo.convert OUT adapter.chkpt --back
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m diablo.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="the authors' adapter.chkpt; with --back our adapter's folder")
    parser.add_argument("out", type=Path, help="folder to create; with --back the checkpoint to create")
    parser.add_argument("--base", help="hub id or folder of the base model that the checkpoint was trained on")
    parser.add_argument("--back", action="store_true", help="convert our adapter to the authors' format")
    options = parser.parse_args()
    if not options.back and not options.base:
        parser.error("--base is required: the checkpoint does not name its base model")
    from diablo.authors import from_authors, one_line, to_authors  # after the arguments: it imports torch

    try:
        if options.back:
            print(f"{options.out}: layers with blocks: {to_authors(options.source, options.out)}")
        else:
            config = from_authors(options.source, options.out, options.base)
            print(
                f"{options.out}: num_blocks={config.num_blocks}, target_modules={sorted(config.target_modules or [])}"
            )
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
