"""On the path of a writer's process only: its store fails as the environment says."""

import os
import sys
from pathlib import Path

if "FAULTY_WRITER" in os.environ:
    sys.path.append(str(Path(__file__).parents[2]))
    from support.faulty_attempt import break_writer

    break_writer()
