#!/usr/bin/env python3
"""Start a script in several processes: torchrun with the published launcher's flags.

python multiproc.py --nproc_per_node 2 main.py …
python multiproc.py --nnodes 2 --node_rank 0 --nproc_per_node 8 --master_addr HOST --master_port 29500 main.py …

All flags of ``torchrun --help`` go before the script; a ``--master_port`` among the script's arguments counts too.
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports below, which take seconds, needs no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone runs without being installed

from sparselearning.process.launch import launch
from sparselearning.process.script import run_script

if __name__ == "__main__":
    run_script(lambda: launch(sys.argv[1:]))
