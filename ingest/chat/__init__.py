"""Conversations: read from rows, rendered by a chat template, and read by any model's tokenizer with their control tokens and masks."""
