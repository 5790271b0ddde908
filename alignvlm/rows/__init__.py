"""Makes the rows of a batch from records: shared-image packing, labels and token layout."""
