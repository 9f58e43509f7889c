"""fuseline fuses the knowledge of several language models into one.

Several source models read the same corpus; their next-token distributions are stored as data, brought into the target model's
vocabulary and token positions, fused into one distribution per position, and the target continues training on them.
"""

from pathlib import Path

from fuseline.store.machine import keep_compiled_code  # not relative: pytest also runs this file by itself

__version__ = "0.1.0"

keep_compiled_code(Path(__file__).parent)  # here, because any module may be the first to import numba, in any process
