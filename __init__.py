"""fuseline fuses the knowledge of several language models into one.

Several source models read the same corpus; their next-token distributions are stored as data, brought into the target model's
vocabulary and token positions, fused into one distribution per position, and the target continues training on them.
"""

__version__ = "0.1.0"
