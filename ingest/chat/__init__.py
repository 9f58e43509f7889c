"""Conversations: read from rows, rendered by a chat template, and tokenized for any model with control tokens and masks."""
