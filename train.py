"""Train: `python train.py recipe=d1 task=math500`; `--help` lists the choices."""

import sys

from d1lit.app.cli import train

if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
