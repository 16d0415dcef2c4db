"""From rows in a file to packed batches: sources, chat rendering, packing, collating."""
