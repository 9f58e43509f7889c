"""One rank of a training run: `torchrun --nproc-per-node 2 -m fuseline.train RUN_FOLDER`."""

import sys
from pathlib import Path

from .rank import main

if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
