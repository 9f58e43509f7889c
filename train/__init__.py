"""The Megatron-core trainer: data, loss, model conversion, checkpoints, merging."""
